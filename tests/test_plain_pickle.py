import os
import pickle

import numpy as np
import pytest

from support.plain_pickle import read_plain_pickle
from utils import UserError


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read_with_arrays_as_lists(tmp_path, protocol):
    lists = np.empty(2, object)
    lists[0], lists[1] = [1, 2], [3]
    arrays = [
        np.array([], np.int64),
        np.asfortranarray(np.eye(3)[:2]),
        np.arange(3, dtype=">i4"),
        np.zeros((2, 2), np.float32),
        np.array(["x", "y"]),
        lists,
        lists,
    ]
    others = (1, 2.5, None, True, {3, 4}, frozenset([5]), np.float64(6.5), np.int32(7), b"bytes", ["a", "ü"])
    (tmp_path / "p.pkl").write_bytes(pickle.dumps({"arrays": arrays, "others": others}, protocol))
    read = read_plain_pickle(tmp_path / "p.pkl")
    assert read["others"] == others
    assert read["arrays"] == [array.ravel("K").tolist() for array in arrays]


def test_pickles_of_numpy_1_and_python_2_are_read(tmp_path):
    contents = b"(dS'easy'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    contents += b"(I1\n(I2\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntRI00\nS'\\x01\\xff'\ntbs."
    (tmp_path / "p.pkl").write_bytes(contents)
    assert read_plain_pickle(tmp_path / "p.pkl") == {"easy": [1, 255]}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_other_pickles_are_refused_by_name_and_not_executed(tmp_path, protocol):
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps({"gnd": [Hostile(tmp_path / "executed")]}, protocol))
    with pytest.raises(UserError, match=f"it holds {os.name}.system; expected only plain containers, numbers, strings"):
        read_plain_pickle(path)
    assert not (tmp_path / "executed").exists()
    for name in ("os\nsystem", "builtins\neval", "numpy\nload", "numpy.core.multiarray\nfrombuffer"):
        path.write_bytes(f"c{name}\n(S'true'\ntR.".encode())
        with pytest.raises(UserError, match=f"it holds {name.replace(chr(10), '.')}; expected"):
            read_plain_pickle(path)
    path.write_bytes(b"\x80\x04\x95")
    with pytest.raises(UserError, match="cannot read"):
        read_plain_pickle(path)


def pickled_array(dtype, shape, raw, state=b"(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"):
    """Return a pickle of protocol 0 of an array with forged parts."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    dtype = b"cnumpy\ndtype\n(S'" + dtype + b"'\nI0\nI1\ntR" + state
    return array + b"(I1\n" + shape + dtype + b"I00\n" + raw + b"tb."


def test_made_up_arrays_are_refused(tmp_path):
    """NumPy's own unpickling would read memory out of bounds."""
    path, one = tmp_path / "p.pkl", b"(I1\nt"
    path.write_bytes(pickled_array(b"i8", one, b"S'\\x07\\x00\\x00\\x00\\x00\\x00\\x00\\x00'\n"))
    assert read_plain_pickle(path) == [7]
    for dtype, shape, raw in (
        (b"V8", one, b"S'12345678'\n"),
        (b"O8", one, b"S'12345678'\n"),
        (b"i8", b"(I9\nt", b"S'12345678'\n"),
        (b"i8", b"(I1000000000\nI1000000000\nt", b"S''\n"),
        (b"i8", one, b"S'1234567'\n"),
        (b"U99999999999", one, b"S'12345678'\n"),
    ):
        path.write_bytes(pickled_array(dtype, shape, raw))
        with pytest.raises(UserError, match="cannot read .*; expected only plain containers"):
            read_plain_pickle(path)


def test_nested_lists_and_huge_numbers_end_at_once(tmp_path):
    nested = []
    for _ in range(60):
        nested = [nested, nested]
    nested.append(nested)
    (tmp_path / "p.pkl").write_bytes(pickle.dumps({"gnd": nested}))
    assert len(read_plain_pickle(tmp_path / "p.pkl")["gnd"]) == 3
    (tmp_path / "p.pkl").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")  # a memo index of 2^31
    assert read_plain_pickle(tmp_path / "p.pkl") is None
