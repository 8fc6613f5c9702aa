import os
import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import ConnectionPatch
from PIL import Image
from sklearn.decomposition import PCA

import figures
import visualize
from augment import MEAN, STD, MultiCrop
from datasets import photograph
from patch_matching import match_patches
from utils import UserError
from vision_transformer import vit_micro

MICRO = "--pretrained_weights none --arch vit_micro --patch_size 8".split()


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return vit_micro(8, img_size=32).eval()


@pytest.fixture
def image(photographs):
    return torch.from_numpy(np.array(photographs[0].resize((48, 32)))).permute(2, 0, 1)


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that a command draws instead of writing them: a list."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure))
    return kept


def run(*words):
    visualize.main([str(word) for word in words])


def normal(image):
    """Normalise pixels as ImageNet's, in float64: uint8 [3, H, W] -> [1, 3, H, W]."""
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (MEAN, STD))
    return ((image.double() / 255 - mean) / std)[None]


# --- what is computed


def test_attention_is_that_of_the_last_block(backbone, image):
    attention = visualize.cls_attention(backbone, image)
    assert attention.shape == (3, 4, 6)
    # By hand, in float64: what goes into the last block, its queries and keys.
    network = vit_micro(8, img_size=32).double().eval()
    network.load_state_dict(backbone.state_dict())
    tokens = []
    network.blocks[-1].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    network(normal(image))
    block = network.blocks[-1]
    q, k, _ = block.attn.qkv(block.norm1(tokens[0]))[0].chunk(3, dim=1)  # [25, 96]
    for head in range(3):
        own = slice(32 * head, 32 * (head + 1))
        expected = (q[0, own] @ k[:, own].T / 32**0.5).softmax(0)[1:]
        np.testing.assert_allclose(attention[head].ravel(), expected.detach(), atol=1e-6)


def test_mask_is_the_fewest_patches_with_the_share():
    attention = np.array([[0.1, 0.4], [0.2, 0.3]])
    for share, kept in ((0.0, 0), (0.3, 1), (0.6, 2), (0.75, 3), (0.95, 4), (1.0, 4)):
        mask = visualize.most_of(attention[None], share)[0]
        assert sorted(attention[mask]) == sorted(attention.ravel())[4 - kept :]
    rng = np.random.default_rng(0)
    maps = rng.random((3, 5, 7))
    for one, mask in zip(maps, visualize.most_of(maps, 0.6), strict=True):
        share = one[mask].sum() / one.sum()
        assert share >= 0.6 > share - one[mask].min() / one.sum()


def test_colours_are_principal_components_that_the_images_share(backbone, image):
    images = [image, image.flip(2)[:, :16]]
    features = [visualize.patch_features(backbone, x) for x in images]
    tokens = backbone(normal(images[1]).float())[0, 1:]
    torch.testing.assert_close(features[1], tokens.detach().unflatten(0, (2, 6)), atol=1e-5, rtol=1e-5)
    colours, explained = visualize.principal_colours(features)
    assert [c.shape for c in colours] == [(4, 6, 3), (2, 6, 3)]
    everything = torch.cat([f.flatten(0, 1) for f in features]).double().numpy()
    pca = PCA(3).fit(everything)
    np.testing.assert_allclose(explained, pca.explained_variance_ratio_, rtol=1e-6)
    shown = np.concatenate([c.reshape(-1, 3) for c in colours]).astype(float)
    for component, values in enumerate(pca.transform(everything).T):
        low, high = np.quantile(values, (0.01, 0.99))
        expected = 255 * ((values - low) / (high - low)).clip(0, 1)
        flipped = 255 - expected  # the sign of a component means nothing
        assert min(np.abs(shown[:, component] - e).max() for e in (expected, flipped)) < 1


def test_features_alone_find_the_same_patches_in_the_same_crop(backbone, image):
    features = visualize.patch_features(backbone, image)
    idx = torch.arange(1, 25)
    assert visualize.nearest_tokens(features, features, idx).tolist() == idx.tolist()
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    moved = features.flatten(0, 1)[shuffled].unflatten(0, (4, 6))
    assert visualize.nearest_tokens(moved, 3 * features, shuffled + 1).tolist() == idx.tolist()


def test_agreement_counts_the_patch_and_those_around_it():
    found = torch.tensor([8, 9, 14, 10, 6, 7])  # in a grid of 4 rows and 6 columns
    agrees, touches = visualize.agreement(torch.tensor([8, 8, 8, 8, 7, 6]), found, 6)
    assert agrees.tolist() == [True, False, False, False, False, False]
    assert touches.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(("size", "side", "expected"), [((100, 60), 32, (32, 56)), ((60, 100), 40, (64, 40))])
