"""Records: reading, writing, conversion, and what is malformed about one."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.data import annotations
from fastvid.data.annotations import check_record, convert_records, feature_ids, read_records, record_videos

INSTRUCTION = {"q": "What?", "a": "That.", "video_id": "v_1"}
TRAINING = {"id": "v_1", "video": "v_1.pkl",
            "conversations": [{"from": "human", "value": "What?\n<video>"}, {"from": "gpt", "value": "That."}]}

json_text = st.text(st.characters(), max_size=20)  # surrogates included: "\ud83c" alone is legal JSON
json_values = st.recursive(st.none() | st.booleans() | st.integers() | json_text,
                           lambda inner: st.lists(inner, max_size=3))
json_records = st.lists(st.dictionaries(json_text, json_values, max_size=4), max_size=5)


@settings(max_examples=40, deadline=None)
@given(json_records)
def test_json_and_jsonl_round_trip(tmp_path_factory, records):
    folder = tmp_path_factory.getbasetemp()
    for name in ("a.json", "a.jsonl"):
        annotations.write_records(folder / name, records)
        assert read_records(folder / name) == records
    assert (folder / "a.json").read_bytes() == json.dumps(records).encode()


def test_json_is_what_json_dump_writes(tmp_path):
    records = [{"text": "é \u2028 🍳 \x00 \ud83c </s>", "n": [1.5, None, True]}]
    annotations.write_records(tmp_path / "a.json", records)
    with open(tmp_path / "b.json", "w") as file:
        json.dump(records, file)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
def test_content_decides_between_array_and_lines(tmp_path, name):
    (tmp_path / name).write_text(' \n[{"q": 1},\n {"q": 2}]\n')
    assert read_records(tmp_path / name) == [{"q": 1}, {"q": 2}]
    (tmp_path / name).write_text('{"q": 1}\n\n{"q": 2}')
    assert read_records(tmp_path / name) == [{"q": 1}, {"q": 2}]


@pytest.mark.parametrize("form", ["[%s]", "%s\r\n"])
def test_byte_order_mark_and_raw_unicode(tmp_path, form):
    record = {"q": "line\u2028separator \x85 你好 🍳"}
    text = form % json.dumps(record, ensure_ascii=False)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_records(tmp_path / "a.json") == [record]


@pytest.mark.parametrize(("content", "message"), [
    (b'[{"q": 1},\n {"q": 2]', r"a\.json: line 2, column"),
    (b'{"q": 1}\n\n{"q": 2', r"a\.json: line 3, column .* one JSON object per line"),
    (b'{\n "q": 1\n}', r"a\.json: line 1, column .* expected a JSON array"),
    (b'[{"q": "caf\xe9"}]', r"a\.json: byte 11 is not UTF-8 .* save the file as UTF-8"),
    ("[]".encode("utf-16"), "is not UTF-8"),
    (b" \n", r"a\.json is empty"),
    (b"[" * 100_000, r"a\.json is not what a data file can hold .*recursion"),
    (b'{"q": 1}\n{"q": ' + b"9" * 5000 + b"}", r"a\.json: line 2 is not what a data file can hold .*5000 digits"),
])
def test_unreadable_files_are_named_with_the_line(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "a.json")


def test_an_empty_jsonl_file_has_no_records(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert read_records(tmp_path / "a.jsonl") == []


def test_the_reference_recordings(shared, tmp_path):
    golden = json.loads((shared / "golden" / "convert.json").read_text())
    ids = {None: None}
    for folder, names in golden["feature_dirs"].items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
        ids[folder] = feature_ids(tmp_path / folder)
    for output, folder in (("pgvl_convert", None), ("pgvl_filter_a", "fa"), ("pgvl_filter_empty_dir", "fempty")):
        converted, dropped = convert_records(golden["input"], ids[folder])
        annotations.write_records(tmp_path / "out.json", converted)
        assert (tmp_path / "out.json").read_bytes() == golden["outputs"][output]["raw_text"].encode()
        assert dropped == []


def test_the_place_of_the_video_follows_the_original_index():
    records = [{**INSTRUCTION, "video_id": name} for name in "abc"]
    converted, _ = convert_records(records, {"b", "c"})
    assert [record["id"] for record in converted] == ["b", "c"]
    assert [record["conversations"][0]["value"] for record in converted] == ["<video>\nWhat?", "What?\n<video>"]


def test_dropped_records_keep_the_places_of_the_others():
    bad = {"q": "What?", "video_id": "v_1"}
    converted, dropped = convert_records([INSTRUCTION, bad, bad, INSTRUCTION, []], on_bad="drop")
    assert dropped == [(1, "a", "is missing"), (2, "a", "is missing"), (4, "", "is a list, not an object")]
    assert [record["conversations"][0]["value"] for record in converted] == ["What?\n<video>", "<video>\nWhat?"]


@pytest.mark.parametrize(("field", "value", "reason"), [
    ("q", None, "is null, not text"), ("a", 3, "is a number, not text"), ("a", ["x"], "is a list, not text"),
    ("video_id", 7, "is a number, not text"), ("video_id", "", "is empty"), ("q", True, "is a truth value, not text"),
])
def test_malformed_instructions_name_file_index_field_and_remedy(field, value, reason):
    records = [INSTRUCTION, {**INSTRUCTION, field: value}]
    with pytest.raises(ValueError, match=rf"in\.json: record 1 .*field '{field}' {reason}; .*--on_bad drop"):
        convert_records(records, path="in.json")
    assert convert_records(records, on_bad="drop")[1] == [(1, field, reason)]


def test_a_training_file_given_for_conversion_is_recognized():
    with pytest.raises(ValueError, match="this is a training record already"):
        convert_records([TRAINING])


def test_records_are_not_changed():
    records = [copy.deepcopy(INSTRUCTION), {**INSTRUCTION, "extra": 1}]
    before = copy.deepcopy(records)
    convert_records(records)
    assert records == before


def test_feature_ids(tmp_path):
    for name in ("a.pkl", "b.2.pkl", "c.2.safetensors", "README", ".hidden"):
        (tmp_path / name).touch()
    # a cut .pkl is the reference's; a .safetensors is fastvid's own and carries the whole name as well
    assert feature_ids(tmp_path) == {"a", "b", "c", "c.2", "README", ""}
    (tmp_path / "sub" / "in").mkdir(parents=True)
    for name in ("sub/d.1.safetensors", "sub/in/e.pkl", "sub/manifest.jsonl"):
        (tmp_path / name).touch()
    assert feature_ids(tmp_path) == {"a", "b", "c", "c.2", "README", "", "sub", "sub/d.1", "sub/in/e"}
    with pytest.raises(ValueError, match="--clip_feature_path .*absent is no folder"):
        feature_ids(tmp_path / "absent")


@pytest.mark.parametrize("change", [
    {}, {"video": None}, {"videos": ["a.pkl", "b/c.pkl"]}, {"videos": []}, {"more": 1},
])
def test_well_formed_training_records(change):
    assert check_record({**TRAINING, **change}, 0, "t.json") is None


@pytest.mark.parametrize(("change", "field", "reason"), [
    ({"id": 3}, "id", "is a number, not text"),
    ({"id": None}, "id", "is null, not text"),
    ({"video": 3}, "video", "is not a file name"),
    ({"video": ""}, "video", "is not a file name"),
    ({"video": ["a.pkl"]}, "video", "is not a file name"),
    ({"videos": "a.pkl"}, "videos", "is not a list of file names"),
    ({"videos": ["a.pkl", 3]}, "videos", "is not a list of file names"),
    ({"conversations": []}, "conversations", "is not a list of turns"),
    ({"conversations": None}, "conversations", "is not a list of turns"),
    ({"conversations": ["hi"]}, "conversations", "turn 0 does not say"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "system", "value": "b"}]}, "conversations",
     "turn 1 does not say"),
    ({"conversations": [{"from": ["human"], "value": "a"}]}, "conversations", "turn 0 does not say"),
    ({"conversations": [{"from": "human", "value": None}]}, "conversations", 'turn 0 has no text as "value"'),
    ({"conversations": [{"from": "human", "value": "a \ud800 b"}]}, "conversations",
     r"turn 0 holds '\ud800', half of a surrogate pair"),
])
def test_malformed_training_records(change, field, reason):
    message = check_record({**TRAINING, **change}, 5, "t.json")
    assert message.startswith(f"t.json: record 5 (from 0): field '{field}' {reason}")


def test_a_training_record_that_is_no_object_or_has_no_id():
    assert "the record is text, not an object" in check_record("x", 0, "t.json")
    assert "field 'id' is missing" in check_record({"conversations": []}, 0, "t.json")


def test_record_videos():
    assert record_videos(TRAINING) == ["v_1.pkl"]
    assert record_videos({**TRAINING, "videos": ["a", "b"]}) == ["a", "b"]
    assert record_videos({**TRAINING, "video": None}) == []
    assert record_videos({"id": "t", "conversations": []}) == []
