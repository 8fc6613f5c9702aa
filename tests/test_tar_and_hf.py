import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import signal
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, open_dataset
from PIL import Image, ImageFile
from test_images import save
from test_main_lgssl import TINY

import eval_knn
import main_lgssl
from support import tar
from support.evaluation import open_splits
from support.images import ResizedArray
from support.loader import ViewBatches
from support.sources import DataSpec
from utils import UserError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Return an empty home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path / "home"


def encoded(i, kind="PNG"):
    """Return an image of 12×9 pixels that no other number has."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 12, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def pack(path, files, form=tarfile.PAX_FORMAT, mode="w"):
    """Write a tar of {name: contents, or TarInfo without contents}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=form) as archive:
        for name, contents in files.items():
            member = contents if isinstance(contents, tarfile.TarInfo) else tarfile.TarInfo(name)
            if member is contents:
                archive.addfile(member)
            else:
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


def members_of(dataset):
    """Return the names of the images relative to the folder of the tars."""
    return [os.path.relpath(path, dataset.root) for path in dataset.paths]


def pixels_of(dataset):
    return [np.asarray(dataset.image(i)).tolist() for i in range(len(dataset))]


def expected_pixels(numbers):
    return [np.asarray(Image.open(io.BytesIO(encoded(i)))).tolist() for i in numbers]


@pytest.mark.parametrize("form", FORMATS)
def test_images_and_labels_of_a_tar_are_those_of_its_members(tmp_path, form):
    """Also of long names and names that are not ASCII, with the label before the image, and among other members."""
    long = "folder/" * 12 + "x" * 60
    files = {
        "readme.txt": b"a text",
        "a/0.cls": b" 7\n",
        "a/0.json": b"{}",
        "a/0.png": encoded(0),
        "a/1.PNG": encoded(1),
        "a/1.mask.png": encoded(9),
        "a/1.cls": b"12",
        "b/1.jpg": encoded(2),
        "b/1.cls": b"7",
        "b/._1.jpg": encoded(9),
        f"{long}.png": encoded(3),
        f"{long}.cls": b"12",
    }
    if form != "ustar":  # which has no names beyond 256 bytes
        files["ü" * 150 + ".png"], files["ü" * 150 + ".cls"] = encoded(4), b"3"
    pack(tmp_path / "data/0.tar", files, FORMATS[form])
    for _ in range(2):  # without and with an index
        dataset = open_dataset("tar", tmp_path / "data/0.tar")
        names = ["a/0.png", "a/1.PNG", "b/1.jpg", f"{long}.png", "ü" * 150 + ".png"][: len(dataset)]
        assert dataset.paths == [f"{tmp_path}/data/0.tar/{name}" for name in names]
        assert len(dataset) == (4 if form == "ustar" else 5)
        assert [int(dataset.classes[label]) for label in dataset.labels] == [7, 12, 7, 12, 3][: len(dataset)]
        assert dataset.classes == (["7", "12"] if form == "ustar" else ["3", "7", "12"])
        assert pixels_of(dataset) == expected_pixels(range(len(dataset)))


def test_a_tar_has_the_pixels_and_labels_of_a_folder_of_the_same_files(tmp_path, photo_folder):
    images = sorted(photo_folder.glob("train/*/*.jpg"))
    files = {}
    for i, path in enumerate(images):
        files[f"{i}.jpg"], files[f"{i}.cls"] = path.read_bytes(), str(int(path.parent.name == "flower")).encode()
    pack(tmp_path / "0.tar", files)
    transform = ResizedArray(40)
    found = open_dataset("tar", tmp_path, transform=transform, min_side=80)
    expected = open_dataset("folder", photo_folder, transform=transform, min_side=80)
    assert found.labels == expected.labels
    for own, other in zip(found, expected, strict=True):
        assert np.array_equal(own[0], other[0])
    assert not np.array_equal(found[0][0], open_dataset("tar", tmp_path, transform=transform)[0][0])  # min_side counts


