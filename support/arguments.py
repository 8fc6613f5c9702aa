"""Command lines: argument files, one-line errors and types of options."""

import argparse
import contextlib
import difflib
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from support.files import read_text
from utils import UserError, print_error

ROOT = Path(__file__).parent.parent
# ImageNet-100: {short name of a list of classes: its file}
CLASS_LISTS = {name: ROOT / "recipes" / f"imagenet100_{name}.txt" for name in ("kaggle", "cmc")}
DEFAULT_CLASSES = "kaggle"
MAX_DEPTH, MAX_CHARACTERS = 10, 2**20  # of the argument files of a command


def bool_flag(text: str) -> bool:
    """Parse true/false, on/off or 1/0, as DINO's options do. An argparse type."""
    if text.lower() in ("true", "on", "1"):
        return True
    if text.lower() in ("false", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not a boolean, expected true or false")


def number(kind: type[int] | type[float], low: float = -math.inf, high: float | None = None) -> Callable:
    """Return an argparse type that accepts a finite int or float in [low, high], by default up to 2^31 - 1 or 10^9."""
    limit = high or (2**31 - 1 if kind is int else 1e9)

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= limit:  # NaN neither
            article = "a whole number" if kind is int else "a number"
            bounds = f"of at least {low}" if high is None and not value > limit else f"in [{low}, {limit}]"
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {article} {bounds}")
        return value

    parse.metavar = "N" if kind is int else "X"  # type: ignore[attr-defined]
    return parse


def class_list(text: str) -> str:
    """Return the short name of a file in CLASS_LISTS, the absolute path of another file, and other text as it is."""
    for name, file in CLASS_LISTS.items():
        with contextlib.suppress(OSError, ValueError):  # no such file
            if os.path.samefile(text, file):
                return name
    return os.path.abspath(text) if text not in CLASS_LISTS and os.path.isfile(text) else text


def class_file(classes: str | Path) -> Path:
    """Return a file with one class folder per line, given it or a short name in CLASS_LISTS."""
    return CLASS_LISTS.get(str(classes), Path(classes))


def with_class_list(settings: dict[str, Any]) -> dict[str, Any]:
    """Return recorded settings that name the list of ImageNet-100. Versions that record none had the list cmc."""
    classes = settings.get("classes")
    if not classes and settings.get("dataset") == "imagenet100":
        classes = "cmc"
    return {**settings, "classes": class_list(classes)} if classes and isinstance(classes, str) else settings


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default of every option that has one. Lists are shown as on the command line.

    Names of values are short: N and X are numbers.
    """

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.type in (bool_flag, int):
            return "N" if action.type is int else "{true,false}"
        is_path = action.dest.endswith(("_path", "_dir", "_weights", "_root", "classes"))
        return getattr(action.type, "metavar", "PATH" if is_path else "NAME")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, list) and action.default:
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse.ArgumentParser with argument files and one-line errors.

    `@FILE` is replaced by the words in FILE, where `#` starts a comment. FILE is relative to the current folder, or
    else to this repository, so that `@recipes/NAME.args` works from any folder. In an argument file, `@OTHER` is
    relative to that file. If an option occurs several times, the last one wins. `@OUT/args.json` are the options that
    a run has recorded.

    Attributes:
        may_change: names of the options that a resumed run may change, see `free`.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.may_change: set[str] = set()
        self._characters = 0  # read from argument files

    def free(self, add: Callable[..., argparse.Action]) -> Callable[..., None]:
        """Return the `add_argument` of a group for options that a resumed run may change."""

        def add_free(*names: str, **options: Any) -> None:
            self.may_change.add(add(*names, **options).dest)

        return add_free

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        return super().parse_known_args(self._expand(sys.argv[1:] if args is None else args), namespace)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].split("=")[0]
            start, options = "--" + word[2:].replace("-", "_"), list(self._option_string_actions)
            close = [option for option in options if option.startswith(start) and word.startswith("--") and word[2:]]
            close = close[:4] or difflib.get_close_matches(word, options, n=1)
            hint = f"did you mean {' or '.join(close)}?" if close else "--help lists the options"
            self.error(f"unknown option {word}; {hint}")
        return namespace

    def parse_with_extra(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse a command line, by default that of the process. The words after `--` become `extra`."""
        argv = list(sys.argv[1:] if argv is None else argv)
        split = argv.index("--") if "--" in argv else len(argv)
        args = self.parse_args(argv[:split])
        args.extra = argv[split + 1 :]
        return args

    def _expand(self, words: Sequence[str], folder: Path = Path(), depth: int = 0) -> list[str]:
        """Replace the names of argument files in the words by the contents of these files."""
        expanded = []
        for word in words:
            if not word.startswith("@"):
                expanded.append(word)
                continue
            path = folder / word[1:]
            try:
                if depth == 0 and not path.exists() and (ROOT / word[1:]).exists():
                    path = ROOT / word[1:]
                text = read_text(path, max_bytes=MAX_CHARACTERS)
                self._characters += len(text)
                if depth == MAX_DEPTH or self._characters > MAX_CHARACTERS:
                    raise ValueError(f"more than {MAX_DEPTH} files deep or {MAX_CHARACTERS} characters in all")
                if "\0" in text:
                    raise ValueError("it contains a NUL character")
                is_json = path.suffix == ".json"
                inner = self._words_of(json.loads(text)) if is_json else shlex.split(text, comments=True)
            except (UserError, OSError, ValueError) as error:  # ValueError: also an open quotation mark
                self.error(f"argument file: cannot read {path}: {str(error).removeprefix(f'cannot read {path}: ')}")
            expanded += self._expand(inner, path.parent, depth + 1)
        return expanded

    def _words_of(self, settings: dict[str, Any]) -> list[str]:
        """Turn the settings in the `args.json` of a run into a command line. A setting that is None is left out."""
        if not isinstance(settings, dict):
            raise ValueError("expected a JSON object")
        settings = with_class_list(settings)
        if settings.get("dataset") == "imagenet100" and settings["classes"] == DEFAULT_CLASSES:
            settings = {**settings, "classes": None}  # another --dataset may follow
        if unknown := [n for n in settings if n not in {a.dest for a in self._actions} and n != "init_hash"]:
            raise ValueError(f"unknown option {unknown[0]}")
        words = []
        for action in self._actions:
            value = settings.get(action.dest)
            if action.nargs == 0 and value:
                words.append(action.option_strings[0])
            elif action.nargs in (None, "?") and value is not None:
                words.append(f"{action.option_strings[0]}={value}")
            elif action.nargs and value is not None:
                words += [action.option_strings[0], *map(str, value)]
        return words

    def check_crops(self, args: argparse.Namespace) -> None:
        """Exit unless crop sizes fit the patch size, if it is known, and crop scales are ranges of positive numbers.

        Crop sizes are multiples of the patch size. With `--loss cls`, as in DINO, they may be any larger size, except
        with `--patch_augmentation`, whose patches have at least 3 pixels.
        """
        augments = getattr(args, "patch_augmentation", False)
        if augments and args.patch_size and args.patch_size < 3:
            self.error(f"--patch_augmentation needs a --patch_size of at least 3, found {args.patch_size}")
        only_cls = getattr(args, "loss", "") == "cls" and not augments
        for name in ("global_crops_size", "local_crops_size"):
            size, patch = getattr(args, name), args.patch_size
            if patch and size % patch and not (only_cls and size > patch):
                nearest = max(round(size / patch), 1) * patch
                self.error(f"--{name} {size} is not a multiple of --patch_size {patch}; the nearest is {nearest}")
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(args, name)
            if not 0 < low <= high:
                self.error(f"--{name} {low} {high}: expected two positive fractions, the smaller first")

    def check_rows(self, given: Sequence[str] | None, rows: Collection[str], table: str) -> None:
        """Exit unless all given names, if any, are rows of a table."""
        if unknown := [row for row in given or [] if row not in rows]:
            self.error(f"{table} has no row {unknown[0]}, expected some of {', '.join(rows)}")

    def error(self, message: str) -> NoReturn:
        print_error(f"{self.prog}: error: {' '.join(message.splitlines())}")
        sys.exit(2)
