import os
import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import ConnectionPatch
from PIL import Image
from test_features import normal

import visualize
from augment import MultiCrop
from patch_matching import match_patches
from support import figures
from support.sources import photograph
from utils import UserError
from vision_transformer import vit_micro

MICRO = "--pretrained_weights none --arch vit_micro --patch_size 8".split()


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures that a command draws in a list instead of writing them."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda pages, path: kept.extend(pages) or [path])
    return kept


def opened(path):
    return np.array(Image.open(path))


def run(*words):
    visualize.main([str(word) for word in words])


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


def test_features_find_the_same_patches_in_the_same_crop(photographs):
    torch.manual_seed(0)
    image = np.array(photographs[0].resize((48, 32)))
    features = visualize.features.patch_features(vit_micro(8, img_size=32).eval(), image)
    idx = torch.arange(1, 25)
    assert visualize.nearest_tokens(features, features, idx).tolist() == idx.tolist()
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    moved = features.flatten(0, 1)[shuffled].unflatten(0, (4, 6))
    assert visualize.nearest_tokens(moved, 3 * features, shuffled + 1).tolist() == idx.tolist()


@pytest.mark.parametrize(("size", "side", "expected"), [((100, 60), 32, (32, 56)), ((60, 100), 40, (64, 40))])
def test_images_become_whole_patches(size, side, expected):
    assert visualize.whole_patches(np.zeros((size[1], size[0], 3), np.uint8), side, 8).shape == (*expected, 3)


def test_attention_draws_each_head_and_what_it_holds_on_to(drawn, capsys):
    run("attention", *MICRO, "--image_size", 64, "--threshold", 0.5)
    (figure,) = drawn
    backbone = visualize.evaluation.open_model(visualize.evaluation.ModelSpec("none", "vit_micro", 8)).backbone
    for i, path in enumerate(map(photograph, ("china", "flower"))):
        image = visualize.whole_patches(opened(path), 64, 8)
        attention = visualize.features.cls_attention(backbone, image)
        axes = figure.axes[9 * i : 9 + 9 * i]
        above, below = [axes[0], *axes[1::2]], axes[2::2]
        maps_of_all = (*attention, attention.mean(0))
        times = [f"\nmax {maps.max() * maps.size / maps.sum():.1f} × uniform" for maps in maps_of_all]
        titles = ["head 1", "head 2", "head 3", "mean of heads"]
        assert [axis.get_title() for axis in above] == [path.stem, *map("".join, zip(titles, times, strict=True))]
        assert (above[0].images[0].get_array() == image).all()
        for maps, up, down in zip(maps_of_all, above[1:], below, strict=True):
            brightness = np.asarray(up.images[0].get_array())[4::8, 4::8].astype(int).sum(-1)
            assert np.corrcoef(brightness.ravel(), maps.ravel())[0, 1] > 0.95
            bright = (np.asarray(down.images[0].get_array()) == image).all(-1)[4::8, 4::8]
            assert (bright == visualize.most_of(maps, 0.5)).all()
    assert "attention of 3 heads on china, flower" in capsys.readouterr().out


