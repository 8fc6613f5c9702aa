"""Sources of images: their names, torchvision's data sets, and lists."""

import csv
import hashlib
import pickle
import re
import sys
import unicodedata
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from conftest import open_dataset
from kill_and_resume import fingerprint
from PIL import Image
from test_images import write_fashion_mnist
from test_main_lgssl import TINY

import extract_features
import main_lgssl
from benchmarks import bench_folder
from support.checkpoints import hash_of_names
from support.evaluation import check_splits
from support.folders import listed_images
from support.images import Paths
from support.sources import dataset_name, find_kind
from utils import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
FASHION = "torchvision:FashionMNIST"


def save(path, pixels=PIXELS[0]):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def assert_equal_items(own, theirs):
    """Compare a data set with one of torchvision, in order."""
    assert len(own) == len(theirs) > 0
    assert all(type(label) is int for label in own.labels)
    assert own.classes == theirs.classes
    for (image, label), (expected, expected_label) in zip(own, theirs, strict=True):
        assert label == expected_label
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(expected.convert("RGB")))


def assert_kept(dataset):
    expected = [(np.asarray(dataset[i][0]).tolist(), dataset.labels[i]) for i in (1, 3)]
    dataset.keep([1, 3])
    assert [(np.asarray(image).tolist(), label) for image, label in dataset] == expected


