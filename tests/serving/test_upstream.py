"""A server that answers with another one, which gets the projected rows: a stand-in for vLLM here."""

import json
import socket
import threading
from contextlib import ExitStack

import pytest
import torch
from fake_judge import raw_server
from fake_vllm import MODEL, chunk, fake_vllm, whole
from serving_run import asking, served, text_of
from waiting import wait_until

from fastvid.config import ChatConfig
from fastvid.inference.chat import Chat
from fastvid.inference.source import VideoSource
from fastvid.serve import main
from fastvid.serving.server import Server

pytestmark = pytest.mark.usefixtures("forked")  # decoders


@pytest.fixture(scope="module")
def source(serving_folder):
    """What makes the rows; it has no language model."""
    settings = {"device": "cpu", "num_frames": 12, "question_order": "video_first"}
    source = VideoSource(ChatConfig(str(serving_folder / "model"), **settings))
    assert not hasattr(source, "model")
    yield source
    source.close()


@pytest.fixture
def before(source, serving_folder):
    """before(answer, …): (a server, the one behind it, which answers so)."""
    with ExitStack() as stack:

        def start(answer, **settings):
            behind = stack.enter_context(fake_vllm(answer))
            settings = {"upstream": behind.url, "allowed_folder": str(serving_folder / "videos"), **settings}
            return stack.enter_context(served(source, serving_folder / "model", **settings)), behind

        yield start


@pytest.fixture
def video(serving_folder):
    return f"file://{serving_folder}/videos/9.mp4"


def test_the_rows_and_the_conversation_are_sent(before, serving_chat, serving_folder, video):
    running, behind = before(lambda *_: whole(" plays", " cards ", "\n"))
    history = (("what?", "cards"),)
    asked = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["\n\n"], "max_tokens": 9}
    status, content = running.ask(video, "who is?", history, **asked)
    assert status == 200, content
    assert text_of(content) == ("plays cards", "stop")
    (body,) = behind.bodies
    clip = serving_folder / "videos" / "9.mp4"
    assert torch.equal(behind.rows[0], serving_chat.embeddings(clip))
    assert {name: body[name] for name in asked} == asked
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    texts = [part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"]
    assert [*texts, *(message["content"] for message in body["messages"][1:])] == ["what?", "cards", "who is?"]
    prompt = serving_chat.prompt(serving_chat.features(clip), "who is?", history)
    assert content["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 4,
        "total_tokens": len(prompt) + 4,
    }
    status, content = running.ask(video)
    assert status == 200
    assert behind.bodies[1].keys() == {"model", "messages", "max_tokens", "temperature", "stream", "stream_options"}
    assert behind.bodies[1]["max_tokens"] == 12 and behind.bodies[1]["temperature"] == 0


def test_pieces_pass_through_as_they_come(before, video):
    """The first piece is read while the other server holds the rest."""
    running, behind = before(lambda *_: [chunk(" a"), None, *whole(" b", finish="length")])
    connection = running.connection()
    body = json.dumps(asking(video, stream=True, stream_options={"include_usage": True})).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body)
    said = b""
    while b'"content": "a"' not in said:
        said += connection.recv(1 << 16)
    assert b"[DONE]" not in said
    assert running.metric("fastvid_answers_running") == 1
    behind.open_.set()
    while piece := connection.recv(1 << 16):
        said += piece
    connection.close()
    assert b'"content": " b"' in said and b'"finish_reason": "length"' in said and b"[DONE]" in said
    assert b'"completion_tokens": 2' in said
    wait_until(lambda: running.metric("fastvid_answers_running") == 0)
    assert running.metric('fastvid_tokens_total{kind="answer"}') == 2
    assert running.metric("fastvid_first_token_seconds_count") == 1


