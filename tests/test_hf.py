"""Data sets of Hugging Face, among them tars with WebDataset's layout."""

import io
import json
import os
import pickle
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, open_dataset
from PIL import Image, ImageFile
from test_main_lgssl import TINY

import eval_knn
import main_lgssl
from support.evaluation import open_splits
from support.sources import DataSpec
from utils import UserError

TRANSFORMS = {"train": None, "val": None}


@pytest.fixture(autouse=True)
def datasets(tmp_path, monkeypatch):
    """Return the package, which caches below `tmp_path` and reports no progress."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # of processes that are started
    package.disable_progress_bars()
    return package


def encoded(i):
    """Return a PNG of 12×9 pixels that no other number has."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 12, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def pack(path, files, mode="w"):
    """Write a tar of {name: contents}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, contents in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
    return path


def samples(numbers, labeled=True):
    """Return the members of samples whose label is the number's remainder by 3."""
    files = {}
    for i in numbers:
        files[f"{i:04}.png"] = encoded(i)
        if labeled:
            files[f"{i:04}.cls"] = str(i % 3).encode()
    return files


def pixels_of(dataset):
    return [np.asarray(dataset.image(i)).tolist() for i in range(len(dataset))]


def expected_pixels(numbers):
    return [np.asarray(Image.open(io.BytesIO(encoded(i)))).tolist() for i in numbers]


def keys_of(dataset):
    return [int(Path(path).name) for path in dataset.paths]