def test_cifar10_in_its_own_format(cifar10_folder):
    """torchvision's items, and those that its files hold."""
    for split, count in (("train", 60), ("val", 12)):
        own = open_dataset("cifar10", cifar10_folder, split)
        assert len(own) == count
        assert_equal_items(own, torchvision.datasets.CIFAR10(cifar10_folder, train=split == "train"))
        assert_equal_items(open_dataset("torchvision:CIFAR10", cifar10_folder, split), own)
    with open(cifar10_folder / "cifar-10-batches-py/data_batch_2", "rb") as file:
        batch = pickle.load(file)
    train = open_dataset("cifar10", cifar10_folder)
    image, label = train[13]  # the batches have 12 images
    assert np.array_equal(np.asarray(image), batch["data"][1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert label == batch["labels"][1]
    assert_kept(train)


def test_fashion_mnist_is_that_of_torchvision(tmp_path):
    write_fashion_mnist(tmp_path)
    for split in ("train", "val"):
        own = open_dataset(FASHION, tmp_path, split)
        assert_equal_items(own, torchvision.datasets.FashionMNIST(tmp_path, train=split == "train"))
    assert_kept(own)


@pytest.mark.parametrize("change", [lambda contents: contents[:-1], lambda contents: b"", None])
def test_damaged_and_missing_files_are_one_line(tmp_path, change):
    path = write_fashion_mnist(tmp_path) / "FashionMNIST/raw/train-labels-idx1-ubyte"
    if change:
        path.write_bytes(change(path.read_bytes()))
    else:
        path.unlink()
    expected = f"^no FashionMNIST in {tmp_path}, expected intact files as torchvision puts them there, see --download"
    with pytest.raises(UserError, match=expected) as error:
        open_dataset(FASHION, tmp_path)
    assert "\n" not in str(error.value)


def test_downloads_are_those_of_torchvision(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise URLError("name resolution failed\nfor a reason")

    with monkeypatch.context() as patch:
        patch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
        with pytest.raises(UserError, match=f"^cannot download FashionMNIST to {tmp_path}: Error ") as error:
            open_dataset(FASHION, tmp_path, download=True)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(
        torchvision.datasets.FashionMNIST, "download", lambda self: write_fashion_mnist(Path(self.root))
    )
    assert len(open_dataset(FASHION, tmp_path, download=True)) == 30


def test_files_of_torchvision_are_read_as_those_of_a_folder(tmp_path):
    """Where torchvision says which they are. Without splits, or with other ones, there is one line."""
    for label, name in enumerate(("n01440764", "n02102040")):
        for i in range(3):
            save(tmp_path / f"imagenette2/train/{name}/{i}.jpeg", PIXELS[3 * label + i])
        save(tmp_path / f"imagenette2/val/{name}/3.jpeg")
    for split in ("train", "val"):
        own = open_dataset("torchvision:Imagenette", tmp_path, split)
        theirs = torchvision.datasets.Imagenette(tmp_path, split=split)
        assert own.classes[:2] == ["tench", "English springer"]
        assert own.labels == [label for _, label in theirs]
        assert [np.asarray(image).tolist() for image, _ in own] == [np.asarray(image).tolist() for image, _ in theirs]
    Path(own.paths[0]).write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read image .*/imagenette2/val/n01440764/3.jpeg: cannot identify"):
        own[0]
    for name in ("EuroSAT", "ImageFolder", "os", "cifar10"):
        with pytest.raises(UserError, match=f"--dataset torchvision:{name}: no such data set with training"):
            open_dataset(f"torchvision:{name}", tmp_path)
    for name in ("DTD", "OxfordIIITPet", "SVHN", "FER2013"):
        with pytest.raises(UserError, match=f"^no {name} in {tmp_path}, expected intact files as ") as error:
            open_dataset(f"torchvision:{name}", tmp_path, "val")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "cifar", "torchvision", "torchvision:", "folder:x", "folder:", "TORCHVISION:DTD"])
def test_other_data_sets_are_refused(text):
    expected = f"--dataset: found {text!r}, expected one of folder, imagenet100, cifar10, torchvision:NAME, hf:NAME_OR_"
    with pytest.raises(UserError, match=expected):
        dataset_name(text)


def test_a_name_may_contain_colons():
    assert find_kind("hf:a:b/c")[1] == "a:b/c"
    assert dataset_name("hf:a:b/c") == "hf:a:b/c"


def test_options_of_files_stay_with_files(tmp_path):
    """Images in memory have no `min_side`, which only decoding a file takes."""
    save(tmp_path / "1.png")
    assert open_dataset("folder", tmp_path, min_side=5).min_side == 5
    assert not hasattr(open_dataset("digits", min_side=5), "min_side")


def test_lists_with_and_without_classes(tmp_path):
    for i, name in enumerate(("b/1.png", "a/2.png", "with space.png", "b/ü.png")):
        save(tmp_path / "data" / name, PIXELS[i])
    path = tmp_path / "data" / "list.txt"
    path.write_text(f"b/1.png\n\n{tmp_path}/data/a/2.png\nwith space.png\nb/ü.png\n", encoding="utf-8")
    dataset = open_dataset("folder", path)
    assert (dataset.labels, list(dataset.classes)) == ([-1] * 4, [])
    for i, (image, _) in enumerate(dataset):
        assert np.array_equal(np.asarray(image), PIXELS[i])
    lines = ["b/1.png\tzebra", "a/2.png\tbig cat", "with space.png\tzebra", "b/ü.png\tant"]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    dataset = open_dataset("folder", str(path))
    assert (dataset.labels, dataset.classes) == ([2, 1, 2, 0], ["ant", "big cat", "zebra"])
    assert np.array_equal(np.asarray(dataset[3][0]), PIXELS[3])
    assert len(open_dataset("folder", path, train_images=2)) == 2


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"a.png\tx\nb.png\n", r"has a class after a tab for 1 of its 2 images, but not for b.png: expected a class"),
        (b"a.png\nc.png\nd.png\n", r"list.txt lists 3 images, 2 are missing; the first: .*c.png"),
        (b"\xff\xfe\n", r"cannot read .*list.txt: .*decode"),
        (b"\n \n", r"cannot read .*list.txt: it is empty"),
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
    with pytest.raises(UserError, match="--classes has no effect with a list of images"):
        open_dataset("folder", tmp_path, classes="x")
    one = {split: open_dataset("folder", tmp_path / "train.txt", split) for split in ("train", "val")}
    with pytest.raises(UserError, match="or they hold the same files"):
        check_splits(one, tmp_path / "train.txt")


NAMES = ["a, b.png", 'say "c".png', "line\u2028d.png", "\x0cform\x0cfeed.png"]
KINDS = ["cat", "dog, small", "cat", "caf\u00e9"]


def write_table(path, header, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])


