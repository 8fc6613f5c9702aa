"""Sources of images: torchvision's data sets, lists, and folders with an index."""

import argparse
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torchvision
from conftest import ROOT, open_dataset
from kill_and_resume import fingerprint, wait_for
from PIL import Image
from scipy.io import savemat
from test_images import idx
from test_main_lgssl import TINY

import eval_knn
import extract_features
import main_lgssl
from benchmarks import bench_index
from support import folders, index, sources, torchvision_sets
from support.checkpoints import hash_of_names
from support.evaluation import check_splits
from support.sources import dataset_name, find_source
from utils import UserError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 96, 96, 3), np.uint8)
LABELS = np.arange(12) % 3


def save(path, pixels=PIXELS[0]):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_cifar100(root):
    """Write 8 training and 4 test images of 32×32 pixels in the true format, pickles."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, part in (("train", slice(8)), ("test", slice(8, 12))):
        rows = PIXELS[part, :32, :32].transpose(0, 3, 1, 2).reshape(-1, 3072)
        fine = LABELS[part].tolist()
        contents = {"data": rows, "fine_labels": fine, "coarse_labels": [0] * len(rows), "filenames": [""] * len(rows)}
        (folder / name).write_bytes(pickle.dumps(contents))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bear", "chair"]}))


def write_stl10(root):
    """Write images of 96×96 pixels in the true format: bytes by channel and column, labels from 1 on."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for name, part in (("train", slice(8)), ("test", slice(8, 12))):
        (folder / f"{name}_X.bin").write_bytes(PIXELS[part].transpose(0, 3, 2, 1).tobytes())
        (folder / f"{name}_y.bin").write_bytes((LABELS[part] + 1).astype(np.uint8).tobytes())
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")


def write_flowers102(root):
    for i in range(12):
        save(root / f"flowers-102/jpg/image_{i + 1:05}.jpg", PIXELS[i])
    savemat(root / "flowers-102/imagelabels.mat", {"labels": LABELS[None] + 1})
    ids = np.arange(1, 13)[None]
    savemat(root / "flowers-102/setid.mat", {"trnid": ids[:, :8], "valid": ids[:, :0], "tstid": ids[:, 8:]})


def write_dtd(root):
    for label, name in enumerate(("banded", "dotted", "woven")):
        for i in np.flatnonzero(label == LABELS):
            save(root / f"dtd/dtd/images/{name}/{name}_{i:04}.jpg", PIXELS[i])
    lines = [f"{name}/{name}_{i:04}.jpg\n" for i, name in enumerate(["banded", "dotted", "woven"] * 4)]
    labels = root / "dtd/dtd/labels"
    labels.mkdir()
    (labels / "train1.txt").write_text("".join(lines[:8]))
    (labels / "test1.txt").write_text("".join(lines[8:]))


def write_gtsrb(root):
    """Write the training images in class folders, and the test images with a table."""
    folder = root / "gtsrb"
    for i in range(8):
        save(folder / f"GTSRB/Training/{LABELS[i]:05}/{i:05}.ppm", PIXELS[i])
    table = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    for i in range(8, 12):
        save(folder / f"GTSRB/Final_Test/Images/{i:05}.ppm", PIXELS[i])
        table += f"{i:05}.ppm;96;96;5;5;90;90;{LABELS[i]}\n"
    (folder / "GT-final_test.csv").write_text(table)


def write_imagenette(root):
    """Its splits are train and val."""
    for i in range(12):
        name = ("n01440764", "n02102040", "n02979186")[LABELS[i]]
        save(root / f"imagenette2/{'train' if i < 8 else 'val'}/{name}/{i}.jpeg", PIXELS[i])


# {name: (function that writes it, name of the test split, names of the classes)}
WRITERS = {
    "CIFAR100": (write_cifar100, {"train": False}, ["apple", "bear", "chair"]),
    "STL10": (write_stl10, {"split": "test"}, ["airplane", "bird", "car"]),
    "Flowers102": (write_flowers102, {"split": "test"}, torchvision.datasets.Flowers102.classes),
    "DTD": (write_dtd, {"split": "test"}, ["banded", "dotted", "woven"]),
    "GTSRB": (write_gtsrb, {"split": "test"}, ["0", "1", "2"]),
    "Imagenette": (write_imagenette, {"split": "val"}, ["tench", "English springer", "cassette player"]),
}


