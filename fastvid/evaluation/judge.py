"""Second stage: a language model grades predictions, over any HTTP interface like OpenAI's; a line for each reply in
``judgements.jsonl``.

What is asked decides a judgement's key: the judge's name and the messages. A reply that is there is never asked for
again, one that cannot be read included: those are counted and told, and are no score. Who does not answer at all is
asked again by the next run.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from fastvid.evaluation.grading import Ask, is_one_object, read_reply
from fastvid.evaluation.lines import Lines, read_lines
from fastvid.files import StrPath, shown
from fastvid.inference.deadlines import at, bounded

log = logging.getLogger("fastvid")

JUDGEMENTS = "judgements"
BACKOFF = 1.0  # seconds before the second of several retries, twice as many before each later one
_LONGEST_PAUSE = 60.0  # seconds before a retry, whatever the server wishes
_MOST_BYTES = 1 << 20  # of a reply
_MOST_KEPT = 1 << 13  # letters of a reply
_SECRET = 8  # letters of a key that is one; shorter ones, such as "EMPTY", may be words of a reply
_AGAIN = (429, 500, 502, 503, 504)
_REFUSALS = (401, 403, 404)  # every request would meet them
_TOO_LONG = (400, 413, 422)  # or otherwise not what the server takes: this request alone
_SILENCES = 16  # failures in a row after which the judge is given up


class Reply(NamedTuple):
    """What a judge says; `cut`: it had more to say than it was allowed tokens."""

    text: str
    cut: bool = False


class NoAnswer(Exception):
    """The judge did not answer one request: a later run asks again."""


class NotTaken(NoAnswer):
    """The judge is there, and refuses this request, such as one that is too long for it."""


class Judge:
    """A model behind an HTTP interface like OpenAI's.

    Args:
        url: of the interface, such as http://localhost:8000/v1.
        model: name that it knows the model by.
        key: sent as a bearer token; None sends none.
        timeout: seconds for one reply.
        retries: of a request that fails in a way that may pass (no connection, 429, 500 and the like).
        max_tokens: longest reply.

    Attributes:
        address: the URL, as it was given.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        max_tokens: int = 512,
    ):
        import urllib3
        from urllib3.util import parse_url

        self.address, self.model, self._timeout, self._retries = url.rstrip("/"), model, timeout, retries
        self._url = self.address + "/chat/completions"
        self.max_tokens = max_tokens
        self._key, self._headers = key, {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        # Of urllib3's own retries each reads a refusal to its end, and sleeps as long as the server says.
        self._pool = urllib3.connection_from_url(
            self._url, maxsize=64, retries=False, timeout=urllib3.Timeout(connect=min(10, timeout), read=timeout)
        )
        self._pool.ConnectionCls = bounded(self._pool.ConnectionCls, timeout)
        self._path = parse_url(self._url).request_uri
        self._as_json = True  # ask for JSON, until the server refuses that
        self._stopped = threading.Event()
        self._told: set[int] = set()  # numbers of the retries of which the first was told

    def stop(self) -> None:
        """Try nothing again: requests that are under way end with their next answer or failure, or in their pause."""
        self._stopped.set()

    def reply(self, messages: Iterable[dict]) -> Reply:
        """What the model replies, at temperature 0.

        Raises:
            NoAnswer: it does not answer this request.
            ValueError: it refuses all requests: a wrong URL, model or key.
        """
        body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": self.max_tokens}
        as_json = self._as_json
        status, content = self._post(body | ({"response_format": {"type": "json_object"}} if as_json else {}))
        if status in _TOO_LONG and as_json:
            status, content = self._post(body)
            self._as_json = status != 200 and self._as_json
        if 300 <= status < 400:
            raise ValueError(
                f"the judge at {self._url} sends requests elsewhere (status {status}), and is not followed: give "
                "--judge the address that answers itself"
            )
        if status in _REFUSALS:
            raise ValueError(
                f"the judge at {self._url} refuses with status {status} ({_excerpt(content)}): check --judge, "
                "--judge_model, and the key in the variable that --judge_key_variable names"
            )
        if status != 200:
            raise (NotTaken if status in _TOO_LONG else NoAnswer)(f"status {status} ({_excerpt(content)})")
        try:
            choice = json.loads(content)["choices"][0]
            text, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise NoAnswer(f"it sent no completion ({_excerpt(content)})") from error
        return Reply(text if isinstance(text, str) else "", cut)

    def _post(self, body) -> tuple[int, bytes]:
        """(status, body of the answer), after as many tries as it takes."""
        content = json.dumps(body).encode("ascii")
        tried = 0
        while True:
            pause = min(_LONGEST_PAUSE, BACKOFF * 2 ** (tried - 1)) if tried else 0
            last = tried >= self._retries
            try:
                status, answer, told = self._once(content)
            except _MayPass as error:
                if last:
                    raise NoAnswer(str(error)) from error
                why = str(error)
            else:
                if status not in _AGAIN or last:
                    return status, answer
                pause, why = max(pause, min(_LONGEST_PAUSE, told)), f"status {status}"
            tried += 1
            self._tell(tried, why)
            if self._stopped.wait(pause):
                raise NoAnswer("the run ends")

    def _tell(self, tried, why):
        """A line for the first of all requests that are repeated for the first time, for the second time and so on: a
        judge that hangs would otherwise keep a run silent for minutes."""
        if tried not in self._told and not self._stopped.is_set():
            self._told.add(tried)
            log.warning("the judge at %s: %s; retry %d of %d", self.address, why, tried, self._retries)

    def _once(self, content):
        """(status, body, seconds after which the server wants to be asked again)."""
        import urllib3

        end, answer = time.monotonic() + self._timeout, b""
        try:
            response = self._pool.request(
                "POST", self._path, body=content, headers=self._headers, preload_content=False, decode_content=False
            )
            with at(end, response.shutdown):  # a read that waits for more than its own timeout
                while piece := response.read1(1 << 16):
                    answer += piece
                    if len(answer) > _MOST_BYTES or time.monotonic() > end:
                        break
            if len(answer) > _MOST_BYTES or time.monotonic() > end:
                response.close()
                raise NoAnswer(
                    f"its answer does not end within {self._timeout:g} s (--judge_timeout) or {_MOST_BYTES:,} bytes"
                )
            response.release_conn()
        except urllib3.exceptions.HTTPError as error:
            raise _MayPass(self._why(error)) from error
        if self._key and len(self._key) >= _SECRET:
            answer = answer.replace(self._key.encode(), b"***")  # what it says is kept and shown
        told = response.headers.get("Retry-After", "")
        return response.status, answer, int(told) if told.isdecimal() and len(told) < 9 else 0

    def _why(self, error):
        """A failure of urllib3's in words, without the names of its classes."""
        from urllib3 import exceptions

        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or str(cause)
        if isinstance(error, exceptions.NewConnectionError):
            return f"no connection: {reason}"
        if isinstance(error, exceptions.ConnectTimeoutError):
            return "no connection in time"
        late = isinstance(error, exceptions.TimeoutError)
        return f"no reply within {self._timeout:g} s (--judge_timeout)" if late else reason


class _MayPass(Exception):
    """No connection, or one that broke."""


def _excerpt(content):
    return ascii(content[:200].decode(errors="replace"))[1:-1]


def judge_all(judge: Judge, wanted: list[Ask], output: StrPath, *, at_once: int) -> dict[str, str]:
    """Let a judge grade all that has no reply yet; returns {key: why not} of those that got none.

    Raises:
        ValueError: it refuses all requests.
        OSError: it is silent.
    """
    from tqdm import tqdm

    unanswered, silences = {}, 0
    with ExitStack() as held:
        lines = held.enter_context(Lines(Path(output) / f"{JUDGEMENTS}.jsonl"))
        lines_there = read_judgements(output)  # nobody else adds to them now
        known = {line["key"] for line in lines_there if line.get("cut", judge.max_tokens) >= judge.max_tokens}
        todo = list({ask.key: ask for ask in wanted if ask.key not in known}.values())
        if not todo:
            return {}
        progress = held.enter_context(tqdm(total=len(todo), desc="judge", unit=" replies", mininterval=1))
        workers, futures = ThreadPoolExecutor(at_once), {}
        try:
            futures |= {workers.submit(judge.reply, ask.messages): ask for ask in todo}
            for future in as_completed(futures):
                ask = futures.pop(future)
                try:
                    lines.append(_judgement(ask, judge, future.result()))
                    silences = 0
                except NoAnswer as error:
                    unanswered[ask.key] = str(error)
                    silences += not isinstance(error, NotTaken)
                    if silences >= _SILENCES:
                        raise OSError(
                            f"the judge at {judge.address} did not answer {silences} times in a row; the last time: "
                            f"{error}. What it answered before is kept: start the command again once it answers"
                        ) from error
                progress.update()
        finally:
            judge.stop()
            workers.shutdown(cancel_futures=True)
            for future, ask in futures.items():  # of a run that ends early: they are paid for
                if not future.cancelled() and future.exception() is None:
                    lines.append(_judgement(ask, judge, future.result()))
    return unanswered


def _judgement(ask, judge, reply):
    """The line of a reply. One that was cut off is no score, unless nothing can follow it: what is left out might be
    another."""
    line = {
        "key": ask.key,
        "id": ask.id,
        "aspect": ask.aspect,
        "judge": judge.model,
        "url": judge.address,
        "reply": reply.text[:_MOST_KEPT],
    }
    if reply.cut and not is_one_object(reply.text):
        return line | {"fault": f"it was cut off after {judge.max_tokens} tokens", "cut": judge.max_tokens}
    try:
        return line | read_reply(reply.text, ask.aspect)
    except ValueError as error:
        return line | {"fault": str(error)}


def read_judgements(output: StrPath) -> list[dict]:
    """The lines of all replies in a folder.

    Raises:
        ValueError: a line that is no reply's.
    """
    return read_lines(output, JUDGEMENTS, _check_line)


def _check_line(line):
    """Refuse what is no line of `_judgement` (ValueError, KeyError)."""
    if not all(isinstance(line[name], str) for name in ("key", "id", "aspect", "reply")):
        raise ValueError("it is no reply's")
    if not isinstance(line.get("url", ""), str):
        raise ValueError('its "url" is no text')
    if type(line.get("cut", 1)) is not int:
        raise ValueError('its "cut" is no number')
    if "score" in line:
        read_reply(json.dumps({name: line[name] for name in ("score", "pred") if name in line}), line["aspect"])


def key_of(variable: str) -> str | None:
    """The key in an environment variable; None where it is not set.

    Raises:
        ValueError: no header can hold it; the message does not show it.
    """
    key = os.environ.get(variable, "").strip("\n")
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError(
            f"the variable {shown(variable)} holds letters that no key has (spaces, or others beyond ASCII); set it "
            "again"
        )
    return key or None


def check_address(url: str) -> None:
    """Refuse what is no address of a judge, and one that says a secret: addresses are written to files.

    Raises:
        ValueError: with the remedy.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError as error:
        raise ValueError(f"--judge {shown(url)} is no URL; give one such as http://localhost:8000/v1") from error
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "--judge holds more than an address (a user, or something after ? or #); give the address alone, and the "
            "key in the environment variable that --judge_key_variable names"
        )
