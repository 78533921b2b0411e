"""What a request's addresses mean: bytes of a data URI, a file below the allowed folder, or what an allowed host sends.

Whatever they mean, it ends as a file of known content on this machine, of a bounded size.
"""

import binascii
import hashlib
import os
import re
import stat
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fastvid.files import shown
from fastvid.inference.questions import inside
from fastvid.serving.errors import ApiError

_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]+)*)(;base64)?$")
_PIECE = 1 << 20


@dataclass(frozen=True)
class MediaFile:
    """A file of known content.

    Attributes:
        path: of it.
        digest: SHA-256 of its content, in hexadecimal.
        ours: whether it was made here, and is to be removed.
    """

    path: Path
    digest: str
    ours: bool

    def remove(self) -> None:
        """Remove what was made here."""
        if self.ours:
            self.path.unlink(missing_ok=True)


class Addresses:
    """Opens what requests name.

    Args:
        spool: folder for what does not come as a file.
        allowed_folder: whose files may be named; None: of none.
        allow_host: hosts that may be asked: name, or name:port; a name alone means the usual port.
        most_bytes: of a file, or of what a host sends.
        timeout: seconds that a host has.
    """

    def __init__(
        self, spool: Path, *, allowed_folder: str | None, allow_host: list[str], most_bytes: int, timeout: float
    ):
        self._spool, self._folder, self._hosts = spool, allowed_folder, {host.lower() for host in allow_host}
        self._most, self._timeout = most_bytes, timeout

    def open(self, url: str, pictures: bool) -> MediaFile:
        """The file that an address of a video, or of a picture, means. Blocks.

        Raises:
            ApiError: 400, 413, 415 or 504.
        """
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return self.keep(_decoded(url, pictures))
        if scheme == "file":
            return self._file(url)
        if scheme in ("http", "https"):
            return self._fetched(url)
        raise ApiError(400, f"{_said(url)}: give a data: URI, or a file:// or http(s) address that the server allows")

    def keep(self, content: bytes) -> MediaFile:
        """A file of some bytes."""
        handle, path = tempfile.mkstemp(dir=self._spool)
        with open(handle, "wb") as file:
            file.write(content)
        return MediaFile(Path(path), hashlib.sha256(content).hexdigest(), True)

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
        real = os.path.realpath(path)
        if not os.path.isabs(path) or not inside(real, self._folder):
            raise refused
        try:
            there = os.stat(real)
        except (OSError, ValueError) as error:
            raise refused from error
        if not stat.S_ISREG(there.st_mode):
            raise refused
        if there.st_size > self._most:
            raise self._too_large(url)
        try:
            return MediaFile(Path(real), _digest(real, there.st_size, there.st_mtime_ns, there.st_ino), False)
        except OSError as error:
            raise refused from error

    def _fetched(self, url):
        import urllib3

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
        deadline, handle, path = time.monotonic() + self._timeout, *tempfile.mkstemp(dir=self._spool)
        timeout, hashed, size = urllib3.Timeout(total=self._timeout), hashlib.sha256(), 0
        try:
            with open(handle, "wb") as file, urllib3.PoolManager() as pool:
                response = pool.request(
                    "GET", url, redirect=False, retries=False, preload_content=False, timeout=timeout
                )
                if response.status != 200:
                    raise ApiError(400, f"{_said(url)}: {host} answers {response.status}; redirects are not followed")
                while piece := response.read1(_PIECE, decode_content=False):
                    size += len(piece)
                    if size > self._most:
                        raise self._too_large(url)
                    if time.monotonic() > deadline:
                        raise ApiError(504, f"{_said(url)}: {host} takes longer than {self._timeout:g} s")
                    hashed.update(piece)
                    file.write(piece)
        except BaseException as error:
            os.unlink(path)
            if isinstance(error, urllib3.exceptions.TimeoutError):
                raise ApiError(504, f"{_said(url)}: {host} takes longer than {self._timeout:g} s") from error
            if isinstance(error, urllib3.exceptions.HTTPError):
                raise ApiError(400, f"{_said(url)}: {host} cannot be asked ({type(error).__name__})") from error
            raise
        return MediaFile(Path(path), hashed.hexdigest(), True)

    def _too_large(self, url):
        return ApiError(413, f"{_said(url)} has more than {self._most / 2**20:g} MiB (--max_video_mib)")


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


@lru_cache(maxsize=4096)
def _digest(path, size, changed, number):
    """SHA-256 of a file, read once for as long as it stays the same."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _said(url):
    """The beginning of an address, for messages."""
    return shown(url if len(url) <= 80 else url[:60] + "…")
