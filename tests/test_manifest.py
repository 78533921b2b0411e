"""The manifest survives crashes and several writers."""

import json
import multiprocessing
import os

import pytest

from fastvid.video.manifest import Manifest, read_manifest


def test_lines_and_entries(tmp_path):
    assert read_manifest(tmp_path) == {}
    manifest = Manifest(tmp_path)
    manifest.open()
    manifest.append("a.mp4", "failed", reason="no", seconds=1.5)
    manifest.append("b/ü.mp4", "ok", frames=7, seconds=2.0, num_frames=4)
    manifest.append("a.mp4", "ok", frames=9)
    lines = [json.loads(line) for line in manifest.path.read_text().splitlines()]  # on the disk before it is closed
    manifest.close()
    assert lines[0] == {"video": "a.mp4", "status": "failed", "reason": "no", "frames": None, "seconds": 1.5}
    assert lines[1]["video"] == "b/ü.mp4" and lines[1]["frames"] == 7 and lines[1]["num_frames"] == 4
    assert read_manifest(tmp_path) == {"a.mp4": lines[2], "b/ü.mp4": lines[1]} == manifest.entries


def test_torn_lines(tmp_path):
    whole = b'{"video": "a.mp4", "status": "ok"}\n'
    for torn in (b'{"video": "b.mp4", "sta', b"{", b'"b.mp4"', b'{"status": "ok"}', b"3", b"\0\0\0", b"\xff\xfe"):
        (tmp_path / "manifest.jsonl").write_bytes(whole + torn)
        assert list(read_manifest(tmp_path)) == ["a.mp4"]
        manifest = Manifest(tmp_path)
        manifest.open()
        manifest.append("c.mp4", "ok")
        manifest.close()
        assert list(read_manifest(tmp_path)) == ["a.mp4", "c.mp4"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk as Linux plays it")
def test_a_full_disk_is_told_by_name(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.close()
    manifest._file = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match=f"No space left on device: '{manifest.path}'"):
        manifest.append("a.mp4", "ok")
    manifest.close()


def _write(folder, writer):
    manifest = Manifest(folder)
    manifest.open()
    for i in range(200):
        manifest.append(f"{writer}-{i}", "ok", reason="x" * 50)
    manifest.close()


def test_several_writers(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(tmp_path, i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_manifest(tmp_path)) == 600
    assert len((tmp_path / "manifest.jsonl").read_bytes().splitlines()) == 600
