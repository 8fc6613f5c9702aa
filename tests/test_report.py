import errno
import io
import json
import os
import re
import signal
import threading

import pytest
import torch

from support.report import CollapseWatch, Report, hide_tensorboard_errors

HEALTHY = {"entropy_share": 0.6, "output_information": 1.2, "cls_cosine": 0.5}
HEALTHY |= {"patch_entropy_share": 0.7, "patch_information": 1.1}


@pytest.mark.parametrize(
    ("values", "name", "option"),
    [
        ({"entropy_share": 0.999, "output_information": 0.0}, "uniform outputs of CLS", "--patch_head"),
        ({"patch_entropy_share": 0.999, "patch_information": 0}, "uniform outputs of patches", "--teacher_temp"),
        ({"patch_information": 0.01}, "one output for all patches", "--freeze_last_layer"),
        ({"entropy_share": 0.3, "output_information": 0.01}, "one output for all images", "--freeze_last_layer"),
        ({"cls_cosine": 0.9999}, "features all alike", "--lr"),
    ],
)
def test_a_collapse_that_lasts_is_named_once(values, name, option):
    watch = CollapseWatch(patience=3)
    collapsed = {**HEALTHY, **values}
    assert [len(watch(v)) for v in (collapsed, collapsed, HEALTHY, collapsed, collapsed)] == [0] * 5
    (warning,) = watch(collapsed)
    assert f"collapse: {name} in 3 consecutive reports" in warning
    assert option in warning
    assert watch(collapsed) == []
    assert watch(HEALTHY) == []


def test_the_bar_moves_every_step_below_a_line_for_the_model(tmp_path, monkeypatch):
    """On a terminal, long before the first report."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("sys.stdout", terminal)
    report = Report(tmp_path, start_step=0, epochs=2, steps_per_epoch=10)
    report.start({}, {}, "vit_micro/8, loss mean")
    report.bar.mininterval = 0
    for _ in range(2):
        report.step()
    assert terminal.getvalue().startswith("vit_micro/8, loss mean\n")
    *_, last = terminal.getvalue().split("\r")
    assert re.search(r" 2/20 \[\d\d:\d\d<\d\d:\d\d, ", last), last  # elapsed < left
    report.end({}, None)
    assert terminal.getvalue().count("vit_micro/8") == 1


@pytest.mark.parametrize(
    ("moment", "line"),
    [
        ("start", "no TensorBoard in {tb}: Read-only file system; the run goes on without"),
        ("reports", "cannot write {tb}: Read-only file system; the run goes on without TensorBoard"),
        ("end", "cannot write {tb}: Read-only file system; the run goes on without TensorBoard"),
    ],
)
def test_a_run_goes_on_without_a_writable_folder_for_tensorboard(tmp_path, monkeypatch, capfd, moment, line):
    """With one warning. The folder becomes read-only at this moment; tests of root cannot take permissions away."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not that of pytest
    opened = io.open

    def open_elsewhere(path, *args, **options):
        if "/tb/" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return opened(path, *args, **options)

    def reaches(now):
        if now == moment:
            monkeypatch.setattr(io, "open", open_elsewhere)

    with hide_tensorboard_errors():
        reaches("start")
        report = Report(tmp_path, start_step=0, epochs=1, steps_per_epoch=10)
        report.start({}, {}, "vit_micro/8, loss mean")
        reaches("reports")
        for step in range(10):
            report.interval(0, step, 1.0, {**HEALTHY, "loss": 2.0, "lr": 0.1, "images_per_s": 1.0, "data_share": 0.0})
        report.epoch(0, 9, {"loss": 2.0})
        reaches("end")
        report.histogram("matched_patches_per_pair", torch.tensor([0, 3]), 9)
        report.end({}, signal.SIGTERM if moment == "end" else None)
    warning = line.format(tb=tmp_path / "tb")
    assert capfd.readouterr().err == f"warning: {warning}\n"
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 10
    assert json.loads((tmp_path / "log.txt").read_text()) == {"train_loss": 2.0, "epoch": 0}


def test_the_error_of_another_thread_is_printed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    with hide_tensorboard_errors():
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    assert threading.excepthook is threading.__excepthook__
    assert "ZeroDivisionError" in capfd.readouterr().err
