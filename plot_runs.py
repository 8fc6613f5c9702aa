"""Plot the logs of several runs: loss, online k-NN accuracy, entropy of the teacher and matched patches per epoch.

    python plot_runs.py OUT1 OUT2 ... --output runs.pdf
    python plot_runs.py studies/solar_curves.csv

Runs that differ only in the seed become one curve: their mean, with a band of one standard deviation on each side. If
they have different lengths, each point averages the runs that reached it. Losses of different `--loss` or `--out_dim`
do not show which run is better. Settings are named by the options that differ, or by the row of a study. A table of
their last values is printed, as mean ± standard deviation over the seeds.
"""

import csv
import math
import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from main_lgssl import parse_arguments as pretraining_arguments
from support.arguments import ArgumentParser
from support.files import read_json, read_text
from support.options import argument_parser
from support.report import read_log
from utils import UserError, printable, run_main

COLUMNS = (  # of the table: (logged value, title, digits)
    ("loss", "loss", 3),
    ("knn_top1", "k-NN top-1 in %", 1),
    ("entropy_share", "entropy / ln K", 3),
    ("matched_patches", "matched patches", 1),
)
NAMES = [name for name, _, _ in COLUMNS]
CURVE_COLUMNS = ["row", "seed", "epoch", *NAMES]  # of a CSV file of curves
# Runs on different images are not averaged.
NO_SETTING = {*argument_parser().may_change, "seed", "output_dir"} - {"data_path"}

Curve = dict[int, float]  # {epochs trained: value}


@dataclass
class Run:
    """The curves of a run.

    Attributes:
        folder: its --output_dir, or FILE/ROW for a row of a study.
        seed: of the run, or None if it is unknown.
        arguments: arguments of main_lgssl.py and the number of `processes`. None if they are unknown.
        curves: {name: curve} for each of NAMES.
    """

    folder: Path
    seed: str | None = None
    arguments: dict[str, Any] | None = None
    curves: dict[str, Curve] = field(default_factory=lambda: {name: {} for name in NAMES})

    def add(self, name: str, epoch: int, value: float | None) -> None:
        """Add a value to a curve unless it is missing, or none of a float32."""
        if value is not None and abs(value) < 3e38:  # False for NaN
            self.curves[name][epoch] = value


def read_run(folder: Path) -> Run:
    """Read the log of a run. Truncated lines and values that no float32 has are skipped.

    Raises:
        UserError: the folder has no log or no finished epoch, or args.json cannot be read.
    """
    log, path, starts = (folder / name for name in ("log.txt", "args.json", "environment.jsonl"))
    if not os.path.exists(log):  # also False for a name that is too long
        raise UserError(f"no {log}: expected the --output_dir of a run of main_lgssl.py with a finished epoch")
    run = Run(folder)
    epochs = {entry["epoch"] + 1: entry for entry in read_log(log) if isinstance(entry.get("epoch"), int)}
    for epoch, entry in sorted(epochs.items()):
        for name in NAMES:
            run.add(name, epoch, entry.get(f"train_{name}", entry.get(name)))
    if not epochs:
        raise UserError(f"{folder} has no finished epoch yet: omit this folder")
    if not any(run.curves.values()):
        raise UserError(f"{log} has no finite number of {', '.join(NAMES)}: omit this folder")
    if path.exists():
        run.arguments = read_json(path)
        run.seed = _text(run.arguments.get("seed"))
        if starts.exists():
            run.arguments["processes"] = max((start.get("processes", 1) for start in read_log(starts)), default=1)
    return run


