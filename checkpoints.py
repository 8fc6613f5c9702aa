"""Saving, resuming and safe loading of checkpoints."""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file as load_safetensors

from utils import UserError

# What DINO's released full checkpoints hold besides tensors and plain values: their arguments, and NumPy scalars in the
# optimizer's state, under the old and the new name of NumPy's module.
_SCALAR = np._core.multiarray.scalar
DINO_GLOBALS = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float64DType,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]


def load_file(path):
    """Read a checkpoint or a `.safetensors` file to the CPU, without executing anything that it holds.

    Raises:
        UserError: there is no such file, or it cannot be read as a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}, expected a file written by main_lgssl.py, DINO or timm")
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        with torch.serialization.safe_globals(DINO_GLOBALS):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can make torch's unpickler raise nearly anything.
    except Exception as error:
        reason = type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint of tensors and plain values: {reason}") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, expected a dictionary of weights")
    return contents


def save(contents, path):
    """Write a checkpoint so that `path` is at every moment either the old or the new one, whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def refuse_other_run(earlier, args, may_change, path):
    """Check that the arguments of an earlier run are those of this one.

    Args:
        earlier, args: dictionaries of arguments.
        may_change: names of those that may differ.
        path: where `earlier` was read, for the message.

    Raises:
        UserError: with the arguments that differ.
    """
    names = [name for name in args if name not in may_change and earlier.get(name) != args[name]]
    if names:
        differences = ", ".join(f"--{name} {earlier.get(name, 'unknown')} there, {args[name]} here" for name in names)
        raise UserError(
            f"{path} is of another run: {differences}; give its arguments to go on, or another --output_dir"
        )
