"""The conversion command: the reference's scripts by name, its output to the byte."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from fastvid import convert
from fastvid.config import ConvertConfig

RECORDS = [{"q": f"Question {i}?", "a": f"Answer {i}.", "video_id": f"v_{i}"} for i in range(30)]
SCRIPTS = ("convert_instruction_json_to_training_format.py", "filter_for_missing_videos.py")


def _run(command, *flags, cwd):
    """A command line of a checkout that is not installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *command, *flags], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("output", ["pgvl_convert", "pgvl_filter_a"])
@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_the_reference_recordings(golden, tmp_path, capsys, output, form):
    recorded = json.loads((golden / "convert.json").read_text())
    expected = recorded["outputs"][output]
    flags = ["--input_json_file", str(tmp_path / f"in.{form}"), "--output_json_file", str(tmp_path / "out.json")]
    if output != "pgvl_convert":
        names = recorded["feature_dirs"]["fa"]
        (tmp_path / "features").mkdir()
        for name in names:
            (tmp_path / "features" / name).touch()
        flags += ["--clip_feature_path", str(tmp_path / "features")]
    text = json.dumps(recorded["input"]) if form == "json" else "\n".join(map(json.dumps, recorded["input"]))
    (tmp_path / f"in.{form}").write_text(text)
    assert convert.main(flags) == expected["returncode"]
    assert (tmp_path / "out.json").read_bytes() == expected["raw_text"].encode()
    assert capsys.readouterr().out == expected["stdout"]

    flags[3] = str(tmp_path / "out.jsonl")
    assert convert.main(flags) == 0
    lines = (tmp_path / "out.jsonl").read_text().split("\n")
    assert lines.pop() == "" and [json.loads(line) for line in lines] == expected["parsed"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_from_a_checkout_in_any_folder(tmp_path, script):
    (tmp_path / "in.json").write_text(json.dumps(RECORDS))
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "v_3.safetensors").touch()
    done = _run(
        [str(ROOT / "scripts" / script)],
        "--input_json_file",
        "in.json",
        "--output_json_file",
        "out.json",
        "--clip_feature_path",
        "features",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, "Total annotations retained: 1\n"), done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "29 records left out: no features in features:" and lines[-1] == "  … and 9 more"
    assert lines[1:5] == [f"  record {i} (from 0): v_{i}" for i in (0, 1, 2, 4)] and len(lines) == 22
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {
            "id": "v_3",
            "video": "v_3.pkl",
            "conversations": [
                {"from": "human", "value": "<video>\nQuestion 3?"},
                {"from": "gpt", "value": "Answer 3."},
            ],
        }
    ]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_is_one_line_and_leaves_the_old_output(tmp_path, script):
    (tmp_path / "in.json").write_text(json.dumps([*RECORDS, {"q": "Who?", "video_id": "v"}]))
    (tmp_path / "out.json").write_text("old")
    done = _run(
        [str(ROOT / "scripts" / script)], "--input_json_file", "in.json", "--output_json_file", "out.json", cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "fastvid convert: error: in.json: record 30 (from 0): field 'a' is missing; "
        "mend it, or leave malformed records out with --on_bad drop\n"
    )
    assert (tmp_path / "out.json").read_text() == "old"


def test_both_scripts_are_the_command():
    first, second = ((ROOT / "scripts" / script).read_text().split('"""')[2] for script in SCRIPTS)
    assert first == second and 'run("convert")' in first


def test_drops_are_counted_and_listed(tmp_path, capsys):
    (tmp_path / "in.json").write_text(json.dumps([*RECORDS[:2], *[{"q": "?", "a": "!"}] * 23, None]))
    flags = ["--input_json_file", str(tmp_path / "in.json"), "--output_json_file", str(tmp_path / "out.json")]
    assert convert.main([*flags, "--on_bad", "drop"]) == 0
    out, err = capsys.readouterr()
    assert out == "Total annotations retained: 2\n"
    lines = err.splitlines()
    assert lines[0] == f"{tmp_path / 'in.json'}: 24 malformed records dropped:"
    assert lines[1:21] == [f"  record {i} (from 0): field 'video_id' is missing" for i in range(2, 22)]
    assert lines[21:] == ["  … and 4 more"]
    done = convert.convert(ConvertConfig(flags[1], flags[3], on_bad="drop"))
    assert (len(done.records), len(done.dropped), len(done.absent)) == (2, 24, 0)
    assert done.dropped[-1] == (25, "", "is null, not an object")


def test_input_and_output_may_be_the_same_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    convert.convert(ConvertConfig(str(tmp_path / "a.json"), str(tmp_path / "a.json")))
    assert len(json.loads((tmp_path / "a.json").read_text())) == 30