def test_names_of_tars(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MAX_SHARDS", 50)
    for i in range(12):
        pack(tmp_path / f"shards/{i:03}.tar", samples([i]))
    pack(tmp_path / "shards/x{1}.tar", samples([20]))
    pack(tmp_path / "shards/.hidden.tar", samples([21]))

    def tars(pattern):
        dataset = open_dataset("tar", f"{tmp_path}/{pattern}")
        return [Path(path).parent.name for path in dataset.paths]

    numbers = [f"{i:03}.tar" for i in range(12)]
    assert tars("shards") == [*numbers, "x{1}.tar"]
    assert tars("shards/{000..011}.tar") == numbers
    assert tars("shards/{002..002}.tar") == ["002.tar"]
    assert tars("shards/00{8,3}.tar") == ["008.tar", "003.tar"]
    assert tars("shards/0{0..1}{0,1}.tar") == ["000.tar", "001.tar", "010.tar", "011.tar"]
    assert tars("shards/00{8..9}.tar") == ["008.tar", "009.tar"]
    assert tars("shards/0*.tar") == numbers
    assert tars("shards/*1*") == ["001.tar", "010.tar", "011.tar", "x{1}.tar"]  # and no index
    assert tars("shards/{00,0}0*.tar") == numbers[:10]  # each once
    assert tars("shards/x{1}.tar") == ["x{1}.tar"]
    assert list(tar.expand_braces("{8..11}")) == ["8", "9", "10", "11"]
    assert list(tar.expand_braces("{008..1001}"))[::993] == ["0008", "1001"]
    monkeypatch.chdir(tmp_path / "shards")
    assert members_of(open_dataset("tar", "00{1,2}.tar")) == ["001.tar/0001.png", "002.tar/0002.png"]
    for pattern, message in {
        "shards/{000..013}.tar": "no tar .*/shards/012.tar, one of 2 missing among 14: --data_path takes",
        "shards/none*.tar": "no tar .*/shards/none",
        "shards/{3..1}.tar": "no tar .*3..1",
        "nowhere": "no tar .*/nowhere: --data_path takes a folder of tars",
        "": f"no tars in {tmp_path}, expected files that end in .tar",
        "shards/{0..999999999}.tar": "names more than 50 tars",
    }.items():
        with pytest.raises(UserError, match=message):
            tars(pattern)


def test_tars_of_splits(tmp_path):
    for split, numbers in {"train": range(6), "val": range(6, 9)}.items():
        pack(tmp_path / f"split/{split}/0.tar", samples(numbers))
        pack(tmp_path / f"mixed/data-{split}-0.tar", samples(numbers))
        pack(tmp_path / f"upper/{split.upper()}/0.tar", samples(numbers))
    transforms = {"train": None, "val": None}
    splits = open_splits(DataSpec(**{"dataset": "tar", "data_path": tmp_path / "split"}), transforms)
    assert [members_of(splits[split]) for split in ("train", "val")] == [
        [f"0.tar/{i:04}.png" for i in numbers] for numbers in (range(6), range(6, 9))
    ]
    with pytest.raises(UserError, match="has tars of the splits train, val: move them to folders train and val"):
        open_dataset("tar", tmp_path / "mixed")
    with pytest.raises(UserError, match="has TRAIN, VAL, expected train and val"):
        open_dataset("tar", tmp_path / "upper")
    for path in ("split/train", "split/train/0.tar"):
        with pytest.raises(UserError, match="no subfolders train and val"):
            open_splits(DataSpec(**{"dataset": "tar", "data_path": tmp_path / path}), transforms)
    tuned = open_splits(DataSpec(**{"dataset": "tar", "data_path": tmp_path / "split", "tuning": True}), transforms)
    assert sorted([*tuned["train"].paths, *tuned["val"].paths]) == list(splits["train"].paths)
    kept = open_dataset("tar", tmp_path / "split", train_images=3)
    numbers = [int(Path(path).stem) for path in kept.paths]
    assert pixels_of(kept) == expected_pixels(numbers)
    assert [int(kept.classes[label]) for label in kept.labels] == [i % 3 for i in numbers]


def test_labels_in_some_samples_or_in_one_split_only(tmp_path):
    pack(tmp_path / "some/train/0.tar", samples(range(6)) | samples([6, 7], labeled=False))
    pack(tmp_path / "some/val/0.tar", samples(range(3)))
    pack(tmp_path / "one/train/0.tar", samples(range(6)))
    pack(tmp_path / "one/val/0.tar", samples(range(3), labeled=False))
    transforms = {"train": None, "val": None}
    for name, found in {"some": "2 of the 8 train images", "one": "the val images"}.items():
        data = tmp_path / name
        with pytest.raises(UserError, match=rf"^{found} of {data} have no labels, expected .*\.cls") as error:
            open_splits(DataSpec(**{"dataset": "tar", "data_path": data}), transforms)
        assert "\n" not in str(error.value)
    assert open_dataset("tar", tmp_path / "some").labels == [0, 1, 2, 0, 1, 2, -1, -1]  # enough for a training


def entry(name, kind, **fields):
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.png": b"x", "0.cls": b"cat"}, r"0.tar/0.cls holds b'cat', expected a label: an integer of at least 0"),
        ({"0.png": b"x", "0.cls": b"-1"}, "0.cls holds b'-1'"),
        ({"0.png": b"x", "0.cls": b""}, "0.cls holds b''"),
        ({"0.png": b"x", "0.cls": b"9" * 99}, "0.cls holds b'9+'"),
        ({"0.png": b"x", "0.jpg": b"x"}, "0.tar/0.jpg is the second image of its sample"),
        ({"0.cls": b"1", "0.png": b"x", "./x": entry("0.cls", tarfile.REGTYPE)}, "0.cls is the second label"),
        ({"0.png": entry("0.png", tarfile.SYMTYPE, linkname="/etc/passwd")}, "0.png is a link: pack plain files"),
        ({"a.png": b"x", "0.png": entry("0.png", tarfile.LNKTYPE, linkname="a.png")}, "0.png is a link: pack plain"),
        ({"0.txt": b"x", "1.cls": b"1", "2.mask.png": b"x"}, "no images in the 1 tars of .*expected members like 0001"),
        ({}, "no images in the 1 tars"),
        ({"d.png": entry("d.png", tarfile.DIRTYPE), "f.png": entry("f.png", tarfile.FIFOTYPE)}, "no images in the 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", FORMATS)
def test_unsuitable_members_are_named(tmp_path, files, message, form):
    pack(tmp_path / "0.tar", files, FORMATS[form])
    with pytest.raises(UserError, match=message) as error:
        open_dataset("tar", tmp_path)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) in (["0.tar"], ["0.tar", "0.tar.index"], ["0.tar.index", "0.tar"])


