"""The server itself: its socket, what a connection may do, and how it ends."""

import asyncio
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastvid.config import ServeConfig
from fastvid.serving.app import app
from fastvid.serving.service import Service

log = logging.getLogger("fastvid")

_SILENT = 30.0  # seconds that a connection may take for a request's head, or be idle
_STALLED = 30.0  # seconds that a client may read nothing of what is sent to it
_CONNECTIONS = 4096


def bind(config: ServeConfig) -> socket.socket:
    """A socket at the address that the flags name; it listens once the server starts.

    Raises:
        ValueError: there it cannot.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with ExitStack() as opened:
            listener = opened.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            opened.pop_all()
    except socket.gaierror as error:
        raise ValueError(
            f"--host {config.host} is no address of this machine ({error.strerror}): give 127.0.0.1, or 0.0.0.0 for all"
        ) from error
    except OSError as error:
        raise ValueError(
            f"--host {config.host} --port {config.port} cannot be used ({error.strerror}): give another port, or end "
            "what listens there"
        ) from error
    return listener


def address(listener: socket.socket) -> str:
    """The URL of a server on a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def of_this_machine(listener: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _names(service, listener):
    """Hosts that requests may name; None: any, as what keeps others out is a key or nothing."""
    if service.api_key is not None or not of_this_machine(listener):
        return None
    return {"localhost", "127.0.0.1", "::1", service.config.host.lower()}


class Server(uvicorn.Server):
    """Serves a `Service` until a signal, or `end`; then lets what is in hand be answered.

    Args:
        service: which it starts and closes.
        listener: as `bind` gives it.
        ready: told the server's URL once it answers.
    """

    def __init__(self, service: Service, listener: socket.socket, ready: Callable[[str], object] | None = None):
        super().__init__(
            uvicorn.Config(
                app(service, _names(service, listener)),
                http=GuardedProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=_CONNECTIONS,
                backlog=1024,
                timeout_graceful_shutdown=5,
            )
        )
        self._service, self._listener, self._ready = service, listener, ready
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve_until_told(self) -> None:
        """Serve."""
        asyncio.run(self.serve([self._listener]))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and self._ready is not None:
            await asyncio.to_thread(self._ready, address(self._listener))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM and SIGINT: refuse what comes, answer what is there; a second SIGINT ends at once."""
        if self._service.stopping and sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
        elif not self._service.stopping:
            self.end()

    def end(self) -> None:
        """Refuse what comes, answer what is there, then end. From any thread."""
        self._service.stopping = True
        if self._loop is None:
            self.should_exit = True
        else:
            asyncio.run_coroutine_threadsafe(self._drain(), self._loop)

    async def _drain(self):
        until = asyncio.get_running_loop().time() + self._service.config.grace
        log.info("stopping: requests in hand have %g s", self._service.config.grace)
        while not self._service.idle and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.05)
        self.should_exit = True


class GuardedProtocol(H11Protocol):
    """HTTP of one connection, which costs the server little however slow the client is.

    A connection without a request in hand is closed after a while: so no client keeps one by sending a head byte by
    byte. One whose client reads nothing is closed as well, so that no answer waits for it for ever.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._silent: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        self._watch()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self):
        """Count the time while there is no request in hand."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._silent = _cancelled(self._silent)
        elif self._silent is None:
            self._silent = self.loop.call_later(_SILENT, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(_STALLED, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled = _cancelled(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._silent, self._stalled = _cancelled(self._silent), _cancelled(self._stalled)


def _cancelled(timer):
    if timer is not None:
        timer.cancel()
