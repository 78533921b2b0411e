"""Videos given by a pattern, a list file or tar shards."""

import errno
import io
import os
import tarfile

import pytest
from clips import draw
from towers import write_tower

from fastvid.config import ExtractConfig
from fastvid.extract import extract
from fastvid.features.file import load_features
from fastvid.features.manifest import read_manifest
from fastvid.video.decode import DecodeError
from fastvid.video.listing import find_videos


def _touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def _names(given, **options):
    return {video.name: str(video.output) for video in find_videos(given, "out", ".pkl", **options)[0]}


def _shard(path, **contents):
    """A tar of members: bytes, or a `TarInfo` as it is."""
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_a_pattern(tmp_path, monkeypatch):
    _touch(tmp_path, "v/a.mp4", "v/b.MKV", "v/x.txt", "v/sub/a.mp4", "v/sub/deep/c.mp4", "v/.hidden.mp4", "w/d.mp4")
    assert _names(tmp_path / "v" / "*.mp4") == {"a.mp4": "out/a.pkl"}
    everything = {
        "a.mp4": "out/a.pkl",
        "b.MKV": "out/b.pkl",
        "sub/a.mp4": "out/sub/a.pkl",
        "sub/deep/c.mp4": "out/sub/deep/c.pkl",
    }
    assert _names(f"{tmp_path}/v/**/*") == everything
    assert find_videos(f"{tmp_path}/v/**", "out", ".pkl")[1] == {".txt": 1}
    assert _names(f"{tmp_path}/[vw]/*.mp4") == {"v/a.mp4": "out/v/a.pkl", "w/d.mp4": "out/w/d.pkl"}
    monkeypatch.chdir(tmp_path / "v")
    assert _names("*/a.mp4") == {"sub/a.mp4": "out/sub/a.pkl"}
    (tmp_path / "v" / "[1].mp4").touch()  # a folder or a file that is there is no pattern
    (tmp_path / "[v]").mkdir()
    _touch(tmp_path, "[v]/e.mp4")
    assert _names(tmp_path / "[v]") == {"e.mp4": "out/e.pkl"}
    with pytest.raises(ValueError, match="no file that it names ends as a video"):
        find_videos("*.nowhere", "out", ".pkl")


def test_links_that_a_pattern_meets(tmp_path):
    _touch(tmp_path, "elsewhere/a.mp4", "v/b.mp4")
    (tmp_path / "v" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "v" / "c.mp4").symlink_to(tmp_path / "elsewhere" / "a.mp4")
    videos, others = find_videos(f"{tmp_path}/v/**/*.mp4", "out", ".pkl")
    assert [video.name for video in videos] == ["b.mp4"] and others["links"] == 2
    assert list(_names(f"{tmp_path}/v/**/*.mp4", follow_links=True)) == ["b.mp4", "c.mp4", "link/a.mp4"]
    (tmp_path / "there").symlink_to(tmp_path / "v")  # the folder itself may be a link
    assert list(_names(f"{tmp_path}/there/*.mp4")) == ["b.mp4"]


def test_a_list(tmp_path):
    _touch(tmp_path, "v/a.mp4", "v/sub/b.mkv", "v/odd")
    file = tmp_path / "v" / "videos.txt"
    file.write_bytes(b"\xef\xbb\xbfsub/b.mkv\r\n\n./a.mp4\na.mp4\nodd\n" + os.fsencode(tmp_path / "v" / "gone.mp4"))
    assert _names(file) == {
        "a.mp4": "out/a.pkl",
        "gone.mp4": "out/gone.pkl",
        "odd": "out/odd.pkl",
        "sub/b.mkv": "out/sub/b.pkl",
    }


@pytest.mark.parametrize("line", ["../a.mp4", "/elsewhere/a.mp4", "sub/../../a.mp4", "{folder}-more/a.mp4"])
def test_a_list_leads_nowhere_else_unless_the_user_says_so(tmp_path, line):
    file = tmp_path / "v" / "videos.txt"
    file.parent.mkdir()
    line = line.format(folder=file.parent)
    file.write_text(f"b.mp4\n{line}\n")
    with pytest.raises(ValueError, match="line 2 leads out of the list's folder .*--follow_links True takes"):
        find_videos(file, "out", ".pkl")
    whole = os.path.normpath(file.parent / line)
    assert _names(file, follow_links=True) == {"b.mp4": "out/b.pkl", whole[1:]: f"out{whole[:-4]}.pkl"}