def test_sparse_members_are_named(tmp_path):
    """As GNU tar packs them with --sparse: a PAX header describes the holes."""
    member = tarfile.TarInfo("0.png")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9999"}
    member.pax_headers["GNU.sparse.name"] = "0.png"
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        contents = b"1\n0\n5\n".ljust(512, b"\0") + b"bytes"
        member.size = len(contents)
        archive.addfile(member, io.BytesIO(contents))
    with pytest.raises(UserError, match="0.png is sparse: pack plain files"):
        open_dataset("tar", tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_a_tar_that_is_cut_short_anywhere_is_named(tmp_path, form):
    files = {"a.png": encoded(0), "x" * 90 + ".png": encoded(1), "a.cls": b"1"}
    files["folder/" * 14 + "y" * 90 + ".png"] = encoded(2)
    whole = pack(tmp_path / "whole.tar", files, FORMATS[form]).read_bytes()
    end = len(whole.rstrip(b"\0"))
    with tarfile.open(tmp_path / "whole.tar") as archive:
        starts = sorted(member.offset for member in archive)
    path = tmp_path / "cut/0.tar"
    path.parent.mkdir()
    lengths = {0, 1, 511, 512, 600, end - 1, *starts, *(s + 100 for s in starts), *(s + 700 for s in starts)}
    for length in sorted(length for length in lengths if length < end):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"^{path} is cut short.*") as error:
            open_dataset("tar", path)
        assert "\n" not in str(error.value)
        assert not path.with_name("0.tar.index").exists()
    assert "after a.png: its member xxx" in cut_message(path, whole[: starts[1] + 600])
    path.write_bytes(whole)
    assert len(open_dataset("tar", path)) == 3


def cut_message(path, contents):
    path.write_bytes(contents)
    with pytest.raises(UserError) as error:
        open_dataset("tar", path)
    return str(error.value)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars_are_refused(tmp_path, compress):
    plain = pack(tmp_path / "plain/0.tar", samples(range(2)))
    (tmp_path / "0.tar").write_bytes(compress(plain.read_bytes()))
    with pytest.raises(UserError, match="0.tar is compressed with (gzip|bzip2|xz): .*unpack it to a .tar"):
        open_dataset("tar", tmp_path)


def test_what_is_no_tar_is_named(tmp_path):
    whole = pack(tmp_path / "whole.tar", samples(range(3))).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        offset = [member.offset for member in archive][2]
    negative = tarfile.TarInfo("0.png").tobuf()
    negative = bytearray(negative[:124] + b"\xff" * 11 + b"\x00" + negative[136:])  # a size of -256 in base 256
    negative[148:156] = b"%06o\0 " % (256 + sum(negative[:148]) + sum(negative[156:]))
    path = tmp_path / "cut/0.tar"
    path.parent.mkdir()
    cases = {
        "expected a tar": b"no tar, but a long text\n" * 99,
        f"after 0000.cls: no header of a member at byte {offset}": whole[:offset] + b"x" * 512 + whole[offset + 512 :],
        "cannot read .*0.tar": bytes(negative) + b"x" * 2048,
    }
    for message, contents in cases.items():
        path.write_bytes(contents)
        with pytest.raises(UserError, match=message) as error:
            open_dataset("tar", path)
        assert "\n" not in str(error.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="cannot read .*0.tar: not a regular file"):
        open_dataset("tar", path)


