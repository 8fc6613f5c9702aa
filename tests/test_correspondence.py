import json
import os

import numpy as np
import pytest
import torch
from digits_run import torchrun
from PIL import Image
from test_features import normal

import eval_dense
from support import figures
from support.dense import match_features
from support.evaluation import ModelSpec, open_model
from support.sources import photograph
from utils import UserError

MICRO = "--pretrained_weights none --arch vit_micro --patch_size 8 --num_workers 0 --crop_size 64".split()
GRID = 8


def evaluate(folder, output, *words):
    options = ["--data_path", str(folder), *MICRO, "--output_dir", str(output), *map(str, words)]
    eval_dense.main(["correspondence", *options])
    return json.loads((output / f"correspondence_{folder.name}.json").read_text())


@pytest.fixture
def pixels_as_features(monkeypatch):
    """Let the pixels of a patch be its features."""

    def tokens(images):
        return torch.nn.functional.unfold(images, 8, stride=8).mT  # [B, P, 192]

    monkeypatch.setattr(eval_dense, "patch_tokens", lambda backbone, normalized: tokens)


def test_matches_are_the_nearest_features():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 6)), rng.normal(size=(30, 6))
    index, similarity = match_features(torch.tensor(a), torch.tensor(b))
    for feature, i, value in zip(a, index, similarity, strict=True):
        cosines = [feature @ other / np.linalg.norm(feature) / np.linalg.norm(other) for other in b]
        assert (int(i), float(value)) == (np.argmax(cosines), pytest.approx(max(cosines), abs=1e-6))


