import json
import math
import multiprocessing
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from scipy.stats import t

import main_lgssl
import plot_runs
from studies import __main__ as command
from studies.report import interval, read_runs, report, search_report
from studies.rows import (
    DINO_SETTING,
    IMAGES,
    MEAN_SETTING,
    PATCHES,
    SEARCHED,
    SEARCHES,
    SPACE,
    STUDIES,
    draw,
    search_of,
)
from studies.runs import PRETRAINING, SCRIPTS, Place, append, commands, run_study, settings
from utils import UserError


def arguments(study, row, place):
    """Return the arguments that each command of a run parses, {name: dictionary}."""
    return {
        name: vars(SCRIPTS[script][0].parse_arguments(words))
        for name, (script, *words) in commands(study, row, 0, place).items()
    }


def write(path, study, values, extra=(), images=None):
    """Append results to a CSV file as a run does: {row: [numbers in the tables, one tuple per seed]}."""
    place = Place(path.parent, extra=list(extra))
    for row, numbers in values.items():
        for seed, scores in enumerate(numbers):
            text = settings(commands(study, row, seed, place))
            counts = dict(zip(IMAGES, images or study.images, strict=True))
            numbers = {**dict.fromkeys(study.metrics), **dict(zip(study.shown, scores, strict=True)), **counts}
            append(path, study.columns, [[row, seed, *numbers.values(), text]])


def test_report_is_mean_standard_deviation_and_difference_to_dino(tmp_path):
    study, path = STUDIES["digits"], tmp_path / "digits.csv"
    dino, mean = [70.0, 71.5, 75.0], [73.0, 76.0]
    write(path, study, {"dino": [(x, 70.0, 80.0, 50.0) for x in dino], "mean": [(x, 70.0, 80.0, 50.0) for x in mean]})
    write(path, study, {"pixels": [(80.0, 70.0, 80.0, 50.0)]})
    write(path, study, {"dino": [(1.0, 2.0, 3.0, 4.0)]}, extra=["--use_bn_in_head", "false"])
    write(path, study, {"mean": [(5.0, 6.0, 7.0, 8.0)] * 2}, images=(9, 397))
    lines = report(study, path)
    ours, theirs = (f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for v in (mean, dino))
    assert f"| DINO | 3 | {theirs} | 70.0 ± 0.0 | 80.0 ± 0.0 | 50.0 ± 0.0 |" in lines
    assert f"| Ours, mean | 2 | {ours} | 70.0 ± 0.0 | 80.0 ± 0.0 | 50.0 ± 0.0 |" in lines
    assert "| raw pixels | 1 | 80.0 | 70.0 | 80.0 | 50.0 |" in lines
    # Other settings and other images are rows of their own.
    assert "| DINO, use_bn_in_head at its default | 1 | 1.0 | 2.0 | 3.0 | 4.0 |" in lines
    assert "| Ours, mean, images_train 9 | 2 | 5.0 ± 0.0 | 6.0 ± 0.0 | 7.0 ± 0.0 | 8.0 ± 0.0 |" in lines
    (compared,) = (line for line in lines if re.match(r"\| .* \| [+-]", line))  # one seed has no interval
    assert compared.startswith("| Ours, mean | +2.3 (")


def test_interval_is_welchs():
    a, b = [71.0, 73.5, 74.0, 70.2, 72.2], [70.0, 69.0, 71.9]
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = t.ppf(0.975, freedom) * math.sqrt(va + vb)
    difference = statistics.mean(a) - statistics.mean(b)
    found = [float(x) for x in re.findall(r"[+-]\d+\.\d", interval(pd.Series(a), pd.Series(b)))]
    assert found == pytest.approx([difference, difference - half, difference + half], abs=0.051)
    assert interval(pd.Series([1.0]), pd.Series(b)) == ""


