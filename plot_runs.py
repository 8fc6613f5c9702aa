"""Plot the logs of several runs: loss, online k-NN accuracy, entropy of the teacher and matched patches per epoch.

    python plot_runs.py OUT1 OUT2 ... --output runs.pdf

Runs that differ only in the seed become one curve: their mean, with a band of one standard deviation on each side. If
they have different lengths, each point averages the runs that reached it. Losses of different `--loss` or `--out_dim`
do not show which run is better. Settings are named by the options that differ. A table of their last values is printed,
as mean ± standard deviation over the seeds.
"""

import math
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from main_lgssl import parse_arguments as pretraining_arguments
from support.arguments import ArgumentParser
from support.options import argument_parser
from support.report import read_log
from support.steps import recorded
from utils import UserError, printable, run_main

COLUMNS = (  # of the table: (logged value, title, digits)
    ("loss", "loss", 3),
    ("knn_top1", "k-NN top-1 in %", 1),
    ("entropy_share", "entropy / ln K", 3),
    ("matched_patches", "matched patches", 1),
)
NAMES = [name for name, _, _ in COLUMNS]
NO_SETTING = {*argument_parser().may_change, "seed", "output_dir"} - {
    "data_path"
}  # runs on different images are not averaged


@dataclass
class Run:
    """The log of a run.

    Attributes:
        folder: its --output_dir.
        arguments: arguments of main_lgssl.py and the number of `processes`. None if the folder has no args.json.
        curves: {name: {epochs trained: value}} for each of NAMES.
    """

    folder: Path
    arguments: dict | None
    curves: dict


def read_run(folder) -> Run:
    """Read the log of a run. Truncated lines and values that no float32 has are skipped.

    Raises:
        UserError: the folder has no log or no finished epoch, or args.json cannot be read.
    """
    log, path, starts = (folder / name for name in ("log.txt", "args.json", "environment.jsonl"))
    if not os.path.exists(log):  # also False for a name that is too long
        raise UserError(f"no {log}: expected the --output_dir of a run of main_lgssl.py with a finished epoch")
    epochs = {entry["epoch"] + 1: entry for entry in read_log(log) if isinstance(entry.get("epoch"), int)}
    if not epochs:
        raise UserError(f"{folder} has no finished epoch yet: omit this folder")
    curves = {name: {} for name in NAMES}
    for name in NAMES:
        for epoch, entry in sorted(epochs.items()):
            value = entry.get(f"train_{name}", entry.get(name))
            if value is not None and abs(value) < 3e38:  # False for NaN; the values are those of float32 at most
                curves[name][epoch] = value
    if not any(curves.values()):
        raise UserError(f"{log} has no finite number of {', '.join(NAMES)}: omit this folder")
    arguments = None
    if path.exists() and not (arguments := recorded(path)):
        raise UserError(f"cannot read {path}: remove it to name the run by its folder")
    if arguments is not None and starts.exists():
        arguments["processes"] = max((start.get("processes", 1) for start in read_log(starts)), default=1)
    return Run(folder, arguments, curves)


def settings(runs) -> dict:
    """Group runs by their arguments.

    Returns:
        {label: runs}. The label lists the arguments that differ between the groups, or the loss if none differs; of
        paths only the parts that differ. A run without arguments is a group of its own, labeled by its folder.

    Raises:
        UserError: two runs have the same arguments and the same seed.
    """
    defaults = {**vars(pretraining_arguments([])), "processes": 1}  # for arguments that an older run did not have
    folders = [run.folder.resolve() for run in runs]
    names = [folder.name for folder in folders]
    folders = names if len(set(names)) == len(names) else differing_parts(folders)
    groups = {}  # {setting: {seed: run}}
    for run, folder in zip(runs, folders, strict=True):
        setting, seed = {"": folder}, None
        if run.arguments is not None:
            arguments = {**defaults, **run.arguments}
            seed, loss = _text(arguments["seed"]), arguments["loss"]
            # λ affects only the λ-loss, and DINO's loss does not match patches.
            unused = ["lambda_cls"] * (loss != "lambda") + ["matching", "center"] * (loss == "cls")
            setting = {name: _text(arguments[name]) for name in arguments.keys() - NO_SETTING - {*unused}}
        other = groups.setdefault(frozenset(setting.items()), {}).setdefault(seed, run)
        if other is not run:
            raise UserError(f"{other.folder} and {run.folder} are runs of one setting and seed: give one of them")

    found = [dict(key) for key in groups]
    names = [*defaults, *sorted({name for setting in found for name in setting} - {*defaults, ""})]
    differing = [name for name in names if len({s[name] for s in found if name in s}) > 1] or ["loss"]
    for name in differing:
        values = list(dict.fromkeys(setting[name] for setting in found if name in setting))
        if any("/" in value for value in values):
            parts = dict(zip(values, differing_parts(values), strict=True))
            found = [{**setting, name: parts[setting[name]]} if name in setting else setting for setting in found]
    labeled = {}
    for setting, members in zip(found, groups.values(), strict=True):
        words = [f"{'λ' if name == 'lambda_cls' else name} {setting[name]}" for name in differing if name in setting]
        labeled[setting.get("", ", ".join(words))] = list(members.values())
    return labeled


def _text(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def differing_parts(paths) -> list[str]:
    """Return paths without the leading and trailing parts that all of them share."""
    split = [Path(path).parts or (".",) for path in paths]
    shortest = min(map(len, split))
    first = next((i for i in range(shortest) if len({parts[i] for parts in split}) > 1), shortest - 1)
    last = next((i for i in range(shortest - first) if len({parts[-1 - i] for parts in split}) > 1), 0)
    return [str(Path(*parts[first : len(parts) - last])) for parts in split]


def mean_curve(curves) -> np.ndarray:
    """Average the curves of several runs, {epochs trained: value} each.

    Returns:
        array [4, n]: epochs trained, mean, standard deviation of a sample (NaN for a single run), number of runs
    """
    values = {epoch: [c[epoch] for c in curves if epoch in c] for epoch in sorted({e for c in curves for e in c})}
    rows = [(epoch, np.mean(v), np.std(v, ddof=1) if len(v) > 1 else math.nan, len(v)) for epoch, v in values.items()]
    return np.array(rows).reshape(-1, 4).T


def last_values(labeled) -> list:
    """Return the lines of a table with the last values per setting, mean ± standard deviation."""
    rows = [("setting", "seeds", "epochs", *(title for _, title, _ in COLUMNS))]
    for label, runs in labeled.items():
        row, ends = [], []
        for name, _, digits in COLUMNS:
            last = [list(run.curves[name].items())[-1] for run in runs if run.curves[name]]
            values = np.array([value for _, value in last])
            deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            row.append(f"{values.mean():.{digits}f}{deviation}" if len(values) else "-")
            ends.append(span([epoch for epoch, _ in last]))
        rows.append((printable(label), str(len(runs)), ends[0], *row))
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
    labeled, curves = settings(runs), {}
    for label, members in labeled.items():
        curve = {name: mean_curve([run.curves[name] for run in members]) for name in NAMES}
        seeds = span(np.concatenate([values[3] for values in curve.values()]))
        curves[f"{label} ({seeds} {'seed' if seeds == '1' else 'seeds'})"] = curve
    figures.save([figures.draw_curves(curves)], args.output)
    print("\n".join([*last_values(labeled), f"drawn in {args.output}"]))


if __name__ == "__main__":
    run_main(main)