@pytest.fixture
def frames(tmp_path, photographs):
    """Return a folder of eleven frames, 0.png to 10.png, in which the camera moves to the right."""
    (tmp_path / "frames").mkdir()
    for i in range(11):
        photographs[0].crop((30 * i, 40, 30 * i + 240, 200)).save(tmp_path / f"frames/{i}.png")
    return tmp_path / "frames"


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_animation_shows_the_attention_of_each_frame(tmp_path, frames, capsys, suffix):
    path = tmp_path / f"new/a{suffix}"
    for _ in range(2):  # an animation may be replaced
        run("attention", frames, *MICRO, "--image_size", 32, "--animate", "--output", path)
    assert f"attention of 11 frames, 100 ms each\ndrawn in {path}\n" in capsys.readouterr().out
    backbone = visualize.evaluation.open_model(visualize.evaluation.ModelSpec("none", "vit_micro", 8)).backbone
    images = [visualize.whole_patches(opened(frames / f"{i}.png"), 32, 8) for i in range(11)]
    maps = [visualize.features.cls_attention(backbone, image).mean(0) for image in images]  # 4 by 6 patches
    highest = np.max(maps)
    with Image.open(path) as animation:
        assert (animation.n_frames, animation.size, animation.info["loop"]) == (11, (96, 32), 0)
        for i, (image, values) in enumerate(zip(images, maps, strict=True)):
            animation.seek(i)
            animation.load()
            assert animation.info["duration"] == 100
            pixels = np.array(animation.convert("RGB")).astype(float)
            assert np.abs(pixels[:, :48] - image).mean() < 12  # lossy
            colors = pixels[4::8, 52::8]
            assert np.abs(colors - 255 * figures.HEAT(values / highest)[..., :3]).mean() < 12


