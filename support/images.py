"""Where images come from, and reading them safely.

Every data set gives (image, label): the image as PIL RGB, or what `transform` makes of it; the label as an int, -1
where there is none.
"""

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
MAX_PIXELS = 2**26  # 8192×8192: 200 MB to decode; --on_bad_image says what happens to a larger one
IMAGENET100_CLASSES = Path(__file__).parent.parent / "recipes" / "imagenet100_cmc.txt"


def build_dataset(name, data_path=None, split="train", transform=None, classes=None, download=False, min_side=None):
    """Open a data set.

    Args:
        name: "folder", all images below `data_path`, classes being its direct subfolders, if any;
            "imagenet100", the same restricted to a list of classes;
            "cifar10", torchvision's CIFAR-10 in `data_path`;
            "digits", scikit-learn's 1,797 scanned digits of 8×8 pixels, 1,400 for training and 397 for validation.
            "photographs", cuttings of photographs that scikit-learn and scikit-image ship.
        data_path: the folder. Where it has the subfolders `train` and `val`, the one that `split` names is read.
        split: "train" or "val".
        transform: applied to the PIL image.
        classes: a file with one class folder per line; "imagenet100" has a list of its own.
        download: let torchvision fetch CIFAR-10 where it is missing.
        min_side: see `read_image`.

    Raises:
        UserError: the folder or a class is missing, or there are no images.
    """
    if name == "digits":
        return Digits(split, transform)
    if name == "photographs":
        return Photographs(split, transform)
    if data_path is None:
        raise UserError(f"--dataset {name} needs --data_path, the folder of the images")
    if name == "cifar10":
        return _cifar10(data_path, split, transform, download)
    if name == "imagenet100":
        classes = classes or IMAGENET100_CLASSES
    return ImageFolder(data_path, split, transform, classes, min_side)


class ImageFolder(Dataset):
    """Images below a folder, sorted by path. See `build_dataset`.

    Attributes:
        root: the folder of the part that is read.
        upright: see `read_image`.
        paths: of the images.
        classes: names of the class folders, the label being the place in this list.
        labels: int per image; -1 for an image that lies in no class folder.
    """

    def __init__(self, root, split="train", transform=None, classes_file=None, min_side=None):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"no folder {root}: --data_path takes a folder of images, with or without class subfolders")
        if (root / "train").is_dir() and (root / "val").is_dir():
            root = root / split
        self.root, self.transform, self.min_side, self.upright = root, transform, min_side, True
        if classes_file is not None:
            folders, loose = listed_folders(root, classes_file), []
        else:
            entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
            folders = [entry for entry in entries if entry.is_dir()]
            loose = [str(entry) for entry in entries if has_image_name(entry.name) and not entry.is_dir()]
        found = [(path, -1) for path in loose]
        for label, folder in enumerate(folders):
            # Walking does not ask for the status of each file, of which there may be a million.
            below = [os.path.join(top, name) for top, _, names in os.walk(folder, followlinks=True) for name in names]
            found += [(path, label) for path in sorted(below) if has_image_name(os.path.basename(path))]
        if not found:
            raise UserError(f"no images below {root}, expected files that end in {' '.join(IMAGE_SUFFIXES)}")
        self.paths, self.labels = [path for path, _ in found], [label for _, label in found]
        self.classes = [folder.name for folder in folders]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_image(self.paths[index], self.min_side, self.upright)
        return (self.transform(image) if self.transform else image), self.labels[index]


class Digits(Dataset):
    """scikit-learn's copy of the UCI handwritten digits, a fixed random split of 1,400 / 397 images."""

    def __init__(self, split="train", transform=None):
        from sklearn.datasets import load_digits  # takes a second, and is rarely needed

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.images))
        order = order[:1400] if split == "train" else order[1400:]
        self.images = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)  # [n, 8, 8], ink is white
        self.labels = digits.target[order].tolist()
        self.classes = [str(i) for i in range(10)]
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index]).convert("RGB")
        return (self.transform(image) if self.transform else image), self.labels[index]


# name: (package that ships it, its place there)
PHOTOGRAPHS = {name: ("sklearn.datasets", f"images/{name}.jpg") for name in ("china", "flower")} | {
    name.split(".")[0]: ("skimage.data", name)
    for name in (
        "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg moon.png motorcycle_left.png retina.jpg rocket.jpg"
    ).split()
}


def photograph(name):
    """Return the path of one of PHOTOGRAPHS, which are on the disk with scikit-learn and scikit-image.

    Raises:
        UserError: scikit-image is not installed, or lacks it.
    """
    package, place = PHOTOGRAPHS[name]
    try:
        path = Path(importlib.import_module(package).__file__).parent / place
    except ImportError as error:
        raise UserError(f"the photograph {name} comes with scikit-image: pip install scikit-image") from error
    if not path.is_file():
        raise UserError(f"this scikit-image lacks {path}: pip install --upgrade scikit-image")
    return path