@pytest.fixture
def no_checksums(monkeypatch):
    """Disable torchvision's comparison of files with the checksums of the published ones."""
    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: os.path.isfile(path)
        )
    monkeypatch.setattr("torchvision.datasets.STL10._check_integrity", lambda self: True)


@pytest.mark.parametrize("name", WRITERS)
def test_images_and_labels_are_those_of_torchvision(tmp_path, no_checksums, name):
    write, test_split, classes = WRITERS[name]
    write(tmp_path)
    kind = getattr(torchvision.datasets, name)
    splits = {split: open_dataset(f"torchvision:{name}", str(tmp_path), split) for split in ("train", "val")}
    for split, theirs in (("train", kind(tmp_path)), ("val", kind(tmp_path, **test_split))):
        own = splits[split]
        assert len(own) == len(theirs) == {"train": 8, "val": 4}[split]
        assert own.classes == classes
        assert all(type(label) is int for label in own.labels)
        for (image, label), (expected, expected_label) in zip(own, theirs, strict=True):
            assert label == expected_label
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), np.asarray(expected.convert("RGB")))
        kept = [np.asarray(own[i][0]) for i in (1, 3)], [own.labels[i] for i in (1, 3)]
        own.keep([1, 3])
        assert np.array_equal([np.asarray(image) for image, _ in own], kept[0])
        assert own.labels == kept[1]
    check_splits(splits, tmp_path)
    if name in ("CIFAR100", "STL10"):
        side = 32 if name == "CIFAR100" else 96
        assert np.array_equal(np.asarray(splits["val"][1][0]), PIXELS[11, :side, :side])


def test_a_bad_image_of_torchvision_is_a_bad_image(tmp_path):
    write_dtd(tmp_path)
    dataset = open_dataset("torchvision:DTD", tmp_path)
    path = Path(dataset.paths[2])
    path.write_bytes(path.read_bytes()[:1000])
    assert path.name == "woven_0002.jpg"
    with pytest.raises(UserError, match="cannot read image .*woven_0002.jpg"):
        dataset[2]


@pytest.mark.parametrize("name", ["MNIST", "KMNIST"])
@pytest.mark.parametrize("below", ["", "{}/raw"])
def test_digits_in_the_format_of_mnist(tmp_path, name, below):
    folder = tmp_path / below.format(name)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (6, 28, 28), np.uint8)
    for part, chosen in (("train", slice(4)), ("t10k", slice(4, 6))):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels[chosen]))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(6, dtype=np.uint8)[chosen]))
    for split, chosen in (("train", slice(4)), ("val", slice(4, 6))):
        dataset = open_dataset(f"torchvision:{name}", tmp_path, split)
        assert dataset.labels == list(range(6))[chosen]
        assert len(dataset.classes) == 10
        assert np.array_equal([np.asarray(image)[..., 1] for image, _ in dataset], pixels[chosen])


@pytest.mark.parametrize("name", sorted({*torchvision_sets.names()} - {"MNIST", "KMNIST", "FashionMNIST"}))
@pytest.mark.parametrize("split", ["train", "val"])
def test_each_missing_data_set_is_one_line(tmp_path, name, split):
    """Each has a constructor that fits: another call would be a TypeError, and another split a ValueError."""
    with pytest.raises(UserError, match=f"^no {name} in {tmp_path}, expected intact files as torchvision ") as error:
        open_dataset(f"torchvision:{name}", tmp_path, split)
    assert isinstance(error.value.__cause__, (RuntimeError, OSError))
    assert "\n" not in str(error.value)


