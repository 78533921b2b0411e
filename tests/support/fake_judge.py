"""A judge on a local HTTP server that answers as a test wants: well, badly, late or not at all."""

import json
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from socketserver import BaseRequestHandler, ThreadingTCPServer

import local_server
from local_server import serving

GOOD = '{"pred": "yes", "score": 4}'


def wrap(text):
    """A completion, as the interface has it."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


class FakeJudge:
    """What the server was asked, and its address.

    Attributes:
        url: for --judge.
        bodies: of all requests, in the order of their coming.
        headers: of all requests.
    """

    def __init__(self, url):
        self.url, self.bodies, self.headers, self.released = url, [], [], threading.Event()

    @property
    def asked(self):
        """{the user's message: how often it was graded}."""
        return Counter(body["messages"][1]["content"] + body["messages"][0]["content"] for body in self.bodies)


@contextmanager
def fake_judge(answer):
    """A server for as long as the context lasts.

    Args:
        answer: from (number of the request, its body) to a reply's text; to (status, text) of another answer; to
            seconds that it keeps silent, or None to wait until the end.
    """
    lock = threading.Lock()

    class Handler(local_server.Handler):
        def do_POST(self):
            body = json.loads(self.sent())
            with lock:
                number = len(judge.bodies)
                judge.bodies.append(body)
                judge.headers.append(dict(self.headers))
            found = answer(number, body)
            if found is None or isinstance(found, float):
                judge.released.wait(found)
                found = GOOD
            status, content = found if isinstance(found, tuple) else (200, wrap(found))
            with suppress(OSError):  # who asked has gone
                self.reply(status, content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge = FakeJudge(f"http://127.0.0.1:{server.server_port}/v1")
    with serving(server, judge.released.set):
        yield judge


@contextmanager
def raw_server(talk):
    """A server that has `talk` do what it likes with each connection's socket, once the request's head is read."""
    ended = threading.Event()

    class Handler(BaseRequestHandler):
        def handle(self):
            with suppress(OSError):
                self.request.recv(1 << 16)
                talk(self.request, ended)

    server = ThreadingTCPServer(("127.0.0.1", 0), Handler)
    with serving(server, ended.set):
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
