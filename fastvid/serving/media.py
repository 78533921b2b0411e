"""What a request's addresses mean: bytes of a data URI, a file below the allowed folder, or what an allowed host sends.

Whatever they mean, it ends as a file of known content on this machine, of a bounded size.
"""

import binascii
import errno
import hashlib
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fastvid.files import shown
from fastvid.inference.deadlines import at, bounded
from fastvid.inference.questions import inside
from fastvid.serving.errors import ApiError

_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]+)*)(;base64)?$", re.IGNORECASE)
_PIECE = 1 << 20


@dataclass(frozen=True)
class MediaFile:
    """A file of known content.

    Attributes:
        path: of it.
        digest: SHA-256 of its content, in hexadecimal.
        state: of a file of somebody else's when it was read (`_state`).
        spool: where it was made, if it was made here; then it is to be removed.
        size: bytes of what was made here.
    """

    path: Path
    digest: str
    state: tuple[int, ...] = ()
    spool: "Spool | None" = None
    size: int = 0

    @property
    def ours(self) -> bool:
        """Whether it was made here, and is to be removed."""
        return self.spool is not None

    def remove(self) -> None:
        """Remove what was made here."""
        if self.spool is not None:
            self.spool.remove(self.path, self.size)

    def check_unchanged(self) -> None:
        """Make sure that what was decoded since is what the digest is of.

        Raises:
            ApiError: 400, somebody has written to the file, or put another in its place.
        """
        if self.ours:
            return
        with suppress(OSError):
            if _state(os.lstat(self.path)) == self.state:
                return
        raise ApiError(400, f"{shown(self.path.name)} was changed while it was read; ask again")


class Spool:
    """A folder for what does not come as a file, of a bounded size. Of any thread.

    Args:
        folder: which is there.
        most_bytes: of all its files together.
    """

    def __init__(self, folder: Path, most_bytes: int):
        self._folder, self._most, self._used, self._lock = folder, most_bytes, 0, threading.Lock()
        self._there: set[str] = set()

    def keep(self, pieces: Iterable[bytes]) -> MediaFile:
        """A file of some bytes, which come one piece after another.

        Raises:
            ApiError: 429, files of other requests take the room; 503, the disk is full.
        """
        path, size, hashed = None, 0, hashlib.sha256()
        try:
            handle, path = self._made()
            self._there.add(path)
            with open(handle, "wb") as file:
                for piece in pieces:
                    self._take(len(piece))
                    size += len(piece)
                    hashed.update(piece)
                    file.write(piece)
        except BaseException as error:
            if path is not None:
                self.remove(path, size)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ApiError(503, "the server's disk is full; try again later", retry_after=30) from error
            raise
        return MediaFile(Path(path), hashed.hexdigest(), spool=self, size=size)

    def _made(self):
        try:
            return tempfile.mkstemp(dir=self._folder)
        except FileNotFoundError:  # what tidies up /tmp takes folders that nobody used for days
            with suppress(FileExistsError):
                self._folder.mkdir(0o700)
            there = os.lstat(self._folder)
            if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.geteuid():
                raise  # somebody else's, who would see the videos
            return tempfile.mkstemp(dir=self._folder)

    def remove(self, path: str | Path, size: int) -> None:
        """Remove a file, of so many bytes, if it was not removed before."""
        with suppress(FileNotFoundError):
            os.unlink(path)
        with self._lock:
            if str(path) in self._there:
                self._there.remove(str(path))
                self._used -= size

    def _take(self, size):
        with self._lock:
            if self._used + size > self._most:
                raise ApiError(429, "videos of other requests fill the room for them; try again later", retry_after=5)
            self._used += size


