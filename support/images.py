"""Data sets of images in memory and in lists of paths.

Each item of a data set is (image, label): an RGB PIL image, or the output of `transform`, and an int, -1 if the image
has no label.
"""

from typing import BinaryIO

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from augment import resize
from support import index
from support.decoding import UnknownRange, gray_levels, opened, read_image, refuse_unknown_range
from utils import UserError, is_first_process, printable, warn

PROBED = 16  # number of images whose intensities are checked when a folder is opened
MIN_LEVELS = 32  # gray levels; an image of more than 8 bits that keeps fewer causes a warning
WARNED = set()  # values of `data_path` that `use_intensity_range` has warned of


class LabeledImages(Dataset):
    """Base of the data sets. Subclasses define `image(index)`, which returns a PIL image.

    Attributes:
        labels: label of each image, -1 if it has none.
        classes: names of the classes. A label is an index into this list.
        transform: applied to the PIL image; None returns the PIL image.
        has_splits: whether training and validation images differ. If not, either split has all images.
        splits, layout: what splits are called, and what is expected for an evaluation, for messages.
    """

    transform, classes, has_splits = None, (), True
    splits, layout = "subfolders train and val", "{0}/train/CLASS/IMAGE and {0}/val/CLASS/IMAGE"

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.image(index)
        return (self.transform(image) if self.transform else image), self.labels[index]


class ArrayImages(LabeledImages):
    """Images in memory, uint8 [n, H, W] or [n, H, W, 3]."""

    def __init__(self, pixels, labels, classes):
        self.pixels, self.labels, self.classes = pixels, list(map(int, labels)), list(classes)

    def image(self, index) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def keep(self, indices) -> None:
        """Keep only the images with these indices."""
        self.pixels, self.labels = self.pixels[indices], [self.labels[i] for i in indices]


class ImageList(LabeledImages):
    """The images of a list of paths, without labels.

    Attributes:
        paths: path of each image, a sequence.

    See `decoding.read_image` for `min_side`, `upright` and `intensity_range`. A UserError of `transform` gets the path
    of the image.
    """

    min_side = intensity_range = None

    def __init__(self, paths, transform=None, upright=True):
        self.paths, self.transform, self.upright = index.Paths(map(str, paths)), transform, upright
        self.labels = [-1] * len(self.paths)

    def file(self, index) -> BinaryIO | None:
        """Return a file to decode instead of opening the path, which then only names it. None opens the path."""

    def image(self, index) -> Image.Image:
        file = self.file(index)
        return read_image(self.paths[index], self.min_side, self.upright, self.intensity_range, file)

    def __getitem__(self, index):
        image = self.image(index)
        try:
            return (self.transform(image) if self.transform else image), self.labels[index]
        except UserError as error:
            raise UserError(f"cannot use image {printable(self.paths[index])}: {error}") from error

    def use_intensity_range(self, intensity_range, data_path) -> None:
        """Set the intensity range, and check on a few images that their intensities survive the conversion to 8 bits.

        Warns, once per `data_path`, if an image of more than 8 bits keeps fewer than MIN_LEVELS gray levels.

        Raises:
            UserError: the range is empty, or an image needs a range and there is none. Bad images are skipped.
        """
        if intensity_range and not intensity_range[0] < intensity_range[1]:
            raise UserError("--intensity_range {} {}: expected two numbers, the smaller first".format(*intensity_range))
        self.intensity_range = intensity_range
        for i in range(0, len(self), -(-len(self) // PROBED)):
            path = self.paths[i]
            try:
                with opened(path, self.file(i)) as image:
                    refuse_unknown_range(image, intensity_range)
                    if image.mode[0] not in "IF":
                        continue
                    values = np.asarray(image)
                    kept = len(np.unique(gray_levels(values, intensity_range)))
            except UserError as error:
                if isinstance(error.__cause__, UnknownRange):
                    raise
                continue
            if data_path not in WARNED and kept < MIN_LEVELS and kept < (found := len(np.unique(values))):
                WARNED.add(data_path)
                hint = f"see --intensity_range; its values are {values.min()} to {values.max()}"
                if is_first_process():
                    warn(f"{printable(path)} keeps {kept} of its {found} gray levels in 8 bits: {hint}")

    def keep(self, indices) -> None:
        """Keep only the images with these indices."""
        self.paths, self.labels = self.paths.keep(indices), [self.labels[i] for i in indices]


def numbered_classes(values) -> tuple[list[int], list[str]]:
    """Return (labels, classes) of images whose classes are numbers.

    Args:
        values: int array [n], a class of at least 0 per image, or -1 if it has none.
    """
    classes, labels = np.unique(values, return_inverse=True)
    without = int(len(classes) > 0 and classes[0] == -1)
    return (labels - without).tolist(), list(map(str, classes[without:].tolist()))


class ResizedArray:
    """PIL image -> uint8 array [size, size, 3], resized without keeping the aspect ratio; `size` 0 does not resize."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        pixels = np.array(image)
        if self.size and image.size != (self.size, self.size):
            # Antialiased; within one gray level of Pillow's result in a quarter of the time.
            pixels = resize(pixels[None], (self.size, self.size), "bilinear")[0]
        return pixels
