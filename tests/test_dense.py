"""Segmentation by patch tokens, against loops over pixels, patches and neighbours in double precision."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from support import dense
from support.dense import VOC_CLASSES, AnnotatedImages, PatchColors, open_annotated, patch_tokens
from support.features import whole_transform
from utils import UserError

CPU = torch.device("cpu")


def random_masks(*shape, classes=4, ignored=0.2, seed=0):
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, classes, shape)
    return np.where(rng.random(shape) < ignored, 255, masks)


def naive_shares(mask, grid, classes):
    height, width = (length // n for length, n in zip(mask.shape, grid, strict=True))
    shares = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            patch = mask[row * height : (row + 1) * height, column * width : (column + 1) * width]
            shares.append([np.mean(patch == label) for label in range(classes)])
    return np.array(shares)


def naive_knn(memory, shares, queries, k, temperature):
    scores = []
    for query in queries:
        cosines = [sum(a * b for a, b in zip(query, other, strict=True)) for other in memory]
        nearest = sorted(range(len(memory)), key=lambda i: -cosines[i])[:k]
        weights = [np.exp(cosines[i] / temperature) for i in nearest]
        scores.append(sum(w * shares[i] for w, i in zip(weights, nearest, strict=True)) / sum(weights))
    return np.array(scores)


def bilinear(length, size):
    """Return the matrix [size, length] of linear interpolation between the centers of cells."""
    weights = np.zeros((size, length))
    for i in range(size):
        place = min(max((i + 0.5) * length / size - 0.5, 0), length - 1)
        low = int(place)
        weights[i, low] += 1 - (place - low)
        weights[i, min(low + 1, length - 1)] += place - low
    return weights


def test_shares_of_patches():
    masks = random_masks(3, 12, 20)
    masks[1, :4, :5] = 255
    shares = dense.patch_shares(torch.tensor(masks), (3, 4), 4)
    assert shares.numpy() == pytest.approx(np.stack([naive_shares(mask, (3, 4), 4) for mask in masks]), abs=1e-6)
    assert shares[1, 0].sum() == 0


@pytest.mark.parametrize("similarities", [2**26, 90])  # all at once, and two queries at a time
def test_neighbours_vote_with_their_shares(monkeypatch, similarities):
    monkeypatch.setattr(dense, "SIMILARITIES", similarities)
    rng = np.random.default_rng(0)
    memory, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rng.normal(size=(n, 5)) for n in (40, 7)))
    shares = rng.random((40, 3))
    found = dense.knn_segment(*map(torch.tensor, (memory, shares, queries)), k=6, temperature=0.1)
    assert found.numpy() == pytest.approx(naive_knn(memory, shares, queries, 6, 0.1), abs=1e-6)
    of_few = dense.knn_segment(*map(torch.tensor, (memory[:4], shares[:4], queries)), k=6, temperature=0.1)
    assert of_few.numpy() == pytest.approx(naive_knn(memory[:4], shares[:4], queries, 4, 0.1), abs=1e-6)


def test_scores_are_interpolated_bilinearly():
    scores = np.random.default_rng(0).random((9, 6, 3))  # 9 images: more than are computed at a time
    maps = np.einsum("ih,nhwc,jw->ncij", bilinear(2, 7), scores.reshape(9, 2, 3, 3), bilinear(3, 7))
    assert dense.interpolated(torch.tensor(scores), (2, 3), 7).numpy() == pytest.approx(maps, abs=1e-6)
    assert (dense.upsample(torch.tensor(scores), (2, 3), 7).numpy() == maps.argmax(1)).all()


def test_mean_iou_of_sets_of_pixels():
    """Class 1 occurs only in the target, 2 only in the prediction, and 4 nowhere."""
    target = random_masks(2, 9, 8, classes=2)
    prediction = np.where(random_masks(2, 9, 8, classes=2, ignored=0, seed=1), 2, 0)
    prediction[target == 255] = 3  # which does not count
    found = dense.mean_iou(torch.tensor(prediction), torch.tensor(target), 5)
    pixels = [i for i in np.ndindex(target.shape) if target[i] != 255]
    sets = [[{i for i in pixels if array[i] == label} for label in range(5)] for array in (prediction, target)]
    ious = [len(a & b) / len(a | b) if a | b else None for a, b in zip(*sets, strict=True)]
    known = [iou for iou in ious if iou is not None]
    assert len(known) == 3
    assert found == pytest.approx(np.mean(known), abs=1e-6)
    kept = target != 255
    assert found == pytest.approx(jaccard_score(target[kept], prediction[kept], average="macro"), abs=1e-6)
    confusion = dense.confusion_matrix(torch.tensor(prediction), torch.tensor(target), 5)
    metrics = dense.segmentation_metrics(confusion, list("abcde"))
    assert metrics["iou"] == {c: None if iou is None else 100 * iou for c, iou in zip("abcde", ious, strict=True)}
    assert metrics["miou"] == pytest.approx(100 * found, abs=1e-9)
    assert metrics["miou_objects"] == pytest.approx(100 * np.mean(known[1:]), abs=1e-6)
    assert metrics["pixel_accuracy"] == pytest.approx(100 * np.mean(target[kept] == prediction[kept]), abs=1e-6)


def test_linear_layer_against_hand_written_sgd(monkeypatch):
    """Three steps of at most two images per epoch; one image is ignored as a whole."""
    monkeypatch.setattr(dense, "BATCH", 2)
    rng, side, classes = np.random.default_rng(0), 5, 3
    tokens, masks = rng.normal(size=(5, 4, 6)), random_masks(5, side, side, classes=classes).astype(np.uint8)
    masks[2] = 255
    layer = dense.train_layer(
        torch.tensor(tokens), torch.tensor(masks), classes, CPU, lr=0.3, epochs=4, drop_at=2, seed=7
    )
    generator = torch.Generator().manual_seed(7)
    weight = torch.empty(classes, 6, dtype=torch.float64).normal_(std=0.01, generator=generator).numpy()
    bias, weight_velocity, bias_velocity = np.zeros(classes), 0, 0
    weights = bilinear(2, side)
    for lr in (0.3, 0.3, 0.03, 0.03):
        order = torch.randperm(5, generator=generator).tolist()
        for batch in (order[:2], order[2:4], order[4:]):
            weight_gradient, bias_gradient, count = np.zeros_like(weight), np.zeros_like(bias), 0
            for i in batch:
                maps = np.einsum("ih,hwd,jw->ijd", weights, tokens[i].reshape(2, 2, 6), weights)
                for place in zip(*np.nonzero(masks[i] != 255), strict=True):
                    logits = weight @ maps[place] + bias
                    error = np.exp(logits) / np.exp(logits).sum() - np.eye(classes)[masks[i][place]]
                    weight_gradient += np.outer(error, maps[place])
                    bias_gradient += error
                    count += 1
            weight_velocity = 0.9 * weight_velocity + weight_gradient / max(count, 1) + 1e-4 * weight
            bias_velocity = 0.9 * bias_velocity + bias_gradient / max(count, 1) + 1e-4 * bias
            weight, bias = weight - lr * weight_velocity, bias - lr * bias_velocity
    assert np.abs(weight).max() > 0.1
    assert layer.weight.detach().numpy() == pytest.approx(weight, abs=1e-6)
    assert layer.bias.detach().numpy() == pytest.approx(bias, abs=1e-6)


@pytest.mark.parametrize("kind", ["plain", "voc", "VOC2012"])
def test_annotated_images(annotated_folders, kind):
    folder = annotated_folders.get(kind, annotated_folders["voc"] / "VOCdevkit/VOC2012")
    splits = open_annotated(folder, 16)
    assert [len(images) for images in splits.values()] == [6, 4]
    for images in splits.values():
        assert list(images.classes) == (list("01234") if kind == "plain" else VOC_CLASSES)
        assert images.num_classes == (5 if kind == "plain" else 21)
    train = splits["train"]
    names = ["a/0", "a/2", "a/4", "b/1", "b/3", "b/5"] if kind == "plain" else [f"train{i}" for i in range(6)]
    train.keep([1, 4])
    assert len(train) == 2
    for i, name in enumerate((names[1], names[4])):
        assert train.paths[i].endswith(name + (".png" if kind == "plain" else ".jpg"))
        assert train.masks[i].endswith(name + ".png")
        pixels, mask = train[i]
        torch.testing.assert_close(pixels, whole_transform(16)(Image.open(train.paths[i]).convert("RGB")))
        rows, columns = (((np.arange(16) + 0.5) * length / 16).astype(int) for length in (40, 48))
        expected = np.array(Image.open(train.masks[i]))[rows[:, None], columns]
        assert mask.dtype == torch.int64
        assert (mask.numpy() == expected).all()
        assert {0, 255} < set(expected.flat)


def test_names_of_classes(annotated_folders, tmp_path):
    for part in ("images", "masks"):
        (tmp_path / part).symlink_to(annotated_folders["plain"] / part)
    (tmp_path / "classes.txt").write_text("ground\ncat\n\ndog\ncow\nbird\nnot seen\n")
    assert AnnotatedImages(tmp_path, "val", 16).classes == ["ground", "cat", "dog", "cow", "bird", "not seen"]
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne\na")
    with pytest.raises(UserError, match=r"classes.txt names a class twice"):
        AnnotatedImages(tmp_path, "val", 16)
    (tmp_path / "classes.txt").write_text("ground\ncat\ndog")
    with pytest.raises(UserError, match=r"has the label [34]: expected 0 to 2, the classes of classes.txt, or 255"):
        AnnotatedImages(tmp_path, "val", 16)


def test_memory_is_a_random_part_of_the_patches(annotated_folders):
    images = open_annotated(annotated_folders["plain"], 32)["train"]
    network = patch_tokens(PatchColors(8))
    tokens, shares = dense.patch_memory(network, images, CPU, 4, 0)
    expected = np.concatenate([naive_shares(mask.numpy(), (4, 4), 5) for _, mask in images])
    assert shares.numpy() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(tokens, torch.cat([network(pixels[None])[0] for pixels, _ in images]))
    drawn, its_shares = dense.patch_memory(network, images, CPU, 4, 0, memory_size=30, seed=1)
    places = [int((tokens == token).all(1).nonzero()) for token in drawn]
    assert places == sorted(set(places))
    assert len(places) == 30
    assert (its_shares == shares[places]).all()
    other, _ = dense.patch_memory(network, images, CPU, 4, 0, memory_size=30, seed=2)
    assert not torch.equal(other, drawn)


def test_patches_without_labels_are_not_in_the_memory(annotated_folders):
    images = open_annotated(annotated_folders["plain"], 32)["train"]
    ignored = torch.full((32, 32), 255)
    images.mask = lambda index, side: ignored if index == 2 else AnnotatedImages.mask(images, index, side)
    _, shares = dense.patch_memory(patch_tokens(PatchColors(8)), images, CPU, 4, 0)
    assert len(shares) == 5 * 16
    assert shares.sum(1).min() > 0
    images.mask = lambda index, side: ignored
    with pytest.raises(UserError, match="no patch of the memory has a label, of 6 training images"):
        dense.patch_memory(patch_tokens(PatchColors(8)), images, CPU, 4, 0)


def test_colors_and_places_of_patches(annotated_folders):
    """The dot product of two tokens is a sum of cosines of differences: of 3 colors in 4 quarters, and of the place."""
    images = AnnotatedImages(annotated_folders["plain"], "val", 24)
    tokens = PatchColors(8)(torch.stack([images[0][0], images[1][0]]))
    assert tokens.shape == (2, 1 + 9, 28)
    colors = np.array(Image.open(images.paths[1]).resize((24, 24), Image.Resampling.BICUBIC)) / 255
    quarters = colors.reshape(6, 4, 6, 4, 3).mean((1, 3))  # of patches of 8 pixels
    for a, b in itertools.product(np.ndindex(3, 3), repeat=2):
        of_a, of_b = (quarters[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] for row, column in (a, b))
        expected = np.cos(1.5 * np.pi * (of_a - of_b)).sum() / 4 + np.cos(np.subtract(a, b)).sum()
        i, j = (1 + 3 * row + column for row, column in (a, b))
        assert float(tokens[1, i] @ tokens[1, j]) == pytest.approx(expected, abs=1e-5)
