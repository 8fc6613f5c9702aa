import contextlib
import importlib.util
import io
import json
import pickle
import struct
import subprocess
import sys
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
from conftest import ROOT, open_dataset
from PIL import Image
from torchvision.transforms import InterpolationMode

import eval_knn
import main_lgssl
from support import sources
from support.checkpoints import hash_of_names
from support.decoding import image_size, image_suffixes, read_image
from support.evaluation import check_splits, open_splits
from support.features import eval_transform, to_pixels
from support.folders import listed_images
from support.images import ImageList, ResizedArray
from support.sources import DataSpec, data_spec
from utils import UserError


@pytest.fixture
def gradient():
    """Return 8-bit RGB pixels [16, 24, 3]."""
    y, x = np.mgrid[:16, :24]
    return np.stack([10 * x, 15 * y, 5 * (x + y)], -1).astype(np.uint8)


def test_plain_modes_decode_to_rgb(tmp_path, gradient):
    for mode in ("RGB", "L", "1", "CMYK"):
        image = Image.fromarray(gradient).convert(mode)
        image.save(tmp_path / "i.tif")
        assert np.array_equal(np.asarray(read_image(tmp_path / "i.tif")), np.asarray(image.convert("RGB")))


def test_transparent_parts_are_white(tmp_path, gradient):
    alpha = np.zeros((16, 24, 1), np.uint8)
    alpha[:8], alpha[8:12] = 255, 128
    pixels = np.concatenate([gradient, alpha], -1)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    Image.fromarray(pixels).convert("LA").save(tmp_path / "la.png")
    read = np.asarray(read_image(tmp_path / "rgba.png")).astype(float)
    assert np.array_equal(read[:8], gradient[:8])
    assert np.abs(read[8:12] - (128.0 * gradient[8:12] + 127 * 255) / 255).max() <= 1
    assert (read[12:] == 255).all()
    assert (np.asarray(read_image(tmp_path / "la.png"))[12:] == 255).all()
    palette = Image.fromarray(gradient).quantize(16)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    assert read_image(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation(tmp_path, gradient):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    Image.fromarray(gradient).save(tmp_path / "i.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "i.png")), np.rot90(gradient, -1))


def png_header(width, height):
    """Return a PNG whose header claims many pixels, with hardly any data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def test_hostile_images_have_their_documented_outcome(tmp_path, gradient, monkeypatch):
    """The table of read_image's docstring; except for the cases of other tests."""
    image = Image.fromarray(gradient)
    other = Image.fromarray(255 - gradient)
    image.save(tmp_path / "animated.gif", save_all=True, append_images=[other, other])
    image.save(tmp_path / "animated.png", save_all=True, append_images=[other])
    image.save(tmp_path / "pages.tif", save_all=True, append_images=[other])
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    image.save(tmp_path / "exif.jpg", quality=100, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x07garbage")
    image.save(tmp_path / "icc.jpg", quality=100, icc_profile=b"no profile" * 99)
    for path in tmp_path.iterdir():
        read = np.asarray(read_image(path)).astype(int)
        assert read.shape == (16, 24, 3)
        assert np.abs(read - gradient).mean() < 8, path.name  # and not the other picture
    for width, height in ((1, 1), (20000, 10)):
        Image.new("RGB", (width, height), "red").save(tmp_path / "odd.png")
        read = read_image(tmp_path / "odd.png")
        assert (read.size, read.getpixel((0, 0))) == ((width, height), (255, 0, 0))
        assert ResizedArray(32)(read)[5, 5].tolist() == [255, 0, 0]

    def bad(name, contents):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(UserError, match=f"cannot read image {tmp_path}/{name}: ") as error:
            read_image(tmp_path / name)
        assert len(str(error.value).splitlines()) == 1
        return str(error.value)

    assert "13000x13000 pixels are more than 67108864" in bad("bomb.png", png_header(13000, 13000))
    bad("larger.png", png_header(60000, 60000))  # by Pillow's own limit
    buffer = io.BytesIO()
    image.save(buffer, "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("a program was started"))
    bad("eps.jpg", buffer.getvalue())
    for name, contents in {"empty.jpg": b"", "text.jpg": b"no image", "html.png": b"<html></html>"}.items():
        bad(name, contents)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    bad("truncated.png", buffer.getvalue()[:60])


def save(path, gradient):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(gradient).save(path)


def test_folders_flat_nested_and_split(tmp_path, gradient):
    for name in ("flat/b.png", "flat/a.jpg", "classes/x/1.png", "classes/y/deep/er/2.PNG", "classes/top.png"):
        save(tmp_path / name, gradient)
    (tmp_path / "flat" / "notes.txt").write_text("no image")
    flat = open_dataset("folder", tmp_path / "flat")
    assert [Path(path).name for path in flat.paths] == ["a.jpg", "b.png"]
    assert flat.labels == [-1, -1]
    classes = open_dataset("folder", tmp_path / "classes")
    assert [(Path(path).name, label) for path, label in zip(classes.paths, classes.labels, strict=True)] == [
        ("top.png", -1),
        ("1.png", 0),
        ("2.PNG", 1),
    ]
    assert classes.classes == ["x", "y"]
    for name in ("split/train/x/1.png", "split/val/x/2.png", "train/1.png", "other/2.png"):
        save(tmp_path / name, gradient)
    assert [Path(p).name for p in open_dataset("folder", tmp_path / "split", "train").paths] == ["1.png"]
    assert [Path(p).name for p in open_dataset("folder", tmp_path / "split", "val").paths] == ["2.png"]


def test_images_are_resized_to_a_square_or_kept(tmp_path, gradient):
    save(tmp_path / "i.png", gradient)
    image, _ = open_dataset("folder", tmp_path, transform=ResizedArray(20))[0]
    expected = np.asarray(Image.fromarray(gradient).resize((20, 20), Image.Resampling.BILINEAR))
    assert np.abs(image.astype(int) - expected).max() <= 1
    assert (image.shape, image.dtype) == ((20, 20, 3), np.uint8)
    image, _ = open_dataset("folder", tmp_path, transform=ResizedArray(0))[0]
    assert np.array_equal(image, gradient)


def test_a_large_jpeg_is_decoded_at_reduced_size(tmp_path, photographs):
    photographs[0].save(tmp_path / "i.jpg", quality=95)
    photographs[0].save(tmp_path / "i.png")
    width, height = photographs[0].size  # 640 x 427
    sides = {None: 1, 428: 1, 427: 1, 214: 1, 213: 2, 107: 2, 106: 4, 53: 8, 10: 8}
    for min_side, reduction in sides.items():
        size = read_image(tmp_path / "i.jpg", min_side).size
        assert size == (-(-width // reduction), -(-height // reduction)), min_side
    assert read_image(tmp_path / "i.png", 53).size == (640, 427)
    # Decoded at a quarter and then halved, a picture is what it is decoded whole and resized.
    resize = ResizedArray(53)
    unreduced = resize(read_image(tmp_path / "i.jpg"))
    (reduced, _), *_ = open_dataset("folder", tmp_path, transform=resize, min_side=106)
    assert not np.array_equal(reduced, unreduced)
    assert np.abs(reduced.astype(int) - unreduced).mean() < 2


def test_hidden_folders_are_left_out_at_every_depth(tmp_path, gradient):
    hidden = (".ipynb_checkpoints", ".thumbnails/deep", "__MACOSX", "@eaDir/x")
    root = tmp_path / ".cache/x"  # which the user names
    for name in ("a", "b"):
        save(root / name / "1.png", gradient)
        for folder in hidden:
            for place in (root / folder, root / name / folder, root / name / "deep" / folder):
                save(place / "2.png", gradient)
    save(root / "a/._1.png", gradient)
    expected = [str(root / "a/1.png"), str(root / "b/1.png")]
    assert list(open_dataset("folder", root).paths) == expected == list(map(str, listed_images(root)))
    assert list(open_dataset("folder", root / "a/.ipynb_checkpoints").paths) == [f"{root}/a/.ipynb_checkpoints/2.png"]
    (tmp_path / "classes").write_text("@eaDir\n.thumbnails\n")
    assert open_dataset("folder", root, classes=tmp_path / "classes").classes == ["@eaDir", ".thumbnails"]
    (tmp_path / "list").write_text(".cache/x/a/.thumbnails/deep/2.png\n")
    assert len(open_dataset("folder", tmp_path / "list")) == 1


FORMATS = {"A.JPG": "JPEG", "b.jfif": "JPEG", "c.jpe": "JPEG", "d.png": "PNG", "e.pnm": "PPM"}


def write_formats(folder, pixels, formats):
    for name, kind in formats.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name, kind)


def test_what_was_found_is_said(tmp_path, gradient, capsys):
    formats = {f"{split}/{c}/{name}": FORMATS[name] for split in ("train", "val") for c in "xy" for name in FORMATS}
    write_formats(tmp_path, gradient, formats)
    for name in ("y/a.jp2", "y/README", "x/deep/b.JP2", ".git/x", "x/c.npy", "x/.DS_Store"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).touch()
    train = open_dataset("folder", tmp_path)
    for image, _ in train:
        assert np.abs(np.asarray(image).astype(int) - gradient).mean() < 8
    found = "10 images (6 JPEG, 2 PNG, 2 PPM) in 2 classes from folder names; train split of"
    ignored = "4 other files ignored (.jp2 2, without suffix 1, .npy 1)"
    assert train.describe() == f"{found} {tmp_path}; {ignored}"
    some = open_dataset("folder", tmp_path / "train/x", train_images=2)
    formats = "(3 JPEG, 1 PNG, 1 PPM)"
    assert some.describe().startswith(f"2 of 5 images {formats} without classes; all of {tmp_path}/train/x; 2 other")
    assert open_dataset("digits", split="val").describe() == "397 images in 10 classes; val split of digits"
    train.announce()
    assert capsys.readouterr().err == f"{train.describe()}\n"


@pytest.mark.parametrize(
    ("kind", "suffixes"), [("AVIF", [".avif"]), ("HEIF", [".heic", ".heif", ".hif"])], ids=["avif", "heif"]
)
def test_formats_of_phones(tmp_path, gradient, kind, suffixes):
    if kind not in image_suffixes().values():
        pytest.skip("needs Pillow 11.3 for AVIF, pillow-heif for HEIF")
    write_formats(tmp_path, gradient, {f"{i}{suffix}": kind for i, suffix in enumerate(suffixes)})
    images = open_dataset("folder", tmp_path)
    assert images.describe().startswith(f"{len(suffixes)} images ({len(suffixes)} {kind}) without classes")
    for image, _ in images:
        assert np.abs(np.asarray(image).astype(int) - gradient).mean() < 8


def test_a_protocol_says_once_that_it_ignores_the_orientation(tmp_path, gradient, capsys):
    exif = Image.Exif()
    exif[0x0112] = 8
    for split in ("train", "val"):
        for name in ("x/0.tif", "x/1.jpg", "y/0.jpg", "y/1.png"):  # Pillow turns TIFFs itself
            save(tmp_path / split / name, gradient)
            Image.fromarray(gradient).save(tmp_path / split / name, exif=exif if split == "train" else b"")
    transforms = {"train": None, "val": None}
    splits = open_splits(DataSpec("folder", tmp_path), transforms)
    assert [image.size for image, _ in splits["train"]] == [(16, 24), (24, 16), (24, 16), (24, 16)]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: {tmp_path}/train/x/1.jpg has an EXIF orientation: evaluations ignore it")
    assert {image.size for image, _ in open_dataset("folder", tmp_path)} == {(16, 24)}
    ImageList(splits["train"].paths, upright=False).use_intensity_range(None)  # as for copy detection
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path}/train/x/1.jpg has")
    for each in ("val", "train/x"):  # nothing to turn; no protocol, since there are no labels
        images = open_dataset("folder", tmp_path / each)
        with contextlib.suppress(UserError):
            check_splits({"train": images}, each)
    assert not capsys.readouterr().err


def test_class_names_are_compared_in_composed_unicode(tmp_path, gradient):
    """As macOS decomposes them: the order of folders on the disk then differs between the splits, the labels do not."""
    for split, form in (("train", "NFD"), ("val", "NFC")):
        for i, name in enumerate(("café", "cafz", "한글")):
            save(tmp_path / split / unicodedata.normalize(form, name) / "1.png", gradient // (i + 1))
    splits = open_splits(DataSpec("folder", tmp_path), {"train": None, "val": None})
    for images in splits.values():
        assert images.classes == [unicodedata.normalize("NFC", name) for name in ("cafz", "café", "한글")]
        for image, label in images:
            assert np.asarray(image).max() == (gradient // ([2, 1, 3][label])).max()
    for form in ("NFC", "NFD"):
        (tmp_path / "list").write_text(unicodedata.normalize(form, "한글\ncafé\n"), encoding="utf-8")
        for split in ("train", "val"):
            some = open_dataset("folder", tmp_path, split, classes=tmp_path / "list")
            assert some.classes == [unicodedata.normalize("NFC", name) for name in ("한글", "café")]


@pytest.mark.parametrize("name", ["dog ", "Dog", "d og"])
def test_classes_that_differ_in_spaces_or_case_are_named(tmp_path, gradient, name):
    for folder in ("train/cat", "train/dog", "val/cat", f"val/{name}"):
        save(tmp_path / folder / "1.png", gradient)
    expected = f"and {name!r} in val differs from 'dog' in train only in spaces or case: expected {tmp_path}/train/"
    with pytest.raises(UserError, match=expected):
        open_splits(DataSpec("folder", tmp_path), {"train": None, "val": None})


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="no folder .*nowhere"):
        open_dataset("folder", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images below"):
        open_dataset("folder", tmp_path)


def test_subset_by_a_list_of_classes(tmp_path, gradient):
    for name in ("n01", "n02", "n03"):
        save(tmp_path / "train" / name / "1.png", gradient)
        save(tmp_path / "val" / name / "1.png", gradient)
    (tmp_path / "list.txt").write_text("n03\nn01\n")
    subset = open_dataset("folder", tmp_path, "val", classes=tmp_path / "list.txt")
    assert [Path(path).parent.name for path in subset.paths] == ["n03", "n01"]
    assert subset.classes == ["n03", "n01"]
    for words, first in (({}, "n01440764"), ({"classes": "cmc"}, "n01558993")):
        with pytest.raises(UserError, match=f"train lacks 100 of the 100 class folders .* the first is {first}"):
            open_dataset("imagenet100", tmp_path, **words)


def test_imagenet100_has_two_lists(tmp_path, monkeypatch):
    lists = {name: (ROOT / f"recipes/imagenet100_{name}.txt").read_text().split() for name in ("kaggle", "cmc")}
    assert [len(set(names)) for names in (*lists.values(), lists["kaggle"] + lists["cmc"])] == [100, 100, 192]
    for name in {*lists["kaggle"], *lists["cmc"]}:
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    assert open_dataset("imagenet100", tmp_path).classes == lists["kaggle"]
    for name, names in lists.items():
        file = ROOT / f"recipes/imagenet100_{name}.txt"
        for classes in (name, file):
            assert open_dataset("imagenet100", tmp_path, classes=classes).classes == names
            assert open_dataset("folder", tmp_path, classes=classes).classes == names
        (tmp_path / f"{name}.txt").symlink_to(file)
        monkeypatch.chdir(ROOT)
        for path in (name, file, f"recipes/{file.name}", tmp_path / f"{name}.txt"):
            assert main_lgssl.parse_arguments(["--classes", str(path)]).classes == name
    assert main_lgssl.parse_arguments(["--classes", "recipes/paper.json"]).classes == f"{ROOT}/recipes/paper.json"


@pytest.fixture
def kaggle(tmp_path, gradient):
    """Return a folder as Kaggle's archive of ImageNet-100 unpacks, with classes in one part and in two."""
    train = "X1/n2 X2/n1 X2/n3 X3/n4 X4/n1 X4/n5".split()
    for name in [f"train.{name}/{i}" for name in train for i in range(2)] + [f"val.X/n{i}/1" for i in range(1, 6)]:
        save(tmp_path / "K" / f"{name}.JPEG", gradient)
    (tmp_path / "K/Labels.json").write_text("{}")
    return tmp_path / "K"


def test_the_parts_of_kaggle_are_one_data_set(kaggle, tmp_path, monkeypatch):
    names = [f"n{i}" for i in range(1, 6)]
    splits = open_splits(DataSpec("folder", kaggle), {"train": None, "val": None})
    for split, files in (("train", kaggle.glob("train.X*/*/*")), ("val", kaggle.glob("val.X/*/*"))):
        images = splits[split]
        assert (sorted(map(Path, images.paths)), images.classes) == (sorted(files), names)
        assert [names[label] for label in images.labels] == [Path(path).parent.name for path in images.paths]
    found = main_lgssl.open_images(main_lgssl.parse_arguments(["--data_path", str(kaggle)]))
    assert found.found == f"12 images (12 JPEG) in 5 classes from folder names; train split of {kaggle}"
    assert found.online_knn.labels["val"].bincount().tolist() == [1] * 5
    hashes = [hash_of_names(splits["train"])]
    for here, root in ((kaggle, "."), (tmp_path, "./K/"), (kaggle / "val.X", "..")):
        monkeypatch.chdir(here)
        hashes.append(hash_of_names(open_dataset("folder", root)))
    assert len(set(hashes)) == 1
    (tmp_path / "list").write_text("n5\nn1\n")
    for split, counts in (("train", [2, 4]), ("val", [1, 1])):
        some = open_dataset("imagenet100", kaggle, split, classes=tmp_path / "list")
        assert (some.classes, np.bincount(some.labels).tolist()) == (["n5", "n1"], counts)
    (tmp_path / "list").write_text("n6\nn1\n")
    with pytest.raises(UserError, match=f"^{kaggle} lacks 1 of the 2 class folders in .*, the first is n6; see --cl"):
        open_dataset("imagenet100", kaggle, classes=tmp_path / "list")


@pytest.mark.parametrize("missing", ["val.X", "train.X3"])
def test_parts_of_kaggle_that_lack_one_are_refused(kaggle, missing):
    (kaggle / missing).rename(kaggle.parent / "x")
    with pytest.raises(UserError, match=f"K lacks {missing}: expected all of Kaggle's ImageNet-100, train.X1, "):
        open_dataset("folder", kaggle)


def test_digits_are_a_fixed_split_of_all_images():
    train, val = open_dataset("digits", split="train"), open_dataset("digits", split="val")
    assert (len(train), len(val)) == (1400, 397)
    assert (train[0][0].size, train[0][0].mode) == ((8, 8), "RGB")
    assert train.pixels.max() == 255
    from sklearn.datasets import load_digits

    together = np.concatenate([train.pixels, val.pixels]).reshape(1797, -1)
    every = np.round(load_digits().images * 255 / 16).reshape(1797, -1)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, every.tolist()))


needs_elpv = pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="needs elpv-dataset")


def write_elpv(folder, cells=44):
    """Write a package elpv_dataset in its true layout, whose defective cells have a dark bar."""
    data = folder / "elpv_dataset/data"
    (data / "images").mkdir(parents=True)
    (folder / "elpv_dataset/__init__.py").touch()
    rng, lines = np.random.default_rng(0), []
    for i in range(cells):
        probability = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")[i % 4]
        pixels = rng.integers(90, 160, (300, 300), np.uint8)
        pixels[100:140] //= 1 if i % 4 < 2 else 4
        Image.fromarray(pixels).save(data / f"images/cell{i + 1:04}.png")
        lines.append(f"images/cell{i + 1:04}.png  {probability:<19}  {'mono' if i % 3 else 'poly'}\n")
    (data / "labels.csv").write_text("".join(lines))
    return data


def assert_stratified(data):
    """Compare elpv with its labels.csv and return the sizes of the splits."""
    rows = [line.split() for line in (data / "labels.csv").read_text().splitlines()]
    described = {str(data / name): (int(float(probability) > 0.4999), kind) for name, probability, kind in rows}
    train, val = (open_dataset("elpv", split=split) for split in ("train", "val"))
    assert sorted([*train.paths, *val.paths]) == sorted(described)
    groups = []
    for dataset in (train, val):
        assert dataset.classes == ["functional", "defective"]
        assert dataset.labels == [described[path][0] for path in dataset.paths]
        groups.append(Counter(described[path] for path in dataset.paths))
    counts = Counter(described.values())
    assert len(counts) == 4
    for group, count in counts.items():
        assert abs(groups[0][group] - 0.75 * count) <= 0.5
        assert abs(groups[1][group] - 0.25 * count) <= 0.5
    assert list(open_dataset("elpv", split="val").paths) == list(val.paths)
    image, _ = val[0]
    assert (image.size, image.mode) == ((300, 300), "RGB")
    assert np.array_equal(np.asarray(image)[..., 1], np.asarray(Image.open(val.paths[0])))
    return len(train), len(val)


@needs_elpv
def test_solar_cells_are_split_with_equal_proportions():
    data = Path(importlib.util.find_spec("elpv_dataset").origin).parent / "data"
    assert assert_stratified(data) == (1969, 655)
    names = [Path(path).stem for path in open_dataset("elpv", split="val").paths]
    assert names[:4] == ["cell0002", "cell0003", "cell0005", "cell0009"]  # the split of published results


def test_solar_cells_of_a_small_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)  # hides an installed package
    assert assert_stratified(write_elpv(tmp_path)) == (32, 12)  # of groups of 15, 14, 8 and 7


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)])
def test_solar_cells_need_their_package(monkeypatch, spec):
    """A folder without __init__.py has a spec without origin."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(UserError, match="which comes with elpv-dataset: pip install --upgrade elpv-dataset$"):
        open_dataset("elpv")


FASHION = "torchvision:FashionMNIST"


def idx(array):
    """Return the contents of an idx file of bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion_mnist(root):
    """Write the four files of Fashion-MNIST where torchvision expects them, 30 and 12 images: noise around a gray level
    of the class."""
    folder = root / "FashionMNIST/raw"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", 30), ("t10k", 12)):
        labels = rng.permutation(np.arange(count) % 10).astype(np.uint8)
        pixels = (25 * labels[:, None, None] + rng.integers(0, 25, (count, 28, 28))).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            (folder / f"{name}-{kind}-ubyte").write_bytes(idx(array))
    return root


