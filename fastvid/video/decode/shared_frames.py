"""Memory that two processes share, in which one puts a video's frames for the other, used again for later videos.

A pipe would copy the frames twice, and every video would ask the system for new memory, which it clears page by page.
The memory is a file without a name, handed on by its descriptor: /dev/shm, which containers keep small, is not needed.
"""

import math
import mmap
import os
import weakref
from multiprocessing import reduction

import numpy as np


class Piece:
    """Some bytes of memory without a name.

    Raises:
        OSError: the system gives none.
    """

    def __init__(self, size):
        self.size, self.descriptor = size, os.memfd_create("fastvid")
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, size)


class SharedFrames:
    """The side that reads: the pieces that a worker is given, which it knows by their numbers."""

    def __init__(self):
        self._free, self._numbers = [], weakref.WeakKeyDictionary()
        self._made = 0

    def take(self, size) -> Piece | None:
        """A piece of at least `size` bytes that nobody uses; None if the system has none."""
        while self._free:
            piece = self._free.pop()
            if piece.size >= size:
                return piece
        try:
            return Piece(size)
        except (AttributeError, OSError):  # no such call here; no memory
            return None

    def number(self, piece) -> tuple[int, bool]:
        """What the worker knows a piece by, and whether it has to be sent: the worker does not have it yet."""
        if new := piece not in self._numbers:
            self._made += 1
            self._numbers[piece] = self._made
        return self._numbers[piece], new

    def clear(self):
        """The worker has ended: the next one has no piece yet, and free ones go back to the system."""
        self._free.clear()
        self._numbers.clear()

    def array(self, piece, shape):
        """The uint8 array [*shape] in a piece, which is free again when the array and all views of it are gone."""
        memory = mmap.mmap(piece.descriptor, piece.size)
        weakref.finalize(memory, self._free.append, piece)
        return np.frombuffer(memory, np.uint8, math.prod(shape)).reshape(shape)

    def release(self, piece):
        """A piece of which no array was made is free again."""
        self._free.append(piece)


class ReceivedFrames:
    """The side that writes: pieces by their numbers, each mapped once."""

    def __init__(self):
        self._mapped = {}

    def get(self, number, new, connection):
        """Flat uint8 array of a piece; `new`: its descriptor comes next on the connection."""
        if new:
            descriptor = reduction.recv_handle(connection)
            try:
                memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)
            self._mapped[number] = np.frombuffer(memory, np.uint8)
        return self._mapped[number]


def send(piece, connection, pid):
    """Hand a piece to the worker of a process number."""
    reduction.send_handle(connection, piece.descriptor, pid)
