"""Images in tars with WebDataset's layout, read in any order through an index of their offsets."""

import glob
import io
import itertools
import os
import re
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from support.decoding import refuse_irregular
from support.folders import IMAGE_SUFFIXES, SPLITS, refuse_other_splits
from support.images import ImageList, numbered_classes
from support.index import cached, save
from utils import UserError, first_line, is_first_process, printable, warn

MAX_FILES = 128  # tars that a process holds open
MAX_SHARDS = 2**20  # tars of a pattern
MAX_IMAGE = 2**30  # bytes of an encoded image
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BLOCK = 512  # bytes; a tar consists of blocks, and ends with zeros
HEADER = struct.Struct("<8s4q")  # of an index: MAGIC, size and mtime_ns of its tar, number of images, CRC of the rest
MAGIC = b"LGSSL-1\n"


class TarImages(ImageList):
    """The images in tars, in their order there. See `sources.build_dataset`.

    The members of a sample share their name up to the first dot: `0001.jpg` is an image and `0001.cls` its label, the
    text of an integer of at least 0. Members with other endings are ignored.

    Attributes:
        root: folder that the names of the tars are relative to.
        paths: TAR/MEMBER of each image, for messages.
        places: int64 [n, 3], number of the tar, offset and size in bytes of each image.

    Raises:
        UserError: there are no tars or no images, or a tar is compressed, damaged or cut short.
    """

    layout = "tars in {0}/train and {0}/val, with an integer in 0001.cls beside each 0001.jpg"

    def __init__(self, data_path, split="train", rebuild_index=False):
        self.root, self.shards, self.has_splits = find_shards(data_path, split)
        quiet = not is_first_process() or not sys.stderr.isatty()
        indexes = [
            open_index(shard, rebuild_index) for shard in tqdm(self.shards, "reading tars", delay=1, disable=quiet)
        ]
        super().__init__(
            f"{shard}/{name}" for shard, index in zip(self.shards, indexes, strict=True) for name in index.names
        )
        if not len(self.paths):
            raise UserError(f"no images in the {len(indexes)} tars of {data_path}, expected members like 0001.jpg")
        numbers = np.arange(len(indexes)).repeat([len(index.names) for index in indexes])
        self.places = np.column_stack([numbers, np.concatenate([index.places for index in indexes])])
        self.labels, self.classes = numbered_classes(np.concatenate([index.labels for index in indexes]))
        self.versions = [index.version for index in indexes]
        self.files = {}  # {number of a tar: open file}, those used last at the end

    def __getstate__(self):
        return {**self.__dict__, "files": {}}

    def file(self, index) -> BinaryIO:
        number, offset, size = self.places[index].tolist()
        try:
            if size > MAX_IMAGE:
                raise ValueError(f"{size} bytes are more than {MAX_IMAGE}")
            contents = read_at(self.open(number), size, offset)
            if len(contents) < size:
                raise ValueError("its tar is shorter than before")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot read image {printable(self.paths[index])}: {reason}") from error
        return io.BytesIO(contents)

    def open(self, number) -> BinaryIO:
        """Return an open tar. Each process opens its own; one that is inherited stays usable, see `read_at`."""
        file = self.files.pop(number, None)
        if file is None:
            file = open(self.shards[number], "rb", buffering=0)  # noqa: SIM115
            if version_of(file) != self.versions[number]:
                raise ValueError("its tar has changed since the start")
        self.files[number] = file
        if len(self.files) > MAX_FILES:
            self.files.pop(next(iter(self.files))).close()
        return file

    def keep(self, indices) -> None:
        super().keep(indices)
        self.places = self.places[indices]


