"""A decoder in a process of its own: the same frames; crashes and hangs cost one video."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from clips import draw, endless

from fastvid.video.decode import DecodeError, decode
from fastvid.video.decode.worker import DecodeWorker, limit


@pytest.fixture
def worker():
    worker = DecodeWorker()
    yield worker
    worker.close()


def test_same_frames(tmp_path, worker):
    path = draw(tmp_path / "a.mp4", 30)
    for options in ({}, {"num_frames": 4, "size": 28}):
        frames, info = worker.decode(path, **options)
        expected, expected_info = decode(path, **options)
        assert (frames == expected).all() and info == expected_info


def test_a_bad_file_costs_nothing_else(tmp_path, worker):
    (tmp_path / "bad.mp4").write_text("no video")
    path = draw(tmp_path / "a.mp4")
    assert len(worker.decode(path)[0]) == 10
    process = worker._process
    with pytest.raises(DecodeError, match="cannot be opened as a video") as error:
        worker.decode(tmp_path / "bad.mp4")
    assert error.value.path == str(tmp_path / "bad.mp4")
    assert len(worker.decode(path)[0]) == 10
    assert worker._process is process


def test_what_takes_too_long_is_given_up(tmp_path, worker):
    path = draw(tmp_path / "a.mp4")
    worker.timeout = 0.3
    start = time.monotonic()
    with pytest.raises(DecodeError, match="took longer than 0.3 s"):
        worker.decode(endless(tmp_path / "endless.mp4"))
    assert time.monotonic() - start < 20
    worker.timeout = 60
    assert len(worker.decode(path)[0]) == 10


def test_a_crash_costs_one_video(tmp_path, worker):
    path = draw(tmp_path / "a.mp4")
    worker.decode(path)
    os.kill(worker._process.pid, signal.SIGSEGV)
    with pytest.raises(DecodeError, match="the decoder crashed .SIGSEGV."):
        worker.decode(path)
    assert len(worker.decode(path)[0]) == 10


def test_killed_while_another_thread_waits(tmp_path, worker):
    worker.decode(draw(tmp_path / "a.mp4"))
    threading.Timer(0.3, worker.kill).start()
    with pytest.raises(DecodeError, match="SIGKILL"):
        worker.decode(endless(tmp_path / "endless.mp4"))


def test_interrupts_are_left_to_the_parent(tmp_path, worker):
    path = draw(tmp_path / "a.mp4")
    worker.decode(path)
    process = worker._process
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
    assert len(worker.decode(path)[0]) == 10
    assert worker._process is process


@pytest.mark.parametrize("busy", [False, True])
def test_ends_with_its_parent(tmp_path, busy):
    draw(tmp_path / "a.mp4")
    endless(tmp_path / "endless.mp4")
    code = ("import os, sys, threading\nfrom fastvid.video.decode.worker import DecodeWorker, limit\n"
            "worker = DecodeWorker()\nworker.decode('a.mp4')\nprint(worker._process.pid, flush=True)\n"
            "threading.Timer(0.3, os.kill, [os.getpid(), 9]).start()\nif sys.argv[1:]: worker.decode('endless.mp4')")
    done = subprocess.run([sys.executable, "-c", code, *["busy"] * busy], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, timeout=60)
    status = f"/proc/{int(done.stdout)}/status"
    for _ in range(100):
        if not os.path.exists(status) or "State:\tZ" in open(status).read():
            return
        time.sleep(0.1)
    os.kill(int(done.stdout), 9)
    pytest.fail("the decoder outlived its parent")


@pytest.mark.parametrize("duration, seconds", [(0, 600), (-1, 600), (7200, 6000), (60, 660), (1e12, 6000)])
def test_the_time_out_counts_the_videos_own_length(duration, seconds):
    assert limit(600, duration) == seconds


def test_the_files_own_digest(tmp_path, worker):
    path = draw(tmp_path / "a.mp4")
    assert worker.decode_and_hash(path)[2] == hashlib.sha256(path.read_bytes()).hexdigest()
