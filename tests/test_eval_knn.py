import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval_knn
from eval_knn import knn_accuracy
from support.features import eval_transform
from support.images import build_dataset
from utils import UserError
from vision_transformer import vit_micro


@pytest.mark.parametrize("k", [1, 5, 10, 20, 100, 200])
def test_golden_accuracies(golden, k):
    data = golden("eval.npz")
    arrays = [torch.tensor(data[name]) for name in ("knn_train", "knn_train_labels", "knn_test", "knn_test_labels")]
    assert knn_accuracy(*arrays, k) == tuple(data["meta"]["knn_top1_top5"][str(k)])


def naive_knn(train, train_labels, test, test_labels, k, temperature):
    hits = np.zeros(2)
    for feature, label in zip(test, test_labels, strict=True):
        similarity = train @ feature
        votes = {}
        for i in sorted(range(len(train)), key=lambda i: -similarity[i])[:k]:
            votes[train_labels[i]] = votes.get(train_labels[i], 0) + math.exp(similarity[i] / temperature)
        ranked = sorted(votes, key=lambda c: -votes[c])
        hits += label in ranked[:1], label in ranked[:5]
    return tuple(100 * hits / len(test))


def test_agrees_with_the_naive_protocol_in_chunks_and_for_few_images(monkeypatch):
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(8, 6))
    labels = rng.integers(0, 8, 90)
    features = centers[labels] + rng.normal(size=(90, 6))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    test, test_labels = features[60:83], labels[60:83]  # 23 images, fewer than DINO's 100 chunks
    expected = naive_knn(features[:60], labels[:60], test, test_labels, 20, 0.07)
    arrays = [torch.tensor(a) for a in (features[:60], labels[:60], test, test_labels)]
    assert knn_accuracy(*arrays, 20) == pytest.approx(expected)
    with pytest.raises(ValueError, match="k is 61, expected 1 to 60"):
        knn_accuracy(*arrays, 61)


def dinos_knn(train, train_labels, test, test_labels, k, temperature=0.07, columns=1000):
    """Return (top1, top5) by DINO's protocol: votes in 1,000 columns; the first min(5, k) after sorting count.

    The order of columns that tie at 0 is unspecified in PyTorch's sort. Here the classes of the data set are the last
    columns and the sort is stable: the classes that the data set lacks come before its classes without votes.
    """
    first = columns - 1 - max(train_labels.max(), test_labels.max())
    hits = np.zeros(2)
    for feature, label in zip(test, test_labels, strict=True):
        similarity = train @ feature
        votes = np.zeros(columns)
        for i in np.argsort(-similarity, kind="stable")[:k]:
            votes[first + train_labels[i]] += math.exp(similarity[i] / temperature)
        predictions = np.argsort(-votes, kind="stable")
        hits += first + label == predictions[0], first + label in predictions[: min(5, k)]
    return tuple(100 * hits / len(test))


def noisy_classes(classes, noise, seed, train=300, test=100):
    """Return unit features around a center per class, and labels: train, train_labels, test, test_labels."""
    rng = np.random.default_rng(seed)
    centers, labels = rng.normal(size=(classes, 16)), rng.integers(0, classes, train + test)
    features = centers[labels] + noise * rng.normal(size=(train + test, 16))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features[:train], labels[:train], features[train:], labels[train:]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("k", [3, 10, 20])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_agrees_with_dinos_thousand_columns(classes, k, seed):
    arrays = noisy_classes(classes, 2.0, seed)
    assert knn_accuracy(*map(torch.tensor, arrays), k) == pytest.approx(dinos_knn(*arrays, k))


def test_classes_without_votes_do_not_fill_up_the_top_5():
    """With five classes, a ranking of all classes would have a top-5 accuracy of 100 %."""
    arrays = noisy_classes(5, 2.0, seed=0)
    top1, top5 = knn_accuracy(*map(torch.tensor, arrays), 5)
    assert (top1, top5) == pytest.approx(dinos_knn(*arrays, 5))
    assert top1 < top5 < 95
    train, labels = torch.eye(6), torch.arange(6)  # the neighbours of each feature: itself, then five that tie
    assert knn_accuracy(train, labels, train[:1], labels[:1], 6) == (100, 100)
    assert knn_accuracy(train, labels, train[:1], torch.tensor([6]), 6) == (0, 0)


