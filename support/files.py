"""Reading and writing of small files: complete or not at all, and regular files only."""

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file as save_safetensors

from utils import NO_SPACE, UserError, first_line, printable


def make_folder(folder: Path, option: str) -> None:
    """Create a folder if it is missing, and check that files can be created in it.

    Args:
        option: the option that names the folder, for the message.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {option} {folder}: {error.strerror}; give a writable folder") from error


@contextlib.contextmanager
def atomic_write(path: Path, backup: Path | None = None) -> Iterator[Path]:
    """Write a file atomically: `path` is always the complete old file or the complete new one.

    Yields the path of a temporary file, which is renamed to `path` on success and removed on failure.

    Args:
        backup: where to keep the old file. The disk then needs room for three files.

    Raises:
        UserError: the file cannot be written. The old one is kept.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if backup is not None and path.exists():
            backup.unlink(missing_ok=True)
            try:
                os.link(path, backup)
            except OSError:  # a file system without hard links: for a moment only `backup` exists
                path.replace(backup)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # make the new name durable, where folders can be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save reports a failed write as a RuntimeError of its zip writer, safetensors as a SafetensorError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError | SafetensorError):
            raise
        reason = cause.strerror if isinstance(cause, OSError) else first_line(cause)
        kept = f"the last saved {path} is kept" if path.exists() else "no earlier one exists"
        advice = "make its folder writable, or give another one"
        if not isinstance(cause, OSError) or cause.errno in NO_SPACE:
            advice = "free some space and run the command again"
        elif not path.parent.is_dir():
            advice = f"the folder {path.parent} is gone, create it again or give another one"
        raise UserError(f"cannot save {path}: {reason}; {kept}: {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(text: str, path: Path) -> None:
    """Write a small UTF-8 text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(entry: dict[str, Any], path: Path) -> None:
    """Append a JSON line to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read the dictionary in a JSON file.

    Raises:
        UserError: the file cannot be read, see `read_text`, or holds something else.
    """
    try:
        contents = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {printable(path)}: it is not JSON") from error
    if not isinstance(contents, dict):
        raise UserError(f"cannot read {printable(path)}: expected a JSON object")
    return contents


def refuse_irregular(path: str | Path) -> None:
    """Raise ValueError if a path is not a regular file. Reading a pipe or a device could wait forever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")


def read_text(path: str | Path, errors: str = "strict", max_bytes: int = 2**28) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Args:
        errors: as for `open`.
        max_bytes: largest size.

    Raises:
        UserError: the file is missing, not a regular file, too large or not text.
    """
    try:
        if os.path.isdir(path):
            raise ValueError("a folder")
        refuse_irregular(path)
        if (size := os.path.getsize(path)) > max_bytes:
            raise ValueError(f"{size} bytes are more than {max_bytes}")
        with open(path, encoding="utf-8-sig", errors=errors) as file:
            return file.read(max_bytes)
    except (OSError, ValueError) as error:  # ValueError: also a name with a NUL, or bytes that are not UTF-8
        raise UserError(f"cannot read {printable(path)}: {getattr(error, 'strerror', None) or error}") from error


def write_safetensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors and metadata to a `.safetensors` file with default permissions."""
    path.touch()
    permissions = path.stat().st_mode
    save_safetensors(tensors, path, metadata)  # creates a file that only its owner can read
    path.chmod(permissions)