def test_data_sets_with_classes_and_a_split_are_known():
    assert {"CIFAR10", "CIFAR100", "STL10", "SVHN", "Flowers102", "Food101", "DTD"} < set(torchvision_sets.names())
    assert {"GTSRB", "OxfordIIITPet", "FGVCAircraft", "Country211"} < set(torchvision_sets.names())
    for name in ("EuroSAT", "ImageFolder", "CelebA", "VOCDetection", "Kitti", "FakeData"):
        with pytest.raises(UserError, match=f"{name} has no classes, or no split .* expected one of CIFAR10, "):
            open_dataset(f"torchvision:{name}", "x")
    with pytest.raises(UserError, match="ImageNet1K is unknown; expected one of CIFAR10, "):
        open_dataset("torchvision:ImageNet1K", "x")


def test_downloads_are_those_of_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.DTD._download", lambda self: write_dtd(Path(self.root)))
    with pytest.raises(UserError, match="no DTD in .*--download fetches"):
        open_dataset("torchvision:DTD", tmp_path)
    assert len(open_dataset("torchvision:DTD", tmp_path, download=True)) == 8

    def no_network(self):
        raise OSError("no network\nfor a reason")

    monkeypatch.setattr("torchvision.datasets.DTD._download", no_network)
    with pytest.raises(UserError, match=f"^cannot download DTD to {tmp_path}: no network$"):
        open_dataset("torchvision:DTD", tmp_path, download=True)
    with pytest.raises(UserError, match="torchvision cannot download FER2013"):
        open_dataset("torchvision:FER2013", tmp_path, download=True)


@pytest.mark.parametrize("text", ["", "cifar", "torchvision", "torchvision:", "folder:x", "folder:", "TORCHVISION:DTD"])
def test_other_data_sets_are_refused(text, capsys):
    with pytest.raises(argparse.ArgumentTypeError, match="expected one of folder, imagenet100, cifar10, torchvision:N"):
        dataset_name(text)
    with pytest.raises(SystemExit) as stopped:
        main_lgssl.parse_arguments(["--dataset", text])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument --dataset: found {text!r}, expected one of" in line


def test_a_name_may_contain_colons(monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "x", sources.Source(None, (), "NAME"))
    assert find_source("x:a:b/c")[1] == "a:b/c"
    assert dataset_name("x:a:b/c") == "x:a:b/c"


def test_lists_with_and_without_classes(tmp_path):
    for i, name in enumerate(("b/1.png", "a/2.png", "with space.png", "b/ü.png")):
        save(tmp_path / "data" / name, PIXELS[i])
    path = tmp_path / "data" / "list.txt"
    path.write_text(f"b/1.png\n\n{tmp_path}/data/a/2.png\nwith space.png\nb/ü.png\n", encoding="utf-8")
    dataset = open_dataset("folder", path)
    assert (dataset.labels, dataset.classes) == ([-1] * 4, [])
    for i, (image, _) in enumerate(dataset):
        assert np.array_equal(np.asarray(image), PIXELS[i])
    lines = ["b/1.png\tzebra", "a/2.png\tbig cat", "with space.png\tzebra", "b/ü.png\tant"]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    dataset = open_dataset("folder", str(path))
    assert (dataset.labels, dataset.classes) == ([2, 1, 2, 0], ["ant", "big cat", "zebra"])
    assert np.array_equal(np.asarray(dataset[3][0]), PIXELS[3])
    assert len(open_dataset("folder", path, train_images=2)) == 2


def test_a_list_moves_with_its_images(tmp_path, monkeypatch):
    for folder in ("here", "there"):
        save(tmp_path / folder / "a/1.png")
        (tmp_path / folder / "list.txt").write_text("a/1.png\n")
    names = [hash_of_names(open_dataset("folder", tmp_path / folder / "list.txt")) for folder in ("here", "there")]
    monkeypatch.chdir(tmp_path / "here")
    names.append(hash_of_names(open_dataset("folder", "./list.txt")))
    assert names[0] == names[1]
    save(tmp_path / "there/b/1.png")
    (tmp_path / "there/list.txt").write_text("b/1.png\n")
    assert hash_of_names(open_dataset("folder", tmp_path / "there/list.txt")) != names[0]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"a.png\tx\nb.png\n", r"has a class after a tab for 1 of its 2 images, but not for b.png: expected a class"),
        (b"a.png\t\nb.png\ty\n", r"for 1 of its 2 images, but not for a.png"),
        (b"a.png\nc.png\nd.png\n", r"list.txt lists 3 images, 2 are missing; the first: .*c.png"),
        (b"a.png x\n", r"lists 1 images, 1 are missing; the first: .*a.png x"),
        (b"a\0.png\n", "lists 1 images, 1 are missing"),
        (b"\xff\xfe\n", r"cannot read .*list.txt \(not text\): expected a folder of images, or a text file"),
        (b"\n \n", r"cannot read .*list.txt \(it is empty\)"),
    ],
)
def test_bad_lists_are_named(tmp_path, contents, message):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    (tmp_path / "list.txt").write_bytes(contents)
    with pytest.raises(UserError, match=message) as error:
        open_dataset("folder", tmp_path / "list.txt")
    assert "\n" not in str(error.value)


