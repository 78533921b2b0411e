"""The addresses of a server, over a `Service`."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastvid.files import shown
from fastvid.serving import demo, protocol
from fastvid.serving.errors import ApiError
from fastvid.serving.protocol import Asked
from fastvid.serving.service import Reply, Service

log = logging.getLogger("fastvid")

Result = TypeVar("Result")
_OPEN = ("/health", "/", "/demo.js", "/demo.css")  # addresses that want no key
_GONE = 499  # what the log calls a request whose client went away


def app(service: Service, names: Collection[str] | None = None) -> ASGIApp:
    """The application. It starts the service, and closes it.

    Args:
        names: of the server, by which it answers; None: by any.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    handlers: dict[Any, Any] = {
        ApiError: lambda _, error: _refusal(error),
        HTTPException: lambda _, error: _refusal(ApiError(error.status_code, str(error.detail)), error.headers),
        Exception: lambda _, error: _refusal(ApiError(500, "the server failed; its log says how")),
    }
    routes = [
        Route("/v1/chat/completions", _Chat(service).answer, methods=["POST"]),
        Route("/v1/models", _models(service)),
        Route("/v1/models/{name:path}", _models(service)),
        Route("/health", _health(service)),
        Route("/metrics", _metrics(service)),
    ]
    if service.config.demo:
        routes += demo.routes(service, _Chat(service).body, _while_there)
    inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    inner.state.service = service
    return _Front(service, inner, names)


