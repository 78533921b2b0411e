"""A pickled numpy array [R, C], read without unpickling.

``pickle.load`` calls whatever a file names. Here the file is only parsed (``pickletools.genops``, which executes
nothing and reads no more than is there), and the few instructions that a numpy array consists of are followed with
inert stand-ins for numpy's functions. Every other instruction or name is an error, so that a file can make nothing
but one array of floats, whose size is the file's own.
"""

import io
import os
import pickle
import pickletools
from typing import Any, BinaryIO

import numpy as np

# What an array's pickle may name, as numpy 1 and 2, Python 2 and 3 and all protocols spell it.
_NAMES = {
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy.core.numeric _frombuffer": "frombuffer",
    "numpy._core.numeric _frombuffer": "frombuffer",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
}
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_ARGUMENTS = {  # instructions that push their own argument
    "INT",
    "LONG",
    "LONG1",
    "LONG4",
    "BININT",
    "BININT1",
    "BININT2",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
}
_OTHERS = {"EMPTY_DICT": "a dict", "DICT": "a dict", "EMPTY_LIST": "a list", "LIST": "a list", "EMPTY_SET": "a set"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LONGEST = 200  # instructions; numpy's own pickles have about 70
_SHORT = 4096  # bytes that `probe_array` reads at a time; only values are longer


class OtherContent(ValueError):
    """A sound file that holds something else than an array [R, C] of floats."""


class _Name(str):
    """One of the values of `_NAMES`: a function or class of numpy's, of which only the name is kept."""


class _DType:
    def __init__(self, code):
        self.code, self.order = code, "<"


class _Array:
    shape: Any = None
    dtype: _DType | None = None
    fortran: bool = False
    data: bytes | bytearray | str = b""


class _Skipped(bytes):
    """Stands for `size` bytes that were not read."""

    size: int

    def __new__(cls, size):
        self = super().__new__(cls)
        self.size = size
        return self

    def __len__(self):
        return self.size


class _Skipping:
    """A file of `size` bytes that passes over long stretches instead of reading them."""

    def __init__(self, file, size):
        self.file, self.size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, count):
        if count <= _SHORT:
            return self.file.read(count)
        if self.file.tell() + count > self.size:
            return b""
        self.file.seek(count, os.SEEK_CUR)
        return _Skipped(count)


def write_array(array: np.ndarray) -> bytes:
    """The pickle of a numpy array, as numpy 1 and 2 on Python ≥ 3.0 read it.

    Protocol 3 has no frames, whose lengths would be wrong after the name of numpy 1's module is put in: numpy 1 does
    not know `numpy._core`, while numpy 2 keeps `numpy.core.multiarray` for old pickles.
    """
    return pickle.dumps(array, protocol=3).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)


def read_array(data: bytes) -> np.ndarray:
    """The array [R, C] that a pickle holds, of floats of 2, 4 or 8 bytes in any protocol and byte order; a copy in C
    order.

    Raises:
        ValueError: the pickle is damaged, or holds or does anything else (`OtherContent`).
    """
    return _materialize(_described(io.BytesIO(data), len(data)))


