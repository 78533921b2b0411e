"""Many clients, slow ones, and those that go away: others are answered, and nothing of them is left."""

import asyncio
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import urllib3
from conftest import ROOT
from serving_run import asking, held_answers, served, text_of, uri
from waiting import LONG, wait_until

from fastvid.config import ChatConfig, ServeConfig
from fastvid.serve import main
from fastvid.serving import server as server_module
from fastvid.serving import service as service_module
from fastvid.serving.service import Service

pytestmark = pytest.mark.usefixtures("forked")  # decoders


def head(body, extra=""):
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{extra}"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()


def memory():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) << 10


def left_nothing(running):
    """Check that a server holds nothing of any request."""
    wait_until(lambda: running.metric("fastvid_requests_in_flight") == 0)
    wait_until(lambda: running.metric("fastvid_answers_running") == running.metric("fastvid_answers_waiting") == 0)
    wait_until(lambda: os.listdir(running.service._spool.name) == [])
    assert running.metric("fastvid_body_bytes") == 0
    assert running.service._engine._answers == {}
    assert running.service._engine._held == set()
    assert running.service._features._jobs == {}


@pytest.mark.slow
def test_two_hundred_at_once(serving_chat, serving_folder):
    """Good requests among bad ones, slow clients and such as leave: each gets its own answer."""
    rng = random.Random(3)
    videos = [serving_folder / "videos" / f"{frames}.mp4" for frames in (4, 9, 30)]
    questions = ["what plays?", "who is the assistant", "cards"]
    wanted = {(v, q): serving_chat.ask(v, q) for v in videos for q in questions}
    with served(serving_chat, serving_folder / "model", max_body_mib=1, at_once=16) as running:
        running.ask(uri(videos[0]))
        before = memory()

        def good():
            video, question = rng.choice(videos), rng.choice(questions)
            if rng.random() < 0.5:
                return text_of(running.stream(uri(video), question))[0] == wanted[video, question]
            status, content = running.ask(uri(video), question)
            return status == 200 and text_of(content)[0] == wanted[video, question]

        def oversize():
            return running.ask(uri(bytes(1 << 20)))[0] == 413

        def malformed():
            return running.post(rng.choice([b"{", b"\xff", b"[" * 9999]))[0] == 400

        def damaged():
            return running.ask(uri(videos[0].read_bytes()[: rng.randrange(400)]))[0] == 400

        def slow():
            body = json.dumps(asking(uri(videos[0]), max_tokens=1)).encode()
            with running.connection() as made:
                made.sendall(head(body))
                for first in range(0, len(body), 1 + len(body) // 5):
                    made.sendall(body[first : first + 1 + len(body) // 5])
                    time.sleep(0.1)
                return made.recv(12) == b"HTTP/1.1 200"

        def leaving():
            body = json.dumps(asking(uri(rng.choice(videos)), stream=rng.random() < 0.5)).encode()
            with running.connection() as made:
                made.sendall((head(body) + body)[: rng.choice([20, 300, None])])
                time.sleep(rng.random() * 0.3)
            return True

        kinds = [good] * 120 + [oversize] * 20 + [malformed] * 20 + [damaged] * 10 + [slow] * 10 + [leaving] * 20
        rng.shuffle(kinds)
        with ThreadPoolExecutor(200) as pool:
            done = list(pool.map(lambda kind: (kind.__name__, kind()), kinds))
        assert [name for name, well in done if not well] == []
        left_nothing(running)
        assert memory() - before < 300 << 20
        assert sum(1 for each in threading.enumerate() if each.name.startswith("decode")) <= 8


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_place(serving_chat, serving_folder, stream):
    body = json.dumps(asking(uri(serving_folder / "videos" / "4.mp4"), stream=stream)).encode()
    with served(serving_chat, serving_folder / "model", at_once=1, max_waiting=1) as running:
        with held_answers(running):
            made = [running.connection() for _ in range(2)]
            for each in made:
                each.sendall(head(body) + body)
            wait_until(lambda: len(running.service._engine._answers) == 2)
            for each in made:
                each.close()
            wait_until(lambda: running.metric("fastvid_requests_in_flight") == 0)
            assert running.service._engine._answers == {}  # before any has ended
        left_nothing(running)
        wait_until(lambda: running.metric('fastvid_requests_total{path="/v1/chat/completions",status="499"}') == 2)
        assert running.post(body)[0] == 200


def test_who_leaves_while_a_video_is_decoded(serving_chat, serving_folder, monkeypatch):
    """Its process is ended if nobody else waits for the video; if somebody does, he gets his answer."""
    url = uri(serving_folder / "videos" / "4.mp4")
    body = json.dumps(asking(url)).encode()
    with served(serving_chat, serving_folder / "model") as running:
        store, begun, killed = running.service._features, threading.Event(), threading.Event()
        decode, released = store._decode, threading.Event()

        def slow(worker, file):
            begun.set()
            released.wait(60)
            return decode(worker, file)

        store._decode = slow
        for worker in store._workers:
            monkeypatch.setattr(worker, "kill", lambda: (killed.set(), released.set()))
        with running.connection() as made:
            made.sendall(head(body) + body)
            assert begun.wait(60)
        assert killed.wait(60)
        left_nothing(running)

        for event in (begun, killed, released):
            event.clear()
        with ThreadPoolExecutor(1) as pool:
            with running.connection() as made:
                made.sendall(head(body) + body)
                assert begun.wait(60)
                other = pool.submit(running.ask, url)
                wait_until(lambda: [job.waiters for job in store._jobs.values()] == [2])
            wait_until(lambda: [job.waiters for job in store._jobs.values()] == [1])
            released.set()
            assert other.result()[0] == 200
        assert not killed.is_set()
        left_nothing(running)


def test_what_was_given_up_and_ends_late_takes_no_other_along(serving_chat, serving_folder):
    """Meanwhile another has asked for the same, and a third will wait with him."""
    made, released = [], asyncio.Event()

    async def make(key, files, pictures):
        made.append(key)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await released.wait()
            raise

    async def scenario(store):
        store._make = make
        first = asyncio.create_task(store.of("key", [], False))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait([first])
        others = [asyncio.create_task(store.of("key", [], False))]
        await asyncio.sleep(0.01)
        released.set()
        await asyncio.sleep(0.01)
        others.append(asyncio.create_task(store.of("key", [], False)))
        await asyncio.sleep(0.01)
        waiters = [job.waiters for job in store._jobs.values()]
        for each in others:
            each.cancel()
        await asyncio.wait(others)
        await asyncio.sleep(0.01)
        await store.close()
        return waiters

    store = Service(serving_chat, ServeConfig(str(serving_folder / "model")))._features
    assert asyncio.run(scenario(store)) == [2]
    assert made == ["key", "key"]
    assert store._jobs == {}


@pytest.mark.slow
def test_a_slow_reader_holds_up_nobody(serving_chat, serving_folder, monkeypatch):
    """What it does not read stays in the system's buffers; if they are full for long, the connection is closed."""
    monkeypatch.setattr(server_module, "_STALLED", 0.5)
    url = uri(serving_folder / "videos" / "4.mp4")
    with served(serving_chat, serving_folder / "model", max_new_tokens=600, served_model_name="m" * 4000) as running:
        body = json.dumps(asking(url, stream=True)).encode()
        with running.connection(receive_bytes=4096) as made:
            wait_until(lambda: running.server.server_state.connections)
            for connection in list(running.server.server_state.connections):
                connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            made.sendall(head(body) + body)
            began = time.monotonic()
            assert running.ask(url, max_tokens=5)[0] == 200
            wait_until(lambda: running.metric("fastvid_requests_in_flight") == 0, 30)
            assert time.monotonic() - began < 25
            received = b"".join(iter(lambda: made.recv(1 << 20), b""))
            assert received.startswith(b"HTTP/1.1 200")
            assert b"[DONE]" not in received
        left_nothing(running)


@pytest.mark.slow
def test_a_silent_connection_is_closed(serving_chat, serving_folder, monkeypatch):
    """Whether it sends nothing, or a head byte by byte; one whose answer takes its time is not."""
    monkeypatch.setattr(server_module, "_SILENT", 0.4)
    url = uri(serving_folder / "videos" / "4.mp4")
    with served(serving_chat, serving_folder / "model") as running:
        with running.connection() as silent, running.connection() as slow:
            began = time.monotonic()
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                while time.monotonic() - began < 10:
                    slow.sendall(b"G")
                    time.sleep(0.05)
            assert time.monotonic() - began < 9
            assert silent.recv(1) == b""
        with held_answers(running) as let_go:
            threading.Timer(1.0, let_go).start()
            assert running.ask(url)[0] == 200


def test_a_body_that_does_not_come_takes_no_place(serving_chat, serving_folder, monkeypatch):
    """Its connection ends when nothing has come for a while."""
    url = uri(serving_folder / "videos" / "4.mp4")
    with served(serving_chat, serving_folder / "model", at_once=1, max_waiting=0) as running:
        with running.connection() as bare:
            bare.sendall(head(b"12345"))
            wait_until(lambda: running.server.server_state.tasks)
            assert running.ask(url)[0] == 200
        monkeypatch.setattr(service_module, "_SILENT", 0.2)
        with running.connection() as bare:
            bare.sendall(head(b"12345") + b"1")
            received = b"".join(iter(lambda: bare.recv(1 << 20), b""))
        assert received.startswith(b"HTTP/1.1 408")
        assert b"connection: close" in received.lower()
        assert b"nothing of the request's body came for 0.2 s" in received
        left_nothing(running)


@pytest.mark.slow
def test_a_video_for_the_page_has_its_time(serving_chat, serving_folder, monkeypatch):
    """It is given up when that is over, and when nobody wants it any more."""
    content = (serving_folder / "videos" / "4.mp4").read_bytes()
    sent = head(content).replace(b"/v1/chat/completions", b"/demo/look").replace(b"/json", b"/octet-stream")
    for seconds in (2.0, 240.0):
        with served(serving_chat, serving_folder / "model", demo=True, request_timeout=seconds) as running:
            store, begun, killed = running.service._features, threading.Event(), threading.Event()
            decode = store._decode

            def slow(worker, file, begun=begun, killed=killed, decode=decode):
                begun.set()
                killed.wait(LONG)
                return decode(worker, file)

            store._decode = slow
            for worker in store._workers:
                monkeypatch.setattr(worker, "kill", killed.set)
            with running.connection() as made:
                made.sendall(sent + content)
                assert begun.wait(LONG)
                if seconds == 2:
                    assert made.recv(12) == b"HTTP/1.1 504"
            wait_until(killed.is_set)
            store._decode = decode
            # The next one has all the time that it needs.
            running.service.config = dataclasses.replace(running.service.config, request_timeout=240.0)
            left_nothing(running)
            answer = running.call("POST", "/demo/look", content, content_type="application/octet-stream")
            assert answer[0] == 200


def test_a_decoder_that_is_done_is_not_ended(serving_chat, serving_folder):
    """Even if nobody waits for its result any more: the next video would find it dead."""

    async def scenario(store):
        loop, given_up = asyncio.get_running_loop(), []
        future = loop.create_future()
        loop.run_in_executor = lambda *_: future
        call = asyncio.create_task(store._in_thread(None, None, if_given_up=lambda: given_up.append(1)))
        await asyncio.sleep(0)
        future.set_result(None)
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        await store.close()
        return given_up

    store = Service(serving_chat, ServeConfig(str(serving_folder / "model")))._features
    assert asyncio.run(scenario(store)) == []


def test_bytes_of_requests_are_bounded(serving_chat, serving_folder):
    """Clients that send large bodies and never end fill only so much memory; when they leave, others are served."""
    with served(serving_chat, serving_folder / "model", max_body_mib=1) as running:
        body, made = bytes(1 << 20), [running.connection() for _ in range(9)]
        for each in made[:8]:
            each.sendall(head(body) + body[:-1])
        wait_until(lambda: running.metric("fastvid_body_bytes") == 8 * (len(body) - 1))
        status, headers, content = running.post(body)
        assert status == 429
        assert "other requests fill the memory" in content["error"]["message"]
        assert headers["retry-after"] == "5"
        for each in made:
            each.close()
        left_nothing(running)
        assert running.ask(uri(serving_folder / "videos" / "4.mp4"))[0] == 200


def test_the_end_lets_answers_end(serving_chat, serving_folder):
    url = uri(serving_folder / "videos" / "4.mp4")
    with served(serving_chat, serving_folder / "model") as running, ThreadPoolExecutor(1) as pool:
        wanted = running.ask(url)
        with held_answers(running):
            answer = pool.submit(running.stream, url)
            wait_until(lambda: running.metric("fastvid_requests_in_flight") == 1)
            running.server.end()
            status, headers, content = running.post(asking(url))
            assert (status, content["error"]["code"], headers["retry-after"]) == (503, "stopping", "5")
            assert running.call("GET", "/health")[0] == 503
        assert text_of(answer.result()) == text_of(wanted[1])


def test_the_end_does_not_wait_for_ever(serving_chat, serving_folder):
    url = uri(serving_folder / "videos" / "4.mp4")
    with served(serving_chat, serving_folder / "model", grace=0.3) as running:
        batcher = running.service._engine._batcher
        step, batcher.step = batcher.step, lambda: time.sleep(0.1) or []  # never ends
        with running.connection() as made:
            body = json.dumps(asking(url)).encode()
            made.sendall(head(body) + body)
            wait_until(lambda: running.metric("fastvid_requests_in_flight") == 1)
            running.server.end()
            wait_until(lambda: running.server.should_exit, 5)
        batcher.step = step


def test_the_model_is_that_of_chat():
    """All that tells `chat` which model, and how it is asked, tells the server as well."""
    fields = {name: {field.name for field in dataclasses.fields(name)} for name in (ChatConfig, ServeConfig)}
    assert fields[ChatConfig] - fields[ServeConfig] == {"video", "video_2", "question", "questions_file", "seed"}


@pytest.mark.slow
def test_the_command(serving_folder, forked):
    """It serves until SIGTERM, then exits with 0."""
    flags = ["--model_name_or_path", str(serving_folder / "model"), "--device", "cpu", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvid", "serve", *flags], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        line = next(line for line in process.stderr if " at http" in line)
        name, _, url = line.strip().partition(" at ")
        assert name == "model"
        wait_until(lambda: answers(url))
        process.send_signal(signal.SIGTERM)
        told = process.stderr.read()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert "GET /v1/models 200" in told
    assert "stopping" in told
    assert "Traceback" not in told


def answers(url):
    try:
        return urllib3.request("GET", f"{url}/v1/models", retries=False).json()["data"][0]["id"] == "model"
    except urllib3.exceptions.HTTPError:
        return False


def test_what_cannot_be_served_is_told_at_once(serving_folder):
    """Before the model is loaded."""
    flags = ["--model_name_or_path", str(serving_folder / "model")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} cannot be used .* give another port"):
            main([*flags, "--port", str(port)])
    with pytest.raises(ValueError, match="--host nowhere.invalid is no address of this machine .*: give 127.0.0.1"):
        main([*flags, "--port", "0", "--host", "nowhere.invalid"])
    with pytest.raises(ValueError, match="--allowed_folder /nowhere is no folder"):
        main([*flags, "--port", "0", "--allowed_folder", "/nowhere"])
