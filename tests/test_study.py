import json
import math
import re
import shlex
import statistics

import numpy as np
import pytest
import torch

import main_lgssl
import reproduce
from support import study
from support.steps import ROOT
from support.study import DINO_SETTING, STUDIES, draw, interval, judged, read_trials, report, spread, study_steps
from utils import UserError


def write(steps, linear, knn, *changes, name="digits"):
    """Write the results of the steps of a row as the evaluations do, with further words for the linear evaluation."""
    *pretraining, linear_step, knn_step = steps
    linear_step.words += changes
    settings = vars(pretraining[0].settings()) if pretraining else {}
    made_with = {**settings, "epoch": settings["epochs"], "batch_size": 32} if pretraining else {}
    neighbours = {str(k): {"top1": knn + k, "balanced_accuracy": knn - k} for k in (10, 20)}
    contents = {"linear": {"top1": linear, "batch_size": 128}, "knn": {"knn": neighbours}}
    for step in (linear_step, knn_step):
        result = {**contents[step.name], "images": STUDIES[name].images, "args": vars(step.settings())}
        step.result.parent.mkdir(parents=True, exist_ok=True)
        step.result.write_text(json.dumps({**result, "pretraining": made_with}, default=str))


def test_report_is_mean_standard_deviation_and_difference_to_dino(tmp_path):
    values = {"dino": [70.0, 71.5, 75.0], "mean": [73.0, 76.0], "pixels": [80.0]}
    for row, scores in values.items():
        for seed, value in enumerate(scores):
            changes = ["--epochs", "9"] if (row, seed) == ("dino", 1) else []
            write(study_steps("digits", row, seed, tmp_path), value, 60.0, *changes)
    lines = report("digits", tmp_path)
    dino, mean = (f"{sum(v) / len(v):.1f} ± {statistics.stdev(v):.1f}" for v in (values["dino"], values["mean"]))
    assert f"| DINO | 3 | {dino} [1] | 70.0 ± 0.0 | 80.0 ± 0.0 | 50.0 ± 0.0 |" in lines
    assert f"| Ours, mean | 2 | {mean} | 70.0 ± 0.0 | 80.0 ± 0.0 | 50.0 ± 0.0 |" in lines
    assert "| raw pixels | 1 | 80.0 | 70.0 | 80.0 | 50.0 |" in lines
    assert "[1] linear: --epochs 9 instead of 100." in lines
    compared = [line for line in lines if re.match(r"\| Ours, mean \| [+-]", line)]
    assert len(compared) == 1
    assert compared[0].startswith("| Ours, mean | +2.3 (")
    assert not any(line.startswith("| raw pixels | +") for line in lines)  # one seed has no interval
    assert report("digits", tmp_path / "none") == []


def test_interval_is_welchs():
    a, b = [71.0, 73.5, 74.0, 70.2, 72.2], [70.0, 69.0, 71.9]
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    # The quantile of Student's t distribution by numeric integration of its density
    t = np.linspace(-400, 400, 8_000_001)
    density = np.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    cumulative = np.cumsum(density * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)) * (t[1] - t[0])
    half = t[np.searchsorted(cumulative, 0.975)] * math.sqrt(va + vb)
    difference = statistics.mean(a) - statistics.mean(b)
    found = [float(x) for x in re.findall(r"[+-]\d+\.\d", interval(a, b))]
    assert found == pytest.approx([difference, difference - half, difference + half], abs=0.051)
    assert interval([1.0], b) == interval(a, []) == ""
    assert spread([]) == "not run"


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "digits"])
def test_rows_differ_only_in_loss_and_searched_settings(name):
    """All rows see the same images in the same sizes, with the same network and budget."""
    searched = set(re.findall(r"--(\w+)", " ".join(sum(study.SPACE.values(), [])))) | {
        "loss",
        "lambda_cls",
        "output_dir",
    }
    rows = STUDIES[name].rows
    found = {}
    for row in rows:
        steps = study_steps(name, row, 0, ROOT / "runs")
        if rows[row].recipe:
            args = steps[0].settings()
            found[row] = {option: value for option, value in vars(args).items() if option not in searched}
            assert args.loss == {"dino": "cls", "mean": "mean", "sum": "sum", DINO_SETTING: "mean"}.get(row, "lambda")
            assert args.lambda_cls == float(row.removeprefix("lambda") if row.startswith("lambda") else 0.5)
            sides = args.global_crops_size, args.patch_size, args.arch
    assert all(settings == found["dino"] for settings in found.values())
    untrained = study_steps(name, "untrained", 0, ROOT / "runs")[0].settings()
    assert (untrained.crop_size, untrained.patch_size, untrained.arch) == sides
    for method in ("dino", "mean"):
        assert rows[method].recipe == f"{name}_{method}"
    assert {rows[row].seeds for row in ("dino", "mean", DINO_SETTING)} == {5}
    assert set(sum(STUDIES[name].tables.values(), [])) == set(rows)


