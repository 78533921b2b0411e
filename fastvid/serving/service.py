"""One model that answers requests: what comes of a request between its body and its answer."""

import asyncio
import math
import os
import secrets
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvid.config import ServeConfig
from fastvid.inference.chat import Chat
from fastvid.inference.source import VideoSource
from fastvid.serving import protocol
from fastvid.serving.engine import Answer, Engine
from fastvid.serving.errors import ApiError
from fastvid.serving.features import FeatureStore, Look, video_key
from fastvid.serving.media import Addresses, MediaFile, Spool, scheme_of
from fastvid.serving.metrics import Metrics
from fastvid.serving.protocol import Asked
from fastvid.serving.text import AnswerText
from fastvid.serving.upstream import Upstream, UpstreamAnswer
from fastvid.video.sampling import frame_indices

_MOST_WORKERS = 8
_BODIES = 8  # requests of the largest size whose bytes may be held at a time
_SPOOLED = 8  # videos of the largest size that may lie on the disk at a time
_PARSERS = 2  # bodies that are read at a time
_HOSTS = 16  # addresses that are fetched at a time
_FILES = 2  # files that are read at a time
_SILENT = 30.0  # seconds in which something of a request's body has to come
_CHARACTERS = 32  # of texts, for each token of the model's context: no token stands for more


@dataclass(eq=False)
class Reply:
    """An answer on its way.

    Attributes:
        key: of the completion.
        prompt: tokens of the prompt.
        finish: "stop" or "length" once it has ended.
    """

    key: str
    prompt: int
    answer: Answer | UpstreamAnswer
    text: AnswerText[Any]
    finish: str = "stop"

    @property
    def tokens(self) -> int:
        """Of the answer so far."""
        return self.answer.counted(self.text.tokens)

    @property
    def usage(self) -> dict[str, int]:
        return protocol.usage(self.prompt, self.tokens)


