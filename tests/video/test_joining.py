"""Annotations, features and videos joined before training: what is missing, failed, stale or cut short, and dropped."""

import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from clips import draw
from towers import write_tower
from training_run import write_run

from fastvid import extract, validate
from fastvid.config import ValidateConfig
from fastvid.data.records import read_records
from fastvid.features.cut_short import is_cut_short
from fastvid.features.file import load_features, save_features
from fastvid.validation.sources import Sources

TURNS = [{"from": "human", "value": "What?\n<video>"}, {"from": "gpt", "value": "That."}]
NAMES = "good", "missing", "failed", "stale", "cut", "sub/inner"


def record(name, **more):
    return {"id": name, "video": f"{name}.mp4", "conversations": TURNS, **more}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """videos/ of six clips, feats/ that `fastvid extract` made of them, train.json; one clip is no video."""
    folder = tmp_path_factory.mktemp("joined")
    for frames, name in enumerate(NAMES, start=4):
        (folder / "videos" / name).parent.mkdir(exist_ok=True, parents=True)
        draw(folder / "videos" / f"{name}.mp4", frames)
    (folder / "videos" / "failed.mp4").write_bytes(b"<html>not found")
    draw(folder / "videos" / "nobodys.mp4", 3)
    write_tower(folder / "tower")
    assert extract.main(extraction(folder)) == 1
    records = [*map(record, NAMES), {"id": "t", "conversations": [{"from": "human", "value": "?"}, TURNS[1]]}]
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def extraction(folder, *more):
    return [
        "--video_dir_path",
        str(folder / "videos"),
        "--clip_feat_path",
        str(folder / "feats"),
        "--vision_tower",
        str(folder / "tower"),
        "--num_frames",
        "4",
        "--device",
        "cpu",
        "--decode_workers",
        "1",
        *more,
    ]


@pytest.fixture
def spoilt(extracted, tmp_path):
    """A copy of `extracted` in which each clip has what its name says."""
    folder = shutil.copytree(extracted, tmp_path / "s")
    (folder / "feats" / "missing.safetensors").unlink()
    (folder / "videos" / "missing.mp4").unlink()
    draw(folder / "videos" / "stale.mp4", 20)
    shorten(folder / "feats" / "cut.safetensors")
    return folder


def shorten(path, by=1):
    os.truncate(path, path.stat().st_size - by)


def flags(folder, *more):
    return [
        "--data_path",
        str(folder / "train.json"),
        "--video_folder",
        str(folder / "feats"),
        "--video_dir_path",
        str(folder / "videos"),
        *more,
    ]


