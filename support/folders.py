"""Images in folders and in text files that list them."""

import csv
import io
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from support.arguments import CLASS_LISTS
from support.decoding import image_suffixes
from support.files import read_text
from support.hf import choose, refuse
from support.images import ImageList, Paths, in_order
from utils import UserError, first_line, printable, warn

IGNORED = ("__MACOSX", "@eaDir")  # folders that macOS and network disks add, as those whose names begin with a dot
LISTS, BLANKS = (".txt", ".csv", ".tsv"), " \t\r"
# Columns of images and of classes, in lower case
IMAGES = "filename file_name file filepath file_path path image image_name image_path image_file img img_path".split()
LABELS = "label labels class class_name class_label category category_name target".split()
PARTS = {"train": [f"train.X{i}" for i in range(1, 5)], "val": ["val.X"]}  # of the splits of Kaggle's ImageNet-100
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # names of splits in other layouts


def open_folder(split: str, data_path: str | Path, classes: str | Path | None, **columns: str | None) -> ImageList:
    """Open a folder or a list of images, see `sources.build_dataset` and, for the columns, `read_table`."""
    path = Path(data_path)
    lists = {name: [file for end in LISTS if os.path.isfile(file := path / (name + end))] for name in ("train", "val")}
    has_lists = all(lists.values()) and not all(os.path.isdir(path / name) for name in lists)
    source = lists[split][0] if has_lists else path
    for option, value in columns.items():
        if value and not is_table(source):
            raise UserError(f"--{option} has no effect with --dataset folder without a .csv or .tsv list: omit it")
    if not (os.path.isfile(path) or has_lists):
        return ImageFolder(path, split, classes)
    if classes:
        raise UserError("--classes has no effect with a list of images: omit it, or give a folder")
    images = read_list(source, **columns)
    images.has_splits = has_lists
    return images


class ImageFolder(ImageList):
    """The images in a folder and its subfolders, sorted by path. See `sources.build_dataset`.

    Attributes:
        root: folder that is read, `train` or `val` if the folder has both.
        parts: folders in it with the class folders, see `parts_of_split`; `root` itself except for Kaggle's parts.
        classes: names of the class folders, which hold at least one image, see `class_name`. Sorted, or in the order of
            their file.
        labels: label of each image, -1 if it is not in a class folder.
    """

    def __init__(self, root: str | Path, split: str = "train", classes_file: str | Path | None = None):
        super().__init__([])
        root = Path(root)
        if not os.path.isdir(root):
            raise UserError(f"no folder {root}: --data_path takes a folder of images, or a list of images")
        self.parts = parts_of_split(root, split)
        self.has_splits = self.parts != [root]
        self.root = root = self.parts[0] if len(self.parts) == 1 else root
        self.found = seen = Counter[str]()
        folders, names, prefix = [], [], str(root / "x")[:-1]
        for part in self.parts:
            _, subfolders, files = next(walk(part), ("", [], []))
            below, start = [part / name for name in subfolders], str(part / "x")[:-1].removeprefix(prefix)
            refuse_other_splits(part, below)
            if classes_file is None:
                folders += below
                names += sorted(start + name for name in image_names(files, seen))
        if classes_file is not None:
            folders = listed_folders(self.parts, classes_file)
        labels = [-1] * len(names)
        counts: dict[tuple[Path, str], int] = {}  # images per part and class
        others = set(map(os.path.realpath, [*self.parts, *folders]))
        for folder in folders:
            found = walk(folder, others)
            paths = [os.path.join(top, name) for top, _, files in found for name in image_names(files, seen)]
            if paths:
                if (key := (folder.parent, class_name(folder.name))) in counts:
                    twice = f"the class {printable(key[1])} in composed and in decomposed Unicode"
                    raise UserError(f"{folder.parent} has {twice}: join the two folders")
                names += [path.removeprefix(prefix) for path in sorted(paths)]
                counts[key] = len(paths)
            elif classes_file is not None:
                raise UserError(f"the class folder {folder}, which {classes_file} lists, has no images")
        if not names:
            others_found = in_order(seen, "{0} {1}") or "no files"
            expected = f"expected files that end in {' '.join(image_suffixes())}"
            raise UserError(f"no images below {root}, found {others_found}: {expected}")
        # Not sorted by the names on the disk, whose order depends on how they are encoded
        found_classes = dict.fromkeys(name for _, name in counts)
        self.classes = list(found_classes) if classes_file is not None else sorted(found_classes)
        numbers = {name: i for i, name in enumerate(self.classes)}
        for (_, name), count in counts.items():
            labels += [numbers[name]] * count
        self.paths, self.labels = Paths(names, prefix), labels
        self.classes_from = " from folder names" if counts else ""