def noise_folder(folder, splits=(("train", 12), ("val", 3))):
    """Write unlike images in the classes x and y."""
    rng = np.random.default_rng(0)
    for split, count in splits:
        for name in "xy":
            for i in range(count):
                save(folder / split / name / f"{i}.png", rng.integers(0, 256, (8, 8, 3), np.uint8))
    return folder


def contents(dataset):
    """Return the images and labels of a data set as a multiset."""
    return Counter((np.asarray(image).tobytes(), label) for image, label in dataset)


@pytest.mark.parametrize("source", ["folder", "flat", "digits", FASHION])
def test_training_images_are_limited_and_tuned_on(tmp_path, source):
    path, dataset = None, "folder" if source == "flat" else source
    if dataset == "folder":
        path = noise_folder(tmp_path) / ("train" if source == "flat" else "")
    elif source == FASHION:
        path = write_fashion_mnist(tmp_path)

    def opened(split, **options):
        return contents(open_dataset(dataset, path, split, **options))

    whole, val = opened("train"), opened("val")
    n = sum(whole.values())
    some = opened("train", train_images=18)
    assert some.total() == 18
    assert some < whole
    assert len({label for _, label in some}) > 1
    assert opened("val", train_images=18) == val
    assert opened("train", train_images=n) == whole
    for count, all_of_them in ((18, some), (None, whole)):
        parts = [opened(split, train_images=count, tuning=True) for split in ("train", "val")]
        assert parts[1].total() == all_of_them.total() // 5
        assert parts[0] + parts[1] == all_of_them  # as multisets: disjoint and complete
        assert parts == [opened(split, train_images=count, tuning=True) for split in ("train", "val")]
    with pytest.raises(UserError, match=f"--train_images {n + 1} is more than the {n} training images"):
        opened("train", train_images=n + 1)
    with pytest.raises(UserError, match="--tuning holds out a fifth .* found 4, expected at least 5"):
        opened("val", train_images=4, tuning=True)


