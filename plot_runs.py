"""Plot the logs of several runs: loss, online evaluations, entropy of the teacher, matched patches per epoch.

    python plot_runs.py OUT1 OUT2 ... --output runs.pdf
    python plot_runs.py OUT1 OUT2 --names DINO Ours
    python plot_runs.py studies/solar_curves.csv

Runs that differ only in the seed become one curve: their mean, with a band of one standard deviation on each side. If
they have different lengths, each point averages the runs that reached it. Losses of different `--loss` or `--out_dim`
do not show which run is better; each `--out_dim` has a panel of its own. A panel where nothing changes is left out.
Settings are named by --names, by the options that differ, or by the row of a study. A table of their last values is
printed, as mean ± standard deviation over the seeds.
"""

import csv
import os
import textwrap
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from support.arguments import ArgumentParser, with_class_list
from support.files import read_json, read_text
from support.options import argument_parser, defaults_of_older_runs
from support.report import read_log
from utils import UserError, printable, run_main

COLUMNS = (  # of the table: (logged value, title, digits)
    ("loss", "loss", 3),
    ("knn_top1", "k-NN top-1 in %", 1),
    ("entropy_share", "entropy / ln K", 3),
    ("matched_patches", "matched patches", 1),
    ("dense_miou", "mIoU in %", 1),
)
NAMES = [name for name, _, _ in COLUMNS]
NEWEST = "dense_miou"  # column that older CSV files lack
FLAT = 0.01  # a curve changes if its values differ by more than this share of the highest
MAX_WIDTH = 100  # of the table, in columns
# Runs on different images are not averaged.
NO_SETTING = {*argument_parser().may_change, "seed", "output_dir"} - {"data_path"}

Curve = dict[int, float]  # {epochs trained: value}
Setting = tuple[tuple[str, str], ...]  # (name, value) of each argument, or ("", name of the run)


@dataclass
class Run:
    """The curves of a run.

    Attributes:
        name: its --output_dir, or the row of a study.
        seed: of the run, or None if it is unknown.
        arguments: arguments of main_lgssl.py and the number of `processes`. Empty if they are unknown.
        out_dim: number of prototypes, or "unknown".
        curves: {name: curve}, by default for each of NAMES.
    """

    name: str
    seed: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    out_dim: str = "unknown"
    curves: dict[str, Curve] = field(default_factory=lambda: {name: {} for name in NAMES})

    def add(self, name: str, epoch: int, value: float | None) -> None:
        """Add a value to a curve unless it is missing, or none of a float32."""
        if value is not None and abs(value) < 3e38:  # False for NaN
            self.curves[name][epoch] = value


def read_run(folder: Path, names: Sequence[str] = NAMES) -> Run:
    """Read the log of a run. Truncated lines and values that no float32 has are skipped.

    Args:
        names: logged values that become curves.

    Raises:
        UserError: the folder has no log or no finished epoch, or args.json cannot be read.
    """
    log, path, starts = (folder / name for name in ("log.txt", "args.json", "environment.jsonl"))
    if not os.path.exists(log):  # also False for a name that is too long
        raise UserError(f"no {log}: expected the --output_dir of a run of main_lgssl.py with a finished epoch")
    run = Run(str(folder), curves={name: {} for name in names})
    for entry in read_log(log):
        for name in names if "epoch" in entry else ():
            run.add(name, int(entry["epoch"]) + 1, entry.get(f"train_{name}", entry.get(name)))
    if not any(run.curves.values()):
        raise UserError(f"{log} has no finished epoch yet, or no finite number of {', '.join(names)}: omit this folder")
    if path.exists():
        processes = [start.get("processes", 1) for start in read_log(starts)] if starts.exists() else []
        run.arguments = {**with_class_list(read_json(path)), "processes": max(processes, default=1)}
        run.seed, run.out_dim = str(run.arguments.get("seed")), str(run.arguments.get("out_dim", "unknown"))
    return run


