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


def test_convert_reads_it(tmp_path, capsys):
    named = {"messages": TURNS, "images": [{"bytes": None, "path": "a.png"}]}
    write(tmp_path / "a.parquet", [named, {"messages": TURNS, "images": [{"bytes": b"x", "path": None}]}])
    flags = ["--input_json_file", str(tmp_path / "a.parquet"), "--output_json_file", str(tmp_path / "o.jsonl")]
    assert convert.main(flags) == 0
    (line,) = (tmp_path / "o.jsonl").read_text().splitlines()
    assert json.loads(line)["image"] == "a.png"
    assert "1 record cannot be converted: field 'images' holds the file itself" in capsys.readouterr().err