def test_a_list_follows_no_link_unless_the_user_says_so(tmp_path):
    _touch(tmp_path, "elsewhere/a.mp4", "v/b.mp4")
    (tmp_path / "v" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "v" / "videos.txt").write_text("link/a.mp4\nb.mp4\n")
    videos, others = find_videos(tmp_path / "v" / "videos.txt", "out", ".pkl")
    assert [video.name for video in videos] == ["b.mp4"] and others["links"] == 1
    assert list(_names(tmp_path / "v" / "videos.txt", follow_links=True)) == ["b.mp4", "link/a.mp4"]


def test_what_is_no_list_is_told_and_what_to_give_works(tmp_path):
    _touch(tmp_path, "v/a.mp4")
    (tmp_path / "v" / "data.bin").write_bytes(b"a\0b")
    with pytest.raises(ValueError, match="no list of paths.*give a folder, a pattern such as 'videos/\\*.mp4'"):
        find_videos(tmp_path / "v" / "data.bin", "out", ".pkl")
    (tmp_path / "v" / "videos.txt").write_text("a.mp4")
    _shard(tmp_path / "v" / "s.tar", **{"a.mp4": b"x"})
    for given in (tmp_path / "v", tmp_path / "v" / "*.mp4", tmp_path / "v" / "videos.txt", tmp_path / "v" / "s.tar"):
        assert len(_names(given)) == 1
    with pytest.raises(ValueError, match="is empty"):
        find_videos(_empty(tmp_path / "empty.txt"), "out", ".pkl")


def _empty(path):
    path.touch()
    return path


def test_members_of_tar_shards(tmp_path):
    link = tarfile.TarInfo("l.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    _shard(
        tmp_path / "00.tar",
        **{
            "a.mp4": b"12",
            "a.json": b"{}",
            "sub/b.c.mp4": b"345",
            "l.mp4": link,
            "._a.mp4": b"x",
            "../up.mp4": b"6",
            "d.1.mp4": b"7",
            "d.2.mp4": b"8",
        },
    )
    videos, others = find_videos(tmp_path / "00.tar", "out", ".pkl")
    found = {video.name: video for video in videos}
    assert others == {".json": 1, "no plain file": 1}
    assert str(found["00/a.mp4"].output) == "out/00/a.pkl" and str(found["00/sub/b.c.mp4"].output) == "out/00/sub/b.pkl"
    assert (found["00/a.mp4"].size(), found["00/sub/b.c.mp4"].size()) == (2, 3)
    with found["00/sub/b.c.mp4"].file() as path:
        assert path.read_bytes() == b"345" and path.suffix == ".mp4"
    assert not path.exists()
    assert "leads out of its archive" in found["00/../up.mp4"].fault
    assert str(found["00/../up.mp4"].output) == "out/00/up.pkl"
    assert "00/d.2.mp4 would be written to d.pkl as well; rename" in found["00/d.1.mp4"].fault


def test_shards_by_pattern_list_and_folder(tmp_path):
    _shard(tmp_path / "0.tar", **{"a.mp4": b"1"})
    (tmp_path / "in").mkdir()
    _shard(tmp_path / "in" / "1.tar", **{"a.mp4": b"2"})
    (tmp_path / "shards.txt").write_text("0.tar\nin/1.tar\n")
    both = {"0/a.mp4": "out/0/a.pkl", "in/1/a.mp4": "out/in/1/a.pkl"}
    assert _names(tmp_path / "**" / "*.tar") == _names(tmp_path / "shards.txt") == both
    (tmp_path / "shards.txt").unlink()
    with pytest.raises(ValueError, match=r"for its tar shards give '.*/\*.tar'"):
        find_videos(tmp_path, "out", ".pkl")
    assert list(_names(tmp_path / "*.tar")) == ["0/a.mp4"]


