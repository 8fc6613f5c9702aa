"""Data sets of images.

Each item of a data set is (image, label): an RGB PIL image, or the output of `transform`, and an int, -1 if the image
has no label.
"""

import argparse
import importlib
import importlib.util
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

import utils
from augment import resize
from support import index, torchvision_sets
from support.arguments import number
from support.decoding import (
    UnknownRange,
    gray_levels,
    opened,
    read_image,
    refuse_irregular,
    refuse_unknown_range,
    shown,
)
from utils import UserError

# Options that name the images
SOURCE = (
    *("dataset", "data_path", "classes", "image_column", "label_column", "download", "train_images", "tuning"),
    *("intensity_range", "rebuild_index"),
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp")
PROBED = 16  # number of images whose intensities are checked when a folder is opened
MIN_LEVELS = 32  # gray levels; an image of more than 8 bits that keeps fewer causes a warning
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # names of splits in other layouts
WARNED = set()  # values of `data_path` that `use_intensity_range` has warned of
IMAGENET100_CLASSES = Path(__file__).parent.parent / "recipes" / "imagenet100_cmc.txt"


def add_source_arguments(add, layout) -> None:
    """Add the options of SOURCE to an argument group.

    Args:
        add: the group's `add_argument`.
        layout: help of --data_path.
    """
    kinds = "folder, imagenet100, tar, hf:NAME_OR_PATH, cifar10, torchvision:NAME, elpv, digits or photographs; hf and "
    kinds += "the last three need no --data_path"
    add("--dataset", type=dataset_name, default="folder", help=f"source of images: {kinds}")
    add("--data_path", help=layout)
    add("--classes", help="file with the class folders to use, one per line; imagenet100 has its own list")
    add("--image_column", help="column of the images, for hf. Default: the only one")
    add("--label_column", help="column of the labels, for hf. Default: the only one with class names, or label")
    add("--download", action="store_true", help="let torchvision download its data set if it is missing")
    add("--rebuild_index", action="store_true", help="read folders and tars again, even if there is an index")
    add("--train_images", type=number(int, 1), help="use only N training images, drawn once. Default: all")
    add("--tuning", action="store_true", help="hold out a fifth of the training images and use them as validation "
        "images, for choosing settings")  # fmt: skip
    add_intensity_range(add)


def add_intensity_range(add) -> None:
    """Add --intensity_range to an argument group, given the group's `add_argument`."""
    add("--intensity_range", type=number(float), nargs=2, metavar=("LOW", "HIGH"), help="values of 16-bit, 32-bit and "
        "float images that become gray levels 0 and 255; signed and float images need it. Default: 0 65535; "
        "evaluations: the pretraining's")  # fmt: skip


def source(args, made_with=None) -> dict:
    """Return the arguments of `build_dataset` that name the images, from parsed options.

    Args:
        made_with: return value of `evaluation.open_model`. The pretraining's intensity range is the default.

    Raises:
        UserError: --train_images has no effect on the split that is opened.
    """
    if getattr(args, "split", None) == "val" and args.train_images and not args.tuning:
        raise UserError("--train_images has no effect with --split val: use --split train, or omit --train_images")
    named = {name: getattr(args, name) for name in SOURCE}
    if made_with and "intensity_range" in find_source(args.dataset)[0].options:
        named["intensity_range"] = args.intensity_range or made_with.get("intensity_range")
    return named


def build_dataset(
    dataset,
    data_path=None,
    split="train",
    transform=None,
    classes=None,
    download=False,
    train_images=None,
    tuning=False,
    intensity_range=None,
    min_side=None,
    rebuild_index=False,
    image_column=None,
    label_column=None,
) -> "LabeledImages":
    """Open a data set.

    Args:
        dataset: a kind of SOURCES, with its name where it has one.
            "folder": all images in `data_path` and its subfolders. The classes are the direct subfolders, if any.
                Or the images in a list, `data_path` itself, or train.txt and val.txt in it, see `read_list`.
            "imagenet100": a folder, restricted to the classes in a list.
            "tar": images in tars with WebDataset's layout, see `tar.TarImages`.
            "hf:NAME_OR_PATH": images of Hugging Face's `datasets`, see `hf.HuggingFaceImages`.
            "cifar10": CIFAR-10, "torchvision:CIFAR10".
            "torchvision:NAME": a classification data set of torchvision in `data_path`, see `torchvision_sets.load`.
            "elpv": photographs of solar cells, see `solar_cells`.
            "digits": scikit-learn's 1,797 scanned digits of 8×8 pixels, 1,400 for training and 397 for validation.
            "photographs": crops of photographs that scikit-learn and scikit-image ship.
        data_path: folder of the images. If it has subfolders `train` and `val`, only the subfolder `split` is read. For
            "tar" also a pattern of paths.
        split: "train" or "val".
        transform: applied to the PIL image.
        classes: file with one class folder per line. Default: no restriction; for "imagenet100" its own list.
        download: let torchvision download the data set if it is missing.
        train_images: number of training images to use, drawn once. None: all.
        tuning: use only these training images, a fifth of them for validation and the others for training.
        intensity_range, min_side: see `read_image`.
        rebuild_index: read a folder or tars even if there is an index of them.
        image_column, label_column: see `hf.HuggingFaceImages`.

    Raises:
        UserError: an argument has no effect on the data set, the folder or a class is missing, the subfolders are named
            like splits, there are no images, or fewer than `train_images`.
    """
    opened = "train" if tuning else split
    source, name = find_source(dataset)
    given = {
        **{"data_path": data_path, "classes": classes, "download": download, "intensity_range": intensity_range},
        **{"rebuild_index": rebuild_index, "image_column": image_column, "label_column": label_column},
    }
    for option in given:
        if given[option] and option not in source.options:
            raise UserError(f"--{option} has no effect with --dataset {dataset}: omit it, or give another --dataset")
    if "data_path" in source.options and not data_path:
        raise UserError(f"--dataset {dataset} needs --data_path, the folder of the images")
    options = {option: given[option] for option in source.options if option != "intensity_range"}
    images = source.open(split=opened, **options, **({"name": name} if name else {}))
    if not len(images):
        raise UserError(f"--dataset {dataset} has no {opened} images")
    if "intensity_range" in source.options:
        images.use_intensity_range(intensity_range, data_path or name)
    images.transform, images.min_side = transform, min_side
    if opened == "train" and (train_images or tuning):
        count = train_images or len(images)
        if count > len(images):
            raise UserError(f"--train_images {count} is more than the {len(images)} training images")
        if tuning and count < 5:
            raise UserError(f"--tuning holds out a fifth of the training images, found {count}, expected at least 5")
        chosen = np.random.default_rng(0).permutation(len(images))[:count]
        if tuning:
            chosen = chosen[: count // 5] if split == "val" else chosen[count // 5 :]
        images.keep(sorted(chosen.tolist()))
    return images


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


def numbered_classes(values) -> tuple[list[int], list[str]]:
    """Return (labels, classes) of images whose classes are numbers.

    Args:
        values: int array [n], a class of at least 0 per image, or -1 if it has none.
    """
    classes, labels = np.unique(values, return_inverse=True)
    without = int(len(classes) > 0 and classes[0] == -1)
    return (labels - without).tolist(), list(map(str, classes[without:].tolist()))


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

    See `read_image` for `min_side`, `upright` and `intensity_range`. A UserError of `transform` gets the image's path.
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
            raise UserError(f"cannot use image {shown(self.paths[index])}: {error}") from error

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
                if utils.is_first_process():
                    utils.warn(f"{shown(path)} keeps {kept} of its {found} gray levels in 8 bits: {hint}")

    def keep(self, indices) -> None:
        """Keep only the images with these indices."""
        self.paths, self.labels = self.paths.keep(indices), [self.labels[i] for i in indices]


class ImageFolder(ImageList):
    """The images in a folder and its subfolders, sorted by path. See `build_dataset`.

    Args:
        rebuild_index: read the folders even if there is an index of them, see `index.read`.

    Attributes:
        root: folder that is read, `train` or `val` if the folder has both.
        classes: names of the class folders, which hold at least one image.
        labels: label of each image, -1 if it is not in a class folder.
    """

    def __init__(self, root, split="train", classes_file=None, rebuild_index=False):
        super().__init__([])
        root = Path(root)
        if not os.path.isdir(root):
            expected = "a folder of images, with or without class subfolders, or a list of images"
            raise UserError(f"no folder {root}: --data_path takes {expected}")
        self.has_splits = (root / "train").is_dir() and (root / "val").is_dir()
        self.root = root / split if self.has_splits else root
        listing = None if classes_file or rebuild_index else index.read(self.root)
        if listing is None:
            started = time.time()
            listing, is_complete = list_folder(self.root, classes_file)
            if is_complete and not classes_file:
                index.write(self.root, listing, started)
        self.paths, self.labels, self.classes, _ = listing


def list_folder(root, classes_file=None) -> tuple[index.Listing, bool]:
    """Return (listing of the images below a folder, whether all folders could be read).

    Args:
        classes_file: file that lists the class folders, or None.

    Raises:
        UserError: see `build_dataset`.
    """
    unread: list[str] = []
    _, subfolders, files = next(walk(root, unread=unread), (root, [], []))
    folders = [root / name for name in subfolders if not name.startswith(".")]
    refuse_other_splits(root, folders)
    prefix = index.prefix_of(root)
    names, read, classes = [name for name in sorted(files) if has_image_name(name)], [""], []
    if classes_file is not None:
        folders, names = listed_folders(root, classes_file), []
    labels = [-1] * len(names)
    others = set(map(os.path.realpath, [root, *folders]))
    for folder in folders:
        paths = []
        for top, _, below in walk(folder, others, unread):
            read.append(top.removeprefix(prefix))
            paths += [os.path.join(top, name) for name in below if has_image_name(name)]
        if paths:
            names += [path.removeprefix(prefix) for path in sorted(paths)]
            labels += [len(classes)] * len(paths)
            classes.append(folder.name)
        elif classes_file is not None:
            raise UserError(f"the class folder {folder}, which {classes_file} lists, has no images")
    if not names:
        raise UserError(f"no images below {root}, expected files that end in {' '.join(IMAGE_SUFFIXES)}")
    return index.Listing(index.Paths(names, prefix), labels, classes, read), not unread


class ListedImages(ImageList):
    """The images that a text file lists, in its order, see `read_list`.

    Attributes:
        root: folder of the file.
        classes: names of the classes, sorted.
        labels: label of each image, -1 if the file has none.
    """

    def __init__(self, source):
        paths, names = read_list(source)
        super().__init__(paths)
        self.root, self.classes = Path(source).parent, sorted(set(names))
        numbers = {name: i for i, name in enumerate(self.classes)}
        if names:
            self.labels = [numbers[name] for name in names]


def refuse_other_splits(root, folders) -> None:
    """Raise UserError if the subfolders of a folder are named like splits, as Train and Val, or train without val.

    A class may be called "train" if there are other classes. Names like test_set and train2017 count as splits, too.
    """
    words = {folder.name: re.match("[a-z]*", folder.name.lower())[0] for folder in folders}
    splits = [name for name, word in words.items() if word in SPLITS]
    both = len({words[name] in ("train", "training") for name in splits}) == 2
    if both or (splits and len(splits) == len(folders)):
        expected = "expected train and val with the same class folders, or the class folders themselves"
        raise UserError(f"{root} has {', '.join(splits)}, {expected}: rename them, or give one of them as --data_path")


def walk(folder, others=frozenset(), unread=None) -> Iterator[tuple[str, list, list]]:
    """Walk through a folder like `os.walk`, follow links, and read no folder twice.

    Links to parents of the folder are not followed. A folder that cannot be read is skipped with a warning. Files are
    not examined, which would be slow for a million of them.

    Args:
        others: real paths of folders that are not read either.
        unread: list to which the paths of folders that cannot be read are added.
    """

    def warn_of(error):
        if unread is not None:
            unread.append(error.filename)
        utils.warn(f"cannot read folder {shown(error.filename)}: {error.strerror}; skipping it")

    real = Path(os.path.realpath(folder))
    seen = {str(real), *map(str, real.parents)}
    for top, below, names in os.walk(folder, onerror=warn_of, followlinks=True):
        found = {os.path.realpath(os.path.join(top, name)): name for name in sorted(below, reverse=True)}
        below[:] = sorted(name for path, name in found.items() if path not in seen and path not in others)
        seen.update(found)
        yield top, below, names


def digits(split) -> ArrayImages:
    """Open scikit-learn's copy of the UCI handwritten digits, with a fixed random split into 1,400 and 397 images."""
    from sklearn.datasets import load_digits  # importing takes a second, and few runs need it

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    order = order[:1400] if split == "train" else order[1400:]
    pixels = np.round(data.images[order] * (255 / 16)).astype(np.uint8)  # [n, 8, 8], white ink
    return ArrayImages(pixels, data.target[order], map(str, range(10)))


def solar_cells(split) -> ImageList:
    """Open the photographs of solar cells in the package elpv-dataset, with the classes functional and defective.

    2,624 electroluminescence photographs of 300×300 pixels (Buerhop-Lopez et al., 2018; Deitsch et al., 2021). A cell
    is defective if the experts' probability of a defect is at least 0.5. A fixed random three quarters of the cells are
    for training, the others for validation, with the same proportions of classes and of cell types (monocrystalline and
    polycrystalline) in both.

    Raises:
        UserError: the package is not installed, or lacks its files.
    """
    package = importlib.util.find_spec("elpv_dataset")
    if package is None or package.origin is None:  # no origin: a folder without __init__.py
        raise UserError("--dataset elpv needs the package elpv-dataset: pip install elpv-dataset")
    root = Path(package.origin).parent / "data"
    try:
        lines = [line.split() for line in (root / "labels.csv").read_text().splitlines()]
        paths, probabilities, kinds = zip(*lines, strict=True) if lines else ((), (), ())
        probabilities = list(map(float, probabilities))
        if not paths or {*kinds} - {"mono", "poly"}:
            raise ValueError("no cells, or a type other than mono and poly")
        if not all(0 <= probability <= 1 for probability in probabilities):
            raise ValueError("a probability that is not in [0, 1]")
    except (OSError, ValueError) as error:
        expected = "expected lines of path, probability and type; install elpv-dataset again"
        raise UserError(f"cannot read {root / 'labels.csv'} ({utils.first_line(error)}): {expected}") from error
    chosen, labels = [], [int(probability >= 0.5) for probability in probabilities]
    for i, group in enumerate(itertools.product((0, 1), ("mono", "poly"))):
        members = [index for index, found in enumerate(zip(labels, kinds, strict=True)) if found == group]
        shuffled = np.random.default_rng((0, i)).permutation(members).tolist()
        count = round(len(members) * 3 / 4)
        chosen += shuffled[:count] if split == "train" else shuffled[count:]
    images = ImageList(root / path for path in paths)
    images.root, images.labels, images.classes = root, labels, ["functional", "defective"]
    images.keep(sorted(chosen))
    return images


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


CROPS = {"train": 100, "val": 20}  # crops per photograph


def photograph_crops(split) -> ArrayImages:
    """Open square crops of the PHOTOGRAPHS, labeled by photograph: data for experiments without a download.

    Each photograph is resized to a shorter side of 320 pixels. Crops have a side of 128 pixels. Validation crops lie in
    the last 128 columns of a photograph, training crops in the others.
    """
    side, count, crops, classes = 128, CROPS[split], [], sorted(PHOTOGRAPHS)
    for label, name in enumerate(classes):
        image = read_image(photograph(name))
        scale = 320 / min(image.size)
        image = image.resize([round(length * scale) for length in image.size], Image.Resampling.BICUBIC)
        last, pixels = image.width - side, np.array(image)
        rng = np.random.default_rng((label, split == "val"))
        lefts = [last] * count if split == "val" else rng.integers(last - side + 1, size=count)
        tops = rng.integers(image.height - side + 1, size=count)
        crops += [pixels[top : top + side, left : left + side] for left, top in zip(lefts, tops, strict=True)]
    return ArrayImages(np.stack(crops), np.arange(len(classes)).repeat(count), classes)


def open_folder(split, data_path, classes, rebuild_index) -> ImageList:
    """Open a folder or a list of images, see `build_dataset`."""
    path = Path(data_path)
    lists = {name: path / f"{name}.txt" for name in ("train", "val")}
    has_lists = all(map(os.path.isfile, lists.values())) and not all(os.path.isdir(path / name) for name in lists)
    if not (os.path.isfile(path) or has_lists):
        return ImageFolder(path, split, classes, rebuild_index)
    for option, value in {"classes": classes, "rebuild_index": rebuild_index}.items():
        if value:
            raise UserError(f"--{option} has no effect with a list of images: omit it, or give a folder")
    images = ListedImages(lists[split] if has_lists else path)
    images.has_splits = has_lists
    return images


def open_tar(split, data_path, rebuild_index) -> ImageList:
    """Open images in tars, see `tar.TarImages`."""
    from support.tar import TarImages  # which needs this file

    return TarImages(data_path, split, rebuild_index)


def open_hf(split, name, image_column, label_column) -> ImageList:
    """Open images of Hugging Face's `datasets`, see `hf.HuggingFaceImages`."""
    from support.hf import HuggingFaceImages

    return HuggingFaceImages(name, split, image_column, label_column)


def open_imagenet100(split, data_path, classes) -> ImageList:
    """Open a folder of ImageNet, restricted to the 100 classes in its list."""
    return ImageFolder(data_path, split, classes or IMAGENET100_CLASSES)


def open_torchvision(split, name, data_path, download) -> LabeledImages:
    """Open a data set of torchvision, see `torchvision_sets.load`."""
    images, labels, classes = torchvision_sets.load(name, split, data_path, download)
    if isinstance(images, np.ndarray):
        return ArrayImages(images, labels, classes)
    listed = ImageList(images)
    listed.root, listed.labels, listed.classes = Path(data_path), labels, classes
    return listed


def listed_folders(root, classes_file) -> list[Path]:
    """Return the class folders in `root` that a file lists, one name per line.

    Raises:
        UserError: the file cannot be read, is empty, or names a folder that is missing or is listed twice.
    """
    names = [line.rstrip("/") for line in read_lines(classes_file, "the name of one class folder per line")]
    missing = [name for name in names if name == ".." or Path(name).name != name or not os.path.isdir(root / name)]
    if missing:
        found = f"lacks {len(missing)} of the {len(names)} class folders in {classes_file}"
        raise UserError(f"{root} {found}, the first is {shown(missing[0])}")
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise UserError(f"{classes_file} lists the class {shown(twice[0])} twice, expected each class once")
    return [root / name for name in names]


def listed_images(source) -> list[Path]:
    """Return the paths of the images in a folder and its subfolders, or of the images that a text file lists.

    For the format of the file, see `read_list`; classes are ignored.

    Raises:
        UserError: the folder or file does not exist, lists no image, or lists a missing one.
    """
    if os.path.isdir(source):
        return [Path(path) for path in ImageFolder(source).paths]
    return list(map(Path, read_list(source)[0]))


def read_list(source) -> tuple[list[str], list[str]]:
    """Read a list of images: one path per line, relative to the file, or PATH<tab>CLASS in all lines.

    Returns:
        (paths, names of their classes, [] if the lines have none)

    Raises:
        UserError: the file cannot be read or is empty, only some lines have a class, or images are missing.
    """
    expected = "a folder of images, or a text file with one path per line"
    lines = [line.partition("\t") for line in read_lines(source, expected)]
    names = [name.strip() for _, _, name in lines]
    have_class = sum(map(bool, names))
    if 0 < have_class < len(lines):
        first = shown(next(path for path, _, name in lines if not name.strip()))
        found = f"{source} has a class after a tab for {have_class} of its {len(lines)} images, but not for {first}"
        raise UserError(f"{found}: expected a class in every line, or in none")
    folder = os.path.dirname(source)
    paths = [os.path.join(folder, path.rstrip()) for path, _, _ in lines]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        found = f"{source} lists {len(paths)} images, {len(missing)} are missing"
        raise UserError(f"{found}; the first: {shown(missing[0])}")
    return paths, names if have_class else []


def read_lines(path, expected) -> list[str]:
    """Return the lines of a text file that are not blank, without surrounding spaces.

    Args:
        expected: text for the message.

    Raises:
        UserError: the path is no regular file, the file is not UTF-8, or all its lines are blank.
    """
    try:
        refuse_irregular(path)
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not lines:
            raise ValueError("it is empty")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or ("not text" if isinstance(error, UnicodeError) else error)
        raise UserError(f"cannot read {shown(path)} ({reason}): expected {expected}") from error
    return lines


def has_image_name(name) -> bool:
    """Return whether a file name has a suffix of IMAGE_SUFFIXES and is not hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


class Source(NamedTuple):
    """A kind of data set.

    Attributes:
        open: function of `split`, of the `options` but intensity_range, and of `name` where the source has names.
        options: arguments of `build_dataset` that it accepts; all accept train_images and tuning.
        name: what --dataset takes after the kind and a colon, for messages; "" if nothing.
    """

    open: Callable
    options: tuple = ()
    name: str = ""


# {kind, the part of --dataset before a colon: Source}
SOURCES = {
    "folder": Source(open_folder, ("data_path", "classes", "intensity_range", "rebuild_index")),
    "imagenet100": Source(open_imagenet100, ("data_path", "classes", "intensity_range")),
    "cifar10": Source(partial(open_torchvision, name="CIFAR10"), ("data_path", "download")),
    "torchvision": Source(open_torchvision, ("data_path", "download"), "NAME"),
    "tar": Source(open_tar, ("data_path", "intensity_range", "rebuild_index")),
    "hf": Source(open_hf, ("image_column", "label_column", "intensity_range"), "NAME_OR_PATH"),
    "elpv": Source(solar_cells),
    "digits": Source(digits),
    "photographs": Source(photograph_crops),
}


def find_source(dataset) -> tuple[Source, str]:
    """Return (source, name) of a value of --dataset, KIND or KIND:NAME. The name is "" where the source has none.

    Raises:
        UserError: there is no such source, or a name is missing or too much.
    """
    kind, colon, name = dataset.partition(":")
    found = SOURCES.get(kind)
    if found is None or bool(found.name) != bool(name) or (colon and not name):
        known = [f"{kind}:{each.name}" if each.name else kind for kind, each in SOURCES.items()]
        raise UserError(f"found {dataset!r}, expected one of {', '.join(known)}")
    return found, name


def dataset_name(text) -> str:
    """Check a value of --dataset, see `find_source`. An argparse type."""
    try:
        find_source(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


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