def test_images_become_whole_patches(size, side, expected):
    assert visualize.whole_patches(torch.zeros(3, *size[::-1], dtype=torch.uint8), side, 8).shape[1:] == expected


# --- what is drawn


def test_attention_draws_each_head_and_what_it_holds_on_to(drawn, capsys):
    run("attention", *MICRO, "--image_size", 64, "--threshold", 0.5)
    (figure,) = drawn
    titles = [axis.get_title() for axis in figure.axes]
    assert titles.count("head 3") == titles.count("mean") == 2
    backbone = visualize.evaluation.open_model("none", "vit_micro", 8, "teacher", 0)[0]
    for i, path in enumerate(map(photograph, ("china", "flower"))):
        image = visualize.whole_patches(visualize.open_image(path, 8), 64, 8)
        attention = visualize.cls_attention(backbone, image)
        above, below = figure.axes[10 * i : 10 * i + 5], figure.axes[10 * i + 5 : 10 * i + 10]
        assert [axis.get_title() for axis in above] == [path.stem, "head 1", "head 2", "head 3", "mean"]
        picture = figures.to_picture(image)
        assert (above[0].images[0].get_array() == picture).all()
        for maps, up, down in zip((*attention, attention.mean(0)), above[1:], below[1:], strict=True):
            brightness = np.asarray(up.images[0].get_array())[4::8, 4::8].astype(int).sum(-1)
            assert np.corrcoef(brightness.ravel(), maps.ravel())[0, 1] > 0.95
            bright = (np.asarray(down.images[0].get_array()) == picture).all(-1)[4::8, 4::8]
            dark = (picture == 255).all(-1)[4::8, 4::8]  # white stays white
            assert (bright == visualize.most_of(maps, 0.5))[~dark].all()
    assert "attention of 3 heads on china, flower" in capsys.readouterr().out


def test_many_heads_and_images_are_laid_out_in_rows():
    images, maps = 2 * [np.zeros((16, 24, 3), np.uint8)], 2 * [np.random.default_rng(0).random((13, 2, 3))]
    figure = figures.draw_attention(images, maps, [m > 0.5 for m in maps], ["a", "b"], 8, 0.6)
    titles = [axis.get_title() for axis in figure.axes if axis.images and axis.get_title()]
    assert titles == [t for name in "ab" for t in [name, *(f"head {i}" for i in range(1, 13)), "mean"]]


def test_features_are_drawn_below_their_images(drawn):
    run("features", *MICRO, "--image_size", 64)
    above, below = drawn[0].axes[:2], drawn[0].axes[2:]
    assert [axis.get_title() for axis in above] == ["china", "flower"]
    backbone = visualize.evaluation.open_model("none", "vit_micro", 8, "teacher", 0)[0]
    images = visualize.open_images(["china", "flower"], 2, 64, backbone).values()
    colours, explained = visualize.principal_colours([visualize.patch_features(backbone, x) for x in images])
    for axis, colour in zip(below, colours, strict=True):
        assert (np.asarray(axis.images[0].get_array())[4::8, 4::8] == colour).all()
    assert f"({explained[0]:.0%}, " in drawn[0].get_suptitle()