def test_mutated_tars_are_read_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    for form in FORMATS:
        whole = pack(
            tmp_path / "whole.tar", samples(range(3)) | {"y/" * 60 + ".z.png": b"x"}, FORMATS[form]
        ).read_bytes()
        headers = np.flatnonzero([whole[i + 257 : i + 262] == b"ustar" for i in range(0, len(whole), 512)]) * 512
        for _ in range(150):
            contents = bytearray(whole)
            start = int(rng.choice(headers))
            for place in rng.integers(start, start + 512, 3):
                contents[place] = rng.integers(256)
            if rng.integers(2):  # with a right checksum
                header = contents[start : start + 512]
                header[148:156] = b" " * 8
                contents[start + 148 : start + 156] = b"%06o\0 " % sum(header)
            (tmp_path / "0.tar").write_bytes(contents)
            try:
                dataset = open_dataset("tar", tmp_path / "0.tar")
                for i in range(len(dataset)):
                    dataset.file(i)
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017


def counted(monkeypatch):
    """Return a list that gets the path of each tar whose index is built."""
    built, original = [], tar.build_index

    def build(path, file):
        built.append(path.name)
        return original(path, file)

    monkeypatch.setattr(tar, "build_index", build)
    return built


def test_an_index_is_built_once_and_again_for_another_tar(tmp_path, monkeypatch):
    built = counted(monkeypatch)
    path = pack(tmp_path / "0.tar", samples(range(3)))
    for _ in range(2):
        assert pixels_of(open_dataset("tar", path)) == expected_pixels(range(3))
    assert built == ["0.tar"]
    assert sorted(os.listdir(tmp_path)) == ["0.tar", "0.tar.index"]
    before = path.stat()
    pack(path, samples(range(9)))  # of another size
    assert path.stat().st_size > before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert pixels_of(open_dataset("tar", path)) == expected_pixels(range(9))
    before = path.stat()
    pack(path, samples([3, 0, 1, 2, *range(4, 9)]))  # of the same size
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns - 1))  # older than its index
    assert pixels_of(open_dataset("tar", path)) == expected_pixels([3, 0, 1, 2, *range(4, 9)])
    assert len(built) == 3
    open_dataset("tar", path, rebuild_index=True)
    assert len(built) == 4


def test_a_damaged_or_hostile_index_is_built_again(tmp_path, monkeypatch):
    path = pack(tmp_path / "0.tar", samples(range(3)))
    expected = open_dataset("tar", path)
    index = tmp_path / "0.tar.index"
    whole, entries = index.read_bytes(), tar.open_index(path)
    built = counted(monkeypatch)
    places = entries.places
    size = path.stat().st_size
    hostile = [
        entries._replace(places=places + [[size, 0]]),
        entries._replace(places=places + [[0, size]]),
        entries._replace(places=places * [[-1, 1]]),
        entries._replace(places=places + [[2**63 - 1 - 10 * size, 0]]),
        entries._replace(places=places * 0 + [[2**63 - 1, 2**63 - 1]]),
        entries._replace(labels=entries.labels - 5),
        entries._replace(names=entries.names[:-1]),
        entries._replace(names=[*entries.names, "4.png"]),
        entries._replace(names=["0.png\0", *entries.names[1:]]),
    ]
    contents = [bytes(x.to_bytes()) for x in hostile]
    contents += [b"", b"x", whole[:-1], whole + b"x", whole[:39], whole * 9, b"\0" * 9999]
    contents += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(0, len(whole), 7)]
    contents += [pickle.dumps(print), whole[:24] + b"\xff" * 8 + whole[32:]]
    for i, content in enumerate(contents, start=1):
        index.write_bytes(content)
        dataset = open_dataset("tar", path)
        assert (dataset.paths, dataset.labels) == (expected.paths, expected.labels)
        assert np.array_equal(dataset.places, expected.places)
        assert len(built) == i
        assert index.read_bytes() == whole
    for replace in (lambda: os.mkfifo(index), lambda: index.symlink_to("/dev/zero")):
        index.unlink()
        replace()
        assert open_dataset("tar", path).paths == expected.paths
        assert index.read_bytes() == whole  # replaced


