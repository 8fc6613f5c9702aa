"""Safe reading of downloaded pickles: plain containers, numbers, strings and NumPy arrays. Nothing is executed."""

import io
import pickle
import re
from pathlib import Path

import numpy as np

from utils import UserError


class _PickledDtype:
    """Stand-in for a NumPy dtype of plain numbers, strings or objects."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[?biufcSUO]\d*", str(code)):
            raise pickle.UnpicklingError(f"it holds a NumPy dtype {code}")
        self.code, self.byteorder = str(code), "="

    def __setstate__(self, state):
        self.byteorder = "<>"[state[1] == ">"]

    def read(self, raw, shape, order="C"):
        """Return the array with the contents `raw`: bytes, or a list for objects."""
        if self.code.startswith("O"):
            values = _object_array(raw)
        else:
            raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 pickles bytes as str
            values = np.frombuffer(raw, np.dtype(self.code).newbyteorder(self.byteorder)).copy()
        return values.reshape(shape, order=order)


def _object_array(values):
    values = list(values)
    array = np.empty(len(values), object)
    for i, value in enumerate(values):  # array[:] = values would make lists of equal length another dimension
        array[i] = value
    return array


class _PickledArray:
    """Stand-in for a NumPy array, whose contents arrive as its state."""

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, raw = state
        self.value = dtype.read(raw, shape, "F" if is_fortran else "C")


class _Maker:
    """Stand-in for a function or class named by a pickle: it can only be called."""

    def __init__(self, make):
        self.make = make

    def __call__(self, *args):
        return self.make(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("it changes a function")


def _array_from_buffer(buffer, dtype, shape, order="C", *_):
    array = _PickledArray()
    array.value = dtype.read(buffer, shape, order)
    return array


def _latin1_bytes(text, encoding):
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds text in {encoding}")
    return text.encode("latin1")


# Everything that plain containers and NumPy arrays need, under the module names of Python 2 and 3 and of NumPy 1 and 2.
# No NumPy object is exposed: a forged state passed to it can corrupt memory.
_MAKERS = {
    ("_codecs", "encode"): _latin1_bytes,  # Python 3 writes an array's bytes with it in protocol 2
    ("numpy", "ndarray"): lambda *_: _PickledArray(),
    ("numpy", "dtype"): _PickledDtype,
}
for _module in ("builtins", "__builtin__"):
    _MAKERS |= {(_module, "set"): set, (_module, "frozenset"): frozenset, (_module, "bytes"): lambda: b""}
for _module in ("numpy.core", "numpy._core"):
    _MAKERS[_module + ".multiarray", "_reconstruct"] = lambda *_: _PickledArray()
    _MAKERS[_module + ".multiarray", "scalar"] = lambda dtype, raw: dtype.read(raw, (1,))[0].item()
    _MAKERS[_module + ".numeric", "_frombuffer"] = _array_from_buffer


class _PlainUnpickler(pickle._Unpickler):
    """Unpickler that resolves only the names in _MAKERS.

    It is the one in Python: for a memo index of 2^31 in a file of seven bytes the one in C allocates 32 GB.
    """

    def find_class(self, module, name):
        if (module, name) not in _MAKERS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return _Maker(_MAKERS[module, name])


def _plain(value, limit):
    """Replace the stand-ins for arrays by arrays, and refuse anything that is not plain or has over `limit` values."""
    values = 0

    def plain(value):
        nonlocal values
        values += 1
        if values > limit:
            raise pickle.UnpicklingError(f"it expands to more than {limit} values")
        if isinstance(value, _PickledArray):
            array = value.value
            return _object_array(map(plain, array.flat)).reshape(array.shape) if array.dtype == object else array
        if isinstance(value, dict):
            return {plain(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return type(value)(map(plain, value))
        if value is None or isinstance(value, str | bytes | bytearray | int | float | complex):
            return value
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__.strip('_')}")

    return plain(value)


def read_plain_pickle(path) -> object:
    """Read a pickle of plain containers, numbers, strings and NumPy arrays without executing anything.

    Raises:
        UserError: the pickle holds anything else, or is damaged.
    """
    try:
        contents = Path(path).read_bytes()
        # Lists that contain one list twice, and so on, can hold 2^n values in n bytes.
        return _plain(_PlainUnpickler(io.BytesIO(contents), encoding="latin1").load(), 10**6 + len(contents))
    except Exception as error:  # a damaged pickle can make the unpickler raise nearly any exception
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else "it is damaged"
        expected = "expected only plain containers, numbers, strings and NumPy arrays"
        raise UserError(f"cannot read {path}: {reason}; {expected}") from error