@pytest.mark.parametrize("name", SEARCHES)
def test_rows_differ_only_in_loss_and_searched_settings(name):
    """All rows see the same images in the same sizes, with the same network and budget."""
    searched = {*re.findall(r"--(\w+)", " ".join(sum(SPACE.values(), []))), "loss", "lambda_cls"}
    searched |= {"output_dir", "patch_augmentation", "patch_head"}
    study = STUDIES[name]
    shared = {}
    for row in study.rows:
        args = arguments(study, row, Place(ROOT)).get(PRETRAINING)
        if args:
            shared[row] = {option: value for option, value in args.items() if option not in searched}
            losses = {"dino": "cls", "mean": "mean", "sum": "sum", PATCHES: "mean"}
            losses |= {DINO_SETTING: "mean", MEAN_SETTING: "cls"}
            assert args["loss"] == losses.get(row, "lambda")
            assert args["patch_augmentation"] == (row == PATCHES)
            assert args["patch_head"] == ("separate" if row.endswith("-separate") else "shared")
            assert args["lambda_cls"] == float(*re.findall(r"^lambda([\d.]+)", row) or [0.5])
            network = args["global_crops_size"], args["patch_size"], args["arch"]
    assert len(shared) == 10
    assert all(settings == shared["dino"] for settings in shared.values())
    untrained = arguments(study, "untrained", Place(ROOT))["knn"]
    assert (untrained["crop_size"], untrained["patch_size"], untrained["arch"]) == network
    assert set(sum(study.tables.values(), [])) == set(study.rows)


@pytest.mark.parametrize("name", SEARCHES)
def test_recipes_are_the_best_trials_of_the_committed_search(name):
    path = ROOT / f"studies/{name}_search.csv"
    trials = read_runs(search_of(STUDIES[name], 12), path)
    assert set(trials["changes"]) == {""}  # each has the settings that are drawn today
    assert sorted(trials["row"]) == sorted(f"{method}-{trial}" for method in SEARCHED for trial in range(12))
    best = dict(
        re.findall(r"^- (\w+): best is trial \d+, \S+ %: (.*)", "\n".join(search_report(STUDIES[name], path)), re.M)
    )
    for method in SEARCHED:
        lines = (ROOT / f"studies/{name}_{method}.args").read_text().splitlines()
        words = shlex.split(" ".join(line for line in lines if not line.startswith("#")))
        assert words == [f"@{name}.args", *best[method].split()]


def test_draws_cover_the_space_and_are_valid():
    drawn = [draw(trial) for trial in range(200)]
    for values in SPACE.values():
        counts = [sum(value in f"{words} " for words in drawn) for value in values]
        assert min(counts) > 200 / len(values) / 2
    for words in drawn[:50]:
        main_lgssl.parse_arguments(words.split())


def test_search_names_the_best_and_compares_the_same_settings(tmp_path):
    """Two trials of both methods, and one more of DINO, which counts for the best one only."""
    study, path = STUDIES["solar"], tmp_path / "solar_search.csv"
    scores = {"dino-0": 50, "mean-0": 60, "dino-1": 51, "mean-1": 59, "dino-2": 52}
    write(path, search_of(study, 3), {row: [(x, x, 0, 0)] for row, x in scores.items()})
    gains = [f"{column} +9.0 points (2 trials ahead, 0 behind, 0 equal)" for column in ("linear", "k-NN, K = 10")]
    assert search_report(study, path) == [
        f"- dino: best is trial 2, 52.0 %: {draw(2)}",
        f"- mean: best is trial 0, 60.0 %: {draw(0)}",
        f"- mean minus dino with the same setting: {'; '.join(gains)}",
    ]
    parsed = arguments(search_of(study, 1), "dino-0", Place(tmp_path))
    assert parsed[PRETRAINING]["epochs"] == 5
    assert all(args["tuning"] for args in parsed.values())