def test_where_the_tars_are_read_only_the_index_is_in_the_home_folder(tmp_path, monkeypatch, home, capsys):
    built = counted(monkeypatch)
    path = pack(tmp_path / "0.tar", samples(range(3)))
    (tmp_path / "0.tar.index").mkdir()  # cannot be replaced by a file, even by root
    for _ in range(2):
        assert pixels_of(open_dataset("tar", path)) == expected_pixels(range(3))
    assert built == ["0.tar"]
    (index,) = (home / ".cache/lgssl").iterdir()
    assert index.name.endswith(".tar.index")
    index.unlink()
    index.parent.rmdir()
    index.parent.touch()  # nor can this
    assert not capsys.readouterr().err
    for _ in range(2):
        assert len(open_dataset("tar", path)) == 3
    assert len(built) == 3
    assert capsys.readouterr().err.count(f"warning: cannot save the index of {path}") == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_several_processes_may_build_an_index_at_once(tmp_path):
    path = pack(tmp_path / "0.tar", samples(range(20)))
    found, barrier = [], threading.Barrier(8)

    def build():
        barrier.wait()
        found.append(open_dataset("tar", path).paths)

    for _ in range(5):
        threads = [threading.Thread(target=build) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found[-8:] == [found[0]] * 8
        assert sorted(os.listdir(tmp_path)) == ["0.tar", "0.tar.index"]
        (tmp_path / "0.tar.index").unlink()


def test_a_bad_image_in_a_tar_is_named_and_replaced(tmp_path):
    path = pack(tmp_path / "0.tar", samples(range(2)) | {"x/0002.jpg": b"no image", "0003.png": encoded(3)[:60]})
    dataset = open_dataset("tar", path, transform=ResizedArray(0))
    with pytest.raises(UserError, match=f"^cannot read image {path}/x/0002.jpg: cannot identify"):
        dataset[2]
    bad = {}
    image = ViewBatches(dataset, None, 8, None, 0, skip_bad=True).readable_image(2, bad)
    assert image.tolist() == expected_pixels([0])[0]
    assert list(bad) == [2, 3]
    assert f"{path}/0003.png" in bad[3]


def test_a_tar_that_changes_during_a_run_is_named(tmp_path):
    path = pack(tmp_path / "0.tar", samples(range(3)))
    pack(tmp_path / "1.tar", samples(range(3)))
    dataset, other = open_dataset("tar", tmp_path), open_dataset("tar", tmp_path)
    other.files.clear()  # opened at the start to look at intensities
    with path.open("r+b") as file:
        file.truncate(dataset.places[1][1] + 10)
    with pytest.raises(UserError, match=r"0001.png: its tar is shorter than before"):
        dataset.image(1)
    with pytest.raises(UserError, match=r"0000.png: its tar has changed since the start"):
        other.image(0)
    (tmp_path / "1.tar").unlink()
    with pytest.raises(UserError, match=r"cannot read image .*1.tar/0000.png: No such file"):
        other.image(3)


def test_few_tars_are_open_and_each_process_reads_its_own(tmp_path, monkeypatch):
    """Also those that inherit open files."""
    monkeypatch.setattr(tar, "MAX_FILES", 2)
    for i in range(5):
        pack(tmp_path / f"{i}.tar", samples([i, i + 10]))
    numbers = [0, 10, 1, 11, 2, 12, 3, 13, 4, 14]
    dataset = open_dataset("tar", tmp_path, transform=np.asarray)
    assert pixels_of(dataset) == expected_pixels(numbers)
    assert list(dataset.files) == [3, 4]
    dataset.image(6)
    assert list(dataset.files) == [4, 3]  # the one used last is closed last
    loader = torch.utils.data.DataLoader(dataset, None, num_workers=2, multiprocessing_context="fork")
    for _ in range(3):
        assert [image.tolist() for image, _ in loader] == expected_pixels(numbers)
    assert list(dataset.files) == [4, 3]
    sent = pickle.loads(pickle.dumps(dataset))  # as to a process that is not forked
    assert sent.files == {}
    assert pixels_of(sent) == expected_pixels(numbers)


def test_intensities_in_a_tar(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(file, "TIFF")
    pack(tmp_path / "0.tar", {"0.tif": file.getvalue()})
    with pytest.raises(UserError, match="0.tar/0.tif: its values are floats; give --intensity_range"):
        open_dataset("tar", tmp_path)
    dataset = open_dataset("tar", tmp_path, intensity_range=[0, 1])
    assert np.asarray(dataset.image(0))[0, :, 0].tolist() == [0, 127, 255]


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """Return the package, which caches below `tmp_path` and reports no progress."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    package.disable_progress_bars()
    return package


def table(datasets, numbers, **columns):
    """Return a data set of images with the class names a, b, c, and further columns {name: (feature, values)}."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    values = {"image": [{"bytes": encoded(i), "path": None} for i in numbers], "label": [i % 3 for i in numbers]}
    for name, (feature, own) in columns.items():
        features[name], values[name] = feature, own
    features = {name: feature for name, feature in features.items() if feature is not None}
    values = {name: values[name] for name in features}
    return datasets.Dataset.from_dict(values, datasets.Features(features))


def write_parquet(datasets, folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in splits.items():
        rows = table(datasets, numbers) if not hasattr(numbers, "to_parquet") else numbers
        rows.to_parquet(folder / f"{name}.parquet")
    return folder


LAYOUTS = ["parquet", "arrow", "saved", "saved dictionary", "imagefolder", "one parquet file"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_and_labels_of_hf_are_those_that_were_written(tmp_path, datasets, layout):
    folder, train, val = tmp_path / "data", table(datasets, range(7)), table(datasets, range(7, 10))
    numbers = {"train": range(7), "val": range(7, 10)}
    if layout == "parquet":
        write_parquet(datasets, folder, train=range(7), validation=range(7, 10))
    elif layout == "arrow":
        folder.mkdir()
        for name, rows in (("train", train), ("validation", val)):
            with datasets.arrow_writer.ArrowWriter(
                path=str(folder / f"{name}.arrow"), features=rows.features
            ) as writer:
                for row in rows.cast_column("image", datasets.Image(decode=False)):
                    writer.write(row)
                writer.finalize()
    elif layout == "saved":
        table(datasets, range(9, -1, -1)).sort("label").select(range(7)).save_to_disk(folder)
        numbers = {split: [9, 6, 3, 0, 7, 4, 1] for split in numbers}
    elif layout == "saved dictionary":
        datasets.DatasetDict({"train": train, "validation": val}).save_to_disk(folder)
    elif layout == "imagefolder":
        for split, name in (("train", "train"), ("val", "validation")):
            for i in numbers[split]:
                save(folder / name / "abc"[i % 3] / f"{i}.png", np.asarray(Image.open(io.BytesIO(encoded(i)))))
        numbers = {split: sorted(own, key=lambda i: (i % 3, i)) for split, own in numbers.items()}
    else:
        folder = write_parquet(datasets, folder, train=range(7)) / "train.parquet"
        numbers["val"] = numbers["train"]
    for split in ("train", "val"):
        dataset = open_dataset(f"hf:{folder}", split=split)
        assert pixels_of(dataset) == expected_pixels(numbers[split])
        assert dataset.classes == ["a", "b", "c"]
        assert dataset.labels == [i % 3 for i in numbers[split]]
        assert isinstance(dataset.labels[0], int)
        name = "train" if layout in ("saved", "one parquet file") or split == "train" else "validation"
        assert dataset.paths[2] == f"{folder}/{name}/2"
    whole = open_dataset(f"hf:{folder}")
    assert pixels_of(pickle.loads(pickle.dumps(whole))) == pixels_of(whole)  # sent to a process that is not forked
    dataset = open_dataset(f"hf:{folder}", train_images=4)
    rows = [int(Path(path).name) for path in dataset.paths]
    assert rows == sorted(set(rows))
    assert pixels_of(dataset) == [np.asarray(whole.image(row)).tolist() for row in rows]
    assert dataset.labels == [whole.labels[row] for row in rows]


def test_hf_has_the_pixels_of_a_folder_of_the_same_files(tmp_path, datasets, photo_folder):
    images = sorted(photo_folder.glob("train/*/*.jpg"))
    label = datasets.ClassLabel(names=["china", "flower"])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    values = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in images]}
    values["label"] = [path.parent.name for path in images]
    datasets.Dataset.from_dict(values, features).save_to_disk(tmp_path / "data")
    transform = ResizedArray(40)
    found = open_dataset(f"hf:{tmp_path}/data", transform=transform, min_side=80)
    expected = open_dataset("folder", photo_folder, transform=transform, min_side=80)
    assert (found.labels, found.classes) == (expected.labels, expected.classes)
    for own, other in zip(found, expected, strict=True):
        assert np.array_equal(own[0], other[0])


def test_labels_are_read_without_decoding(tmp_path, datasets, monkeypatch):
    write_parquet(datasets, tmp_path / "data", train=range(5))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("an image was decoded"))
    dataset = open_dataset(f"hf:{tmp_path}/data")
    assert dataset.labels == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("splits", [("validation", "test"), ("test",), ("valid", "test"), ()])
def test_splits_of_hf(tmp_path, datasets, splits, capsys):
    parts = {"train": range(6)} | {name: range(10 + len(name), 13 + len(name)) for name in splits}
    tables = {name: table(datasets, numbers) for name, numbers in parts.items()}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "data")
    named = {"dataset": f"hf:{tmp_path}/data", "data_path": None}
    transforms = {"train": None, "val": None}
    if not splits:
        with pytest.raises(UserError, match="data has no splits train and validation or test, or they hold"):
            open_splits(DataSpec(**named), transforms)
        open_splits(DataSpec(**{**named, "tuning": True}), transforms)
        return
    found = open_splits(DataSpec(**named), transforms)
    assert pixels_of(found["val"]) == expected_pixels(parts[splits[0]])
    output = capsys.readouterr().out
    assert output == (
        f"{tmp_path}/data has no validation split: its split test is used\n" if splits == ("test",) else ""
    )


