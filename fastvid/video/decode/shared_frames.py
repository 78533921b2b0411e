"""Memory that two processes share, in which one puts a video's frames for the other, used again for later videos.

A pipe would copy the frames twice, and every video would ask the system for new memory, which it clears page by page.
The memory is a file without a name, handed on by its descriptor: /dev/shm, which containers keep small, is not needed.
"""

import fcntl
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection

import numpy as np

_KEPT = 2  # free pieces of a worker


class Piece:
    """Some bytes of memory without a name, whose size is fixed: to read beyond its end would end the process.

    Raises:
        OSError: the system gives none.
    """

    def __init__(self, size: int):
        self.size, self.descriptor = size, os.memfd_create("fastvid", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, size)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.map()

    def map(self) -> None:
        """Have memory for one array."""
        self.memory: mmap.mmap | None = mmap.mmap(self.descriptor, self.size)


class SharedFrames:
    """The side that reads: the pieces that a worker is given, which it knows by their numbers."""

    def __init__(self):
        self._free, self._numbers = [], weakref.WeakKeyDictionary()
        self._made = 0

    def take(self, size: int) -> Piece | None:
        """A piece of at least `size` bytes that nobody uses; None if the system has none."""
        try:
            while self._free:
                piece = self._free.pop()
                if piece.size >= size:
                    if piece.memory is None:
                        piece.map()
                    return piece
            return Piece(size)
        except (AttributeError, OSError):  # no such call here; no memory, or no more open files
            return None

    def number(self, piece: Piece) -> tuple[int, bool]:
        """What the worker knows a piece by, and whether it has to be sent: the worker does not have it yet."""
        if new := piece not in self._numbers:
            self._made += 1
            self._numbers[piece] = self._made
        return self._numbers[piece], new

    def clear(self) -> None:
        """The worker has ended: the next one has no piece yet, and free ones go back to the system."""
        self._free.clear()
        self._numbers.clear()

    def array(self, piece: Piece, shape: Sequence[int]) -> np.ndarray:
        """The uint8 array [*shape] in a piece, which is free again when the array and all views of it are gone."""
        memory, piece.memory = piece.memory, None
        assert memory is not None, "the piece is another array's"
        weakref.finalize(memory, self.release, piece)
        return np.frombuffer(memory, np.uint8, math.prod(shape)).reshape(shape)

    def release(self, piece: Piece) -> None:
        """A piece is free again: no array of it is left, or none was made."""
        if len(self._free) < _KEPT:
            self._free.append(piece)


class ReceivedFrames:
    """The side that writes: pieces by their numbers, each mapped once."""

    def __init__(self):
        self._mapped = {}

    def get(self, number: int, new: bool, connection: Connection) -> np.ndarray:
        """Flat uint8 array of a piece; `new`: its descriptor comes next on the connection."""
        if new:
            descriptor = reduction.recv_handle(connection)
            try:
                memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)
            self._mapped[number] = np.frombuffer(memory, np.uint8)
        return self._mapped[number]


def send(piece: Piece, connection: Connection, pid: int) -> None:
    """Hand a piece to the worker of a process number."""
    reduction.send_handle(connection, piece.descriptor, pid)