def test_matches_draws_and_counts_the_agreement(drawn, capsys):
    run("matches", *MICRO, "--global_crops_size", 64, "--local_crops_size", 32, "--pairs", 3, "--seed", 2)
    (figure,) = drawn
    backbone = visualize.evaluation.open_model("none", "vit_micro", 8, "teacher", 2)[0]
    image = visualize.open_image(photograph("china"), 8)
    agree, near, total = 0, 0, 0
    crop = MultiCrop(64, 32, (0.4, 1), (0.05, 0.4), 1, geometry="image", seed=2)  # the training's
    for seed in (0, 1, 2):
        views = crop([image], [0], seed, 0)
        boxes, flips, crops = ([views[i][name][0] for i in (0, 2)] for name in (1, 2, 0))
        idx_a, idx_b = match_patches(boxes[0], flips[0], (8, 8), boxes[1], flips[1], (4, 4))
        a, b = (backbone(normal(x).float())[0, 1:].detach().double() for x in crops)
        found = []
        for i, j in zip(idx_a[1:].tolist(), idx_b[1:].tolist(), strict=True):
            cosines = [float(x @ b[j - 1] / x.norm() / b[j - 1].norm()) for x in a]
            found.append(1 + int(np.argmax(cosines)))
            agree += found[-1] == i
            near += max(abs((found[-1] - 1) // 8 - (i - 1) // 8), abs((found[-1] - 1) % 8 - (i - 1) % 8)) <= 1
        total += len(found)
        if seed == 0:
            first, share = (idx_a[1:].tolist(), idx_b[1:].tolist(), found), np.mean(idx_a[1:].numpy() == found)
    expected = f"{total} matched patches in 3 pairs of views; of these the features find {agree / total:.1%}, "
    assert expected + f"and {near / total:.1%} within a patch (by chance 1.6%)" in capsys.readouterr().out
    lines = [artist for artist in figure.artists if isinstance(artist, ConnectionPatch)]
    ends = [tuple(int(v + 0.5) // 8 for xy in (line.xy1, line.xy2) for v in xy) for line in lines]
    tokens = [(1 + 8 * ya + xa, 1 + 4 * yb + xb) for xa, ya, xb, yb in ends]
    idx_a, idx_b, found = first
    assert tokens == list(zip(idx_a, idx_b, strict=True)) + list(zip(found, idx_b, strict=True))
    colours = [line.get_edgecolor()[:3] for line in lines[len(idx_a) :]]
    found_rows, rows = (np.array([[(i - 1) // 8, (i - 1) % 8] for i in tokens]) for tokens in (found, idx_a))
    far = np.abs(found_rows - rows).max(1).clip(max=2).tolist()
    assert colours == [to_rgb((figures.STUDENT, figures.OVERLAP, figures.WRONG)[i]) for i in far]
    assert len(set(far)) > 1
    assert f"By features: {share:.0%} the same" in [axis.get_title() for axis in figure.axes]


def test_nearest_images_are_ranked(drawn, photo_folder, capsys):
    query = photo_folder / "val/china/0.jpg"
    run("neighbours", query, photo_folder / "val", *MICRO, "--k", 3, "--num_workers", 0)
    backbone = visualize.evaluation.open_model("none", "vit_micro", 8, "teacher", 0)[0]
    transform = visualize.eval_transform(224)

    def cls(path):
        return backbone(transform(Image.open(path))[None])[0, 0].detach().double().numpy()

    others = [path for path in sorted((photo_folder / "val").rglob("*.jpg")) if path != query]
    q = cls(query)
    cosines = [q @ c / np.linalg.norm(q) / np.linalg.norm(c) for c in map(cls, others)]
    best = np.argsort(cosines)[::-1][:3]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:3]] == [str(others[i]) for i in best]
    assert [float(line.split()[0]) for line in lines[:3]] == pytest.approx([cosines[i] for i in best], abs=1e-3)
    axes = drawn[0].axes
    assert axes[0].get_title() == "query"
    for axis, i in zip(axes[1:4], best, strict=True):
        assert (np.asarray(axis.images[0].get_array()) == np.asarray(Image.open(others[i]))).all()


def test_nearest_patches_are_ranked(drawn, photo_folder, capsys):
    paths = [photo_folder / "val/china/0.jpg", photo_folder / "val/flower/0.jpg"]  # 300x240
    run("neighbours", *paths, *MICRO, "--patch", 150, 60, "--k", 4, "--image_size", 64)
    backbone = visualize.evaluation.open_model("none", "vit_micro", 8, "teacher", 0)[0]
    images = [visualize.whole_patches(visualize.open_image(path, 8), 64, 8) for path in paths]  # 8 by 10 patches
    tokens = [backbone(normal(image).float())[0, 1:].detach().double() for image in images]
    query = 2 * 10 + 5  # row 2 of 8, column 5 of 10
    everything = torch.nn.functional.normalize(torch.cat(tokens), dim=1)
    cosines = everything @ everything[query]
    cosines[query] = -2
    best = cosines.argsort(descending=True)[:4].tolist()
    printed = capsys.readouterr().out.splitlines()[:4]
    for line, i in zip(printed, best, strict=True):
        value, row, column = re.match(r"([\d.]+)  row (\d+), column (\d+) of 0", line).groups()
        assert (float(value), 10 * int(row) + int(column)) == (pytest.approx(float(cosines[i]), abs=1e-3), i % 80)
    heat = drawn[0].axes[2].images[0].get_array()
    np.testing.assert_allclose(heat[4::8, 4::8].ravel(), everything[:80] @ everything[query], atol=1e-4)
    frames = [(p.get_x() + 0.5, p.get_y() + 0.5) for p in drawn[0].axes[0].patches]
    assert frames[-1] == (40, 16)  # the query
    assert sorted(frames[:-1]) == sorted((8.0 * (i % 10), 8.0 * (i // 10)) for i in best if i < 80)


def test_map_has_a_point_for_each_image(drawn, photo_folder, capsys):
    run("map", *MICRO, "--data_path", photo_folder, "--split", "train", "--crop_size", 32, "--num_workers", 0)
    (axis,) = drawn[0].axes
    assert [len(points.get_offsets()) for points in axis.collections] == [6, 6]
    assert [points.get_label() for points in axis.collections] == ["china", "flower"]
    assert axis.get_title() == "t-SNE of the CLS features of 12 images of 2 classes"
    colours = {tuple(points.get_facecolor()[0]) for points in axis.collections}
    assert len(colours) == 2
    # The two photographs look so different that even an untrained network keeps their cuttings apart.
    a, b = (points.get_offsets().data for points in axis.collections)
    nearest = [np.argsort(np.linalg.norm(np.concatenate([a, b]) - p, axis=1))[1] for p in np.concatenate([a, b])]
    assert sum((i < 6) == (n < 6) for i, n in enumerate(nearest)) >= 10


def test_map_tells_many_classes_apart():
    labels = np.arange(120) % 60
    labels[60:] = 5
    figure = figures.draw_map(np.random.default_rng(0).random((120, 2)), labels, [f"c{i}" for i in range(60)], "")
    shown = [(tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes()) for c in figure.axes[0].collections]
    assert len(set(shown)) == 60
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(legend) == figures.MOST_CLASSES
    assert "c5" in legend


def test_a_sample_is_the_same_again(drawn):
    for _ in range(2):
        run("map", *MICRO, "--dataset", "digits", "--crop_size", 16, "--max_images", 40, "--num_workers", 0)
    first, second = (np.concatenate([c.get_offsets() for c in f.axes[0].collections]) for f in drawn)
    assert len(first) == 40
    np.testing.assert_array_equal(first, second)


def test_names_are_shown_as_they_are(drawn, tmp_path, capsys):
    names = ["$x_$", "_a", os.fsdecode(b"\xff\xfe")]
    for name in names:
        Image.new("RGB", (40, 32), "red").save(tmp_path / f"{name}.png")
    run("attention", tmp_path, *MICRO, "--image_size", 32)
    run("neighbours", tmp_path / "_a.png", tmp_path, *MICRO, "--num_workers", 0)
    run("features", tmp_path, *MICRO, "--image_size", 32)
    drawn[-1].draw_without_rendering()
    shown = [axis.get_title() for axis in drawn[-1].axes if axis.get_title()]
    assert sorted(shown) == sorted([r"\$x_\$", " _a", "\ufffd\ufffd"])
    assert "\ufffd\ufffd.png" in capsys.readouterr().out
    figure = figures.draw_map(np.eye(3, 2), [0, 1, 2], ["_bg", "$b_$", "c"], "")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [" _bg", r"\$b_\$", "c"]


def test_files_are_written(tmp_path, capsys):
    files = [tmp_path / "new" / name for name in ("a.png", "a.pdf")]
    run("features", *MICRO, "--image_size", 32, "--output", *files)
    with Image.open(files[0]) as picture:
        assert picture.width == pytest.approx(figures.WIDTH * 200, abs=1)
    assert files[1].read_bytes().startswith(b"%PDF")
    assert f"drawn in {files[0]}, {files[1]}" in capsys.readouterr().out


# --- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("attention {tiny}", r"tiny.png has 5x9 pixels, smaller than a patch of 8x8"),
        ("attention --image_size 4", "images of side 4 are smaller than a patch of 8 pixels"),
        ("attention absent.png", "cannot read image absent.png"),
        ("features --output a.jpg", "cannot write a.jpg: found the suffix '.jpg', expected .png or .pdf"),
        ("features --output {tiny}/a.png", "cannot write .*tiny.png/a.png: File exists"),
        ("matches --local_crops_size 30", "--local_crops_size 30 is not a multiple of the patches of 8 pixels"),
        (
            "attention {wide}.png --image_size 8",
            "wide has 1x9000 patches, more than 8000, at --image_size 8",
        ),
        ("features {square} --image_size 8", "found 1 patches, expected at least 4: give a larger --image_size"),
        ("neighbours {flat} {flat}", "flat is a folder, expected an image"),
        ("neighbours {photo}", "has no image to be compared with"),
        ("neighbours {photo} --patch 300 10", "outside of .*which has 300x240 pixels"),
        ("map --data_path {flat}", "flat has no labels: expected at least two class subfolders"),
        ("map", "--dataset folder needs --data_path"),
    ],
)
def test_bad_input_is_one_line(tmp_path, photo_folder, words, message):
    tiny, flat = tmp_path / "tiny.png", tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (5, 9)).save(tiny)
    Image.new("RGB", (50, 90)).save(flat / "a.png")
    wide, square = tmp_path / "wide", tmp_path / "square.png"
    Image.new("RGB", (72000, 8)).save(f"{wide}.png")
    Image.new("RGB", (8, 8)).save(square)
    words = words.format(tiny=tiny, flat=flat, wide=wide, square=square, photo=photo_folder / "val/china/0.jpg").split()
    output = [] if "--output" in words else ["--output", tmp_path / "x.png"]
    with pytest.raises(UserError, match=message) as error:
        run(words[0], *words[1:], *output, *MICRO)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.png").exists()
