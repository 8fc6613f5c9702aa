"""What a run says: progress, logs, TensorBoard, and a warning of a collapse that has lasted.

DINO-like methods fail in two ways: the teacher gives every image the uniform distribution, and the loss stays at ln K,
or it gives every image the same other one. Sharpening works against the first and centering against the second.
"""

import datetime
import json
import math
import os
import sys

import torch
from tqdm import tqdm

from utils import append_line, warn, write_text

PATIENCE = 50  # reports in a row
WATCH_FROM = 2000  # step from which on a collapse is looked for, or earlier: from the end of the warm-up

# name: (sign of it in the values of `measure`, what to say)
COLLAPSES = {
    "uniform outputs": (
        lambda v: v["entropy_share"] > 0.99,
        "the teacher's outputs for CLS have {entropy_share:.1%} of the largest entropy, ln K. DINO's loss stays at it; "
        "the other losses may go on learning by patches. Usual cures: a lower --warmup_teacher_temp and "
        "--teacher_temp, a lower --momentum_teacher for small data, another --lr, --use_bn_in_head true",
    ),
    "one output for all images": (
        lambda v: v["entropy_share"] <= 0.99 and v["output_information"] < 0.05,
        "the teacher's outputs for CLS tell images apart by {output_information:.3f} nats. Usual cures: a higher "
        "--warmup_teacher_temp and --teacher_temp, a lower --lr, a longer --freeze_last_layer, --norm_last_layer true",
    ),
    "features all alike": (
        lambda v: v["cls_cosine"] > 0.999,
        "the mean cosine between CLS features of different images is {cls_cosine:.4f}. Usual cures: a lower --lr, a "
        "longer --warmup_epochs, a smaller --clip_grad, a larger batch",
    ),
}