def parts_of_split(root: Path, split: str) -> list[Path]:
    """Return the folders with the class folders of a split: `train` or `val`, Kaggle's PARTS, or else `root` itself."""
    if (root / "train").is_dir() and (root / "val").is_dir():
        return [root / split]
    there = {name: (root / name).is_dir() for name in itertools.chain(*PARTS.values())}
    if any(there.values()) and not all(there.values()):
        lacking = ", ".join(name for name, is_there in there.items() if not is_there)
        raise UserError(f"{root} lacks {lacking}: expected all of Kaggle's ImageNet-100, {', '.join(there)}")
    return [root / name for name in PARTS[split]] if all(there.values()) else [root]


def listed_folders(parts: Sequence[Path], classes_file: str | Path) -> list[Path]:
    """Return the class folders in `parts` that a file lists, one name per line.

    Raises:
        UserError: the file cannot be read, is empty, or names a folder that is missing or is listed twice.
    """
    on_disk: dict[str, list[Path]] = {}
    for part in parts:
        for name in os.listdir(part):
            on_disk.setdefault(class_name(name), []).append(part / name)
    try:
        names = [class_name(line.rstrip("/")) for line in read_lines(classes_file)]
    except UserError as error:
        raise UserError(f"{error}; --classes takes {', '.join(CLASS_LISTS)} or a file of class folders") from error
    found = [[folder for folder in on_disk.get(name, []) if os.path.isdir(folder)] for name in names]
    if missing := [name for name, folders in zip(names, found, strict=True) if not folders]:
        counts = f"{len(missing)} of the {len(names)} class folders in {classes_file}"
        root = parts[0] if len(parts) == 1 else parts[0].parent
        raise UserError(f"{root} lacks {counts}, the first is {printable(missing[0])}; see --classes")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"{classes_file} lists the class {printable(name)} twice, expected each class once")
    return list(itertools.chain(*found))


def refuse_other_splits(root: Path, folders: list[Path]) -> None:
    """Raise UserError if the subfolders of a folder are named like splits, as Train and Val, or train without val.

    A class may be called "train" if there are other classes. Names like test_set and train2017 count as splits.
    """
    words = {folder.name: re.split("[^a-z]", folder.name.lower())[0] for folder in folders}
    splits = [name for name, word in words.items() if word in SPLITS]
    both = len({words[name] in ("train", "training") for name in splits}) == 2
    if both or (splits and len(splits) == len(folders)):
        expected = "expected train and val with the same class folders, or the class folders themselves"
        raise UserError(f"{root} has {', '.join(splits)}, {expected}: rename them, or give one of them as --data_path")