def assert_one_line(message, name, **options):
    with pytest.raises(UserError, match=message) as error:
        open_dataset(f"hf:{name}", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_images_and_labels_of_tars_are_those_of_their_members(tmp_path, ending):
    """Also in folders, with the label before the image, and among other members."""
    files = {"readme": b"a text"}
    for i, (name, label) in enumerate({"a/0": " 7\n", "a/1": "12", "b/1": "7"}.items()):
        files |= {f"{name}.cls": label.encode(), f"{name}.json": b'{"x": 1}', f"{name}.png": encoded(i)}
    pack(tmp_path / f"data/0.{ending}", files, "w:gz" if ending == "tar.gz" else "w")
    pack(tmp_path / f"data/1.{ending}", {"c.png": encoded(3), "c.cls": b"3", "c.json": b"{}"}, "w")
    for _ in range(2):  # the second time from the copy
        dataset = open_dataset(f"hf:{tmp_path}/data/0.{ending}")
        names = ["0/a/0", "1/a/1", "2/b/1"]
        assert list(dataset.paths) == [f"{tmp_path}/data/0.{ending}/train/{name}" for name in names]
        assert [int(dataset.classes[label]) for label in dataset.labels] == [7, 12, 7]
        assert pixels_of(dataset) == expected_pixels(range(3))
    dataset = open_dataset(f"hf:{tmp_path}/data")
    assert pixels_of(dataset) == expected_pixels(range(4))
    assert (dataset.labels, dataset.classes) == ([1, 2, 1, 0], ["3", "7", "12"])


def test_names_of_tars(tmp_path, monkeypatch):
    for i in range(12):
        pack(tmp_path / f"shards/{i:03}.tar", samples([i]))

    def tars(pattern):
        return keys_of(open_dataset(f"hf:{tmp_path}/{pattern}"))

    assert tars("shards") == tars("shards/{000..011}.tar") == tars("shards/0*.tar") == list(range(12))
    assert tars("shards/0{0..1}{0..1}.tar") == [0, 1, 10, 11]
    monkeypatch.chdir(tmp_path / "shards")
    assert keys_of(open_dataset("hf:00{1..2}.tar")) == [1, 2]
    for pattern, message in {
        "shards/{000..013}.tar": "^no file .*/shards/012.tar: --dataset hf: takes",
        "shards/none*.tar": r"^no file .*/shards/none\*.tar: ",
        "shards/{3..1}.tar": r"^no file .*\{3\.\.1\}.tar: ",
        "shards/{0..999999999}{0..999999999}.tar": "^no file .*/shards/00.tar: ",
        "nowhere.tar": "^no file .*/nowhere.tar: ",
        "nowhere": "^cannot open the data set .*/nowhere on the hub, and no folder here: ",
    }.items():
        assert_one_line(message, f"{tmp_path}/{pattern}")


def test_tars_of_splits(tmp_path):
    for split, numbers in {"train": range(6), "val": range(6, 9)}.items():
        pack(tmp_path / f"split/{split}/0.tar", samples(numbers))
        pack(tmp_path / f"named/data-{split}-0.tar", samples(numbers))
    for name in ("split", "named"):
        splits = open_splits(DataSpec(f"hf:{tmp_path}/{name}"), TRANSFORMS)
        assert [keys_of(splits[split]) for split in ("train", "val")] == [list(range(6)), [6, 7, 8]]
    with pytest.raises(UserError, match="no splits train and validation or test"):
        open_splits(DataSpec(f"hf:{tmp_path}/split/train"), TRANSFORMS)
    kept = open_dataset(f"hf:{tmp_path}/split", train_images=3)
    assert pixels_of(kept) == expected_pixels(keys_of(kept))
    assert [int(kept.classes[label]) for label in kept.labels] == [i % 3 for i in keys_of(kept)]


def test_tars_with_some_labels_or_none(tmp_path):
    pack(tmp_path / "some.tar", samples(range(6)) | samples([6, 7], labeled=False))
    pack(tmp_path / "none.tar", samples(range(6), labeled=False))
    assert open_dataset(f"hf:{tmp_path}/some.tar").labels == [0, 1, 2, 0, 1, 2, -1, -1]  # enough for a training
    assert open_dataset(f"hf:{tmp_path}/none.tar").labels == [-1] * 6
    data = tmp_path / "some.tar"
    with pytest.raises(UserError, match=rf"^--knn_every 1: 2 of the 8 train images of hf:{data} have no labels"):
        main_lgssl.main([*TINY, "--dataset", f"hf:{data}", "--knn_every", "1", "--output_dir", f"{tmp_path}/run"])


def test_damaged_tars_are_named(tmp_path):
    whole = pack(tmp_path / "whole.tar", samples(range(4))).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        third = [member.offset for member in archive][2]
    path = tmp_path / "cut/0.tar"
    path.parent.mkdir()
    zipped = pack(tmp_path / "whole.tar.gz", samples(range(4)), "w:gz").read_bytes()
    for contents in (
        *(whole[:length] for length in (0, 300, third, third + 100, third + 700)),
        whole[:third] + b"x" * 512 + whole[third + 512 :],
        b"no tar, but a long text\n" * 99,
        zipped[: len(zipped) // 2],
    ):
        path.write_bytes(contents)
        for name in (path, path.parent):
            assert_one_line(f"^cannot open the data set {name}: {path} is damaged or cut short: .", name)
    path.write_bytes(whole)
    assert len(open_dataset(f"hf:{path}")) == 4
    pack(path, samples(range(5)))  # a changed tar is read again
    assert len(open_dataset(f"hf:{path}")) == 5
    path.unlink()
    os.mkfifo(path)
    assert_one_line("no file .*cut", path)
    pack(tmp_path / "0.tar", {"0.png": b"x", "0.cls": b"cat"})
    assert_one_line(
        r"cannot open the data set .*0.tar: invalid literal for int\(\) with base 10: b'cat'", tmp_path / "0.tar"
    )
    pack(tmp_path / "1.tar", {"0.txt": b"x", "1.txt": b"y"})
    assert_one_line(r"1.tar has no column of images: its columns are txt \(string\)", tmp_path / "1.tar")


def test_a_bad_image_in_a_tar_is_named(tmp_path):
    path = pack(tmp_path / "0.tar", samples(range(6), labeled=False) | {"x/6.png": b"no image", "7.jpg": encoded(7)})
    dataset = open_dataset(f"hf:{path}")
    for row, reason in {6: "6/x/6: cannot identify", 7: "7/7: the row has no image"}.items():
        with pytest.raises(UserError, match=f"^cannot read image {path}/train/{reason}"):
            dataset[row]


def test_tars_are_read_in_any_order_by_any_number_of_processes(tmp_path):
    for shard in range(3):
        pack(tmp_path / f"data/{shard}.tar", samples(range(5 * shard, 5 * shard + 5)))
    dataset = open_dataset(f"hf:{tmp_path}/data", transform=np.asarray)
    order = np.random.default_rng(0).permutation(15).tolist()
    loader = torch.utils.data.DataLoader(dataset, None, sampler=order, num_workers=2)
    for _ in range(2):
        items = list(loader)
        assert [image.tolist() for image, _ in items] == expected_pixels(order)
        assert [label for _, label in items] == [i % 3 for i in order]


def test_intensities_in_a_tar(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(file, "TIFF")
    pack(tmp_path / "0.tar", {"0.tif": file.getvalue()})
    assert_one_line("0.tar/train/0/0: its values are floats; give --intensity_range", tmp_path / "0.tar")
    dataset = open_dataset(f"hf:{tmp_path}/0.tar", intensity_range=[0, 1])
    assert np.asarray(dataset.image(0))[0, :, 0].tolist() == [0, 127, 255]


def test_dataset_tar_is_refused_with_the_line_to_use(tmp_path):
    """Also where a run with it is resumed, whose options are the same."""
    with pytest.raises(UserError, match="tars are read with --dataset hf:PATH and without --data_path"):
        main_lgssl.main(["--dataset", "tar", "--data_path", str(tmp_path), "--output_dir", str(tmp_path / "run")])


def table(datasets, numbers, **columns):
    """Return a data set of images with the class names a, b, c, and further columns {name: (feature, values)}."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    values = {"image": [{"bytes": encoded(i), "path": None} for i in numbers], "label": [i % 3 for i in numbers]}
    for name, (feature, own) in columns.items():
        features[name], values[name] = feature, own
    features = {name: feature for name, feature in features.items() if feature is not None}
    values = {name: values[name] for name in features}
    return datasets.Dataset.from_dict(values, datasets.Features(features))


def write_images(folder, numbers):
    for i in numbers:
        path = folder / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))


@pytest.mark.parametrize("layout", ["parquet", "arrow", "saved", "saved dictionary", "imagefolder", "one parquet file"])
def test_images_and_labels_of_hf_are_those_that_were_written(tmp_path, datasets, layout):
    folder, train, val = tmp_path / "data", table(datasets, range(7)), table(datasets, range(7, 10))
    numbers = {"train": list(range(7)), "val": list(range(7, 10))}
    if layout == "parquet":
        train.to_parquet(folder / "train.parquet")
        val.to_parquet(folder / "validation.parquet")
    elif layout == "arrow":
        folder.mkdir()
        for name, rows in (("train", train), ("validation", val)):
            rows.save_to_disk(tmp_path / name)
            (tmp_path / name / "data-00000-of-00001.arrow").rename(folder / f"{name}.arrow")
    elif layout == "saved":
        table(datasets, range(9, -1, -1)).sort("label").select(range(7)).save_to_disk(folder)
        numbers = {split: [9, 6, 3, 0, 7, 4, 1] for split in numbers}
    elif layout == "saved dictionary":
        datasets.DatasetDict({"train": train, "validation": val}).save_to_disk(folder)
    elif layout == "imagefolder":
        for split, name in (("train", "train"), ("val", "validation")):
            write_images(folder / name, numbers[split])
        numbers = {split: sorted(own, key=lambda i: (i % 3, i)) for split, own in numbers.items()}
    else:
        train.to_parquet(folder / "train.parquet")
        folder, numbers["val"] = folder / "train.parquet", numbers["train"]
    for split in ("train", "val"):
        dataset = open_dataset(f"hf:{folder}", split=split)
        assert pixels_of(dataset) == expected_pixels(numbers[split])
        assert dataset.classes == ["a", "b", "c"]
        assert dataset.labels == [i % 3 for i in numbers[split]]
        name = "train" if layout in ("saved", "one parquet file") or split == "train" else "validation"
        assert dataset.paths[2] == f"{folder}/{name}/2"
    whole = open_dataset(f"hf:{folder}")
    assert pixels_of(pickle.loads(pickle.dumps(whole))) == pixels_of(whole)  # sent to a process that is not forked
    dataset = open_dataset(f"hf:{folder}", train_images=4)
    rows = keys_of(dataset)
    assert rows == sorted(set(rows))
    assert pixels_of(dataset) == [np.asarray(whole.image(row)).tolist() for row in rows]
    assert dataset.labels == [whole.labels[row] for row in rows]


def test_labels_are_read_without_decoding(tmp_path, datasets, monkeypatch):
    table(datasets, range(5)).to_parquet(tmp_path / "data/train.parquet")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("an image was decoded"))
    assert open_dataset(f"hf:{tmp_path}/data").labels == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("splits", [("validation", "test"), ("test",), ("valid", "test"), ()])
def test_splits_of_hf(tmp_path, datasets, splits, capsys):
    parts = {"train": range(6)} | {name: range(10 + len(name), 13 + len(name)) for name in splits}
    datasets.DatasetDict({name: table(datasets, own) for name, own in parts.items()}).save_to_disk(tmp_path / "data")
    spec = DataSpec(f"hf:{tmp_path}/data")
    if not splits:
        with pytest.raises(UserError, match="data has no splits train and validation or test, or they hold"):
            open_splits(spec, TRANSFORMS)
        return
    found = open_splits(spec, TRANSFORMS)
    assert pixels_of(found["val"]) == expected_pixels(parts[splits[0]])
    said = f"{tmp_path}/data has no validation split: its split test is used\n"
    assert capsys.readouterr().out == (said if splits == ("test",) else "")


def test_unsuitable_splits_of_hf_are_named(tmp_path, datasets):
    one = table(datasets, [1])
    datasets.DatasetDict({"train": one, "extra": one}).save_to_disk(tmp_path / "a")
    datasets.DatasetDict({"first": one, "test": one}).save_to_disk(tmp_path / "b")
    assert_one_line(
        "a has the splits train, extra, expected train, and validation or test", tmp_path / "a", split="val"
    )
    assert_one_line("b has the splits first, test, expected train", tmp_path / "b")


def test_columns_of_hf(tmp_path, datasets):
    """Images are found by their type, also as it is stored without its name. Labels may be integers."""
    numbers = list(range(4))
    stored = [{"bytes": encoded(i), "path": None} for i in numbers]
    integers = (datasets.Value("int32"), [40, 7, None, 7])
    other = datasets.ClassLabel(names=["x", "y"])
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    tables = {
        "two": table(datasets, numbers, second=(datasets.Image(), stored[::-1]), coarse=(other, [1, 0, 1, -1])),
        "integers": table(datasets, numbers, label=integers),
        "plain": table(datasets, numbers, image=(datasets.Value("binary"), [x["bytes"] for x in stored])),
        "unlabeled": table(datasets, numbers, label=(None, None), name=(datasets.Value("string"), list("abcd"))),
        "unnamed": table(datasets, numbers, label=(None, None), target=integers),
        "negative": table(datasets, numbers, label=(datasets.Value("int64"), [0, 1, -2, 3])),
        "stored": table(datasets, numbers, image=(struct, stored)),
    }
    for name, rows in tables.items():
        rows.save_to_disk(tmp_path / name)

    def opened(name, **columns):
        return open_dataset(f"hf:{tmp_path}/{name}", **columns)

    for name in ("integers", "unlabeled", "stored"):
        assert pixels_of(opened(name)) == expected_pixels(numbers)
    assert (opened("integers").labels, opened("integers").classes) == ([1, 0, -1, 0], ["7", "40"])
    assert (opened("unlabeled").labels, opened("unlabeled").classes) == ([-1] * 4, ())
    assert opened("unnamed").labels == [-1] * 4
    assert opened("unnamed", label_column="target").labels == [1, 0, -1, 0]
    both = opened("two", image_column="second", label_column="coarse")
    assert pixels_of(both) == expected_pixels(numbers[::-1])
    assert (both.labels, both.classes) == ([1, 0, 1, -1], ["x", "y"])
    assert pixels_of(opened("plain", image_column="image")) == expected_pixels(numbers)
    for name, columns, message in [
        ("two", {}, r"two has 2 columns of images: its columns are image \(Image\), label \(ClassLabel\), second "
         r"\(Image\), coarse \(ClassLabel\); give --image_column"),
        ("two", {"image_column": "second"}, "has 2 columns of labels: .*; give --label_column"),
        ("plain", {}, r"has no column of images: its columns are image \(binary\), label .*; give --image_column"),
        ("integers", {"image_column": "img"}, r"has no column img: its columns are image \(Image\), label \(int32\);"),
        ("unlabeled", {"label_column": "name"}, "^cannot read .*unlabeled: "),
        ("negative", {}, "the column label of .*negative has the label -2, expected -1"),
    ]:  # fmt: skip
        assert_one_line(message, tmp_path / name, **columns)


def test_bad_images_of_hf_are_named(tmp_path, datasets):
    write_images(tmp_path, [4])
    os.mkfifo(tmp_path / "5.png")
    stored = [(encoded(0), None), (b"no image", "x.jpg"), (None, None), (encoded(0)[:60], None)]
    stored += [(None, str(path)) for path in (tmp_path / "b/4.png", tmp_path / "5.png", tmp_path / "6.png")]
    rows = [{"bytes": contents, "path": path} for contents, path in stored] + [None]
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    datasets.Dataset.from_dict({"image": rows}, features).save_to_disk(tmp_path / "data")
    dataset = open_dataset(f"hf:{tmp_path}/data")
    reasons = {1: "cannot identify", 2: "the row has no image", 3: "", 5: "not a regular", 6: "No such", 7: "no image"}
    for row, reason in reasons.items():
        with pytest.raises(UserError, match=f"^cannot read image {tmp_path}/data/train/{row}: .*{reason}") as error:
            dataset[row]
        assert "\n" not in str(error.value)
    assert [np.asarray(dataset.image(row)).tolist() for row in (0, 4)] == expected_pixels([0, 4])


def test_damaged_and_missing_files_of_hf_are_named(tmp_path, datasets, capfd, monkeypatch):
    path = tmp_path / "short/train.parquet"
    table(datasets, range(5)).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-300])
    table(datasets, range(5)).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:900])
    table(datasets, range(5)).save_to_disk(tmp_path / "state")
    (tmp_path / "state/state.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for name in ("short", "saved", "state", "empty"):
        assert_one_line(f"cannot open the data set {tmp_path}/{name}: .", tmp_path / name)
    (tmp_path / "text.csv").write_text("a,b\n")
    assert_one_line("^cannot open the data set .*text.csv: Couldn't find any data file", tmp_path / "text.csv")
    for name in ("./nowhere", "a/b/c"):
        assert_one_line(f"^cannot open the data set {name}.*no folder here", name)
    assert capfd.readouterr().err == ""

    def no_network(name, **_):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", no_network)
    assert_one_line("data set no/where on the hub, and no folder here: Couldn't reach", "no/where")


def test_hf_needs_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert_one_line(f"^--dataset hf:{tmp_path} needs the package datasets: pip install datasets$", tmp_path)
    for name in ("image_column", "label_column"):
        with pytest.raises(UserError, match=f"--{name} has no effect with --dataset folder"):
            open_dataset("folder", tmp_path, **{name: "x"})


KILLED = """
import os, signal, sys
import main_lgssl
from support import checkpoints

saved, save_run = [], checkpoints.save_run

def save_and_die(*args, **kwargs):
    save_run(*args, **kwargs)
    saved.append(1)
    if len(saved) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == '__main__':
    checkpoints.save_run = save_and_die
    main_lgssl.main(sys.argv[1:])
"""


@pytest.fixture
def tars(tmp_path, photo_folder):
    """Return the options that name tars of the photographs in `photo_folder`, two for either split."""
    for split in ("train", "val"):
        paths = sorted(photo_folder.glob(f"{split}/*/*.jpg"))
        for shard in range(2):
            files = {}
            for i, path in enumerate(paths[shard * len(paths) // 2 : (shard + 1) * len(paths) // 2]):
                files[f"{i}.jpg"], files[f"{i}.cls"] = path.read_bytes(), b"%d" % (path.parent.name == "flower")
            pack(tmp_path / f"data/{split}/{shard}.tar", files)
    return ["--dataset", f"hf:{tmp_path}/data"]


def options(output, *words):
    steps = ["--epochs", 2, "--warmup_epochs", 0, "--lr", 0.05, "--save_every_steps", 1]
    return [*TINY, "--output_dir", str(output), *map(str, [*steps, *words])]


def results_of(output, data):
    """Return the weights of a run and what its log and k-NN say."""
    words = [*data, "--pretrained_weights", f"{output}/checkpoint.pth", "--nb_knn", "2", "--num_workers", "0"]
    eval_knn.main(list(map(str, words)))
    (path,) = output.glob("knn_*.json")
    state = torch.load(output / "checkpoint.pth", weights_only=True)
    weights = {name: tensor.tolist() for name, tensor in state["student"].items()}
    losses = [json.loads(line)["train_loss"] for line in (output / "log.txt").read_text().splitlines()]
    return weights, losses, json.loads(path.read_text())["knn"]


@pytest.mark.slow
def test_a_killed_run_on_tars_ends_as_one_on_a_folder_of_the_same_files(tars, tmp_path, photo_folder, run_script):
    main_lgssl.main(options(tmp_path / "folder", "--data_path", photo_folder))
    main_lgssl.main(options(tmp_path / "whole", *tars))
    (tmp_path / "killed.py").write_text(KILLED)
    words = [tmp_path / "killed.py", *options(tmp_path / "killed", *tars, "--num_workers", 2)]
    process = run_script(*words, check=False, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert 0 < torch.load(tmp_path / "killed/checkpoint.pth", weights_only=True)["step"] < 6
    main_lgssl.main(options(tmp_path / "killed", *tars, "--num_workers", 2))
    data = {"folder": ["--data_path", photo_folder], "whole": tars, "killed": tars}
    found = [results_of(tmp_path / name, words) for name, words in data.items()]
    assert found[0] == found[1] == found[2]


def test_online_knn_and_other_images_of_a_training_on_tars(tars, tmp_path, run_main):
    process = run_main("main_lgssl.py", *options(tmp_path / "run", *tars, "--knn_every", 1))
    assert "top-1" in process.stdout
    shutil.copy(tmp_path / "data/train/1.tar", tmp_path / "data/train/2.tar")
    process = run_main("main_lgssl.py", *options(tmp_path / "run", *tars, "--knn_every", 1), check=False)
    assert process.returncode == 2
    assert "was trained on 12 images, found 18" in process.stderr
    path = tmp_path / "data/train/1.tar"
    path.write_bytes(path.read_bytes()[:9000])
    process = run_main("main_lgssl.py", *options(tmp_path / "other", *tars), check=False)
    assert process.returncode == 2
    assert process.stderr.startswith(
        f"main_lgssl.py: error: cannot open the data set {tmp_path}/data: {path} is damaged"
    )
    assert process.stderr.count("\n") == 1
    assert not (tmp_path / "other").exists()
