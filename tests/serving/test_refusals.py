"""What a server does not answer: bad requests, addresses that are not for it, and more than it may take."""

import dataclasses
import errno
import logging
import os
import threading

import pytest
from clips import draw, endless
from PIL import Image
from serving_run import asking, held_answers, refused, served, uri
from waiting import LONG, wait_until

from fastvid.serving import media
from fastvid.serving.errors import ApiError

pytestmark = pytest.mark.usefixtures("forked")  # decoders

VIDEO = "data:video/mp4;base64,AAAA"


def without(*path):
    value = asking(VIDEO)
    place = value
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return value


def messages(*texts, roles=("user", "assistant")):
    value = asking(VIDEO)
    value["messages"] += [{"role": roles[1 - i % 2], "content": text} for i, text in enumerate(texts)]
    return value


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[]", "must be a JSON object"),
        (b"\xff{}", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "no JSON"),
        (without("messages"), "messages: must be a list"),
        (asking(VIDEO) | {"messages": []}, "messages: must be a list"),
        (asking(VIDEO) | {"messages": [1]}, "messages[0]: must be the user's"),
        (without("messages", 0, "content"), "messages[0].content: must be a text or a list"),
        (without("messages", 0, "content", 0), "holds no text"),
        (without("messages", 0, "content", 1), "must hold a video_url"),
        (without("messages", 0, "content", 1, "video_url"), 'must be {"type": "video_url"'),
        (asking([VIDEO, VIDEO]) | {"messages": asking(VIDEO)["messages"] * 2}, "messages[1]: must be the assistant's"),
        (messages("cards"), "must end with the user's question"),
        (messages("cards", ""), "messages[2].content: holds no text"),
        (messages("cards", roles=("user", "system")), "messages[1]: the system text is that of the model's training"),
        ({"messages": [*messages("a")["messages"], asking(VIDEO)["messages"][0]]}, "a video belongs into the first"),
        (asking(VIDEO, question="x" * 100_000), "more than 25,600 characters"),
        (asking(VIDEO, n=2), "n: must be 1"),
        (asking(VIDEO, temperature=-0.1), "temperature: must be 0 to 2"),
        (asking(VIDEO, temperature="hot"), "temperature: must be a number"),
        (asking(VIDEO, temperature=True), "temperature: must be a number"),
        (asking(VIDEO, top_p=1.01), "top_p: must be 0 to 1"),
        (asking(VIDEO, max_tokens=0), "max_tokens: must be 1 or more"),
        (asking(VIDEO, max_completion_tokens=1.5), "max_completion_tokens: must be a whole number"),
        (asking(VIDEO, seed="one"), "seed: must be a whole number"),
        (asking(VIDEO, stop=[""]), "stop: must hold texts of 1 to"),
        (asking(VIDEO, stop=["a"] * 17), "stop: must be a text, or a list of at most 16"),
        (asking(VIDEO, stream="yes"), "stream: must be a truth value"),
        (asking(VIDEO, stream_options=[1]), "stream_options: must be an object"),
        (asking(VIDEO, tools=[{}]), "tools: is not served"),
        (asking(VIDEO, logprobs=True), "logprobs: is not served"),
        (asking(VIDEO, response_format={"type": "json_object"}), "response_format: is not served"),
        (asking(VIDEO, top_k=5), "top_k: is not served"),
        (asking(VIDEO, repetition_penalty=1.1), "repetition_penalty: is not served"),
        (asking(VIDEO, mm_processor_kwargs={"fps": 1}), "mm_processor_kwargs: is not served"),
        (asking(VIDEO, structured_outputs={"choice": ["a"]}), "structured_outputs: is not served"),
        (asking("data:video/mp4;base64,AA!A"), "is not base64"),
        (asking("data:video/mp4,AAAA"), "must begin as data:video/mp4;base64,"),
        (asking("data:video/mp4;base64"), "must begin as data:video/mp4;base64,"),
        (asking(VIDEO), "the file cannot be opened as a video"),
        (asking("data:video/mp4;base64,"), "the file"),
        (asking(["data:image/png;base64,AAAA"]), "the file is no image of a format that is read"),
        (asking("clip.mp4"), "give a data: URI"),
        (asking("ftp://localhost/clip.mp4"), "give a data: URI"),
        (asking("sha256:" + "0" * 64), "is not kept"),
        (asking("\ud800"), "give a data: URI"),
    ],
)
def test_bad_requests(server, body, message):
    refused(server.post(body), 400, message, type="invalid_request_error")
    assert server.metric("fastvid_requests_in_flight") == 0
    assert server.metric("fastvid_body_bytes") == 0


def test_what_the_model_cannot_be_asked(server, serving_folder):
    url = f"file://{serving_folder}/videos/4.mp4"
    refused(server.ask(url, question="half \ud800"), 400, "the text holds")
    refused(server.ask(url, question="a <vid_patch>"), 400, "<vid_patch>")
    refused(server.ask(url, question="card " * 500), 400, "shorten the question")
    refused(server.ask(url, question="half \ud800", stream=True), 400, "the text holds")  # no stream has begun


