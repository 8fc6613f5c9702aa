"""Classification data sets of torchvision, by name."""

import gzip
import inspect
import os
import zlib
from pathlib import Path

import numpy as np

from utils import UserError, first_line

MAX_IDX = 2**28  # bytes of an unpacked idx file; those of MNIST have up to 47 MB
# Data sets with a split and one target per image that is no class
WITHOUT_CLASSES = {"CelebA", "Cityscapes", "CLEVRClassification", "Kitti", "LFWPairs", "LFWPeople", "PCAM", "WIDERFace"}


def names() -> list[str]:
    """Return the names of torchvision's classification data sets with a split into training and test images."""
    from torchvision import datasets

    found = []
    for name in datasets.__all__:
        parameters = inspect.signature(getattr(datasets, name)).parameters
        has_split = "target_transform" in parameters and ("train" in parameters or "split" in parameters)
        if has_split and name not in WITHOUT_CLASSES:
            found.append(name)
    return sorted(found)


def load(name, split, data_path, download=False) -> tuple:
    """Load a data set of torchvision.

    Args:
        name: one of `names`.
        split: "train"; or "val", which is the test split where there is one.
        data_path: torchvision's root; of MNIST, FashionMNIST and KMNIST also a folder with their four idx files.
        download: let torchvision download the data set if it is missing.

    Returns:
        (images, labels, classes): uint8 array [n, H, W] or [n, H, W, 3], or a list of paths; list of int; class names

    Raises:
        UserError: the name is unknown, the data set is missing or damaged, or cannot be downloaded.
    """
    from torchvision import datasets

    if name not in names():
        known = hasattr(datasets, name)
        reason = "has no classes, or no split into training and test images" if known else "is unknown"
        raise UserError(f"--dataset torchvision:{name}: {name} {reason}; expected one of {', '.join(names())}")
    kind = getattr(datasets, name)
    if download and "download" not in inspect.signature(kind).parameters:
        raise UserError(f"torchvision cannot download {name}: omit --download")
    if issubclass(kind, datasets.MNIST):
        if download:
            _opened(kind, split, data_path, download)
        return *_read_mnist(data_path, name, split, len(kind.classes)), kind.classes
    dataset = _opened(kind, split, data_path, download)
    try:
        images, labels = _images(dataset), _labels(dataset)
        if len(images) != len(labels) or min(labels, default=0) < 0:
            raise ValueError(f"{len(images)} images, {len(labels)} labels from {min(labels, default=0)} on")
    except Exception as error:  # the attributes are no interface: another version may hold other kinds of values
        reason = first_line(error)
        raise UserError(f"the {split} images and labels of {name} in {data_path} cannot be used: {reason}") from error
    classes = getattr(dataset, "classes", None) or range(max(labels, default=0) + 1)
    return images, labels, [str(each[0] if isinstance(each, tuple) else each) for each in classes]  # tuple: synonyms


def _opened(kind, split, data_path, download):
    """Return the instance of a class of torchvision that has the images of a split."""
    parameters = inspect.signature(kind).parameters
    options = {"download": True} if download else {}
    if "train" in parameters:
        choices = [{"train": split == "train"}]
    elif split == "train":
        choices = [{"split": parameters["split"].default}]  # e.g. train, or trainval where the others are for tests
    else:
        choices = [{"split": "test"}, {"split": "val"}]
    try:
        for choice in choices:
            try:
                return kind(data_path, **choice, **options)
            except ValueError as error:
                if choice is choices[-1] or "argument split" not in str(error):
                    raise
    except Exception as error:  # damaged files raise many kinds of errors
        name, reason = kind.__name__, first_line(error)
        if isinstance(error, ImportError):
            raise UserError(f"--dataset torchvision:{name} needs another package: {reason}") from error
        if download:
            raise UserError(f"cannot download {name} to {data_path}: {reason}") from error
        expected = "expected intact files as torchvision puts them there, which --download fetches"
        if "download" not in parameters:
            expected = f"expected intact files as torchvision describes them ({reason})"
        raise UserError(f"no {name} in {data_path}, {expected}") from error


def _attribute(dataset, *names):
    return next((vars(dataset)[name] for name in names if vars(dataset).get(name) is not None), None)


def _images(dataset):
    """Return the images of a data set of torchvision, an array or a list of paths."""
    images = _attribute(dataset, "data", "_image_files", "_images")
    if images is None:
        images = [image for image, _ in _attribute(dataset, "_samples", "samples", "imgs")]
    if isinstance(images, list) and isinstance(next(iter(images), ""), str | Path):
        return list(map(str, images))
    images = np.stack(list(map(np.asarray, images))) if isinstance(images, list) else np.asarray(images)
    if images.ndim == 4 and images.shape[1] == 3:
        images = np.moveaxis(images, 1, -1)
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"found {images.dtype} {list(images.shape)}, expected images of bytes")
    return images


def _labels(dataset):
    """Return the labels of a data set of torchvision as a list of int."""
    labels = _attribute(dataset, "targets", "labels", "_labels")
    if labels is None:
        labels = [label for _, label in _attribute(dataset, "_samples", "samples", "imgs")]
    return list(map(int, labels))


def _read_mnist(data_path, name, split, num_classes) -> tuple[np.ndarray, list[int]]:
    """Read images and labels of a data set in the format of MNIST, without torchvision: safely, and from any folder."""
    part = "train" if split == "train" else "t10k"
    pixels, labels = (read_idx(data_path, name, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    if pixels.shape != (len(labels), 28, 28) or labels.ndim != 1 or not len(labels) or labels.max() >= num_classes:
        found = f"{part}-images-idx3-ubyte {pixels.shape} and {part}-labels-idx1-ubyte {labels.shape}"
        expected = f"expected the shapes (n, 28, 28) and (n,) and labels up to {num_classes - 1}"
        raise UserError(f"{data_path} holds {found} with labels up to {labels.max(initial=0)}, {expected}")
    return pixels, labels.tolist()


def read_idx(folder, dataset, name) -> np.ndarray:
    """Read the array of an idx file, the format of MNIST: uint8 values of any shape.

    Args:
        folder: has the file, gzipped or not, or has it in DATASET/raw.
        dataset: name of the data set.
        name: of the file without .gz.

    Raises:
        UserError: the file is missing or no such file.
    """
    places = [Path(folder) / below / f"{name}{suffix}" for below in ("", f"{dataset}/raw") for suffix in ("", ".gz")]
    path = next((place for place in places if os.path.isfile(place)), None)
    if path is None:
        raise UserError(f"no {name} in {folder}: expected the four files of {dataset}, which --download fetches")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            contents = np.frombuffer(file.read(MAX_IDX + 1), np.uint8)
        if len(contents) > MAX_IDX:
            raise ValueError(f"more than {MAX_IDX} bytes")
        # Two zeros, the type (8: uint8), the number of dimensions, and each dimension as four bytes, big-endian
        count = int(contents[3])
        shape = contents[4 : 4 + 4 * count].view(">u4").tolist()
        if contents[:3].tolist() != [0, 0, 8]:
            raise ValueError("no idx file of bytes")
        return contents[4 + 4 * count :].reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
