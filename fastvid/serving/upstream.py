"""Answers of another server: vLLM, which gets a video's rows as the embeddings of a picture.

The request is vLLM's form of OpenAI's chat completions: a part ``{"type": "image_embeds", "image_embeds": …}``, whose
value is base64 of what torch.save writes of a tensor [R, D]. vLLM takes it with ``--enable-mm-embeds``. Sources, of
vllm-project/vllm: docs/features/multimodal_inputs.md, vllm/multimodal/media/image.py.

Dimensions: R rows of a video, C channels of the vision tower, D hidden size of the language model.
"""

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import torch

from fastvid.batch import Features
from fastvid.inference.generate import rows_left
from fastvid.inference.source import VideoSource
from fastvid.serving.errors import ApiError
from fastvid.serving.protocol import Asked

_CONNECT = 10.0  # seconds to reach the other server
_HEALTH = 2.0  # seconds for it to say that it is there, and for which that is believed
_LONGEST = 1 << 20  # bytes of an event, and of an error
_TOLD = 300  # characters of an error


class UpstreamAnswer:
    """An answer on its way; of the event loop.

    Attributes:
        begun: done once the other server has begun to answer; an `ApiError` if it does not.
    """

    def __init__(self):
        self._events: asyncio.Queue[list[str] | ApiError | None] = asyncio.Queue()
        self._finish, self._tokens = "stop", None
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None

    async def more(self) -> list[str] | None:
        """The pieces of text that have come since; None when there will be no more.

        Raises:
            ApiError: 502 or 504, the other server failed.
        """
        event = await self._events.get()
        if isinstance(event, ApiError):
            raise event
        return event

    def give_up(self) -> None:
        """Have the other server stop."""
        if self.task is not None:
            self.task.cancel()

    def finish(self, tokens: int) -> str:
        """Why it has ended."""
        return self._finish

    def counted(self, pieces: int) -> int:
        """Its tokens so far: as the other server has counted them, else of as many pieces."""
        return pieces if self._tokens is None else self._tokens

    def take(self, event: dict[str, Any]) -> None:
        """An event of the other server's stream.

        Raises:
            ApiError: it tells of an error.
        """
        if "error" in event:
            raise ApiError(502, f"the server behind this one failed: {_message(event)}", code="upstream_failed")
        usage, choices = event.get("usage"), event.get("choices")
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            self._tokens = usage["completion_tokens"]
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        delta = choice.get("delta")
        if choice.get("finish_reason") == "length":
            self._finish = "length"
        if isinstance(delta, dict) and isinstance(delta.get("content"), str) and delta["content"]:
            self._events.put_nowait([delta["content"]])

    def end(self, why: ApiError | None) -> None:
        """There is no more of it, as it is whole, or for a reason."""
        if self.begun.done():
            self._events.put_nowait(why)
        elif why is None:
            self.begun.set_result(None)
        else:
            self.begun.set_exception(why)


