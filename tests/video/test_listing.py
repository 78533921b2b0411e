"""Which files are videos, and what their feature files are called."""

import os

import pytest

from fastvid.features.folder import FeatureFolder
from fastvid.video.listing import find_videos


def _touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_names(tmp_path):
    _touch(tmp_path, "b.mp4", "a.MKV", "c.m2ts", "dup.2.mp4", "dup.3.mp4", "sub/a.webm", "..odd/d.mp4")
    _touch(tmp_path, "notes.txt", ".hidden.mp4", ".cache/c.mp4")
    videos, others = find_videos(tmp_path, "out", ".safetensors")
    assert others == {".txt": 1}
    assert [(video.name, str(video.output)) for video in videos] == [
        ("..odd/d.mp4", "out/..odd/d.safetensors"),
        ("a.MKV", "out/a.safetensors"),
        ("b.mp4", "out/b.safetensors"),
        ("c.m2ts", "out/c.safetensors"),
        ("dup.2.mp4", "out/dup.2.safetensors"),
        ("dup.3.mp4", "out/dup.3.safetensors"),
        ("sub/a.webm", "out/sub/a.safetensors"),
    ]
    assert all(video.path == tmp_path / video.name for video in videos)


def test_videos_that_would_share_a_file_have_none(tmp_path):
    _touch(tmp_path, "sub/a.mp4", "sub/a.avi", "sub/b.mp4")
    faults = {video.name: video.fault for video in find_videos(tmp_path, "out", ".pkl")[0]}
    assert "sub/a.mp4 would be written to a.pkl as well; rename" in faults["sub/a.avi"]
    assert "sub/a.avi" in faults["sub/a.mp4"] and faults["sub/b.mp4"] is None


def test_a_name_that_leaves_no_room_for_the_ending_is_cut(tmp_path):
    """And found again by the name that records give the video."""
    names = [f"{'é' * 121}{last}.mp4" for last in ("", "ab", "ac")]
    _touch(tmp_path, *names)
    outputs = {video.name: video.output for video in find_videos(tmp_path, tmp_path, ".safetensors")[0]}
    assert outputs[names[0]].name == names[0].replace(".mp4", ".safetensors")
    assert len(set(outputs.values())) == 3 and all(len(os.fsencode(path.name)) <= 255 for path in outputs.values())
    for path in outputs.values():
        path.touch()
    folder = FeatureFolder(tmp_path)
    for name, path in outputs.items():
        assert folder.resolve(name) == folder.resolve(name.removesuffix(".mp4")) == path


def test_links_are_followed_where_the_user_says_so(tmp_path):
    _touch(tmp_path, "elsewhere/a.mp4", "elsewhere/c.mp4", "videos/b.mp4")
    (tmp_path / "videos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "videos" / "loop").symlink_to(tmp_path / "videos")
    (tmp_path / "videos" / "c.mp4").symlink_to(tmp_path / "elsewhere" / "c.mp4")
    videos, others = find_videos(tmp_path / "videos", "out", ".pkl")
    assert [video.name for video in videos] == ["b.mp4"] and others == {"links": 3}
    videos, others = find_videos(tmp_path / "videos", "out", ".pkl", follow_links=True)
    assert [video.name for video in videos] == ["b.mp4", "c.mp4", "link/a.mp4", "link/c.mp4"] and not others
    (tmp_path / "videos" / "b.mp4").unlink()
    with pytest.raises(ValueError, match="3 links are not followed without --follow_links"):
        find_videos(tmp_path / "videos", "out", ".pkl")


def test_nothing_there(tmp_path):
    for given, what in (
        (tmp_path / "a.mp4", f"is a file; give the folder that it lies in, {tmp_path}"),
        ("https://a.b/c", "is a URL: download the videos"),
    ):
        (tmp_path / "a.mp4").touch()
        with pytest.raises(ValueError, match=what):
            find_videos(given, tmp_path, ".pkl")
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(ValueError, match="does not exist; give the folder of the videos"):
        find_videos(tmp_path / "nowhere", "out", ".pkl")
    _touch(tmp_path, "notes.txt")
    with pytest.raises(ValueError, match="no file in it ends as a video"):
        find_videos(tmp_path, "out", ".pkl")