def read_curves(path: Path) -> list[Run]:
    """Read the runs in a CSV file of curves, as the studies write it.

    Raises:
        UserError: the file cannot be read, or has no runs.
    """
    runs: dict[tuple[str, str], Run] = {}
    for line in read_table(path, CURVE_COLUMNS):
        row, seed = line["row"], line["seed"]
        run = runs.setdefault((row, seed), Run(path.with_suffix("") / row, seed))
        try:
            for name in NAMES:
                run.add(name, int(line["epoch"]), float(line[name] or "nan"))
        except ValueError as error:
            raise UserError(f"cannot read {path}: {error}") from error
    if not runs:
        raise UserError(f"{path} has no runs")
    return list(runs.values())


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the lines of a CSV file that several processes may have written, without repetitions of the header.

    Raises:
        UserError: the file cannot be read or has other columns.
    """
    try:
        rows = list(csv.reader(read_text(path).splitlines()))
    except csv.Error as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if rows[:1] != [list(columns)] or any(len(row) != len(columns) for row in rows):
        raise UserError(f"cannot read {path}: expected a CSV file with the columns {','.join(columns)}")
    return [dict(zip(columns, row, strict=True)) for row in rows if row != list(columns)]


def settings(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by their arguments.

    Returns:
        {label: runs}. The label lists the arguments that differ between the groups, or the loss if none differs; of
        paths only the parts that differ. Runs without arguments are grouped and labeled by their folder.

    Raises:
        UserError: two runs have the same arguments and the same seed.
    """
    defaults = {**vars(pretraining_arguments([])), "processes": 1}  # for arguments that an older run did not have
    folders = list(dict.fromkeys(run.folder.resolve() for run in runs))
    labels = dict(zip(folders, differing_parts(folders), strict=True))
    groups: dict[frozenset[tuple[str, str]], dict[str | None, Run]] = {}  # {setting: {seed: run}}
    for run in runs:
        setting = {"": labels[run.folder.resolve()]}
        if run.arguments is not None:
            arguments = {**defaults, **run.arguments}
            unused = set() if arguments["loss"] == "lambda" else {"lambda_cls"}
            if arguments["loss"] == "cls":  # DINO's loss does not match patches
                unused |= {"matching", "center"}
            setting = {name: _text(arguments[name]) for name in arguments.keys() - NO_SETTING - unused}
        other = groups.setdefault(frozenset(setting.items()), {}).setdefault(run.seed, run)
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


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def differing_parts(paths: Iterable[str | Path]) -> list[str]:
    """Return paths without the leading and trailing parts that all of them share."""
    split = [Path(path).parts or (".",) for path in paths]
    shortest = min(map(len, split))
    first = next((i for i in range(shortest) if len({parts[i] for parts in split}) > 1), shortest - 1)
    last = next((i for i in range(shortest - first) if len({parts[-1 - i] for parts in split}) > 1), 0)
    return [str(Path(*parts[first : len(parts) - last])) for parts in split]


def mean_curve(curves: Sequence[Curve]) -> np.ndarray:
    """Average the curves of several runs.

    Returns:
        array [4, n]: epochs trained, mean, standard deviation of a sample (NaN for a single run), number of runs
    """
    values = {epoch: [c[epoch] for c in curves if epoch in c] for epoch in sorted({e for c in curves for e in c})}
    rows = [(epoch, np.mean(v), np.std(v, ddof=1) if len(v) > 1 else math.nan, len(v)) for epoch, v in values.items()]
    return np.array(rows).reshape(-1, 4).T


def last_values(labeled: dict[str, list[Run]]) -> list[str]:
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


def span(numbers: Sequence[float]) -> str:
    """Return the range of some numbers, as in "1 to 3", or "3" if they are equal, or "-" if there are none."""
    texts = [f"{number:g}" for number in sorted(numbers)]
    return " to ".join(dict.fromkeys((texts[0], texts[-1]))) if texts else "-"


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    text = "--output_dir of a run of main_lgssl.py, or a CSV file of curves"
    parser.add_argument("runs", nargs="+", metavar="OUT", help=text)
    parser.add_argument("--output", default="runs.png", help="file to write, PNG or PDF")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    from support import figures  # imports matplotlib, which --help does not need

    figures.check_output(args.output)
    paths = {Path(path).resolve(): Path(path) for path in args.runs}.values()
    runs = [run for path in paths for run in (read_curves(path) if path.suffix == ".csv" else [read_run(path)])]
    labeled, curves = settings(runs), {}
    for label, members in labeled.items():
        curve = {name: mean_curve([run.curves[name] for run in members]) for name in NAMES}
        seeds = span(np.concatenate([values[3] for values in curve.values()]).tolist())
        curves[f"{label} ({seeds} {'seed' if seeds == '1' else 'seeds'})"] = curve
    figures.save([figures.draw_curves(curves)], args.output)
    print("\n".join([*last_values(labeled), f"drawn in {args.output}"]))


if __name__ == "__main__":
    run_main(main)
