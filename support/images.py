"""Data sets of images, and safe decoding.

Each item of a data set is (image, label): an RGB PIL image, or the output of `transform`, and an int, -1 if the image
has no label.
"""

import contextlib
import importlib
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

import utils
from augment import resize
from utils import UserError

DATASETS = ("folder", "cifar10", "imagenet100", "digits", "photographs")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**26  # 8192×8192, 200 MB decoded; larger images are bad, see --on_bad_image
IMAGENET100_CLASSES = Path(__file__).parent.parent / "recipes" / "imagenet100_cmc.txt"


def build_dataset(
    name, data_path=None, split="train", transform=None, classes=None, download=False, min_side=None
) -> Dataset:
    """Open a data set.

    Args:
        name: one of DATASETS.
            "folder": all images in `data_path` and its subfolders. The classes are the direct subfolders, if any.
            "imagenet100": the same, restricted to the classes in a list.
            "cifar10": torchvision's CIFAR-10 in `data_path`.
            "digits": scikit-learn's 1,797 scanned digits of 8×8 pixels, 1,400 for training and 397 for validation.
            "photographs": crops of photographs that scikit-learn and scikit-image ship.
        data_path: folder of the images. If it has subfolders `train` and `val`, only the subfolder `split` is read.
        split: "train" or "val".
        transform: applied to the PIL image.
        classes: file with one class folder per line. Default: no restriction; for "imagenet100" its own list.
        download: let torchvision download CIFAR-10 if it is missing.
        min_side: see `read_image`.

    Raises:
        UserError: the folder or a class is missing, or there are no images.
    """
    if name in ("digits", "photographs"):
        return (Digits if name == "digits" else Photographs)(split, transform)
    if data_path is None:
        raise UserError(f"--dataset {name} needs --data_path, the folder of the images")
    if name == "cifar10":
        return _cifar10(data_path, split, transform, download)
    if name == "imagenet100":
        classes = classes or IMAGENET100_CLASSES
    return ImageFolder(data_path, split, transform, classes, min_side)


class LabeledImages(Dataset):
    """Base of the data sets. Subclasses define `labels`, `transform` and `image(index)`, which returns a PIL image."""

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.image(index)
        return (self.transform(image) if self.transform else image), self.labels[index]


class ImageList(LabeledImages):
    """The images of a list of paths, without labels. See `read_image` for `min_side` and `upright`."""

    def __init__(self, paths, transform=None, upright=True, min_side=None):
        self.paths, self.transform = list(map(str, paths)), transform
        self.upright, self.min_side = upright, min_side
        self.labels = [-1] * len(self.paths)

    def image(self, index) -> Image.Image:
        return read_image(self.paths[index], self.min_side, self.upright)


class ImageFolder(ImageList):
    """The images in a folder and its subfolders, sorted by path. See `build_dataset`.

    Attributes:
        root: folder that is read, `train` or `val` if the folder has both.
        classes: names of the class folders. A label is an index into this list.
        labels: label of each image, -1 if it is not in a class folder.
    """

    def __init__(self, root, split="train", transform=None, classes_file=None, min_side=None):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"no folder {root}: --data_path takes a folder of images, with or without class subfolders")
        if (root / "train").is_dir() and (root / "val").is_dir():
            root = root / split
        if classes_file is not None:
            folders, loose = listed_folders(root, classes_file), []
        else:
            entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
            folders = [entry for entry in entries if entry.is_dir()]
            loose = [str(entry) for entry in entries if has_image_name(entry.name) and not entry.is_dir()]
        found = [(path, -1) for path in loose]
        for label, folder in enumerate(folders):
            # os.walk does not stat each file, which would be slow for a million files.
            below = [os.path.join(top, name) for top, _, names in os.walk(folder, followlinks=True) for name in names]
            found += [(path, label) for path in sorted(below) if has_image_name(os.path.basename(path))]
        if not found:
            raise UserError(f"no images below {root}, expected files that end in {' '.join(IMAGE_SUFFIXES)}")
        super().__init__([path for path, _ in found], transform, min_side=min_side)
        self.root, self.labels, self.classes = root, [label for _, label in found], [folder.name for folder in folders]


class Digits(LabeledImages):
    """scikit-learn's copy of the UCI handwritten digits, with a fixed random split into 1,400 and 397 images."""

    def __init__(self, split="train", transform=None):
        from sklearn.datasets import load_digits  # importing takes a second, and few runs need it

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.images))
        order = order[:1400] if split == "train" else order[1400:]
        self.images = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)  # [n, 8, 8], white ink
        self.labels, self.classes = digits.target[order].tolist(), [str(i) for i in range(10)]
        self.transform = transform

    def image(self, index) -> Image.Image:
        return Image.fromarray(self.images[index]).convert("RGB")


# name: (package that ships the photograph, path inside the package)
PHOTOGRAPHS = {name: ("sklearn.datasets", f"images/{name}.jpg") for name in ("china", "flower")} | {
    name.split(".")[0]: ("skimage.data", name)
    for name in (
        "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg moon.png motorcycle_left.png retina.jpg rocket.jpg"
    ).split()
}


