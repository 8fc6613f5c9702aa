"""Classification data sets of torchvision, by name, through its public interface."""

import contextlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torchvision
from PIL import Image
from torch.utils.data import Subset

from support.images import ImageList, LabeledImages
from utils import UserError, first_line


class TorchvisionImages(LabeledImages):
    """Images as a data set of torchvision returns them.

    Args:
        dataset: item i is (PIL image, label).
        name: the data set's name, for messages.
    """

    def __init__(self, dataset: Any, name: str, labels: list[int], classes: Sequence[str]):
        self.dataset, self.name, self.labels, self.classes = dataset, name, labels, classes

    def image(self, index: int) -> Image.Image:
        try:
            return self.dataset[index][0].convert("RGB")
        except Exception as error:  # of many kinds, by the kind of the files
            raise UserError(f"cannot read image {index} of {self.name}: {first_line(error)}") from error

    def keep(self, indices: Sequence[int]) -> None:
        super().keep(indices)
        self.dataset = Subset(self.dataset, indices)


def open_torchvision(split: str, name: str, data_path: str | Path, download: bool = False) -> LabeledImages:
    """Open a data set of torchvision.

    Where its constructor takes a `loader`, torchvision only says which file is which, and the images are read as those
    of a folder. Otherwise its items are used.

    Args:
        split: "train"; or "val", which is the test split where there is one.
        name: class of `torchvision.datasets` with the argument `train` or `split`, and one class per image.
        data_path: torchvision's root.
        download: let torchvision download the data set if it is missing.

    Raises:
        UserError: the name is unknown, the data set is missing or damaged, or cannot be downloaded.
    """
    kind: Any = getattr(torchvision.datasets, name) if name in torchvision.datasets.__all__ else None
    parameters = inspect.signature(kind).parameters if kind else {}
    if not {"train", "split"} & set(parameters):
        known = "no such data set with training and test images"
        raise UserError(f"--dataset torchvision:{name}: {known}; names are written as CIFAR10 or Food101")
    options: dict[str, Any] = {"loader": str} if "loader" in parameters else {}
    try:
        dataset = construct(kind, split, data_path, options | ({"download": True} if download else {}))
        items = list(dataset) if options else dataset
        targets = getattr(dataset, "targets", None)
        labels = [int(label) for label in (targets if targets is not None else [label for _, label in items])]
        names = getattr(dataset, "classes", None) or range(max(labels) + 1)
        classes = [str(each[0] if isinstance(each, tuple) else each) for each in names]  # tuple: synonyms
    except Exception as error:  # damaged files raise many kinds of errors
        if download:
            raise UserError(f"cannot download {name} to {data_path}: {first_line(error)}") from error
        expected = "expected intact files as torchvision puts them there, see --download"
        raise UserError(f"no {name} in {data_path}, {expected} ({first_line(error)})") from error
    if not options:
        return TorchvisionImages(dataset, name, labels, classes)
    images = ImageList(path for path, _ in items)
    images.root, images.labels, images.classes = Path(data_path), labels, classes
    return images


def construct(kind: Any, split: str, root: str | Path, options: dict[str, Any]) -> Any:
    """Return the instance of a class of torchvision that has the images of a split."""
    parameters = inspect.signature(kind).parameters
    if "train" in parameters:
        return kind(root, train=split == "train", **options)
    if split == "train":
        # e.g. train, or trainval where the others are for tests
        return kind(root, split=parameters["split"].default, **options)
    with contextlib.suppress(ValueError):  # it has no split of this name
        return kind(root, split="test", **options)
    return kind(root, split="val", **options)
