"""Where evaluations write their results."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import eval_knn
import extract_features
from utils import UserError
from vision_transformer import vit_micro


def save(path, seed, **contents):
    torch.manual_seed(seed)
    args = {"arch": "vit_micro", "patch_size": 8, "global_crops_size": 32}
    torch.save({"teacher": vit_micro(8, img_size=32).state_dict(), "args": args, **contents}, path)


@pytest.fixture
def run_of(tmp_path, photo_folder):
    """Return a function that evaluates a checkpoint and returns the results, {name of the file: contents}."""

    def evaluate(weights, *words, data_path=photo_folder):
        words = ["--data_path", data_path, "--pretrained_weights", weights, "--num_workers", 0, *words]
        words += [] if "--nb_knn" in words else ["--nb_knn", 3]
        eval_knn.main(list(map(str, words)))
        return {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}

    return evaluate


def test_each_evaluation_has_a_file_of_its_own(run_of, tmp_path, photo_folder, monkeypatch):
    """The first keeps the plain name; a suffix names what differs from it."""
    checkpoint, earlier = tmp_path / "checkpoint.pth", tmp_path / "checkpoint0009.pth"
    save(checkpoint, 0, epoch=20)
    save(earlier, 1, epoch=10)
    save(tmp_path / "plain.pth", 2)
    first = run_of(checkpoint)["knn_folder.json"]
    (tmp_path / "other").symlink_to(photo_folder / "train")
    (tmp_path / "copy").symlink_to(photo_folder)
    monkeypatch.chdir(photo_folder.parent)
    # The same evaluation, named differently
    assert set(run_of(checkpoint, "--batch_size_per_gpu", 2, data_path=photo_folder.name)) == {"knn_folder.json"}
    assert set(run_of(checkpoint, "--crop_size", 32, data_path=tmp_path / "copy")) == {"knn_folder.json"}
    names = {
        "knn_folder_epoch10.json": run_of(earlier),
        "knn_folder_crop_size-40.json": run_of(checkpoint, "--crop_size", 40),
        "knn_folder_nb_knn-1-2_tuning.json": run_of(checkpoint, "--nb_knn", 1, 2, "--tuning"),
        "knn_folder_data_path-train_tuning.json": run_of(checkpoint, "--tuning", data_path=tmp_path / "other"),
        "knn_folder_epochNone.json": run_of(tmp_path / "plain.pth"),
    }
    for i, (name, results) in enumerate(names.items()):
        assert name in results
        assert len(results) == 2 + i
    assert results["knn_folder.json"]["knn"] == first["knn"]
    assert results["knn_folder_epoch10.json"]["pretraining"]["epoch"] == 10
    save(checkpoint, 3, epoch=20)  # trained again
    (new,) = set(run_of(checkpoint)) - set(results)
    assert new == f"knn_folder_{run_of(checkpoint)[new]['network'][:8]}.json"
    assert len(run_of(earlier)) == 2 + len(names)


def test_the_list_of_imagenet100_is_that_of_the_weights(run_of, small_lists, tmp_path, photo_folder):
    """cmc if they were trained on ImageNet-100 by an older version, which recorded none, and kaggle for others."""
    weights, words = tmp_path / "checkpoint.pth", ("--dataset", "imagenet100")
    (tmp_path / "mine.txt").write_text("flower\nchina\n")

    def lists_of(*more, **args):
        torch.manual_seed(0)
        args = {"arch": "vit_micro", "patch_size": 8, "global_crops_size": 32, **args}
        torch.save({"teacher": vit_micro(8, img_size=32).state_dict(), "args": args}, weights)
        return {name: result["args"]["classes"] for name, result in run_of(weights, *words, *more).items()}

    assert lists_of() == lists_of(dataset="folder", classes="cmc") == {"knn_imagenet100.json": "kaggle"}
    mine = f"{tmp_path}/mine.txt"
    for classes, expected in ((str(small_lists / "cmc.txt"), "cmc"), ("kaggle", "kaggle"), (mine, mine), (None, "cmc")):
        (tmp_path / "knn_imagenet100.json").unlink()
        old = {"dataset": "imagenet100", "classes": classes}
        assert lists_of(**old) == {"knn_imagenet100.json": expected}
    (result,) = run_of(weights, *words).values()
    assert result["pretraining"]["classes"] == "cmc"
    for name in ("args", "pretraining"):  # by an older version
        result[name]["classes"] = None
    (tmp_path / "knn_imagenet100.json").write_text(json.dumps(result))
    found = lists_of("--classes", "kaggle", **old)
    assert found == {"knn_imagenet100.json": None, "knn_imagenet100_classes-kaggle.json": "kaggle"}
    assert lists_of(**old) == {**found, "knn_imagenet100.json": "cmc"}  # is the same evaluation
    features = ["--data_path", photo_folder, *words, "--pretrained_weights", weights, "--num_workers", 0, "--output"]
    extract_features.main(list(map(str, [*features, tmp_path / "f.npz"])))
    with np.load(tmp_path / "f.npz") as file:
        assert file["classes"].tolist() == ["flower", "china"]
        assert json.loads(str(file["made_with"]))["classes"] == "cmc"


def test_a_result_of_an_earlier_version_is_of_the_same_weights(run_of, tmp_path):
    save(tmp_path / "checkpoint.pth", 0)
    result = run_of(tmp_path / "checkpoint.pth")["knn_folder.json"]
    del result["fingerprint"], result["network"]
    (tmp_path / "knn_folder.json").write_text(json.dumps(result))
    assert len(run_of(tmp_path / "checkpoint.pth")) == 1
    (tmp_path / "knn_folder.json").write_text(json.dumps(result))
    assert len(run_of(tmp_path / "checkpoint.pth", "--nb_knn", 2)) == 2
    (tmp_path / "other.pth").write_bytes((tmp_path / "checkpoint.pth").read_bytes())  # of the same name there
    assert "knn_folder_other.json" in run_of(tmp_path / "other.pth")
    (tmp_path / "knn_folder.json").write_text('{"args": [1]}')  # of another program
    assert len(run_of(tmp_path / "checkpoint.pth")) == 4


def test_results_are_written_before_they_are_printed(tmp_path, photo_folder):
    save(tmp_path / "checkpoint.pth", 0)
    words = f"--data_path {photo_folder} --pretrained_weights {tmp_path}/checkpoint.pth --nb_knn 2 3 --num_workers 0"
    command = f"set -o pipefail; {sys.executable} eval_knn.py {words} | head -1"
    process = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.startswith("k-NN (K=2)")
    assert process.returncode == 0
    assert all("from folder names" in line for line in process.stderr.splitlines())  # what was found, and no error
    assert set(json.loads((tmp_path / "knn_folder.json").read_text())["knn"]) == {"2", "3"}


def test_what_cannot_be_written_is_printed(run_of, tmp_path, capsys, monkeypatch):
    save(tmp_path / "checkpoint.pth", 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)  # as for a read-only folder, which root can write to
        assert run_of(tmp_path / "checkpoint.pth") == {}
    out, err = capsys.readouterr()
    assert out.startswith("k-NN (K=3): top-1 ")
    warning = f"warning: cannot write to {tmp_path}: the result is only printed; --output_dir keeps it"
    assert err.splitlines()[0] == warning
    monkeypatch.setattr("support.evaluation.write_text", full_disk)
    with pytest.raises(UserError, match="full"):
        run_of(tmp_path / "checkpoint.pth")
    assert capsys.readouterr().out == out


def full_disk(*_):
    raise UserError("the disk is full")


def test_two_evaluations_at_once_keep_both_results(tmp_path, monkeypatch, photo_folder, run_of):
    """The first ends while the second computes."""
    save(tmp_path / "one.pth", 1, epoch=1)
    save(tmp_path / "two.pth", 2, epoch=2)
    extract, waiting = eval_knn.features_of_all, [True]

    def features_of_all(*args):
        if waiting:
            waiting.clear()
            run_of(tmp_path / "one.pth")
        return extract(*args)

    monkeypatch.setattr(eval_knn, "features_of_all", features_of_all)
    results = run_of(tmp_path / "two.pth")
    epochs = {name: result["pretraining"]["epoch"] for name, result in results.items()}
    assert epochs == {"knn_folder.json": 1, "knn_folder_epoch2.json": 2}
