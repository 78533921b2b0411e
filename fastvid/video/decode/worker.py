"""Decoding in a process of its own, so that a file that crashes or hangs FFmpeg costs that file and nothing else.

The process is started as ``python -m fastvid.video.decode.worker`` rather than through multiprocessing, which would
run the user's main script again. It gets requests as JSON and answers with JSON and bytes; nothing that comes from it
is unpickled. Frames of a known size it puts into memory that both processes share. It times itself with an alarm, whose
default action ends a process even inside FFmpeg, and ends when the other end of its pipe closes, so that it does not
outlive its parent.
"""

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from fastvid.files import StrPath
from fastvid.video.decode import shared_frames
from fastvid.video.decode.bitstream import Bitstream, Unsuited, read_bitstream
from fastvid.video.decode.info import DecodeError, VideoInfo
from fastvid.video.decode.pyav import decode, duration, frame_times
from fastvid.video.decode.shared_frames import ReceivedFrames, SharedFrames
from fastvid.video.decode.still import decode_still, is_still

_TO_END = 5.0  # seconds that a process takes to be gone, once its end of the pipe is closed
_MOST_TIMES = 10  # the time-out, of a video that says that it lasts for years


class DecodeWorker:
    """Decodes like `fastvid.video.decode.decode`, and images like `decode_still`: one at a time, in a process that
    starts when first needed.

    Args:
        timeout: seconds after which a video is given up.
    """

    def __init__(self, timeout: float = 600.0):
        self.timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._shared = SharedFrames()

    def decode(self, path: StrPath, **options: Any) -> tuple[np.ndarray, VideoInfo]:
        """`fastvid.video.decode.decode(path, **options)`; a crash or time-out is a DecodeError, too.

        The time-out counts the video's own length as well.
        """
        return self.decode_and_hash(path, **options, digest=False)[:2]

    def decode_and_hash(
        self, path: StrPath, *, digest: bool = True, **options: Any
    ) -> tuple[np.ndarray, VideoInfo, str | None]:
        """(frames, VideoInfo, SHA-256 of the file in hexadecimal, or None) of a video; otherwise as `decode`."""
        piece, size, count = None, options.get("size"), options.get("num_frames")
        if size and count and "indices" not in options:
            piece = self._shared.take(3 * size * size * count)
        try:
            with self._answered(path, "frames", options, digest, piece) as (reply, connection):
                if piece is None:
                    frames = np.empty(reply["shape"], np.uint8)
                    connection.recv_bytes_into(frames.reshape(-1))
                else:
                    frames = self._shared.array(piece, reply["shape"])
                    piece = None  # the array's now
        finally:
            if piece is not None:
                self._shared.release(piece)
        return frames, VideoInfo(**reply["info"]), reply["sha256"]

    def read_bitstream(self, path: StrPath, *, digest: bool = True, **options: Any) -> tuple[Bitstream, str | None]:
        """(`read_bitstream(path, **options)`, SHA-256 of the file or None); otherwise as `decode`.

        Raises:
            Unsuited: it is PyAV's.
        """
        with self._answered(path, "bitstream", options, digest) as (reply, connection):
            ends, numbers = (np.empty(reply["packets"], np.int64) for _ in range(2))
            for array in (ends, numbers):
                connection.recv_bytes_into(array)
            data = connection.recv_bytes()
        return Bitstream.of(reply["stream"], data, ends, numbers), reply["sha256"]

    def frame_times(self, path: StrPath, numbers: Sequence[int], info: VideoInfo) -> list[float]:
        """`fastvid.video.decode.pyav.frame_times` of a video's frames; otherwise as `decode`."""
        options = {"numbers": list(numbers), "info": asdict(info)}
        with self._answered(path, "times", options, digest=False) as (reply, _):
            return reply["times"]

    def pictures(self, paths: Sequence[StrPath], **options: Any) -> np.ndarray:
        """`fastvid.video.decode.still.pictures(paths, **options)`; a crash or time-out is a DecodeError, too."""
        options["paths"] = [os.fspath(path) for path in paths]
        with self._answered(options["paths"][0], "pictures", options, digest=False) as (reply, connection):
            frames = np.empty(reply["shape"], np.uint8)
            connection.recv_bytes_into(frames.reshape(-1))
        return frames

    @contextmanager
    def _answered(self, path, what, options, digest, piece=None):
        """(head of the answer to a request, where what follows it is read within). Frames come in a piece of memory."""
        if self._process is not None and self._process.poll() is not None:
            self.close()  # it ended while it had nothing to do, which is not this file's fault
        if self._process is None or self._connection is None:
            self._process, self._connection = self._started()
        process, connection = self._process, self._connection
        try:
            request = {
                "path": os.fspath(path),
                "what": what,
                "options": options,
                "timeout": self.timeout,
                "digest": digest,
            }
            if piece is not None:
                request["into"], request["new"] = self._shared.number(piece)
            connection.send_bytes(json.dumps(request).encode())
            if piece is not None and request["new"]:
                shared_frames.send(piece, connection, process.pid)
            reply = json.loads(connection.recv_bytes())
            if "unsuited" in reply:
                raise Unsuited(reply["unsuited"])
            if "reason" in reply:
                raise DecodeError(reply.get("path", path), reply["reason"])
            yield reply, connection
        except (Unsuited, DecodeError):
            raise
        except (EOFError, OSError) as error:
            raise DecodeError(path, self._cause_of_death(error)) from error
        except BaseException:  # what is left of the answer would be taken for the next one
            self.close()
            raise

    def kill(self) -> None:
        """End the process, whatever it is doing: a `decode` that waits for it in another thread fails."""
        if process := self._process:
            process.kill()

    def close(self) -> None:
        """End the process, from the thread that decodes. The next `decode` starts another."""
        if self._process is not None and self._connection is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = self._connection = None
            self._shared.clear()

    def _started(self):
        """A new process and the connection to it."""
        ours, theirs = Pipe()
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
        )
        theirs.close()
        return process, ours

    def _cause_of_death(self, error):
        assert self._process is not None
        try:
            code = self._process.wait(_TO_END)
        except subprocess.TimeoutExpired:  # it lives: this process could not speak to it
            self.close()
            return f"the decoder could not be reached ({error})"
        self.close()
        if code == -signal.SIGALRM:
            return f"decoding took longer than {self.timeout:g} s and its own length"
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the decoder crashed ({name})"


