"""Plot the logs of several runs: loss, online k-NN accuracy, entropy of the teacher and matched patches per epoch.

    python plot_runs.py OUT1 OUT2 ... --output runs.pdf

Runs that differ only in the seed become one curve: their mean, with a band of one standard deviation on each side. If
they have different lengths, each point averages the runs that reached it. Losses of different `--loss` or `--out_dim`
do not show which run is better. The last values are printed per setting, as mean ± standard deviation over the seeds.
"""

import json
import math
from argparse import Namespace
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
MAX_POINTS = 100  # per curve; more reports are averaged to reduce the noise
NO_SETTING = {*MAY_CHANGE, "seed", "output_dir"} - {"data_path"}  # runs on different images are not averaged


@dataclass
class Run:
    """The logs of a run.

    Attributes:
        folder: its --output_dir.
        arguments: arguments of main_lgssl.py and the number of `processes`. None if the folder has no args.json.
        points: {name: array [n, 3]} for each of NAMES. The columns are epochs trained, value, and number of steps that
            the value averages.
    """

    folder: Path
    arguments: dict | None
    points: dict


def read_run(folder) -> Run:
    """Read the logs of a run. Values come from `steps.jsonl`, and from `log.txt` if `steps.jsonl` does not have them.

    Truncated lines are skipped.

    Raises:
        UserError: the folder has no logs or no finished epoch, or args.json cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: expected the --output_dir of a run of main_lgssl.py")
    paths = [folder / "log.txt", folder / "steps.jsonl"]
    if not any(path.exists() for path in paths):
        raise UserError(f"{folder} holds neither log.txt nor steps.jsonl: expected the --output_dir of a run")
    epochs, reports = (_entries(path, key) for path, key in zip(paths, ("epoch", "step"), strict=True))
    if not epochs:
        raise UserError(f"{folder} has no finished epoch yet: omit this folder")

    # Every epoch reports its last step, which gives the length of an epoch.
    last_step = {entry["epoch"]: entry["step"] for entry in reports}
    lengths = [(last_step[e["epoch"]] + 1) / (e["epoch"] + 1) for e in epochs if e["epoch"] in last_step]
    reports = reports if lengths else []
    ends = np.array([0, *(entry["step"] + 1 for entry in reports)])
    points = {}
    for name in NAMES:
        points[name] = _points(ends[1:] / max(lengths, default=1), [e.get(name) for e in reports], np.diff(ends))
        if not len(points[name]):
            values = [entry.get(f"train_{name}", entry.get(name)) for entry in epochs]
            points[name] = _points([entry["epoch"] + 1 for entry in epochs], values, [1] * len(epochs))

    arguments = folder / "args.json"
    try:
        arguments = dict(json.loads(arguments.read_text())) if arguments.exists() else None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {arguments}: remove it to name the run by its folder") from error
    starts = folder / "environment.jsonl"
    if arguments is not None and starts.exists():
        arguments["processes"] = max((start.get("processes", 1) for start in read_log(starts)), default=1)
    return Run(folder, arguments, points)


def _entries(path, key):
    """Return the entries of a log sorted by `key`. A resumed run may repeat a key; its last entry counts."""
    entries = {entry[key]: entry for entry in read_log(path) if key in entry} if path.exists() else {}
    return [entries[k] for k in sorted(entries)]


def _points(ends, values, weights):
    """Return [n, 3] as in Run, without values that are missing or not finite."""
    points = np.array([ends, values, weights], dtype=float).T  # None becomes NaN
    return points[np.isfinite(points[:, 1])]


def settings(runs) -> dict:
    """Group runs by their arguments.

    Returns:
        {label: runs}. The label lists the arguments that differ between the groups, or the loss if none differs. A run
        without arguments is a group of its own, labelled by its folder.

    Raises:
        UserError: two runs have the same arguments and the same seed.
    """
    defaults = {**vars(pretraining_arguments([])), "processes": 1}  # for arguments that an older run did not have
    folders = [run.folder.resolve().name for run in runs]
    groups = {}  # {setting: {seed: run}}
    for run, folder in zip(runs, folders, strict=True):
        setting, seed = {"": folder if folders.count(folder) == 1 else str(run.folder)}, None
        if run.arguments is not None:
            arguments = {**defaults, **run.arguments}
            seed, loss = arguments["seed"], arguments["loss"]
            # λ affects only the λ-loss, and DINO's loss does not match patches.
            unused = ["lambda_cls"] * (loss != "lambda") + ["matching", "center"] * (loss == "cls")
            setting = {name: _text(arguments[name]) for name in arguments.keys() - NO_SETTING - {*unused}}
        other = groups.setdefault(frozenset(setting.items()), {}).setdefault(seed, run)
        if other is not run:
            raise UserError(f"{other.folder} and {run.folder} are runs of one setting and seed: give one of them")

    found = [dict(key) for key in groups]
    names = [*defaults, *sorted({name for setting in found for name in setting} - {*defaults, ""})]
    differing = [name for name in names if len({s[name] for s in found if name in s}) > 1] or ["loss"]
    labelled = {}
    for setting, members in zip(found, groups.values(), strict=True):
        words = [f"{'λ' if name == 'lambda_cls' else name} {setting[name]}" for name in differing if name in setting]
        labelled[setting.get("", ", ".join(words))] = list(members.values())
    return labelled


def _text(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def intervals_per_epoch(runs) -> int:
    """Return the number of intervals per epoch over which reports are averaged.

    Each interval has reports of all runs, and a curve has at most MAX_POINTS points. At least 1.
    """
    points = [run.points[name] for run in runs for name in NAMES if name != "knn_top1" and len(run.points[name])]
    longest = max((p[-1, 0] for p in points), default=1)
    widest = max((np.diff(p[:, 0], prepend=0).max() for p in points), default=1)
    return max(int(min(MAX_POINTS / longest, 1 / widest + 1e-6)), 1)


def mean_curve(runs_points, per_epoch) -> np.ndarray:
    """Average the values of one name over intervals of epochs, then over the runs of a setting.

    Args:
        runs_points: array [n, 3] per run, as in Run.
        per_epoch: number of intervals per epoch, see `intervals_per_epoch`.

    Returns:
        array [4, n]: epochs trained, mean, standard deviation of a sample (NaN for a single run), number of runs
    """
    values = {}  # {end of an interval in epochs: mean per run}
    for points in runs_points:
        intervals = np.ceil(points[:, 0] * per_epoch - 1e-6)
        for interval in np.unique(intervals):
            _, inside, weights = points[intervals == interval].T
            values.setdefault(interval / per_epoch, []).append(np.average(inside, weights=weights))
    rows = [(end, np.mean(v), np.std(v, ddof=1) if len(v) > 1 else math.nan, len(v)) for end, v in values.items()]
    return np.array(sorted(rows)).reshape(-1, 4).T


def last_values(labelled, per_epoch) -> list:
    """Return the lines of a table with the last loss and k-NN accuracy per setting, mean ± standard deviation."""
    rows = [("setting", "seeds", "epochs", "loss", "k-NN top-1 in %")]
    for label, runs in labelled.items():
        row, ends = [], []
        for name, digits in (("loss", 3), ("knn_top1", 1)):
            curves = [mean_curve([run.points[name]], per_epoch) for run in runs if len(run.points[name])]
            values = np.array([curve[1, -1] for curve in curves])
            deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            row.append(f"{values.mean():.{digits}f}{deviation}" if len(values) else "-")
            ends.append(span([curve[0, -1] for curve in curves]))
        rows.append((label, str(len(runs)), ends[0], *row))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def span(numbers) -> str:
    """Return the range of some numbers, as in "1 to 3", or "3" if they are equal, or "-" if there are none."""
    texts = [f"{number:g}" for number in sorted(numbers)]
    return " to ".join(dict.fromkeys((texts[0], texts[-1]))) if texts else "-"


def parse_arguments(argv=None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="OUT", help="--output_dir of a run of main_lgssl.py")
    parser.add_argument("--output", default="runs.png", help="file to write, PNG or PDF")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_arguments(argv)
    from support import figures  # imports matplotlib, which --help does not need

    figures.check_output(args.output)
    folders = {Path(folder).resolve(): Path(folder) for folder in args.runs}
    runs = [read_run(folder) for folder in folders.values()]
    labelled, per_epoch = settings(runs), intervals_per_epoch(runs)
    curves = {}
    for label, members in labelled.items():
        curve = {name: mean_curve([run.points[name] for run in members], per_epoch) for name in NAMES}
        seeds = span(np.concatenate([values[3] for values in curve.values()]))
        curves[f"{label} ({seeds} {'seed' if seeds == '1' else 'seeds'})"] = curve
    figures.save(figures.draw_curves(curves), args.output)
    print("\n".join([*last_values(labelled, per_epoch), f"drawn in {args.output}"]))


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
