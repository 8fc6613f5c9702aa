"""Studies in small: the losses of the paper's Table 6, on data sets for two CPU cores.

`run_study` trains and evaluates rows, `report` returns the tables, and `search` tries settings for the recipes.
"""

import json
import os
import statistics
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import main_lgssl
from support.steps import COLUMNS, ROOT, Step, differences, mark, markdown, read_result, score
from utils import UserError, first_line


class Row(NamedTuple):
    """A row of a study.

    Attributes:
        label: name of the method.
        recipe: recipe of the pretraining, or None if the row has no pretraining.
        options: options of main_lgssl.py after the recipe; without a recipe, options of the evaluations.
        seeds: number of seeds.
        linear: further options of the linear evaluation.
    """

    label: str
    recipe: str | None
    options: str
    seeds: int = 5
    linear: str = ""


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        title: title of its tables.
        data: options of the data set.
        folder: folder of the data set below --data_root, or None if the data set needs no path.
        images: {split: number of images}.
        rows: {name: Row}. The row "dino" is the one that the others are compared with.
        linear: options of the linear evaluation, for every row.
        tables: {title of a table: names of its rows}.
    """

    title: str
    data: str
    folder: str | None
    images: dict
    rows: dict
    tables: dict
    linear: str = "--cache_features --lr 0.5 --epochs 100"  # DINO's 0.001 is for 100 epochs of ImageNet

    def data_words(self, data_root) -> list:
        """Return the options of the data set."""
        return [*self.data.split(), *(["--data_path", Path(data_root) / self.folder] if self.folder else [])]


METHODS = {"sum": ("Ours, sum", "--loss sum")}
METHODS |= {f"lambda{x}": (f"Ours, λ = {x}", f"--loss lambda --lambda_cls {x}") for x in (0.9, 0.5, 0.2)}
DINO_SETTING = "mean-dino-setting"


def _rows(name, untrained, pixels) -> dict:
    """Return the rows of a study whose recipes were searched. Arguments: options of the rows without pretraining."""
    dino, mean = f"{name}_dino", f"{name}_mean"
    return {
        "untrained": Row("untrained", None, f"--pretrained_weights none {untrained}"),
        "pixels": Row("raw pixels", None, f"--pretrained_weights pixels {pixels}", linear="--lr 0.005"),
        "dino": Row("DINO", dino, "--loss cls"),
        "mean": Row("Ours, mean", mean, "--loss mean"),
        **{row: Row(label, mean, options, seeds=3) for row, (label, options) in METHODS.items()},
        DINO_SETTING: Row("Ours, mean", dino, "--loss mean"),
    }


def _tables(rows) -> dict:
    own = [row for row in rows if row != DINO_SETTING]
    return {"each method with its own best setting": own, "both with DINO's best setting": ["dino", DINO_SETTING]}


_BATCH = "--geometry batch"
_DIGITS = {
    "untrained": Row("untrained", None, "--pretrained_weights none --arch vit_micro --patch_size 8 --crop_size 32"),
    "pixels": Row("raw pixels", None, "--pretrained_weights pixels --crop_size 8"),
    "dino": Row("DINO", "study", f"--loss cls {_BATCH}"),
    "dino-image": Row("DINO, crops drawn per image", "study", "--loss cls --geometry image"),
    "mean": Row("Ours, mean", "study", f"--loss mean {_BATCH}"),
    **{row: Row(label, "study", f"{options} {_BATCH}") for row, (label, options) in METHODS.items()},
}
_SOLAR = _rows("solar", "--arch vit_micro --patch_size 16 --crop_size 128", "--crop_size 64")
_FASHION = _rows("fashion", "--arch vit_micro --patch_size 8 --crop_size 32", "--crop_size 28")
STUDIES = {
    "digits": Study(
        "scikit-learn's digits",
        "--dataset digits",
        None,
        {"train": 1400, "val": 397},
        _DIGITS,
        {"all methods with one setting": list(_DIGITS)},
    ),
    "solar": Study("solar cells", "--dataset elpv", None, {"train": 1969, "val": 655}, _SOLAR, _tables(_SOLAR)),
    "fashion": Study(
        "Fashion-MNIST",
        "--dataset torchvision:FashionMNIST --train_images 4000",
        "fashion-mnist",
        {"train": 4000, "val": 10000},
        _FASHION,
        _tables(_FASHION),
    ),
}
STUDY_COLUMNS = ("linear", "knn10", "knn20", "balanced")

# Settings that `search` draws, each with its values. Weight decay grows tenfold, as in DINO.
SPACE = {
    "lr": [f"--lr {x}" for x in ("1e-3", "2e-3", "4e-3", "8e-3")],
    "temperature": [f"--teacher_temp {x} --warmup_teacher_temp {x}" for x in (0.02, 0.03, 0.04, 0.06)],
    "momentum": [f"--momentum_teacher {x}" for x in (0.97, 0.98, 0.99, 0.996)],
    "crops": [
        f"--global_crops_scale {x} --local_crops_scale {y}"
        for x, y in (("0.25 1", "0.05 0.25"), ("0.4 1", "0.05 0.4"), ("0.5 1", "0.25 0.5"), ("0.7 1", "0.5 0.8"))
    ],
    "prototypes": [f"--out_dim {x}" for x in (64, 256, 1024)],
    "head": [f"--use_bn_in_head {x}" for x in ("true", "false")],
    "weight decay": [f"--weight_decay {x} --weight_decay_end {10 * x:g}" for x in (0.01, 0.04, 0.1)],
    "distortion": [f"--distortion {x}" for x in (0, 0.3, 0.6, 1)],
}
SEARCHED = {"dino": "--loss cls", "mean": "--loss mean"}
SEARCH_SEED = 100  # differs from the seeds of the study


def study_steps(name, row, seed, runs, data_root="DATA", extra=()) -> list:
    """Return the steps of one row of a study with one seed: pretraining, if any, and both evaluations."""
    study, folder = STUDIES[name], runs / name / f"{row}-{seed}"
    _, recipe, options, _, linear = study.rows[row]
    data, steps, model = study.data_words(data_root), [], options.split()
    if recipe:
        words = ["main_lgssl.py", f"@recipes/{recipe}.args", *options.split(), *data, "--seed", seed]
        steps.append(Step("pretraining", [*words, "--output_dir", folder, *extra], folder / "checkpoint.pth"))
        model = ["--pretrained_weights", folder / "checkpoint.pth"]
    return steps + _evaluations(study, [*data, *model], seed, folder, linear)


def _evaluations(study, words, seed, folder, linear="") -> list:
    """Return the steps of both evaluations, given options of data and model, and further ones of the linear one."""
    steps, dataset = [], study.data.split()[1].replace(":", "_")
    for name, more in (("linear", f"{study.linear} {linear}".split()), ("knn", [])):
        command = [f"eval_{name}.py", *words, *more, "--seed", seed, "--num_workers", 0, "--output_dir", folder]
        steps.append(Step(name, command, folder / f"{name}_{dataset}.json"))
    return steps


def is_done(steps) -> bool:
    """Return whether the evaluations of a run are done. Its checkpoint may have been removed since."""
    settings = [vars(step.settings()) for step in steps if step.name == "pretraining"]
    evaluations = [step for step in steps if step.name != "pretraining"]
    return all(step.done() for step in evaluations) and not any(
        differences(wanted, read_result(step.result)["pretraining"]) for wanted in settings for step in evaluations
    )


def run_steps(steps, folder) -> None:
    """Run steps that are not done, in one thread, with their output in `folder`.

    Raises:
        UserError: a step failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for step in [] if is_done(steps) else steps:
        with (folder / "output.txt").open("a") as output:
            code = step.run(env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output)
        if code:
            last = (folder / "output.txt").read_text().strip().splitlines()[-1:]
            raise UserError(f"{step.name} in {folder} failed: {' '.join(last) or f'exit code {code}'}")


