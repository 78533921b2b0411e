"""A server in a thread of the test's process, on a port of its own, and requests to it."""

import base64
import json
import socket
import threading
from contextlib import contextmanager

import urllib3
from waiting import wait_until

from fastvid.config import ServeConfig
from fastvid.serving.server import Server, address, bind
from fastvid.serving.service import Service


class Served:
    """A server that runs.

    Attributes:
        url: of it; port: it listens at.
        service: its `Service`; server: its `Server`.
    """

    def __init__(self, service, server, listener):
        self.service, self.server, self.url = service, server, address(listener)
        self.port = listener.getsockname()[1]
        self._pool = urllib3.PoolManager(maxsize=256, retries=False, timeout=120)

    def call(self, method, path, body=None, **headers):
        """(status, headers, body) of an answer; JSON is read."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response = self._pool.request(method, self.url + path, body=body, headers=named)
        content = response.data
        if response.headers.get("content-type", "").startswith("application/json"):
            content = json.loads(content)
        return response.status, response.headers, content

    def ask(self, *arguments, **fields):
        """(status, body) of a chat completion; arguments as `asking`'s."""
        status, _, content = self.post(asking(*arguments, **fields))
        return status, content

    def post(self, value, **headers):
        """(status, headers, body) of a chat completion that a JSON value asks for, or bytes or their pieces."""
        body = json.dumps(value).encode() if isinstance(value, dict) else value
        headers = {"content_type": "application/json", **headers}
        return self.call("POST", "/v1/chat/completions", body, **headers)

    def stream(self, *arguments, **fields):
        """The events of a streamed answer, read from JSON but for the last."""
        body = json.dumps(asking(*arguments, stream=True, **fields)).encode()
        status, headers, content = self.call("POST", "/v1/chat/completions", body, content_type="application/json")
        assert status == 200, content
        assert headers["content-type"].startswith("text/event-stream")
        *events, end = content.decode().split("\n\n")
        assert end == ""
        assert all(event.startswith("data: ") for event in events)
        return [event[6:] if event[6:] == "[DONE]" else json.loads(event[6:]) for event in events]

    def metric(self, line):
        """The value of a line of /metrics; 0 of one that is not there yet."""
        lines = dict(each.rsplit(" ", 1) for each in self.call("GET", "/metrics")[2].decode().splitlines())
        return float(lines.get(line, 0))

    def connection(self, receive_bytes=None):
        """A bare connection to it."""
        made = socket.socket()
        if receive_bytes is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        made.settimeout(60)
        made.connect(("127.0.0.1", self.port))
        return made


@contextmanager
def served(chat, model, **settings):
    """A server for as long as the context lasts."""
    config = ServeConfig(str(model), port=0, **{"max_new_tokens": 12, "grace": 5.0, "kv_cache_gib": 0.05, **settings})
    listener = bind(config)
    service = Service(chat, config)
    server = Server(service, listener)
    running = Served(service, server, listener)
    thread = threading.Thread(target=server.serve_until_told)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield running
    finally:
        server.end()
        thread.join(60)
        assert not thread.is_alive()
        listener.close()


def uri(path, kind="video/mp4"):
    """A data URI of a file, or of bytes."""
    content = path if isinstance(path, bytes) else path.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def asking(url, question="what plays?", history=(), **fields):
    """A request for a chat completion about a video, or a list of pictures."""
    kind = "image_url" if isinstance(url, list) else "video_url"
    parts = [{"type": kind, kind: {"url": each}} for each in (url if isinstance(url, list) else [url])]
    texts = [text for turn in history for text in turn] + [question]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    messages[0]["content"] = [{"type": "text", "text": texts[0]}, *parts]
    return {"messages": messages, **fields}


def refused(answer, status, message, **named):
    """Check a refusal's form."""
    found, content = answer if len(answer) == 2 else (answer[0], answer[2])
    assert found == status, content
    assert content["error"].keys() == {"message", "type", "param", "code"}
    assert message in content["error"]["message"]
    assert named.items() <= content["error"].items()


def text_of(answer):
    """(text, finish_reason) of a completion, whole or in events."""
    if isinstance(answer, dict):
        choice = answer["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]
    chunks = [event["choices"][0] for event in answer if event != "[DONE]" and event["choices"]]
    return "".join(chunk["delta"].get("content", "") for chunk in chunks), chunks[-1]["finish_reason"]


@contextmanager
def held_answers(running):
    """Holds a server's answers before their next step; a call of what it gives lets them go on, as does the end."""
    batcher, opened = running.service._engine._batcher, threading.Event()
    step = batcher.step

    def held():
        opened.wait(60)
        return step()

    batcher.step = held
    try:
        yield opened.set
    finally:
        opened.set()
        batcher.step = step