class Service:
    """Chat completions of one model. Of one event loop, which calls `start` and `close`.

    Args:
        source: the model, a `Chat`; where another server answers (--upstream), what makes its rows of videos. It is
            the caller's.
        config: ServeConfig.

    Attributes:
        name: of the model in requests.
        stopping: nothing new is begun.
        most_body: bytes of a request.

    Raises:
        ValueError: a tower that cannot be used.
    """

    def __init__(self, source: VideoSource, config: ServeConfig):
        self.config, self.stopping = config, False
        self.name = config.served_model_name or Path(os.path.abspath(config.model_name_or_path)).name
        self.api_key = config.api_key or os.environ.get("FASTVID_API_KEY") or None
        self.most_body, self.created = config.max_body_mib << 20, int(time.time())
        self._source, self._held, self._in_flight = source, 0, 0
        self._engine: Engine | None = None
        self._upstream: Upstream | None = None
        if config.upstream is not None:
            self._upstream = Upstream(
                source,
                url=config.upstream,
                model=config.upstream_model,
                key=os.environ.get(config.upstream_key_variable) or None,
                at_once=config.at_once,
                timeout=config.request_timeout,
            )
        else:
            assert isinstance(source, Chat), "somebody has to answer"
            cache_bytes = None if config.kv_cache_gib is None else int(config.kv_cache_gib * 2**30)
            self._engine = Engine(source, at_once=config.at_once, cache_bytes=cache_bytes)
        self.metrics = Metrics(
            {
                "requests_in_flight": ("Chat requests that are not answered yet.", lambda: self._in_flight),
                "answers_running": ("Answers that are being continued.", lambda: self._state["running"]),
                "answers_waiting": ("Prompts that wait for a place.", lambda: self._state["waiting"]),
                "feature_cache_bytes": ("Features that are kept.", lambda: self._features.bytes),
                "prefix_cache_bytes": ("Keys and values kept for later.", lambda: self._state["kept"]),
                "prefix_cache_hits": ("Prompts whose beginning was there.", lambda: self._state["found"]),
                "body_bytes": ("Bytes of requests that are held.", lambda: self._held),
            }
        )
        self._features = FeatureStore(source, config, self.metrics, min(_MOST_WORKERS, len(os.sched_getaffinity(0))))
        self._longest_text = _CHARACTERS * source.model_config.decoder.context
        # Hosts may be silent and files long: neither may keep the threads that all requests need.
        self._parsers = ThreadPoolExecutor(_PARSERS, "parse")
        self._files, self._hosts = ThreadPoolExecutor(_FILES, "file"), ThreadPoolExecutor(_HOSTS, "host")

    def start(self) -> None:
        """Begin to answer."""
        self._spool = tempfile.TemporaryDirectory(prefix="fastvid-serve-")
        largest = max(self.config.max_body_mib, self.config.max_video_mib) << 20
        self._addresses = Addresses(
            Spool(Path(self._spool.name), _SPOOLED * largest),
            allowed_folder=self.config.allowed_folder,
            allow_host=self.config.allow_host,
            most_bytes=self.config.max_video_mib << 20,
            timeout=self.config.decode_timeout,
        )
        if self._engine is not None:
            self._engine.start()

    async def close(self) -> None:
        """End: what is not answered is lost."""
        self.stopping = True
        await self._features.close()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
        if self._upstream is not None:
            await self._upstream.close()
        for threads in (self._parsers, self._files, self._hosts):
            threads.shutdown(wait=False, cancel_futures=True)
        self._spool.cleanup()

    @property
    def _state(self):
        backend = self._engine or self._upstream
        assert backend is not None
        return backend.state

    async def upstream_fault(self) -> str | None:
        """Why the server behind this one does not answer, in a few words; None: it does, or there is none."""
        return None if self._upstream is None else await self._upstream.fault()

    @property
    def alive(self) -> bool:
        """Whether the model's thread runs; where another server answers, always."""
        return self._engine is None or self._engine.alive

    @property
    def idle(self) -> bool:
        """Whether nothing is in hand."""
        return not self._in_flight

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place for one request.

        Raises:
            ApiError: 503 of a server that ends, 429 if there is none.
        """
        if self.stopping:
            raise ApiError(503, "the server is stopping", code="stopping", retry_after=5)
        if self._in_flight >= self.config.at_once + self.config.max_waiting:
            raise ApiError(
                429,
                f"{self._in_flight} requests are in hand: at most {self.config.at_once} are answered at a time "
                f"(--at_once), and {self.config.max_waiting} wait (--max_waiting); try again later",
                code="queue_full",
                retry_after=max(1, math.ceil(self.config.max_waiting / self.config.at_once)),
            )
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    async def read_body(self, pieces: AsyncIterator[bytes], declared: str | None) -> bytes:
        """A request's body, whose bytes count as held until `release`.

        Args:
            pieces: as they come.
            declared: the request's content-length.

        Raises:
            ApiError: 408 if nothing comes for a while, 413, or 429 if too many bytes of other requests are held.
        """
        too_large = ApiError(413, f"the request has more than {self.config.max_body_mib} MiB (--max_body_mib)")
        if declared is not None and declared.isdecimal() and int(declared[:20]) > self.most_body:
            raise too_large
        parts, size = [], 0
        try:
            async for piece in _steady(pieces):
                if size + len(piece) > self.most_body:
                    raise too_large
                if self._held + len(piece) > _BODIES * self.most_body:
                    raise ApiError(429, "other requests fill the memory for them; try again later", retry_after=5)
                parts.append(piece)
                size += len(piece)
                self._held += len(piece)
            return b"".join(parts)
        except BaseException:
            self._held -= size
            raise

    def release(self, body: bytes) -> None:
        """The body of `read_body` is not needed any more."""
        self._held -= len(body)

    async def read(self, body: bytes, deadline: float) -> tuple[Asked, str, list[MediaFile]]:
        """(what is asked, key of its media, their files: none where the key's features are kept already).

        Of more pictures than the model takes frames, those that stand for them are opened alone.

        Args:
            deadline: when the request is given up, of the event loop's clock.

        Raises:
            ApiError: 400, 404, 413, 415, 429, 503 or 504.
        """
        opened: dict[str, MediaFile] = {}
        try:
            asked = await asyncio.get_running_loop().run_in_executor(
                self._parsers, protocol.read, body, self._longest_text, self.name
            )
            urls, pictures = self._chosen(asked)
            if not pictures and urls[0].startswith("sha256:"):
                return asked, urls[0], []
            for url in dict.fromkeys(urls):
                opened[url] = await _made(self._threads(url), self._addresses.open, url, pictures, deadline)
        except BaseException:
            for file in opened.values():
                file.remove()
            raise
        files = [opened[url] for url in urls]
        return asked, video_key(files, pictures), files

    def _threads(self, url):
        """Those that open an address."""
        return {"http": self._hosts, "https": self._hosts, "file": self._files}.get(scheme_of(url), self._parsers)

    def _chosen(self, asked):
        """(the addresses that are to be opened, whether they are of pictures) of a request that may be answered."""
        urls, pictures = asked.media.urls, asked.media.pictures
        if len(urls) > self.config.max_frames:
            raise ApiError(400, f"{len(urls)} pictures are more than --max_frames {self.config.max_frames}")
        return [urls[i] for i in frame_indices(len(urls), self.num_frames)] if pictures else urls, pictures

    async def reply(self, asked: Asked, key: str, files: list[MediaFile]) -> Reply:
        """Let a request wait for its answer; the features of its video are made first. Arguments as `read` gives them.

        Raises:
            ApiError: 400; 429, 502, 503 or 504 of another server that is to answer.
        """
        if files:
            features_RC = await self._features.of(key, files, asked.media.pictures)
        else:
            features_RC = self._features.known(key)
            if features_RC is None:
                raise ApiError(400, f"{key[:80]} is not kept (any more): send the video", code="video_not_kept")
        name = f"chatcmpl-{secrets.token_hex(12)}"
        longest = min(asked.sampling.get("max_new_tokens", math.inf), self.config.max_new_tokens)
        sampling = {"temperature": self.config.temperature, **asked.sampling, "max_new_tokens": longest}
        try:
            if self._upstream is not None:
                prompt, answer = await self._upstream.submit(asked, features_RC, sampling)
                text = AnswerText("".join)
            else:
                request = await asyncio.to_thread(self._request, name, key, features_RC, asked, sampling)
                assert self._engine is not None
                prompt, answer = len(request.token_ids), self._engine.submit(request)
                text = AnswerText(self._source.tokenizer.decode, asked.stop)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        self.metrics.tokens.labels("prompt").inc(prompt)
        return Reply(name, prompt, answer, text)

    def _request(self, name, key, features_RC, asked, sampling):
        assert isinstance(self._source, Chat)
        sampling = {"seed": secrets.randbits(63), **sampling}
        return self._source.request(name, key, features_RC, asked.question, asked.history, **sampling)

    async def pieces(self, reply: Reply, began: float) -> AsyncGenerator[str, None]:
        """The pieces of an answer's text. Who stops to ask for them gives the answer up.

        Args:
            began: when the request came, of `time.perf_counter`.
        """
        text = reply.text
        try:
            while (ids := await reply.answer.more()) is not None:
                if not text.tokens:
                    self.metrics.first_seconds.observe(time.perf_counter() - began)
                if piece := text.add(ids):
                    yield piece
                if text.stopped:
                    return
            reply.finish = reply.answer.finish(text.tokens)
            if piece := text.end():
                yield piece
        finally:
            reply.answer.give_up()
            self.metrics.tokens.labels("answer").inc(reply.tokens)

    async def look(self, content: bytes) -> Look:
        """What a page shows of a video.

        Raises:
            ApiError: 400, what cannot be decoded; 429 or 503 without room for it.
        """
        return await self._features.look(await _made(self._parsers, self._addresses.keep, content))

    @property
    def pooling(self) -> str:
        """What the rows of a video are, as ``--pooling`` says it."""
        return self._source.pooling

    @property
    def num_frames(self) -> int:
        """Temporal rows of the features."""
        return self._source.num_frames


async def _steady(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces of a body, for as long as something comes."""
    while True:
        try:
            async with asyncio.timeout(_SILENT):
                piece = await anext(pieces, None)
        except TimeoutError as error:
            raise ApiError(408, f"nothing of the request's body came for {_SILENT:g} s", code="timeout") from error
        if piece is None:
            return
        yield piece


async def _made(threads: Executor, function: Callable[..., MediaFile], *arguments: Any) -> MediaFile:
    """Call what blocks, in one of some threads. If nobody waits any more, the file that it makes is removed at last."""
    call = threads.submit(function, *arguments)
    try:
        return await asyncio.wrap_future(call)
    except asyncio.CancelledError:
        call.add_done_callback(_dropped)
        raise


def _dropped(call):
    if not call.cancelled() and call.exception() is None:
        call.result().remove()
