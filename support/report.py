"""Reporting of a run: progress, logs, TensorBoard, and a warning if the outputs collapse.

DINO-like methods collapse in two ways. If the teacher outputs the uniform distribution for every image, the loss stays
at ln K; sharpening counteracts this. If it outputs another distribution that is the same for every image, centering
counteracts that.
"""

import datetime
import json
import math
import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from support.files import append_line, read_text, write_text
from utils import first_line, printable, warn

PATIENCE = 50  # reports in a row
WATCH_FROM = 2000  # the watch for a collapse starts at this step, or at the end of the warm-up if that is earlier
EVALUATIONS = {"knn_top1": "online k-NN top-1", "dense_miou": "online segmentation mIoU"}

# name: (test on the values of `measure`, message)
COLLAPSES: dict[str, tuple[Callable[[dict[str, float]], bool], str]] = {
    "uniform outputs of CLS": (
        lambda v: v["entropy_share"] > 0.99,
        "the teacher's CLS outputs have {entropy_share:.1%} of the maximum entropy, ln K. With --loss cls, the loss "
        "stays at ln K; other losses may still learn from patches. Try --use_bn_in_head true (with patches in the "
        "loss, only together with --patch_head separate: docs/study.md), a lower --warmup_teacher_temp and "
        "--teacher_temp, a lower --momentum_teacher for small data sets, or another --lr",
    ),
    "uniform outputs of patches": (
        lambda v: v["patch_entropy_share"] > 0.99,
        "the teacher's patch outputs have {patch_entropy_share:.1%} of the maximum entropy, ln K: they "
        "teach the student nothing. Try a lower --warmup_teacher_temp and --teacher_temp, or another --lr",
    ),
    "one output for all images": (
        lambda v: v["entropy_share"] <= 0.99 and v["output_information"] < 0.05,
        "the mutual information between image and teacher output is {output_information:.3f} nats. Try a higher "
        "--warmup_teacher_temp and --teacher_temp, a lower --lr, a longer --freeze_last_layer, or "
        "--norm_last_layer true",
    ),
    "one output for all patches": (
        lambda v: v["patch_entropy_share"] <= 0.99 and v["patch_information"] < 0.05,
        "the mutual information between patch and teacher output is {patch_information:.3f} nats. Try a higher "
        "--warmup_teacher_temp and --teacher_temp, a lower --lr, or a longer --freeze_last_layer",
    ),
    "features all alike": (
        lambda v: v["cls_cosine"] > 0.999,
        "the mean cosine between CLS features of different images is {cls_cosine:.4f}. Try a lower --lr, a longer "
        "--warmup_epochs, a smaller --clip_grad, or a larger batch",
    ),
}