def test_lists_for_training_and_validation(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        save(tmp_path / name)
    (tmp_path / "train.txt").write_text("a/1.png\tx\nb/1.png\ty\n")
    assert len(open_dataset("folder", tmp_path)) == 4  # no val.txt
    (tmp_path / "val.txt").write_text("a/2.png\tx\nb/2.png\tz\n")
    splits = {split: open_dataset("folder", tmp_path, split) for split in ("train", "val")}
    assert [Path(path).name for path in splits["val"].paths] == ["2.png"] * 2
    with pytest.raises(UserError, match=r"differ, 1 only in train \(y\) and 1 only in val \(z\)"):
        check_splits(splits, tmp_path)
    (tmp_path / "val.txt").write_text("a/2.png\tx\nb/2.png\ty\n")
    check_splits({split: open_dataset("folder", tmp_path, split) for split in ("train", "val")}, tmp_path)
    for option in ("classes", "rebuild_index"):
        with pytest.raises(UserError, match=f"--{option} has no effect with a list of images"):
            open_dataset("folder", tmp_path, **{option: "x"})
    one = {split: open_dataset("folder", tmp_path / "train.txt", split) for split in ("train", "val")}
    with pytest.raises(UserError, match="or they hold the same files"):
        check_splits(one, tmp_path / "train.txt")


def test_paths_are_a_sequence():
    names = ["a/1.png", "ü.png", "b\udcff.png", "", "a\nb"]
    paths = index.Paths(names, "root/")
    full = ["root/" + name for name in names]
    assert paths == full
    assert list(paths) == full
    assert (len(paths), paths[1], paths[-1]) == (5, full[1], full[-1])
    assert paths[1:4:2] == full[1:4:2]
    assert full[2] in paths
    assert "a/1.png" not in paths
    assert paths.keep([3, 0]) == [full[3], full[0]]
    assert pickle.loads(pickle.dumps(paths)) == full
    with pytest.raises(IndexError):
        paths[5]
    assert not list(index.Paths([]))


@pytest.fixture
def large_folder(tmp_path, monkeypatch):
    """Return a folder that counts as large, with images of the classes x, y and z and deeper folders, an hour old."""
    monkeypatch.setattr(index, "MIN_FILES", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "data/images"
    for i, name in enumerate(("x/1.png", "x/deep/er/2.png", "y/3.png", "y/ü.png", "z/5.png", "top.png")):
        save(root / name, PIXELS[i])
    make_old(root)
    return root


def make_old(root, seconds=3600):
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - seconds,) * 2)