def test_result_beside_the_checkpoint(photo_folder, tmp_path, capsys):
    network = vit_micro(8, img_size=32).eval()
    torch.save(
        {"teacher": {f"backbone.{k}": v for k, v in network.state_dict().items()},
         "args": {"arch": "vit_micro", "patch_size": 8, "global_crops_size": 32}},
        tmp_path / "checkpoint.pth",
    )  # fmt: skip
    weights = tmp_path / "checkpoint.pth"
    eval_knn.main(f"--data_path {photo_folder} --pretrained_weights {weights} --nb_knn 3 5 --num_workers 0".split())
    result = json.loads((tmp_path / "knn_folder.json").read_text())
    assert (result["images"], result["crop_size"]) == ({"train": 12, "val": 6}, 32)
    arrays = []
    for split in ("train", "val"):
        dataset = build_dataset("folder", photo_folder, split, eval_transform(32))
        with torch.no_grad():
            features = torch.cat([F.normalize(network(image[None])[:, 0]) for image, _ in dataset])
        arrays += [features.numpy(), np.array(dataset.labels)]
    output = capsys.readouterr().out
    for k in (3, 5):
        top1, _ = naive_knn(*arrays, k, 0.07)
        assert result["knn"][str(k)]["top1"] == pytest.approx(top1)
        assert f"k-NN (K={k}): top-1 {top1:.2f} %" in output


def test_bad_input_is_named(photo_folder, tmp_path):
    def message(*words):
        with pytest.raises(UserError) as error:
            eval_knn.main([*map(str, words), "--pretrained_weights", "none", "--arch", "vit_micro"])
        return str(error.value)

    assert "more than the 12 training images" in message("--data_path", photo_folder, "--nb_knn", 20)
    assert "has no subfolders train and val" in message("--data_path", photo_folder / "train")
    for name in ("flat/train", "flat/val", "train/a", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name / "i.png")
    assert "have no labels, expected" in message("--data_path", tmp_path / "flat")
    assert "differ, 1 only in val (b): expected" in message("--data_path", tmp_path)
    (tmp_path / "file").touch()
    assert "cannot write to --output_dir" in message(
        "--data_path", photo_folder, "--nb_knn", 1, "--output_dir", tmp_path / "file"
    )
    assert "smaller than a patch of 16" in message("--data_path", photo_folder, "--crop_size", 8)


@pytest.mark.parametrize(("words", "expected"), [([], "meta"), (["--use_cuda", "0"], "cpu")])
def test_neighbours_are_searched_where_use_cuda_says(photo_folder, tmp_path, monkeypatch, words, expected):
    """The meta device simulates a GPU."""
    devices = []

    def knn_accuracy(*arrays):
        devices.extend(str(array.device) for array in arrays[:4])
        return 0.0, 0.0

    def features_of_all(network, datasets, *_):
        return {split: torch.zeros(len(dataset), 3) for split, dataset in datasets.items()}

    monkeypatch.setattr(eval_knn, "knn_accuracy", knn_accuracy)
    monkeypatch.setattr(eval_knn.evaluation, "features_of_all", features_of_all)
    monkeypatch.setattr(eval_knn.utils, "init_distributed", lambda _: (0, 1, torch.device("meta")))
    options = (
        f"--data_path {photo_folder} --pretrained_weights none --arch vit_micro --output_dir {tmp_path} --nb_knn 5"
    )
    eval_knn.main([*options.split(), *words])
    assert devices == [expected] * 4


@pytest.mark.parametrize("option", ["--dump_features", "--load_features"])
def test_files_of_features_are_refused(capsys, option):
    with pytest.raises(SystemExit, match="2"):
        eval_knn.main(["--pretrained_weights", "none", option, "folder"])
    message = "not supported; extract_features.py writes features to a file\n"
    assert capsys.readouterr().err.endswith(f"--dump_features/--load_features: {message}")