def probe_array(file: BinaryIO) -> tuple[int, int, np.dtype]:
    """(rows, channels, dtype) of the array that `read_array` would make of an open file.

    The values are passed over where they are one string of bytes, as Python 3 writes them by default; otherwise read.

    Args:
        file: binary, at its beginning.

    Raises:
        ValueError: as `read_array`.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        return _layout(_described(_Skipping(file, size), size))
    except ValueError:  # values of another spelling, or a fault: the whole file tells
        file.seek(0)
        array = read_array(file.read())
        return *array.shape, array.dtype


def _described(file, size):
    """The stand-in of the array that a pickle of `size` bytes describes."""
    try:
        array = _follow(file, size)
    except (IndexError, KeyError, UnicodeDecodeError) as error:  # no such thing on the stack or in the memo; no text
        raise ValueError("the pickle is damaged") from error
    if isinstance(array, _Array) and isinstance(array.dtype, _DType):
        return array
    raise OtherContent("the pickle does not hold a numpy array")


def _follow(file, size):
    """The stand-in that the instructions in `file` leave on the stack."""
    stack, marks, memo = [], [], {}
    for step, (opcode, argument, position) in enumerate(_instructions(file)):
        if step == _LONGEST:
            raise OtherContent("the pickle is longer than that of a numpy array")
        name = opcode.name
        if name in _ARGUMENTS:
            stack.append(argument)
        elif name in _VALUES:
            stack.append(_VALUES[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            start = marks.pop()
            stack[start:] = [tuple(stack[start:])]
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "GLOBAL":
            stack.append(_named(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(f"{module} {attribute}" if type(module) is type(attribute) is str else "?"))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _OTHERS:
            raise OtherContent(f"the pickle holds {_OTHERS[name]}, not a numpy array")
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise OtherContent(f"the pickle holds more than a numpy array ({name} at byte {position})")
    assert position is not None, "the file tells where it is"
    if position + 1 != size:
        raise ValueError(f"{size - position - 1} bytes follow the end of the pickle")
    return stack.pop()


def _instructions(file):
    try:
        yield from pickletools.genops(file)
    except ValueError as error:
        raise ValueError(f"the pickle is damaged or cut short ({error})") from error


def _named(name):
    if name.startswith("torch._utils _rebuild_"):
        raise OtherContent("the pickle holds a torch tensor, not a numpy array")
    if name not in _NAMES:
        raise OtherContent(f"the pickle names {name.replace(' ', '.')}, which is no part of a numpy array; refused")
    return _Name(_NAMES[name])


def _call(function, arguments):
    if isinstance(function, _Name) and isinstance(arguments, tuple):
        match str(function), *arguments:
            case "reconstruct", _Name("ndarray"), (0,), b"b" | "b":
                return _Array()
            case "dtype", str(code), _, _:
                if code not in ("f2", "f4", "f8"):
                    raise OtherContent(
                        f"the array's dtype is {code[:20]!r}, not float16 (f2), float32 (f4) or float64 (f8)"
                    )
                return _DType(code)
            case "encode", str(text), "latin1":  # how protocols before 3 spell bytes; Python 2 leaves them as text
                return text
            case "frombuffer", bytes() | bytearray() as data, _DType() as dtype, shape, "C" | "F" as order:
                array = _Array()
                array.shape, array.dtype, array.fortran, array.data = shape, dtype, order == "F", data
                return array
    raise ValueError("the pickle makes a call that no numpy array needs")


def _build(target, state):
    match target, state:
        case _DType(), (_, "<" | ">" as order, None, None, None, *_):
            target.order = order
        case _Array(), (_, shape, _DType() as dtype, fortran, bytes() | str() as data):
            target.shape, target.dtype, target.fortran, target.data = shape, dtype, fortran, data
        case _:
            raise ValueError("the pickle gives a state that no numpy array of floats has")


def _layout(array):
    """(rows, channels, dtype in this machine's byte order) of a stand-in whose shape fits its data."""
    dtype = np.dtype(array.dtype.code)
    match array.shape:
        case (int(rows), int(channels)) if min(rows, channels) > 0 and rows * channels * dtype.itemsize == len(
            array.data
        ):
            return rows, channels, dtype
        case (int(), int()):
            raise ValueError(f"the array's shape does not fit its {len(array.data)} bytes of data")
        case _:
            raise OtherContent("the array does not have two dimensions (rows, channels)")


def _materialize(array):
    """The numpy array that a stand-in describes; allocates only after its size has been found to be the data's."""
    rows, channels, dtype = _layout(array)
    data = array.data.encode("latin-1") if isinstance(array.data, str) else array.data
    values = np.frombuffer(data, dtype.newbyteorder(array.dtype.order))
    return np.array(values.reshape(rows, channels, order="F" if array.fortran else "C"), dtype=dtype, order="C")