def test_a_shard_that_is_damaged(tmp_path):
    whole = _shard(tmp_path / "0.tar", **{"a.mp4": bytes(2000), "b.mp4": bytes(2000)})
    videos, _ = find_videos(whole, "out", ".pkl")
    content = whole.read_bytes()
    for part in (b"no tar" * 200, content[: 512 + 1000], content[: 512 + 2048 + 100]):
        (tmp_path / "1.tar").write_bytes(part)
        with pytest.raises(ValueError, match="is no whole tar archive .*download or write it again"):
            find_videos(tmp_path / "1.tar", "out", ".pkl")
    (tmp_path / "1.tar").write_bytes(content)  # as told
    assert len(_names(tmp_path / "1.tar")) == 2
    whole.write_bytes(content[:1000])
    with pytest.raises(DecodeError, match="its archive ends before it does"), videos[0].file():
        pass
    whole.unlink()
    with pytest.raises(DecodeError, match="cannot be taken out of its archive"), videos[0].file():
        pass


def test_a_cut_shard_of_several_costs_its_own_videos(tmp_path):
    content = _shard(tmp_path / "0.tar", **{"a.mp4": bytes(2000)}).read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.tar").write_bytes(content[:1000])
    videos, _ = find_videos(tmp_path / "**" / "*.tar", "out", ".pkl")
    assert [(video.name, str(video.output)) for video in videos] == [
        ("0/a.mp4", "out/0/a.pkl"),
        ("in/1.tar", "out/in/1.pkl"),
    ]
    assert videos[0].fault is None and videos[1].size() == 0
    assert f"{tmp_path}/in/1.tar is no whole tar archive" in videos[1].fault
    (tmp_path / "0.tar").write_bytes(content[:1000])
    with pytest.raises(ValueError, match="is no whole tar archive"):
        find_videos(tmp_path / "**" / "*.tar", "out", ".pkl")


@pytest.mark.parametrize(
    "number, raised, told",
    [
        (errno.ENOSPC, OSError, "No space left on device: '.*fastvid-.*mp4'"),
        (errno.EIO, DecodeError, "cannot be taken"),
    ],
)
def test_no_room_for_the_copy_of_a_member_is_no_fault_of_the_video(tmp_path, monkeypatch, number, raised, told):
    videos, _ = find_videos(_shard(tmp_path / "0.tar", **{"a.mp4": bytes(2000)}), "out", ".pkl")

    def broken(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "sendfile", broken)
    with pytest.raises(raised, match=told), videos[0].file():
        pass


def test_no_room_for_the_copy_of_a_member_ends_the_extraction(tmp_path, monkeypatch):
    write_tower(tmp_path / "tower")
    _shard(tmp_path / "0.tar", **{f"{name}.mp4": bytes(2000) for name in "abc"})

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "sendfile", full)
    with pytest.raises(OSError, match="No space left on device"):
        extract(
            ExtractConfig(
                str(tmp_path / "0.tar"),
                str(tmp_path / "out"),
                vision_tower=str(tmp_path / "tower"),
                num_frames=6,
                device="cpu",
            )
        )
    assert read_manifest(tmp_path / "out") == {}


@pytest.mark.slow
def test_features_of_a_shard_are_those_of_the_files(tmp_path):
    write_tower(tmp_path / "tower")
    (tmp_path / "v").mkdir()
    for name, frames in (("a", 9), ("b", 4)):
        draw(tmp_path / "v" / f"{name}.mp4", frames)
    shard = _shard(
        tmp_path / "00.tar",
        **{f"{name}.mp4": (tmp_path / "v" / f"{name}.mp4").read_bytes() for name in "ab"},
        **{"bad.mp4": b"no video"},
    )
    options = {"vision_tower": str(tmp_path / "tower"), "num_frames": 6, "device": "cpu"}
    extract(ExtractConfig(str(tmp_path / "v"), str(tmp_path / "plain"), **options))
    summary = extract(ExtractConfig(str(shard), str(tmp_path / "out"), **options))
    assert summary.extracted == 2 and "cannot be opened" in dict(summary.failures)["00/bad.mp4"]
    for name in "ab":
        features, header = load_features(tmp_path / "out" / "00" / f"{name}.safetensors")
        plain, plain_header = load_features(tmp_path / "plain" / f"{name}.safetensors")
        assert features.equal(plain) and header == {**plain_header, "source": f"00/{name}.mp4"}
    assert extract(ExtractConfig(str(shard), str(tmp_path / "out"), **options)).skipped == 2