def walk(folder: Path, others: Collection[str] = ()) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk through a folder like `os.walk`, follow links, read no folder twice, and leave out hidden files and folders.

    Hidden are names that begin with a dot, and IGNORED. Links to parents of the folder are not followed. A folder that
    cannot be read is skipped with a warning. Files are not examined, which would be slow for a million of them.

    Args:
        others: real paths of folders that are not read either.
    """

    def warn_of(error: OSError) -> None:
        warn(f"cannot read folder {printable(error.filename)}: {error.strerror}; skipping it")

    real = Path(os.path.realpath(folder))
    seen = {str(real), *map(str, real.parents)}
    for top, below, names in os.walk(folder, onerror=warn_of, followlinks=True):
        shown = sorted((name for name in below if not is_hidden(name)), reverse=True)
        targets = {os.path.realpath(os.path.join(top, name)): name for name in shown}
        below[:] = sorted(name for path, name in targets.items() if path not in seen and path not in others)
        seen.update(targets)
        yield top, below, [name for name in names if not is_hidden(name)]


def is_hidden(name: str) -> bool:
    """Return whether `walk` leaves out a file or folder with this name."""
    return name.startswith(".") or name in IGNORED


def has_image_name(name: str) -> bool:
    """Return whether a file name has a suffix of an image and is not hidden."""
    return suffix_of(name) in image_suffixes() and not is_hidden(name)


def image_names(names: list[str], found: Counter[str]) -> list[str]:
    """Return those names of files that have a suffix of an image, and count the suffixes of all in `found`."""
    suffixes, known = list(map(suffix_of, names)), image_suffixes()
    found.update(suffixes)
    return [name for name, suffix in zip(names, suffixes, strict=True) if suffix in known]


def suffix_of(path: str) -> str:
    """Return what a path has from its last dot on, in lower case; "" without a dot. Fast, for a million of them."""
    return path[path.rfind(".") :].lower() if "." in path else ""


def class_name(name: str) -> str:
    """Return the name of a class in composed Unicode (NFC): macOS decomposes the letters of names of files."""
    return unicodedata.normalize("NFC", name)


def is_table(path: str | Path) -> bool:
    """Return whether a list of images has columns, by its suffix."""
    return suffix_of(str(path)) in LISTS[1:]


def listed_images(source: str | Path) -> list[Path]:
    """Return the paths of the images in a folder and its subfolders, or of the images in a list.

    For the format of the file, see `read_list`; classes are ignored.

    Raises:
        UserError: the folder or file does not exist, lists no image, or lists a missing one.
    """
    if os.path.isdir(source):
        return [Path(path) for path in ImageFolder(source).paths]
    return list(map(Path, read_list(source).paths))


def read_list(source: str | Path, image_column: str | None = None, label_column: str | None = None) -> ImageList:
    """Open a list of images: one path per line, relative to the file, or PATH<tab>CLASS in all lines; or a table.

    Args:
        image_column, label_column: see `read_table`.

    Raises:
        UserError: the file cannot be read or is empty, only some lines have a class, or images are missing.
    """
    if is_table(source):
        names, classes, classes_from, layout = read_table(source, image_column, label_column)
    else:
        lines = [line.partition("\t") for line in read_lines(source)]
        names, classes = [name.rstrip() for name, _, _ in lines], [name.strip() for _, _, name in lines]
        classes_from = f" from {printable(Path(source).name)}" if any(classes) else ""
        layout = "lists train.txt and val.txt with IMAGE<tab>CLASS in each line"
    labeled = sum(map(bool, classes))
    if 0 < labeled < len(names):
        where, first = "in its column" if is_table(source) else "after a tab", printable(names[classes.index("")])
        counts = f"a class {where} for {labeled} of its {len(names)} images, but not for {first}"
        raise UserError(f"{source} has {counts}: expected a class in every line, or in none")
    paths = [os.path.join(os.path.dirname(source), name) for name in names]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        counts = f"{len(paths)} images, {len(missing)} are missing"
        raise UserError(f"{source} lists {counts}; the first: {printable(missing[0])}")
    images = ImageList(paths)
    images.root, images.classes_from = Path(source).parent, classes_from
    images.splits, images.layout = layout.partition(" with ")[0], layout
    images.found = Counter(suffix for suffix in map(suffix_of, paths) if suffix in image_suffixes())
    if labeled:
        classes = list(map(class_name, classes))
        images.classes = sorted(set(classes))
        numbers = {name: i for i, name in enumerate(images.classes)}
        images.labels = [numbers[name] for name in classes]
    return images


def read_table(
    source: str | Path, image_column: str | None, label_column: str | None
) -> tuple[list[str], list[str], str, str]:
    """Read the columns of images and classes of a CSV or TSV file, whose first row names the columns.

    A file of one or two columns, images and classes, may lack that row. Columns are separated by tabs in a TSV file, in
    another one by the most frequent of comma, semicolon and tab in the first row.

    Args:
        image_column, label_column: columns. None: the only ones with a name in IMAGES and in LABELS. Without such
            labels, there are no classes.

    Returns:
        (paths and classes as they are in the file; classes_from and layout, see `LabeledImages`)

    Raises:
        UserError: the file cannot be read or is no table, or a column is missing or one of several.
    """
    text, file = read_text(source), printable(Path(source).name)
    separator = "\t" if suffix_of(str(source)) == ".tsv" else max(",;\t", key=text.partition("\n")[0].count)
    try:
        cells = list(csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UserError(f"cannot read {printable(source)} as a table: {first_line(error)}") from error
    header, *rows = [[cell.strip(BLANKS) for cell in row] for row in cells if any(row)] or [[""]]
    if len(header) <= 2 and os.path.isfile(os.path.join(os.path.dirname(source), header[0])):
        header, rows = ["image", "label"][: len(header)], [header, *rows]
    if not rows:
        raise UserError(f"cannot read {printable(source)}: it is empty, or has only the names of its columns")
    rows = [row + [""] * (len(header) - len(row)) for row in rows]
    kinds = dict.fromkeys(header, "text")
    image = choose(kinds, image_column, [name for name in header if name.casefold() in IMAGES], str(source), "image")
    label = choose(kinds, label_column, [name for name in header if name.casefold() in LABELS], str(source), "label")
    if image is None:
        refuse(kinds, str(source), "no column of images", "--image_column")
    images, classes = ([row[header.index(name)] for row in rows] if name else [] for name in (image, label))
    taken = f"classes from column {label}" if label else "no column of classes"
    layout = "lists train.csv and val.csv with columns of images and classes"
    layout += "" if label else f"; {file} has the columns {printable(', '.join(header))}: give --label_column"
    return images, classes, printable(f"; {file}: images from column {image}, {taken}"), layout


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a text file that are not blank, without surrounding spaces.

    Raises:
        UserError: the file cannot be read, see `read_text`, or all its lines are blank.
    """
    lines = [line.strip(BLANKS) for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"cannot read {printable(path)}: it is empty")
    return lines
