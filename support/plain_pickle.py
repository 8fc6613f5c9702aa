"""Safe reading of downloaded pickles: plain containers, numbers, strings and NumPy arrays. Nothing is executed."""

import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from utils import UserError


class _Dtype:
    """Stand-in for a NumPy dtype of numbers, strings or objects."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[?biufcSUO]\d*", str(code)):
            raise pickle.UnpicklingError(f"it holds a NumPy dtype {code}")
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(list):
    """Stand-in for a NumPy array: its values as a flat list."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, _, raw = state
        self.fill(raw, dtype, shape)

    def fill(self, raw: bytes | str | list, dtype: _Dtype, shape: tuple[int, ...]) -> "_Array":
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 pickles bytes as str
        self[:] = np.frombuffer(raw, dtype.dtype).tolist() if raw and not isinstance(raw, list) else raw  # objects
        if len(self) != math.prod(shape):
            raise pickle.UnpicklingError(f"it holds an array of shape {shape} with {len(self)} values")
        return self


# What plain containers and NumPy arrays need, under the module names of Python 2 and 3 and of NumPy 1 and 2. No NumPy
# object is exposed: a forged state passed to it can corrupt memory.
_NAMES: dict[tuple[str, str], Callable] = {
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # Python 3 writes an array's bytes in protocol 2
    ("numpy", "ndarray"): lambda *_: _Array(),
    ("numpy", "dtype"): _Dtype,
}
for _module in ("builtins", "__builtin__"):
    _NAMES |= {(_module, "set"): set, (_module, "frozenset"): frozenset, (_module, "bytes"): lambda: b""}
for _module in ("numpy.core", "numpy._core"):
    _NAMES[_module + ".multiarray", "_reconstruct"] = lambda *_: _Array()
    _NAMES[_module + ".multiarray", "scalar"] = lambda dtype, raw: _Array().fill(raw, dtype, (1,))[0]
    _NAMES[_module + ".numeric", "_frombuffer"] = lambda raw, dtype, shape, *_: _Array().fill(raw, dtype, shape)


class _PlainUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Unpickler that resolves only the names in _NAMES.

    It is the one in Python: for a memo index of 2^31 in a file of seven bytes the one in C allocates 32 GB.
    """

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return _NAMES[module, name]


def read_plain_pickle(path: str | Path) -> Any:
    """Read a pickle of plain containers, numbers, strings and NumPy arrays without executing anything.

    Returns:
        the contents, with each array as the flat list of its values in memory. Lists may contain themselves.

    Raises:
        UserError: the pickle holds anything else, or is damaged.
    """
    try:
        return _PlainUnpickler(io.BytesIO(Path(path).read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can make the unpickler raise nearly any exception
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else "it is damaged"
        expected = "expected only plain containers, numbers, strings and NumPy arrays"
        raise UserError(f"cannot read {path}: {reason}; {expected}") from error