class Addresses:
    """Opens what requests name.

    Args:
        spool: for what does not come as a file.
        allowed_folder: whose files may be named; None: of none.
        allow_host: hosts that may be asked: name, or name:port; a name alone means the usual port.
        most_bytes: of a file, or of what a host sends.
        timeout: seconds that a host has.
    """

    def __init__(
        self, spool: Spool, *, allowed_folder: str | None, allow_host: list[str], most_bytes: int, timeout: float
    ):
        self._spool, self._folder, self._hosts = spool, allowed_folder, {host.lower() for host in allow_host}
        self._most, self._timeout = most_bytes, timeout

    def open(self, url: str, pictures: bool, deadline: float) -> MediaFile:
        """The file that an address of a video, or of a picture, means. Blocks.

        Args:
            deadline: when a host is given up at the latest, of `time.monotonic`.

        Raises:
            ApiError: 400, 413, 415, 429, 503 or 504.
        """
        scheme = scheme_of(url)
        if scheme == "data":
            return self.keep(_decoded(url, pictures))
        if scheme == "file":
            return self._file(url)
        if scheme in ("http", "https"):
            with closing(self._fetched(url, deadline)) as pieces:
                return self._spool.keep(pieces)
        raise ApiError(400, f"{_said(url)}: give a data: URI, or a file:// or http(s) address that the server allows")

    def keep(self, content: bytes) -> MediaFile:
        """A file of some bytes.

        Raises:
            ApiError: as `Spool.keep`.
        """
        return self._spool.keep([content])

    def _file(self, url):
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise ApiError(400, f"{_said(url)} is no address") from error
        if self._folder is None:
            raise ApiError(400, f"{_said(url)}: the server allows no files; start it with --allowed_folder")
        path = unquote(parts.path)
        # One answer to all, so that nobody learns what there is elsewhere.
        refused = ApiError(400, f"{_said(url)} is no file below the server's --allowed_folder")
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "\0" in path:
            raise refused
        try:
            real = os.path.realpath(path)
            if not os.path.isabs(path) or not inside(real, self._folder):
                raise refused
            # A pipe must not be waited for, nor a link be followed that was put in since.
            descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise refused from error
        try:
            there = os.fstat(descriptor)
            # What was opened, whatever links its folders have become.
            if not stat.S_ISREG(there.st_mode) or not inside(f"/proc/self/fd/{descriptor}", self._folder):
                raise refused
            if there.st_size > self._most:
                raise self._too_large(url)
            return MediaFile(Path(real), _digest(_Opened(_state(there), descriptor)), _state(there))
        except OSError as error:
            raise refused from error
        finally:
            os.close(descriptor)

    def _fetched(self, url, deadline) -> Generator[bytes]:
        import urllib3
        from urllib3.util import parse_url

        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError as error:
            raise ApiError(400, f"{_said(url)} is no address") from error
        if (host if port is None else f"{host}:{port}") not in self._hosts:
            raise ApiError(
                400, f"{_said(url)}: the server asks no such host (--allow_host); send the video as a data: URI"
            )
        if parts.username is not None or parts.password is not None:
            raise ApiError(400, f"{_said(url)} holds a user's name: leave it out")
        began, size = time.monotonic(), 0
        deadline = min(deadline, began + self._timeout)
        late = ApiError(504, f"{_said(url)}: {host} takes longer than {max(deadline - began, 0):.3g} s")
        if deadline <= began:
            raise late
        timeout = urllib3.Timeout(total=deadline - began)
        try:
            with urllib3.connection_from_url(url, timeout=timeout, retries=False) as pool:
                pool.ConnectionCls = bounded(pool.ConnectionCls, deadline - began)
                response = pool.request("GET", parse_url(url).request_uri, redirect=False, preload_content=False)
                if response.status != 200:
                    raise ApiError(400, f"{_said(url)}: {host} answers {response.status}; redirects are not followed")
                with at(deadline, response.shutdown):
                    while piece := response.read1(_PIECE, decode_content=False):
                        size += len(piece)
                        if size > self._most:
                            raise self._too_large(url)
                        yield piece
                        if time.monotonic() > deadline:
                            break
                if time.monotonic() > deadline:
                    raise late
        except urllib3.exceptions.TimeoutError as error:
            raise late from error
        except urllib3.exceptions.HTTPError as error:
            if time.monotonic() > deadline:
                raise late from error
            raise ApiError(400, f"{_said(url)}: {host} cannot be asked ({type(error).__name__})") from error

    def _too_large(self, url):
        return ApiError(413, f"{_said(url)} has more than {self._most / 2**20:g} MiB (--max_video_mib)")


def scheme_of(url: str) -> str:
    """The kind of an address, in lower case: data, file, http, …"""
    return url[:8].partition(":")[0].lower()


def _decoded(url, pictures):
    """The bytes of a data URI."""
    head, comma, _ = url[:300].partition(",")
    found = _DATA.match(head)
    if not comma or found is None or not found[3]:
        raise ApiError(400, f"{_said(url)}: a data URI must begin as data:video/mp4;base64,")
    kind = (found[1] or "").lower()
    if kind not in ("", "application/octet-stream") and not kind.startswith("image/" if pictures else "video/"):
        raise ApiError(415, f"{_said(url)}: {kind} is no {'picture' if pictures else 'video'}")
    try:
        return binascii.a2b_base64(url[len(head) + 1 :].encode("ascii"), strict_mode=True)
    except (ValueError, UnicodeEncodeError) as error:
        raise ApiError(400, f"{_said(url)}: what follows base64, is not base64") from error


@dataclass(frozen=True)
class _Opened:
    """An open file, known by its `_state`."""

    state: tuple[int, ...]
    descriptor: int = field(compare=False)


def _state(there):
    """What tells a file, and that it stays the same. Nobody can set the time of a change of its own (ctime)."""
    return there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns


@lru_cache(maxsize=4096)
def _digest(opened):
    """SHA-256 of an open file, read once for as long as it stays the same."""
    with open(opened.descriptor, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _said(url):
    """The beginning of an address, for messages."""
    return shown(url if len(url) <= 80 else url[:60] + "…")
