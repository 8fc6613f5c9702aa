import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from digits_run import torchrun
from PIL import Image
from test_features import normal

import eval_dense
from eval_dense import propagate_labels
from support import figures
from support.evaluation import ModelSpec, open_model
from support.propagation import boundary_measure, davis_size, masks_of_soft_labels, region_similarity
from utils import UserError

MICRO = "--pretrained_weights none --arch vit_micro --patch_size 8 --num_workers 0 --short_side 48".split()


@pytest.mark.parametrize("i", [0, 1, 2])
def test_labels_and_masks_are_dinos(golden, i):
    data = golden("propagation.npz")
    meta = data["meta"][i]
    features, first = (torch.tensor(data[f"{i}_{name}"]) for name in ("features", "first_labels"))
    window = {"n_last_frames": meta["n_last_frames"], "radius": meta["size_mask_neighborhood"], "topk": meta["topk"]}
    soft = propagate_labels(features, first, tuple(meta["grid"]), meta["classes"], **window)
    np.testing.assert_allclose(soft.numpy(), data[f"{i}_soft"], atol=1e-5)
    assert (masks_of_soft_labels(soft, meta["patch_size"]) == data[f"{i}_masks"]).mean() > 0.9999


def naive_labels(features, first, num_classes, n_last_frames, radius, topk, temperature):
    """Return the soft labels [T, h, w, C] of features [T, h, w, D]. Patches that tie with the last one count."""
    frames, rows, columns, _ = features.shape
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    labels = np.zeros((frames, rows, columns, num_classes))
    labels[0] = np.eye(num_classes)[first]
    for t in range(1, frames):
        for y, x in np.ndindex(rows, columns):
            found = [
                (unit[t, y, x] @ unit[s, i, j], labels[s, i, j])
                for s in range(t)
                for i, j in np.ndindex(rows, columns)
                if (s == 0 or s >= t - n_last_frames) and (not radius or max(abs(i - y), abs(j - x)) <= radius)
            ]
            last = sorted((cosine for cosine, _ in found), reverse=True)[:topk][-1]
            kept = [(math.exp(cosine / temperature), label) for cosine, label in found if cosine >= last - 1e-12]
            labels[t, y, x] = sum(w * label for w, label in kept) / sum(w for w, _ in kept)
    return labels


@pytest.mark.parametrize("chunk", [1, 2**24])
@pytest.mark.parametrize("settings", [(2, 1, 5, 0.1), (7, None, 3, 0.5), (0, 2, 1, 0.1), (1, 1, 40, 0.2)])
def test_labels_are_those_of_a_naive_formula(monkeypatch, settings, chunk):
    monkeypatch.setattr("support.propagation.SIMILARITIES", chunk)
    rng = np.random.default_rng(0)
    features, first = rng.normal(size=(5, 4, 6, 8)), rng.integers(0, 3, (4, 6))
    features[2] = features[1]  # ties
    tokens, labels = torch.tensor(features).flatten(1, 2), torch.tensor(first)
    soft = propagate_labels(tokens, labels, (4, 6), 3, *settings)
    expected = naive_labels(features, first, 3, *settings)[1:].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(soft.numpy(), expected, atol=1e-6)


def test_labels_move_with_the_patches():
    tokens = torch.randn(1, 5, 20, 32, generator=torch.Generator().manual_seed(0))
    video = torch.cat([tokens.roll(t, 2) for t in range(6)])
    first = torch.zeros(5, 20, dtype=torch.uint8)
    first[1:3, 2:6] = 1
    soft = propagate_labels(video.flatten(1, 2), first, (5, 20), 2, n_last_frames=1, radius=1, topk=1)
    for t, labels in enumerate(soft, start=1):
        assert (labels.argmax(0)[:, 6:] == first.roll(t, 1)[:, 6:]).all()  # the left columns enter from the right


