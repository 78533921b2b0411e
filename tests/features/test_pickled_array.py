"""Pickled arrays: every spelling of an honest one is read, and a dishonest one does nothing."""

import builtins
import os
import pickle
import pickletools
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.features.pickled_array import OtherContent, probe_array, read_array, write_array

ARRAY = (np.arange(15, dtype=np.float16) / 7).reshape(5, 3)
# What cPickle of Python 2 writes for np.array([[1, 2]], "f2"), and what numpy 1 writes with protocol 4 and 5.
PYTHON2 = (
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87Rq\x03"
    b"(K\x01K\x01K\x02\x86cnumpy\ndtype\nq\x04U\x02f2K\x00K\x01\x87Rq\x05"
    b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    b"U\x04\x00<\x00@tb."
)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "array",
    [
        ARRAY,
        ARRAY.astype(">f2"),
        np.asfortranarray(ARRAY),
        ARRAY.astype(np.float32),
        ARRAY.astype(">f4").T,
        ARRAY[::2, ::2],
        ARRAY.astype(np.float64),
    ],
    ids=["f2", "big-endian", "fortran", "f4", "big-endian transposed", "strided", "f8"],
)
def test_numpys_pickles_of_all_protocols(array, protocol):
    read = read_array(pickle.dumps(array, protocol))
    assert read.dtype == array.dtype.newbyteorder("=")
    assert read.flags.c_contiguous and read.flags.writeable
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("protocol", [4, 5])
def test_pickles_of_numpy_1(protocol):
    data = pickle.dumps(ARRAY, protocol)
    for module in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        old = module.replace(b"_core", b"core")
        data = data.replace(bytes([len(module)]) + module, bytes([len(old)]) + old)
    assert b"_core" not in data
    np.testing.assert_array_equal(read_array(data), ARRAY)


class Counting:
    """A file that counts the bytes that are read from it."""

    def __init__(self, file):
        self.file, self.bytes = file, 0
        self.fileno, self.tell, self.seek, self.readline = file.fileno, file.tell, file.seek, file.readline

    def read(self, *size):
        data = self.file.read(*size)
        self.bytes += len(data)
        return data


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4"])
def test_the_shape_is_found_without_the_values(tmp_path, protocol, dtype):
    array = np.arange(9000, dtype=dtype).reshape(100, 90)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(array, protocol))
    with open(tmp_path / "a.pkl", "rb") as file:
        counting = Counting(file)
        assert probe_array(counting) == (100, 90, array.dtype.newbyteorder("="))
    assert protocol not in (3, 4) or counting.bytes < 1000, "Python 3's default, and what we write"


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:9000], lambda data: data + b"more"])
@pytest.mark.parametrize("protocol", range(6))
def test_cut_and_lengthened_files_have_no_shape(tmp_path, change, protocol):
    data = pickle.dumps(np.ones((100, 90), np.float16), protocol)
    (tmp_path / "a.pkl").write_bytes(change(data))
    with (
        open(tmp_path / "a.pkl", "rb") as file,
        pytest.raises(ValueError, match="damaged or cut short|4 bytes follow the end"),
    ):
        probe_array(file)


def test_pickles_of_python_2():
    np.testing.assert_array_equal(read_array(PYTHON2), np.array([[1, 2]], np.float16))


def test_what_is_written_names_only_what_numpy_1_knows():
    data = write_array(ARRAY)
    names = {argument for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}
    assert names == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}
    assert data[1] == 3
    np.testing.assert_array_equal(pickle.loads(data), ARRAY)
    np.testing.assert_array_equal(read_array(data), ARRAY)


class Call:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def _poisoned(canary):
    """Pickles that would create the file `canary` if anything in them were executed."""
    system = Call(os.system, f"touch {canary}")
    evaluate = Call(builtins.eval, f"open({str(canary)!r}, 'w')")
    getattr_chain = Call(getattr, Call(__import__, "os"), "system")
    objects = np.array([[system, evaluate]], dtype=object)
    for protocol in range(6):
        for poison in (system, evaluate, getattr_chain, [ARRAY, system], (ARRAY, evaluate), {"a": evaluate}, objects):
            yield pickle.dumps(poison, protocol)
    command = f"touch {canary}".encode()
    honest = pickle.dumps(ARRAY, 2)
    state = honest.index(b"(K\x01K\x05")
    yield b"(S'" + command + b"'\nios\nsystem\n."  # INST
    yield b"(cos\nsystem\nS'" + command + b"'\no."  # OBJ
    yield b"cos\nsystem\nq\x000h\x00(S'" + command + b"'\ntR."  # through the memo
    yield honest[:state] + b"cos\nsystem\n(S'" + command + b"'\ntR0" + honest[state:]  # between two honest steps
    yield b"\x80\x02cnumpy\nndarray\n(S'" + command + b"'\ntR."  # numpy's own names, called otherwise
    yield b"\x80\x02c_codecs\nencode\n(S'" + command + b"'\nS'os'\ntR."
    yield b"\x80\x02cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\nS'O'\ntR."
    yield b"\x80\x02cnumpy\ndtype\ncos\nsystem\n\x85b."