class _Front:
    """Asks for the key, counts requests and logs a line for each.

    A server that answers only this machine must not answer a page from elsewhere whose name was made to lead here: its
    browser tells that name as the host.
    """

    def __init__(self, service: Service, inner: ASGIApp, names: Collection[str] | None):
        self._service, self._inner, self._names = service, inner, names
        self._paths = {"/v1/chat/completions", "/v1/models", "/health", "/metrics", "/demo/look", *_OPEN}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        began, status, note = time.perf_counter(), _GONE, scope.setdefault("fastvid", {})
        note["began"] = began

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if (host := self._strange(scope)) is not None:
                error = ApiError(
                    403, f"nobody is asked here as {shown(host[:80])}: ask localhost, or give an --api_key"
                )
                await _refusal(error)(scope, receive, watched)
            elif {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
                # What stands in front may believe the other one, and see other requests (RFC 9112, 6.1).
                error = ApiError(400, "the body's length is told twice: leave Content-Length or Transfer-Encoding out")
                await _refusal(error, {"Connection": "close"})(scope, receive, watched)
            elif self._refused(scope):
                error = ApiError(401, "the key is missing or wrong: send it as Authorization: Bearer KEY")
                await _refusal(error, {"WWW-Authenticate": "Bearer"})(scope, receive, watched)
            else:
                await self._inner(scope, receive, watched)
        except ClientDisconnect:
            status = _GONE
        finally:
            path = scope["path"]
            status = note.get("status", status)
            self._service.metrics.requests.labels(path if path in self._paths else "other", str(status)).inc()
            who, seconds = (scope.get("client") or ["-"])[0], time.perf_counter() - began
            told = who, scope["method"], shown(path[:80]), status, seconds, note.get("tokens", "")
            log.info("%s %s %s %d %.2fs%s", *told)

    def _strange(self, scope):
        """The host that is asked, where it is none of the server's names; None otherwise."""
        if self._names is None:
            return None
        host = Headers(scope=scope).get("host", "")
        with suppress(ValueError):
            if urlsplit(f"//{host}").hostname in self._names:
                return None
        return host

    def _refused(self, scope):
        key = self._service.api_key
        if key is None or scope["path"] in _OPEN:
            return False
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, said = given.partition(b" ")
        return kind.lower() != b"bearer" or not hmac.compare_digest(said.strip(b" "), key.encode())


class _Chat:
    def __init__(self, service: Service):
        self._service = service

    async def body(self, request: Request, kind: str) -> bytes:
        """The request's body, which is held until `Service.release`."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
            raise ApiError(415, f"the request's Content-Type must be {kind}")
        async with _in_time(self._service):
            return await self._service.read_body(request.stream(), request.headers.get("content-length"))

    async def answer(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        service, note = self._service, request.scope["fastvid"]
        deadline = asyncio.get_running_loop().time() + service.config.request_timeout
        body = await self.body(request, "application/json")
        with ExitStack() as held:
            try:
                held.enter_context(service.admitted())  # not before: a body may take its time, or never come
                asked, key, files = await _while_there(request, service.read(body, deadline), deadline)
            finally:
                service.release(body)
            del body
            reply = await _while_there(request, service.reply(asked, key, files), deadline)
            held.callback(self._note, note, reply)
            held.callback(reply.answer.give_up)  # of one whose client left before its first piece
            pieces = service.pieces(reply, note["began"])
            if asked.stream:
                return _Events(service, asked, reply, pieces, deadline, held.pop_all())
            text = await _while_there(request, _joined(pieces), deadline)
            return _json(protocol.completion(reply.key, service.name, text, reply.finish, reply.usage))

    def _note(self, note, reply):
        note["tokens"] = f" {reply.prompt}+{reply.tokens} tokens"
        self._service.metrics.request_seconds.observe(time.perf_counter() - note["began"])


class _Events(Response):
    """An answer as server-sent events. What goes wrong after its begin is an event, too.

    Args:
        held: what is given back at its end.
    """

    def __init__(
        self,
        service: Service,
        asked: Asked,
        reply: Reply,
        pieces: AsyncGenerator[str, None],
        deadline: float,
        held: ExitStack,
    ):
        super().__init__(
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}, media_type="text/event-stream"
        )
        del self.headers["content-length"]
        self._service, self._asked, self._reply, self._pieces = service, asked, reply, pieces
        self._deadline, self._held = deadline, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            sending = asyncio.ensure_future(self._send_all(send, scope["fastvid"]))
            gone = asyncio.ensure_future(_left(receive))
            try:
                await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not sending.done():
                    raise ClientDisconnect
                sending.result()
            finally:
                gone.cancel()
                sending.cancel()
                await asyncio.wait({sending, gone})
                await self._pieces.aclose()

    async def _send_all(self, send, note):
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def event(value):
            await send({"type": "http.response.body", "body": protocol.event(value), "more_body": True})

        key, name, reply = self._reply.key, self._service.name, self._reply
        try:
            async with asyncio.timeout_at(self._deadline):
                await event(protocol.chunk(key, name, {"role": "assistant", "content": ""}))
                async for piece in self._pieces:
                    await event(protocol.chunk(key, name, {"content": piece}))
                await event(protocol.chunk(key, name, {}, reply.finish))
                if self._asked.usage:
                    await event(protocol.usage_chunk(key, name, reply.usage))
                await event("[DONE]")
        except TimeoutError:
            note["status"] = 504
            await event(_late(self._service).content())
        except ApiError as error:
            note["status"] = error.status
            await event(error.content())
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _joined(pieces):
    try:
        return "".join([piece async for piece in pieces])
    finally:
        await pieces.aclose()


async def _while_there(request: Request, work: Coroutine[Any, Any, Result], deadline: float) -> Result:
    """The result of some work, which is given up if the client goes away (ClientDisconnect) or time is up (504)."""
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(request.receive))
    try:
        left = deadline - asyncio.get_running_loop().time()
        await asyncio.wait({doing, gone}, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        if gone.done():
            raise ClientDisconnect
        raise _late(request.app.state.service)
    finally:
        gone.cancel()
        doing.cancel()
        await asyncio.wait({doing, gone})
        if not doing.cancelled():
            doing.exception()


async def _left(receive):
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def _in_time(service):
    try:
        async with asyncio.timeout(service.config.request_timeout):
            yield
    except TimeoutError as error:
        raise _late(service) from error


def _late(service):
    seconds = service.config.request_timeout
    return ApiError(504, f"the request took longer than {seconds:g} s (--request_timeout)", code="timeout")


def _models(service) -> Callable[[Request], Awaitable[Response]]:
    async def models(request: Request) -> Response:
        """GET /v1/models, and of one of them."""
        model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "fastvid"}
        asked = request.path_params.get("name")
        if asked is None:
            return _json({"object": "list", "data": [model]})
        if asked != service.name:
            raise protocol.no_model(asked, service.name)
        return _json(model)

    return models


def _health(service) -> Callable[[Request], Awaitable[Response]]:
    async def health(_: Request) -> Response:
        """GET /health: 200, or 503 of a server that ends, that has failed, or behind which nobody answers."""
        if service.config.upstream is None:
            status = "stopping" if service.stopping else "ok" if service.alive else "failed"
            return _json({"status": status}, 200 if status == "ok" else 503)
        fault = await service.upstream_fault()
        status = "stopping" if service.stopping else "no upstream" if fault else "ok"
        return _json({"status": status, "upstream": fault or "ok"}, 200 if status == "ok" else 503)

    return health


def _metrics(service) -> Callable[[Request], Awaitable[Response]]:
    async def metrics(_: Request) -> Response:
        """GET /metrics."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return metrics


def _refusal(error, headers=None) -> Response:
    headers = dict(headers or {})
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 408:  # what still comes would be the rest of its body
        headers["Connection"] = "close"
    return _json(error.content(), error.status, headers)


def _json(value, status=200, headers=None) -> Response:
    """ASCII, as any half of a character in a message then stays one."""
    return Response(json.dumps(value), status, headers, "application/json")
