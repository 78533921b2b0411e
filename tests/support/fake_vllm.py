"""A stand-in for vLLM's server: takes requests of its form alone, and answers as a test wants."""

import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

import local_server
import torch
from local_server import serving

MODEL = "exported-hf"
# What vLLM's ChatCompletionRequest has of what is sent; it takes others with a warning, and this one does not.
FIELDS = {
    *("model", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"),
}


class FakeVllm:
    """What the server was asked, and its address.

    Attributes:
        url: of it.
        bodies: of all requests, in the order of their coming; rows: the tensor in each.
        headers: of all requests.
        left: how many clients left before their answer's end.
        names: of its models.
        open_: answers that are held go on once this is set.
    """

    def __init__(self, url):
        self.url, self.bodies, self.rows, self.headers, self.left = url, [], [], [], 0
        self.names, self.open_ = [MODEL], threading.Event()


def read(body):
    """The tensor in a request, whose form is checked as vLLM does."""
    assert body.keys() <= FIELDS
    assert body["model"] == MODEL
    first, *others = body["messages"]
    parts = {part["type"]: part for part in first["content"]}
    assert parts.keys() == {"image_embeds", "text"} and len(first["content"]) == 2
    assert parts["image_embeds"].keys() == {"type", "image_embeds"} and parts["text"].keys() == {"type", "text"}
    assert all(isinstance(message["content"], str) for message in others)
    assert [message["role"] for message in body["messages"]] == ["user", "assistant"] * (len(others) // 2) + ["user"]
    content = base64.b64decode(parts["image_embeds"]["image_embeds"], validate=True)
    rows = torch.load(io.BytesIO(content), weights_only=True)
    assert isinstance(rows, torch.Tensor) and rows.dim() == 2 and rows.is_floating_point()
    return rows


def chunk(text=None, finish=None, usage=None):
    """An event of vLLM's stream."""
    delta = {} if text is None else {"content": text}
    choices = [] if usage else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    value = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": MODEL, "choices": choices}
    return json.dumps(value | ({"usage": usage} if usage else {}))


def whole(*texts, finish="stop"):
    """The events of an answer, as vLLM sends them where usage is asked for."""
    usage = {"prompt_tokens": 1, "completion_tokens": len(texts) + 1, "total_tokens": len(texts) + 2}
    role = json.dumps({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    return [role, *map(chunk, texts), chunk(finish=finish), chunk(usage=usage), "[DONE]"]


@contextmanager
def fake_vllm(answer):
    """A server for as long as the context lasts.

    Args:
        answer: from (number of the request, its body) to a list of events, in which None waits for `open_`; or to
            (status, headers, text) of another answer.
    """
    lock = threading.Lock()

    class Handler(local_server.Handler):
        def do_GET(self):
            assert self.path == "/v1/models"
            self.reply(200, json.dumps({"object": "list", "data": [{"id": name} for name in fake.names]}))

        def do_POST(self):
            body = json.loads(self.sent())
            try:
                assert self.path == "/v1/chat/completions"
                assert self.headers["Content-Type"] == "application/json"
                rows = read(body)
            except Exception as error:
                self.reply(400, json.dumps({"error": {"message": f"bad form: {error!r}"}}))
                return
            with lock:
                number = len(fake.bodies)
                fake.bodies.append(body)
                fake.rows.append(rows)
                fake.headers.append(dict(self.headers))
            found = answer(number, body)
            if isinstance(found, tuple):
                status, headers, text = found
                self.reply(status, text, headers)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Connection", "close")
            self.end_headers()
            try:
                for event in found:
                    if event is None:
                        # Something has to be written for a client that left to be noticed.
                        while not fake.open_.wait(0.02):
                            self.wfile.write(b": wait\n\n")
                    else:
                        self.wfile.write(f"data: {event}\n\n".encode())
            except OSError:
                with lock:
                    fake.left += 1

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake = FakeVllm(f"http://127.0.0.1:{server.server_port}")
    with serving(server, fake.open_.set):
        yield fake