def test_splits_share_no_image(tmp_path):
    """A folder without train and val is both; with --tuning its images are divided."""
    transforms = {"train": None, "val": None}
    named = {"dataset": "folder", "data_path": noise_folder(tmp_path, [("train", 12)]) / "train"}
    for train_images in (None, 10):
        with pytest.raises(UserError, match="has no subfolders train and val"):
            open_splits(DataSpec(**{**named, "train_images": train_images}), transforms)
    splits = open_splits(DataSpec(**{**named, "tuning": True}), transforms)
    assert [len(splits[split]) for split in ("train", "val")] == [20, 4]
    assert not set(splits["train"].paths) & set(splits["val"].paths)


def test_photographs_are_those_of_scikit_learn_and_scikit_image():
    train, val = (open_dataset("photographs", split=split) for split in ("train", "val"))
    assert train.classes == val.classes
    assert {"china", "flower", "chelsea"} < set(train.classes)
    for dataset, each in ((train, 100), (val, 20)):
        assert np.bincount(dataset.labels).tolist() == [each] * 15
        assert {dataset[i][0].size for i in range(len(dataset))} == {(128, 128)}


def test_crops_for_validation_do_not_overlap_the_others(tmp_path, monkeypatch):
    x = np.broadcast_to(np.arange(500), (320, 500))
    for name in "ab":
        Image.fromarray(np.stack([x // 2, x % 2, 0 * x], -1).astype(np.uint8)).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(sources, "PHOTOGRAPHS", dict.fromkeys("ba"))
    monkeypatch.setattr(sources, "photograph", lambda name: tmp_path / f"{name}.png")
    columns = {}
    for split in ("train", "val"):
        dataset = open_dataset("photographs", split=split, transform=np.asarray)
        assert dataset.classes == ["a", "b"]
        columns[split] = [2 * image[0, :, 0].astype(int) + image[0, :, 1] for image, _ in dataset]
        assert all((np.diff(own) == 1).all() for own in columns[split])
    assert min(map(min, columns["train"])) < 20
    assert 340 < max(map(max, columns["train"])) < 372 == min(map(min, columns["val"]))


def test_photographs_need_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match="comes with scikit-image: pip install --upgrade scikit-image"):
        open_dataset("photographs")


def test_datasets_of_hugging_face_is_found_from_the_root(tmp_path):
    """A package of that name comes after the root on sys.path, like an installed one."""
    package = tmp_path / "installed/datasets/__init__.py"
    package.parent.mkdir(parents=True)
    package.touch()
    code = "import sys; sys.path[:0] = sys.argv[1:]; import datasets; print(datasets.__file__)\n"
    code += "from importlib.util import find_spec; print(find_spec('utils').origin)"
    words = [sys.executable, "-c", code, ROOT, tmp_path / "installed"]
    process = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout.splitlines() == [str(package), str(ROOT / "utils.py")], process.stderr


def test_intensities_are_mapped_linearly_and_clipped(tmp_path):
    floats = np.array([[-9, 0, 0.25, 0.5, 1, 1e9]], np.float32)
    Image.fromarray(floats).save(tmp_path / "float.tif")
    read = read_image(tmp_path / "float.tif", intensity_range=(0, 1))
    assert np.asarray(read)[0, :, 1].tolist() == [0, 0, 63, 127, 255, 255]
    Image.fromarray(np.array([[-5, -1, 0, 1, 70000]], np.int32)).save(tmp_path / "signed.tif")
    read = read_image(tmp_path / "signed.tif", intensity_range=[-1, 1])
    assert np.asarray(read)[0, :, 1].tolist() == [0, 0, 127, 255, 255]
    for name in ("i.png", "i.tif"):
        Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / name)
        assert np.asarray(read_image(tmp_path / name))[0, :, 0].tolist() == [0, 1, 128, 255]
        read = read_image(tmp_path / name, intensity_range=(257, 32896))
        assert np.asarray(read)[0, :, 0].tolist() == [0, 0, 255, 255]
    Image.fromarray(np.array([[7, 200]], np.uint8)).save(tmp_path / "i.png")  # 8 bits stay what they are
    assert np.asarray(read_image(tmp_path / "i.png", intensity_range=(0, 1)))[0, :, 0].tolist() == [7, 200]


@pytest.mark.parametrize("name", ["x.tif", "y.tif"])
def test_unknown_intensities_are_refused_before_the_first_batch(tmp_path, gradient, name):
    kind = np.float32 if name == "x.tif" else np.int32
    for split in ("train", "val"):
        for i in range(3):
            save(tmp_path / split / f"{i}.png", gradient)
        Image.fromarray(gradient[..., 0].astype(kind)).save(tmp_path / split / name)
    for split in ("train", "val"):
        with pytest.raises(UserError, match=f"{split}/{name}: its values are .* give --intensity_range LOW HIGH"):
            open_dataset("folder", tmp_path, split)
        dataset = open_dataset("folder", tmp_path, split, intensity_range=[0, 255])
        assert np.array_equal(np.asarray(dataset[3][0])[..., 2], gradient[..., 0])


def test_lost_gray_levels_are_one_warning(tmp_path, capsys):
    """A mask of two levels loses none."""
    levels = np.arange(200, dtype=np.uint16).reshape(10, 20)
    for name, pixels in {"a/0": levels, "a/1": levels, "b/0": np.uint16(levels > 5) * 65535}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    for _ in range(2):
        open_dataset("folder", tmp_path)
        (line,) = capsys.readouterr().err.splitlines()
        expected = "a/0.png keeps 1 of its 200 gray levels in 8 bits: see --intensity_range; its values are 0 to 199"
        assert line == f"warning: {tmp_path}/{expected}"
    open_dataset("folder", tmp_path / "b")
    open_dataset("folder", tmp_path, intensity_range=[0, 199])
    assert not capsys.readouterr().err


def test_bad_images_are_quiet(tmp_path, recwarn, gradient, capfd):
    Image.fromarray(gradient).save(tmp_path / "exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x07garbage")
    (tmp_path / "bomb.png").write_bytes(png_header(10000, 10000))
    assert read_image(tmp_path / "exif.jpg").size == (24, 16)
    for read in (read_image, image_size):
        with pytest.raises(UserError, match="10000x10000 pixels are more than"):
            read(tmp_path / "bomb.png")
    assert not recwarn.list
    assert capfd.readouterr().err == ""


def test_each_folder_is_read_once(tmp_path, gradient):
    for name in ("top/a/1.png", "top/a/deep/2.png", "top/b/3.png", "elsewhere/4.png", "elsewhere/below/5.png"):
        save(tmp_path / name, gradient)
    for name, target in {"a/up": "..", "a/deep/self": ".", "a/b": "../b", "b/out": "../../elsewhere"}.items():
        (tmp_path / "top" / name).symlink_to(target)
    (tmp_path / "top/b/again").symlink_to("../../elsewhere/below")
    (tmp_path / "elsewhere/up").symlink_to("../top")
    (tmp_path / "top/c").symlink_to("../elsewhere/below")
    dataset = open_dataset("folder", tmp_path / "top")
    found = [
        (Path(path).name, dataset.classes[label]) for path, label in zip(dataset.paths, dataset.labels, strict=True)
    ]
    assert found == [("1.png", "a"), ("2.png", "a"), ("3.png", "b"), ("4.png", "b"), ("5.png", "c")]


def test_elongated_images_are_named_and_others_resized_as_by_torchvision(tmp_path, gradient):
    save(tmp_path / "i.png", gradient)
    transform = eval_transform(14)
    image, _ = open_dataset("folder", tmp_path, transform=transform)[0]
    resized = T.Resize(16, InterpolationMode.BICUBIC)(Image.fromarray(gradient))
    assert torch.equal(image, to_pixels()(T.CenterCrop(14)(resized)))
    Image.new("L", (1, 70000)).save(tmp_path / "i.png")
    with pytest.raises(UserError, match=f"cannot use image {tmp_path}/i.png: 1x70000 pixels are too elongated"):
        open_dataset("folder", tmp_path, transform=eval_transform(224))[0]
    assert open_dataset("folder", tmp_path, transform=pickle.loads(pickle.dumps(transform)))[0][0].shape == (3, 14, 14)


def test_the_intensity_range_of_the_pretraining_is_taken_over(tmp_path, capsys):
    """Of images of two brightnesses. In the range 0 to 1 all are white."""
    for split in ("train", "val"):
        for name, low in (("bright", 2000), ("dark", 1000)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng((i, low)).uniform(low, low + 400, (40, 40)).astype(np.float32)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.tif")
    words = "--arch vit_micro --patch_size 8 --image_size 40 --global_crops_size 32 --local_crops_size 16 --out_dim 24 "
    words += "--local_crops_number 1 --head_hidden_dim 32 --num_workers 0 --epochs 1 --batch_size_per_gpu 4 "
    run = f"--data_path {tmp_path}/data --output_dir {tmp_path}/run"
    main_lgssl.main(f"{words} {run} --intensity_range 0 3000".split())
    assert json.loads((tmp_path / "run/args.json").read_text())["intensity_range"] == [0, 3000]
    with pytest.raises(UserError, match="other arguments: --intensity_range "):
        main_lgssl.main(f"{words} {run} --intensity_range 0 3001".split())

    weights = f"--nb_knn 4 --num_workers 0 --pretrained_weights {tmp_path}/run/checkpoint.pth".split()

    def top1(*more):
        eval_knn.main(["--data_path", f"{tmp_path}/data", *weights, *more])
        result = tmp_path / "run/knn_folder.json"
        top1 = json.loads(result.read_text())["knn"]["4"]["top1"]
        result.unlink()
        return top1

    assert top1() == 100
    assert top1("--intensity_range", "0", "1") == 50
    args = eval_knn.parse_arguments(["--dataset", "digits", *weights])
    assert data_spec(args, {"intensity_range": [0, 1]}).intensity_range is None  # of 8 bits
    network = ["--pretrained_weights", "none", "--arch", "vit_micro"]
    with pytest.raises(UserError, match="its values are floats; give --intensity_range"):
        eval_knn.main(["--data_path", str(tmp_path / "data"), *network])
