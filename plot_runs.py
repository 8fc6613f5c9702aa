"""Overlay the curves of runs: loss, online k-NN accuracy, entropy of the teacher and matched patches, over epochs.

    python plot_runs.py OUT1 OUT2 ... --output runs.pdf

Runs of one setting are one curve, the mean over their seeds with a band of one standard deviation to both sides; where
they are of different lengths, over those that got so far. Losses of different `--loss` or `--out_dim` are no measure of
which is better. Printed are the last values of each run, as mean ± standard deviation over a setting's seeds.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import utils
from main_lgssl import parse_arguments as pretraining_arguments
from support.arguments import ArgumentParser
from support.checkpoints import MAY_CHANGE
from support.report import read_log
from utils import UserError

NAMES = ("loss", "knn_top1", "entropy_share", "matched_patches")
MAX_POINTS = 100  # of a curve: the reports of a long run are averaged, or noise would hide the rest
NO_SETTING = {*MAY_CHANGE, "seed", "output_dir"} - {"data_path"}  # runs on other images are not to be averaged


@dataclass
class Run:
    """The logs of a run.

    Attributes:
        folder: where they are.
        arguments: of main_lgssl.py, and the number of `processes`; None where the folder does not hold them.
        points: {name: array [n, 3]} of (epochs trained, value, steps that the value stands for), for each of NAMES.
    """

    folder: Path
    arguments: dict | None
    points: dict


def read_run(folder):
    """Read the logs of a run: of `steps.jsonl` what it has, the rest of `log.txt`. Lines that were cut short are left.

    Raises:
        UserError: there are none, none of a whole epoch, or args.json cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: expected the --output_dir of a run of main_lgssl.py")
    paths = [path for path in (folder / "log.txt", folder / "steps.jsonl") if path.exists()]
    if not paths:
        raise UserError(f"{folder} holds neither log.txt nor steps.jsonl: expected the --output_dir of a run")
    log = {path.name: read_log(path) for path in paths}
    epochs = {e["epoch"]: e for e in log.get("log.txt", []) if _is_count(e.get("epoch"))}
    reports = {
        e["step"]: e for e in log.get("steps.jsonl", []) if _is_count(e.get("step")) and _is_count(e.get("epoch"))
    }
    if not epochs:
        raise UserError(f"{folder} has not come to the end of an epoch yet: leave it out")

    values = {name: [] for name in NAMES}
    # The last step of an epoch always reports, so that its number tells how long an epoch is.
    last_step = {reports[step]["epoch"]: step for step in sorted(reports)}
    lengths = [(last_step[epoch] + 1) / (epoch + 1) for epoch in epochs if epoch in last_step]
    before = -1
    for step in sorted(reports) if lengths else []:
        for name in NAMES:
            if _is_number(value := reports[step].get(name)):
                values[name].append(((step + 1) / max(lengths), value, step - before))
        before = step
    for name in NAMES:
        for epoch in sorted(epochs) if not values[name] else []:
            if _is_number(value := epochs[epoch].get(f"train_{name}", epochs[epoch].get(name))):
                values[name].append((epoch + 1, value, 1))

    arguments = folder / "args.json"
    try:
        arguments = dict(json.loads(arguments.read_text())) if arguments.exists() else None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {arguments}: remove it, and the run is named by its folder") from error
    starts = folder / "environment.jsonl"
    if arguments is not None and starts.exists():
        arguments["processes"] = max((start.get("processes", 1) for start in read_log(starts)), default=1)
    return Run(folder, arguments, {name: np.array(v, dtype=float).reshape(-1, 3) for name, v in values.items()})


def _is_count(value):
    return type(value) is int and value >= 0