def check(folder, **settings):
    return validate.validate(
        ValidateConfig(
            [str(folder / "train.json")],
            video_folder=str(folder / "feats"),
            **{"video_dir_path": str(folder / "videos"), **settings},
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("quick", [False, True])
def test_each_state_is_found_and_counted(spoilt, capsys, quick):
    report = check(spoilt, quick=quick)
    assert +report.states == {"usable": 2, "missing": 1, "failed": 1, "stale": 1, "truncated": 1}
    assert (
        report.problems == {"features missing": 1, "extraction failed": 1, "features stale": 1, "features truncated": 1}
        and report.unnamed == 1
    )
    reasons = {video: reason for video, (_, reason) in report.bad_videos.items()}
    assert "nor does its video lie" in reasons["missing.mp4"] and "is a web page" in reasons["failed.mp4"]
    assert "the video was changed since" in reasons["stale.mp4"] and "instead of" in reasons["cut.mp4"]
    assert validate.main(flags(spoilt, "--quick", str(quick))) == 1
    out = capsys.readouterr().out
    for line in ("  usable            2", "  stale             1", "  in no record      1"):
        assert line in out
    assert "decoded by          3 pyav" in out and "colours by swscale" in out


def test_a_video_of_the_same_size_and_other_content_is_stale(extracted, tmp_path):
    folder = shutil.copytree(extracted, tmp_path / "s")
    path = folder / "videos" / "good.mp4"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "made of other bytes than" in check(folder).bad_videos["good.mp4"][1]
    assert "good.mp4" not in check(folder, quick=True).bad_videos
    assert "good.mp4" not in check(folder, video_dir_path=None).bad_videos


@pytest.mark.slow
def test_features_are_stale_once_their_video_fails_again(extracted, tmp_path, capsys):
    folder = shutil.copytree(extracted, tmp_path / "s")
    (folder / "videos" / "good.mp4").write_bytes(b"")
    extract.main(extraction(folder))
    assert "the video was changed since" in check(folder).bad_videos["good.mp4"][1]
    assert "extraction of its video failed (is empty" in check(folder, video_dir_path=None).bad_videos["good.mp4"][1]
    shutil.copy(extracted / "videos" / "good.mp4", folder / "videos")  # it is the old one again
    assert "good.mp4" not in check(folder).bad_videos


@pytest.mark.slow
@pytest.mark.parametrize("quick", [False, True])
def test_pickles_are_joined_through_the_manifest(extracted, tmp_path, quick):
    folder = shutil.copytree(extracted, tmp_path / "s", ignore=shutil.ignore_patterns("feats"))
    extract.main(extraction(folder, "--format", "pkl"))
    report = check(folder, quick=quick)
    assert report.problems == {"extraction failed": 1} and report.not_compared == 0
    draw(folder / "videos" / "good.mp4", 20)
    (folder / "feats" / "cut.pkl").write_bytes((folder / "feats" / "stale.pkl").read_bytes())  # nobody knows whose
    report = check(folder, quick=quick)
    assert [*report.bad_videos] == ["failed.mp4", "good.mp4"] and report.not_compared == 1
    assert report.decoders.total() == 4


def test_damaged_videos_and_several_conversions_are_told(extracted, tmp_path, capsys):
    folder = shutil.copytree(extracted, tmp_path / "s")
    path = folder / "feats" / "good.safetensors"
    features, header = load_features(path)
    save_features(path, features, {**header, "video": {**header["video"], "conversion": "dali", "damaged": 3}})
    report = check(folder)
    assert report.problems == {"extraction failed": 1} and report.damaged == 1
    text = validate.summary(report)
    assert "1 feature files are of damaged videos" in text
    assert "warning     features of 2 colour conversions: 4 of swscale, 1 of dali" in text


@pytest.mark.slow
@pytest.mark.parametrize("quick", [False, True])
def test_videos_in_shards_are_compared(extracted, tmp_path, quick):
    """Each with its own bytes in the archive."""
    shard = tmp_path / "00.tar"
    names = "good.mp4", "stale.mp4", "other.mp4"

    def write():
        with tarfile.open(shard, "w") as archive:
            for name in names:
                archive.add(tmp_path / name, name)

    for name, source in zip(names, ("good", "stale", "cut")):
        shutil.copy(extracted / "videos" / f"{source}.mp4", tmp_path / name)
    write()
    extract.main(
        ["--video_dir_path", str(shard), "--clip_feat_path", str(tmp_path / "feats"), *extraction(extracted)[4:]]
    )
    (tmp_path / "train.json").write_text(json.dumps([record(f"00/{name[:-4]}") for name in names]))
    report = check(tmp_path, video_dir_path=str(shard), quick=quick)
    assert not report.problems and report.states["usable"] == 3 and report.not_compared == 0 == report.unnamed
    assert Sources(tmp_path / "feats", shard).path_of("00/good") is None
    content = bytearray((tmp_path / "good.mp4").read_bytes())
    content[-1] ^= 1
    (tmp_path / "good.mp4").write_bytes(content)
    draw(tmp_path / "stale.mp4", 20)
    write()
    bad = check(tmp_path, video_dir_path=str(shard), quick=quick).bad_videos
    assert bad.keys() == {"00/stale.mp4"} | (set() if quick else {"00/good.mp4"})
    assert "and 00/stale.mp4 has" in bad["00/stale.mp4"][1]


def test_a_list_does_not_lead_out_of_its_folder(extracted, tmp_path):
    folder = shutil.copytree(extracted, tmp_path / "s")
    file = folder / "videos" / "all.txt"
    file.write_text("good.mp4\n")
    assert check(folder, video_dir_path=str(file)).not_compared == 4
    file.write_text("good.mp4\n../elsewhere.mp4\n")
    with pytest.raises(ValueError, match="line 2 leads out .*; give the folder of the videos instead"):
        check(folder, video_dir_path=str(file))
    assert check(folder, video_dir_path=str(file.parent)).not_compared == 0  # as told
    file.write_text("good.mp4\nlink.mp4\n")
    (folder / "videos" / "good.mp4").rename(folder / "elsewhere.mp4")
    (folder / "videos" / "link.mp4").symlink_to(folder / "elsewhere.mp4")
    (folder / "videos" / "good.mp4").symlink_to(folder / "elsewhere.mp4")
    with pytest.raises(ValueError, match="no file that it names"):
        check(folder, video_dir_path=str(file))


def test_the_report_as_json(spoilt, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert validate.main(flags(spoilt, "--json", str(file))) == 1
    found = json.loads(file.read_text())
    assert found["states"] == check(spoilt).states and found["drop"] is None
    assert {video["video"]: video["state"] for video in found["bad_videos"]} == {
        f"{name}.mp4": state
        for name, state in (("missing", "missing"), ("failed", "failed"), ("stale", "stale"), ("cut", "truncated"))
    }
    assert [problem["count"] for problem in found["problems"]] == [1, 1, 1, 1]
    assert found["decoded_by"][0]["conversion"] == "swscale" and found["layouts"][0]["rows"] == 8
    assert validate.main(["--data_path", str(spoilt / "train.json"), "--json", str(tmp_path / "bare.json")]) == 0
    assert json.loads((tmp_path / "bare.json").read_text())["states"] is None


ODD = [
    {"id": "1", "number": 0.1, "big": 2**70, "text": "é \ud800 \u2028\x00", "none": None},
    {"id": 7, "list": [1.0, {}]},
]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_what_is_dropped(spoilt, tmp_path, capsys, ending):
    """The filtered file holds the same records, in their order, and nothing is wrong with it."""
    records = [
        record("cut"),
        record("good", **ODD[0]),
        [],
        record("good", conversations=TURNS[:1]),
        record("stale"),
        record("sub/inner", **ODD[1]),
        record("good", **ODD[0]),
        record("failed"),
        record("missing"),
        {"id": "t", "conversations": [{"from": "human", "value": "?"}, TURNS[1]]},
    ]
    (spoilt / "train.json").write_text(json.dumps(records))
    file = tmp_path / f"kept.{ending}"
    assert validate.main(flags(spoilt, "--drop", str(file), "--json", str(tmp_path / "r.json"))) == 0
    told = capsys.readouterr()
    assert "4 of 10 records were written to" in told.err and "features stale: 1" in told.out
    kept = read_records(file)
    assert [json.dumps(one) for one in kept] == [json.dumps(records[i]) for i in (1, 5, 6, 9)]
    assert file.read_text().startswith("[" if ending == "json" else "{")
    assert json.loads((tmp_path / "r.json").read_text())["drop"] == {"file": str(file), "kept": 4, "left_out": 6}
    assert validate.main(["--data_path", str(file), *flags(spoilt)[2:]]) == 0
    assert capsys.readouterr().out.endswith("nothing wrong\n")


def test_several_files_are_dropped_into_one(spoilt, tmp_path):
    (spoilt / "more.jsonl").write_text(json.dumps(record("good", id="more")))
    check_all = ValidateConfig(
        [str(spoilt / name) for name in ("train.json", "more.jsonl", "train.json")],
        video_folder=str(spoilt / "feats"),
        drop=str(tmp_path / "kept.json"),
    )
    validate.validate(check_all)
    assert [one["id"] for one in read_records(tmp_path / "kept.json")] == [
        "good",
        "stale",
        "sub/inner",
        "t",
        "more",
        "good",
        "stale",
        "sub/inner",
        "t",
    ]


def test_features_of_the_rarer_tower_are_dropped(extracted, tmp_path):
    folder = shutil.copytree(extracted, tmp_path / "s")
    path = folder / "feats" / "good.safetensors"
    features, header = load_features(path)
    save_features(path, features, {**header, "tower_revision": "sha256:other"})
    report = check(folder, drop=str(tmp_path / "kept.json"))
    assert report.states["another tower"] == 1 and report.problems["features of another vision tower"] == 1
    assert "good" not in [one["id"] for one in read_records(tmp_path / "kept.json")]


def test_what_is_there_is_not_replaced(spoilt, tmp_path, capsys):
    """Each remedy is carried out."""
    kept, report = tmp_path / "kept.json", tmp_path / "report.json"
    for flag, path in (("--drop", kept), ("--json", report)):
        path.write_text("mine")
        with pytest.raises(
            ValueError, match=f"{flag} .* is there already; give another file, or replace it with --overwrite True"
        ):
            validate.main(flags(spoilt, flag, str(path)))
        assert path.read_text() == "mine"
        validate.main(flags(spoilt, flag, f"{path}.another.json"))
        validate.main(flags(spoilt, flag, str(path), "--overwrite", "True"))
        assert json.loads(path.read_text())
    before = (spoilt / "train.json").read_bytes()
    for flag in ("--drop", "--json"):
        with pytest.raises(ValueError, match=f"{flag} .*train.json is a --data_path itself, .*; give another file"):
            validate.main(flags(spoilt, flag, str(spoilt / "train.json"), "--overwrite", "True"))
    assert (spoilt / "train.json").read_bytes() == before
    both = flags(spoilt, "--overwrite", "True", "--json", str(kept))
    with pytest.raises(ValueError, match="give each a file of its own"):
        validate.main([*both, "--drop", str(kept)])
    assert validate.main([*both, "--drop", str(tmp_path / "own.json")]) == 0


def test_nothing_is_written_where_nothing_can_be_kept(spoilt, tmp_path, capsys):
    for content, why in (("[{", "a data file cannot be read"), (json.dumps([[], record("cut")]), "each of the 2")):
        (spoilt / "train.json").write_text(content)
        with pytest.raises(ValueError, match=f"{why}.*: nothing was written to --drop"):
            validate.main(
                flags(
                    spoilt,
                    "--drop",
                    str(tmp_path / "kept.json"),
                    "--json",
                    str(tmp_path / "r.json"),
                    "--overwrite",
                    "True",
                )
            )
        assert not (tmp_path / "kept.json").exists() and "problem" in capsys.readouterr().out
        assert json.loads((tmp_path / "r.json").read_text())["drop"] is None


def test_a_write_that_fails_leaves_what_was_there(spoilt, tmp_path, monkeypatch):
    kept = tmp_path / "kept.json"
    kept.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            check(spoilt, drop=str(kept), overwrite=True)
    assert kept.read_text() == "mine" and os.listdir(tmp_path).count("kept.json") == 1
    assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")] == []


@pytest.mark.slow
def test_stale_features_are_made_again(spoilt, capsys):
    """What the message tells to do ends it, of a video of another size and of the same."""
    content = bytearray((spoilt / "videos" / "good.mp4").read_bytes())
    content[-1] ^= 1
    (spoilt / "videos" / "good.mp4").write_bytes(content)
    for name in ("stale", "good"):
        reason = check(spoilt).bad_videos[f"{name}.mp4"][1]
        assert reason.endswith("remove it and extract it again (fastvid extract)")
        (spoilt / "feats" / f"{name}.safetensors").unlink()
    extract.main(extraction(spoilt))
    assert not {"stale.mp4", "good.mp4"} & check(spoilt).bad_videos.keys()


def test_exit_codes(spoilt, tmp_path, capsys):
    """A data file that is not there is a mistake in the command: code 2, as other commands end."""
    from fastvid import cli

    with pytest.raises(SystemExit) as ended:
        cli.main(["validate", "--data_path", str(tmp_path / "nowhere.json"), str(spoilt / "train.json")])
    assert ended.value.code == 2 and "7 in 2 files" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(
            [
                "train",
                "--data_path",
                str(tmp_path / "nowhere.json"),
                "--model_name_or_path",
                "x",
                "--output_dir",
                str(tmp_path / "o"),
            ]
        )
    assert ended.value.code == 2
    for flag in ("--video_folder", "--video_dir_path"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["validate", *flags(spoilt, flag, str(tmp_path / "nowhere"))])
        assert ended.value.code == 2 and f"{flag} " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.safetensors", "a.pkl", "a.npy", "a.pt"])
def test_a_file_is_cut_short_wherever_it_ends(tmp_path, name):
    path = tmp_path / name
    if name in ("a.safetensors", "a.pkl"):
        save_features(path, torch.ones(5, 3, dtype=torch.float16), {})
    elif name == "a.npy":
        np.save(path, np.ones((5, 3), np.float16))
    else:
        torch.save(torch.ones(5, 3), path)
    whole = path.read_bytes()
    assert not is_cut_short(path)
    for end in (len(whole) - 1, len(whole) - 5, len(whole) // 2):
        path.write_bytes(whole[:end])
        assert is_cut_short(path)
    for other in (b"", b"no such thing", whole + b"more", b"\x7b" * 200):
        path.write_bytes(other)
        assert not is_cut_short(path) or (name == "a.pkl" and other.endswith(b"more"))
    assert not is_cut_short(tmp_path) and not is_cut_short(tmp_path / "nowhere.npy")


def test_samples_that_are_too_long_are_dropped(tmp_path):
    run = write_run(tmp_path)
    records = json.loads((run / "train.json").read_text())
    records[3]["conversations"][0]["value"] = "why is it " * 200 + "\n<video>"
    (run / "train.json").write_text(json.dumps(records))
    report = validate.validate(
        ValidateConfig(
            [str(run / "train.json")],
            model_name_or_path=str(run / "model"),
            video_folder=str(run / "feats"),
            model_max_length=512,
            mm_use_vid_start_end=True,
            drop=str(tmp_path / "kept.json"),
        )
    )
    assert report.problems == {"samples longer than --model_max_length": 1} and report.bad_records == {(0, 3)}
    assert read_records(tmp_path / "kept.json") == records[:3] + records[4:]
