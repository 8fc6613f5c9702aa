"""The protocols of eval_dense.py from files to the result, against naive ones."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import jaccard_score
from test_dense import bilinear, naive_knn, naive_shares

import eval_dense
from support import figures
from support.dense import open_annotated, train_layer
from vision_transformer import vit_micro


def evaluate(protocol, folder, output, *words, weights="none --arch vit_micro --patch_size 8"):
    """Run a protocol on images of 32 pixels and return the only result of this protocol."""
    options = f"{protocol} --data_path {folder} --pretrained_weights {weights} --crop_size 32 --num_workers 0"
    eval_dense.main([*options.split(), "--output_dir", str(output), *map(str, words)])
    (file,) = output.glob(f"{protocol.replace('-', '_')}*.json")
    return json.loads(file.read_text())


def tokens_and_masks(folder):
    """Return {split: (tokens double [n, 16, 96], masks of 32 pixels [n, 32, 32])} of random weights, and the images."""
    torch.manual_seed(0)
    network = vit_micro(8, img_size=32).eval()
    splits = open_annotated(folder, 32)
    arrays = {}
    for split, images in splits.items():
        with torch.no_grad():
            tokens = torch.stack([network(pixels[None])[0, 1:] for pixels, _ in images])
        arrays[split] = tokens.double().numpy(), np.stack([mask.numpy() for _, mask in images])
    return arrays, splits


def expected_metrics(predictions, masks, names):
    truth, found = masks[masks != 255], predictions[masks != 255]
    labels = sorted({*truth, *found})
    ious = 100 * jaccard_score(truth, found, labels=labels, average=None)
    means = {"miou": ious.mean(), "miou_objects": ious[1:].mean(), "pixel_accuracy": 100 * np.mean(truth == found)}
    of_class = {names[label]: pytest.approx(iou, abs=1e-6) for label, iou in zip(labels, ious, strict=True)}
    expected = {name: pytest.approx(value, abs=1e-6) for name, value in means.items()}
    return {"iou": dict.fromkeys(names) | of_class, **expected}


def upsampled(scores, side):
    weights = bilinear(4, side)
    return np.einsum("ih,hwc,jw->ijc", weights, scores.reshape(4, 4, -1), weights).argmax(2)


@pytest.mark.parametrize("kind", ["plain", "voc"])
def test_knn_segmentation_against_a_naive_one(annotated_folders, tmp_path, capsys, kind):
    result = evaluate("knn-segmentation", annotated_folders[kind], tmp_path, "--nb_knn", 5, "--train_images", 3)
    arrays, splits = tokens_and_masks(annotated_folders[kind])
    names = splits["train"].classes
    (train, masks), (val, truths) = arrays["train"], arrays["val"]
    train, val = (x / np.linalg.norm(x, axis=2, keepdims=True) for x in (train, val))
    chosen = [0, 2, 4]  # three of six, evenly spread
    memory, shares = (
        np.concatenate(train[chosen]),
        np.concatenate([naive_shares(masks[i], (4, 4), len(names)) for i in chosen]),
    )
    predictions = np.stack([upsampled(naive_knn(memory, shares, tokens, 5, 0.02), 32) for tokens in val])
    expected = expected_metrics(predictions, truths, names)
    assert {name: result[name] for name in expected} == expected
    assert result["images"] == {"train": 3, "val": 4}
    assert result["patches"] == {"per_image": 16, "memory": 48}
    assert f"knn-segmentation: mIoU {result['miou']:.2f} %, of objects" in capsys.readouterr().out
    assert 15 < result["miou"] < 100


def test_linear_segmentation_against_a_naive_one(annotated_folders, tmp_path):
    words = "--lr", 1, "--epochs", 3, "--drop_at", 2, "--seed", 0
    result = evaluate("linear-segmentation", annotated_folders["plain"], tmp_path, *words)
    arrays, splits = tokens_and_masks(annotated_folders["plain"])
    masks = {
        split: np.stack(
            [np.array(Image.open(path).resize((100, 100), Image.Resampling.NEAREST)) for path in images.masks]
        )
        for split, images in splits.items()
    }
    (train, _), (val, _) = arrays["train"], arrays["val"]
    of_train = torch.tensor(train, dtype=torch.float32), torch.tensor(masks["train"])
    layer = train_layer(*of_train, 5, torch.device("cpu"), lr=1, epochs=3, drop_at=2).double().requires_grad_(False)
    scores = F.linear(torch.tensor(val), layer.weight, layer.bias).numpy()
    predictions = np.stack([upsampled(image, 100) for image in scores])
    assert len(np.unique(predictions)) > 1
    expected = expected_metrics(predictions, masks["val"], splits["train"].classes)
    assert {name: result[name] for name in expected} == expected


def test_default_sides(annotated_folders):
    for protocol, side in (("knn-segmentation", None), ("linear-segmentation", 448)):
        args = eval_dense.parse_arguments(f"{protocol} --data_path x --pretrained_weights none".split())
        assert args.crop_size == side


def test_colors_and_places_find_the_rectangles(annotated_folders, tmp_path, monkeypatch):
    """The figure changes no setting: the result keeps its file. Another folder and another patch have their own."""
    pixels = {"weights": "pixels --patch_size 4"}
    first = evaluate("knn-segmentation", annotated_folders["plain"], tmp_path, "--nb_knn", 3, **pixels)
    assert first["miou"] > 50
    figure = tmp_path / "figures/examples.png"
    again = evaluate(
        "knn-segmentation", annotated_folders["plain"], tmp_path, "--nb_knn", 3, "--figure", figure, **pixels
    )
    assert again["iou"] == first["iou"]
    assert Image.open(figure).width == 1400
    monkeypatch.setattr(figures, "save", None)  # a figure that cannot be written
    (tmp_path / "knn_segmentation_plain.json").unlink()
    with pytest.raises(TypeError):
        evaluate("knn-segmentation", annotated_folders["plain"], tmp_path, "--nb_knn", 3, "--figure", figure, **pixels)
    assert json.loads((tmp_path / "knn_segmentation_plain.json").read_text())["iou"] == first["iou"]
    for folder, words in ((annotated_folders["voc"], []), (annotated_folders["plain"], ["--patch_size", "8"])):
        options = [
            "--data_path",
            folder,
            "--crop_size",
            32,
            "--nb_knn",
            3,
            "--num_workers",
            0,
            "--output_dir",
            tmp_path,
        ]
        eval_dense.main(
            ["knn-segmentation", *map(str, options), "--pretrained_weights", "pixels", "--patch_size", "4", *words]
        )
    assert len(list(tmp_path.glob("knn_segmentation_plain*.json"))) == 2
    assert (tmp_path / "knn_segmentation_voc.json").exists()


def test_results_on_other_masks_are_kept_apart(annotated_folders, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(annotated_folders["plain"], folder)
    evaluate("knn-segmentation", folder, tmp_path / "out", weights="pixels --patch_size 8")
    mask = min((folder / "masks/val").rglob("*.png"))
    Image.fromarray(np.array(Image.open(mask))[::-1]).save(mask)
    options = "--pretrained_weights pixels --patch_size 8 --crop_size 32 --num_workers 0 --output_dir"
    eval_dense.main(["knn-segmentation", "--data_path", str(folder), *options.split(), str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("knn_segmentation_plain*.json"))) == 2