def test_two_processes_append_to_one_file(tmp_path):
    path, lines = tmp_path / "a.csv", 300

    def write_lines(name):
        for i in range(lines):
            append(path, ["row", "text"], [[f"{name}{i}", "x" * (i % 97) * 20 + ', "y"']])

    writers = [multiprocessing.get_context("fork").Process(target=write_lines, args=name) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    entries = {entry["row"]: entry["text"] for entry in plot_runs.read_table(path, ["row", "text"])}
    assert entries == {f"{name}{i}": "x" * (i % 97) * 20 + ', "y"' for name in "ab" for i in range(lines)}


def test_a_run_is_done_if_row_seed_and_settings_stand_in_the_file(tmp_path, capsys, monkeypatch):
    started, code = [], 3

    def run(words, **options):
        started.append(" ".join(words[1:3]))
        return subprocess.CompletedProcess(words, code)

    monkeypatch.setattr(subprocess, "run", run)
    write(tmp_path / "digits.csv", STUDIES["digits"], {"mean": [(1, 2, 3, 4)] * 2})
    words = f"run digits --row mean --runs {tmp_path}".split()
    command.main([*words, "--seeds", "2"])
    command.main(["list", "--runs", str(tmp_path)])
    output = capsys.readouterr().out
    assert "| Ours, mean | 2 | 1.0 ± 0.0 | 2.0 ± 0.0 | 3.0 ± 0.0 | 4.0 ± 0.0 |\n" in output
    assert "  mean               digits         2 of 5 seeds done\n" in output
    for more in (["--seeds", "3"], ["--seeds", "1", "--", "--lr", "1"]):  # another seed, other settings
        with pytest.raises(UserError, match=r"main_lgssl.py in .*/mean-\d failed: exit code 3"):
            command.main([*words, "--jobs", "1", *more])
    code = 0  # of a pretraining that was stopped by a signal: nothing is evaluated
    with pytest.raises(UserError, match="the pretraining in .*/mean-2 was stopped"):
        command.main([*words, "--seeds", "3"])
    assert started == 3 * [f"{ROOT}/main_lgssl.py @studies/digits.args"]


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    write(tmp_path / "solar.csv", STUDIES["digits"], {"dino-image": [(1, 2, 3, 4)]})
    write(tmp_path / "fashion.csv", STUDIES["fashion"], {"dino": [("high", 2, 3, 4)]})
    for words, message in {
        "run mnist": "invalid choice: 'mnist'",
        "search digits": "invalid choice: 'digits'",
        "run solar --row dino-image": "solar has no row dino-image, expected some of untrained, pixels",
        "run digits --jobs 0": "--jobs: found '0'",
        f"run fashion --data_root {tmp_path}": f"--data_root {tmp_path} has no fashion-mnist",
        f"run digits --runs {tmp_path}/file": f"cannot write to --runs {tmp_path}/file",
        "run digits --row mean -- --lrr 1": "unknown option --lrr",
        f"report digits --runs {tmp_path}": f"cannot read {tmp_path}/digits.csv: No such file",
        f"report solar --runs {tmp_path}": "solar has no row dino-image",
        f"report fashion --runs {tmp_path}": f"cannot read {tmp_path}/fashion.csv: could not convert",
    }.items():
        with pytest.raises((UserError, SystemExit)) as error:
            command.main([*words.split(), *([] if "--runs" in words else ["--runs", str(tmp_path / "runs")])])
        assert message in str(error.value) + capsys.readouterr().err
        assert "\n" not in str(error.value)
    assert not list((tmp_path / "runs").glob("*.csv"))


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_a_report(tmp_path, name):
    study = STUDIES[name]
    scores = range(len(study.shown))
    write(tmp_path / f"{name}.csv", study, {row: [scores] for row in study.rows})
    lines = "\n".join(report(study, tmp_path / f"{name}.csv"))
    cells = " | ".join(f"{score:.1f}" for score in scores)
    assert all(f"| {row.label} | 1 | {cells} |" in lines for row in study.rows.values())


def test_commands_are_shown(capsys):
    command.main("run fashion --row mean pixels --seeds 1 --data_root D --runs R --show -- --lr 1".split())
    folder = "R/fashion/mean-0"
    data = "--dataset torchvision:FashionMNIST --train_images 4000 --data_path D/fashion-mnist"
    assert capsys.readouterr().out.splitlines()[:4] == [
        "# fashion, mean, seed 0",
        f"python main_lgssl.py @studies/fashion_mean.args --loss mean {data} --lr 1 --seed 0 --output_dir {folder}",
        f"python eval_linear.py --num_workers 0 {data} --pretrained_weights {folder}/checkpoint.pth --seed 0 "
        f"--output_dir {folder} --cache_features --lr 0.5 --epochs 100",
        f"python eval_knn.py --num_workers 0 {data} --pretrained_weights {folder}/checkpoint.pth --seed 0 "
        f"--output_dir {folder}",
    ]


def test_scenes_are_evaluated_by_three_scripts(tmp_path, monkeypatch):
    """Of several results, the newest counts. An evaluation that a row leaves out has empty cells."""
    monkeypatch.setattr(sys, "argv", ["studies"])
    study, place = STUDIES["scenes"], Place(tmp_path / "runs", tmp_path / "DATA")
    folders = [f"scenes/{stamps}/{part}".rstrip("/") for stamps in ("seen", "new") for part in ("", "images")]
    for folder in folders:
        (place.data_root / folder).mkdir(parents=True)
    shown = commands(study, "dino", 2, place)
    run = place.folder(study, "dino", 2)
    output, weights = f"--seed 2 --output_dir {run}", f"--pretrained_weights {run}/checkpoint.pth"
    assert shlex.join(shown.pop("pretraining")) == (
        f"main_lgssl.py @studies/scenes.args --loss cls --data_path {place.data_root}/scenes/seen/images {output}"
    )
    assert shlex.join(shown["linear_segmentation_new"]) == (
        f"eval_dense.py linear-segmentation --num_workers 0 --data_path {place.data_root}/scenes/new {weights} "
        f"{output}/linear_segmentation_new --train_images 400 --crop_size 96 --lr 1"
    )
    assert shlex.join(shown["patch_knn_seen"]) == (
        f"eval_knn.py --num_workers 0 --data_path {place.data_root}/scenes/seen/images {weights} "
        f"{output}/patch_knn_seen --crop_size 96 --features patches_mean"
    )
    assert list(shown) == [
        f"{name}_{stamps}"
        for name in ("knn_segmentation", "linear_segmentation", "knn", "patch_knn")
        for stamps in ("seen", "new")
    ]

    started = []

    def evaluate(words, **options):
        folder = Path(words[words.index("--output_dir") + 1])
        folder.mkdir()
        number = len(started)
        started.append(folder.name)
        images = {"train": 4000, "val": 600}
        result = {
            "miou": number,
            "miou_objects": 10 + number,
            "knn": {"10": {"top1": 20 + number}},
            "images": images,
        }
        (folder / "b.json").write_text(json.dumps(result))
        (folder / "a.json").write_text("{}")
        os.utime(folder / "a.json", (0, 0))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", evaluate)
    run_study(study, [("pixels", 0)], place, jobs=1)
    assert started == list(shown)[:-2]
    (line,) = report(study, place.runs / "scenes.csv")[6:-2]
    assert line == "| color + position | 1 | 10.0 | 11.0 | 2.0 | 3.0 | 24.0 | 25.0 |  |  |"
    run_study(study, [("pixels", 0)], place, jobs=1)
    assert len(started) == 6


@pytest.mark.slow
def test_study_runs_and_goes_on(tmp_path):
    words = [sys.executable, "-m", "studies", "run", "digits", "--row", "pixels", "dino-image", "--runs", tmp_path]

    def run(seeds, epochs):
        options = ["--seeds", str(seeds), "--jobs", "2", "--", "--epochs", str(epochs)]
        return subprocess.run([*words, *options], cwd=ROOT, check=True, capture_output=True, text=True).stdout

    run(seeds=1, epochs=1)
    (tmp_path / "digits/dino-image-0/checkpoint.pth").unlink()  # not needed any more
    output = run(seeds=2, epochs=1)
    assert "dino-image, seed 0: done" not in output
    assert re.search(r"^\| raw pixels \| 2 \| 9\d\.\d ± \d\.\d \| 9\d\.\d ± 0\.0 \|", output, re.MULTILINE)
    assert re.search(r"^\| DINO, crops drawn per image, epochs 1 \| 2 \|", output, re.MULTILINE)
    lines = plot_runs.read_table(tmp_path / "digits.csv", STUDIES["digits"].columns)
    assert sorted((line["row"], line["seed"]) for line in lines) == [
        (row, seed) for row in ("dino-image", "pixels") for seed in "01"
    ]
    for line in lines:
        result = json.loads((tmp_path / f"digits/{line['row']}-{line['seed']}/knn_digits.json").read_text())
        assert float(line["knn10"]) == result["knn"]["10"]["top1"]
        assert result["args"]["seed"] == int(line["seed"])
    curves = plot_runs.read_curves(tmp_path / "digits_curves.csv")
    assert [(run.name, run.seed) for run in curves] == [
        ("dino-image --epochs 1", "0"),
        ("dino-image --epochs 1", "1"),
    ]
    log = json.loads((tmp_path / "digits/dino-image-1/log.txt").read_text())
    assert curves[1].curves["loss"] == {1: log["train_loss"]}