class Upstream:
    """Another server that answers. Of one event loop.

    Args:
        source: whose projector makes the rows.
        url: of its interface, with or without /v1.
        model: its name there; None: the only one that it has.
        key: that it wants, or None.
        at_once: most requests that it has at a time; others wait here.
        timeout: seconds in which something of an answer has to come.

    Raises:
        ValueError: a projector that cannot be used, or no address.
    """

    def __init__(
        self, source: VideoSource, *, url: str, model: str | None, key: str | None, at_once: int, timeout: float
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--upstream {url} is no address; give one such as http://localhost:8001/v1")
        self._source, self._model, _ = source, model, source.projector  # which is loaded now
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._client = httpx2.AsyncClient(
            headers={"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})},
            timeout=httpx2.Timeout(timeout, connect=_CONNECT, pool=None),
            limits=httpx2.Limits(max_connections=at_once + 4),
            trust_env=False,  # a proxy would see the videos
        )
        self._places, self._tasks, self._running = asyncio.Semaphore(at_once), set(), 0
        self._looked, self._fault, self._looking = -_HEALTH, None, asyncio.Lock()

    @property
    def state(self) -> dict[str, int]:
        """As `Engine.state`; what the other server keeps is not known."""
        return {"running": self._running, "waiting": len(self._tasks) - self._running, "kept": 0, "found": 0}

    async def submit(self, asked: Asked, features_RC: Features, sampling: dict[str, Any]) -> tuple[int, UpstreamAnswer]:
        """(tokens of the prompt, the answer, which the other server has begun).

        Args:
            sampling: max_new_tokens and temperature; top_p and seed where the request names them.

        Raises:
            ValueError: a text that cannot be asked, or that leaves no room for an answer.
            ApiError: 400, 429, 502, 503 or 504: the other server refuses, or does not answer.
        """
        prompt = len(self._source.prompt(features_RC, asked.question, asked.history))
        left = rows_left(self._source.model_config.decoder.context, prompt)
        body = {
            "messages": _messages(asked),
            "max_tokens": min(sampling["max_new_tokens"], left),
            **{name: sampling[name] for name in ("temperature", "top_p", "seed") if name in sampling},
            **({"stop": list(asked.stop)} if asked.stop else {}),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer = UpstreamAnswer()
        answer.task = asyncio.create_task(self._follow(answer, body, features_RC))
        self._tasks.add(answer.task)
        answer.task.add_done_callback(self._tasks.discard)
        try:
            await answer.begun
        except BaseException:
            answer.give_up()
            raise
        return prompt, answer

    async def _follow(self, answer, body, features_RC):
        """Ask, and hand on what comes."""
        try:
            async with self._places:
                self._running += 1
                try:
                    await self._stream(answer, body, features_RC)
                finally:
                    self._running -= 1
        except asyncio.CancelledError:
            answer.end(ApiError(503, "the server is stopping", code="stopping"))  # who gave it up listens no more
            raise
        except ApiError as error:
            answer.end(error)
        except httpx2.TimeoutException:
            late = "the server behind this one (--upstream) does not answer in time"
            answer.end(ApiError(504, late, code="upstream_timeout"))
        except httpx2.HTTPError as error:
            gone = f"the server behind this one (--upstream) cannot be reached ({type(error).__name__})"
            answer.end(ApiError(502, gone, code="upstream_unreachable"))
        else:
            answer.end(None)

    async def _stream(self, answer, body, features_RC):
        body = {"model": await self._name(), **body}
        content = await asyncio.to_thread(self._content, body, features_RC)
        headers = {"Content-Type": "application/json"}
        async with self._client.stream(
            "POST", f"{self._base}/chat/completions", content=content, headers=headers
        ) as response:
            if response.status_code != 200:
                raise await _refusal(response)
            answer.begun.set_result(None)
            async for data in _events(response):
                if data == b"[DONE]":
                    return
                try:
                    event = json.loads(data)
                except ValueError:
                    event = None
                if not isinstance(event, dict):
                    raise ApiError(502, "the server behind this one sends what is no JSON", code="upstream_failed")
                answer.take(event)
        raise ApiError(502, "the server behind this one ended within its answer", code="upstream_failed")

    def _content(self, body, features_RC):
        """The request's JSON, with the rows in it."""
        written = io.BytesIO()
        torch.save(self._source.project(features_RC), written)
        rows = {"type": "image_embeds", "image_embeds": base64.b64encode(written.getvalue()).decode()}
        first, *others = body["messages"]
        text = {"type": "text", "text": first["content"]}
        return json.dumps({**body, "messages": [{**first, "content": [rows, text]}, *others]}).encode()

    async def _name(self):
        """The model's, there."""
        if self._model is None:
            response = await self._client.get(f"{self._base}/models")
            if response.status_code != 200:
                raise _refused(response.status_code, response.content, response.headers)
            try:
                names = [model["id"] for model in response.json()["data"]]
            except (ValueError, KeyError, TypeError):
                names = []
            if len(names) != 1 or not isinstance(names[0], str):
                told = f"the server behind this one names {len(names)} models: name one by --upstream_model"
                raise ApiError(502, told, code="upstream_failed")
            self._model = names[0]
        return self._model

    async def fault(self) -> str | None:
        """Why the other server does not answer, in a few words; None: it does. Looked at every two seconds at most."""
        async with self._looking:
            if time.monotonic() - self._looked >= _HEALTH:
                try:
                    response = await self._client.get(f"{self._base}/models", timeout=_HEALTH)
                    status = response.status_code
                    self._fault = None if status == 200 else f"answers {status}"
                except httpx2.TimeoutException:
                    self._fault = "does not answer in time"
                except httpx2.HTTPError:
                    self._fault = "cannot be reached"
                self._looked = time.monotonic()
            return self._fault

    async def close(self) -> None:
        """Give up what is not answered."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()


def _messages(asked):
    turns = [text for turn in asked.history for text in turn] + [asked.question]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


async def _events(response: httpx2.Response) -> AsyncIterator[bytes]:
    """The data of each server-sent event."""
    held = b""
    async for piece in response.aiter_bytes():
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
        if len(held) > _LONGEST:
            raise ApiError(502, "the server behind this one sends an event without an end", code="upstream_failed")


async def _refusal(response):
    """What its client is told of a request that the other server refuses."""
    content = b""
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > _LONGEST:
            break
    return _refused(response.status_code, content, response.headers)


def _refused(status, content, headers):
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    told = _message(value) if isinstance(value, dict) else ""
    message = f"the server behind this one (--upstream) answers {status}{f': {told}' if told else ''}"
    later = headers.get("retry-after", "")
    retry_after = min(int(later), 3600) if later.isascii() and later.isdecimal() and len(later) < 9 else 5
    if status in (400, 422):  # what it says of the request: too long for it, most likely
        return ApiError(400, message, code="upstream_refused")
    if status in (429, 503):
        return ApiError(status, message, code="upstream_busy", retry_after=retry_after)
    return ApiError(504 if status in (408, 504) else 502, message, code="upstream_failed")


def _message(value):
    """What an error of OpenAI's form, or of older vLLM's, says."""
    error = value.get("error", value)
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message).split())[:_TOLD] if message else ""