def _is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def settings(runs):
    """Group runs by what they were trained with.

    Returns:
        {label: its runs}: the label names the arguments that are not the same in all runs, or the loss where all are;
        of a run without arguments, its folder.

    Raises:
        UserError: two runs differ in nothing, so that they are no two seeds.
    """
    # Of what an older run did not have
    defaults = {**vars(pretraining_arguments([])), "processes": 1}
    names = [run.folder.resolve().name for run in runs]
    groups, seen = {}, {}
    for run, name in zip(runs, names, strict=True):
        setting, seed = {"": name if names.count(name) == 1 else run.folder}, None
        if run.arguments is not None:
            setting, seed = {**defaults, **run.arguments}, _text(run.arguments.get("seed"))
            # Without the λ-loss λ has no meaning, nor with DINO has the matching.
            unused = {"lambda_cls"} if setting["loss"] != "lambda" else set()
            unused |= {"matching", "center"} if setting["loss"] == "cls" else set()
            setting = {name: _text(value) for name, value in setting.items() if name not in NO_SETTING | unused}
        key = tuple(sorted(setting.items()))
        groups.setdefault(key, (setting, []))[1].append(run)
        other = seen.setdefault((key, seed), run.folder)
        if other is not run.folder:
            raise UserError(f"{other} and {run.folder} are runs of one setting and seed: give one of them")

    with_arguments = [setting for setting, _ in groups.values() if "" not in setting]
    names = dict.fromkeys([*defaults, *(name for setting in with_arguments for name in setting)])
    values = {name: {setting[name] for setting in with_arguments if name in setting} for name in names}
    differing = [name for name, distinct in values.items() if len(distinct) > 1] or ["loss"]
    labelled = {}
    for setting, members in groups.values():
        words = [f"{'λ' if name == 'lambda_cls' else name} {setting[name]}" for name in differing if name in setting]
        labelled[str(setting.get("", ", ".join(words)))] = members
    return labelled


def _text(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def intervals_per_epoch(runs):
    """Return into how many intervals to cut an epoch: each has reports of all runs, and a curve at most MAX_POINTS."""
    points = [run.points[name] for run in runs for name in NAMES if name != "knn_top1" and len(run.points[name])]
    longest = max((p[-1, 0] for p in points), default=1)
    widest = max((np.diff(p[:, 0], prepend=0).max() for p in points), default=1)
    return max(int(min(MAX_POINTS / longest, 1 / widest + 1e-6)), 1)


def mean_curve(runs_points, per_epoch):
    """Average the values of one name over the intervals of epochs, and then over the runs of a setting.

    Args:
        runs_points: array [n, 3] for each run, as in Run.
        per_epoch: number of intervals, as `intervals_per_epoch` gives it.

    Returns:
        array [4, n]: epochs trained, mean, standard deviation (of a sample; NaN where one run is left), number of runs
    """
    values = {}  # end of an interval in epochs: the means of the runs
    for points in runs_points:
        intervals = np.ceil(points[:, 0] * per_epoch - 1e-6)
        for interval in np.unique(intervals):
            inside = points[intervals == interval]
            values.setdefault(interval / per_epoch, []).append(np.average(inside[:, 1], weights=inside[:, 2]))
    rows = []
    for epoch, v in sorted(values.items()):
        rows.append((epoch, np.mean(v), np.std(v, ddof=1) if len(v) > 1 else math.nan, len(v)))
    return np.array(rows).reshape(-1, 4).T


def last_values(labelled, per_epoch):
    """Return the lines of a table: of each setting the last loss and k-NN accuracy of its runs."""
    rows = [("setting", "seeds", "epochs", "loss", "k-NN top-1 in %")]
    for label, runs in labelled.items():
        last = {name: [mean_curve([run.points[name]], per_epoch)[:2, -1:] for run in runs] for name in NAMES[:2]}
        last = {name: np.concatenate(columns, axis=1) for name, columns in last.items()}  # [2, runs that have it]
        ends = sorted({f"{epoch:g}": None for epoch in sorted(last["loss"][0])}, key=float)
        cells = [label, str(len(runs)), " to ".join(dict.fromkeys((ends[0], ends[-1]))) if ends else "-"]
        for name, digits in (("loss", 3), ("knn_top1", 1)):
            values = last[name][1]
            deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{deviation}" if len(values) else "-")
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def parse_arguments(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="OUT", help="--output_dir of a run of main_lgssl.py")
    parser.add_argument("--output", default="runs.png", help="file to write, PNG or PDF")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    from support import figures  # and matplotlib, which --help does without

    figures.check_output(args.output)
    folders = {Path(folder).resolve(): Path(folder) for folder in args.runs}
    runs = [read_run(folder) for folder in folders.values()]
    labelled = settings(runs)
    per_epoch = intervals_per_epoch(runs)
    curves = {
        label: {name: mean_curve([run.points[name] for run in members], per_epoch) for name in NAMES}
        for label, members in labelled.items()
    }
    figures.save(figures.draw_curves(curves), args.output)
    print("\n".join(last_values(labelled, per_epoch)))
    print(f"drawn in {args.output}")


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