def read_at(file, size, offset) -> bytes:
    """Read from an offset, without moving the position, which processes share that have inherited the file."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)  # Windows, where processes inherit no files
    return file.read(size)


def version_of(file) -> tuple[int, int]:
    """Return (size in bytes, time of the last change in ns) of an open file."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def find_shards(data_path, split) -> tuple[Path, list[Path], bool]:
    """Return (folder, tars, whether other tars belong to the other split).

    Args:
        data_path: folder of tars, or of `train` and `val` with tars; or a pattern of paths with ranges as {000..099},
            alternatives as {a,b} and wildcards.

    Raises:
        UserError: there is no tar, a tar of a range is missing, or the tars are named like different splits.
    """
    folder, has_splits = Path(data_path), False
    if os.path.isdir(folder):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            folder, has_splits = folder / split, True
        names = [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
        shards = [folder / name for name in names if name.endswith(".tar")]
        if not shards:
            refuse_other_splits(folder, [folder / name for name in names if os.path.isdir(folder / name)])
            raise UserError(f"no tars in {folder}, expected files that end in .tar")
    else:
        shards = [Path(name) for name in expand(str(data_path))]
        folder = Path(os.path.commonpath([os.path.abspath(shard.parent) for shard in shards]))
        if not shards[0].is_absolute():
            folder = Path(os.path.relpath(folder))
    words = {word for shard in shards for word in re.findall("[a-z]+", shard.stem.lower())}
    if len(words & SPLITS) > 1:
        found = f"{data_path} has tars of the splits {', '.join(sorted(words & SPLITS))}"
        raise UserError(f"{found}: move them to folders train and val, or give the pattern of one split")
    return folder, shards, has_splits


def expand(pattern) -> list[str]:
    """Return the paths that a pattern names, see `find_shards`.

    Raises:
        UserError: there is none, one of a range is missing, or there are too many.
    """
    if os.path.exists(pattern):  # whatever characters it has
        return [pattern]
    patterns = list(itertools.islice(expand_braces(pattern), MAX_SHARDS + 1))
    if len(patterns) > MAX_SHARDS:
        raise UserError(f"--data_path {pattern} names more than {MAX_SHARDS} tars")
    paths, missing = {}, []
    for name in patterns:
        found = [name] if os.path.exists(name) else sorted(glob.glob(name))
        found = [path for path in found if not path.endswith((".index", ".tmp"))]
        paths |= dict.fromkeys(found)  # once, if several patterns name it
        missing += [] if found else [name]
    if missing or not paths:
        of = f", one of {len(missing)} missing among {len(patterns)}" if len(patterns) > 1 else ""
        found = f"no tar {(missing or [pattern])[0]}{of}"
        raise UserError(f"{found}: --data_path takes a folder of tars, or paths as DIR/{{000..099}}.tar")
    return list(paths)


def expand_braces(text) -> Iterator[str]:
    """Yield the texts that a pattern with ranges {000..099} and alternatives {a,b} stands for, as a shell does."""
    found = re.search(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{}]*,[^{}]*))\}", text)
    if found is None:
        yield text
        return
    first, last, words = found.groups()
    if words is None:
        padded = any(len(bound) > 1 and bound[0] == "0" for bound in (first, last))
        width = max(len(first), len(last)) if padded else 0
        choices = (f"{i:0{width}}" for i in range(int(first), int(last) + 1))
    else:
        choices = words.split(",")
    for choice in choices:
        yield from expand_braces(text[: found.start()] + choice + text[found.end() :])


class Index(NamedTuple):
    """Where the images of a tar lie."""

    version: tuple[int, int]  # of the tar, see `version_of`
    places: np.ndarray  # int64 [n, 2], offset and size in bytes
    labels: np.ndarray  # int64 [n], -1 if the sample has no label
    names: list  # of the members

    def to_bytes(self) -> bytes:
        """Return the contents of the file of an index."""
        body = self.places.astype("<i8").tobytes() + self.labels.astype("<i8").tobytes()
        body += "\0".join(self.names).encode(errors="surrogateescape")
        return HEADER.pack(MAGIC, *self.version, len(self.names), zlib.crc32(body)) + body


def open_index(path, rebuild=False) -> Index:
    """Return the index of a tar, from its file, or from the tar if there is no intact one of the tar's version.

    Args:
        rebuild: do not look for the file.

    The file lies beside the tar, or, where that cannot be written to, in ~/.cache/lgssl. Several processes may do this
    at once.

    Raises:
        UserError: see `build_index`.
    """
    try:
        refuse_irregular(path)
        with open(path, "rb") as file:
            version = version_of(file)
            places = [path.with_name(f"{path.name}.index"), *cached(path, ".tar.index")]
            for place in places if not rebuild else ():
                if index := read_index(place, version):
                    return index
            index = build_index(path, file)
            if version_of(file) != version:
                raise ValueError("it was changed meanwhile")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {printable(path)}: {getattr(error, 'strerror', None) or error}") from error
    if not save(index.to_bytes(), places):
        found = " or ".join(map(str, places))
        warn(f"cannot save the index of {printable(path)} as {found}: each start builds it again")
    return index