def naive_boundary(mask):
    height, width = mask.shape
    found = set()
    for y, x in np.ndindex(height, width):
        others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
        if any(mask[y, x] != mask[min(i, height - 1), min(j, width - 1)] for i, j in others):
            found.add((y, x))
    return found


def naive_scores(mask, truth):
    """Return J and F of two bool masks, as DAVIS's evaluation."""
    intersection, union = (mask & truth).sum(), (mask | truth).sum()
    radius = math.ceil(0.008 * math.hypot(*mask.shape))
    a, b = naive_boundary(mask), naive_boundary(truth)

    def share(points, others):
        near = [any((y - i) ** 2 + (x - j) ** 2 <= radius**2 for i, j in others) for y, x in points]
        return sum(near) / len(near)

    if not a or not b:
        f = float(not a and not b)
    else:
        precision, recall = share(a, b), share(b, a)
        f = 2 * precision * recall / (precision + recall) if precision + recall else 0
    return (intersection / union if union else 1, f)


def test_measures_are_those_of_naive_formulas():
    rng = np.random.default_rng(0)
    for size in ((30, 50), (10, 130), (7, 9)):  # with tolerances of 1, 2 and 1 pixels
        noise = torch.tensor(rng.random((4, 1, *(-(-length // 6) for length in size))))
        masks = (F.interpolate(noise, size, mode="bilinear")[:, 0] > 0.55).numpy()
        masks = [*masks, np.zeros(size, bool), np.ones(size, bool)]
        for mask in masks:
            for truth in masks[3:]:
                scores = region_similarity(mask, truth), boundary_measure(mask, truth)
                assert scores == pytest.approx(naive_scores(mask, truth), abs=1e-6)


@pytest.mark.parametrize(
    ("size", "short_side", "patch_size", "expected"),
    [
        ((854, 480), 480, 16, [832, 480]),
        ((480, 854), 480, 8, [480, 832]),
        ((1920, 1080), 480, 14, [840, 476]),
        ((50, 48), 48, 8, [48, 48]),
    ],
)
def test_frames_have_dinos_size(size, short_side, patch_size, expected):
    assert davis_size(size, short_side, patch_size) == expected


PALETTE = [0, 0, 0, 200, 30, 20, 10, 120, 240, 90, 200, 60] + 252 * [7, 7, 7]


def save_mask(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(labels, np.uint8))
    picture.putpalette(PALETTE)
    picture.save(path)


@pytest.fixture
def davis(tmp_path, photographs):
    """Return a folder of three videos: two moving objects, one object on few annotated frames, a still band."""
    root, rng = tmp_path / "Davis", np.random.default_rng(0)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("moving\nsparse\nstill\n")
    china, flower = photographs
    for name, count, size in (("moving", 7, (96, 60)), ("sparse", 4, (56, 72)), ("still", 4, (64, 48))):
        background = china.resize((120, 90))
        for t in range(count):
            image, labels = background.crop((0, 0, *size)), np.zeros(size[::-1], np.uint8)
            if name == "still":
                labels[16:32] = 2
            else:
                for label, x in ((1, 5 + 4 * t), (3, 40 - 3 * t))[: 2 if name == "moving" else 1]:
                    image.paste(
                        flower.crop((200 * label, 50, 200 * label + 200, 250)).resize((20, 20)), (x, 18 * label)
                    )
                    labels[18 * label : 18 * label + 20, max(x, 0) : x + 20] = label
                labels[:3, :3] = 255
            path = root / f"JPEGImages/480p/{name}/{t:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = 0 if name == "still" else rng.normal(0, 4, np.shape(image))
            Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=95)
            if name != "sparse" or t in (0, 2):
                save_mask(root / f"Annotations/480p/{name}/{t:05}.png", labels)
    return root


def evaluate(davis, output, *words):
    eval_dense.main(["propagation", "--data_path", str(davis), *MICRO, "--output_dir", str(output), *map(str, words)])
    return json.loads((output / "propagation_Davis.json").read_text())


def test_whole_protocol_against_a_naive_one(davis, tmp_path, capsys):
    window = {"n_last_frames": 2, "radius": 3, "topk": 4, "temperature": 0.1}
    words = ("--n_last_frames", 2, "--size_mask_neighborhood", 3, "--topk", 4, "--figure", tmp_path / "strip.png")
    result = evaluate(davis, tmp_path / "out", *words)
    network = open_model(ModelSpec("none", "vit_micro", 8), 48).backbone
    expected, scores = {}, []
    for name, (width, height) in (("moving", (64, 48)), ("sparse", (48, 48)), ("still", (64, 48))):
        frames = sorted((davis / "JPEGImages/480p" / name).glob("*.jpg"))
        truths = {path.stem: np.array(Image.open(path)) for path in (davis / "Annotations/480p" / name).glob("*.png")}
        first = np.where(truths["00000"] == 255, 0, truths["00000"])
        shape = first.shape
        images = [eval_dense.ImageList([path]).image(0) for path in frames]
        pixels = [eval_dense.frame_pixels((width, height), image) for image in images]
        if name == "still":  # is not resized
            assert torch.allclose(pixels[0], normal(np.array(images[0]))[0].float(), atol=1e-5)
        with torch.no_grad():
            tokens = [network(image[None])[0, 1:].double().numpy() for image in pixels]
        rows, columns = height // 8, width // 8
        y, x = (
            ((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(shape, (rows, columns), strict=True)
        )
        features = np.reshape(tokens, (len(frames), rows, columns, -1))
        soft = naive_labels(features, first[np.ix_(y, x)], first.max() + 1, **window)[1:]
        masks = masks_of_soft_labels(torch.tensor(soft.transpose(0, 3, 1, 2)), 8)
        of_video = {}
        for t, path in enumerate(frames):
            written = Image.open(tmp_path / "out/propagation_Davis" / name / f"{path.stem}.png")
            assert (written.mode, written.getpalette()[:12]) == ("P", PALETTE[:12])
            mask, truth = np.array(written), truths.get(path.stem)
            own = (
                Image.fromarray(masks[t - 1]).resize(shape[::-1], Image.Resampling.NEAREST) if t else truths[path.stem]
            )
            assert (mask == np.array(own)).mean() > 0.999
            for label in set(np.unique(first)) - {0} if truth is not None and 0 < t < len(frames) - 1 else ():
                counts = truth != 255
                of_video.setdefault(str(label), []).append(naive_scores((mask == label) & counts, truth == label))
        expected[name] = {k: dict(zip("jf", 100 * np.mean(v, 0), strict=True)) for k, v in of_video.items()}
        scores += expected[name].values()
        assert result["objects"][name] == {k: pytest.approx(v, abs=1e-6) for k, v in expected[name].items()}
    j, f = (np.mean([score[name] for score in scores]) for name in "jf")
    assert (result["j"], result["f"], result["jf"]) == pytest.approx((j, f, (j + f) / 2), abs=1e-6)
    assert f"propagation: J&F {(j + f) / 2:.1f}, J {j:.1f}, F {f:.1f}\n" in capsys.readouterr().out
    assert [len(of_video) for of_video in expected.values()] == [2, 1, 1]
    assert (tmp_path / "strip.png").exists()


def test_a_still_video_keeps_its_mask(davis, tmp_path):
    """With the nearest patch alone, labels are copied. A band has no corners, which would be rounded."""
    (davis / "ImageSets/2017/val.txt").write_text("still")
    result = evaluate(davis, tmp_path / "out", "--topk", 1)
    assert (result["j"], result["f"]) == (100, 100)


def test_without_later_annotations_there_are_masks_but_no_score(davis, tmp_path, capsys):
    (davis / "ImageSets/2017/val.txt").write_text("sparse")
    (davis / "Annotations/480p/sparse/00002.png").unlink()
    assert "jf" not in evaluate(davis, tmp_path / "out")
    assert len(list((tmp_path / "out/propagation_Davis/sparse").iterdir())) == 4
    assert "no score, since no frame between the first and the last one is annotated" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_equal_one(davis, tmp_path, run_script):
    one = evaluate(davis, tmp_path / "one", "--figure", tmp_path / "one.png")
    words = ["eval_dense.py", "propagation", "--data_path", davis, *MICRO, "--output_dir", tmp_path / "two"]
    output = run_script(*words, "--figure", tmp_path / "two.png", launcher=torchrun()[1:]).stdout
    two = json.loads((tmp_path / "two/propagation_Davis.json").read_text())
    assert two["objects"] == one["objects"]
    assert output.count("J&F") == 1
    for path in (tmp_path / "one/propagation_Davis").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    pictures = [np.array(Image.open(tmp_path / f"{name}.png")) for name in ("one", "two")]
    assert (pictures[0] == pictures[1]).all()


def test_strip_shows_masks_above_the_truth():
    image, mask, truth = np.full((40, 60, 3), 100, np.uint8), np.zeros((40, 60), int), np.full((40, 60), 255)
    mask[10:30, 10:30] = 2
    strip = [(0, image, mask, mask), (4, image, mask, None), (9, image, mask, truth)]
    (page,) = figures.draw_propagation({"dog": strip})
    assert [axis.get_title() for axis in page.axes] == ["dog: given", "frame 4", "frame 9", ""]
    pictures = [np.asarray(axis.images[0].get_array()) for axis in page.axes]
    assert (pictures[3] == image).all()  # 255 is not tinted
    for picture in pictures[:3]:
        assert ((picture != image).any(-1) == (mask == 2)).all()
        assert (picture[10, 10] != picture[20, 20]).any()  # an outline


def break_davis(davis, what):
    frames, masks = davis / "JPEGImages/480p/moving", davis / "Annotations/480p/moving"
    if what == "one frame":
        for path in sorted(frames.iterdir())[1:]:
            path.unlink()
    elif what == "no annotation":
        (masks / "00000.png").unlink()
    elif what == "no object":
        save_mask(masks / "00000.png", np.zeros((60, 96)))
    elif what == "annotation of another size":
        save_mask(masks / "00003.png", np.zeros((61, 96)))
    elif what == "frame of another size":
        Image.new("RGB", (96, 61)).save(frames / "00002.jpg")
    elif what == "colors":
        Image.new("RGB", (96, 60)).save(masks / "00000.png")
    else:
        (davis / "ImageSets/2017/val.txt").write_text({"no video": "", "path": "../x", "absent": "other"}[what])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("one frame", "the video moving has 1 frames, expected at least 2"),
        ("no annotation", "00000.png is missing or has no object: the first frame needs an annotation"),
        ("no object", "00000.png is missing or has no object"),
        ("annotation of another size", "00003.png has 96x61 pixels, expected 96x60 as the first frame of the video"),
        ("frame of another size", "00002.jpg has 96x61 pixels, expected 96x60"),
        ("colors", "cannot read image .*00000.png: found a mask in mode RGB, expected a palette"),
        ("no video", "val.txt is missing or lists no video: expected DAVIS-2017's"),
        ("path", "the video ../x has 0 frames"),
        ("absent", "the video other has 0 frames, expected at least 2: expected DAVIS-2017's"),
    ],
)
def test_bad_input_is_one_line(davis, tmp_path, monkeypatch, what, message):
    monkeypatch.setattr(eval_dense.evaluation, "open_model", None)  # comes later
    break_davis(davis, what)
    with pytest.raises(UserError, match=message) as error:
        evaluate(davis, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_the_exit_code_of_bad_input_is_2(tmp_path, run_main):
    process = run_main("eval_dense.py", "propagation", "--data_path", tmp_path, *MICRO, check=False)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path}/ImageSets/2017/val.txt is missing" in process.stderr
