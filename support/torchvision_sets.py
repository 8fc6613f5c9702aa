"""Classification data sets of torchvision, by name, through its public interface."""

import gzip
import inspect
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image

from support.images import ImageList, LabeledImages
from utils import UserError, first_line

# Files of the sets in MNIST's format
IDX_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
MAX_IDX = 2**28  # bytes of an unpacked one; those of MNIST have up to 47 MB


class TorchvisionImages(LabeledImages):
    """Images as a data set of torchvision returns them.

    Args:
        dataset: item i is (PIL image, label).
        title: text that names the images in messages.
    """

    def __init__(self, dataset: Any, title: str, labels: list[int], classes: Sequence[str]):
        self.dataset, self.title, self.labels, self.classes = dataset, title, labels, classes
        self.numbers = np.arange(len(labels))

    def image(self, index: int) -> Image.Image:
        number = int(self.numbers[index])
        try:
            return self.dataset[number][0].convert("RGB")
        except Exception as error:  # of many kinds, by the kind of the files
            raise UserError(f"cannot read image {number} of {self.title}: {first_line(error)}") from error

    def keep(self, indices: Sequence[int]) -> None:
        super().keep(indices)
        self.numbers = self.numbers[indices]


def open_torchvision(split: str, name: str, data_path: str | Path, download: bool = False) -> LabeledImages:
    """Open a data set of torchvision.

    Where its constructor takes a `loader`, torchvision only says which file is which, and the images are read as those
    of a folder. Otherwise its items are used.

    Args:
        split: "train"; or "val", which is the test split where there is one.
        name: class of `torchvision.datasets` with the argument `train` or `split`, and one class per image.
        data_path: torchvision's root; of sets in MNIST's format also a folder with their four files.
        download: let torchvision download the data set if it is missing.

    Raises:
        UserError: the name is unknown, the data set is missing or damaged, or cannot be downloaded.
    """
    is_known = name in torchvision.datasets.__all__
    kind: Any = getattr(torchvision.datasets, name) if is_known else dict
    parameters = inspect.signature(kind).parameters if is_known else {}
    if not {"train", "split"} & set(parameters):
        known = f"torchvision {torchvision.__version__} has no data set {name} with training and test images"
        raise UserError(f"--dataset torchvision:{name}: {known}; names are written as CIFAR10 or Food101")
    if download and "download" not in parameters:
        raise UserError(f"torchvision cannot download {name}: omit --download")
    options: dict[str, Any] = {"loader": str} if "loader" in parameters else {}
    try:
        if issubclass(kind, torchvision.datasets.MNIST):
            if download:
                construct(kind, split, data_path, {"download": True})
            dataset = open_mnist(kind, split, Path(data_path))
        else:
            dataset = construct(kind, split, data_path, options | ({"download": True} if download else {}))
        items = list(dataset) if options else dataset
        targets = getattr(dataset, "targets", None)
        labels = [int(label) for label in (targets if targets is not None else [label for _, label in items])]
        names = getattr(dataset, "classes", None) or range(max(labels, default=0) + 1)
        classes = [str(each[0] if isinstance(each, tuple) else each) for each in names]  # tuple: synonyms
        if len(labels) != len(dataset) or not 0 <= min(labels, default=0) <= max(labels, default=0) < len(classes):
            raise ValueError(f"found {len(dataset)} images, {len(labels)} labels and {len(classes)} classes")
    except UserError:
        raise
    except Exception as error:  # damaged files raise many kinds of errors
        reason = first_line(error)
        if isinstance(error, ImportError):
            raise UserError(f"--dataset torchvision:{name} needs another package: {reason}") from error
        if download:
            raise UserError(f"cannot download {name} to {data_path}: {reason}") from error
        expected = "intact files as torchvision puts them there"
        expected += ", which --download fetches" if "download" in parameters else ""
        raise UserError(f"no {name} in {data_path}, expected {expected} ({reason})") from error
    if not options:
        return TorchvisionImages(dataset, f"the {split} images of {name} in {data_path}", labels, classes)
    images = ImageList(path for path, _ in items)
    images.root, images.labels, images.classes = Path(data_path), labels, classes
    return images


def construct(kind: Callable[..., Any], split: str, root: str | Path, options: dict[str, Any]) -> Any:
    """Return the instance of a class of torchvision that has the images of a split."""
    parameters = inspect.signature(kind).parameters
    if "train" in parameters:
        return kind(root, train=split == "train", **options)
    if split == "train":
        # e.g. train, or trainval where the others are for tests
        return kind(root, split=parameters["split"].default, **options)
    try:
        return kind(root, split="test", **options)
    except ValueError as error:
        if "argument split" not in str(error):
            raise
    return kind(root, split="val", **options)


def open_mnist(kind: Callable[..., Any], split: str, folder: Path) -> Any:
    """Return the instance of a class of torchvision that reads MNIST's format, from files packed with gzip or not.

    torchvision reads unpacked files in ROOT/NAME/raw and keeps their contents in memory. Here they may lie there or in
    ROOT itself, as Debian installs them: they are copied to a temporary root.

    Raises:
        UserError: a file is missing or cannot be unpacked.
    """
    name = kind.__name__
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root, name, "raw")
        raw.mkdir(parents=True)
        for file in IDX_FILES:
            places = [folder / below / f"{file}{end}" for below in ("", f"{name}/raw") for end in ("", ".gz")]
            path = next((place for place in places if os.path.isfile(place)), None)
            if path is None:
                raise UserError(f"no {file} in {folder}: expected the four files of {name}, which --download fetches")
            try:
                with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as source:
                    (raw / file).write_bytes(source.read(MAX_IDX))
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"cannot read {path}: {first_line(error)}") from error
        return construct(kind, split, root, {})