@pytest.mark.parametrize(
    ("name", "header", "delimiter", "options"),
    [
        ("t.csv", ("FileName", "Label"), ",", {}),
        ("t.tsv", ("image_path", "class_name"), "\t", {}),
        ("t.csv", (" img", "target"), ";", {}),
        ("T.CSV", ("file", "species"), ",", {"label_column": "species"}),
        ("t.csv", ("path", "label"), ",", {"image_column": "path"}),
    ],
)
def test_tables_with_a_header(tmp_path, name, header, delimiter, options):
    for i, file in enumerate(NAMES):
        save(tmp_path / file, PIXELS[i])
    rows = [(NAMES[i], i, unicodedata.normalize("NFD", KINDS[i])) for i in range(4)]
    write_table(tmp_path / name, (header[0], "width", header[1]), rows, delimiter)
    images = open_dataset("folder", tmp_path / name, **options)
    assert [np.asarray(image).tolist() for image, _ in images] == PIXELS[:4].tolist()
    assert [images.classes[label] for label in images.labels] == KINDS
    taken = f"{name}: images from column {header[0].strip()}, classes from column {header[1]}"
    assert images.describe() == f"4 images (4 PNG) in 3 classes; {taken}; all of {tmp_path / name}"
    for i, split in enumerate(("train", "val")):
        rows = [(NAMES[i], "x"), (NAMES[i + 2], "y")]
        write_table(tmp_path / f"{split}{Path(name).suffix.lower()}", header, rows, delimiter)
    splits = {split: open_dataset("folder", tmp_path, split, **options) for split in ("train", "val")}
    check_splits(splits, tmp_path)
    assert [list(images.paths)[1] for images in splits.values()] == [f"{tmp_path}/{NAMES[i]}" for i in (2, 3)]


def test_lists_are_cut_at_line_breaks_only(tmp_path):
    for i, file in enumerate(NAMES):
        save(tmp_path / file, PIXELS[i])
    lines = [f"{file}\t{kind}" for file, kind in zip(NAMES, KINDS, strict=True)]
    for file, end in (("list.txt", "\n"), ("list", "\r\n"), ("old.tsv", "\n")):  # the last is a table without a header
        (tmp_path / file).write_bytes(end.join(lines).encode())
        images = open_dataset("folder", tmp_path / file)
        assert [np.asarray(image).tolist() for image, _ in images] == PIXELS[:4].tolist()
        assert [images.classes[label] for label in images.labels] == KINDS