def opened(root, **options):
    """Return what a data set says of itself, and whether its folders were read."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        original = folders.list_folder
        patch.setattr(folders, "list_folder", lambda *args: calls.append(1) or original(*args))
        dataset = open_dataset("folder", root, **options)
    found = {"paths": list(dataset.paths), "labels": dataset.labels, "classes": dataset.classes}
    return {**found, "names": hash_of_names(dataset)}, bool(calls)


def test_a_folder_is_read_once_and_is_the_same_with_its_index(large_folder, monkeypatch, tmp_path):
    whole, was_read = opened(large_folder)
    assert was_read
    assert [Path(path).name for path in whole["paths"]] == ["top.png", "1.png", "2.png", "3.png", "ü.png", "5.png"]
    assert whole["labels"] == [-1, 0, 0, 1, 1, 2]
    assert [path.name for path in large_folder.parent.iterdir() if path != large_folder] == [".images.lgssl_index"]
    assert opened(large_folder) == (whole, False)
    assert opened(str(large_folder)) == (whole, False)
    assert opened(large_folder, rebuild_index=True) == (whole, True)
    monkeypatch.chdir(large_folder)
    for name in (".", "../images", "./"):
        found, was_read = opened(name)
        assert not was_read
        assert [os.path.abspath(path) for path in found["paths"]] == whole["paths"]
        assert found == opened(name, rebuild_index=True)[0]
    (tmp_path / "link").symlink_to(large_folder)
    assert opened(tmp_path / "link")[1] is False
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda root: save(root / "y/0.png"),
        lambda root: save(root / "new.png"),
        lambda root: save(root / "x/deep/er/9.png"),
        lambda root: (root / "x/1.png").unlink(),
        lambda root: (root / "top.png").unlink(),
        lambda root: (root / "x/deep/er/2.png").rename(root / "x/deep/er/3.png"),
        lambda root: (root / "y").rename(root / "w"),
        lambda root: (root / "x/deep").rename(root / "x/deeper"),
        lambda root: shutil.rmtree(root / "z"),
        lambda root: save(root / "a/0.png"),
        lambda root: save(root / "x/deep/er/and/er/0.png"),
    ],
)
def test_a_changed_folder_is_read_again(large_folder, change):
    before, _ = opened(large_folder)
    assert opened(large_folder)[1] is False
    change(large_folder)
    after, was_read = opened(large_folder)
    assert was_read
    assert after != before
    assert all(map(os.path.isfile, after["paths"]))
    make_old(large_folder, 1800)  # settled
    assert opened(large_folder) == (after, True)
    assert opened(large_folder) == (after, False)


def test_another_folder_of_the_same_name_and_time_is_read(large_folder, tmp_path):
    opened(large_folder)
    times = {folder: os.stat(folder).st_mtime_ns for folder, _, _ in os.walk(large_folder)}
    large_folder.rename(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", large_folder)
    (large_folder / "y/3.png").unlink()
    for folder, mtime in times.items():
        os.utime(folder, ns=(mtime, mtime))
    found, was_read = opened(large_folder)
    assert was_read
    assert len(found["paths"]) == 5


def test_a_link_that_points_elsewhere_is_read_again(large_folder, tmp_path):
    for name in ("first", "second"):
        save(tmp_path / name / f"{name}.png")
    (tmp_path / "via").symlink_to("first")
    (large_folder / "v").symlink_to(tmp_path / "via")
    for folder in (large_folder, tmp_path / "first", tmp_path / "second"):
        make_old(folder)
    assert opened(large_folder)[1]
    assert opened(large_folder)[1] is False
    (tmp_path / "via").unlink()
    (tmp_path / "via").symlink_to("second")
    found, was_read = opened(large_folder)
    assert was_read
    assert f"{large_folder}/v/second.png" in found["paths"]


@pytest.mark.parametrize("reason", ["small", "recent", "classes", "other rank"])
def test_no_index_is_written(large_folder, monkeypatch, tmp_path, reason):
    options = {}
    if reason == "small":
        monkeypatch.setattr(index, "MIN_FILES", 7)
    elif reason == "recent":
        os.utime(large_folder / "x/deep")
    elif reason == "classes":
        (tmp_path / "list.txt").write_text("x\ny\n")
        options["classes"] = tmp_path / "list.txt"
    else:
        monkeypatch.setenv("LOCAL_RANK", "1")
    open_dataset("folder", large_folder, **options)
    assert not [path for path in (*large_folder.parent.iterdir(), tmp_path / "cache") if "index" in path.name]
    assert not (tmp_path / "cache").exists()


def test_an_index_goes_to_the_cache_if_none_can_lie_beside_the_data(large_folder, tmp_path, monkeypatch):
    (large_folder.parent / ".images.lgssl_index").mkdir()  # nobody, root neither, can put a file there
    whole, _ = opened(large_folder)
    (entry,) = (tmp_path / "cache/lgssl").iterdir()
    assert entry.name.endswith(".lgssl_index")
    assert opened(large_folder) == (whole, False)
    assert sorted(path.name for path in large_folder.parent.iterdir()) == [".images.lgssl_index", "images"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert opened(large_folder) == (whole, True)
    assert len(list((tmp_path / "home/.cache/lgssl").iterdir())) == 1
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home").write_text("no folder")
    assert [opened(large_folder) for _ in range(2)] == [(whole, True)] * 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_has_its_index_in_the_cache(large_folder, tmp_path):
    large_folder.parent.chmod(0o500)
    try:
        whole, _ = opened(large_folder)
        assert len(list((tmp_path / "cache/lgssl").iterdir())) == 1
        assert opened(large_folder) == (whole, False)
    finally:
        large_folder.parent.chmod(0o700)


def changed_header(**values):
    def change(contents):
        header, rest = contents.split(b"\n", 1)
        return json.dumps({**json.loads(header), **values}).encode() + b"\n" + rest

    return change


def repacked(**values):
    """Return a function that makes an index that is intact, but has other values."""

    def change(contents, path):
        path.write_bytes(contents)
        listing, states = index._unpack(path, "")
        return index._pack(listing._replace(**{k: v for k, v in values.items() if k != "states"}), states)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda contents: b"",
        lambda contents: contents[:-1],
        lambda contents: contents[:50],
        lambda contents: contents + b"\0",
        lambda contents: contents[:-9] + b"\xff" + contents[-8:],
        lambda contents: contents.replace(b"3.png", b"4.png"),
        lambda contents: b"[" * 100_000,
        lambda contents: b"null\n" + contents,
        lambda contents: b"\x80\x04K\x01.",
        changed_header(lgssl_index=0),
        changed_header(lgssl_index="1"),
        changed_header(sizes=None),
        changed_header(sizes=[10**18] * 8),
        changed_header(sizes=[-1] * 8),
        changed_header(sizes="12345678"),
        changed_header(sizes={}),
        changed_header(checksum=0),
    ],
)
def test_a_damaged_index_is_replaced(large_folder, change):
    whole, _ = opened(large_folder)
    place = large_folder.parent / ".images.lgssl_index"
    intact = place.read_bytes()
    place.write_bytes(change(intact))
    assert place.read_bytes() != intact
    assert opened(large_folder) == (whole, True)
    assert place.read_bytes() == intact
    assert opened(large_folder) == (whole, False)


@pytest.mark.parametrize(
    "values",
    [
        {"labels": [9] * 6},
        {"labels": [-2] * 6},
        {"labels": [0]},
        {"labels": [], "paths": index.Paths([])},
        {"classes": []},
        {"folders": []},
        {"folders": ["", "x\0y"]},
        {"folders": [""]},
    ],
)
def test_an_index_that_contradicts_itself_is_replaced(large_folder, tmp_path, values):
    whole, _ = opened(large_folder)
    place = large_folder.parent / ".images.lgssl_index"
    place.write_bytes(repacked(**values)(place.read_bytes(), tmp_path / "x"))
    assert opened(large_folder) == (whole, True)
    assert opened(large_folder) == (whole, False)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_an_index_that_is_a_pipe_is_replaced(large_folder):
    os.mkfifo(large_folder.parent / ".images.lgssl_index")
    whole, _ = opened(large_folder)
    assert opened(large_folder) == (whole, False)


def test_a_file_that_is_gone_although_no_folder_changed_is_a_bad_image(large_folder):
    """As after a change of the clock, or of a file behind a link."""
    opened(large_folder)
    folder = large_folder / "x"
    mtime = folder.stat().st_mtime_ns
    (folder / "1.png").unlink()
    os.utime(folder, ns=(mtime, mtime))
    dataset = open_dataset("folder", large_folder)
    with pytest.raises(UserError, match="cannot read image .*x/1.png: .*No such file"):
        dataset[1]


TRAINING = [*TINY, "--epochs", "2", "--warmup_epochs", "0", "--lr", "0.05", "--log_every", "1", "--knn_every", "1"]
TRAINING += ["--save_every_steps", "1", "--num_workers", "1", "--batch_size_per_gpu", "2"]


@pytest.fixture(scope="module")
def textures(tmp_path_factory, photographs):
    """Return a folder with the same images thrice: in class folders, in lists, and as torchvision's DTD."""
    root = tmp_path_factory.mktemp("textures")
    rng, lists = np.random.default_rng(0), {"train": "", "test": ""}
    for name, photo in zip(("china", "flower"), photographs, strict=True):
        for split, count in (("train", 8), ("test", 4)):
            for i in range(count):
                left, top = int(rng.integers(500)), int(rng.integers(300))
                path = root / f"dtd/dtd/images/{name}/{name}_{split}{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                photo.crop((left, top, left + 100, top + 100)).save(path)
                lists[split] += f"{name}/{path.name}\n"
                link = root / "folder" / {"train": "train", "test": "val"}[split] / name / path.name
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, link)
    (root / "dtd/dtd/labels").mkdir()
    for split, text in lists.items():
        (root / f"dtd/dtd/labels/{split}1.txt").write_text(text)
        lines = [f"dtd/dtd/images/{line}\t{line.split('/')[0]}\n" for line in text.split()]
        (root / f"{'val' if split == 'test' else split}.txt").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def on_folder(textures, tmp_path_factory):
    """Return the folder of an undisturbed run on the class folders, and its k-NN result."""
    output = tmp_path_factory.mktemp("on_folder")
    main_lgssl.main([*TRAINING, "--data_path", f"{textures}/folder", "--output_dir", str(output)])
    return output, knn(output, ["--data_path", f"{textures}/folder"], "knn_folder")


