"""Requests that are meant to do harm: each has an answer that blames the client, and the server goes on."""

import copy
import gzip
import json
import os

import pytest
from serving_run import asking, text_of, uri

ODD = [None, True, -1, 0, 10**40, 1e308, 5e-324, "", "x", "\ud800\0", [], [[]], {}, {"a": 1}, [None] * 3]


def places(value, path=()):
    """Paths to all values within a JSON value, itself apart."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.slow
def test_no_value_of_an_odd_kind_is_the_servers_fault(server, serving_folder):
    """In the place of each value of a request that is good, and in fields that it does not have."""
    good = asking(uri(serving_folder / "videos" / "4.mp4"), max_tokens=2)
    good |= {"model": "model", "temperature": 0.5, "top_p": 0.5, "seed": 1, "stop": ["x"], "stream": False}
    good |= {"stream_options": {"include_usage": False}, "n": 1, "logit_bias": {}, "tools": [], "user": "u"}
    assert server.post(good)[0] == 200
    found = set()
    for path in places(good):
        for odd in ODD:
            body = copy.deepcopy(good)
            place = body
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = odd
            status, _, content = server.post(body)
            found.add(status)
            assert status in (200, 400, 404, 413, 415), (path, odd, status, content)
            assert status == 200 or "log says" not in content["error"]["message"]
    assert {200, 400, 404} <= found
    assert server.post(good)[0] == 200


def test_many_messages_are_read_or_refused_soon(server, serving_folder):
    one = asking(uri(serving_folder / "videos" / "4.mp4"))["messages"]
    more = [{"role": ("assistant", "user")[i % 2], "content": "a"} for i in range(10_000)]
    status, _, content = server.post({"messages": one + more, "max_tokens": 2})
    assert status == 400 and "tokens" in content["error"]["message"]
    parts = [{"type": "text", "text": ""}] * 100_000
    assert server.post({"messages": [{"role": "user", "content": parts}]})[0] == 400


def test_a_conversation_goes_on_behind_an_answer_of_nothing(server, serving_folder):
    aside = {"media_io_kwargs": {"video": {"num_frames": 32}}, "chat_template_kwargs": {"enable_thinking": False}}
    body = asking(uri(serving_folder / "videos" / "4.mp4"), history=[("who?", "")], max_tokens=2, top_k=-1, min_p=0.0)
    body |= aside
    texts = set()
    for content in ("", None, []):
        body["messages"][1]["content"] = content
        status, _, found = server.post(body)
        assert status == 200, found
        texts.add(text_of(found))
    assert len(texts) == 1
    body["messages"][2]["content"] = ""
    assert server.post(body)[0] == 400


def test_the_last_of_two_fields_of_a_name_counts(server, serving_folder):
    """As for every reader of JSON that others put in front."""
    body = json.dumps(asking(uri(serving_folder / "videos" / "4.mp4"), max_tokens=3))
    twice = f'{{"temperature": 9, {body[1:-1]}, "temperature": 0, "max_tokens": 2}}'.encode()
    status, _, content = server.post(twice)
    assert status == 200 and content["usage"]["completion_tokens"] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gzip", "br", "identity, gzip"])
def test_a_body_is_never_unpacked(server, kind):
    status, _, content = server.post(gzip.compress(b" " * 10**8), content_encoding=kind)
    assert status == 400 and "no JSON" in content["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/health", "/metrics"])
@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "TRACE", "PATCH", "BREW"])
def test_other_methods(server, path, method):
    status, headers, _ = server.call(method, path)
    assert (status == 405 and "GET" in headers["allow"]) or "POST" in headers["allow"]
    assert "access-control-allow-origin" not in headers


def test_a_head_has_no_body(server):
    for path, status in (("/v1/models", 200), ("/health", 200), ("/v1/chat/completions", 405)):
        with server.connection() as connection:
            connection.sendall(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 %d " % status) and answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/%00",
        "/v1/models/%ff%fe",
        "/v1/models/..%2f..%2fetc",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/ü",
        "/" + "a" * 9000,
    ],
)
def test_strange_paths_lead_nowhere(server, path):
    status, _, content = server.call("GET", path.encode("utf-8", "surrogateescape").decode("latin-1"))
    assert status in (400, 404)
    assert b"root:" not in json.dumps(content).encode() if isinstance(content, dict) else b"root:" not in content


RAW = {
    "both lengths": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n",
    "two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "a negative length": b"Content-Length: -5\r\n\r\n",
    "a length of letters": b"Content-Length: five\r\n\r\n",
    "a chunk without end": b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n",
    "a chunk of no size": b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a head without end": b"X: " + b"a" * 200_000,
    "a line feed in a name": b"X\n: 1\r\n\r\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", RAW)
def test_heads_that_are_none(server, what):
    """One answer at most, and the connection is closed: nothing behind it is taken for a request."""
    with server.connection() as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n" + RAW[what])
        answer = b""
        try:
            while piece := connection.recv(1 << 16):
                answer += piece
        except ConnectionResetError:
            pass
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413", b"HTTP/1.1 415")) or not answer
    assert answer.count(b"HTTP/1.1") <= 1
    assert server.call("GET", "/health")[0] == 200


def test_files_that_are_none(server, serving_folder, tmp_path):
    """Folders, pipes, loops of links, and names that mean them."""
    videos = serving_folder / "videos"
    made = [videos / name for name in ("loop", "pipe", "out", "folder.mp4")]
    try:
        made[0].symlink_to(made[0])
        os.mkfifo(made[1])
        made[2].symlink_to("/proc/self/environ")
        made[3].mkdir()
        escaped = "%2e%2e/" * 12 + "etc/passwd"
        for name in ("loop", "pipe", "out", "folder.mp4", "", ".", "..", escaped, "4.mp4/..", "4.mp4%00.mp4"):
            status, content = server.ask(f"file://{videos}/{name}", max_tokens=2)
            assert (status, content["error"]["type"]) == (400, "invalid_request_error"), (name, content)
    finally:
        for path in made[:3]:
            path.unlink(missing_ok=True)
        made[3].rmdir()
    status, content = server.ask(f"file://{videos}/4.mp4", max_tokens=2)
    assert status == 200 and text_of(content)[1] in ("stop", "length")
