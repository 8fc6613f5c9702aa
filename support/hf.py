"""Images of Hugging Face's `datasets`, memory-mapped, from a local folder or the hub."""

import io
import os
import sys
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from support.decoding import refuse_irregular
from support.images import ImageList, numbered_classes
from utils import UserError, first_line, is_first_process, printable

# Names of the splits there, the preferred one first
NAMES = {"train": ("train", "training"), "val": ("validation", "valid", "val", "dev", "test", "testing")}
SAVED = ("dataset_dict.json", "state.json")  # files in folders of `save_to_disk`


class HuggingFaceImages(ImageList):
    """The images of a split, in its order. See `sources.build_dataset`.

    Images are decoded by `read_image` from the stored bytes, or from the file whose path is stored without bytes.

    Args:
        name: folder of parquet or Arrow files or of `save_to_disk`, a parquet or Arrow file, another folder that
            `datasets.load_dataset` takes, or a name on the hub.
        image_column, label_column: columns. None: the only images, and the only ClassLabel or the integers called
            "label". Without such labels, all are -1.

    Attributes:
        paths: NAME/SPLIT/ROW of each image, for messages.

    Raises:
        UserError: `datasets` is missing, the name cannot be opened, or a split or column is missing or of another type.
    """

    splits, layout = "splits train and validation or test", "splits train and validation or test with labels"

    def __init__(self, name, split="train", image_column=None, label_column=None):
        rows, split_name, self.has_splits = open_rows(name, split)
        self.root, features = name, rows.features
        self.column = find_images(features, image_column, name)
        label_column = find_labels(features, label_column, name)
        super().__init__(f"{name}/{split_name}/{row}" for row in range(len(rows)))
        if not self.paths:
            raise UserError(f"the split {split_name} of {name} has no images")
        self.numbers = np.arange(len(rows))
        try:
            if label_column is not None:
                self.labels, self.classes = read_labels(rows, label_column, f"{label_column} of {name}")
            from datasets import Image

            rows = rows.select_columns([self.column])
            self.rows = rows.cast_column(self.column, Image(decode=False)) if is_image(features[self.column]) else rows
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"cannot read {printable(name)}: {printable(first_line(error))}") from error

    def file(self, index) -> BinaryIO:
        try:
            value = self.rows[int(self.numbers[index])][self.column]
            contents = value.get("bytes") if isinstance(value, dict) else value
            if contents is None:
                if not value or not value.get("path"):
                    raise ValueError("the row has no image")
                refuse_irregular(value["path"])
                contents = Path(value["path"]).read_bytes()
            return io.BytesIO(contents)
        except Exception as error:  # Arrow has its own for damaged files
            raise UserError(
                f"cannot read image {printable(self.paths[index])}: {printable(first_line(error))}"
            ) from error

    def keep(self, indices) -> None:
        super().keep(indices)
        self.numbers = self.numbers[indices]


