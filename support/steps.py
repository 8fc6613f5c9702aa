"""Commands with their results, and how a result differs from what was asked: shared by tables and studies."""

import argparse
import importlib
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.files import read_json
from support.options import may_change
from support.report import read_log
from utils import UserError

ROOT = Path(__file__).parent.parent
# column: (title, evaluation, function from the evaluation's result to the number, format)
COLUMNS = {
    "linear": ("linear", "linear", lambda r: r["top1"], ".2f"),
    "knn10": ("k-NN, K = 10", "knn", lambda r: r["knn"]["10"]["top1"], ".2f"),
    "knn20": ("k-NN, K = 20", "knn", lambda r: r["knn"]["20"]["top1"], ".2f"),
    "balanced": ("balanced accuracy", "knn", lambda r: r["knn"]["10"]["balanced_accuracy"], ".2f"),
    "copydays": ("copy detection", "copydays", lambda r: r["map"]["strong"], ".3f"),
    "oxford_medium": ("Oxford M", "roxford5k", lambda r: 100 * r["map"]["medium"], ".2f"),
    "oxford_hard": ("Oxford H", "roxford5k", lambda r: 100 * r["map"]["hard"], ".2f"),
    "paris_medium": ("Paris M", "rparis6k", lambda r: 100 * r["map"]["medium"], ".2f"),
    "paris_hard": ("Paris H", "rparis6k", lambda r: 100 * r["map"]["hard"], ".2f"),
}
# Arguments that depend on the location of the data or on the number of processes. They are not settings of a run.
PLACES = "data_path whitening_path distractors_path classes pretrained_weights output_dir".split()
PLACES += "batch_size_per_gpu accum_steps num_workers use_cuda".split()


@dataclass
class Step:
    """One command: a script with its options.

    Attributes:
        name: "pretraining", "lists" or the name of an evaluation.
        words: the script and its options.
        result: file that the command writes.
        processes: number of processes of the command.
    """

    name: str
    words: list
    result: Path
    processes: int = 1

    def __post_init__(self):
        self.words = [str(word) for word in self.words]

    def settings(self) -> argparse.Namespace:
        """Return the arguments that the script parses from the words."""
        script, *words = self.words
        return importlib.import_module(Path(script).stem).parse_arguments(words)

    def done(self) -> bool:
        """Return whether the command has finished with these settings."""
        if self.name == "lists":
            return self.result.is_file()
        if self.name == "pretraining":
            run = self.result.parent
            return progress(run) == 1.0 and not differences(vars(self.settings()), recorded(run / "args.json"))
        result = read_result(self.result)
        return result is not None and not differences(vars(self.settings()), result["args"])

    def line(self) -> str:
        """Return the command as a user types it, and whether it is done."""
        launcher = f"torchrun --standalone --nproc_per_node={self.processes}" if self.processes > 1 else "python"
        return f"{launcher} {shlex.join(self.words)}{'    # done' if self.done() else ''}"

    def run(self, **options) -> int:
        """Run the command unless it is done, and return its exit code. `options` are those of subprocess.run."""
        if self.done():
            return 0
        script, *words = self.words
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        launcher = [sys.executable, *torchrun] if self.processes > 1 else [sys.executable]
        return subprocess.run([*launcher, str(ROOT / script), *words], **options).returncode


def recorded(path) -> dict:
    """Return the dictionary in a JSON file, or an empty one if the file is missing or broken."""
    try:
        return read_json(path)
    except UserError:
        return {}


def progress(run) -> float:
    """Return the share of its epochs that a pretraining has finished."""
    log, epochs = run / "log.txt", recorded(run / "args.json").get("epochs")
    entries = read_log(log) if log.is_file() and (run / "checkpoint.pth").is_file() else []
    done = entries[-1].get("epoch", -1) + 1 if entries else 0
    return done / epochs if isinstance(epochs, int) and 0 <= done <= epochs > 0 else 0.0


def read_result(path) -> dict | None:
    """Return an evaluation's result, or None if it is missing or its pretraining had not finished."""
    result = recorded(path)
    result = {"images": {}, "pretraining": {}, "args": None, **result}
    if not all(isinstance(result[name], dict) for name in ("images", "pretraining", "args")):
        return None
    return result if result["pretraining"].get("epoch") == result["pretraining"].get("epochs") else None


def score(column, step) -> float | None:
    """Return the number of a column in an evaluation's result, or None without a result that has a finite number."""
    try:
        value = COLUMNS[column][2](read_result(step.result))
    except (KeyError, TypeError):
        return None
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def differences(expected, actual) -> list:
    """Return the settings of `actual` that differ from the expected ones, as texts.

    Paths are not settings, nor is a precision that the machine decides. Settings that `actual` lacks are newer than its
    version, which worked as by default.
    """
    ignored = {*may_change(expected), *PLACES}
    return [
        f"--{name} {actual[name]} instead of {'its default' if value is None else value}"
        for name, value in expected.items()
        if name not in ignored and actual.get(name, value) != value
    ]


def mark(notes, step, pretraining, total_batch, images) -> str:
    """Note how the result of an evaluation differs from the recipe, the protocol and the data set.

    Args:
        notes: {text: number} of the notes below a table. A new text is added.
        step: an evaluation with a result.
        pretraining: dictionary of the recipe's settings.
        total_batch: of the recipe.
        images: {split or block of the data set: number of images}.

    Returns:
        the reference to the note, as in " [1]", or "" if nothing differs
    """
    result, wanted, changed = read_result(step.result), step.settings(), []
    if result["pretraining"]:  # empty for a random network
        batch_size = result["pretraining"].get("batch_size", total_batch)
        changed += [f"a total batch of {batch_size} instead of {total_batch}"] if batch_size != total_batch else []
        changed += differences(pretraining, result["pretraining"])
    if step.name == "linear" and result.get("batch_size") != wanted.batch_size_per_gpu:
        changed.append(f"{result.get('batch_size')} images per step instead of {wanted.batch_size_per_gpu}")
    changed += differences(vars(wanted), result["args"])
    for split, count in images.items():
        found = result["images"].get(split, 0)
        changed += [f"{found} {split} images instead of {count}"] if found != count else []
    text = f"{step.name}: {', '.join(changed)}."
    return f" [{notes.setdefault(text, len(notes) + 1)}]" if changed else ""


def markdown(header, rows, notes) -> list:
    """Return the lines of a table with its notes in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    return [*lines, *[""] * bool(notes), *(f"[{i}] {text}" for text, i in notes.items())]
