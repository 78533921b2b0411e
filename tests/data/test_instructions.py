"""VideoInstruct's records to training records; the records that have features."""

import copy
import json

import pytest

from fastvid.data.conversion import convert_any
from fastvid.data.instructions import feature_ids
from fastvid.data.records import write_records


def convert_records(records, feature_ids=None, on_bad="error", path="records"):
    return convert_any(records, path=path, style="videoinstruct", on_bad=on_bad, feature_ids=feature_ids)


INSTRUCTION = {"q": "What?", "a": "That.", "video_id": "v_1"}
TRAINING = {
    "id": "v_1",
    "video": "v_1.pkl",
    "conversations": [{"from": "human", "value": "What?\n<video>"}, {"from": "gpt", "value": "That."}],
}


def test_the_reference_recordings(golden, tmp_path):
    recorded = json.loads((golden / "convert.json").read_text())
    ids = {None: None}
    for folder, names in recorded["feature_dirs"].items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
        ids[folder] = feature_ids(tmp_path / folder)
    for output, folder in (("pgvl_convert", None), ("pgvl_filter_a", "fa"), ("pgvl_filter_empty_dir", "fempty")):
        done = convert_records(recorded["input"], ids[folder])
        write_records(tmp_path / "out.json", done.records)
        assert (tmp_path / "out.json").read_bytes() == recorded["outputs"][output]["raw_text"].encode()
        assert done.dropped == [] and len(done.records) + len(done.absent) == len(recorded["input"])


def test_the_place_of_the_video_follows_the_original_index():
    records = [{**INSTRUCTION, "video_id": name} for name in "abc"]
    done = convert_records(records, {"b", "c"})
    assert [record["id"] for record in done.records] == ["b", "c"] and done.absent == [(0, "a")]
    assert [record["conversations"][0]["value"] for record in done.records] == ["<video>\nWhat?", "What?\n<video>"]


def test_dropped_records_keep_the_places_of_the_others():
    bad = {"q": "What?", "video_id": "v_1"}
    done = convert_records([INSTRUCTION, bad, bad, INSTRUCTION, []], on_bad="drop")
    assert done.dropped == [(1, "a", "is missing"), (2, "a", "is missing"), (4, "", "is a list, not an object")]
    assert [record["conversations"][0]["value"] for record in done.records] == ["What?\n<video>", "<video>\nWhat?"]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("q", None, "is null, not text"),
        ("a", 3, "is a number, not text"),
        ("a", ["x"], "is a list, not text"),
        ("video_id", 7, "is a number, not text"),
        ("video_id", "", "is empty"),
        ("q", True, "is a truth value, not text"),
    ],
)
def test_malformed_instructions_name_file_index_field_and_remedy(field, value, reason):
    records = [INSTRUCTION, {**INSTRUCTION, field: value}]
    with pytest.raises(ValueError, match=rf"in\.json: record 1 .*field '{field}' {reason}; .*--on_bad drop"):
        convert_records(records, path="in.json")
    assert convert_records(records, on_bad="drop").dropped == [(1, field, reason)]


def test_records_are_not_changed():
    records = [copy.deepcopy(INSTRUCTION), {**INSTRUCTION, "extra": 1}]
    before = copy.deepcopy(records)
    convert_records(records)
    assert records == before


def test_feature_ids(tmp_path):
    for name in ("a.pkl", "b.2.pkl", "c.2.safetensors", "d.npy", "README", ".hidden", "e.mp4", ".pkl"):
        (tmp_path / name).touch()
    # a cut .pkl is the reference's; other feature files carry the whole name as well
    assert feature_ids(tmp_path) == {"a", "b", "c", "c.2", "d"}
    (tmp_path / "sub" / "in").mkdir(parents=True)
    for name in ("sub/d.1.safetensors", "sub/in/e.pkl", "sub/manifest.jsonl"):
        (tmp_path / name).touch()
    assert feature_ids(tmp_path) == {"a", "b", "c", "c.2", "d", "sub/d.1", "sub/in/e"}
    with pytest.raises(ValueError, match="--clip_feature_path .*absent is no folder"):
        feature_ids(tmp_path / "absent")


@pytest.mark.parametrize("ending", [".mp4", ".MKV"])
def test_an_id_with_the_ending_of_a_video_means_its_features(ending):
    records = [{**INSTRUCTION, "video_id": f"v_1{ending}"}, {**INSTRUCTION, "video_id": "v_1.txt"}]
    done = convert_records(records, {"v_1"})
    assert done.shortened == 1 and done.absent == [(1, "v_1.txt")]
    assert [(record["id"], record["video"]) for record in done.records] == [("v_1", "v_1.pkl")]
    assert convert_records(records, {"v_1", f"v_1{ending}"}).records[0]["id"] == f"v_1{ending}"


def test_empty_questions_and_answers_are_counted():
    records = [{**INSTRUCTION, "q": ""}, {**INSTRUCTION, "a": ""}, {**INSTRUCTION, "a": ""}]
    assert convert_records(records).empty == {"question": 1, "answer": 2}