def photograph(name) -> Path:
    """Return the path of one of PHOTOGRAPHS, which scikit-learn and scikit-image install.

    Raises:
        UserError: scikit-image is not installed or lacks the photograph.
    """
    package, place = PHOTOGRAPHS[name]
    try:
        path = Path(importlib.import_module(package).__file__).parent / place
    except ImportError as error:
        raise UserError(f"the photograph {name} comes with scikit-image: pip install scikit-image") from error
    if not path.is_file():
        raise UserError(f"this scikit-image lacks {path}: pip install --upgrade scikit-image")
    return path


class Photographs(LabeledImages):
    """Square crops of 15 photographs, labeled by photograph: data for experiments without a download.

    Each photograph is resized to a shorter side of 320 pixels. Crops have a side of 128 pixels. Validation crops lie in
    the last 128 columns of a photograph, training crops in the others.
    """

    SIDE, CROPS = 128, {"train": 100, "val": 20}  # CROPS: number per photograph

    def __init__(self, split="train", transform=None):
        self.transform, self.images, self.classes, self.labels = transform, [], [], []
        for label, name in enumerate(sorted(PHOTOGRAPHS)):
            image = read_image(photograph(name))
            scale = 320 / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
            count, last = self.CROPS[split], image.width - self.SIDE
            rng = np.random.default_rng((label, split == "val"))
            lefts = [last] * count if split == "val" else rng.integers(last - self.SIDE + 1, size=count)
            tops = rng.integers(image.height - self.SIDE + 1, size=count)
            for left, top in zip(map(int, lefts), map(int, tops), strict=True):
                self.images.append(image.crop((left, top, left + self.SIDE, top + self.SIDE)))
            self.classes.append(name)
            self.labels += [label] * count

    def image(self, index) -> Image.Image:
        return self.images[index]


def _cifar10(data_path, split, transform, download):
    from torchvision.datasets import CIFAR10

    try:
        dataset = CIFAR10(data_path, train=split == "train", transform=transform, download=download)
    except (RuntimeError, OSError) as error:
        expected = f"expected {data_path}/cifar-10-batches-py, which --download fetches"
        raise UserError(f"no CIFAR-10 in {data_path}, {expected}") from error
    dataset.labels = dataset.targets
    return dataset


def listed_folders(root, classes_file) -> list[Path]:
    """Return the class folders in `root` that a file lists, one name per line.

    Raises:
        UserError: the file cannot be read, is empty, or names a folder that is missing.
    """
    try:
        names = Path(classes_file).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list of classes {classes_file}: {error}") from error
    missing = [name for name in names if not (root / name).is_dir()]
    if not names:
        raise UserError(f"the list of classes {classes_file} is empty, expected one class folder per line")
    if missing:
        found = f"lacks {len(missing)} of the {len(names)} class folders in {classes_file}"
        raise UserError(f"{root} {found}, the first is {missing[0]}")
    return [root / name for name in names]


def listed_images(source) -> list[Path]:
    """Return the paths of the images in a folder and its subfolders, or of the images that a text file lists.

    The file has one path per line; relative paths are relative to the file.

    Raises:
        UserError: the folder or file does not exist, lists no image, or lists a missing one.
    """
    source = Path(source)
    if source.is_dir():
        return [Path(path) for path in ImageFolder(source).paths]
    try:
        paths = [source.parent / line.strip() for line in source.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"cannot read {source} ({reason}): expected a folder of images, or a list of paths") from error
    missing = [path for path in paths if not path.is_file()]
    if not paths:
        raise UserError(f"the list {source} is empty, expected one path per line")
    if missing:
        raise UserError(f"{source} lists {len(paths)} images, {len(missing)} are missing; the first: {missing[0]}")
    return paths


def has_image_name(name) -> bool:
    """Return whether a file name has a suffix of IMAGE_SUFFIXES and is not hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def read_image(path, min_side=None, upright=True) -> Image.Image:
    """Decode an image of any PIL mode to RGB, with transparent parts white.

    Args:
        min_side: decode a JPEG at 1/2, 1/4 or 1/8 of its size, as long as both sides keep `min_side` pixels.
        upright: rotate the image according to its EXIF orientation.

    Which files are bad:

    | file | outcome |
    |---|---|
    | grayscale, palette, bilevel, CMYK, with transparency | decoded |
    | 16-bit grayscale | decoded, scaled to 8 bits |
    | animated or with several pages | the first frame or page is decoded |
    | 1×1, 20,000×10 | decoded |
    | with a broken EXIF block | decoded, not rotated |
    | with a broken ICC profile | decoded; profiles are not applied |
    | truncated, empty, not an image, damaged | bad |
    | more than MAX_PIXELS according to its header | bad, not decoded |
    | a format that is not in FORMATS, whatever the file's name | bad: some of Pillow's decoders start other programs |

    Raises:
        UserError: the file is bad.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}")
            if min_side:
                image.draft(None, (min_side, min_side))
            image.load()
            if upright:
                with contextlib.suppress(Exception):  # a broken EXIF block; the pixels may still be intact
                    image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                levels = np.asarray(image, np.int64)
                return Image.fromarray((levels.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image).convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds of errors for damaged files
        raise UserError(f"cannot read image {path}: {utils.first_line(error)}") from error


def image_size(path) -> tuple[int, int]:
    """Return (width, height) in pixels from a file's header.

    Raises:
        UserError: the file has no such header.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception as error:
        raise UserError(f"cannot read image {path}: {utils.first_line(error)}") from error


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
