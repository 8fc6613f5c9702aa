import json
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import open_dataset
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, top_k_accuracy_score
from test_images import noise_folder, write_elpv

import eval_knn
from augment import MEAN, STD
from eval_knn import knn_accuracy
from support.evaluation import classification_metrics, features_of_all, knn_votes
from support.features import eval_transform, whole_transform
from utils import UserError
from vision_transformer import vit_micro


@pytest.mark.parametrize("k", [1, 5, 10, 20, 100, 200])
def test_golden_accuracies(golden, k):
    data = golden("eval.npz")
    arrays = [torch.tensor(data[name]) for name in ("knn_train", "knn_train_labels", "knn_test", "knn_test_labels")]
    assert knn_accuracy(*arrays, k) == tuple(data["meta"]["knn_top1_top5"][str(k)])


def naive_votes(train, train_labels, test, num_classes, k, temperature=0.07):
    votes = np.zeros((len(test), num_classes))
    for row, feature in zip(votes, test.astype(float), strict=True):
        similarity = train @ feature
        for i in sorted(range(len(train)), key=lambda i: -similarity[i])[:k]:
            row[train_labels[i]] += math.exp(similarity[i] / temperature)
    return votes / votes.sum(1, keepdims=True)


def naive_metrics(scores, labels):
    """Return the metrics in percent: the first of equal classes comes first, and a score of 0 is no hit."""
    hits = {1: [], 5: []}
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        ranked = [c for c in sorted(range(len(row)), key=lambda c: -row[c]) if row[c] > 0]
        for k, hits_of_k in hits.items():
            hits_of_k.append(label in ranked[:k])
    recalls = [np.mean([hit for hit, y in zip(hits[1], labels, strict=True) if y == c]) for c in set(labels.tolist())]
    metrics = {"top1": np.mean(hits[1]), "top5": np.mean(hits[5]), "balanced_accuracy": np.mean(recalls)}
    if scores.shape[1] <= 5:
        del metrics["top5"]
    if scores.shape[1] == 2:
        pairs = [(a, b) for a in scores[labels == 1, 1] for b in scores[labels == 0, 1]]
        metrics["auroc"] = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])
    return {name: 100 * value for name, value in metrics.items()}


