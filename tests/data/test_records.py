"""Data files: what is read, and what each that is none is called."""

import gzip
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.data.records import place, read_records, write_records

json_text = st.text(st.characters(), max_size=20)  # surrogates included: "\ud83c" alone is legal JSON
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | json_text, lambda inner: st.lists(inner, max_size=3)
)
json_records = st.lists(st.dictionaries(json_text, json_values, max_size=4), min_size=1, max_size=5)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(json_records)
def test_json_and_jsonl_round_trip(tmp_path_factory, records):
    folder = tmp_path_factory.getbasetemp()
    for name in ("a.json", "a.jsonl"):
        write_records(folder / name, records)
        assert read_records(folder / name) == records
    assert (folder / "a.json").read_bytes() == json.dumps(records).encode()


def test_json_is_what_json_dump_writes(tmp_path):
    records = [{"text": "é \u2028 🍳 \x00 \ud83c </s>", "n": [1.5, None, True]}]
    write_records(tmp_path / "a.json", records)
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"q": 1},\n {"q": 2]', r"a\.json: line 2, column"),
        (b'{"q": 1}\n\n{"q": 2', r"a\.json: line 3, column .* one JSON object per line"),
        (b'{\n "q": 1\n}\n{\n "q": 2\n}', r"a\.json: line 1, column .* expected a JSON array"),
        (b'[{"q": "caf\xe9"}]', r"a\.json: byte 11 is not UTF-8 .* save the file as UTF-8"),
        ("[]".encode("utf-16"), "is not UTF-8"),
        (b" \n", r"a\.json is empty"),
        (b"[" * 100_000, r"a\.json is not what a data file can hold .*recursion"),
        (b'{"q": 1}\n{"q": ' + b"9" * 5000 + b"}", r"a\.json: line 2 is not what a data file can hold .*5000 digits"),
    ],
)
def test_unreadable_files_are_named_with_the_line(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a git-lfs pointer.*git lfs pull"),
        (gzip.compress(b"[]", mtime=0), "is packed with gzip.*gunzip"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (b"PAR1....", "is no whole Parquet file .* download it again"),
        (b"PK\x03\x04....", "is a zip archive"),
    ],
)
def test_other_files_are_called_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        read_records(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a.json,b.json", r"several files with spaces between them: a\.json b\.json"),
        ("*.json", "without quotation marks"),
        ("absent.json", "No such file.*give the path of a JSON, JSONL or Parquet file"),
        ("lmms-lab/LLaVA-Video-178K", "hf download lmms-lab/LLaVA-Video-178K --repo-type dataset"),
        (".", r"is a folder, not a file; give the data files in it: a\.json"),
        ("mixture.yaml", "YAML is no data file"),
        ("odd\nname.json", r"^'odd\\nname\.json' cannot be read"),
    ],
)
def test_paths_that_are_no_data_file_get_a_remedy(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "mixture.yaml").write_text("datasets:\n  - a.json\n")
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_a_pipe_that_nobody_writes_to_is_refused_and_one_of_the_shell_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json is no regular file"):
        read_records(tmp_path / "pipe.json")
    reading, writing = os.pipe()
    os.write(writing, b'[{"q": 1}]')
    os.close(writing)
    try:
        assert read_records(f"/dev/fd/{reading}") == [{"q": 1}]
    finally:
        os.close(reading)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("wrapped", "records", "said"),
    [
        ({"data": [{"q": 1}, {"q": 2}], "version": "1", "info": []}, [{"q": 1}, {"q": 2}], 'those under "data"'),
        ({"a": {"q": 1}, "b": {"id": "x"}}, [{"id": "a", "q": 1}, {"id": "x"}], "names are their ids"),
        ({"id": "a", "conversations": []}, [{"id": "a", "conversations": []}], ""),
        ({"data": []}, [], 'those under "data"'),
        ({"unknown": 1}, [{"unknown": 1}], ""),
    ],
)
def test_an_object_around_the_records_is_taken_off(tmp_path, caplog, indent, wrapped, records, said):
    (tmp_path / "a.json").write_text(json.dumps(wrapped, indent=indent))
    assert read_records(tmp_path / "a.json") == records
    assert said in caplog.text if said else not caplog.text


def test_several_lists_of_records_are_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"train": [{"q": 1}], "val": [{"q": 2}]}))
    with pytest.raises(ValueError, match="several lists of records .train, val."):
        read_records(tmp_path / "a.json")


def test_the_place_of_a_record():
    assert place("a\n.json", 3) == "'a\\n.json': record 3 (from 0)"