class Photographs(Dataset):
    """Square cuttings of 15 photographs, the label being the photograph: something to learn from without a download.

    A photograph is brought to a shorter side of 320 pixels, a cutting has 128. Those for training lie anywhere but in
    the last 128 columns, those for validation there.
    """

    SIDE, CUTTINGS = 128, {"train": 100, "val": 20}  # of a photograph

    def __init__(self, split="train", transform=None):
        self.transform, self.images, self.classes, self.labels = transform, [], [], []
        for label, name in enumerate(sorted(PHOTOGRAPHS)):
            image = read_image(photograph(name))
            scale = 320 / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
            count, last = self.CUTTINGS[split], image.width - self.SIDE
            rng = np.random.default_rng((label, split == "val"))
            lefts = [last] * count if split == "val" else rng.integers(last - self.SIDE + 1, size=count)
            tops = rng.integers(image.height - self.SIDE + 1, size=count)
            for left, top in zip(map(int, lefts), map(int, tops), strict=True):
                self.images.append(image.crop((left, top, left + self.SIDE, top + self.SIDE)))
            self.classes.append(name)
            self.labels += [label] * count

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return (self.transform(image) if self.transform else image), self.labels[index]


def _cifar10(data_path, split, transform, download):
    from torchvision.datasets import CIFAR10

    try:
        dataset = CIFAR10(data_path, train=split == "train", transform=transform, download=download)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"no CIFAR-10 in {data_path}, expected {data_path}/cifar-10-batches-py; --download fetches it"
        ) from error
    dataset.labels = dataset.targets
    return dataset


def listed_folders(root, classes_file):
    try:
        names = Path(classes_file).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list of classes {classes_file}: {error}") from error
    missing = [name for name in names if not (root / name).is_dir()]
    if not names:
        raise UserError(f"the list of classes {classes_file} is empty, expected one class folder a line")
    if missing:
        found = f"lacks {len(missing)} of the {len(names)} class folders in {classes_file}"
        raise UserError(f"{root} {found}, the first is {missing[0]}")
    return [root / name for name in names]


class ImageList(Dataset):
    """The images of a list of paths, without labels.

    Args:
        upright: see `read_image`.
    """

    def __init__(self, paths, transform=None, upright=True):
        self.paths, self.transform, self.upright = list(map(str, paths)), transform, upright
        self.labels = [-1] * len(self.paths)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_image(self.paths[index], upright=self.upright)
        return (self.transform(image) if self.transform else image), -1


def listed_images(source):
    """Return the paths of the images below a folder, as ImageFolder, or of those that a text file lists, one a line.

    A relative path in a file is looked for beside the file.

    Raises:
        UserError: there is no such folder or file, or it names no image, or one that is missing.
    """
    source = Path(source)
    if source.is_dir():
        return [Path(path) for path in ImageFolder(source).paths]
    try:
        paths = [source.parent / line.strip() for line in source.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"cannot read {source} ({reason}): expected a folder of images, or a list of paths") from error
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        found = (
            f"{len(missing)} of its {len(paths)} images are missing, the first is {missing[0]}" if missing else "empty"
        )
        raise UserError(f"the list {source} cannot be used: {found}")
    return paths


def has_image_name(name):
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def read_image(path, min_side=None, upright=True):
    """Decode an image of any PIL mode to RGB, transparent parts on white.

    Args:
        min_side: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, as far as both sides keep that many pixels.
        upright: turn it by its EXIF tag.

    What decodes, and what counts as bad:

    | file | outcome |
    |---|---|
    | grayscale, palette, bilevel, CMYK, with transparency | decodes |
    | 16-bit grayscale | decodes, scaled to 8 bits |
    | animated, or of several pages | decodes, the first |
    | 1×1, 20,000×10 | decodes |
    | with a broken EXIF block | decodes, not turned |
    | with a broken ICC profile | decodes; profiles are not applied |
    | truncated, empty, no image, damaged | bad |
    | more than MAX_PIXELS by its header | bad, and not decoded |
    | of another format than FORMATS, whatever its name | bad: some of Pillow's decoders start other programs |

    Raises:
        UserError: it is bad.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}")
            if min_side:
                image.draft(None, (min_side, min_side))
            image.load()
            if upright:
                image = _turned_upright(image)
            if image.mode.startswith("I"):
                levels = np.asarray(image, np.int64)
                return Image.fromarray((levels.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image).convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise _unreadable(path, error) from error


def _unreadable(path, error):
    return UserError(f"cannot read image {path}: {utils.first_line(error)}")


def _turned_upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the block is broken, and the image is as good without it
        return image


def image_size(path):
    """Return (width, height) as a file's header says them.

    Raises:
        UserError: it has no such header.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception as error:
        raise _unreadable(path, error) from error


class ResizedArray:
    """PIL image -> uint8 array [size, size, 3] (bilinear, aspect not kept); of its own size where `size` is 0."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        pixels = np.array(image)
        if self.size and image.size != (self.size, self.size):
            # Antialiased, and with Pillow's result to a level, in a quarter of its time.
            pixels = resize(pixels[None], (self.size, self.size), "bilinear")[0]
        return pixels
