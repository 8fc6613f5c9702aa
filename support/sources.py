"""Where images come from: --dataset and the options that go with it."""

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from support.arguments import CLASS_LISTS, DEFAULT_CLASSES, class_file, class_list, number
from support.decoding import read_image
from support.folders import ImageFolder, open_folder
from support.hf import HuggingFaceImages
from support.images import ArrayImages, ImageList, LabeledImages
from support.torchvision_sets import open_torchvision
from utils import UserError, printable

# {name: a photograph that a package ships}
PHOTOGRAPHS = {
    Path(place).stem: place
    for place in (
        "sklearn/datasets/images/china.jpg sklearn/datasets/images/flower.jpg skimage/data/astronaut.png "
        "skimage/data/brick.png skimage/data/camera.png skimage/data/chelsea.png skimage/data/coffee.png "
        "skimage/data/coins.png skimage/data/grass.png skimage/data/gravel.png skimage/data/hubble_deep_field.jpg "
        "skimage/data/moon.png skimage/data/motorcycle_left.png skimage/data/retina.jpg skimage/data/rocket.jpg"
    ).split()
}
CROPS = {"train": 100, "val": 20}  # crops per photograph


def add_source_arguments(add: Callable, layout: str, free: Callable | None = None) -> None:
    """Add the options of DataSpec to an argument group.

    Args:
        add: the group's `add_argument`.
        layout: help of --data_path.
        free: the same for options that a run that resumes may change. Default: `add`.
    """
    free = free or add
    kinds = "folder, imagenet100, hf:NAME_OR_PATH (also tars), cifar10, torchvision:NAME, elpv, digits or photographs; "
    kinds += "hf and the last three need no --data_path"
    add("--dataset", type=dataset_name, default="folder", help=f"source of images: {kinds}")
    free("--data_path", help=layout)
    add("--classes", type=class_list, help="file with the class folders to use, one per line; or a list of "
        f"ImageNet-100, {' or '.join(CLASS_LISTS)}. Default for imagenet100: that of the resumed run; evaluations: the "
        f"pretraining's; or {DEFAULT_CLASSES}")  # fmt: skip
    add("--image_column", help="column of the images, for hf and CSV lists. Default: the only one")
    add("--label_column", help="column of the labels, for hf and CSV lists. Default: the only one with class names, or "
        "by its name, as label")  # fmt: skip
    free("--download", action="store_true", help="let torchvision download its data set if it is missing")
    add("--train_images", type=number(int, 1), help="use only N training images, drawn once. Default: all")
    add("--tuning", action="store_true", help="hold out a fifth of the training images and use them as validation "
        "images, for choosing settings")  # fmt: skip
    add_intensity_range(add)


def add_intensity_range(add: Callable) -> None:
    """Add --intensity_range to an argument group, given the group's `add_argument`."""
    add("--intensity_range", type=number(float), nargs=2, metavar=("LOW", "HIGH"), help="values of 16-bit, 32-bit and "
        "float images that become gray levels 0 and 255; signed and float images need it. Default: 0 65535; "
        "evaluations: the pretraining's")  # fmt: skip


@dataclass(frozen=True)
class DataSpec:
    """Names the images of a data set: the options of `add_source_arguments`.

    Attributes:
        dataset: a key of KINDS, with a name where the kind has one.
            "folder": all images in `data_path` and its subfolders. The classes are the direct subfolders, if any.
                Or the images in a list, `data_path` itself, or train.txt and val.txt in it, or .csv or .tsv; see
                `folders.read_list`.
            "imagenet100": a folder, restricted to the classes in a list.
            "hf:NAME_OR_PATH": images of Hugging Face's `datasets`, see `hf.HuggingFaceImages`.
            "cifar10": CIFAR-10, "torchvision:CIFAR10".
            "torchvision:NAME": a classification data set of torchvision in `data_path`, see
                `torchvision_sets.open_torchvision`.
            "elpv": photographs of solar cells, see `solar_cells`.
            "digits": scikit-learn's 1,797 scanned digits of 8×8 pixels, 1,400 for training and 397 for validation.
            "photographs": crops of photographs that scikit-learn and scikit-image ship.
        data_path: folder of the images. If it has subfolders `train` and `val`, only the subfolder of the split is
            read.
        classes: see `arguments.class_file`. Default: no restriction; for "imagenet100" the list DEFAULT_CLASSES.
        image_column, label_column: see `hf.HuggingFaceImages` and `folders.read_table`.
        download: let torchvision download the data set if it is missing.
        train_images: number of training images to use, drawn once. None: all.
        tuning: use only these training images, a fifth of them for validation and the others for training.
        intensity_range: see `decoding.read_image`.
    """

    dataset: str
    data_path: str | Path | None = None
    classes: str | Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    download: bool = False
    train_images: int | None = None
    tuning: bool = False
    intensity_range: Sequence[float] | None = None


