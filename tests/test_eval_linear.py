import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import open_dataset
from PIL import Image
from test_images import noise_folder
from torch.utils.data import DataLoader

import eval_linear
from augment import MEAN, STD
from eval_linear import AugmentedBatches, linear_features, new_classifier, train_one_epoch, validate
from support.features import eval_transform, whole_transform
from support.loader import BatchSampler
from utils import UserError
from vision_transformer import vit_micro

OPTIONS = "--epochs 3 --batch_size_per_gpu 5 --lr 5 --num_workers 0".split()


@pytest.fixture
def weights(tmp_path):
    """Return a checkpoint of a random network."""
    torch.manual_seed(1)
    network = vit_micro(8, img_size=32)
    args = {"arch": "vit_micro", "patch_size": 8, "global_crops_size": 32, "flip_prob": 0.0}
    torch.save({"teacher": network.state_dict(), "args": args, "epoch": 7}, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


def run(weights, folder, *words):
    eval_linear.main([*OPTIONS, "--data_path", str(folder), "--pretrained_weights", str(weights), *map(str, words)])
    file = weights.parent / "linear_folder.json"
    return json.loads(file.read_text()) if file.exists() else None


def test_features_are_dinos():
    network = vit_micro(8, img_size=32).eval()
    images = torch.randn(2, 3, 32, 40)
    blocks = []
    hooks = [block.register_forward_hook(lambda *a: blocks.append(network.norm(a[2]))) for block in network.blocks]
    with torch.no_grad():
        network(images)
        for hook in hooks:
            hook.remove()
        four, one = linear_features(network, 4, False, images), linear_features(network, 1, True, images)
        mean = blocks[-1][:, 1:].mean(1)
        # With patch tokens: (cls_0, mean_0, cls_1, mean_1, ...), what unsqueeze(-1), cat(-1), reshape give in DINO
        expected = torch.cat([blocks[-1][:, 0].unsqueeze(-1), mean.unsqueeze(-1)], -1).reshape(2, -1)
        torch.testing.assert_close(four, torch.cat([block[:, 0] for block in blocks], 1))
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("scale", [1, 300])
def test_validation_ranks_the_logits(scale):
    """At the larger scale, probabilities of confident predictions tie at 1 in single precision."""
    torch.manual_seed(0)
    features, labels = scale * torch.randn(400, 4), torch.randint(0, 8, (400,))
    classifier = new_classifier(4, 8, 0)
    logits = classifier(features).tolist()
    ranks = [sorted(range(8), key=lambda c: -row[c]).index(y) for row, y in zip(logits, labels.tolist(), strict=True)]
    expected = {f"top{k}": 100 * sum(rank < k for rank in ranks) / 400 for k in (1, 5)}
    recalls = [np.mean([r < 1 for r, y in zip(ranks, labels, strict=True) if y == c]) for c in labels.unique()]
    expected["balanced_accuracy"] = 100 * np.mean(recalls)
    assert validate(classifier, features, labels) == pytest.approx(expected)


def test_augmentation_depends_on_seed_epoch_and_image_alone(photo_folder):
    dataset = open_dataset("folder", photo_folder)
    batches = AugmentedBatches(dataset, 32, 0.5, seed=3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    images, labels = batches[(2, 9, [4, 7, 1])]
    assert torch.equal(torch.get_rng_state(), state)
    assert labels.tolist() == [dataset.labels[i] for i in (4, 7, 1)]
    assert images.shape == (3, 3, 32, 32)
    assert torch.equal(batches[(2, 0, [1])][0][0], images[2])
    assert not torch.equal(batches[(3, 0, [1])][0][0], images[2])
    assert len(batches[(2, 0, [])][0]) == 0
    sampler = BatchSampler(len(dataset), 5, range(3), drop_last=False)
    never, always = (AugmentedBatches(dataset, 32, p, seed=3)[(0, 0, [4, 7])][0] for p in (0.0, 1.0))
    torch.testing.assert_close(never.flip(-1), always, rtol=0, atol=0.05)
    loaded = list(DataLoader(batches, sampler=sampler, batch_size=None, num_workers=2))
    assert [len(labels) for _, labels in loaded] == [5, 5, 2]


def test_result_has_the_best_epoch_and_all_settings(photo_folder, weights, capsys):
    result = run(weights, photo_folder)
    assert [entry["epoch"] for entry in result["history"]] == [1, 2, 3]
    best = max(result["history"], key=lambda entry: entry["top1"])
    assert (result["top1"], result["epoch"]) == (best["top1"], best["epoch"])
    assert result["training_images"] == "augmented"
    assert (result["pretraining"]["arch"], result["pretraining"]["epoch"]) == ("vit_micro", 7)
    protocol = {"n_last_blocks": 4, "avgpool_patchtokens": False, "flip_prob": 0.0, "num_labels": 2}
    assert result["protocol"] == protocol
    names = {"top1": "top-1", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}
    metrics = ", ".join(f"{text} {best[name]:.2f} %" for name, text in names.items())
    assert {name: result[name] for name in names} == {name: best[name] for name in names}
    assert "top5" not in result
    assert f"linear: {metrics} (best of 3 epochs: number {best['epoch']})\n" in capsys.readouterr().out

    run(weights, photo_folder, "--evaluate")
    assert f"linear: {metrics}\n" in capsys.readouterr().out
    # the same weights as DINO writes them
    state = torch.load(weights.parent / "linear_folder.pth", weights_only=True)
    linear = {f"module.linear.{name}": value for name, value in state["validations"]["best_classifier"].items()}
    torch.save({"state_dict": linear}, weights.parent / "dino.pth")
    run(weights, photo_folder, "--evaluate", weights.parent / "dino.pth")
    assert f"linear: {metrics}\n" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--cache_features"]])
def test_a_stopped_run_goes_on_as_if_it_had_not(photo_folder, weights, monkeypatch, more):
    whole = run(weights, photo_folder, *more)
    (weights.parent / "linear_folder.json").unlink()
    (weights.parent / "linear_folder.pth").unlink()

    calls = []

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_one_epoch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(eval_linear, "train_one_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            run(weights, photo_folder, *more)
    parts = run(weights, photo_folder, *more)
    assert parts == whole


def test_a_file_of_an_earlier_version_resumes(photo_folder, weights, tmp_path):
    """Version 0.9.0 recorded the protocol among the arguments, and less besides."""
    whole = run(weights, photo_folder, "--cache_features")
    state = torch.load(tmp_path / "linear_folder.pth", weights_only=True)
    state["args"] |= {**state.pop("protocol"), "lr": 5.0}
    for name in ("network", "images", "crop_size", "pretraining", "training_images"):
        del state[name]
    torch.save(state, tmp_path / "linear_folder.pth")
    (tmp_path / "linear_folder.json").unlink()
    assert run(weights, photo_folder, "--cache_features")["history"] == whole["history"]
    assert len(list(tmp_path.glob("linear_*"))) == 2


def test_another_setting_neither_resumes_nor_overwrites(photo_folder, weights, tmp_path):
    """Also while the first run has weights, but no result yet."""
    first = run(weights, photo_folder, "--cache_features")
    before = (tmp_path / "linear_folder.pth").read_bytes()
    (tmp_path / "linear_folder.json").unlink()
    assert run(weights, photo_folder, "--cache_features", "--lr", 4) is None
    assert run(weights, photo_folder, "--cache_features", "--batch_size_per_gpu", 6) is None
    assert (tmp_path / "linear_folder.pth").read_bytes() == before
    other = json.loads((tmp_path / "linear_folder_lr-4.0.json").read_text())
    assert (other["args"]["lr"], len(other["history"])) == (4, 3)
    assert (tmp_path / "linear_folder_batch_size-6.json").exists()
    assert run(weights, photo_folder, "--cache_features", "--num_workers", 1)["history"] == first["history"]


def test_cached_features_are_those_of_unaugmented_images(photo_folder, weights):
    result = run(weights, photo_folder, "--cache_features")
    assert result["training_images"] == "not augmented, features cached"
    network = vit_micro(8, img_size=32).eval()
    network.load_state_dict(torch.load(weights, weights_only=True)["teacher"])
    features, labels = {}, {}
    for split in ("train", "val"):
        dataset = open_dataset("folder", photo_folder, split, eval_transform(32))
        with torch.no_grad():
            features[split] = torch.cat([linear_features(network, 4, False, image[None]) for image, _ in dataset])
        labels[split] = torch.tensor(dataset.labels)
    assert_trained_on(result["history"], features, labels)


def assert_trained_on(history, features, labels):
    """Repeat a run of OPTIONS on features and labels by split: DINO's SGD, the last batch of an epoch incomplete."""
    dim, total = features["train"].shape[1], len(features["train"])
    classifier = new_classifier(dim, 2, 0)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: 5 * 5 / 256 * (1 + math.cos(math.pi * e / 3)) / 2)
    for epoch in range(3):
        samples = torch.tensor(np.random.default_rng((0, epoch)).permutation(total))
        losses = []
        for indices in samples.split(5):
            loss = torch.nn.functional.cross_entropy(classifier(features["train"][indices]), labels["train"][indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(indices)
        schedule.step()
        entry = history[epoch]
        assert entry["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        top1 = 100 * (classifier(features["val"]).argmax(1) == labels["val"]).float().mean()
        assert entry["top1"] == pytest.approx(float(top1))


def raw_pixels(root, side):
    """Return {split: pixels minus the mean training image} and {split: labels} of square images with this side."""
    pixels, labels = {}, {}
    for split in ("train", "val"):
        paths = sorted((root / split).rglob("*.png"))
        images = (np.stack([np.asarray(Image.open(path)) for path in paths]) / 255 - MEAN) / STD
        pixels[split] = torch.tensor(images, dtype=torch.float32).permute(0, 3, 1, 2).flatten(1)
        labels[split] = torch.tensor([int(path.parent.name == "y") for path in paths])
    mean = pixels["train"].mean(0)
    return {split: images - mean for split, images in pixels.items()}, labels


def linear_of_pixels(root, output, *more):
    words = [*OPTIONS, "--data_path", root, "--pretrained_weights", "pixels", "--crop_size", 8, *more]
    eval_linear.main([*map(str, words), "--output_dir", str(output)])
    return json.loads((output / "linear_folder.json").read_text())


def test_raw_pixels_are_trained_on(tmp_path, monkeypatch):
    root = noise_folder(tmp_path / "data", [("train", 7), ("val", 15)])
    result = linear_of_pixels(root, tmp_path / "cached", "--cache_features")
    features, labels = raw_pixels(root, 8)
    assert_trained_on(result["history"], features, labels)
    assert result["protocol"]["n_last_blocks"] == 1

    # Without the cache the same, if the augmentation is none.
    def plain(*args):
        batches = AugmentedBatches(*args)
        batches.transform = whole_transform(8)
        return batches

    monkeypatch.setattr(eval_linear, "AugmentedBatches", plain)
    result = linear_of_pixels(root, tmp_path / "augmented")
    assert result["training_images"] == "augmented"
    assert_trained_on(result["history"], features, labels)
    monkeypatch.undo()
    augmented = linear_of_pixels(root, tmp_path / "really")
    assert augmented["history"][0]["loss"] != result["history"][0]["loss"]


def test_raw_pixels_have_no_patches_and_one_block(tmp_path):
    root = noise_folder(tmp_path / "data")
    with pytest.raises(UserError, match="--avgpool_patchtokens true needs a network"):
        linear_of_pixels(root, tmp_path, "--avgpool_patchtokens", "true")
    # As many numbers as ViT-B's width, which changes no default
    assert linear_of_pixels(root, tmp_path, "--crop_size", 16, "--epochs", 1)["protocol"]["n_last_blocks"] == 1


def test_a_diverged_classifier_ends_the_run(photo_folder, weights, monkeypatch):
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda logits, *_, **__: logits.sum() * math.inf)
    with pytest.raises(UserError, match="the loss of the linear classifier is (nan|-?inf) in epoch 1: use a smaller"):
        run(weights, photo_folder, "--cache_features")


def test_bad_input_is_named(photo_folder, weights, tmp_path):
    def message(*words):
        with pytest.raises(UserError) as error:
            run(weights, photo_folder, *words)
        return str(error.value)

    assert "--evaluate found no linear weights at" in message("--evaluate")
    assert "--n_last_blocks 5 is more than the network's 4" in message("--n_last_blocks", 5)
    assert "--num_labels 1 is fewer than the 2 classes" in message("--num_labels", 1)
    assert "expected --arch vit_micro --patch_size 8" in message("--patch_size", 16)
    run(weights, photo_folder)
    no_classifier = "holds no linear classifier with a bias and a weight of (2, 96), found"
    assert f"{no_classifier} (2, 384)" in message("--n_last_blocks", 1, "--evaluate")
    assert f"{no_classifier} None" in message("--n_last_blocks", 1, "--evaluate", weights)


def test_vit_base_has_its_own_features():
    def protocol(dim, *words, **made_with):
        args = eval_linear.parse_arguments(["--pretrained_weights", "none", *words])
        backbone = SimpleNamespace(embed_dim=dim, blocks=range(12))
        return eval_linear.protocol_of(args, backbone, made_with, 10)

    assert protocol(192) == protocol(384) == (4, False, 0.5, 10)
    assert protocol(768) == (1, True, 0.5, 10)
    assert protocol(768, "--avgpool_patchtokens", "false", "--n_last_blocks", "2") == (2, False, 0.5, 10)
    assert protocol(192, flip_prob=0.0) == (4, False, 0.0, 10)
    assert protocol(192, "--flip_prob", "1", "--num_labels", "12", flip_prob=0.0) == (4, False, 1.0, 12)
