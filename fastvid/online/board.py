"""What has become of each video, in memory that a rank's encoder writes and all its readers see.

Readers are forked processes, and the encoder is a program of its own: what they share is an open file that lies nowhere
but in memory.
"""

import json
import mmap
import os

WAITS, MADE, FAILED = range(3)  # the state of a video; it changes once
_FINISHED, _LENGTH, _LONGEST = 8, 4, 16384  # bytes: of the count, of the message's length, of the message at most


class Board:
    """States of videos by number; how many are finished; why the encoder ended.

    Args:
        count: videos.
        file: descriptor of another process's board; None makes one.

    Attributes:
        file: its descriptor.
    """

    def __init__(self, count: int, file: int | None = None):
        size = count + _FINISHED + _LENGTH + _LONGEST
        if file is None:
            file = os.memfd_create("fastvid")
            os.truncate(file, size)
        self.file, self.count, self._memory = file, count, mmap.mmap(file, size)

    def state(self, number: int) -> int:
        """`WAITS`, `MADE` (its feature file can be read) or `FAILED` (the manifest says why)."""
        return self._memory[number]

    def finish(self, number: int, state: int) -> None:
        """Note what became of a video. One process calls this, one thread at a time."""
        finished = self.finished + 1
        self._memory[number] = state
        self._memory[self.count : self.count + _FINISHED] = finished.to_bytes(_FINISHED, "little")

    @property
    def finished(self) -> int:
        """Videos that do not wait any more."""
        return int.from_bytes(self._memory[self.count : self.count + _FINISHED], "little")

    def tell(self, error: BaseException) -> None:
        """Leave word of what ends the encoder."""
        kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), Exception)
        message = " ".join(str(error).split())[: _LONGEST // 16]  # a character may take twelve bytes of JSON
        content = json.dumps([kind.__name__, message]).encode()
        begin = self.count + _FINISHED
        self._memory[begin + _LENGTH : begin + _LENGTH + len(content)] = content
        self._memory[begin : begin + _LENGTH] = len(content).to_bytes(_LENGTH, "little")

    @property
    def told(self) -> tuple[str, str] | None:
        """("ValueError", "OSError" or "Exception", message) of `tell`; None before it."""
        begin = self.count + _FINISHED
        length = int.from_bytes(self._memory[begin : begin + _LENGTH], "little")
        return tuple(json.loads(self._memory[begin + _LENGTH : begin + _LENGTH + length])) if length else None

    def close(self) -> None:
        self._memory.close()
        os.close(self.file)
