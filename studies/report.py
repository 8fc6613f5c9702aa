"""Tables of a study from its CSV file of runs."""

import warnings
from pathlib import Path

import pandas as pd
from scipy import stats

import plot_runs
from reproduce import markdown
from studies.rows import IMAGES, SEARCHED, Study, draw, search_of
from studies.runs import Place, changes, commands, settings
from utils import UserError


def read_runs(study: Study, path: Path) -> pd.DataFrame:
    """Read the runs of a study, with a column `changes` that says where a run differs from its row, or is empty.

    Raises:
        UserError: the file cannot be read, or has other rows than the study.
    """
    lines, shown = plot_runs.read_table(path, study.columns), list(study.shown)
    frame = pd.DataFrame(lines, columns=study.columns).drop_duplicates(["row", "seed", *IMAGES, "settings"])
    if unknown := set(frame["row"]) - set(study.rows):
        raise UserError(f"{path}: {study.name} has no row {min(unknown)}, expected some of {', '.join(study.rows)}")
    try:
        frame[shown] = frame[shown].replace("", "nan").astype(float)
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    expected = {}
    for row in frame["row"].unique():
        own = settings(commands(study, row, 0, Place(Path())))
        expected[row] = f"{own} images_train={study.images[0]} images_val={study.images[1]}"
    frame["changes"] = [
        changes(f"{run.settings} images_train={run.images_train} images_val={run.images_val}", expected[run.row])
        for run in frame.itertuples()
    ]
    return frame


def report(study: Study, path: Path) -> list[str]:
    """Return the lines of a study's tables, mean ± standard deviation over the seeds that were run.

    Tables whose rows all stand in an earlier one are left out. Runs with other settings or images than those of their
    row are a row of their own.
    """
    runs, titles, lines = read_runs(study, path), study.shown, []
    shown: set[str] = set()
    for title, rows in study.tables.items():
        found = {*rows} & {*runs["row"]}
        if found <= shown:
            continue
        shown |= found
        cells, compared = [], []
        reference = next(row for row in rows if study.rows[row].label == "DINO")
        for row in rows:
            for change, group in runs[runs["row"] == row].groupby("changes"):
                dino = runs[(runs["row"] == reference) & (runs["changes"] == change)]
                label = f"{study.rows[row].label}, {change}" if change else study.rows[row].label
                cells.append([label, str(len(group)), *(spread(group[column]) for column in titles)])
                differences = [interval(group[column], dino[column]) for column in titles]
                if row != reference and any(differences):
                    compared.append([label, *differences])
        lines += [f"### {study.title[0].upper()}{study.title[1:]}: {title}", ""]
        lines += [f"{study.measures} in %, mean ± standard deviation over the seeds.", ""]
        lines += [*markdown([["method", "seeds", *titles.values()], *cells]), ""]
        if compared:
            lines += ["Difference to DINO in points, with its 95 % interval (Welch).", ""]
            lines += [*markdown([["method", *titles.values()], *compared]), ""]
    return [*lines, study.note]


def spread(values: pd.Series) -> str:
    """Return mean ± standard deviation, or only the mean of a single value; "" if no run has a value."""
    values = values.dropna()
    if values.empty:
        return ""
    return f"{values.mean():.1f} ± {values.std():.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def interval(values: pd.Series, reference: pd.Series) -> str:
    """Return the difference of two means with its 95 % interval, for unequal variances; "" if the spread is unknown."""
    values, reference = values.dropna(), reference.dropna()
    if min(len(values), len(reference)) < 2 or values.nunique() == reference.nunique() == 1:
        return ""
    difference = values.mean() - reference.mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of one of the two without a spread
        low, high = stats.ttest_ind(values, reference, equal_var=False).confidence_interval(0.95)
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"


def search_report(study: Study, path: Path) -> list[str]:
    """Return the best trial of each method, and the differences of the mean loss to DINO over the trials.

    A trial is judged by the mean of its linear accuracy and its k-NN accuracy with K = 10.
    """
    numbers = [int(line["row"].rpartition("-")[2]) for line in plot_runs.read_table(path, study.columns)]
    runs = read_runs(search_of(study, max(numbers, default=0) + 1), path)
    trials = runs[runs["changes"] == ""].copy()
    trials[["method", "trial"]] = trials["row"].str.rsplit("-", n=1, expand=True)
    trials["judged"] = trials[["linear", "knn10"]].mean(axis=1)
    lines = []
    for method, group in trials.groupby("method"):
        best = group.loc[group["judged"].idxmax()]
        lines.append(f"- {method}: best is trial {best['trial']}, {best['judged']:.1f} %: {draw(int(best['trial']))}")
    texts = []
    for column in ("linear", "knn10"):
        pairs = trials.pivot(index="trial", columns="method", values=column).reindex(columns=list(SEARCHED)).dropna()
        gains = pairs["mean"] - pairs["dino"]
        counts = f"{(gains > 0).sum()} trials ahead, {(gains < 0).sum()} behind, {(gains == 0).sum()} equal"
        texts.append(f"{study.shown[column]} {gains.mean():+.1f} points ({counts})")
    return [*lines, f"- mean minus dino with the same setting: {'; '.join(texts)}"]
