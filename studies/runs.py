"""Runs of a study: their commands, and the CSV files of results that they append to."""

import csv
import errno
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import eval_dense
import eval_knn
import eval_linear
import main_lgssl
import plot_runs
from reproduce import progress
from studies.rows import Metric, Study
from support.arguments import ROOT
from support.files import make_folder, read_json, read_text
from support.options import argument_parser
from utils import UserError

PRETRAINING = "pretraining"  # the command that is no evaluation
NO_WEIGHTS = ["--pretrained_weights", "none"]
SCRIPTS = {  # {script: (module, words that it requires, after its protocol)}
    "main_lgssl.py": (main_lgssl, []),
    "eval_linear.py": (eval_linear, NO_WEIGHTS),
    "eval_knn.py": (eval_knn, NO_WEIGHTS),
    "eval_dense.py": (eval_dense, [*NO_WEIGHTS, "--data_path", "."]),
}
# The seed has a column. The weights of an evaluation are those of the run.
NO_SETTINGS = {*argument_parser().may_change, "seed", "pretrained_weights"}


@dataclass
class Place:
    """Where data and runs are, and what a user changes.

    Attributes:
        runs: folder of NAME.csv, NAME_curves.csv, and of the runs in NAME/ROW-SEED.
        data_root: folder of the data sets.
        extra: further words for main_lgssl.py.
    """

    runs: Path
    data_root: Path = Path("DATA")
    extra: list[str] = field(default_factory=list)

    def folder(self, study: Study, row: str, seed: int) -> Path:
        """Return the folder of a run."""
        return self.runs / study.name / f"{row}-{seed}"


def commands(study: Study, row: str, seed: int, place: Place) -> dict[str, list[str]]:
    """Return the commands of a run, {name: script and its options}: PRETRAINING, if any, and the evaluations."""
    entry, run = study.rows[row], place.folder(study, row, seed)

    def data_and_output(folder: str | None, output: Path, model: Sequence[str]) -> list[str]:
        path = ["--data_path", str(place.data_root / folder)] if folder else []
        return [*study.data.split(), *path, *model, "--seed", str(seed), "--output_dir", str(output)]

    words, model = {}, entry.options.split()
    if entry.recipe:
        options = data_and_output(study.folder, run, place.extra)
        words[PRETRAINING] = ["main_lgssl.py", f"@studies/{entry.recipe}.args", *model, *options]
        model = ["--pretrained_weights", str(run / "checkpoint.pth")]
    for name, evaluation in study.evaluations.items():
        if name not in entry.without:
            folder, output = evaluation.folder or study.folder, (run / evaluation.result).parent
            options = ["--num_workers", "0", *data_and_output(folder, output, model), *evaluation.options.split()]
            words[name] = [*evaluation.script.split(), *options, *entry.more.get(name, "").split()]
    return words


