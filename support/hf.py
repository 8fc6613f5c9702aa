"""Images of Hugging Face's `datasets`, memory-mapped, from local files, among them tars, or the hub."""

import glob
import io
import os
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from support.files import refuse_irregular
from support.images import ImageList, numbered_classes
from utils import UserError, first_line, is_first_process, printable

# Names of the splits there, the preferred one first
NAMES = {"train": ("train", "training"), "val": ("validation", "valid", "val", "dev", "test", "testing")}
SAVED = ("dataset_dict.json", "state.json")  # files in folders of `save_to_disk`
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".tar.gz": "webdataset"}
LABELS = ("label", "cls")  # columns of integers that are labels by default; tars have cls


class HuggingFaceImages(ImageList):
    """The images of a split, in its order. See `sources.build_dataset`.

    Images are decoded by `read_image` from the stored bytes, or from the file whose path is stored without bytes.

    Args:
        name: folder of parquet, Arrow or tar files or of `save_to_disk`, such a file, a pattern of such files, another
            folder that `datasets.load_dataset` takes, or a name on the hub. See `files_of`.
        image_column, label_column: columns. None: the only images, and the only ClassLabel or the integers in one of
            LABELS. Without such labels, all are -1.

    Attributes:
        paths: NAME/SPLIT/ROW of each image, for messages; of tars NAME/SPLIT/ROW/SAMPLE.

    Raises:
        UserError: `datasets` is missing, the name cannot be opened, or a split or column is missing or of another type.
    """

    splits, layout = "splits train and validation or test", "splits train and validation or test with labels"

    def __init__(
        self, name: str, split: str = "train", image_column: str | None = None, label_column: str | None = None
    ):
        rows, split_name, self.has_splits = open_rows(name, split)
        self.root, features = name, rows.features
        kinds = {column: kind_of(feature) for column, feature in features.items()}
        self.column = choose(
            kinds, image_column, [column for column in kinds if kinds[column] == "Image"], name, "image"
        )
        classes = [column for column in kinds if kinds[column] == "ClassLabel"]
        integers = [column for column in LABELS if kinds.get(column, "").startswith(("int", "uint"))]
        label_column = choose(kinds, label_column, classes or integers, name, "label")
        if self.column is None:
            refuse(kinds, name, "no column of images", "--image_column")
        try:
            samples = [""] * len(rows)
            if "__key__" in kinds:  # of tars
                samples = [f"/{key}" for key in read_column(rows, "__key__").to_pylist()]
            super().__init__(f"{name}/{split_name}/{row}{sample}" for row, sample in enumerate(samples))
            if label_column is not None:
                self.labels, self.classes = read_labels(rows, label_column, name)
            from datasets import Image

            rows = rows.select_columns([self.column])
            is_encoded = type(features[self.column]).__name__ == "Image"
            self.rows = rows.cast_column(self.column, Image(decode=False)) if is_encoded else rows
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"cannot read {printable(name)}: {printable(first_line(error))}") from error
        self.numbers = np.arange(len(rows))

    def file(self, index: int) -> BinaryIO:
        try:
            value = self.rows[int(self.numbers[index])][self.column]
            contents = value["bytes"] if isinstance(value, dict) else value
            if not contents:
                if not value or not value.get("path"):
                    raise ValueError("the row has no image")
                refuse_irregular(value["path"])
                contents = Path(value["path"]).read_bytes()
            return io.BytesIO(contents)
        except Exception as error:  # Arrow has its own for damaged files
            reason = printable(first_line(error))
            raise UserError(f"cannot read image {printable(self.paths[index])}: {reason}") from error

    def keep(self, indices: Sequence[int]) -> None:
        super().keep(indices)
        self.numbers = self.numbers[indices]