def limit(timeout: float, duration: float) -> float:
    """Seconds that a video's decoding may take: the time-out and the video's own length, if that is to be believed."""
    return min(timeout + max(0.0, duration), _MOST_TIMES * timeout)


def serve(connection: Connection) -> None:
    """Answer requests until the other end closes. Interrupts are the parent's business."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=[connection.fileno()], daemon=True).start()
    memory = ReceivedFrames()
    while True:
        try:
            request = json.loads(connection.recv_bytes())
            into = memory.get(request["into"], request["new"], connection) if "into" in request else None
        except EOFError:
            return
        timeout, path = request["timeout"], request["path"]
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            if request["what"] != "pictures" and not is_still(path):
                signal.setitimer(signal.ITIMER_REAL, limit(timeout, duration(path)))
            reply, arrays = _ANSWERS[request["what"]](path, request["options"], into)
            reply["sha256"] = _sha256(path) if request["digest"] else None
        except DecodeError as error:
            reply, arrays = {"reason": error.reason, "path": error.path}, []
        except Unsuited as error:
            reply, arrays = {"unsuited": str(error)}, []
        except MemoryError:
            reply, arrays = {"reason": "not enough memory to decode it"}, []
        except OSError as error:
            reply, arrays = {"reason": f"cannot be read ({error.strerror})"}, []
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(json.dumps(reply).encode())
        for array in arrays:
            connection.send_bytes(array)


def _frames(path, options, into):
    """The head of an answer, and the arrays behind it."""
    if is_still(path):
        limits = {name: options[name] for name in ("size", "max_pixels") if name in options}
        frames, info = decode_still(path, **limits, into=into)
    else:
        frames, info = decode(path, **options, into=into)
    return {"shape": frames.shape, "info": asdict(info)}, [frames.reshape(-1)] if into is None else []


def _bitstream(path, options, _):
    stream = read_bitstream(path, **options)
    return {"packets": len(stream.ends), "stream": stream.described()}, [stream.ends, stream.numbers, stream.data]


def _times(path, options, _):
    return {"times": frame_times(path, options["numbers"], VideoInfo(**options["info"]))}, []


def _pictures(_, options, __):
    from fastvid.video.decode.still import pictures

    frames = pictures(**options)
    return {"shape": frames.shape}, [frames.reshape(-1)]


_ANSWERS = {"frames": _frames, "bitstream": _bitstream, "times": _times, "pictures": _pictures}


def _sha256(path):
    """None of a file that is mostly holes, of which reading says nothing and takes its time."""
    there = os.stat(path)
    if 512 * there.st_blocks < there.st_size / 2:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _end_with_parent(pipe):
    hang_up = select.poll()
    hang_up.register(pipe, 0)  # no event but the hang-up, which is always reported
    hang_up.poll()
    os._exit(0)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
