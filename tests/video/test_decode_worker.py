"""A decoder in a process of its own: the same frames; crashes and hangs cost one video."""

import errno
import gc
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from clips import draw, endless
from PIL import Image

from fastvid.video.decode import DecodeError, decode, shared_frames
from fastvid.video.decode import worker as worker_module
from fastvid.video.decode.worker import DecodeWorker, limit


@pytest.fixture
def worker():
    worker = DecodeWorker()
    yield worker
    worker.close()


@pytest.mark.slow
def test_same_frames(tmp_path, worker):
    path = draw(tmp_path / "a.mp4", 30)
    for options in ({}, {"num_frames": 4, "size": 28}):
        frames, info = worker.decode(path, **options)
        expected, expected_info = decode(path, **options)
        assert (frames == expected).all() and info == expected_info


@pytest.mark.slow
def test_frames_that_are_kept_stay_as_they_are(tmp_path, worker):
    """Their memory is shared with the worker, and used again only when nobody has them."""
    paths = [draw(tmp_path / f"{number}.mp4", 5 + number) for number in range(3)]
    options = {"num_frames": 8, "size": 14}
    expected = [decode(path, **options)[0] for path in paths]
    first = worker.decode(paths[0], **options)[0]
    part = first[2:4]  # is enough to keep the memory
    del first
    second = worker.decode(paths[1], **options)[0]
    third = worker.decode(paths[2], **options)[0]
    assert np.array_equal(part, expected[0][2:4])
    assert np.array_equal(second, expected[1]) and np.array_equal(third, expected[2])
    numbers = set(worker._shared._numbers.values())
    assert len(numbers) == 3
    del part, second
    again = [worker.decode(path, **options)[0].copy() for path in paths]
    assert all(np.array_equal(*pair) for pair in zip(again, expected)) and np.array_equal(third, expected[2])
    assert set(worker._shared._numbers.values()) <= numbers
    worker._process.kill()  # another process has none of the memory yet, and the next video is not at fault
    worker._process.wait()
    assert np.array_equal(worker.decode(paths[1], **options)[0], expected[1]) and np.array_equal(third, expected[2])


@pytest.mark.slow
def test_memory_goes_back_to_the_system(tmp_path):
    path, before = draw(tmp_path / "a.mp4"), set(os.listdir("/proc/self/fd"))
    worker = DecodeWorker()
    frames = worker.decode(path, num_frames=4, size=14)[0]
    worker.close()
    assert frames.any()
    del frames, worker
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_piece_cannot_be_cut(tmp_path, worker):
    """Whoever reads beyond the end of shared memory is ended by the system."""
    piece = worker._shared.take(100)
    for size in (50, 200):
        with pytest.raises(PermissionError):
            os.ftruncate(piece.descriptor, size)


@pytest.mark.slow
def test_few_pieces_are_kept(tmp_path, worker):
    path = draw(tmp_path / "a.mp4")
    held = [worker.decode(path, num_frames=4, size=14)[0] for _ in range(5)]
    del held
    assert len(worker._shared._free) == 2


