"""Compact lists of paths, and an index of the images in a large folder, so that opening it again reads no folder."""

import contextlib
import hashlib
import itertools
import json
import os
import sys
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.decoding import refuse_irregular

VERSION = 1
MIN_FILES = 10_000  # smaller folders are opened quickly, and stay without index
SETTLED = 2.0  # seconds; coarsest unit of a file system's times of change
MAX_HEADER = 1000  # bytes


class Paths(Sequence):
    """A list of paths as one array of bytes, which forked workers share. A list of texts would be copied by each.

    Args:
        names: paths, relative to `prefix`.
        prefix: text before each of them.
    """

    def __init__(self, names: Iterable[str], prefix=""):
        encoded = [os.fsencode(name) for name in names]
        self._set(b"".join(encoded), np.fromiter(map(len, encoded), np.int64, len(encoded)), prefix)

    def _set(self, text, lengths, prefix):
        self.text, self.prefix = text, prefix
        self.ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])

    @classmethod
    def of_bytes(cls, text, lengths, prefix) -> "Paths":
        """Return the paths whose names follow each other in `text`, with these lengths in bytes [n]."""
        paths = cls.__new__(cls)
        paths._set(text, lengths, prefix)
        return paths

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        """Return a path; of a slice, a list of paths."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self.prefix + os.fsdecode(self.text[self.ends[index] : self.ends[index + 1]])

    def __iter__(self) -> Iterator[str]:
        ends = self.ends.tolist()
        form = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()  # as os.fsdecode, in half the time
        return (self.prefix + self.text[a:b].decode(*form) for a, b in itertools.pairwise(ends))

    def __eq__(self, other):
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def keep(self, indices) -> "Paths":
        """Return the paths with these indices."""
        ends = self.ends.tolist()
        parts = [self.text[ends[i] : ends[i + 1]] for i in indices]
        return Paths.of_bytes(b"".join(parts), list(map(len, parts)), self.prefix)


class Listing(NamedTuple):
    """The images below a folder.

    Attributes:
        paths: Paths, whose prefix is the folder.
        labels: label of each image, -1 if it has none.
        classes: names of the classes.
        folders: folders that were read, relative to the folder; "" is the folder itself.
    """

    paths: Paths
    labels: list
    classes: list
    folders: list


def prefix_of(root) -> str:
    """Return the text before the names in paths below a folder: root / name == prefix + name."""
    return str(Path(root) / "x")[:-1]


def places(root) -> list[Path]:
    """Return the possible places of the index of a folder: beside the folder, and in the user's cache."""
    real = Path(os.path.realpath(root))
    return [real.parent / f".{real.name}.lgssl_index", *cached(real, ".lgssl_index")]


def cached(path, suffix) -> list[Path]:
    """Return the place in the user's cache for what belongs to a path; an empty list if the user has no home."""
    with contextlib.suppress(RuntimeError):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
        return [cache / "lgssl" / f"{name}{suffix}"]
    return []


def save(contents, possible_places) -> bool:
    """Write bytes to the first place that can be written to, and return whether there is one.

    The file appears as a whole, also if several processes write it at once.
    """
    for place in possible_places:
        temporary = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(contents)
                temporary.replace(place)
                return True
            finally:
                temporary.unlink(missing_ok=True)
    return False


def read(root) -> Listing | None:
    """Return the listing in the index of a folder. None if there is none, if it is damaged, or if a folder changed.

    The time of change and the number (inode) of each folder are those of the index. These times change when an entry is
    added, removed or renamed. Files are not examined.
    """
    for place in places(root):
        # Whatever is in the file, it is only an index.
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError, ArithmeticError, MemoryError, RecursionError
        ):
            listing, states = _unpack(place, prefix_of(root))
            if np.array_equal(states, _states(root, listing.folders)):
                return listing
    return None


def write(root, listing, started) -> None:
    """Write the index of a folder, on the first process of each machine.

    There is none if no place can be written to, or if a folder changed after or less than SETTLED before `started`, the
    time when reading the folders began: a second change might go unnoticed.
    """
    if len(listing.paths) < MIN_FILES or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    with contextlib.suppress(OSError):
        states = _states(root, listing.folders)
        if states[0].max() > (started - SETTLED) * 1e9:
            return
        save(_pack(listing, states), places(root))


def _states(root, folders) -> np.ndarray:
    """Return the times of change in nanoseconds and the numbers of folders, int64 [2, n]."""
    prefix = prefix_of(root)
    found = [os.stat(prefix + folder if folder else root) for folder in folders]
    return np.array([[s.st_mtime_ns for s in found], [s.st_ino % 2**63 for s in found]], np.int64)


# An index is a line of JSON with the sizes of the parts in bytes and their checksum, and the parts.
def _pack(listing, states) -> bytes:
    classes, folders = Paths(listing.classes), Paths(listing.folders)
    parts = [np.diff(listing.paths.ends).astype("<i4"), np.array(listing.labels, "<i4"), states.astype("<i8")]
    parts += [np.diff(classes.ends).astype("<i4"), np.diff(folders.ends).astype("<i4")]
    parts = [*(part.tobytes() for part in parts), listing.paths.text, classes.text, folders.text]
    contents = b"".join(parts)
    header = {"lgssl_index": VERSION, "sizes": list(map(len, parts)), "checksum": zlib.crc32(contents)}
    return json.dumps(header).encode() + b"\n" + contents


def _unpack(path, prefix) -> tuple[Listing, np.ndarray]:
    """Return (listing, states) in an index. Raises one of many kinds of errors if it is no intact index."""
    refuse_irregular(path)
    with open(path, "rb") as file:
        header = json.loads(file.readline(MAX_HEADER))
        contents = file.read()
    sizes = header["sizes"]
    if header["lgssl_index"] != VERSION or len(sizes) != 8 or min(sizes) < 0 or sum(sizes) != len(contents):
        raise ValueError("another version, or not complete")
    if header["checksum"] != zlib.crc32(contents):
        raise ValueError("damaged")
    ends = np.cumsum([0, *sizes]).tolist()
    parts = [contents[a:b] for a, b in itertools.pairwise(ends)]
    lengths, labels, states, *more = (
        np.frombuffer(part, kind) for part, kind in zip(parts, ["<i4", "<i4", "<i8", "<i4", "<i4"], strict=False)
    )
    lists = []
    for text, each, before in zip(parts[5:], (lengths, *more), (prefix, "", ""), strict=True):
        if each.min(initial=0) < 0 or each.sum(dtype=np.int64) != len(text):
            raise ValueError("lengths that do not fit")
        lists.append(Paths.of_bytes(text, each, before))
    paths, classes, folders = lists
    if not len(paths) == len(labels) > 0 or not -1 <= labels.min() <= labels.max() < len(classes) or not len(folders):
        raise ValueError("labels that do not fit")
    return Listing(paths, labels.tolist(), list(classes), list(folders)), states.reshape(2, len(folders))
