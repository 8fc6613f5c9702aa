"""Data sets of images in memory and in lists of paths.

Each item of a data set is (image, label): an RGB PIL image, or the output of `transform`, and an int, -1 if the image
has no label.
"""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image
from torch.utils.data import Dataset

from augment import resize
from support.decoding import UnknownRange, gray_levels, image_suffixes, opened, read_image, refuse_unknown_range
from utils import UserError, is_first_process, printable, warn

PROBED = 16  # number of images whose intensities and orientation are checked when a folder is opened
MIN_LEVELS = 32  # gray levels; an image of more than 8 bits that keeps fewer causes a warning


class Paths(Sequence[str]):
    """A list of paths as one array of bytes, which forked workers share. A list of strings would be copied by each.

    Args:
        names: paths, relative to `prefix`.
        prefix: text before each of them.
    """

    def __init__(self, names: Iterable[str], prefix: str = ""):
        encoded = [os.fsencode(name) for name in names]
        self.text, self.prefix = b"".join(encoded), prefix
        self.ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        i = range(len(self))[index]
        return self.prefix + os.fsdecode(self.text[self.ends[i] : self.ends[i + 1]])

    def keep(self, indices: Sequence[int]) -> "Paths":
        """Return the paths with these indices."""
        return Paths((self[i].removeprefix(self.prefix) for i in indices), self.prefix)