def read_curves(path: Path, names: Sequence[str] = NAMES) -> list[Run]:
    """Read the runs in a CSV file of curves, as the studies write it.

    Args:
        names: its curves.

    Raises:
        UserError: the file cannot be read, or has no runs.
    """
    runs: dict[tuple[str, str], Run] = {}
    for line in read_table(path, curve_columns(names), optional=2 if NEWEST in names else 1):
        row, seed, out_dim = line["row"], line["seed"], line.get("out_dim", "unknown")
        run = runs.setdefault((row, seed), Run(row, seed, out_dim=out_dim, curves={name: {} for name in names}))
        for name in names:
            run.add(name, int(line["epoch"]), float(line.get(name) or "nan"))
    if not runs:
        raise UserError(f"{path} has no runs")
    return list(runs.values())


def curve_columns(names: Sequence[str]) -> list[str]:
    """Return the columns of a CSV file of curves. Older files lack out_dim, or what follows."""
    newest = [name for name in names if name == NEWEST]
    return ["row", "seed", "epoch", *(name for name in names if name != NEWEST), "out_dim", *newest]


def read_table(path: Path, columns: Sequence[str], optional: int = 0) -> list[dict[str, str]]:
    """Return the lines of a CSV file that several processes may have written, without repetitions of the header.

    Args:
        optional: number of columns, the last ones, that lines and headers may lack.

    Raises:
        UserError: the file cannot be read or has other columns.
    """
    rows = list(csv.reader(read_text(path).splitlines()))
    headers = [list(columns[: len(columns) - missing]) for missing in range(optional + 1)]
    if rows[:1] not in [[header] for header in headers] or {*map(len, rows)} - {*map(len, headers)}:
        raise UserError(f"cannot read {path}: expected a CSV file with the columns {','.join(headers[-1])}")
    return [dict(zip(columns, row, strict=False)) for row in rows if row not in headers]