def data_spec(args: argparse.Namespace, made_with: dict[str, Any] | None = None) -> DataSpec:
    """Return the data set that parsed options name, and write the list of ImageNet-100 to them, for the record.

    Args:
        made_with: recorded arguments of a pretraining, see `evaluation.open_model`, or of the run that is resumed. Its
            intensity range and its list of ImageNet-100 are the defaults.

    Raises:
        UserError: --train_images has no effect on the split that is opened.
    """
    if getattr(args, "split", None) == "val" and args.train_images and not args.tuning:
        raise UserError("--train_images has no effect with --split val: use --split train, or omit --train_images")
    spec = DataSpec(**{field.name: getattr(args, field.name) for field in fields(DataSpec)})
    made_with = made_with or {}
    if "intensity_range" in find_kind(spec.dataset)[0].options:
        spec = replace(spec, intensity_range=spec.intensity_range or made_with.get("intensity_range"))
    if spec.dataset == "imagenet100" and not spec.classes:
        recorded = made_with.get("classes") if made_with.get("dataset") == spec.dataset else None
        args.classes = recorded if recorded and isinstance(recorded, str) else DEFAULT_CLASSES
        spec = replace(spec, classes=args.classes)
    return spec


def build_dataset(
    spec: DataSpec, split: str = "train", transform: Callable | None = None, min_side: int | None = None
) -> LabeledImages:
    """Open a split of a data set.

    Args:
        spec: names the images.
        split: "train" or "val".
        transform: applied to the PIL image.
        min_side: see `decoding.read_image`.

    Raises:
        UserError: an argument has no effect on the data set, the folder or a class is missing, the subfolders are named
            like splits, there are no images, or fewer than `train_images`.
    """
    kind, name = find_kind(spec.dataset)
    for option, value in vars(spec).items():
        if value and option not in ("dataset", "train_images", "tuning", *kind.options):
            raise UserError(f"--{option} has no effect with --dataset {spec.dataset}: omit it")
    if "data_path" in kind.options and not spec.data_path:
        raise UserError(f"--dataset {spec.dataset} needs --data_path, the folder of the images")
    options = {option: getattr(spec, option) for option in kind.options if option != "intensity_range"}
    if name:
        options["name"] = name
    if spec.classes:
        options["classes"] = class_file(spec.classes)
    opened = "train" if spec.tuning else split
    images = kind.open(split=opened, **options)
    if not len(images):
        raise UserError(f"--dataset {spec.dataset} has no {opened} images")
    images.transform, images.total = transform, len(images)
    if spec.classes:
        images.classes_from = f" of the list {printable(spec.classes)}"
    part = f"{opened} split" if images.has_splits else "all"
    images.source = f"{part} of {printable(spec.data_path or spec.dataset)}"
    if opened == "train" and (spec.train_images or spec.tuning):
        images.keep(drawn(len(images), spec, split))
    if isinstance(images, ImageList):
        images.min_side = min_side
        images.use_intensity_range(spec.intensity_range)
    return images