class LabeledImages(Dataset):
    """Base of the data sets.

    Attributes:
        labels: label of each image, -1 if it has none.
        classes: names of the classes. A label is an index into this list.
        transform: applied to the PIL image; None returns the PIL image.
        has_splits: whether training and validation images differ. If not, either split has all images.
        splits, layout: what splits are called, and what is expected for an evaluation, for messages.
        found: number of files that were found, by their suffix in lower case; of lists, of images.
        total: number of images before `keep`.
        source, classes_from: which part of which data set it is, and where the classes are from, for `describe`.
    """

    labels: list[int]
    classes: Sequence[str] = ()
    transform: Callable | None = None
    has_splits = True
    splits, layout = "subfolders train and val", "{0}/train/CLASS/IMAGE and {0}/val/CLASS/IMAGE"
    found: Mapping[str, int] = {}
    total, source, classes_from = 0, "", ""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        label, image = self.labels[index], self.image(index)
        return (self.transform(image) if self.transform else image), label

    def image(self, index: int) -> Image.Image:
        """Return an RGB image. Raises UserError if it cannot be read."""
        raise NotImplementedError

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only the images with these indices."""
        self.labels = [self.labels[i] for i in indices]

    def describe(self) -> str:
        """Return one line: how many images of which formats and classes were found, where, and what was ignored."""
        formats, ignored = Counter[str](), Counter[str]()
        for suffix, count in self.found.items():
            kind = image_suffixes().get(suffix)
            (formats if kind else ignored)[kind or suffix] += count
        line = f"{len(self)} of {self.total} images" if len(self) < self.total else f"{len(self)} images"
        line += f" ({in_order(formats, '{1} {0}')})" if formats else ""
        names = "class" if len(self.classes) == 1 else "classes"
        line += f" in {len(self.classes)} {names}" if self.classes else " without classes"
        line += f"{self.classes_from}; {self.source}"
        if ignored:
            files = f"{ignored.total()} other file{'s' if ignored.total() > 1 else ''}"
            line += f"; {files} ignored ({in_order(ignored, '{0} {1}')})"
            line += "; .heic needs pip install pillow-heif" if ".heic" in ignored else ""
        return line

    def announce(self) -> None:
        """Print `describe` on stderr, in the first process."""
        if is_first_process():
            print(self.describe(), file=sys.stderr, flush=True)


class ArrayImages(LabeledImages):
    """Images in memory, uint8 [n, H, W] or [n, H, W, 3]."""

    def __init__(self, pixels: np.ndarray, labels: Iterable[int], classes: Iterable[str]):
        self.pixels, self.labels, self.classes = pixels, list(map(int, labels)), list(classes)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def keep(self, indices: Sequence[int]) -> None:
        super().keep(indices)
        self.pixels = self.pixels[indices]


class ImageList(LabeledImages):
    """The images of a list of paths, without labels.

    Attributes:
        paths: path of each image.
        root: the folder, or another part that the paths have in common. A run that resumes may find it elsewhere.
        turned: path of an examined image that `upright` would turn, "" if there is none.

    See `decoding.read_image` for `min_side`, `upright` and `intensity_range`. A UserError of `transform` gets the path
    of the image.
    """

    root: str | Path = ""
    turned = ""
    min_side: int | None = None
    intensity_range: Sequence[float] | None = None

    def __init__(self, paths: Iterable[str | Path], transform: Callable | None = None, upright: bool = True):
        self.paths, self.transform, self.upright = Paths(map(str, paths)), transform, upright
        self.labels = [-1] * len(self.paths)

    def file(self, index: int) -> BinaryIO | None:
        """Return a file to decode instead of opening the path, which then only names it. None opens the path."""
        return None

    def image(self, index: int) -> Image.Image:
        return read_image(self.paths[index], self.min_side, self.upright, self.intensity_range, self.file(index))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        try:
            return (self.transform(image) if self.transform else image), self.labels[index]
        except UserError as error:
            raise UserError(f"cannot use image {printable(self.paths[index])}: {error}") from error

    def use_intensity_range(self, intensity_range: Sequence[float] | None) -> None:
        """Set the intensity range, and check on a few images that their intensities survive the conversion to 8 bits.

        Warns, once per data set, if an image of more than 8 bits keeps fewer than MIN_LEVELS gray levels. Also sets
        `turned`.

        Raises:
            UserError: the range is empty, or an image needs a range and there is none. Bad images are skipped.
        """
        if intensity_range and not intensity_range[0] < intensity_range[1]:
            raise UserError("--intensity_range {} {}: expected two numbers, the smaller first".format(*intensity_range))
        self.intensity_range, warned = intensity_range, not is_first_process()
        for i in range(0, len(self), -(-len(self) // PROBED)):
            try:
                with opened(self.paths[i], self.file(i)) as image:
                    refuse_unknown_range(image, intensity_range)
                    with contextlib.suppress(Exception):  # a broken EXIF block
                        exif = Image.Image.getexif(image)  # the method of PNGs would decode them
                        if image.format != "TIFF" and exif.get(ExifTags.Base.Orientation) in range(2, 9):
                            self.turned = self.turned or self.paths[i]
                    if image.mode[0] not in "IF":
                        continue
                    values = np.asarray(image)
                    kept = len(np.unique(gray_levels(values, intensity_range)))
            except UserError as error:
                if isinstance(error.__cause__, UnknownRange):
                    raise
                continue
            count = len(np.unique(values))
            if kept < min(MIN_LEVELS, count) and not warned:
                hint = f"see --intensity_range; its values are {values.min()} to {values.max()}"
                warn(f"{printable(self.paths[i])} keeps {kept} of its {count} gray levels in 8 bits: {hint}")
                warned = True
        if not self.upright:
            self.ignore_orientation()

    def ignore_orientation(self) -> None:
        """Do not turn photographs upright, as DINO's protocols. Warns if one of the examined images would be turned."""
        self.upright = False
        if self.turned and is_first_process():
            here = "evaluations ignore it, as DINO does; pretraining and extract_features.py turn images upright"
            warn(f"{printable(self.turned)} has an EXIF orientation: {here}")

    def keep(self, indices: Sequence[int]) -> None:
        super().keep(indices)
        self.paths = self.paths.keep(indices)


def in_order(counts: Mapping[str, int], text: str) -> str:
    """Return the eight most frequent names with their counts as text, each as `text` formats (name, count)."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [text.format(printable(name) or "without suffix", count) for name, count in ranked[:8]]
    return ", ".join(parts + ["…"] * (len(ranked) > 8))


def numbered_classes(values: np.ndarray) -> tuple[list[int], list[str]]:
    """Return (labels, classes) of images whose classes are numbers.

    Args:
        values: int array [n], a class of at least 0 per image, or -1 if it has none.
    """
    classes, labels = np.unique(values, return_inverse=True)
    without = int(len(classes) > 0 and classes[0] == -1)
    return (labels - without).tolist(), list(map(str, classes[without:].tolist()))


class ResizedArray:
    """PIL image -> uint8 array [size, size, 3], resized without keeping the aspect ratio; `size` 0 does not resize."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> np.ndarray:
        pixels = np.array(image)
        if self.size and image.size != (self.size, self.size):
            # Antialiased; within one gray level of Pillow's result in a quarter of the time.
            pixels = resize(pixels, (self.size, self.size), "bilinear")
        return pixels