def naive_knn(train, train_labels, test, test_labels, num_classes, k):
    return naive_metrics(naive_votes(train, train_labels, test, num_classes, k), test_labels)


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 12])
def test_metrics_are_those_of_naive_formulas_and_scikit_learn(classes):
    rng = np.random.default_rng(0)
    labels = np.append(np.arange(classes), rng.integers(0, classes, 70) ** 2 // classes)  # unbalanced
    ties, no_ties = rng.integers(0, 4, (len(labels), classes)) / 4, rng.random((len(labels), classes))
    ties[:3] = 0
    for scores in (ties, ties + 0.1, no_ties):
        metrics = classification_metrics(torch.tensor(scores), torch.tensor(labels))
        assert metrics == pytest.approx(naive_metrics(scores, labels))
    assert metrics["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(labels, no_ties.argmax(1)))
    if classes > 5:
        assert metrics["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, no_ties, k=5))
    if classes == 2:
        assert metrics["auroc"] == pytest.approx(100 * roc_auc_score(labels, no_ties[:, 1]))


def test_metrics_that_cannot_be_are_absent():
    scores = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A single class occurs, and is one of three: the mean recall is its own.
        third = 100 / 3
        assert classification_metrics(scores, torch.tensor([0, 0, 0])) == pytest.approx(
            {"top1": third, "balanced_accuracy": third}
        )
        # The scores of a classifier that diverged
        diverged = classification_metrics(scores * math.nan, torch.tensor([0, 1, 1]))
    assert diverged == {"top1": 0, "balanced_accuracy": 0}


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


def test_votes_are_those_of_a_naive_formula():
    arrays = noisy_classes(8, 1.0, seed=0)
    train, labels, test, _ = map(torch.tensor, arrays)
    for k, temperature in ((20, 0.07), (300, 1.0), (1, 0.01)):
        votes = knn_votes(train, labels, test, 9, k, temperature)
        assert votes.numpy() == pytest.approx(naive_votes(*arrays[:3], 9, k, temperature))


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


@pytest.fixture
def checkpoint(tmp_path):
    """Return (path of a checkpoint, its network), trained with crops of 32 pixels."""
    torch.manual_seed(0)
    network = vit_micro(8, img_size=32).eval()
    torch.save(
        {"teacher": {f"backbone.{k}": v for k, v in network.state_dict().items()},
         "args": {"arch": "vit_micro", "patch_size": 8, "global_crops_size": 32}},
        tmp_path / "checkpoint.pth",
    )  # fmt: skip
    return tmp_path / "checkpoint.pth", network


def features_and_labels(network, *source, tokens=slice(1), **options):
    """Return train features, train labels, val features, val labels. Features are means of `tokens`, by default CLS."""
    arrays = []
    for split in ("train", "val"):
        dataset = open_dataset(*source, split=split, transform=eval_transform(32), **options)
        with torch.no_grad():
            features = torch.cat([F.normalize(network(image[None])[:, tokens].mean(1)) for image, _ in dataset])
        arrays += [features.numpy(), np.array(dataset.labels)]
    return arrays


def test_result_beside_the_checkpoint(photo_folder, checkpoint, capsys):
    weights, network = checkpoint
    eval_knn.main(f"--data_path {photo_folder} --pretrained_weights {weights} --nb_knn 3 5 --num_workers 0".split())
    result = json.loads((weights.parent / "knn_folder.json").read_text())
    assert (result["images"], result["crop_size"]) == ({"train": 12, "val": 6}, 32)
    arrays = features_and_labels(network, "folder", photo_folder)
    output = capsys.readouterr().out
    for k in (3, 5):
        expected = naive_knn(*arrays, 2, k)
        assert result["knn"][str(k)] == pytest.approx(expected)
        assert f"k-NN (K={k}): top-1 {expected['top1']:.2f} %" in output


def test_mean_of_patches(photo_folder, checkpoint):
    """The results of both features stay, and a result from before --features is one of CLS."""
    weights, network = checkpoint
    words = f"--data_path {photo_folder} --pretrained_weights {weights} --nb_knn 3 --num_workers 0".split()
    of_cls, of_patches = (weights.parent / f"knn_{name}folder.json" for name in ("", "patches_mean_"))
    eval_knn.main(words)
    older = json.loads(of_cls.read_text())
    assert older["args"].pop("features") == "cls"
    of_cls.write_text(json.dumps(older))
    for features in ("patches_mean", "cls"):
        eval_knn.main([*words, "--features", features])
    assert {*weights.parent.glob("*.json")} == {of_cls, of_patches}
    results = [json.loads(path.read_text()) for path in (of_cls, of_patches)]
    assert [result["args"]["features"] for result in results] == ["cls", "patches_mean"]
    for result, tokens in zip(results, (slice(1), slice(1, None)), strict=True):
        arrays = features_and_labels(network, "folder", photo_folder, tokens=tokens)
        assert result["knn"]["3"] == pytest.approx(naive_knn(*arrays, 2, 3))


def test_solar_cells(checkpoint, tmp_path, monkeypatch, capsys):
    """Two classes have balanced accuracy and AUROC, but no top-5 accuracy."""
    monkeypatch.syspath_prepend(tmp_path / "packages")
    write_elpv(tmp_path / "packages", 84)
    weights, network = checkpoint
    eval_knn.main(f"--dataset elpv --pretrained_weights {weights} --nb_knn 5 --num_workers 0".split())
    output = capsys.readouterr().out
    number = r"(\d+\.\d\d) %"
    line = re.search(rf"^k-NN \(K=5\): top-1 {number}, balanced accuracy {number}, AUROC {number}$", output, re.M)
    result = json.loads((tmp_path / "knn_elpv.json").read_text())["knn"]["5"]
    expected = naive_knn(*features_and_labels(network, "elpv"), 2, 5)
    assert result == pytest.approx(expected)
    assert [float(value) for value in line.groups()] == pytest.approx(list(expected.values()), abs=0.006)
    assert expected["auroc"] > 60


def test_raw_pixels(tmp_path, monkeypatch, capsys):
    """The linear evaluation's tests check the pixels; here: the mean is subtracted, and no file is written."""
    noise_folder(tmp_path / "data", [("train", 20), ("val", 15)])
    monkeypatch.chdir(tmp_path)
    eval_knn.main("--data_path data --pretrained_weights pixels --crop_size 8 --num_workers 0".split())
    arrays = []
    for split in ("train", "val"):
        paths = sorted((tmp_path / "data" / split).rglob("*.png"))
        pixels = np.stack([np.asarray(Image.open(path)) for path in paths]) / 255 / STD
        arrays += [pixels.reshape(len(paths), -1), np.array([path.parent.name == "y" for path in paths]).astype(int)]
    mean = arrays[0].mean(0)
    for i in (0, 2):
        arrays[i] = (arrays[i] - mean) / np.linalg.norm(arrays[i] - mean, axis=1, keepdims=True)
    top1 = naive_knn(*arrays, 2, 10)["top1"]
    output = capsys.readouterr().out
    assert f"k-NN (K=10): top-1 {top1:.2f} %" in output
    assert "written to" not in output


def test_whole_transform_does_not_crop(photographs):
    square = photographs[0].resize((40, 40))
    pixels = (np.asarray(square).transpose(2, 0, 1) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    assert whole_transform(40)(square).numpy() == pytest.approx(pixels, abs=1e-5)
    assert np.abs(eval_transform(40)(square).numpy() - pixels).mean() > 0.1
    assert whole_transform(40)(photographs[0]).shape == (3, 40, 40)


def test_bad_input_is_named(photo_folder, tmp_path, capsys):
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
    with pytest.raises(SystemExit, match="2"):
        eval_knn.main("--data_path D --pretrained_weights pixels --features patches_mean".split())
    assert "--features patches_mean needs patch tokens" in capsys.readouterr().err


@pytest.mark.parametrize(("images", "used", "left_out"), [(11, 10, "20"), (5, 5, "10 and 20")])
def test_defaults_that_do_not_fit_are_left_out(tmp_path, capsys, images, used, left_out):
    noise_folder(tmp_path, [("train", 6), ("val", 2)])
    words = f"--data_path {tmp_path} --train_images {images} --pretrained_weights pixels --num_workers 0"
    eval_knn.main([*words.split(), "--output_dir", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out/knn_folder.json").read_text())
    assert (list(result["knn"]), result["args"]["nb_knn"]) == ([str(used)], [10, 20])
    warning = f"{images} training images are too few for K = {left_out}: using K = {used}, see --nb_knn\n"
    assert warning in capsys.readouterr().err
    with pytest.raises(UserError, match=f"--nb_knn 20 is more than the {images} training images"):
        eval_knn.main([*words.split(), "--nb_knn", "10", "20"])


@pytest.mark.parametrize(("words", "expected"), [([], "meta"), (["--use_cuda", "0"], "cpu")])
def test_neighbours_are_searched_where_use_cuda_says(monkeypatch, words, expected):
    """The meta device stands in for a GPU."""

    def knn_votes(*arrays):
        raise RuntimeError({array.device.type for array in arrays if torch.is_tensor(array)})

    def features_of_all(network, datasets, *_):
        return {split: torch.zeros(len(dataset), 3) for split, dataset in datasets.items()}

    monkeypatch.setattr(eval_knn, "knn_votes", knn_votes)
    monkeypatch.setattr(eval_knn, "features_of_all", features_of_all)
    monkeypatch.setattr(eval_knn, "init_distributed", lambda _: (0, 1, torch.device("meta")))
    with pytest.raises(RuntimeError, match=str({expected})):
        eval_knn.main(["--dataset", "digits", "--pretrained_weights", "none", "--arch", "vit_micro", *words])


def test_the_process_group_is_left_by_the_command_alone(photo_folder, tmp_path, capsys):
    """Rank 0 must not keep others waiting; who calls `features_of_all` keeps its processes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dataset = open_dataset("folder", photo_folder, transform=eval_transform(8))
    features = features_of_all(lambda x: x.mean((2, 3)), {"train": dataset}, torch.device("cpu"), 5, 0)
    assert features["train"].shape == (12, 3)
    assert dist.is_initialized()
    options = f"--data_path {photo_folder} --pretrained_weights none --arch vit_micro --nb_knn 1 --num_workers 0"
    eval_knn.main([*options.split(), "--crop_size", "16"])
    assert not dist.is_initialized()
    assert "k-NN (K=1): top-1" in capsys.readouterr().out