def test_a_missing_feature_folder_is_an_error(tmp_path):
    (tmp_path / "in.json").write_text("[]")
    with pytest.raises(ValueError, match="--clip_feature_path .*absent is no folder"):
        convert.main(
            [
                "--input_json_file",
                str(tmp_path / "in.json"),
                "--output_json_file",
                str(tmp_path / "out.json"),
                "--clip_feature_path",
                str(tmp_path / "absent"),
            ]
        )
    assert not (tmp_path / "out.json").exists()


TRAINING = [
    {
        "id": f"v_{i}",
        "video": f"v_{i}.pkl",
        "conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "a"}],
    }
    for i in range(3)
]


@pytest.mark.parametrize(
    ("records", "files", "message"),
    [
        (RECORDS, [], "holds no feature file .*; it is empty"),
        (RECORDS, ["v_0.mp4", "notes"], "it holds v_0.mp4; extract the features of the videos first"),
        (RECORDS, ["w_7.pkl", "manifest.jsonl"], r"first wanted is v_0, the first found w_7\.pkl"),
        (TRAINING, ["w_7.pkl"], r"first wanted is v_0\.pkl, the first found w_7\.pkl"),
        (TRAINING, None, "holds training records already.*--clip_feature_path"),
        ([], None, "holds no record"),
        ([{"q": "?"}], None, "all are malformed; record 0 .from 0.: field 'a' is missing"),
    ],
)
@pytest.mark.parametrize("same", [True, False])
def test_an_empty_result_is_an_error_with_its_reason(tmp_path, records, files, message, same):
    given = tmp_path / "in.json"
    given.write_text(json.dumps(records))
    flags = [
        "--input_json_file",
        str(given),
        "--output_json_file",
        str(given if same else tmp_path / "out.json"),
        "--on_bad",
        "drop",
    ]
    if files is not None:
        (tmp_path / "features").mkdir()
        for name in files:
            (tmp_path / "features" / name).touch()
        flags += ["--clip_feature_path", str(tmp_path / "features")]
    with pytest.raises(ValueError, match=message):
        convert.main(flags)
    assert json.loads(given.read_text()) == records and not (tmp_path / "out.json").exists()


def test_records_of_another_style_without_turns_are_told(tmp_path):
    (tmp_path / "in.json").write_text(json.dumps([{"messages": [], "videos": ["a.mp4"]}]))
    with pytest.raises(ValueError, match="none of the 1 records .* field 'messages' is not a list of turns"):
        convert.main(["--input_json_file", str(tmp_path / "in.json"), "--output_json_file", str(tmp_path / "o.json")])


def test_a_training_file_is_filtered_by_its_features(tmp_path, capsys):
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "v_1.safetensors").touch()
    (tmp_path / "in.json").write_text(json.dumps(TRAINING))
    assert (
        convert.main(
            [
                "--input_json_file",
                str(tmp_path / "in.json"),
                "--output_json_file",
                str(tmp_path / "out.json"),
                "--clip_feature_path",
                str(tmp_path / "features"),
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "out.json").read_text()) == TRAINING[1:2]
    out, err = capsys.readouterr()
    assert out == "Total annotations retained: 1\n" and "record 2 (from 0): v_2.pkl" in err


def test_empty_texts_and_endings_are_told(tmp_path, capsys):
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "v_1.safetensors").touch()
    (tmp_path / "in.json").write_text(json.dumps([{"q": "", "a": "", "video_id": "v_1.mp4"}]))
    convert.main(
        [
            "--input_json_file",
            str(tmp_path / "in.json"),
            "--output_json_file",
            str(tmp_path / "out.json"),
            "--clip_feature_path",
            str(tmp_path / "features"),
        ]
    )
    err = capsys.readouterr().err
    assert "1 records have an empty question" in err and "1 records have an empty answer; training" in err
    assert '1 records: the ending of "video_id" is left out' in err


def test_a_record_that_is_nested_too_deep_is_a_malformed_one(tmp_path, capsys):
    deep = json.dumps(RECORDS[1])[:-1] + ', "more": ' + "[" * 200 + "]" * 200 + "}"
    (tmp_path / "in.jsonl").write_text("\n".join([json.dumps(RECORDS[0]), deep, json.dumps(RECORDS[2])]))
    flags = ["--input_json_file", str(tmp_path / "in.jsonl"), "--output_json_file", str(tmp_path / "out.json")]
    with pytest.raises(ValueError, match=r"record 1 \(from 0\): the record is nested over 100 deep, .*; mend it, or"):
        convert.main(flags)
    assert convert.main([*flags, "--on_bad", "drop"]) == 0
    assert "record 1 (from 0): the record is nested over 100 deep" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out.json").read_text())) == 2