def test_frames_may_be_files_and_the_default_is_webp(frames, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("attention", frames / "10.png", frames / "9.png", *MICRO, "--image_size", 32, "--animate")
    with Image.open("attention.webp") as animation:
        assert animation.n_frames == 2
        first = np.array(animation.convert("RGB")).astype(float)[:, :48]
    assert np.abs(first - visualize.whole_patches(opened(frames / "9.png"), 32, 8)).mean() < 12


def test_frames_that_are_no_video_are_refused(frames, tmp_path):
    Image.new("RGB", (240, 161)).save(frames / "5.png")
    for words, message in (
        ((frames,), "0.png has 240x160 pixels and .*5.png 240x161, expected frames of one size"),
        ((frames / "0.png",), "found 1 frames, expected the 2 to 500 frames of a video"),
        ((frames / "0.png", frames / "1.png", "--output", "a.png"), "found the suffix '.png', expected .webp or .gif"),
        ((frames / "0.png", frames / "1.png", "--output", tmp_path / "own.gif"), "a file that is not a figure"),
    ):
        Image.new("L", (4, 4)).save(tmp_path / "own.gif")
        with pytest.raises(UserError, match=message) as error:
            run("attention", *words, *MICRO, "--image_size", 32, "--animate")
        assert "\n" not in str(error.value)


def test_features_are_drawn_below_their_images(drawn):
    run("features", *MICRO, "--image_size", 64)
    above, below = drawn[0].axes[::2], drawn[0].axes[1::2]
    assert [axis.get_title() for axis in above] == ["china", "flower"]
    model = visualize.evaluation.open_model(visualize.evaluation.ModelSpec("none", "vit_micro", 8))
    images = [visualize.whole_patches(opened(photograph(name)), 64, 8) for name in ("china", "flower")]
    colors, explained = visualize.features.principal_colors(
        [visualize.features.patch_features(model.backbone, x) for x in images], images
    )
    for axis, color in zip(below, colors, strict=True):
        assert (np.asarray(axis.images[0].get_array())[4::8, 4::8] == color).all()
    assert f"({explained[0]:.0%}, " in drawn[0].texts[0].get_text()


def ends_of(lines, columns_a, columns_b, patch_size):
    """Return the patches that lines connect: pairs of the teacher's and the student's token."""
    ends = [tuple(int(v + 0.5) // patch_size for xy in (line.xy1, line.xy2) for v in xy) for line in lines]
    return [(1 + columns_a * ya + xa, 1 + columns_b * yb + xb) for xa, ya, xb, yb in ends]


def some(pairs):
    """Return the pairs that are drawn with a line: nine, spread over all."""
    return pairs if len(pairs) <= 9 else [pairs[round(i * (len(pairs) - 1) / 8)] for i in range(9)]


def test_matches_draws_and_counts_the_agreement(drawn, capsys):
    run("matches", *MICRO, "--global_crops_size", 64, "--local_crops_size", 32, "--pairs", 3, "--seed", 2)
    (figure,) = drawn
    backbone = visualize.evaluation.open_model(visualize.evaluation.ModelSpec("none", "vit_micro", 8, seed=2)).backbone
    image = opened(photograph("china"))
    agree, near, total = 0, 0, 0
    crop = MultiCrop(global_size=64, local_size=32, local_number=1, geometry="image", seed=2)  # the training's
    for seed in (0, 1, 2):
        views = crop([image], [0], seed, 0)
        boxes, flips, crops = ([views[i][name][0] for i in (0, 2)] for name in (1, 2, 0))
        idx_a, idx_b = match_patches(boxes[0], flips[0], (8, 8), boxes[1], flips[1], (4, 4))
        a, b = (backbone(normal(figures.to_picture(x)).float())[0, 1:].detach().double() for x in crops)
        found = []
        for i, j in zip(idx_a[1:].tolist(), idx_b[1:].tolist(), strict=True):
            cosines = [float(x @ b[j - 1] / x.norm() / b[j - 1].norm()) for x in a]
            found.append(1 + int(np.argmax(cosines)))
            agree += found[-1] == i
            near += max(abs((found[-1] - 1) // 8 - (i - 1) // 8), abs((found[-1] - 1) % 8 - (i - 1) % 8)) <= 1
        total += len(found)
        if seed == 0:
            first, share = (idx_a[1:].tolist(), idx_b[1:].tolist(), found), np.mean(idx_a[1:].numpy() == found)
    expected = f"{total} matched patches in 3 pairs of views; nearest features: {agree / total:.1%} on the same patch "
    assert expected + f"(chance 1.6%), {near / total:.1%} within one patch\n" in capsys.readouterr().out
    lines = [artist for artist in figure.artists if isinstance(artist, ConnectionPatch)]
    tokens = ends_of(lines, 8, 4, 8)
    idx_a, idx_b, found = first
    assert tokens == some(list(zip(idx_a, idx_b, strict=True))) + some(list(zip(found, idx_b, strict=True)))
    colors = [patch.get_facecolor()[:3] for patch in figure.axes[3].patches]
    found_rows, rows = (np.array([[(i - 1) // 8, (i - 1) % 8] for i in tokens]) for tokens in (found, idx_a))
    far = np.abs(found_rows - rows).max(1).clip(max=2).tolist()
    assert colors == [to_rgb((figures.SAME, figures.ADJACENT, figures.OTHER)[i]) for i in far]
    assert len(set(far)) > 1
    assert f"By features\n{share:.0%} the same" in [axis.get_title() for axis in figure.axes]


def test_matches_without_weights_draws_what_geometry_says(drawn, monkeypatch, capsys):
    monkeypatch.setattr(visualize.evaluation, "open_model", None)
    run("matches", "--seed", 1, "--pairs", 2)
    (figure,) = drawn
    assert len(figure.axes) == 3
    image = opened(photograph("china"))
    matched = []
    for epoch in (0, 1):
        teacher, _, student = MultiCrop(local_number=1, geometry="image", seed=1)([image], [0], epoch, 0)
        geometry = (teacher.boxes[0], teacher.flips[0], (14, 14), student.boxes[0], student.flips[0], (6, 6))
        idx_a, idx_b = match_patches(*geometry)
        matched.append(list(zip(idx_a[1:].tolist(), idx_b[1:].tolist(), strict=True)))
    assert ends_of(figure.artists, 14, 6, 16) == some(matched[0])
    assert f"{sum(map(len, matched))} matched patches in 2 pairs of views\n" in capsys.readouterr().out


def test_options_say_which_views_are_matched(drawn, capsys):
    sizes = ("--patch_size", 8, "--global_crops_size", 64, "--local_crops_size", 40)
    scales = ("--global_crops_scale", 1, 1, "--local_crops_scale", 0.25, 0.25)
    counts = {}
    for rule in ("paper", "nearest"):
        run("matches", "chelsea", *sizes, *scales, "--matching", rule, "--seed", 5)
        counts[rule] = int(re.match(r"\d+(?= matched patches)", capsys.readouterr().out)[0])
    assert counts["nearest"] == 25  # the teacher's box holds the student's
    assert 0 < counts["paper"] < 25
    whole, teacher, student = drawn[0].axes
    assert [axis.images[0].get_array().shape[:2] for axis in (teacher, student)] == [(64, 64), (40, 40)]
    boxes = [(box.get_height(), box.get_width()) for box in whole.patches[:2]]
    shares = np.prod(boxes, 1) / np.prod(whole.images[0].get_array().shape[:2])
    np.testing.assert_allclose(shares, [1, 0.25], rtol=0.35)


def test_the_same_views_are_drawn_with_weights(drawn):
    views = ("matches", "--global_crops_size", 64, "--local_crops_size", 32, "--patch_size", 8, "--seed", 3)
    run(*views)
    run(*views, "--pretrained_weights", "none", "--arch", "vit_micro")
    plain, learned = drawn
    boxes, same_boxes = ([box.get_bbox().bounds for box in figure.axes[0].patches] for figure in drawn)
    assert boxes == same_boxes
    lines = ends_of(plain.artists, 8, 4, 8)
    assert len(lines) > 0
    assert ends_of(learned.artists, 8, 4, 8)[: len(lines)] == lines
    assert [axis.get_ylabel() for axis in plain.axes] == [axis.get_ylabel() for axis in learned.axes[:3]]


def test_nearest_images_are_ranked(drawn, photo_folder, capsys):
    query = photo_folder / "val/china/0.jpg"
    run("neighbours", query, photo_folder / "val", *MICRO, "--k", 3, "--num_workers", 0)
    backbone = visualize.evaluation.open_model(visualize.evaluation.ModelSpec("none", "vit_micro", 8)).backbone
    transform = visualize.features.eval_transform(224)

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
        assert (np.asarray(axis.images[0].get_array()) == opened(others[i])).all()


def test_nearest_patches_are_ranked(drawn, photo_folder, capsys):
    paths = [photo_folder / "val/china/0.jpg", photo_folder / "val/flower/0.jpg"]  # 300x240
    run("neighbours", *paths, *MICRO, "--patch", 150, 60, "--k", 4, "--image_size", 64)
    backbone = visualize.evaluation.open_model(visualize.evaluation.ModelSpec("none", "vit_micro", 8)).backbone
    images = [visualize.whole_patches(opened(path), 64, 8) for path in paths]  # 8 by 10 patches
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
    heat = np.asarray(drawn[0].axes[1].images[0].get_array())[4::8, 4::8].reshape(80, 3)
    low = (everything @ everything[query]).min()
    shares = (everything[:80] @ everything[query] - low) / (1 - low)
    np.testing.assert_allclose(heat, 255 * figures.HEAT(shares.numpy())[:, :3], atol=3)
    frames = [(p.get_x() + 0.5, p.get_y() + 0.5) for p in drawn[0].axes[0].patches]
    assert frames[-1] == (40, 16)  # the query
    assert sorted(frames[:-1]) == sorted((8.0 * (i % 10), 8.0 * (i // 10)) for i in best if i < 80)

    folder = photo_folder / "val"  # has the query, which is not counted twice
    run("neighbours", paths[0], folder, *MICRO, "--patch", 150, 60, "--k", 300, "--image_size", 64, "--exclude_self")
    printed = capsys.readouterr().out.splitlines()[:-1]
    count = len(list(folder.rglob("*.jpg")))
    assert len(printed) == min(80 * (count - 1), 300)
    assert not any(line.endswith("of 0") for line in printed)
    assert "its 300 nearest in other images (blue)" in drawn[1].texts[0].get_text()
    assert len(drawn[1].axes) == 2 * count
    assert len(drawn[1].axes[0].patches) == 1  # the query
    best = [float(cosines[i]) for i in cosines.argsort(descending=True) if i >= 80]
    of_flower = [float(line.split()[0]) for line in printed if line.endswith("of 0 (4)")]
    assert len(of_flower) > 9
    assert of_flower == pytest.approx(best[: len(of_flower)], abs=1e-3)


def test_map_has_a_point_for_each_image(drawn, photo_folder, capsys):
    words = ["--data_path", photo_folder, "--split", "train", "--crop_size", 32, "--num_workers", 0]
    run("map", *MICRO, *words, "--seed", 1)
    (axis,) = drawn[0].axes
    assert [len(points.get_offsets()) for points in axis.collections] == [6, 6]
    assert [points.get_label() for points in axis.collections] == ["1: china", "2: flower"]
    title = "t-SNE of the CLS features of 12 images of 2 classes, train split"
    assert drawn[0].texts[0].get_text() == title == capsys.readouterr().out.splitlines()[0]
    colors = {tuple(points.get_facecolor()[0]) for points in axis.collections}
    assert len(colors) == 2
    # Even an untrained network separates crops of two such different photographs.
    a, b = (points.get_offsets().data for points in axis.collections)
    nearest = [np.argsort(np.linalg.norm(np.concatenate([a, b]) - p, axis=1))[1] for p in np.concatenate([a, b])]
    assert sum((i < 6) == (n < 6) for i, n in enumerate(nearest)) >= 10


def test_map_of_a_part_of_the_images(drawn, photo_folder):
    words = ["--data_path", photo_folder, "--crop_size", 32, "--num_workers", 0, "--train_images", 10]
    run("map", *MICRO, *words, "--split", "train")
    run("map", *MICRO, *words, "--split", "train", "--tuning")
    for _ in range(2):
        run("map", *MICRO, *words, "--split", "train", "--max_images", 6)
    run("map", *MICRO, *words[:-2], "--data_path", photo_folder / "train", "--split", "val")
    assert drawn.pop().texts[0].get_text().endswith("12 images of 2 classes of a data set without splits")
    points = [np.concatenate([c.get_offsets() for c in figure.axes[0].collections]) for figure in drawn]
    assert list(map(len, points)) == [10, 8, 6, 6]
    np.testing.assert_array_equal(points[2], points[3])


def test_names_are_shown_as_they_are(drawn, tmp_path, capsys):
    for name in ("$x_$", "_a", os.fsdecode(b"\xff\xfe")):
        Image.new("RGB", (40, 32), "red").save(tmp_path / f"{name}.png")
    run("neighbours", tmp_path / "_a.png", tmp_path, *MICRO, "--num_workers", 0)
    run("features", tmp_path, *MICRO, "--image_size", 32)
    titles = [axis.get_title().removesuffix("\nno structure") for axis in drawn[-1].axes[::2]]
    assert sorted(titles) == sorted(["$x_$", " _a", "\ufffd\ufffd"])
    assert "\ufffd\ufffd.png" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("features", *MICRO, "--image_size", 32), ("matches",)])
def test_files_are_written(tmp_path, capsys, words):
    files = [tmp_path / "new" / name for name in ("a.png", "a.pdf")]
    run(*words, "--output", *files)
    with Image.open(files[0]) as picture:
        assert picture.width == pytest.approx(figures.WIDTH * 200, abs=1)
    assert files[1].read_bytes().startswith(b"%PDF")
    assert f"drawn in {files[0]}, {files[1]}" in capsys.readouterr().out


@pytest.mark.parametrize("weights", [MICRO, ["--patch_size", 8]])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--local_crops_size 30",
            "--local_crops_size 30 is not a multiple of --patch_size 8; the nearest is 32",
        ),
        ("--global_crops_scale 0.5 0.4", "--global_crops_scale 0.5 0.4: expected two positive fractions"),
    ],
)
def test_views_that_cannot_be_are_refused(tmp_path, capsys, weights, words, message):
    with pytest.raises(SystemExit) as stopped:
        run("matches", *words.split(), *weights, "--output", tmp_path / "x.png")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_only_matches_does_without_weights(capsys):
    with pytest.raises(SystemExit):
        run("attention")
    assert "required: --pretrained_weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("attention --image_size 4", "images of side 4 are smaller than a patch of 8 pixels"),
        ("matches absent.png", "cannot read image absent.png"),
        ("features --output a.jpg", "cannot write a.jpg: found the suffix '.jpg', expected .png or .pdf"),
        ("features --output {tiny}/a.png", "cannot write to the folder of --output .*tiny.png: File exists"),
        ("attention {wide} --image_size 8", "found 1x9000 patches, more than 8000: give a smaller --image_size"),
        ("matches --local_crops_size 1600", "--local_crops_size 1600 has 10000 patches, more than 8000"),
        ("matches {flat}", "cannot read image .*flat: not a regular file"),
        ("neighbours {photo}", "found no image to compare .* with"),
        ("neighbours {photo} {photo} --patch 1 1 --exclude_self", "found no image to compare .* with"),
        ("neighbours {photo} {flat} --exclude_self", "--exclude_self needs --patch: the query is never among"),
        ("neighbours {photo} --patch 300 10", "--patch 300 10 lies outside .*which has 300x240 pixels"),
        ("map --data_path {flat}", "flat has no labels or only one: expected at least two class subfolders"),
        ("map", "--dataset folder needs --data_path"),
    ],
)
def test_bad_input_is_one_line(tmp_path, photo_folder, words, message):
    tiny, flat, wide = (tmp_path / name for name in ("tiny.png", "flat", "wide.png"))
    flat.mkdir()
    sizes = {tiny: (5, 9), flat / "a.png": (50, 90), wide: (72000, 8)}
    for path, size in sizes.items():
        Image.new("RGB", size).save(path)
    words = words.format(tiny=tiny, flat=flat, wide=wide, photo=photo_folder / "val/china/0.jpg").split()
    output = [] if "--output" in words else ["--output", tmp_path / "x.png"]
    with pytest.raises(UserError, match=message) as error:
        run(words[0], *([] if words[0] == "matches" else MICRO), *words[1:], *output)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.png").exists()


def test_uniform_images_have_no_structure(drawn, tmp_path):
    for i, color in enumerate(("black", "gray")):
        Image.new("RGB", (40, 32), color).save(tmp_path / f"{i}.png")
    run("features", tmp_path, "china", *MICRO, "--image_size", 32)
    assert ["no structure" in axis.get_title() for axis in drawn[0].axes[::2]] == [True, True, False]
    principal_colors = visualize.features.principal_colors
    colors, explained = principal_colors([torch.randn(4, 4, 8)], [np.zeros((8, 8, 3), np.uint8)])
    assert (colors[0] == colors[0][0, 0]).all()
    assert not explained.any()
    colors, _ = principal_colors([torch.ones(4, 4, 8)], [np.arange(192, dtype=np.uint8).reshape(8, 8, 3)])
    assert (colors[0] == colors[0][0, 0]).all()


def test_images_of_one_name_are_all_drawn(drawn, tmp_path, photo_folder):
    for name in ("a/x.jpg", "b/x (3).jpg", "c/x.jpg", "d/x.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes((photo_folder / "val/china/0.jpg").read_bytes())
    run("features", *sorted(tmp_path.iterdir()), *MICRO, "--image_size", 32)
    assert len({axis.get_title() for axis in drawn[0].axes[::2]}) == 4


def test_only_images_that_are_drawn_are_opened(drawn, tmp_path, photo_folder, capsys):
    (tmp_path / "0.jpg").write_bytes((photo_folder / "val/china/0.jpg").read_bytes())
    (tmp_path / "1.jpg").touch()  # cannot be read
    run("attention", tmp_path, *MICRO, "--image_size", 32, "--max_images", 1)
    assert "found 2 images, drawing the first 1: see --max_images" in capsys.readouterr().err