class Report:
    """What a run says: a progress bar or plain lines, `log.txt`, `steps.jsonl` and TensorBoard.

    `log.txt` has one line of JSON per epoch, as DINO's, `steps.jsonl` one per logging interval. The files of an earlier
    run are cut back to where this one goes on. TensorBoard's are written by a thread of its own.

    Args:
        watch_from: step from which on a collapse is looked for; before, all outputs are alike anyway.
    """

    def __init__(self, output_dir, start_step, epochs, steps_per_epoch, watch_from=0):
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and one process needs it

        self.output_dir, self.epochs, self.total_steps = output_dir, epochs, epochs * steps_per_epoch
        self.watch, self.watch_from = CollapseWatch(), watch_from
        self.epoch_log, self.step_log = output_dir / "log.txt", output_dir / "steps.jsonl"
        self.metrics = {}  # the last ones
        for values in _cut_log(self.epoch_log, "epoch", start_step // steps_per_epoch):
            self._remember(values)
        for values in _cut_log(self.step_log, "step", start_step):
            if values["step"] >= watch_from:
                self.watch(values)  # has warned already
        # A slow disk holds up the training only once so many entries wait.
        self.board = SummaryWriter(output_dir / "tb", max_queue=1000, purge_step=start_step)
        self.bar = tqdm(total=self.total_steps, initial=start_step, unit="step", disable=not sys.stderr.isatty())

    def interval(self, epoch, step, seconds_per_step, values):
        """Report the mean values since the last interval, `step` being its last step."""
        append_line({"epoch": epoch, "step": step, **values}, self.step_log)
        for name, value in values.items():
            if value is not None:
                self.board.add_scalar(name, value, step)
        loss, rate = f"{values['loss']:.3f}", f"{values['images_per_s']:.0f}"
        if self.bar.disable:
            left = datetime.timedelta(seconds=round((self.total_steps - step - 1) * seconds_per_step))
            place = f"epoch {epoch + 1}/{self.epochs}  step {step + 1}/{self.total_steps}"
            print(f"{place}  loss {loss}  lr {values['lr']:.2e}  {rate} images/s  left {left}", flush=True)
        else:
            self.bar.set_description(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
            self.bar.set_postfix({"loss": loss, "images/s": rate}, refresh=False)
            self.bar.update(step + 1 - self.bar.n)
        for text in self.watch(values) if step >= self.watch_from else []:
            warn(text)

    def epoch(self, epoch, step, means, knn_top1=None):
        """Report the means of an epoch that ended with `step`, and the online k-NN where it was measured."""
        values = {f"train_{name}": value for name, value in means.items()}
        if knn_top1 is not None:
            values["knn_top1"] = knn_top1
            self.board.add_scalar("knn_top1", knn_top1, step)
            tqdm.write(f"epoch {epoch + 1}/{self.epochs}  online k-NN top-1 {knn_top1:.2f} %")
        self._remember(values)
        append_line({**values, "epoch": epoch}, self.epoch_log)

    def _remember(self, values):
        self.metrics |= {name: value for name, value in values.items() if value is not None and name != "epoch"}

    def pictures(self, pictures, step):
        """Show pictures {name: uint8 [H, W, 3]}."""
        for name, picture in pictures.items():
            self.board.add_image(name, picture, step, dataformats="HWC")

    def histogram(self, name, counts, step):
        """Show how often each of the values 0, 1, ... occurred, counts [n]."""
        used = counts.nonzero()[:, 0]
        if len(used):
            counts = counts[: used[-1] + 1]
            values = torch.arange(len(counts), dtype=counts.dtype)
            numbers = (counts.sum(), (counts * values).sum(), (counts * values**2).sum())
            edges = (values + 0.5).tolist()
            bounds = (float(used[0]), float(used[-1]))
            self.board.add_histogram_raw(name, *bounds, *map(float, numbers), edges, counts.tolist(), step)

    def start(self, args, start):
        """Write the arguments of the run, and one more line on how and where it was started."""
        write_text(json.dumps(args, indent=2) + "\n", self.output_dir / "args.json")
        append_line(start, self.output_dir / "environment.jsonl")
        for name, values in (("arguments", args), ("environment", start)):
            self.board.add_text(name, "    " + json.dumps(values, indent=2).replace("\n", "\n    "), 0)

    def sync(self):
        """Make sure that what was reported outlasts a failure of the machine, as a checkpoint does."""
        for path in (self.epoch_log, self.step_log):
            if path.exists():
                with path.open("a") as file:
                    os.fsync(file.fileno())

    def end(self, args, stopped_by):
        """Say how the run ended. One that was not stopped early also shows its arguments in TensorBoard's HPARAMS."""
        if self.metrics and not stopped_by:
            plain = {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in args.items()}
            metrics = {f"final/{name}": value for name, value in self.metrics.items()}
            self.board.add_hparams(plain, metrics, run_name=".")
        self.bar.close()
        self.board.close()
        path = self.output_dir / "checkpoint.pth"
        if stopped_by:
            print(f"stopped early, as asked: the same command goes on from {path}", flush=True)
        else:
            print(f"done: {path}, {self.epoch_log}", flush=True)


def _cut_log(path, key, end):
    """Drop the lines of a log whose `key` is not below `end`, and what a process that was killed left of a line.

    Returns:
        the entries that are left
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [(line, entry) for line in lines if (entry := _entry(line)).get(key, end) < end]
    if len(kept) < len(lines):
        write_text("".join(line for line, _ in kept), path)
    return [entry for _, entry in kept]


def read_log(path):
    """Return the entries of a log, without lines that were cut short."""
    return [entry for line in path.read_text(errors="replace").splitlines(keepends=True) if (entry := _entry(line))]


def _entry(line):
    try:
        return dict(json.loads(line)) if line.endswith("\n") else {}
    except (ValueError, TypeError):
        return {}


class CollapseWatch:
    """Counts the reports in a row that show a kind of collapse, and warns once it has lasted."""

    def __init__(self, patience=PATIENCE):
        self.patience, self.counts = patience, dict.fromkeys(COLLAPSES, 0)

    def __call__(self, values):
        """Return the warnings after a report with these values, one line each."""
        warnings = []
        known = {key: math.nan if value is None else value for key, value in values.items()}
        for name, (is_sign, text) in COLLAPSES.items():
            self.counts[name] = self.counts[name] + 1 if is_sign(known) else 0
            if self.counts[name] == self.patience:
                lasted = f"collapse: {name} in {self.patience} reports in a row"
                warnings.append(f"{lasted}: {text.format(**values)}")
        return warnings
