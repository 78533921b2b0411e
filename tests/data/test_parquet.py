"""Parquet files of records."""

import datetime
import json

import pytest

from fastvid import convert
from fastvid.data.records import read_records

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TURNS = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]


def write(path, records):
    parquet.write_table(pyarrow.Table.from_pylist(records), path)


def test_records_are_those_of_json(tmp_path):
    records = [
        {"id": str(i), "video": f"{i}.mp4", "conversations": [{"from": "human", "value": "a"}]} for i in range(9)
    ]
    write(tmp_path / "a.parquet", records)
    assert read_records(tmp_path / "a.parquet") == records


def test_what_json_cannot_hold(tmp_path):
    day = datetime.date(2026, 1, 2)
    write(tmp_path / "a.parquet", [{"image": {"bytes": b"abc", "path": "a.png"}, "raw": b"ab", "day": day}])
    (record,) = read_records(tmp_path / "a.parquet")
    assert record == {"image": {"bytes": {"bytes": 3}, "path": "a.png"}, "raw": {"bytes": 2}, "day": "2026-01-02"}


def unreadable():
    """Columns that Parquet holds and Python cannot."""
    bad_text = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"]).buffers())
    return {
        "date": pyarrow.array([2**30], pyarrow.date32()),
        "time": pyarrow.array([2**62], pyarrow.timestamp("us")),
        "length": pyarrow.array([2**62], pyarrow.duration("s")),
        "text": bad_text,
        "fields": pyarrow.StructArray.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["x", "x"]),
    }


@pytest.mark.parametrize("name", unreadable())
def test_a_column_that_cannot_be_read_is_named_with_its_remedy(tmp_path, name):
    table = pyarrow.table({"id": ["0"], name: unreadable()[name]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=rf"a.parquet: column {name} holds what cannot be read .*; write the file without"
    ):
        read_records(tmp_path / "a.parquet")
    parquet.write_table(table.drop_columns([name]), tmp_path / "a.parquet")
    assert read_records(tmp_path / "a.parquet") == [{"id": "0"}]


def test_columns_of_one_name_are_refused(tmp_path):
    columns = pyarrow.array(["a"]), pyarrow.array(["b"])
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["id", "id"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has several columns named id; write it with one of them"):
        read_records(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_arrays(columns[:1], ["id"]), tmp_path / "a.parquet")
    assert read_records(tmp_path / "a.parquet") == [{"id": "a"}]


def test_convert_reads_it(tmp_path, capsys):
    named = {"messages": TURNS, "images": [{"bytes": None, "path": "a.png"}]}
    write(tmp_path / "a.parquet", [named, {"messages": TURNS, "images": [{"bytes": b"x", "path": None}]}])
    flags = ["--input_json_file", str(tmp_path / "a.parquet"), "--output_json_file", str(tmp_path / "o.jsonl")]
    assert convert.main(flags) == 0
    (line,) = (tmp_path / "o.jsonl").read_text().splitlines()
    assert json.loads(line)["image"] == "a.png"
    assert "1 record cannot be converted: field 'images' holds the file itself" in capsys.readouterr().err