def open_rows(name: str, split: str) -> tuple[Any, str, bool]:
    """Open a split of a data set. Says when the validation images are those of the test split.

    Returns:
        (`datasets.Dataset`, name of the split there, whether training and validation images differ)
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"--dataset hf:{name} needs the package datasets: pip install datasets") from error
    if int(datasets.__version__.split(".")[0]) < 4:
        version = f"datasets {datasets.__version__} runs scripts that data sets bring"
        raise UserError(f"{version}, expected version 4: pip install --upgrade datasets")
    if not (is_first_process() and sys.stderr.isatty()):
        datasets.disable_progress_bars()
    files = files_of(name)
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error is enough
    try:
        if any(os.path.isfile(os.path.join(name, file)) for file in SAVED):
            opened = datasets.load_from_disk(name)
        else:
            builder = datasets.load_dataset_builder(builder_of(name) or name, data_files=files or None)
            for paths in (builder.config.data_files or {}).values() if not os.path.isdir(builder.cache_dir) else ():
                check_tars(paths)  # whose copy is still to be made
            builder.download_and_prepare()
            opened = builder.as_dataset()
    except Exception as error:  # of many kinds, by the kind of the files and the state of the network
        reason = printable(first_line(error.__cause__ or error))
        where = "" if files or os.path.exists(name) else " on the hub, and no folder here"
        raise UserError(f"cannot open the data set {printable(name)}{where}: {reason}") from error
    finally:
        datasets.logging.set_verbosity(level)
    parts = dict(opened) if isinstance(opened, dict) else {str(opened.split or "train"): opened}
    chosen = {kind: find_split(parts, names) for kind, names in NAMES.items()}
    part = chosen[split]
    if part is None:
        raise UserError(f"{name} has the splits {', '.join(parts)}, expected train, and validation or test")
    has_splits = chosen["train"] != chosen["val"]
    if is_first_process() and split == "val" and has_splits and part not in NAMES["val"][:3]:
        print(f"{name} has no validation split: its split {part} is used", flush=True)
    return parts[part], part, has_splits


def builder_of(name: str) -> str:
    """Return the builder of files with the ending of a name; "" for a folder and for a name on the hub."""
    is_folder = os.path.isdir(name)
    return next((builder for ending, builder in BUILDERS.items() if name.endswith(ending) and not is_folder), "")


def files_of(name: str) -> list[str]:
    """Return the files that a path or a pattern names; an empty list for a folder and for a name on the hub.

    A pattern has ranges as {000..099} and wildcards. All files of a range must exist.

    Raises:
        UserError: there is no such file.
    """
    files: list[str] = []
    for pattern in expand(name) if builder_of(name) else ():
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not found or not all(map(os.path.isfile, found)):
            raise UserError(
                f"no file {printable(pattern)}: --dataset hf: takes a folder, files in {', '.join(BUILDERS)}, or a name"
            )
        files += found
    return files


def expand(pattern: str) -> Iterator[str]:
    """Expand ranges: {08..11} becomes 08, 09, 10, 11, as in a shell."""
    found = re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}", pattern)
    if found is None or os.path.exists(pattern):
        yield pattern
        return
    first, last = found.groups()
    if int(first) > int(last):
        yield pattern
    for i in range(int(first), int(last) + 1):
        yield from expand(f"{pattern[: found.start()]}{str(i).zfill(len(first))}{pattern[found.end() :]}")


def check_tars(paths: Iterable[str]) -> None:
    """Raise ValueError if a local tar is damaged or cut short. Python's reader takes a damaged header for the end."""
    for path in paths:
        if builder_of(path) != "webdataset" or "://" in path:
            continue
        refuse_irregular(path)
        try:
            with tarfile.open(path) as archive:
                archive.getnames()
                archive.fileobj.seek(archive.offset)
                if any(archive.fileobj.read(tarfile.BLOCKSIZE) or b"?"):
                    raise tarfile.ReadError(f"no header at byte {archive.offset}")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{path} is damaged or cut short: {first_line(error)}") from None


def find_split(splits: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the first of several names that is a split. If there is only one split, return that."""
    splits = list(splits)
    return next((name for name in names if name in splits), splits[0] if len(splits) == 1 else None)


def kind_of(feature: Any) -> str:
    """Return the type of a column: int64, binary, ClassLabel, Image (also its storage without that name), ..."""
    if isinstance(feature, dict) and feature.keys() == {"bytes", "path"}:
        return "Image"
    kind = type(feature).__name__
    return feature.dtype if kind == "Value" else kind


def choose(kinds: dict[str, str], given: str | None, candidates: list[str], name: str, what: str) -> str | None:
    """Return the given column of "image" or "label", or the only candidate, or None without one."""
    if given is not None and given not in kinds:
        refuse(kinds, name, f"no column {given}", f"another --{what}_column")
    if given is None and len(candidates) > 1:
        refuse(kinds, name, f"{len(candidates)} columns of {what}s", f"--{what}_column")
    return given if given is not None else next(iter(candidates), None)


def refuse(kinds: dict[str, str], name: str, what: str, option: str) -> NoReturn:
    columns = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
    raise UserError(f"{printable(name)} has {what}: its columns are {printable(columns)}; give {option}")


def read_column(rows: Any, column: str) -> Any:
    """Return a column as an Arrow array, without reading the others."""
    return rows.select_columns([column]).with_format("arrow")[:].column(column)


def read_labels(rows: Any, column: str, name: str) -> tuple[list[int], list[str]]:
    """Return (labels, classes). Missing labels and -1 are images without a label.

    Raises:
        UserError: a label is below -1, or is not the number of a class name.
    """
    names = getattr(rows.features[column], "names", None)
    labels = read_column(rows, column).cast("int64").fill_null(-1).to_numpy()
    highest = len(names) - 1 if names else 2**63 - 1
    outside = labels[(labels < -1) | (labels > highest)]
    if len(outside):
        expected = f"expected -1 (none) to {highest}"
        raise UserError(f"the column {column} of {name} has the label {outside[0]}, {expected}")
    return (labels.tolist(), list(names)) if names else numbered_classes(labels)