@pytest.mark.parametrize("name", reproduce.SEARCHES)
def test_recipes_are_the_best_trials_of_the_committed_search(name):
    trials = read_trials(ROOT / "recipes" / f"{name}_trials.jsonl")
    for entry in trials:
        assert entry["options"] == draw(entry["trial"])
    for method in study.SEARCHED:
        own = [entry for entry in trials if entry["method"] == method]
        assert len({entry["trial"] for entry in own}) == len(own) >= 1
        best = max(own, key=judged)
        text = (ROOT / "recipes" / f"{name}_{method}.args").read_text()
        words = [line for line in text.splitlines() if not line.startswith("#")]
        assert shlex.split(" ".join(words)) == [f"@{name}.args", *best["options"].split()]


def test_draws_cover_the_space_and_are_valid():
    drawn = [draw(trial) for trial in range(200)]
    assert drawn == [draw(trial) for trial in range(200)]
    for values in study.SPACE.values():
        counts = [sum(value in words.replace("  ", " ") + " " for words in drawn) for value in values]
        assert min(counts) > 200 / len(values) / 2
    for words in drawn[:50]:
        main_lgssl.parse_arguments(words.split())


def test_search_is_resumed_and_names_the_best(tmp_path, monkeypatch, capsys):
    started = []

    def run_steps(steps, folder):
        args = steps[0].settings()
        assert (args.tuning, args.epochs, args.seed) == (True, 5, study.SEARCH_SEED)
        assert all(step.settings().tuning for step in steps)
        started.append(folder.name)
        method, trial = folder.name.rsplit("-", 1)
        if (method, trial) == ("mean", "2"):
            raise UserError("no memory")
        score = 50 + int(trial) if method == "dino" else 60 - int(trial)
        write(steps, score, score, name="solar")

    monkeypatch.setattr(study, "run_steps", run_steps)
    path = tmp_path / "trials.jsonl"
    with pytest.raises(UserError, match="no memory"):
        study.search("solar", 3, path, tmp_path, 1, None)
    assert started == ["dino-0", "mean-0", "dino-1", "mean-1", "dino-2", "mean-2"]
    assert len(read_trials(path)) == 5
    started.clear()
    study.search("solar", 2, path, tmp_path, 1, None)
    assert started == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == f"dino: best is trial 2, 57.0 %: {draw(2)}"
    assert lines[-2] == f"mean: best is trial 0, 65.0 %: {draw(0)}"
    # Trials 0 and 1 of both are finished: 60 and 59 against 50 and 51.
    gains = [f"{column} +9.0 points (2 trials ahead, 0 behind, 0 equal)" for column in ("linear", "k-NN, K = 10")]
    assert lines[-1] == f"mean minus dino with the same setting: {'; '.join(gains)}"
    path.write_text("no JSON\n")
    with pytest.raises(UserError, match=f"cannot read the trials in {path}: "):
        study.search("solar", 2, path, tmp_path, 1, None)


def test_missing_data_is_named_before_a_run(tmp_path):
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(["run", "fashion", "--runs", str(tmp_path)])
    with pytest.raises(UserError, match=f"no {tmp_path}/fashion-mnist: expected"):
        reproduce.main(["run", "fashion", "--data_root", str(tmp_path), "--runs", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_study_runs_and_goes_on(tmp_path, run_main):
    words = ["reproduce.py", "run", "digits", "--row", "pixels", "dino-image", "--runs", tmp_path]
    output = run_main(*words, "--seeds", 1, "--jobs", 2, "--", "--epochs", 1).stdout
    rows = re.findall(r"^\| (.*?) \| 1 \|", output, re.MULTILINE)
    assert rows == ["raw pixels", "DINO, crops drawn per image"]
    (tmp_path / "digits/dino-image-0/checkpoint.pth").unlink()
    output = run_main(*words, "--seeds", 2, "--jobs", 2, "--", "--epochs", 1).stdout
    assert not (tmp_path / "digits/dino-image-0/checkpoint.pth").exists()  # its evaluations are done
    steps = study_steps("digits", "dino-image", 0, tmp_path, extra=["--epochs", 1])
    assert study.is_done(steps)
    assert not study.is_done(study_steps("digits", "dino-image", 0, tmp_path, extra=["--epochs", 2]))
    assert re.search(r"^\| raw pixels \| 2 \| 9\d\.\d ± \d\.\d \| 9\d\.\d ± 0\.0 \|", output, re.MULTILINE)
    args = json.loads((tmp_path / "digits/dino-image-1/args.json").read_text())
    assert (args["loss"], args["geometry"], args["seed"]) == ("cls", "image", 1)
    pixels = json.loads((tmp_path / "digits/pixels-1/knn_digits.json").read_text())
    assert pixels["args"]["seed"] == 1
    state = torch.load(tmp_path / "digits/dino-image-1/checkpoint.pth", weights_only=True)
    assert state["epoch"] == 1
