"""A thread that continues the answers of all requests together: `Batcher`, asked from an event loop."""

import asyncio
import logging
import queue
import threading
from contextlib import suppress
from typing import Any

from fastvid.inference.chat import Chat
from fastvid.inference.requests import Request
from fastvid.serving.errors import ApiError

log = logging.getLogger("fastvid")


class Answer:
    """An answer on its way; of the event loop.

    Args:
        longest: tokens that it may have.
    """

    def __init__(self, request: Request, longest: int, engine: "Engine"):
        self._longest, self._request, self._engine = longest, request, engine
        self._events: asyncio.Queue[list[int] | Exception | None] = asyncio.Queue()
        self.sent = 0

    async def more(self) -> list[int] | None:
        """The ids that have come since; None when there will be no more.

        Raises:
            ApiError: 500, the model failed.
        """
        event = await self._events.get()
        if isinstance(event, Exception):
            raise ApiError(500, "the model failed; the server's log says how") from event
        return event

    def finish(self, tokens: int) -> str:
        """Why it has ended after so many tokens."""
        return "length" if tokens >= self._longest else "stop"

    def counted(self, tokens: int) -> int:
        """Its tokens, of which so many have come."""
        return tokens

    def give_up(self) -> None:
        """Free its place, if it has one still."""
        self._engine.give_up(self._request.key)

    def tell(self, event: list[int] | Exception | None) -> None:
        """In the event loop: what `more` returns."""
        self._events.put_nowait(event)


class Engine:
    """Answers requests of an event loop in a thread of its own, which alone uses the model.

    Args:
        chat: whose model it is.
        at_once, cache_bytes: as for `Chat.batcher`.

    Attributes:
        state: "running" and "waiting" requests, bytes of "kept" beginnings and how many were "found" again, as of the
            last step.
    """

    def __init__(self, chat: Chat, *, at_once: int, cache_bytes: int | None = None):
        self._batcher = chat.batcher(at_once, cache_bytes, keep_beginnings=True)
        self._inbox: queue.SimpleQueue[tuple[Any, Request | None] | None] = queue.SimpleQueue()
        self._answers: dict[Any, Answer] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._held: set[Any] = set()  # keys of what the batcher has; of the thread
        self.state = {"running": 0, "waiting": 0, "kept": 0, "found": 0}
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin, from the event loop that requests come from."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, request: Request) -> Answer:
        """Let a request wait for its turn.

        Raises:
            ValueError: as `Batcher.check`.
        """
        answer = Answer(request, self._batcher.check(request), self)
        self._answers[request.key] = answer
        self._inbox.put((request.key, request))
        return answer

    def give_up(self, key: Any) -> None:
        """Forget a request; one that is answered is forgotten already."""
        if self._answers.pop(key, None) is not None:
            self._inbox.put((key, None))

    def close(self) -> None:
        """End the thread after the step in hand."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self):
        while self._take_in():
            try:
                ended = self._batcher.step()
            except Exception as error:  # of memory, most likely; who comes next may do
                log.exception("the model failed; %d answers are lost", len(self._held))
                self._batcher.reset()
                lost, self._held = self._held, set()
                self._deliver([], [(key, error) for key in lost])
            else:
                failed = self._batcher.failed
                for why in failed.values():
                    log.error("an answer is lost: %s", why)
                self._held -= {key for key, _ in ended} | failed.keys()
                running = [*self._batcher.running(), *ended]
                over = [*((key, None) for key, _ in ended), *failed.items()]
                self._deliver([(key, list(ids)) for key, ids in running], over)
            self._publish()

    def _take_in(self):
        """Requests that came and went; waits for one where there is nothing to do. False: the end."""
        while True:
            try:
                item = self._inbox.get(block=not len(self._batcher))
            except queue.Empty:
                return True
            if item is None:
                return False
            key, request = item
            if request is None:
                self._batcher.cancel(key)
                self._held.discard(key)
            else:
                try:
                    self._batcher.add(request)
                except Exception as error:  # this thread answers everybody
                    log.exception("a request cannot be begun")
                    self._deliver([], [(key, error)])
                else:
                    self._held.add(key)
            self._publish()

    def _publish(self):
        running = sum(1 for _ in self._batcher.running())
        self.state = {
            "running": running,
            "waiting": len(self._batcher) - running,
            "kept": self._batcher.kept_bytes,
            "found": self._batcher.found,
        }

    def _deliver(self, grown, ended):
        """Tell answers what came: (key, ids so far), and (key, why or None) of those that end."""

        def deliver():
            for key, ids in grown:
                answer = self._answers.get(key)
                if answer is not None and len(ids) > answer.sent:
                    answer.tell(ids[answer.sent :])
                    answer.sent = len(ids)
            for key, why in ended:
                if answer := self._answers.pop(key, None):
                    answer.tell(why)

        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(deliver)