def test_who_leaves_has_the_other_server_stop(before, video):
    running, behind = before(lambda *_: [chunk("a"), None, *whole("b")])
    connection = running.connection()
    body = json.dumps(asking(video, stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    said = b""
    while b'"content": "a"' not in said:
        said += connection.recv(1 << 16)
    connection.close()
    wait_until(lambda: behind.left == 1)
    wait_until(lambda: running.metric("fastvid_answers_running") == 0)


def test_others_wait_for_a_place(before, video):
    running, behind = before(lambda *_: [None, *whole("b")], at_once=2, max_waiting=1)
    statuses = []
    threads = [threading.Thread(target=lambda: statuses.append(running.ask(video)[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: running.metric("fastvid_answers_waiting") == 1 and len(behind.bodies) == 2)
    assert running.metric("fastvid_answers_running") == 2
    assert running.ask(video)[0] == 429  # --max_waiting
    behind.open_.set()
    for thread in threads:
        thread.join(60)
    assert statuses == [200] * 3


ERRORS = [
    ((400, {}, '{"error": {"message": "too long", "code": 400}}'), 400, "answers 400: too long", None),
    ((400, {}, '{"object": "error", "message": "set `--enable-mm-embeds`"}'), 400, "`--enable-mm-embeds`", None),
    ((401, {}, '{"error": "Unauthorized"}'), 502, "answers 401: Unauthorized", None),
    ((404, {}, "no JSON"), 502, "(--upstream) answers 404", None),
    ((429, {"Retry-After": "17"}, "{}"), 429, "answers 429", "17"),
    ((503, {"Retry-After": "soon"}, "{}"), 503, "answers 503", "5"),
    ((504, {}, ""), 504, "answers 504", None),
    ((500, {}, "x" * 5000), 502, "answers 500", None),
    ((302, {"Location": "http://127.0.0.1:9/"}, ""), 502, "answers 302", None),
]


@pytest.mark.parametrize("answer, status, message, later", ERRORS)
def test_refusals_have_clear_codes(before, video, answer, status, message, later):
    """Before the answer has begun, also of one that is to be streamed."""
    running, _ = before(lambda *_: answer)
    for stream in (False, True):
        found, headers, content = running.post(asking(video, stream=stream))
        assert found == status, content
        assert message in content["error"]["message"]
        assert len(content["error"]["message"]) < 500
        assert headers.get("retry-after") == later


@pytest.mark.parametrize(
    "events, message",
    [
        ([chunk("a"), json.dumps({"error": {"message": "out of memory"}}), "[DONE]"], "failed: out of memory"),
        ([chunk("a"), "{"], "sends what is no JSON"),
        ([chunk("a"), "[1]"], "sends what is no JSON"),
        ([chunk("a")], "ended within its answer"),
        ([chunk("a"), "x" * (2 << 20)], "an event without an end"),
    ],
)
def test_answers_that_break_off_are_told(before, video, events, message):
    running, _ = before(lambda *_: events)
    status, content = running.ask(video)
    assert status == 502
    assert message in content["error"]["message"]
    *_, last = running.stream(video)
    assert message in last["error"]["message"]
    wait_until(lambda: running.metric('fastvid_requests_total{path="/v1/chat/completions",status="502"}') == 2)


def test_other_events_change_nothing(before, video):
    odd = [json.dumps(value) for value in ({}, {"choices": [3]}, {"choices": [{"delta": None}]}, {"usage": 3})]
    running, _ = before(lambda *_: [*odd, *whole("a", "b", finish="abort")])
    assert text_of(running.ask(video)[1]) == ("ab", "stop")


@pytest.mark.slow
def test_a_server_that_is_not_there_or_keeps_silent(source, serving_folder, video):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        settings = {"allowed_folder": str(serving_folder / "videos"), "upstream_model": MODEL}
        with served(source, serving_folder / "model", upstream=url, **settings) as running:
            status, content = running.ask(video)
            assert (status, content["error"]["code"]) == (502, "upstream_unreachable")
            assert url not in content["error"]["message"]
            status, _, content = running.call("GET", "/health")
            assert (status, content) == (503, {"status": "no upstream", "upstream": "cannot be reached"})
    with (
        raw_server(lambda connection, ended: ended.wait(60)) as url,
        served(source, serving_folder / "model", upstream=url, request_timeout=1.0, **settings) as running,
    ):
        status, content = running.ask(video)
        assert status == 504
        status, _, content = running.call("GET", "/health")
        assert (status, content["upstream"]) == (503, "does not answer in time")


def test_health_says_whether_it_answers(before, video):
    running, _ = before(lambda *_: whole("a"))
    assert running.call("GET", "/health")[::2] == (200, {"status": "ok", "upstream": "ok"})
    running.service.stopping = True
    assert running.call("GET", "/health")[::2] == (503, {"status": "stopping", "upstream": "ok"})


def test_its_model_is_the_only_one_or_named(before, video, source, serving_folder):
    running, behind = before(lambda *_: whole("a"))
    behind.names = [MODEL, "other"]
    status, content = running.ask(video)
    assert status == 502
    assert "names 2 models: name one by --upstream_model" in content["error"]["message"]
    settings = {"allowed_folder": str(serving_folder / "videos"), "upstream": f"{behind.url}/v1/"}
    with served(source, serving_folder / "model", upstream_model=MODEL, **settings) as named:
        assert named.ask(video)[0] == 200


def test_the_key_is_sent(before, video, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    running, behind = before(lambda *_: whole("a"))
    assert running.ask(video)[0] == 200
    assert behind.headers[0]["Authorization"] == "Bearer s3cret"


def test_what_cannot_be_asked_is_not_sent(before, video):
    running, behind = before(lambda *_: whole("a"))
    status, content = running.ask(video, "what is <vid_patch>?")
    assert status == 400
    assert "<vid_patch>" in content["error"]["message"]
    status, content = running.ask(video, "x y " * 700)
    assert status == 400
    assert "shorten the question" in content["error"]["message"]
    assert behind.bodies == []


def test_flags_of_the_language_model_are_refused(serving_folder, tmp_path, monkeypatch):
    flags = ["--model_name_or_path", str(serving_folder / "model"), "--port", "0", "--device", "cpu"]
    monkeypatch.setattr(Server, "serve_until_told", lambda server: None)
    with pytest.raises(ValueError, match="--upstream localhost:1 is no address; give one such as http://"):
        main([*flags, "--upstream", "localhost:1"])
    flags += ["--upstream", "http://localhost:8001/v1"]
    with pytest.raises(ValueError, match="--kv_cache_gib concerns the language model.*leave it out here"):
        main([*flags, "--kv_cache_gib", "1"])

    def loads(*_):
        raise AssertionError("the language model is loaded")

    monkeypatch.setattr(Chat, "__init__", loads)
    assert main(flags) == 0