def drawn(total: int, spec: DataSpec, split: str) -> list[int]:
    """Return the training images that --train_images and --tuning leave of a number of images, ascending.

    Raises:
        UserError: there are too few images.
    """
    count = spec.train_images or total
    if count > total:
        raise UserError(f"--train_images {count} is more than the {total} training images")
    if spec.tuning and count < 5:
        raise UserError(f"--tuning holds out a fifth of the training images, found {count}, expected at least 5")
    chosen = np.random.default_rng(0).permutation(total)[:count]
    if spec.tuning:
        chosen = chosen[: count // 5] if split == "val" else chosen[count // 5 :]
    return sorted(chosen.tolist())


def open_imagenet100(split: str, data_path: str | Path, classes: str | Path | None) -> ImageList:
    """Open a folder of ImageNet, restricted to the 100 classes in its list."""
    return ImageFolder(data_path, split, classes or class_file(DEFAULT_CLASSES))


def solar_cells(split: str) -> ImageList:
    """Open the photographs of solar cells in the package elpv-dataset, with the classes functional and defective.

    2,624 electroluminescence photographs of 300×300 pixels (Buerhop-Lopez et al., 2018; Deitsch et al., 2021). A cell
    is defective if the experts' probability of a defect is at least 0.5. A fixed random three quarters of the cells are
    for training, the others for validation, with the same proportions of classes and of cell types (monocrystalline and
    polycrystalline) in both.

    Raises:
        UserError: the package is not installed, or lacks its files.
    """
    table = package_file("elpv_dataset/data/labels.csv", "elpv-dataset")
    cells = [line.split() for line in table.read_text().splitlines()]  # path, probability, type
    groups = [(int(float(probability) >= 0.5), kind) for _, probability, kind in cells]
    chosen: list[int] = []
    for i, group in enumerate(itertools.product((0, 1), ("mono", "poly"))):
        members = [index for index, other in enumerate(groups) if other == group]
        shuffled = np.random.default_rng((0, i)).permutation(members).tolist()
        count = round(len(members) * 3 / 4)
        chosen += shuffled[:count] if split == "train" else shuffled[count:]
    images = ImageList(table.parent / path for path, *_ in cells)
    images.root, images.labels = table.parent, [label for label, _ in groups]
    images.classes = ["functional", "defective"]
    images.keep(sorted(chosen))
    return images


def digits(split: str) -> ArrayImages:
    """Open scikit-learn's copy of the UCI handwritten digits, with a fixed random split into 1,400 and 397 images."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    order = order[:1400] if split == "train" else order[1400:]
    pixels = np.round(data.images[order] * (255 / 16)).astype(np.uint8)  # [n, 8, 8], white ink
    return ArrayImages(pixels, data.target[order], map(str, range(10)))


def package_file(place: str, package: str) -> Path:
    """Return the path of a file that an installed package ships.

    Args:
        place: path that begins with the folder of the package's module.
        package: the package's name for pip.

    Raises:
        UserError: the package is not installed or lacks the file.
    """
    module, _, path = place.partition("/")
    spec = importlib.util.find_spec(module)
    file = Path(spec.origin).parent / path if spec and spec.origin else None  # no origin: a folder without __init__.py
    if file is None or not file.is_file():
        raise UserError(f"no {place}, which comes with {package}: pip install --upgrade {package}")
    return file


def photograph(name: str) -> Path:
    """Return the path of one of PHOTOGRAPHS, which scikit-learn and scikit-image install."""
    return package_file(PHOTOGRAPHS[name], "scikit-image")


def photograph_crops(split: str) -> ArrayImages:
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


class Kind(NamedTuple):
    """A kind of data set.

    Attributes:
        open: function of `split`, of the `options` but intensity_range, and of `name` where the kind has names.
        options: attributes of DataSpec that it accepts; all accept train_images and tuning.
        name: what --dataset takes after the kind and a colon, for messages; "" if nothing.
    """

    open: Callable[..., LabeledImages]
    options: tuple[str, ...] = ()
    name: str = ""


# {the part of --dataset before a colon: Kind}
KINDS = {
    "folder": Kind(open_folder, ("data_path", "classes", "image_column", "label_column", "intensity_range")),
    "imagenet100": Kind(open_imagenet100, ("data_path", "classes", "intensity_range")),
    "cifar10": Kind(partial(open_torchvision, name="CIFAR10"), ("data_path", "download")),
    "torchvision": Kind(open_torchvision, ("data_path", "download"), "NAME"),
    "hf": Kind(HuggingFaceImages, ("image_column", "label_column", "intensity_range"), "NAME_OR_PATH"),
    "elpv": Kind(solar_cells),
    "digits": Kind(digits),
    "photographs": Kind(photograph_crops),
}


def find_kind(dataset: str) -> tuple[Kind, str]:
    """Return (kind, name) of a value of --dataset, KIND or KIND:NAME. The name is "" where the kind has none.

    Raises:
        UserError: there is no such kind, its name is missing, or it has none.
    """
    key, colon, name = dataset.partition(":")
    if key == "tar":
        paths = "where PATH is a tar, a folder of tars, or a pattern as 'shards/{000..099}.tar'"
        raise UserError(f"tars are read with --dataset hf:PATH and without --data_path, {paths}")
    kind = KINDS.get(key)
    if kind is None or bool(kind.name) != bool(colon) or bool(colon) != bool(name):
        known = [f"{key}:{each.name}" if each.name else key for key, each in KINDS.items()]
        raise UserError(f"--dataset: found {dataset!r}, expected one of {', '.join(known)}")
    return kind, name


def dataset_name(text: str) -> str:
    """Check a value of --dataset, see `find_kind`. An argparse type."""
    find_kind(text)
    return text