def open_rows(name, split) -> tuple:
    """Return (`datasets.Dataset` of a split, its name there, whether training and validation images differ).

    Says when the validation images are those of the test split.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"--dataset hf:{name} needs the package datasets: pip install datasets") from error
    if int(datasets.__version__.split(".")[0]) < 4:
        found = f"found datasets {datasets.__version__}, which runs scripts that data sets bring"
        raise UserError(f"{found}: pip install --upgrade datasets")
    is_first = is_first_process()
    if not (is_first and sys.stderr.isatty()):
        datasets.disable_progress_bars()
    path, is_local = Path(name), os.path.exists(name)
    if not is_local and (path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2):
        raise UserError(
            f"no folder {printable(name)}: --dataset hf: takes a folder of parquet or Arrow files, or a name"
        )
    level = datasets.logging.get_verbosity()
    if is_local:
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error is enough
    try:
        if any((path / file).is_file() for file in SAVED):
            found = datasets.load_from_disk(name)
        elif path.is_file():
            kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix)
            if kind is None:
                raise ValueError("its name ends in neither .parquet nor .arrow")
            found = datasets.load_dataset(kind, data_files=name)
        else:
            found = datasets.load_dataset(name)
    except Exception as error:  # of many kinds, by the kind of the files and the state of the network
        reason = first_line(error.__cause__ or error)
        where = "" if is_local else ", which is no folder here, from the hub"
        raise UserError(f"cannot open the data set {printable(name)}{where}: {printable(reason)}") from error
    finally:
        datasets.logging.set_verbosity(level)
    splits = dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}
    chosen = {kind: find_split(splits, names) for kind, names in NAMES.items()}
    if chosen[split] is None:
        expected = "train" if split == "train" else "validation or test"
        raise UserError(f"{name} has the splits {', '.join(splits)}, expected {expected}")
    has_splits = chosen["train"] != chosen["val"]
    if is_first and split == "val" and has_splits and chosen["val"] not in NAMES["val"][:3]:
        print(f"{name} has no validation split: its split {chosen['val']} is used", flush=True)
    return splits[chosen[split]], chosen[split], has_splits


def find_split(splits, names) -> str | None:
    """Return the first of several names that is a split. If there is only one split, return that."""
    return next((name for name in names if name in splits), next(iter(splits)) if len(splits) == 1 else None)


def is_image(feature) -> bool:
    """Return whether a column holds images: of the type Image, or its storage without that type's name."""
    import datasets

    if isinstance(feature, dict):
        return {name: kind_of(part) for name, part in feature.items()} == {"bytes": "binary", "path": "string"}
    return isinstance(feature, datasets.Image)


def kind_of(feature) -> str:
    """Return the type of a column: int64, binary, ClassLabel, Image, ..."""
    import datasets

    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def find_images(features, given, name) -> str:
    """Return the column of the images. A given one may also hold encoded images as plain bytes.

    Raises:
        UserError: it is missing or of another type, or there are several without a given one.
    """
    found = [column for column in features if is_image(features[column])]
    binary = [column for column in features if kind_of(features[column]) in ("binary", "large_binary")]
    column = choose(features, given, found, [*found, *binary], name, "image")
    if column is None:
        refuse(features, name, "no column of images", "--image_column")
    return column


def find_labels(features, given, name) -> str | None:
    """Return the column of the labels, or None if there is none.

    Raises:
        UserError: it is missing or of another type, or there are several without a given one.
    """
    classes = [column for column in features if kind_of(features[column]) == "ClassLabel"]
    integers = [column for column in features if kind_of(features[column]).startswith(("int", "uint"))]
    found = classes or [column for column in integers if column == "label"]
    return choose(features, given, found, [*classes, *integers], name, "label")


def choose(features, given, found, accepted, name, kind) -> str | None:
    """Return the given column, or the only one that was found, or None without one.

    Args:
        found: columns, one of which may be taken if none is given.
        accepted: columns that may be given.
        kind: "image" or "label".
    """
    if given is None and len(found) > 1:
        refuse(features, name, f"{len(found)} columns of {kind}s", f"--{kind}_column")
    if given is not None and given not in accepted:
        what = f"no {kind}s in the column {given}" if given in features else f"no column {given}"
        refuse(features, name, what, f"another --{kind}_column")
    return given if given is not None else next(iter(found), None)


def refuse(features, name, what, option) -> NoReturn:
    columns = ", ".join(f"{column} ({kind_of(feature)})" for column, feature in features.items())
    raise UserError(f"{printable(name)} has {what}: its columns are {printable(columns)}; give {option}")


def read_labels(rows, column, shown_name) -> tuple[list[int], list[str]]:
    """Return (labels, classes) without reading the images. Missing labels and -1 are images without a label.

    Raises:
        UserError: a label is below -1, or no index of a class name.
    """
    names = getattr(rows.features[column], "names", None)
    table = rows.select_columns([column]).with_format("arrow")[:]
    labels = table.column(column).cast("int64").fill_null(-1).to_numpy()
    highest = len(names) - 1 if names else 2**63 - 1
    outside = labels[(labels < -1) | (labels > highest)]
    if len(outside):
        raise UserError(f"the column {shown_name} has the label {outside[0]}, expected -1 (none) to {highest}")
    return (labels.tolist(), list(names)) if names else numbered_classes(labels)
