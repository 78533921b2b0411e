"""Which files are videos, and what their feature files are called."""

import pytest

from fastvid.video.listing import find_videos


def _touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_names(tmp_path):
    _touch(tmp_path, "b.mp4", "a.MKV", "dup.2.mp4", "dup.3.mp4", "sub/a.webm")
    _touch(tmp_path, "notes.txt", ".hidden.mp4", ".cache/c.mp4")
    videos, others = find_videos(tmp_path, "out", ".safetensors")
    assert others == {".txt": 1}
    assert [(video.name, str(video.output)) for video in videos] == [
        ("a.MKV", "out/a.safetensors"), ("b.mp4", "out/b.safetensors"), ("dup.2.mp4", "out/dup.2.safetensors"),
        ("dup.3.mp4", "out/dup.3.safetensors"), ("sub/a.webm", "out/sub/a.safetensors")]
    assert all(video.path == tmp_path / video.name for video in videos)


def test_videos_that_would_share_a_file(tmp_path):
    _touch(tmp_path, "sub/a.mp4", "sub/a.avi")
    with pytest.raises(ValueError, match=r"a\.avi and .*a\.mp4 would both be written to out/sub/a\.pkl; rename"):
        find_videos(tmp_path, "out", ".pkl")


def test_links_to_folders_are_followed_once(tmp_path):
    _touch(tmp_path, "elsewhere/a.mp4", "videos/b.mp4")
    (tmp_path / "videos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "videos" / "loop").symlink_to(tmp_path / "videos")
    assert [video.name for video in find_videos(tmp_path / "videos", "out", ".pkl")[0]] == ["b.mp4", "link/a.mp4"]


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        find_videos(tmp_path / "nowhere", "out", ".pkl")
    _touch(tmp_path, "notes.txt")
    with pytest.raises(ValueError, match="no videos"):
        find_videos(tmp_path, "out", ".pkl")