def knn(output, data, name):
    weights = ["--pretrained_weights", f"{output}/checkpoint.pth", "--nb_knn", "3", "--num_workers", "0"]
    eval_knn.main([*data, *weights])
    return json.loads((output / f"{name}.json").read_text())["knn"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["folder", "torchvision:DTD"])
def test_each_source_trains_and_evaluates_as_a_folder_and_survives_a_kill(textures, on_folder, tmp_path, source):
    output = tmp_path / "run"
    data = ["--dataset", source, "--data_path", str(textures)]
    words = [*TRAINING, *data, "--output_dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, "main_lgssl.py", *words], cwd=ROOT, env=environment)
    assert wait_for((output / "checkpoint_previous.pth").exists, process, 300)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    main_lgssl.main(words)
    environments = (output / "environment.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] > 0 for line in environments] == [False, True]
    assert fingerprint(output) == fingerprint(on_folder[0])
    assert knn(output, data, f"knn_{source.replace(':', '_')}") == on_folder[1]


def test_features_of_a_list_have_paths_relative_to_its_folder(textures, tmp_path):
    network = "--pretrained_weights none --arch vit_micro --patch_size 8 --crop_size 32 --num_workers 0".split()
    extract_features.main(["--data_path", f"{textures}/val.txt", *network, "--output", f"{tmp_path}/x.npz"])
    with np.load(tmp_path / "x.npz") as file:
        assert file["paths"][0] == "dtd/dtd/images/china/china_test0.jpg"
        assert file["labels"].tolist() == [0] * 4 + [1] * 4


def test_bench_index_starts_once_without_an_index(monkeypatch, capsys, tmp_path):
    reads, original = [], folders.list_folder

    def list_folder(*args):
        reads.append(args)
        return original(*args)

    monkeypatch.setattr(folders, "list_folder", list_folder)
    monkeypatch.setattr(index, "MIN_FILES", 90)
    monkeypatch.setattr(index, "SETTLED", 0.1)
    words = f"bench_index --files 100 --classes 7 --images 3 --rounds 2 --folder {tmp_path}"
    monkeypatch.setattr(sys, "argv", words.split())
    bench_index.main()
    assert len(reads) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "100 images in 7 folders" in lines[0]
    assert len([line for line in lines if line.startswith("| with the index")]) == 2
    assert not list(tmp_path.iterdir())