@pytest.mark.slow
@pytest.mark.parametrize("what", ["map", "send"])
def test_what_this_process_cannot_do_ends_no_run(tmp_path, worker, monkeypatch, what):
    path = draw(tmp_path / "a.mp4")
    expected = worker.decode(path, num_frames=4, size=14)[0].copy()

    def fails(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    worker._shared.clear()
    if what == "map":
        monkeypatch.setattr(shared_frames.mmap, "mmap", fails)
        assert np.array_equal(worker.decode(path, num_frames=4, size=14)[0], expected)  # by the pipe
    else:
        monkeypatch.setattr(worker_module, "_TO_END", 0.1)
        monkeypatch.setattr(shared_frames, "send", fails)
        with pytest.raises(DecodeError, match="could not be reached .*Too many open files"):
            worker.decode(path, num_frames=4, size=14)
    monkeypatch.undo()
    assert np.array_equal(worker.decode(path, num_frames=4, size=14)[0], expected)


@pytest.mark.slow
def test_frames_come_by_the_pipe_where_no_memory_is_shared(tmp_path, worker, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    path = draw(tmp_path / "a.mp4")
    assert np.array_equal(worker.decode(path, num_frames=4, size=14)[0], decode(path, num_frames=4, size=14)[0])


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_takes_too_long_is_given_up(tmp_path, worker):
    path = draw(tmp_path / "a.mp4")
    worker.timeout = 0.3
    start = time.monotonic()
    with pytest.raises(DecodeError, match="took longer than 0.3 s"):
        worker.decode(endless(tmp_path / "endless.mp4"))
    assert time.monotonic() - start < 20
    worker.timeout = 60
    assert len(worker.decode(path)[0]) == 10


@pytest.mark.slow
def test_a_crash_costs_one_video(tmp_path, worker):
    path = draw(tmp_path / "a.mp4")
    worker.decode(path)
    threading.Timer(0.3, os.kill, [worker._process.pid, signal.SIGSEGV]).start()
    with pytest.raises(DecodeError, match="the decoder crashed .SIGSEGV."):
        worker.decode(endless(tmp_path / "endless.mp4"))
    assert len(worker.decode(path)[0]) == 10


@pytest.mark.slow
def test_killed_while_another_thread_waits(tmp_path, worker):
    worker.decode(draw(tmp_path / "a.mp4"))
    threading.Timer(0.3, worker.kill).start()
    with pytest.raises(DecodeError, match="SIGKILL"):
        worker.decode(endless(tmp_path / "endless.mp4"))


@pytest.mark.slow
def test_interrupts_are_left_to_the_parent(tmp_path, worker):
    path = draw(tmp_path / "a.mp4")
    worker.decode(path)
    process = worker._process
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
    assert len(worker.decode(path)[0]) == 10
    assert worker._process is process


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_ends_with_its_parent(tmp_path, busy):
    draw(tmp_path / "a.mp4")
    endless(tmp_path / "endless.mp4")
    code = (
        "import os, sys, threading\nfrom fastvid.video.decode.worker import DecodeWorker, limit\n"
        "worker = DecodeWorker()\nworker.decode('a.mp4')\nprint(worker._process.pid, flush=True)\n"
        "threading.Timer(0.3, os.kill, [os.getpid(), 9]).start()\nif sys.argv[1:]: worker.decode('endless.mp4')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *["busy"] * busy],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
    )
    status = Path(f"/proc/{int(done.stdout)}/status")
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    os.kill(int(done.stdout), 9)
    pytest.fail("the decoder outlived its parent")


@pytest.mark.parametrize("duration, seconds", [(0, 600), (-1, 600), (7200, 6000), (60, 660), (1e12, 6000)])
def test_the_time_out_counts_the_videos_own_length(duration, seconds):
    assert limit(600, duration) == seconds


@pytest.mark.slow
def test_the_files_own_digest(tmp_path, worker):
    path = draw(tmp_path / "a.mp4")
    assert worker.decode_and_hash(path)[2] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_pictures_and_images_have_their_limit(tmp_path, worker):
    paths = [tmp_path / f"{width}.png" for width in (20, 21)]
    for path in paths:
        Image.new("RGB", (int(path.stem), 10), (1, 2, 3)).save(path)
    frames = worker.pictures(paths, size=4, max_pixels=210)
    assert frames.shape == (2, 4, 4, 3)
    assert np.all(frames == (1, 2, 3))
    assert worker.decode(paths[0], size=4, num_frames=1, max_pixels=200)[0].shape == (1, 4, 4, 3)
    for refused in (
        lambda: worker.pictures(paths, size=4, max_pixels=200),
        lambda: worker.decode(paths[1], max_pixels=200),
    ):
        with pytest.raises(DecodeError, match="21.png: .* 21×10 is over the limit of 200 pixels"):
            refused()


def test_times_are_those_of_the_file(tmp_path, worker):
    path = draw(tmp_path / "clip.mp4", 6)
    info = worker.decode(path)[1]
    assert worker.frame_times(path, [0, 5], info) == pytest.approx([0, 0.2])


@pytest.mark.parametrize(
    "limits, message",
    [({"max_frames": 5}, "has 6 frames, over the limit of 5"), ({"max_seconds": 0.2}, "s, over the limit of 0.2 s")],
)
def test_long_videos_are_refused(tmp_path, worker, limits, message):
    path = draw(tmp_path / "clip.mp4", 6)
    with pytest.raises(DecodeError, match=message):
        worker.decode(path, **limits)
    assert len(worker.decode(path, max_frames=6, max_seconds=0.5)[0]) == 6