def run_study(name, rows, seeds, runs, jobs, data_root, extra, only_show) -> None:
    """Run some rows of a study with seeds 0, 1, ..., one thread per run, or only print the steps.

    Args:
        seeds: number of seeds; None: that of each row.
        jobs: number of simultaneous runs.
    """
    study = STUDIES[name]
    counts = {row: seeds or study.rows[row].seeds for row in rows}
    work = [(row, seed) for seed in range(max(counts.values())) for row in rows if seed < counts[row]]
    if only_show:
        for row, seed in work:
            steps = study_steps(name, row, seed, runs, data_root, extra)
            print("\n".join([f"# {name}, {row}, seed {seed}", *(step.line() for step in steps)]))
        return

    def run_one(row, seed):
        run_steps(study_steps(name, row, seed, runs, data_root, extra), runs / name / f"{row}-{seed}")
        print(f"{row}, seed {seed}: done", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(run_one, *zip(*work, strict=True)):  # an error cancels the runs that have not started
            pass
    print("\n".join(report(name, runs)))


def seeds_of(name, row, runs) -> list:
    """Return the seeds with which a row of a study was run, as texts."""
    return [folder.name.removeprefix(f"{row}-") for folder in sorted((runs / name).glob(f"{row}-[0-9]*"))]


def scores_of(name, row, runs, notes) -> tuple[dict, dict]:
    """Return the scores of a row, {column: one per seed}, and the marks of its notes, {column: marks}."""
    scores, marks = ({column: [] for column in STUDY_COLUMNS} for _ in range(2))
    for seed in seeds_of(name, row, runs):
        steps = {step.name: step for step in study_steps(name, row, seed, runs)}
        wanted = vars(steps["pretraining"].settings()) if "pretraining" in steps else {}
        for column in STUDY_COLUMNS:
            evaluation = COLUMNS[column][1]
            if (found := score(column, steps[evaluation])) is None:
                continue
            scores[column].append(found)
            batch_size = wanted.get("batch_size_per_gpu")
            marks[column].append(mark(notes, steps[evaluation], wanted, batch_size, STUDIES[name].images))
    return scores, marks


def report(name, runs) -> list:
    """Return the lines of a study's tables, mean ± standard deviation over the seeds that were run."""
    study, lines = STUDIES[name], []
    for title, rows in study.tables.items():
        cells, compared, notes, found = [], [], {}, {}
        for row in rows:
            found[row], marks = scores_of(name, row, runs, notes)
            low, *_, high = sorted(map(len, found[row].values()))
            if high > 0:
                seeds = str(low) if low == high else f"{low} to {high}"
                own = [spread(found[row][c]) + "".join(dict.fromkeys(marks[c])) for c in STUDY_COLUMNS]
                cells.append([study.rows[row].label, seeds, *own])
        for row in [row for row in rows if row != "dino"]:
            differences = [interval(found[row][c], found["dino"][c]) for c in STUDY_COLUMNS]
            if any(differences):
                compared.append([study.rows[row].label, *differences])
        if cells:
            header = [COLUMNS[column][0] for column in STUDY_COLUMNS]
            lines += [f"### {study.title[0].upper()}{study.title[1:]}: {title}", ""]
            lines += ["Accuracy in %, mean ± standard deviation over the seeds.", ""]
            lines += [*markdown(["method", "seeds", *header], cells, notes), ""]
        if compared:
            lines += ["Difference to DINO in points, with its 95 % interval (Welch).", ""]
            lines += [*markdown(["method", *header], compared, {}), ""]
    if lines:
        pixels = f"; raw pixels `{linear}`" if (linear := study.rows["pixels"].linear) else ""
        lines.append(f"Linear: cached features of un-augmented images, `{study.linear}`{pixels}.")
    return lines


def spread(values) -> str:
    """Return mean ± standard deviation, or only the mean of a single value."""
    if not values:
        return "not run"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def interval(values, reference) -> str:
    """Return the difference of two means with its 95 % interval, for unequal variances; "" if the spread is unknown."""
    from scipy import stats  # takes a second

    if min(len(values), len(reference)) < 2 or len({*values}) == len({*reference}) == 1:
        return ""
    difference = statistics.mean(values) - statistics.mean(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of one of the two without a spread
        low, high = stats.ttest_ind(values, reference, equal_var=False).confidence_interval(0.95)
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"


def draw(trial) -> str:
    """Return the options of a trial of the search, the same for all methods."""
    rng = np.random.default_rng((SEARCH_SEED, trial))
    return " ".join(values[rng.integers(len(values))] for values in SPACE.values())


def search(name, trials, path, runs, jobs, data_root) -> None:
    """Try settings for DINO and for the mean loss, each with half of the epochs of the study's recipe.

    A trial trains without the validation images, and without a fifth of the training images, on which it is judged: by
    the mean of the linear accuracy and the k-NN accuracy with K = 10. Finished trials are skipped.

    Args:
        trials: number of trials of each method.
        path: file of JSON lines, to which finished trials are added.
        runs: folder of the runs.
        jobs: number of simultaneous trials.
    """
    study, done = STUDIES[name], {(entry["method"], entry["trial"]) for entry in read_trials(path)}
    work = [(method, trial) for trial in range(trials) for method in SEARCHED if (method, trial) not in done]
    epochs = main_lgssl.parse_arguments([f"@{ROOT / 'recipes' / name}.args"]).epochs // 2

    def run_one(method, trial):
        folder, options = runs / f"{name}-search" / f"{method}-{trial}", draw(trial)
        data, start = [*study.data_words(data_root), "--tuning"], time.monotonic()
        words = ["main_lgssl.py", f"@recipes/{name}.args", *SEARCHED[method].split(), *options.split(), *data]
        words += ["--epochs", epochs, "--seed", SEARCH_SEED, "--output_dir", folder]
        steps = [Step("pretraining", words, folder / "checkpoint.pth")]
        steps += _evaluations(study, [*data, "--pretrained_weights", folder / "checkpoint.pth"], SEARCH_SEED, folder)
        run_steps(steps, folder)
        results = {step.name: read_result(step.result) for step in steps[1:]}
        scores = {column: round(COLUMNS[column][2](results[COLUMNS[column][1]]), 2) for column in STUDY_COLUMNS}
        entry = {"method": method, "trial": trial, **scores, "seconds": round(time.monotonic() - start)}
        return {**entry, "options": options}

    with ThreadPoolExecutor(jobs) as pool, path.open("a") as file:
        for future in as_completed([pool.submit(run_one, *trial) for trial in work]):
            if future.exception():
                pool.shutdown(wait=False, cancel_futures=True)
            line = json.dumps(future.result())
            print(line, file=file, flush=True)
            print(line, flush=True)
    entries = read_trials(path)
    for method in SEARCHED:
        best = max((entry for entry in entries if entry["method"] == method), key=judged)
        print(f"{method}: best is trial {best['trial']}, {judged(best):.1f} %: {best['options']}")
    print(f"mean minus dino with the same setting: {mean_against_dino(entries)}")


def judged(entry) -> float:
    """Return the score of a trial: the mean of its linear accuracy and its k-NN accuracy with K = 10, in percent."""
    return (entry["linear"] + entry["knn10"]) / 2


def mean_against_dino(entries) -> str:
    """Return the differences of the mean loss to DINO over the trials, each of which has one setting for both."""
    results = {method: {e["trial"]: e for e in entries if e["method"] == method} for method in SEARCHED}
    trials, texts = sorted({*results["mean"]} & {*results["dino"]}), []
    for column in ("linear", "knn10"):
        gains = [results["mean"][trial][column] - results["dino"][trial][column] for trial in trials]
        ahead, behind = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        counts = f"{ahead} trials ahead, {behind} behind, {len(gains) - ahead - behind} equal"
        texts.append(f"{COLUMNS[column][0]} {statistics.mean(gains):+.1f} points ({counts})")
    return "; ".join(texts)


def read_trials(path) -> list:
    """Return the entries of a file of trials, or [] if there is no file.

    Raises:
        UserError: the file is not one of trials.
    """
    if not path.exists():
        return []
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        return [entry for entry in entries if {*entry} >= {"method", "trial", "linear", "knn10", "options"}]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read the trials in {path}: {first_line(error)}") from error