def test_matches_do_not_depend_on_chunks(monkeypatch):
    a, b = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0))
    whole = match_features(a, b)
    monkeypatch.setattr("support.dense.SIMILARITIES", 120)
    for one, other in zip(whole, match_features(a, b), strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture
def spair(tmp_path, photographs):
    """Return a folder in SPair-71k's layout: four pairs of parts of photographs, with keypoints that move a little."""
    root, rng = tmp_path / "SPair", np.random.default_rng(0)
    for i, photo in enumerate((photographs * 2)[:4]):
        kind = ("cat", "dog")[i % 2]
        sizes = [(90 + 10 * i, 70), (64, 100 - 8 * i)]
        for name, size in zip("ab", sizes, strict=True):
            path = root / f"JPEGImages/{kind}/{name}{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.crop((30 * i, 20, 30 * i + 200, 200)).resize(size).save(path)
        places = rng.random((3 + 2 * i, 2))
        places = places, (places + rng.normal(0, 0.08, places.shape)).clip(0, 1)
        kps = [(share * size).round().astype(int).tolist() for share, size in zip(places, sizes, strict=True)]
        contents = {"src_imname": f"a{i}.jpg", "trg_imname": f"b{i}.jpg", "category": kind, "src_kps": kps[0]}
        contents |= {"trg_kps": kps[1], "src_bndbox": [1, 1, 60, 60], "trg_bndbox": [4, 2, 60, 20 + 20 * i]}
        path = root / f"PairAnnotation/test/{i:06}-a{i}-b{i}:{kind}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(contents))
    return root


@pytest.fixture
def patches(tmp_path, photographs):
    """Return a folder in HPatches' layout: two sequences of four images with their homographies."""
    root = tmp_path / "HPatches"
    for i, photo in enumerate(photographs):
        folder = root / f"v_{i}"
        folder.mkdir(parents=True)
        for k in range(1, 5):
            size = (80 + 6 * k, 70 + 8 * i)
            photo.crop((20 * k, 10 * k, 20 * k + 250, 10 * k + 220)).resize(size).save(folder / f"{k}.ppm")
            matrix = [[1 + 0.05 * k, 0.08 * k, -4.0 * k], [-0.06 * k, 0.9, 5.0 * i], [4e-4 * k, -3e-4, 1]]
            if k > 1:
                np.savetxt(folder / f"H_1_{k}", np.multiply(matrix, 2.5 - k))  # the scale of a homography is free
    return root


def tokens_of(path):
    """Return the patch tokens of an image that is resized to a square."""
    network = open_model(ModelSpec("none", "vit_micro", 8), 64).backbone
    square = Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
    with torch.no_grad():
        return network(normal(np.array(square)).float())[0, 1:].double().numpy()


def nearest(a, b):
    return int(np.argmax([a @ other / np.linalg.norm(a) / np.linalg.norm(other) for other in b]))


def percent(hits):
    return {
        "per_image": pytest.approx(100 * np.mean([np.mean(of_pair) for of_pair in hits]), abs=1e-6),
        "per_point": pytest.approx(100 * np.mean(np.concatenate(hits)), abs=1e-6),
    }


def test_keypoints_against_a_naive_protocol(spair, tmp_path, capsys):
    result = evaluate(spair, tmp_path / "out", "--figure", tmp_path / "out/x.pdf")
    hits = {"pck_0.1": [], "pck_0.05": []}
    for path in sorted((spair / "PairAnnotation/test").iterdir()):
        entry = json.loads(path.read_text())
        paths = [spair / "JPEGImages" / entry["category"] / entry[name] for name in ("src_imname", "trg_imname")]
        (width_a, height_a), (width_b, height_b) = (Image.open(path).size for path in paths)
        a, b = map(tokens_of, paths)
        errors = []
        for (x, y), (true_x, true_y) in zip(entry["src_kps"], entry["trg_kps"], strict=True):
            column, row = min(int(x * GRID / width_a), GRID - 1), min(int(y * GRID / height_a), GRID - 1)
            found = nearest(a[row * GRID + column], b)
            found_x, found_y = (found % GRID + 0.5) * width_b / GRID, (found // GRID + 0.5) * height_b / GRID
            errors.append(np.hypot(found_x - true_x, found_y - true_y))
        left, top, right, bottom = entry["trg_bndbox"]
        for name, tolerance in (("pck_0.1", 0.1), ("pck_0.05", 0.05)):
            hits[name].append(np.array(errors) <= tolerance * max(right - left, bottom - top))
    assert result["scores"] == {name: percent(of_pairs) for name, of_pairs in hits.items()}
    assert result["scores"]["pck_0.1"]["per_point"] > 0
    assert (result["images"], result["pairs"]) == ({"val": 8}, 4)
    text = "correspondence, pck 0.1: {per_image:.1f} % (mean of pairs), {per_point:.1f} % (of all points)\n"
    assert text.format(**result["scores"]["pck_0.1"]) in capsys.readouterr().out
    assert (tmp_path / "out/x.pdf").read_bytes().startswith(b"%PDF")
    assert evaluate(spair, tmp_path / "out")["scores"] == result["scores"]
    assert len(list((tmp_path / "out").iterdir())) == 2  # a figure is no other setting


def test_homographies_against_a_naive_protocol(patches, tmp_path):
    result = evaluate(patches, tmp_path / "out")
    hits = []
    for folder in sorted(patches.iterdir()):
        a, (width, height) = tokens_of(folder / "1.ppm"), Image.open(folder / "1.ppm").size
        for k in range(2, 5):
            b, (width_b, height_b) = tokens_of(folder / f"{k}.ppm"), Image.open(folder / f"{k}.ppm").size
            matrix, of_pair = np.loadtxt(folder / f"H_1_{k}"), []
            matrix /= matrix[2, 2]
            for i in range(GRID**2):
                x, y = (i % GRID + 0.5) * width / GRID - 0.5, (i // GRID + 0.5) * height / GRID - 0.5
                u, v, w = matrix @ [x, y, 1]
                u, v = (u / w + 0.5) * GRID / width_b, (v / w + 0.5) * GRID / height_b  # in patches
                if w > 0 and 0 <= u <= GRID and 0 <= v <= GRID:
                    found = nearest(a[i], b)
                    of_pair.append(max(abs(found % GRID - int(u)), abs(found // GRID - int(v))) <= 1)
            hits.append(of_pair)
    assert len({len(of_pair) for of_pair in hits}) > 2
    assert result["scores"] == {"within_one_patch": percent(hits)}


def save_stereo(folder, left, right, disparity):
    folder.mkdir()
    for name, image in (("left", left), ("right", right)):
        Image.fromarray(image).save(folder / f"x_{name}.png")
    np.savez(folder / "x_disp.npz", np.asarray(disparity, np.float32))


@pytest.mark.parametrize(("shift", "share"), [(16, 100), (0, 0)])
def test_patches_that_move_as_the_disparity_says(tmp_path, photographs, pixels_as_features, shift, share):
    """The right image shows the left one two patches further left. A patch without disparity does not count."""
    left = np.array(photographs[0].crop((0, 0, 80, 64)))
    disparity = np.full((64, 64), float(shift))
    disparity[:8, 40:48] = np.inf
    save_stereo(tmp_path / "pair", left[:, :64], left[:, 16:], disparity)
    result = evaluate(tmp_path / "pair", tmp_path / "out")
    assert result["scores"]["within_one_patch"]["per_point"] == pytest.approx(share, abs=20 * (share == 0))
    pairs = eval_dense.read_pairs(tmp_path / "pair", GRID)
    assert len(pairs[0].points) == GRID * (GRID - shift // 8) - 1


def test_the_same_image_twice_is_matched_everywhere(tmp_path, patches, spair):
    """Keypoints lie in the centers of patches."""
    image = np.array(Image.open(patches / "v_0/1.ppm"))
    save_stereo(tmp_path / "pair", image, image, np.zeros(image.shape[:2]))
    assert evaluate(tmp_path / "pair", tmp_path / "out")["scores"]["within_one_patch"]["per_image"] == 100
    for path in patches.glob("*/H_1_*"):
        np.savetxt(path, np.eye(3))
        path.with_name(f"{path.name[-1]}.ppm").write_bytes((path.parent / "1.ppm").read_bytes())
    assert evaluate(patches, tmp_path / "out")["scores"]["within_one_patch"]["per_image"] == 100
    for path in (spair / "PairAnnotation/test").iterdir():
        entry = json.loads(path.read_text())
        width, height = Image.open(spair / "JPEGImages" / entry["category"] / entry["src_imname"]).size
        entry["src_kps"] = entry["trg_kps"] = [[2.5 * width / 8, 5.5 * height / 8], [7.5 * width / 8, height / 16]]
        path.write_text(json.dumps(entry | {"trg_imname": entry["src_imname"]}))
    assert evaluate(spair, tmp_path / "out")["scores"]["pck_0.05"] == {"per_image": 100, "per_point": 100}


def test_the_stereo_pair_of_scikit_image(tmp_path):
    """Its folder has other photographs. An untrained network finds more than the 5 % of chance: it knows positions."""
    folder = photograph("motorcycle_left").parent
    share = evaluate(folder, tmp_path)["scores"]["within_one_patch"]["per_image"]
    assert 30 < share < 100


@pytest.mark.slow
def test_two_processes_equal_one(spair, tmp_path, run_script):
    one = evaluate(spair, tmp_path / "one")
    words = ["eval_dense.py", "correspondence", "--data_path", spair, *MICRO, "--output_dir", tmp_path / "two"]
    output = run_script(*words, launcher=torchrun()[1:]).stdout
    two = json.loads((tmp_path / "two/correspondence_SPair.json").read_text())
    assert two["scores"] == one["scores"]
    assert output.count("pck 0.05") == 1


def test_lines_join_points_and_patches():
    pictures = [np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 9, np.uint8)]
    points, found = np.array([[4.0, 12.0], [20.0, 8.0]]), np.array([[12.0, 28.0], [28.0, 4.0]])
    (page,) = figures.draw_correspondence([(pictures, points, found, np.array([True, False]))])
    (axis,) = page.axes
    assert axis.get_title() == "1 of 2 right"
    assert (np.asarray(axis.images[0].get_array())[:, -32:] == 9).all()
    offset = axis.images[0].get_array().shape[1] - 32
    for line, point, place, color in zip(axis.lines, points, found, (figures.SAME, figures.COLORS[1]), strict=True):
        np.testing.assert_allclose(line.get_xydata() + 0.5, [point, place + [offset, 0]])
        assert line.get_color() == color


def edit(**changes):
    def change(folder):
        path = min((folder / "PairAnnotation/test").iterdir())
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def write(name, contents):
    return lambda folder: (folder / name).write_text(contents)


BAD = [
    (
        "spair",
        edit(src_kps=[[1, 2], [3, 4], [91, 5]]),
        ".json has the keypoint 91, 5 outside .*a0.jpg: .* 90x70 pixels",
    ),
    ("spair", edit(trg_kps=[[1, 2], [3, -4], [1, 5]]), "has the keypoint 3, -4 outside .*b0.jpg"),
    ("spair", edit(trg_imname="absent.jpg"), "cannot read image .*absent.jpg: .*No such file"),
    ("spair", edit(src_kps=[[1, 2]]), "cannot read .*json: expected src_ and trg_imname"),
    (
        "spair",
        edit(src_kps=[[1, 2, 1]] * 2, trg_kps=[[1, 2, 1]] * 2),
        "cannot read .*json: expected src_ and trg_imname",
    ),
    ("spair", edit(trg_bndbox=None), "cannot read .*json: expected src_ and trg_imname"),
    ("patches", write("v_0/H_1_3", "1 0 0\n0 1 0"), "cannot read .*H_1_3: expected an invertible matrix"),
    ("patches", write("v_0/H_1_3", "0 " * 9), "cannot read .*H_1_3: expected an invertible matrix"),
    ("patches", lambda folder: os.remove(folder / "v_1/4.ppm"), "cannot read image .*4.ppm: .*No such file"),
    ("stereo", lambda folder: os.remove(folder / "x_right.png"), "cannot read image .*right.png: .*No such file"),
    ("stereo", write("x_disp.npz", "text"), "cannot read .*x_disp.npz: .*expected numbers"),
    ("stereo", lambda folder: np.savez(folder / "x_disp.npz", np.zeros((5, 9))), r"found the shape \(5, 9\)"),
    ("stereo", lambda folder: np.savez(folder / "x_disp.npz", np.full((64, 80), 1e3)), "no patch of the first images"),
    ("stereo", write("y_disp.npy", ""), "cannot read .*y_disp.npy: .*expected numbers"),
    ("stereo", lambda folder: os.remove(folder / "x_disp.npz"), "no pairs of images in .*expected PairAnnotation"),
]


@pytest.mark.parametrize(
    ("layout", "change", "message"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_input_is_one_line(spair, patches, tmp_path, photographs, monkeypatch, layout, change, message):
    monkeypatch.setattr(eval_dense.evaluation, "features_of_all", None)  # comes later
    image = np.array(photographs[0].crop((0, 0, 80, 64)))
    save_stereo(tmp_path / "pair", image, image, np.zeros((64, 80)))
    folder = {"spair": spair, "patches": patches, "stereo": tmp_path / "pair"}[layout]
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        evaluate(folder, tmp_path / "out")
    assert "\n" not in str(error.value)
