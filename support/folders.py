"""Images in folders and in text files that list them."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from support.decoding import image_suffixes
from support.files import read_text
from support.images import ImageList, Paths, in_order
from utils import UserError, printable, warn

IGNORED = ("__MACOSX", "@eaDir")  # folders that macOS and network disks add, as those whose names begin with a dot
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # names of splits in other layouts


def open_folder(split: str, data_path: str | Path, classes: str | Path | None) -> ImageList:
    """Open a folder or a list of images, see `sources.build_dataset`."""
    path = Path(data_path)
    lists = {name: path / f"{name}.txt" for name in ("train", "val")}
    has_lists = all(map(os.path.isfile, lists.values())) and not all(os.path.isdir(path / name) for name in lists)
    if not (os.path.isfile(path) or has_lists):
        return ImageFolder(path, split, classes)
    if classes:
        raise UserError("--classes has no effect with a list of images: omit it, or give a folder")
    source = lists[split] if has_lists else path
    paths, names = read_list(source)
    images = ImageList(paths)
    images.root, images.has_splits = source.parent, has_lists
    images.found = Counter(suffix for suffix in map(suffix_of, paths) if suffix in image_suffixes())
    if names:
        images.classes_from = f" from {printable(source.name)}"
        images.classes = sorted(set(names))
        numbers = {name: i for i, name in enumerate(images.classes)}
        images.labels = [numbers[name] for name in names]
    return images


class ImageFolder(ImageList):
    """The images in a folder and its subfolders, sorted by path. See `sources.build_dataset`.

    Attributes:
        root: folder that is read, `train` or `val` if the folder has both.
        classes: names of the class folders, which hold at least one image, see `class_name`. Sorted, or in the order of
            their file.
        labels: label of each image, -1 if it is not in a class folder.
    """

    def __init__(self, root: str | Path, split: str = "train", classes_file: str | Path | None = None):
        super().__init__([])
        root = Path(root)
        if not os.path.isdir(root):
            raise UserError(f"no folder {root}: --data_path takes a folder of images, or a list of images")
        self.has_splits = (root / "train").is_dir() and (root / "val").is_dir()
        self.root = root = root / split if self.has_splits else root
        _, subfolders, names = next(walk(root), ("", [], []))
        folders = [root / name for name in subfolders]
        refuse_other_splits(root, folders)
        if classes_file is not None:
            folders, names = listed_folders(root, classes_file), []
        self.found = seen = Counter[str]()
        names = sorted(image_names(names, seen))
        labels = [-1] * len(names)
        counts: dict[str, int] = {}  # images per class
        prefix = str(root / "x")[:-1]
        others = set(map(os.path.realpath, [root, *folders]))
        for folder in folders:
            found = walk(folder, others)
            paths = [os.path.join(top, name) for top, _, files in found for name in image_names(files, seen)]
            if paths:
                if (name := class_name(folder.name)) in counts:
                    twice = f"the class {printable(name)} in composed and in decomposed Unicode"
                    raise UserError(f"{root} has {twice}: join the two folders")
                names += [path.removeprefix(prefix) for path in sorted(paths)]
                counts[name] = len(paths)
            elif classes_file is not None:
                raise UserError(f"the class folder {folder}, which {classes_file} lists, has no images")
        if not names:
            others_found = in_order(seen, "{0} {1}") or "no files"
            expected = f"expected files that end in {' '.join(image_suffixes())}"
            raise UserError(f"no images below {root}, found {others_found}: {expected}")
        # Not sorted by the names on the disk, whose order depends on how they are encoded
        self.classes = list(counts) if classes_file is not None else sorted(counts)
        numbers = {name: i for i, name in enumerate(self.classes)}
        for name, count in counts.items():
            labels += [numbers[name]] * count
        self.paths, self.labels = Paths(names, prefix), labels
        self.classes_from = " from folder names" if counts else ""


def listed_folders(root: Path, classes_file: str | Path) -> list[Path]:
    """Return the class folders in `root` that a file lists, one name per line.

    Raises:
        UserError: the file cannot be read, is empty, or names a folder that is missing or is listed twice.
    """
    on_disk = {class_name(name): name for name in os.listdir(root)}
    names = [class_name(line.rstrip("/")) for line in read_lines(classes_file)]
    names = [on_disk.get(name, name) for name in names]
    missing = [name for name in names if name == ".." or Path(name).name != name or not os.path.isdir(root / name)]
    if missing:
        counts = f"{len(missing)} of the {len(names)} class folders in {classes_file}"
        raise UserError(f"{root} lacks {counts}, the first is {printable(missing[0])}")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"{classes_file} lists the class {printable(name)} twice, expected each class once")
    return [root / name for name in names]


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


def listed_images(source: str | Path) -> list[Path]:
    """Return the paths of the images in a folder and its subfolders, or of the images that a text file lists.

    For the format of the file, see `read_list`; classes are ignored.

    Raises:
        UserError: the folder or file does not exist, lists no image, or lists a missing one.
    """
    if os.path.isdir(source):
        return [Path(path) for path in ImageFolder(source).paths]
    return list(map(Path, read_list(source)[0]))


def read_list(source: str | Path) -> tuple[list[str], list[str]]:
    """Read a list of images: one path per line, relative to the file, or PATH<tab>CLASS in all lines.

    Returns:
        (paths, names of their classes, [] if the lines have none)

    Raises:
        UserError: the file cannot be read or is empty, only some lines have a class, or images are missing.
    """
    lines = [line.partition("\t") for line in read_lines(source)]
    names = [name.strip() for _, _, name in lines]
    labeled = sum(map(bool, names))
    if 0 < labeled < len(lines):
        first = printable(lines[names.index("")][0])
        counts = f"a class after a tab for {labeled} of its {len(lines)} images, but not for {first}"
        raise UserError(f"{source} has {counts}: expected a class in every line, or in none")
    paths = [os.path.join(os.path.dirname(source), path.rstrip()) for path, _, _ in lines]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        counts = f"{len(paths)} images, {len(missing)} are missing"
        raise UserError(f"{source} lists {counts}; the first: {printable(missing[0])}")
    return paths, [class_name(name) for name in names] if labeled else []


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a text file that are not blank, without surrounding spaces.

    Raises:
        UserError: the file cannot be read, see `read_text`, or all its lines are blank.
    """
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"cannot read {printable(path)}: it is empty")
    return lines