def settings(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by their arguments.

    Returns:
        {label: runs}. The label lists the arguments that differ between the groups, or the loss if none differs. Runs
        without arguments are grouped and labeled by their name.

    Raises:
        UserError: two runs have the same arguments and the same seed.
    """
    defaults = {**defaults_of_older_runs(), "processes": 1}
    groups: dict[Setting, dict[str | None, Run]] = {}  # {setting: {seed: run}}
    for run in runs:
        arguments = {**defaults, **run.arguments}
        setting: Setting = tuple((name, str(arguments[name])) for name in defaults if name not in NO_SETTING)
        other = groups.setdefault(setting if run.arguments else (("", run.name),), {}).setdefault(run.seed, run)
        if other is not run:
            raise UserError(f"{other.name} and {run.name} are runs of one setting and seed: give one of them")
    counts = Counter(name for name, _ in {pair for setting in groups for pair in setting})
    differing = {name for name, count in counts.items() if name and count > 1} or {"loss"}
    labeled = {}
    for setting, members in groups.items():
        words = [f"{name} {value}".strip() for name, value in setting if name in {"", *differing}]
        labeled[", ".join(words)] = list(members.values())
    return labeled


def renamed(labeled: dict[str, list[Run]], names: Sequence[str]) -> dict[str, list[Run]]:
    """Return `settings` under other labels.

    Raises:
        UserError: there is not one name for each setting, or two names are the same.
    """
    if not len(names) == len(set(names)) == len(labeled):
        listed = "; ".join(f"{number}: {label}" for number, label in enumerate(labeled, start=1))
        found = f"found {len(names)}, expected {len(labeled)} different names"
        raise UserError(f"--names {' '.join(names)}: {found}, one for each of these settings, in this order: {listed}")
    return dict(zip(names, labeled.values(), strict=True))


def mean_curve(curves: Sequence[Curve]) -> np.ndarray:
    """Average the curves of several runs.

    Returns:
        array [3, n]: epochs trained, mean, standard deviation of a sample (NaN for a single run)
    """
    values = {epoch: [c[epoch] for c in curves if epoch in c] for epoch in sorted({e for c in curves for e in c})}
    rows = [(epoch, np.mean(v), np.std(v, ddof=1) if len(v) > 1 else np.nan) for epoch, v in values.items()]
    return np.array(rows).reshape(-1, 3).T


def curves_of(labeled: dict[str, list[Run]]) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Return the curves per setting for `figures.draw_curves`, and a line about panels left out if there are any."""
    sizes = dict.fromkeys(runs[0].out_dim for runs in labeled.values())
    curves = {}
    for label, runs in labeled.items():
        own = {name: mean_curve([run.curves[name] for run in runs]) for name in NAMES}
        if len(sizes) > 1:  # a uniform output has the loss ln K
            own[f"loss, K = {runs[0].out_dim}"] = own.pop("loss")
        curves[f"{label} ({'1 seed' if len(runs) == 1 else f'{len(runs)} seeds'})"] = own
    filled = [(name, curve) for own in curves.values() for name, curve in own.items() if curve.size]
    names = dict.fromkeys(name for name, _ in filled)
    drawn = {name for name, (_, mean, _) in filled if len(mean) == 1 or np.ptp(mean) > FLAT * abs(mean).max()} or names
    flat = ", ".join(name for name in names if name not in drawn)
    notes = [f"not drawn, since no curve changes by more than {FLAT:.0%}: {flat}"] if flat else []
    return {label: {name: own[name] for name in own if name in drawn} for label, own in curves.items()}, notes


def last_values(labeled: dict[str, list[Run]]) -> list[str]:
    """Return the lines of a table with the last values per setting, mean ± standard deviation.

    A column without values is left out. If labels make the table wider than MAX_WIDTH, they stand below the table,
    which has their numbers.
    """
    columns = [column for column in COLUMNS if any(run.curves[column[0]] for runs in labeled.values() for run in runs)]
    rows = [("setting", "seeds", "epochs", *(title for _, title, _ in columns))]
    for label, runs in labeled.items():
        epochs = [max(epoch for curve in run.curves.values() for epoch in curve) for run in runs]
        row = [printable(label), str(len(runs)), " to ".join(dict.fromkeys((str(min(epochs)), str(max(epochs)))))]
        for name, _, digits in columns:
            values = np.array([curve[max(curve)] for run in runs if (curve := run.curves[name])])
            deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            row.append(f"{values.mean():.{digits}f}{deviation}" if len(values) else "-")
        rows.append(tuple(row))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    numbered = {str(number): runs for number, runs in enumerate(labeled.values(), start=1)}
    if max(map(len, lines)) > MAX_WIDTH and labeled.keys() != numbered.keys():
        lines = last_values(numbered)
        for number, label in zip(numbered, labeled, strict=True):
            text = f"{number}: {printable(label)}"
            lines += textwrap.wrap(text, MAX_WIDTH, subsequent_indent="   ", break_on_hyphens=False)
    return lines


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="OUT", help="--output_dir of a run, or a CSV file of curves")
    text = "names of the settings, one each, in the order in which the runs first show them"
    parser.add_argument("--names", nargs="+", metavar="NAME", help=text)
    parser.add_argument("--output", default="runs.png", help="file to write, PNG or PDF")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    from support import figures  # imports matplotlib, which the studies do not need

    figures.check_output(args.output)
    runs = []
    for path in map(Path, args.runs):
        runs += read_curves(path) if path.suffix == ".csv" else [read_run(path)]
    labeled = settings(runs)
    if args.names:
        labeled = renamed(labeled, args.names)
    curves, notes = curves_of(labeled)
    figures.save([figures.draw_curves(curves)], args.output)
    print("\n".join([*last_values(labeled), *notes, f"drawn in {args.output}"]))


if __name__ == "__main__":
    run_main(main)