def test_nothing_in_a_poisoned_pickle_is_executed(tmp_path):
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Call(os.system, f"touch {canary}")))
    assert canary.exists(), "the canary must show an execution"
    canary.unlink()
    poisoned = list(_poisoned(canary))
    assert len(poisoned) == 50
    for data in poisoned:
        with pytest.raises(ValueError, match="pickle|dtype"):
            read_array(data)
    assert not canary.exists()


def test_a_refused_name_is_told():
    with pytest.raises(ValueError, match=r"names (posix|nt)\.system, which is no part of a numpy array"):
        read_array(pickle.dumps(Call(os.system, "true")))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([["a", None]], object), r"dtype is 'O8'"),
        (ARRAY.astype(np.int16), "dtype is 'i2'"),
        (np.zeros((2, 3), [("x", "f2")]), "dtype is 'V2'"),
        (ARRAY[0], "does not have two dimensions"),
        (ARRAY[None], "does not have two dimensions"),
        (ARRAY[:0], "does not fit its"),
        (np.float16(3), "names numpy._core.multiarray.scalar"),
        (b"\0" * 30, "does not hold a numpy array"),
        ((1, 2), "does not hold a numpy array"),
        ([ARRAY], "holds a list, not a numpy array"),
        ({"features": ARRAY}, "holds a dict, not a numpy array"),
        (torch.ones(2, 3), "holds a torch tensor, not a numpy array"),
        (complex(1, 2), "names builtins.complex"),
    ],
)
def test_other_content_is_refused(value, message):
    with pytest.raises(ValueError if "fit" in message else OtherContent, match=message):
        read_array(pickle.dumps(value, 4))


def _with_shape(rows, channels):
    return pickle.dumps(ARRAY, 3).replace(b"(K\x01K\x05K\x03\x86", b"(K\x01" + rows + channels + b"\x86")


def _long1(number):
    data = number.to_bytes(9, "little")
    return b"\x8a\x09" + data


@pytest.mark.parametrize(
    "data",
    [
        _with_shape(_long1(2**62), b"K\x03"),
        _with_shape(b"J\xff\xff\xff\xff", b"J\xf1\xff\xff\xff"),  # -1 × -15
        _with_shape(b"K\x06", b"K\x03"),
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"few.",  # BINBYTES8
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"few.",  # BYTEARRAY8
        b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"few.",  # BINUNICODE8
        b"\x80\x02N" + b"r" + struct.pack("<I", 2**31) + b".",  # a memo of 2^31 places
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",  # FRAME
        b"(" * 1_000_000 + b".",
        b"N" + b"\x85" * 1_000_000 + b".",
    ],
    ids=str.split("shape negative-shape other-shape bytes bytearray text memo frame marks nested"),
)
def test_declared_sizes_allocate_nothing(data):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="damaged or cut short|does not fit its|does not hold|longer than that of"):
            read_array(data)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", range(6))
def test_cut_and_lengthened_files_are_refused(protocol):
    data = pickle.dumps(ARRAY, protocol)
    for length in range(len(data)):
        with pytest.raises(ValueError, match="the pickle is damaged or cut short"):
            read_array(data[:length])
    with pytest.raises(ValueError, match="4 bytes follow the end"):
        read_array(data + b"more")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # from pickletools, about the damage
@settings(max_examples=300, deadline=None)
@given(st.integers(0, 5), st.data())
def test_damage_gives_an_array_or_a_value_error(protocol, data):
    damaged = bytearray(pickle.dumps(ARRAY, protocol))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    modules = set(sys.modules)
    try:
        array = read_array(bytes(damaged))
    except ValueError:
        pass
    else:
        assert array.ndim == 2 and array.dtype in (np.float16, np.float32)
    assert set(sys.modules) == modules


def test_what_torch_saves_is_damaged():
    with pytest.raises(ValueError, match="the pickle is damaged"):
        read_array(b"PK\x03\x04\x00\x00\x08\x08\x00\x00i\x80\n")