def test_the_layout_of_lists_is_named(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\tx\n")
    write_table(tmp_path / "t.csv", ("path", "species"), [("a.png", "x")])

    def message(name, *splits):
        with pytest.raises(UserError) as error:
            check_splits({split: open_dataset("folder", tmp_path / name, split) for split in splits}, name)
        return str(error.value)

    expected = "list.txt has no lists train.txt and val.txt, .* expected .*IMAGE<tab>CLASS.* --tuning"
    assert re.search(expected, message("list.txt", "train", "val"))
    assert re.search("no labels, expected .*the columns path, species: give --label_column", message("t.csv", "train"))


def test_images_of_a_folder_or_a_list(tmp_path):
    for name in ("train/a/1.png", "train/b/2.jpg", "val/a/3.png"):
        save(tmp_path / name)
    assert listed_images(tmp_path) == [tmp_path / "train/a/1.png", tmp_path / "train/b/2.jpg"]
    (tmp_path / "list.txt").write_text(f"val/a/3.png\n\n{tmp_path}/train/a/1.png\n")
    assert listed_images(tmp_path / "list.txt") == [tmp_path / "val/a/3.png", tmp_path / "train/a/1.png"]


def test_paths_are_a_sequence():
    names = ["a/1.png", "ü.png", "b\udcff.png", "", "a\nb"]
    paths = Paths(names, "root/")
    full = ["root/" + name for name in names]
    assert list(paths) == full
    assert (len(paths), paths[1], paths[-1]) == (5, full[1], full[-1])
    assert full[2] in paths
    assert "a/1.png" not in paths
    assert list(paths.keep([3, 0])) == [full[3], full[0]]
    assert list(pickle.loads(pickle.dumps(paths))) == full
    with pytest.raises(IndexError):
        paths[5]
    assert not list(Paths([]))


def test_names_of_images_have_the_hashes_of_earlier_versions(tmp_path, monkeypatch):
    """With which runs of version 0.9.0 resume."""
    for name in ("b/1.png", "a/2.png", "a/deep/ü.png", "top.png"):
        save(tmp_path / "data" / name)
    (tmp_path / "data/list.txt").write_text("b/1.png\na/2.png\n")
    monkeypatch.chdir(tmp_path)
    for root in ("data", "./data/", tmp_path / "data"):
        assert hash_of_names(open_dataset("folder", root))[:16] == "acabe401ef545a20"
        assert hash_of_names(open_dataset("folder", f"{root}/list.txt"))[:16] == "2d59af84f9cfb88c"
    assert hash_of_names(open_dataset("digits"))[:16] == "e3b0c44298fc1c14"


def test_names_of_images_do_not_depend_on_how_the_folder_is_named(tmp_path, monkeypatch):
    """But with version 0.9.0 they did."""
    for name in ("d/b/1.png", "d/a/2.png", "e/3.png"):
        save(tmp_path / name)
    lines = ("b/1.png", "./a/2.png", "../e/3.png", f"{tmp_path}/d/b/1.png", f"{tmp_path}/e/3.png")
    (tmp_path / "d/list.txt").write_text("\n".join(lines))
    hashes = {"": [], "list.txt": []}
    for folder, root in ((".", "d"), ("d", "."), ("e", "../d"), ("d", tmp_path / "d"), ("e", f"{tmp_path}/e/../d")):
        monkeypatch.chdir(tmp_path / folder)
        for name, found in hashes.items():
            found.append(hash_of_names(open_dataset("folder", Path(root, name))))
    names = ["/b/1.png", "/a/2.png", "/../e/3.png", "/b/1.png", f"{tmp_path}/e/3.png"]
    for name, expected in (("", ["/a/2.png", "/b/1.png"]), ("list.txt", names)):
        assert set(hashes[name]) == {hashlib.sha256("\n".join(expected).encode()).hexdigest()}
    monkeypatch.chdir(tmp_path / "d")
    earlier = hashlib.sha256(b"a/2.png\nb/1.png").hexdigest()
    assert hash_of_names(open_dataset("folder", "."), as_text=True) == earlier


TRAINING = [*TINY, "--epochs", "2", "--warmup_epochs", "0", "--lr", "0.05", "--log_every", "1", "--knn_every", "1"]
TRAINING += ["--save_every_steps", "1", "--num_workers", "1", "--batch_size_per_gpu", "2"]


@pytest.fixture(scope="module")
def textures(tmp_path_factory, photographs):
    """Return a folder with the same images in class folders and in lists."""
    root = tmp_path_factory.mktemp("textures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        lines = ""
        for name, photo in zip(("china", "flower"), photographs, strict=True):
            for i in range(count):
                left, top = int(rng.integers(500)), int(rng.integers(300))
                path = root / f"folder/{split}/{name}/{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                photo.crop((left, top, left + 100, top + 100)).save(path)
                lines += f"folder/{split}/{name}/{i}.jpg\t{name}\n"
        (root / f"{split}.txt").write_text(lines)
    return root


@pytest.mark.slow
def test_lists_train_as_a_folder(textures, tmp_path):
    for name, path in (("folder", textures / "folder"), ("lists", textures)):
        main_lgssl.main([*TRAINING, "--data_path", str(path), "--output_dir", f"{tmp_path}/{name}"])
    assert fingerprint(tmp_path / "lists") == fingerprint(tmp_path / "folder")


def test_features_of_a_list_have_paths_relative_to_its_folder(textures, tmp_path):
    network = "--pretrained_weights none --arch vit_micro --patch_size 8 --crop_size 32 --num_workers 0".split()
    extract_features.main(["--data_path", f"{textures}/val.txt", *network, "--output", f"{tmp_path}/x.npz"])
    with np.load(tmp_path / "x.npz") as file:
        assert file["paths"][0] == "folder/val/china/0.jpg"
        assert file["labels"].tolist() == [0] * 4 + [1] * 4


def test_bench_folder_prints_each_start(monkeypatch, capsys, tmp_path):
    words = f"bench_folder --files 100 --classes 7 --images 3 --rounds 2 --folder {tmp_path}"
    monkeypatch.setattr(sys, "argv", words.split())
    bench_folder.main()
    lines = capsys.readouterr().out.splitlines()
    assert "100 images in 7 folders" in lines[0]
    assert [line.split()[1] for line in lines[3:]] == ["1", "2"]
    assert not list(tmp_path.iterdir())