def test_other_statuses(server):
    text = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}]}
    refused(server.post(text), 404, "no model 'gpt-4o' here", code="model_not_found")  # not the video that is missing
    refused(server.post(asking(VIDEO, model="gpt-4o")), 404, "no model 'gpt-4o' here", code="model_not_found")
    status, _, content = server.post(asking(VIDEO, model="m" * 1_000_000))
    refused((status, content), 404, "no model 'mmm", code="model_not_found")
    assert len(content["error"]["message"]) < 200
    refused(server.call("GET", "/v2/chat"), 404, "Not Found", type="not_found_error")
    refused(server.call("GET", "/v1/chat/completions"), 405, "Method Not Allowed")
    refused(server.call("GET", "/"), 404, "Not Found")  # no page unless asked for
    body = b'{"messages": []}'
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "",
    ):  # what a page elsewhere could make a browser send
        refused(server.post(body, content_type=kind), 415, "Content-Type must be application/json")
    refused(server.post(asking("data:text/html;base64,AAAA")), 415, "text/html is no video")
    refused(server.post(asking(["data:video/mp4;base64,AAAA"])), 415, "video/mp4 is no picture")


def test_the_key_is_asked_for(serving_chat, serving_folder):
    url = uri(serving_folder / "videos" / "4.mp4")
    with served(serving_chat, serving_folder / "model", api_key="s3cret", demo=True) as running:
        for path in ("/v1/models", "/metrics", "/v1/chat/completions", "/demo/look", "/nowhere"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer s3cret2"}):
                refused(running.call("GET", path, **headers), 401, "key", type="authentication_error")
        assert running.call("GET", "/health")[0] == running.call("GET", "/")[0] == 200
        key = {"authorization": "Bearer s3cret"}
        assert running.post(asking(url), **key)[0] == 200
        assert running.call("GET", "/v1/models", **key)[0] == 200
        assert running.call("GET", "/v1/models", authorization="bearer  s3cret")[0] == 200  # RFC 7235, 2.1
        for wrong in ("s3cret", "Basic s3cret", "Bearers3cret", "Bearer"):
            assert running.call("GET", "/v1/models", authorization=wrong)[0] == 401


def test_the_key_may_come_from_the_environment(serving_chat, serving_folder, monkeypatch):
    monkeypatch.setenv("FASTVID_API_KEY", "other")
    with served(serving_chat, serving_folder / "model") as running:
        assert running.call("GET", "/v1/models")[0] == 401
        assert running.call("GET", "/v1/models", authorization="Bearer other")[0] == 200


def test_a_full_disk_is_told(serving_chat, serving_folder, monkeypatch):
    """Nothing is left of what did not fit, and who asks again later is answered."""
    url = uri(serving_folder / "videos" / "4.mp4")

    def written():
        yield b"some"
        raise OSError(errno.ENOSPC, "No space left on device")

    def none_left(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with served(serving_chat, serving_folder / "model") as running:
        spool, folder = running.service._addresses._spool, running.service._spool.name
        with pytest.raises(ApiError, match="disk is full"):
            spool.keep(written())
        assert (os.listdir(folder), spool._used) == ([], 0)
        with monkeypatch.context() as patch:
            patch.setattr(media.tempfile, "mkstemp", none_left)
            status, headers, content = running.post(asking(url))
        refused((status, content), 503, "the server's disk is full; try again later")
        assert int(headers["retry-after"]) > 0
        most, spool._most = spool._most, 10
        status, headers, content = running.post(asking(url))
        refused((status, content), 429, "videos of other requests fill the room for them; try again later")
        assert int(headers["retry-after"]) > 0
        spool._most = most
        assert running.ask(url)[0] == 200
        assert (os.listdir(folder), spool._used) == ([], 0)


def test_a_request_makes_one_line_of_the_log(server, caplog):
    """Whatever its path holds."""
    caplog.set_level(logging.INFO, "fastvid")
    server.call("GET", "/a%0D%0A00:00:00%20127.0.0.1%20GET%20/forged%20200%1B%5B2K")
    wait_until(lambda: caplog.records)
    lines = [record.getMessage() for record in caplog.records if record.name == "fastvid"]
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert "/a\\r\\n00:00:00" in lines[0]


def test_a_name_that_was_made_to_lead_here_is_refused(serving_chat, serving_folder):
    """Pages from elsewhere reach a server of this machine by no name of theirs; who has a key may use any."""
    for settings, strangers in (({}, 403), ({"api_key": "s3cret"}, 200)):
        with served(serving_chat, serving_folder / "model", **settings) as running:
            key = {"authorization": "Bearer s3cret"}
            for name in ("localhost", f"LocalHost:{running.port}", "127.0.0.1", f"[::1]:{running.port}"):
                assert running.call("GET", "/v1/models", host=name, **key)[0] == 200
            for name in ("evil.example", f"evil.example:{running.port}", "localhost.evil.example", "x@y", "[", ""):
                answer = running.call("GET", "/v1/models", host=name, **key)
                assert answer[0] == strangers
                if strangers == 403:
                    refused(answer, 403, "ask localhost, or give an --api_key")


def test_limits(serving_chat, serving_folder, tmp_path):
    videos = serving_folder / "videos"
    large = videos / "large.mp4"
    large.write_bytes(bytes((1 << 20) + 1))
    limits = {"max_body_mib": 1, "max_video_mib": 1, "max_pixels": 64 * 48, "max_frames": 9, "max_seconds": 0.5}
    with served(serving_chat, serving_folder / "model", allowed_folder=str(videos), **limits) as running:
        assert running.ask(uri(videos / "9.mp4"))[0] == 200
        refused(running.ask(uri(bytes(1 << 20))), 413, "more than 1 MiB (--max_body_mib)")
        whole = b'{"messages": []}' + b" " * (1 << 20)
        refused(running.post(iter([whole[:9], whole[9:]]), transfer_encoding="chunked"), 413, "more than 1 MiB")
        refused(running.ask(f"file://{large}"), 413, "more than 1 MiB (--max_video_mib)")
        refused(running.ask(uri(draw(tmp_path / "wide.mp4", 4, size=(66, 48)))), 400, "over the limit of 3,072 pixels")
        refused(running.ask(uri(draw(tmp_path / "10.mp4", 10))), 400, "has 10 frames, over the limit of 9")
        slow = draw(tmp_path / "slow.mp4", 4, times=[0, 300, 600, 900])
        refused(running.ask(uri(slow)), 400, "over the limit of 0.5 s")
        picture = "data:image/png;base64,AAAA"
        refused(running.ask([picture] * 10), 400, "10 pictures are more than --max_frames 9")
        assert running.metric("fastvid_body_bytes") == 0
        assert os.listdir(running.service._spool.name) == []


def test_large_pictures_are_refused(serving_chat, serving_folder, tmp_path):
    settings = {"max_pixels": 10_000, "allowed_folder": str(tmp_path)}
    with served(serving_chat, serving_folder / "model", **settings) as running:
        for size, status in (((100, 100), 200), ((101, 100), 400)):
            path = tmp_path / f"{status}.png"
            Image.new("RGB", size).save(path)
            for asked in ([uri(path, "image/png")], [f"file://{path}"]):
                found, content = running.ask(asked)
                assert found == status, content
        refused(running.ask(f"file://{tmp_path}/200.png"), 400, "200.png is an image, not a video")
        assert "101×100 is over the limit of 10,000 pixels" in content["error"]["message"]


@pytest.mark.slow
def test_decoding_has_its_time(serving_chat, serving_folder, monkeypatch):
    """A video that would take for ever costs its request, and the next one is answered."""
    monkeypatch.setattr(media, "_digest", lambda *_: "0" * 64)  # of a terabyte
    hostile = endless(serving_folder / "videos" / "endless.mp4")
    with served(
        serving_chat,
        serving_folder / "model",
        allowed_folder=str(hostile.parent),
        decode_timeout=1.0,
        max_video_mib=1 << 21,
    ) as running:
        refused(running.ask(f"file://{hostile}"), 400, "took longer than 1 s")
        for worker in running.service._features._workers:
            worker.timeout = LONG
        assert running.ask(f"file://{serving_folder}/videos/4.mp4")[0] == 200
    os.unlink(hostile)


def test_a_full_queue_is_told(serving_chat, serving_folder):
    url = uri(serving_folder / "videos" / "4.mp4")
    with served(serving_chat, serving_folder / "model", at_once=1, max_waiting=2) as running:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(running.ask(url))) for _ in range(3)]
        with held_answers(running):
            for thread in threads:
                thread.start()
            wait_until(lambda: running.metric("fastvid_requests_in_flight") == 3)
            status, headers, content = running.post(asking(url))
            refused(
                (status, content),
                429,
                "3 requests are in hand: at most 1 are answered at a time (--at_once), and 2 wait",
                type="rate_limit_error",
            )
            assert int(headers["retry-after"]) >= 1
        for thread in threads:
            thread.join()
        assert [status for status, _ in answers] == [200] * 3
        assert running.ask(url)[0] == 200


@pytest.mark.slow
def test_a_request_has_its_time(serving_chat, serving_folder):
    url = uri(serving_folder / "videos" / "4.mp4")
    with served(serving_chat, serving_folder / "model", request_timeout=LONG) as running:
        running.ask(url)
        usual = running.service.config
        running.service.config = dataclasses.replace(usual, request_timeout=2.0)
        with held_answers(running):
            refused(running.ask(url), 504, "longer than 2 s (--request_timeout)", code="timeout")
            assert running.stream(url)[-1]["error"]["code"] == "timeout"
            wait_until(lambda: running.metric("fastvid_requests_in_flight") == 0)
            assert running.metric('fastvid_requests_total{path="/v1/chat/completions",status="504"}') == 2
        running.service.config = usual
        assert running.ask(url)[0] == 200