def test_unsuitable_splits_of_hf_are_named(tmp_path, datasets, monkeypatch):
    datasets.DatasetDict({"train": table(datasets, [1]), "extra": table(datasets, [2])}).save_to_disk(tmp_path / "a")
    datasets.DatasetDict({"first": table(datasets, [1]), "test": table(datasets, [2])}).save_to_disk(tmp_path / "b")
    with pytest.raises(UserError, match="a has the splits train, extra, expected validation or test"):
        open_dataset(f"hf:{tmp_path}/a", split="val")
    with pytest.raises(UserError, match="b has the splits first, test, expected train"):
        open_dataset(f"hf:{tmp_path}/b")
    monkeypatch.setattr(datasets, "load_from_disk", lambda _: table(datasets, []))
    with pytest.raises(UserError, match="the split train of .*/a has no images"):
        open_dataset(f"hf:{tmp_path}/a")


def test_columns_of_hf(tmp_path, datasets):
    """Images are found by their type, also as it is stored without its name. Labels may be integers."""
    numbers = list(range(4))
    stored = [{"bytes": encoded(i), "path": None} for i in numbers]
    integers = (datasets.Value("int32"), [40, 7, None, 7])
    other = datasets.ClassLabel(names=["x", "y"])
    tables = {
        "two": table(datasets, numbers, second=(datasets.Image(), stored[::-1]), coarse=(other, [1, 0, 1, -1])),
        "integers": table(datasets, numbers, label=integers),
        "plain": table(datasets, numbers, image=(datasets.Value("binary"), [x["bytes"] for x in stored])),
        "unlabeled": table(datasets, numbers, label=(None, None), name=(datasets.Value("string"), list("abcd"))),
        "unnamed": table(datasets, numbers, label=(None, None), target=integers),
        "negative": table(datasets, numbers, label=(datasets.Value("int64"), [0, 1, -2, 3])),
    }
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    tables["stored"] = table(datasets, numbers, image=(struct, stored))
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
        ("integers", {"image_column": "label"}, r"has no images in the column label: its columns are"),
        ("integers", {"label_column": "class"}, r"has no column class: its columns are"),
        ("unlabeled", {"label_column": "name"}, r"no labels in the column name: its columns are .*name \(string\);"),
        ("negative", {}, "the column label of .*negative has the label -2, expected -1"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            opened(name, **columns)
        assert "\n" not in str(error.value)


def test_bad_images_of_hf_are_named_and_replaced(tmp_path, datasets):
    good, files = encoded(0), tmp_path / "files"
    save(files / "4.png", np.asarray(Image.open(io.BytesIO(encoded(4)))))
    os.mkfifo(files / "5.png")
    stored = [(good, None), (b"no image", "x.jpg"), (None, None), (good[:60], None), (None, str(files / "4.png"))]
    stored += [(None, str(files / "5.png")), (None, str(files / "6.png"))]
    rows = [{"bytes": contents, "path": path} for contents, path in stored] + [None]
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    datasets.Dataset.from_dict({"image": rows}, features).save_to_disk(tmp_path / "data")
    dataset = open_dataset(f"hf:{tmp_path}/data", transform=ResizedArray(0))
    reasons = {1: "cannot identify", 2: "the row has no image", 3: "", 5: "not a regular", 6: "No such", 7: "no image"}
    for row, reason in reasons.items():
        with pytest.raises(UserError, match=f"^cannot read image {tmp_path}/data/train/{row}: .*{reason}") as error:
            dataset[row]
        assert "\n" not in str(error.value)
    bad = {}
    image = ViewBatches(dataset, None, 8, None, 0, skip_bad=True).readable_image(1, bad)
    assert image.tolist() == expected_pixels([4])[0]
    assert list(bad) == [1, 2, 3]


def test_damaged_and_missing_files_of_hf_are_named(tmp_path, datasets, capfd, monkeypatch):
    path = write_parquet(datasets, tmp_path / "short", train=range(5)) / "train.parquet"
    path.write_bytes(path.read_bytes()[:-300])
    table(datasets, range(5)).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:900])
    table(datasets, range(5)).save_to_disk(tmp_path / "state")
    (tmp_path / "state/state.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.csv").write_text("a,b\n")
    for name in ("short", "saved", "state", "empty", "text.csv"):
        with pytest.raises(UserError, match=f"cannot open the data set {tmp_path}/{name}: .") as error:
            open_dataset(f"hf:{tmp_path}/{name}")
        assert "\n" not in str(error.value)
    for name in (f"{tmp_path}/nowhere", "./nowhere", "a/b/c"):
        with pytest.raises(UserError, match=f"^no folder {name}"):
            open_dataset(f"hf:{name}")
    assert capfd.readouterr().err == ""

    def no_network(name):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(UserError, match="data set no/where, which is no folder here, from the hub: Couldn't reach"):
        open_dataset("hf:no/where")