def settings(commands: dict[str, list[str]]) -> str:
    """Return the settings of a run that are not defaults, as NAME=VALUE, those of evaluations as linear.NAME=VALUE."""
    pairs = []
    for command, (script, *words) in commands.items():
        module, required = SCRIPTS[script]
        protocol = [] if words[0][0] in "@-" else words[:1]
        defaults = vars(module.parse_arguments([*protocol, *required]))
        prefix = "" if command == PRETRAINING else f"{command}."
        for name, value in vars(module.parse_arguments(words)).items():
            if name not in NO_SETTINGS and value != defaults[name]:
                pairs.append(f"{prefix}{name}={':'.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(pairs)


def changes(text: str, own: str) -> str:
    """Return where the settings of a run differ from its row's own, or "" if nowhere."""
    theirs, ours = (dict(pair.split("=", 1) for pair in words.split() if "=" in pair) for words in (text, own))
    names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    return ", ".join(f"{name} {theirs.get(name, 'at its default')}" for name in names)


def run_study(study: Study, work: list[tuple[str, int]], place: Place, jobs: int) -> None:
    """Run rows with seeds, (row, seed) each, that are not in the CSV file yet, one thread per run.

    Args:
        jobs: number of simultaneous runs.

    Raises:
        UserError: the data set is missing, or a run failed.
    """
    for folder in (study.folder, *(evaluation.folder for evaluation in study.evaluations.values())):
        if folder and not (place.data_root / folder).is_dir():
            raise UserError(f"--data_root {place.data_root} has no {folder}, the folder of {study.title}")
    make_folder(place.runs, "--runs")
    done = finished(study, place.runs)
    todo = [
        (row, seed) for row, seed in work if (row, str(seed), settings(commands(study, row, seed, place))) not in done
    ]

    def run_one(key: tuple[str, int]) -> None:
        row, seed = key
        folder = place.folder(study, row, seed)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (script, *options) in commands(study, row, seed, place).items():
            with (folder / "output.txt").open("a") as output:
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                command = [sys.executable, str(ROOT / script), *options]
                code = subprocess.run(command, env=environment, stdout=output, stderr=output).returncode
            if code:
                last = read_text(folder / "output.txt", errors="replace").strip().splitlines()[-1:]
                raise UserError(f"{script} in {folder} failed: {' '.join(last) or f'exit code {code}'}")
            if name == PRETRAINING and progress(folder) < 1:
                raise UserError(f"the pretraining in {folder} was stopped: run this command again")
        keep(study, row, seed, place)
        print(f"{row}, seed {seed}: done", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(run_one, todo):  # an error cancels the runs that have not started
            pass


def finished(study: Study, runs: Path) -> set[tuple[str, str, str]]:
    """Return (row, seed, settings) of each run in the CSV file of a study, which may be missing."""
    path = runs / f"{study.name}.csv"
    lines = plot_runs.read_table(path, study.columns) if path.exists() else []
    return {(line["row"], line["seed"], line["settings"]) for line in lines}


def keep(study: Study, row: str, seed: int, place: Place) -> None:
    """Append the curves and the results of a finished run to the CSV files."""
    folder, words = place.folder(study, row, seed), commands(study, row, seed, place)
    if PRETRAINING in words:
        run, label = plot_runs.read_run(folder), " ".join([row, *place.extra])
        keep_curves(place.runs / f"{study.name}_curves.csv", label, seed, run)
    results = {name: newest_result(folder, study.evaluations[name].result) for name in words if name != PRETRAINING}
    numbers = [number_of(results.get(metric.evaluation, {}), metric) for metric in study.metrics.values()]
    append(place.runs / f"{study.name}.csv", study.columns, [[row, seed, *numbers, settings(words)]])


def number_of(result: dict[str, Any], metric: Metric) -> float | None:
    """Return a number of a JSON result, or None if it is missing."""
    for key in metric.keys[:-1]:
        result = result.get(key, {})
    return result.get(metric.keys[-1])


def newest_result(folder: Path, pattern: str) -> dict[str, Any]:
    """Return the newest result of an evaluation, see `Evaluation.result`.

    Raises:
        UserError: no file matches the pattern, or the newest cannot be read.
    """
    paths = sorted(folder.glob(pattern), key=os.path.getmtime)
    if not paths:
        raise UserError(f"no {folder / pattern}, the result of an evaluation")
    return read_json(paths[-1])


def keep_curves(path: Path, label: str, seed: int, run: plot_runs.Run) -> None:
    """Append the curves of a run to a CSV file."""
    lines, columns = [], plot_runs.curve_columns(list(run.curves))
    for n in sorted(set().union(*run.curves.values())):
        values = {"row": label, "seed": seed, "epoch": n, "out_dim": run.out_dim}
        values |= {name: curve.get(n) for name, curve in run.curves.items()}
        lines.append([values[column] for column in columns])
    append(path, columns, lines)


def append(path: Path, columns: list[str], lines: list[list[Any]]) -> None:
    """Append lines to a CSV file, to which other processes may append at the same time.

    Raises:
        UserError: the file cannot be written.
    """
    text = io.StringIO()
    header = [] if path.exists() else [columns]  # two processes may both write it, see `plot_runs.read_table`
    csv.writer(text, lineterminator="\n").writerows([*header, *lines])
    contents = text.getvalue().encode()
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if os.write(file, contents) < len(contents):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