def read_index(path, version) -> Index | None:
    """Read the file of an index. Return None if it is missing, damaged, or of another version of the tar."""
    try:
        refuse_irregular(path)
        if os.path.getsize(path) > version[0]:  # than its tar, which has at least 512 bytes for each image
            return None
        contents = Path(path).read_bytes()
        magic, *found, count, checksum = HEADER.unpack_from(contents)
        body = memoryview(contents)[HEADER.size :]
        if magic != MAGIC or tuple(found) != version or zlib.crc32(body) != checksum or not 0 <= count <= len(body):
            return None
        numbers = np.frombuffer(body, "<i8", 3 * count).astype(np.int64)
        places, labels = numbers[: 2 * count].reshape(-1, 2), numbers[2 * count :]
        names = bytes(body[24 * count :]).decode(errors="surrogateescape")
        names = names.split("\0") if count else []
        fits = (places >= 0).all() and (places[:, 0] <= version[0] - places[:, 1]).all() and (labels >= -1).all()
        return Index(version, places, labels, names) if fits and len(names) == count else None
    except (OSError, ValueError, struct.error):
        return None


def build_index(path, file) -> Index:
    """Find the images and labels of a tar, reading only its headers and labels.

    Args:
        path: of the tar, for messages.
        file: the open tar.

    Raises:
        UserError: the tar is compressed, damaged or cut short, two images or labels belong to one sample, a label is
            no integer of at least 0, or an image or label is a link or a sparse file.
    """
    version = version_of(file)
    start = file.read(8)
    file.seek(0)
    kind = next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), None)
    if kind:
        raise UserError(
            f"{printable(path)} is compressed with {kind}: images are read in any order, unpack it to a .tar"
        )
    images, labels = {}, {}  # {sample: (offset, size, name)}, {sample: label}
    for member in members(path, file, version[0]):
        folder, _, name = member.name.rpartition("/")
        key, _, ending = name.partition(".")
        is_image, is_label = f".{ending}".lower() in IMAGE_SUFFIXES, ending == "cls"
        if not key or not (is_image or is_label) or member.isdir() or member.isdev():
            continue
        shown_name = printable(f"{path}/{member.name}")
        if member.islnk() or member.issym() or member.issparse():
            kind = "sparse" if member.issparse() else "a link"
            raise UserError(f"{shown_name} is {kind}: pack plain files, with tar --dereference --hard-dereference")
        found = images if is_image else labels
        if (folder, key) in found:
            what = "image" if is_image else "label"
            raise UserError(f"{shown_name} is the second {what} of its sample, expected one with this name up to a dot")
        if is_image:
            found[folder, key] = member.offset_data, member.size, member.name.replace("\0", "")
        else:
            text = read_at(file, min(member.size, 64), member.offset_data)
            if not re.fullmatch(rb"\s*[0-9]{1,18}\s*", text):
                raise UserError(f"{shown_name} holds {text[:20]!r}, expected a label: an integer of at least 0")
            found[folder, key] = int(text)
    places = np.array([place[:2] for place in images.values()], np.int64).reshape(-1, 2)
    own = np.array([labels.get(key, -1) for key in images], np.int64)
    return Index(version, places, own, [name for _, _, name in images.values()])


def members(path, file, size) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar.

    Args:
        size: of the file in bytes.

    Raises:
        UserError: a member does not fit into the file, its header is damaged, or the end is missing.
    """
    tar, position, name = None, 0, None  # of the last member that was found
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        while (member := tar.next()) is not None:
            end = member.offset_data + (member.size if member.isreg() and not member.issparse() else 0)
            if end > size:
                raise EOFError(f"its member {member.name} ends at byte {end}, the file at byte {size}")
            if member.offset_data <= position or end < member.offset_data:  # sizes below 0
                raise ValueError(f"no header of a member at byte {member.offset}")
            position, name = member.offset_data, member.name
            yield member
            tar.members.clear()  # which would fill the memory
        file.seek(tar.offset)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise EOFError(f"it ends at byte {size} without the zeros that end a tar")
        if any(block):
            raise ValueError(f"no header of a member at byte {tar.offset}")
    except Exception as error:  # tarfile raises many kinds of errors for damaged files
        after = f", after {name}" if name else ""
        if isinstance(error, EOFError) or any(text in str(error) for text in ("unexpected end", "truncated", "empty")):
            raise UserError(
                f"{printable(path)} is cut short{printable(after)}: {printable(first_line(error))}"
            ) from error
        raise UserError(
            f"cannot read {printable(path)}{printable(after)}: {printable(first_line(error))}; expected a tar"
        ) from error
