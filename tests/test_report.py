import io
import re

import pytest

from support.report import CollapseWatch, Report

HEALTHY = {"entropy_share": 0.6, "output_information": 1.2, "cls_cosine": 0.5}


@pytest.mark.parametrize(
    ("values", "name", "option"),
    [
        ({"entropy_share": 0.999, "output_information": 0.0}, "uniform outputs", "--teacher_temp"),
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