class Report:
    """Progress bar or plain lines, `log.txt`, `steps.jsonl` and TensorBoard of a run.

    `log.txt` has one JSON line per epoch, as in DINO, `steps.jsonl` one per logging interval. When a run resumes, both
    are truncated to the step it resumes from. TensorBoard files are written by a separate thread.

    Args:
        output_dir: folder of the run.
        start_step: step that the run starts or resumes from.
        epochs, steps_per_epoch: length of the run.
        watch_from: step from which to watch for a collapse. Before, outputs of different images are alike anyway.
    """

    def __init__(self, output_dir: Path, start_step: int, epochs: int, steps_per_epoch: int, watch_from: int = 0):
        self.output_dir, self.start_step = output_dir, start_step
        self.epochs, self.total_steps = epochs, epochs * steps_per_epoch
        self.watch, self.watch_from = CollapseWatch(), watch_from
        self.epoch_log, self.step_log = output_dir / "log.txt", output_dir / "steps.jsonl"
        self.metrics: dict[str, float] = {}  # latest value of each
        for values in _cut_log(self.epoch_log, "epoch", start_step // steps_per_epoch):
            self._remember(values)
        for values in _cut_log(self.step_log, "step", start_step):
            if values["step"] >= watch_from:
                self.watch(values)  # ignore the warnings: the run has printed them before
        self.board: SummaryWriter | None = None
        try:
            # A slow disk blocks the training only when 1,000 entries are waiting.
            self.board = SummaryWriter(output_dir / "tb", max_queue=1000, purge_step=start_step)
        except Exception as error:  # many kinds, also for a name that is not UTF-8
            warn(f"no TensorBoard in {printable(output_dir / 'tb')}: {_reason(error)}; the run goes on without")

    def _board(self, method: str, *args: Any, **options: Any) -> None:
        """Call a method of TensorBoard's writer, if there is one. If it fails, warn and go on without."""
        try:
            if self.board:
                getattr(self.board, method)(*args, **options)
        except Exception as error:  # many kinds, also those of its thread
            self.board = None
            place = printable(self.output_dir / "tb")
            warn(f"cannot write {place}: {_reason(error)}; the run goes on without TensorBoard")

    def start(self, settings: dict[str, Any], environment: dict[str, Any], headline: str) -> None:
        """Write the settings and the environment of the run, print a headline and open the progress bar."""
        write_text(json.dumps(settings, indent=2) + "\n", self.output_dir / "args.json")
        append_line(environment, self.output_dir / "environment.jsonl")
        for name, values in (("arguments", settings), ("environment", environment)):
            self._board("add_text", name, "    " + json.dumps(values, indent=2).replace("\n", "\n    "), 0)
        print(headline, flush=True)
        is_hidden = not sys.stderr.isatty()
        self.bar = tqdm(
            total=self.total_steps, initial=self.start_step, unit="step", disable=is_hidden, dynamic_ncols=True
        )

    def step(self, loss: float | None = None) -> None:
        """Advance the progress bar by one step. `loss` is shown until the first report."""
        if loss is not None:
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update()

    def interval(self, epoch: int, step: int, seconds_per_step: float, values: dict[str, float | None]) -> None:
        """Report the mean values of a logging interval, which ends with `step`."""
        append_line({"epoch": epoch, "step": step, **values}, self.step_log)
        for name, value in values.items():
            if value is not None:
                self._board("add_scalar", name, value, step)
        loss, rate = f"{values['loss']:.3f}", f"{values['images_per_s']:.0f}"
        usage = {"waiting for data": f"{values['data_share']:.0%}"}
        if torch.cuda.is_initialized():
            usage["GPU memory"] = f"{torch.cuda.max_memory_reserved() / 1e9:.1f} GB"
        if self.bar.disable:
            left = datetime.timedelta(seconds=round((self.total_steps - step - 1) * seconds_per_step))
            place = f"epoch {epoch + 1}/{self.epochs}  step {step + 1}/{self.total_steps}"
            words = "".join(f"  {name} {value}" for name, value in usage.items())
            print(f"{place}  loss {loss}  lr {values['lr']:.2e}  {rate} images/s{words}  left {left}", flush=True)
        else:
            self.bar.set_description(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
            self.bar.set_postfix({"loss": loss, "images/s": rate, **usage}, refresh=False)
        for text in self.watch(values) if step >= self.watch_from else []:
            warn(text)

    def epoch(self, epoch: int, step: int, means: dict[str, float], evaluated: Mapping[str, float] = {}) -> None:
        """Report the means of an epoch, which ends with `step`, and what was evaluated: values of EVALUATIONS in %."""
        values = {f"train_{name}": value for name, value in means.items()}
        values |= evaluated
        for name, value in evaluated.items():
            self._board("add_scalar", name, value, step)
        if evaluated:
            texts = "  ".join(f"{EVALUATIONS[name]} {value:.2f} %" for name, value in evaluated.items())
            tqdm.write(f"epoch {epoch + 1}/{self.epochs}  {texts}")
        self._remember(values)
        append_line({**values, "epoch": epoch}, self.epoch_log)

    def _remember(self, values: Mapping[str, float | None]) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self.metrics |= {name: value for name, value in numbers.items() if name != "epoch"}

    def pictures(self, pictures: dict[str, np.ndarray], step: int) -> None:
        """Write pictures {name: uint8 [H, W, 3]} to TensorBoard."""
        for name, picture in pictures.items():
            self._board("add_image", name, picture, step, dataformats="HWC")

    def histogram(self, name: str, counts: torch.Tensor, step: int) -> None:
        """Write a histogram to TensorBoard from the counts [n] of the values 0, 1, ..., n-1."""
        if counts.any():
            values = torch.arange(len(counts), dtype=counts.dtype)
            sums = [(counts * values**power).sum().item() for power in (0, 1, 2)]  # number, sum, sum of squares
            low, high = values[counts > 0][[0, -1]].tolist()
            buckets = (values + 0.5).tolist(), counts.tolist()
            self._board("add_histogram_raw", name, low, high, *sums, *buckets, step)

    def sync(self) -> None:
        """Flush the logs to disk, so that they survive a machine failure like the checkpoint that follows."""
        for path in (self.epoch_log, self.step_log):
            if path.exists():
                with path.open("a") as file:
                    os.fsync(file.fileno())

    def end(self, settings: dict[str, Any], stopped_by: signal.Signals | None) -> None:
        """Print how the run ended. A complete run also writes its settings to TensorBoard's HPARAMS."""
        if self.metrics and not stopped_by:
            plain = {name: v if isinstance(v, (bool, int, float)) else printable(v) for name, v in settings.items()}
            metrics = {f"final/{name}": value for name, value in self.metrics.items()}
            self._board("add_hparams", plain, metrics, run_name=".")
        self.bar.close()
        self._board("close")
        path = self.output_dir / "checkpoint.pth"
        if stopped_by:
            print(f"stopped by {stopped_by.name}: run the same command to resume from {path}", flush=True)
        else:
            print(f"done: {path}, {self.epoch_log}", flush=True)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


@contextmanager
def hide_tensorboard_errors() -> Iterator[None]:
    """Do not print exceptions of TensorBoard's threads: the next call of its writer raises them again."""
    earlier = threading.excepthook

    def print_others(error: threading.ExceptHookArgs) -> None:
        if not type(error.thread).__module__.startswith("tensorboard."):
            earlier(error)

    threading.excepthook = print_others
    try:
        yield
    finally:
        threading.excepthook = earlier


def _cut_log(path: Path, key: str, end: int) -> list[dict[str, float]]:
    """Remove the lines of a log with `key` >= `end` and incomplete lines of a killed process. Return the others."""
    if not path.exists():
        return []
    lines = read_text(path, errors="replace").splitlines(keepends=True)
    path.open("a").close()  # fails now, not after an epoch
    entries = [(line, _entry(line)) for line in lines]
    kept = [(line, entry) for line, entry in entries if entry.get(key, math.inf) < end]
    if len(kept) < len(lines):
        write_text("".join(line for line, _ in kept), path)
    return [entry for _, entry in kept]


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the numbers in the entries of a log. Incomplete lines and other values are skipped.

    Raises:
        UserError: the file cannot be read.
    """
    lines = read_text(path, errors="replace").splitlines(keepends=True)
    return [entry for line in lines if (entry := _entry(line))]


def _entry(line: str) -> dict[str, float]:
    try:
        values = json.loads(line) if line.endswith("\n") else {}
    except (ValueError, RecursionError):
        return {}
    values = values.items() if isinstance(values, dict) else ()
    return {name: v for name, v in values if isinstance(v, float) or (isinstance(v, int) and abs(v) < 2**63)}


class CollapseWatch:
    """Counts consecutive reports that show a collapse, and warns once when there are `patience` of them."""

    def __init__(self, patience: int = PATIENCE):
        self.patience, self.counts = patience, dict.fromkeys(COLLAPSES, 0)

    def __call__(self, values: Mapping[str, float | None]) -> list[str]:
        """Take the values of a report and return warnings, one line each."""
        warnings = []
        known = defaultdict(lambda: math.nan, {name: v for name, v in values.items() if v is not None})
        for name, (is_sign, text) in COLLAPSES.items():
            self.counts[name] = self.counts[name] + 1 if is_sign(known) else 0
            if self.counts[name] == self.patience:
                lasted = f"collapse: {name} in {self.patience} consecutive reports"
                warnings.append(f"{lasted}: {text.format(**values)}")
        return warnings
