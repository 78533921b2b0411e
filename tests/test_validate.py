"""The check before training: everything that is wrong is found, counted and named."""

import json

import pytest
import torch

from fastvid import validate
from fastvid.config import TrainConfig, ValidateConfig
from fastvid.features.file import save_features
from fastvid.flags import parse

TURNS = [{"from": "human", "value": "What?\n<video>"}, {"from": "gpt", "value": "That."}]
TEXT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]


@pytest.fixture
def data(tmp_path):
    """train.json with two good videos in features/, and a text-only record."""
    (tmp_path / "features").mkdir()
    for name in ("a.safetensors", "b.pkl"):
        save_features(tmp_path / "features" / name, torch.ones(5, 3, dtype=torch.float16), {})
    records = [
        {"id": "a", "video": "a.pkl", "conversations": TURNS},
        {"id": "b", "video": "b.pkl", "conversations": TURNS},
        {"id": "t", "conversations": TEXT},
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    return tmp_path


def _check(folder, records=None, **settings):
    if records is not None:
        (folder / "train.json").write_text(json.dumps(records))
    return validate.validate(
        ValidateConfig([str(folder / "train.json")], video_folder=str(folder / "features"), **settings)
    )


def test_good_data(data, capsys):
    report = _check(data)
    assert not report.problems
    assert (report.records, report.text_only, report.duplicates, len(report.videos)) == (3, 1, 0, 2)
    assert report.layouts == {(5, 3, torch.float16): 2}
    flags = ["--data_path", str(data / "train.json"), "--video_folder", str(data / "features")]
    assert validate.main([*flags, "--num_video_tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "2 of 5 × 3 float16" in out and out.endswith("nothing wrong\n")


def test_towers_frames_and_formats_are_counted(data, capsys):
    """Two towers are a problem; one tower's name may be spelt in two ways, and its frames may differ."""
    records = []
    for number, (tower, revision, frames) in enumerate(
        [("x", "sha256:aa", 16), ("x", "sha256:aa", 16), ("./x", "sha256:aa", 8), ("y", "sha256:bb", 16)]
    ):
        save_features(
            data / "features" / f"{number}.safetensors",
            torch.ones(5, 3, dtype=torch.float16),
            {"tower": tower, "tower_revision": revision, "num_frames": frames},
        )
        records.append({"id": "a", "video": f"{number}.pkl", "conversations": TURNS})
    records.append({"id": "b", "video": "b.pkl", "conversations": TURNS})
    report = _check(data, records)
    assert report.problems == {"features of another vision tower": 1}
    assert report.makers == {
        ("x", "sha256:aa", 16, "temporal+spatial"): 2,
        ("./x", "sha256:aa", 8, "temporal+spatial"): 1,
        ("y", "sha256:bb", 16, "temporal+spatial"): 1,
    }
    assert report.formats == {".safetensors": 4, ".pkl": 1}
    text = validate.summary(report)
    assert "4 .safetensors, 1 .pkl" in text and "2 x (sha256:aa…), 16 frames, temporal+spatial" in text
    (example,) = report.examples["features of another vision tower"]
    assert example.startswith("1 of y (sha256:bb…), 3 of ") and "--overwrite True" in example
    assert not _check(data, records[:3]).problems


def test_the_references_records_and_features(tiny):
    folder = tiny / "data336"
    report = validate.validate(ValidateConfig([str(folder / "train.json")], video_folder=str(folder / "feats")))
    assert not report.problems and report.layouts == {(676, 32, torch.float16): 10}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("record", "kind", "example"),
    [
        ([], "malformed record", r"train.json: record 0 (from 0): the record is a list"),
        ({"id": "x"}, "malformed record, field 'conversations'", "record 0 (from 0): field 'conversations'"),
        (
            {"id": "x", "video": "a.pkl", "conversations": TEXT},
            "<video> placeholders and videos differ in number",
            "0 <video> in the text for 1 video",
        ),
        (
            {"id": "x", "video": "a.pkl", "conversations": TURNS * 2},
            "<video> placeholders and videos differ in number",
            "2 <video> in the text for 1 video",
        ),
        (
            {"id": "x", "image": "a.jpg", "conversations": TEXT},
            "<video> placeholders and videos differ in number",
            "put <image> into the question",
        ),
        ({"id": "x", "video": "a.pkl", "conversations": TURNS[:1]}, "no answer", "no turn from gpt with an answer"),
        (
            {"id": "x", "video": "nan.pkl", "conversations": TURNS},
            "features unreadable",
            "nan.pkl holds NaN or infinity",
        ),
        (
            {"id": "x", "video": "lfs.pkl", "conversations": TURNS},
            "features unreadable",
            "lfs.pkl is a git-lfs pointer",
        ),
        (
            {"id": "x", "video": "absent.pkl", "conversations": TURNS},
            "features missing",
            "'absent.pkl' has no features",
        ),
        ({"id": "x", "video": "../a.pkl", "conversations": TURNS}, "features refused", "'../a.pkl' is refused"),
        (
            {"id": "x", "video": "torn.pkl", "conversations": TURNS},
            "features truncated",
            "torn.safetensors: it is cut short",
        ),
        ({"id": "x", "video": "evil.pkl", "conversations": TURNS}, "features unreadable", "names os.system"),
    ],
)
def test_each_kind_of_problem(data, capsys, record, kind, example):
    (data / "features" / "torn.safetensors").write_bytes(b"\xff\xff\0\0\0\0\0\0{")
    (data / "features" / "evil.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (data / "features" / "lfs.pkl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    save_features(data / "features" / "nan.pkl", torch.tensor([[1.0, float("nan"), 2.0]]), {})
    (data / "train.json").write_text(json.dumps([record]))
    assert validate.main(["--data_path", str(data / "train.json"), "--video_folder", str(data / "features")]) == 1
    out = capsys.readouterr().out
    assert f"{kind}: 1\n" in out and example in out and out.endswith("\n1 problem\n")


def test_several_videos_of_one_record(data):
    turns = [{"from": "human", "value": "<video>\nand\n<video>?"}, TURNS[1]]
    report = _check(data, [{"id": "x", "videos": ["a.pkl", "b.pkl"], "conversations": turns}])
    assert not report.problems and len(report.videos) == 2


def test_features_of_another_shape(data):
    save_features(data / "features" / "c.safetensors", torch.ones(7, 3), {})
    save_features(data / "features" / "d.safetensors", torch.ones(5, 4), {})
    records = [{"id": name, "video": f"{name}.pkl", "conversations": TURNS} for name in "abcd"]
    report = _check(data, records)
    assert report.problems == {"features of another shape": 1}
    assert "d.safetensors is 5 × 4 instead of any number × 3" in report.examples["features of another shape"][0]
    report = _check(data, records, parity="reference")
    assert report.problems == {"features of another shape": 2}
    assert "c.safetensors is 7 × 3 instead of 5 × 3" in report.examples["features of another shape"][0]
    assert _check(data, records, num_video_tokens=7).problems == {"features of another shape": 3}


@pytest.mark.parametrize("parity", ["none", "reference"])
def test_features_of_other_channels_than_the_models(data, parity):
    (data / "model").mkdir()
    (data / "model" / "config.json").write_text('{"mm_hidden_size": 5}')
    report = _check(data, model_name_or_path=str(data / "model"), parity=parity)
    assert report.problems["features of another shape"] == 2
    assert "5 × 3 instead of any number × 5" in report.examples["features of another shape"][0]


def test_videos_of_any_number_of_rows_are_no_problem(data):
    for rows in range(1, 5):
        save_features(data / "features" / f"{rows}.safetensors", torch.ones(rows, 3), {})
    names = [*"ab", *range(1, 5)]
    report = _check(data, [{"id": "x", "video": f"{name}.pkl", "conversations": TURNS} for name in names])
    assert not report.problems and report.layouts.total() == 6
    text = validate.summary(report)
    assert "2 of 5 × 3 float16" in text and "… and 2 more shapes; 1 to 5 rows in all" in text


def test_repeated_records_are_counted_and_no_problem(data):
    first = {"id": "a", "video": "a.pkl", "conversations": TURNS}
    turned = dict(reversed(first.items()))
    report = _check(data, [first, first, turned, {**first, "id": "b"}])
    assert report.duplicates == 2 and report.videos == {"a.pkl": 4} and not report.problems


def test_many_problems_are_counted_and_the_first_shown(data):
    report = _check(data, [{"id": f"{i}", "video": f"{i}.pkl", "conversations": TURNS} for i in range(10)] + [3] * 5)
    assert report.problems == {"malformed record": 5, "features missing": 10}
    text = validate.summary(report)
    assert "… and 7 more" in text and "… and 2 more" in text and text.endswith("15 problems")
    assert text.count("has no features") == 3


def test_one_unreadable_file_does_not_hide_the_others(data):
    (data / "torn.json").write_text("[{")
    report = validate.validate(ValidateConfig([str(data / "torn.json"), str(data / "train.json")]))
    assert report.problems == {"unreadable data file": 1} and report.records == 3 and report.files == 2
    assert "torn.json: line 1" in report.examples["unreadable data file"][0]


def test_without_a_folder_features_are_not_looked_at(data):
    report = validate.validate(ValidateConfig([str(data / "train.json")]))
    assert not report.problems and "not looked at: no --video_folder" in validate.summary(report)


def test_quick_reads_headers_alone(data, monkeypatch):
    from fastvid.features import file as features

    monkeypatch.setattr(features.torch, "empty", lambda *a, **k: pytest.fail("values were read"))
    found = _check(data, [{"id": "a", "video": "a.pkl", "conversations": TURNS}], quick=True)
    assert found.layouts == {(5, 3, torch.float16): 1} and not found.problems


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("train.json", "[]", "data file without a record"),
        ("train.json", "", "unreadable data file"),
        ("train.jsonl", "", "unreadable data file"),
        ("train.json", '{"data": []}', "data file without a record"),
    ],
)
def test_nothing_is_a_problem(data, capsys, name, content, kind):
    (data / name).write_text(content)
    assert validate.main(["--data_path", str(data / name)]) == 1
    assert f"{kind}: 1\n" in capsys.readouterr().out


def test_a_folder_without_features_is_a_problem(data, tmp_path):
    (tmp_path / "none").mkdir()
    (data / "text.json").write_text(json.dumps([{"conversations": TEXT}]))
    config = ValidateConfig([str(data / "text.json")], video_folder=str(tmp_path / "none"))
    assert validate.validate(config).problems == {"features missing": 1}


def test_what_is_left_out_of_records_is_counted_and_no_problem(data):
    system = {"id": 1, "video": "a.pkl", "conversations": TURNS, "system": "Answer in French."}
    report = _check(data, [system, {**system, "id": 2}, {"conversations": TURNS}])
    assert not report.problems and report.text_only == 1
    text = validate.summary(report)
    assert "2 records: field 'system' is not used (first: " in text and "1 record: <video> in a record without" in text


def test_the_data_flags_of_a_training_command(data):
    flags = [
        "--model_name_or_path",
        "llava",
        "--version",
        "v1",
        "--data_path",
        "x.json",
        "y.jsonl",
        "--video_folder",
        "f",
        "--mm_use_vid_start_end",
        "--model_max_length",
        "2048",
    ]
    config = parse(ValidateConfig, flags)
    train = parse(TrainConfig, [*flags, "--output_dir", "out"])
    for name in (
        "model_name_or_path",
        "version",
        "data_path",
        "video_folder",
        "mm_use_vid_start_end",
        "model_max_length",
    ):
        assert getattr(config, name) == getattr(train, name)