def test_hf_needs_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=f"^--dataset hf:{tmp_path} needs the package datasets: pip install datasets$"):
        open_dataset(f"hf:{tmp_path}")


def test_options_of_columns_belong_to_hf(tmp_path):
    pack(tmp_path / "0.tar", samples(range(3)))
    for name in ("image_column", "label_column"):
        with pytest.raises(UserError, match=f"--{name} has no effect with --dataset tar"):
            open_dataset("tar", tmp_path, **{name: "x"})


@pytest.fixture(params=["tar", "hf"])
def source(request, tmp_path, photo_folder):
    """Return the options that name a data set of the photographs in `photo_folder`."""
    images = {split: sorted(photo_folder.glob(f"{split}/*/*.jpg")) for split in ("train", "val")}
    if request.param == "hf":
        datasets = request.getfixturevalue("datasets")
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["china", "flower"])}
        )
        parts = {}
        for split, paths in images.items():
            stored = [{"bytes": path.read_bytes(), "path": None} for path in paths]
            labels = [path.parent.name for path in paths]
            parts[split] = datasets.Dataset.from_dict({"image": stored, "label": labels}, features)
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
        return ["--dataset", f"hf:{tmp_path}/data"]
    for split, paths in images.items():
        for shard in range(2):
            files = {}
            for i, path in enumerate(paths[shard * len(paths) // 2 : (shard + 1) * len(paths) // 2]):
                files[f"{i}.jpg"], files[f"{i}.cls"] = path.read_bytes(), b"%d" % (path.parent.name == "flower")
            pack(tmp_path / f"data/{split}/{shard}.tar", files)
    return ["--dataset", "tar", "--data_path", f"{tmp_path}/data"]


STEPS = ["--epochs", 2, "--warmup_epochs", 0, "--lr", 0.05, "--save_every_steps", 1]


def options(output, *words):
    return [*TINY, "--output_dir", str(output), *map(str, [*STEPS, *words])]


KILLED = """
import os, signal, sys
import main_lgssl

calls, check = [], main_lgssl.StopRequest.check

def check_or_die(self):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return check(self)

if __name__ == '__main__':
    main_lgssl.StopRequest.check = check_or_die
    main_lgssl.main(sys.argv[1:])
"""


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one_and_is_evaluated(source, tmp_path, photo_folder, run_script, capsys):
    """Also as one with a folder of the same files, whose images have the same order."""
    runs = {name: tmp_path / name for name in ("whole", "killed", "folder")}
    main_lgssl.main(options(runs["whole"], *source))
    main_lgssl.main(options(runs["folder"], "--data_path", photo_folder))
    (tmp_path / "killed.py").write_text(KILLED)
    words = [tmp_path / "killed.py", *options(runs["killed"], *source, "--num_workers", 2)]
    process = run_script(*words, check=False, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    assert process.returncode == -signal.SIGKILL, process.stderr
    steps = [torch.load(runs[name] / "checkpoint.pth", weights_only=True)["step"] for name in ("killed", "whole")]
    assert 0 < steps[0] < steps[1] == 6
    main_lgssl.main(options(runs["killed"], *source, "--num_workers", 2))
    states = {name: torch.load(folder / "checkpoint.pth", weights_only=True) for name, folder in runs.items()}
    for key in ("student", "teacher", "optimizer", "loss", "scaler", "step"):
        assert same(states["killed"][key], states["whole"][key]), key
        assert same(states["folder"][key], states["whole"][key]), key
    losses = [
        [json.loads(line)["train_loss"] for line in (folder / "log.txt").read_text().splitlines()]
        for folder in runs.values()
    ]
    assert losses[0] == losses[1] == losses[2]

    results = []
    for data, folder in ((source, "killed"), (["--data_path", photo_folder], "folder")):
        weights = ["--pretrained_weights", runs[folder] / "checkpoint.pth", "--nb_knn", 2, "--num_workers", 0]
        eval_knn.main(list(map(str, [*data, *weights])))
        (path,) = runs[folder].glob("knn_*.json")
        results.append(json.loads(path.read_text())["knn"]["2"])
    assert results[0] == results[1]
    assert "top1" in results[0]


@pytest.mark.parametrize("source", ["tar"], indirect=True)
def test_other_images_are_noticed_when_a_run_resumes(source, tmp_path):
    main_lgssl.main(options(tmp_path / "run", *source))
    (tmp_path / "data/train/1.tar").rename(tmp_path / "data/train/2.tar")
    with pytest.raises(UserError, match="was trained on .*use the same images"):
        main_lgssl.main(options(tmp_path / "run", *source))


def test_online_knn_and_bad_input_of_a_training(source, tmp_path, run_main):
    process = run_main("main_lgssl.py", *options(tmp_path / "run", *source, "--knn_every", 1))
    assert "top-1" in process.stdout
    if source[1] == "tar":
        path = tmp_path / "data/train/1.tar"
        path.write_bytes(path.read_bytes()[:9000])
        expected = f"main_lgssl.py: error: {path} is cut short"
    else:
        (path,) = (tmp_path / "data/train").glob("*.arrow")
        path.write_bytes(path.read_bytes()[:900])
        expected = f"main_lgssl.py: error: cannot open the data set {tmp_path}/data: "
    process = run_main("main_lgssl.py", *options(tmp_path / "other", *source), check=False)
    assert process.returncode == 2
    assert process.stderr.startswith(expected)
    assert process.stderr.count("\n") == 1
    assert not (tmp_path / "other").exists()
