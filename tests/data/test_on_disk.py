"""Records that stay on disk: what is read is what reading the whole file gives."""

import errno
import json
import os
import subprocess
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import on_ranks

from fastvid.config.policy import POLICIES
from fastvid.data import on_disk, scanning, unpacking
from fastvid.data.annotations import examine
from fastvid.data.on_disk import RecordFile
from fastvid.data.records import read_records
from fastvid.data.table import RecordTable
from fastvid.dist.parallel import World


def record(i=0, question="<video>\nWhich?", answer="Blue.", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"v_{i}", "video": f"v_{i % 3}.mp4", "conversations": turns, **more}


RECORDS = [
    record(0),
    {**record(1), "extra": 1},
    record(2, answer="é “quoted” \n \U0001f373"),
    {"id": 3, "conversations": record()["conversations"]},
    record(4, question='<video> \\ "x" [{,'),
    *map(record, range(5, 30)),
]
LINES = [json.dumps(each).encode() for each in RECORDS]
RAW = [json.dumps(each, ensure_ascii=False).encode() for each in RECORDS]
FILES = {
    "lines": b"\n".join(LINES),
    "utf-8": b"\n".join(RAW) + b"\n",
    "blank lines": b"\xef\xbb\xbf\n \n" + b"\n\n".join(LINES) + b"\n  \t\n",
    "windows": b"\r\n".join(LINES) + b"\r\n",
    "last return": b"\n".join(LINES) + b"\r",
    "old mac": b"\r".join(LINES),
    "array": json.dumps(RECORDS).encode(),
    "array, utf-8": json.dumps(RECORDS, ensure_ascii=False).encode(),
    "indented": b"\xef\xbb\xbf " + json.dumps(RECORDS, indent=2).encode() + b"\n",
    "narrow": json.dumps(RECORDS, separators=(",", ":")).encode(),
    "array of lines": b"[\n" + b",\n".join(LINES[:9]) + b" ,\r\n\t".join([b"", *LINES]) + b"\n]\n",
    "wrapped": json.dumps({"data": RECORDS}).encode(),
    "one": json.dumps(RECORDS[0], indent=1).encode(),
    "members": b'[1, "a]", null, [2], {}]',
    "none": b" [ ] ",
}


def scanned(path, **how):
    file = RecordFile(path)
    return file, list(file.scan(**how))


@pytest.mark.parametrize("chunk", [40, 700, 2**24])
@pytest.mark.parametrize("form", FILES)
def test_every_form_is_read_as_a_whole_file_is(tmp_path, monkeypatch, form, chunk):
    monkeypatch.setattr(scanning, "CHUNK", chunk)
    (tmp_path / "a.json").write_bytes(FILES[form])
    file, blocks = scanned(tmp_path / "a.json")
    assert [file[i] for i in range(len(file))] == read_records(tmp_path / "a.json")
    assert sum(len(block.name_of) for block in blocks) == len(file)
    assert [block.first for block in blocks] == np.cumsum([0, *(len(b.name_of) for b in blocks)])[:-1].tolist()
    assert file.sizes().tolist() == [file._ends[i] - file._begins[i] for i in range(len(file))]


@pytest.mark.slow
def test_processes_find_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "CHUNK", 500)
    (tmp_path / "a.jsonl").write_bytes(FILES["utf-8"])
    (alone, blocks), (beside, others) = scanned(tmp_path / "a.jsonl"), scanned(tmp_path / "a.jsonl", processes=2)
    assert alone._begins == beside._begins and alone._ends == beside._ends and len(blocks) == len(others) > 4
    assert all(a.names == b.names and (a.name_of == b.name_of).all() for a, b in zip(blocks, others, strict=True))


def test_what_is_unpacked_may_lie_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "_HELD", 10)
    (tmp_path / "a.json").write_bytes(FILES["wrapped"])
    file, _ = scanned(tmp_path / "a.json")
    assert file._bytes is None and [file[i] for i in range(len(file))] == RECORDS


def test_no_room_to_unpack_is_told_with_the_bytes_that_are_wanted(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_bytes(FILES["wrapped"])
    size = sum(map(len, LINES)) + len(LINES)
    with monkeypatch.context() as full:
        full.setattr(tempfile, "TemporaryFile", lambda prefix: open("/dev/full", "w+b"))
        full.setattr(tempfile, "tempdir", "/full")
        said = rf"a.json cannot be unpacked to .TMPDIR ./full., where it takes {size:,} bytes .No space left on device"
        with pytest.raises(ValueError, match=said):
            table(tmp_path / "a.json")
    monkeypatch.setattr(tempfile, "tempdir", None)
    with monkeypatch.context() as none:
        none.setattr(tempfile, "_candidate_tempdir_list", lambda: [])
        with pytest.raises(
            ValueError, match=rf"unpacked to .TMPDIR, where it takes {size:,} bytes .*; set TMPDIR to a"
        ):
            table(tmp_path / "a.json")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert len(table(tmp_path / "a.json")) == len(RECORDS)
    (tmp_path / "a.jsonl").write_bytes(FILES["lines"])
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    assert len(table(tmp_path / "a.jsonl")) == len(RECORDS)


def test_parquet_is_read(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist([RECORDS[0], RECORDS[5]]), tmp_path / "a.parquet")
    file, (block,) = scanned(tmp_path / "a.parquet")
    assert [file[0], file[1]] == [RECORDS[0], RECORDS[5]] and block.names == ["v_0.mp4", "v_2.mp4"]


def unpacked_on(rank, path, how, held):
    on_disk._HELD = held
    ranks = [World(i, 3, i, torch.device("cpu"), True) for i in range(3)]
    if how == "other machines":
        unpacking._machine = lambda: str(rank % 2)
    elif how == "other users":
        unpacking.os = SimpleNamespace(**{**vars(os), "open": denied})
    elif how == "no identity":
        unpacking._machine = lambda: None
    elif how == "another file":  # a process of that number in another container
        unpacking.os = SimpleNamespace(**{**vars(os), "open": lambda path, flags: os.open("/etc/passwd", flags)})
    elif how == "defect":
        on_disk.unpacked = broken
    elif how == "late":
        unpacking._ROUND, on_disk.unpacked = 0.5, late
    elif how == "full":
        on_disk.unpacked = fail
    file, asked = RecordFile(path, ranks[rank]), []
    dumped = on_disk._dumped
    on_disk._dumped = lambda path: asked.append(rank) or dumped(path)
    try:
        list(file.scan())
    except (ValueError, TypeError) as error:
        return str(error) if how == "full" else (type(error).__name__, str(error))
    return [file[i] for i in range(len(file))], len(asked)


def fail(path, lines):
    raise ValueError("no room")


def broken(path, lines):
    raise TypeError("no JSON")


def late(path, lines):
    time.sleep(9)
    return unpacking.unpacked(path, lines)


def denied(path, flags):
    raise PermissionError(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "times"),
    [
        ("one machine", [1, 0, 0]),
        ("other machines", [1, 1, 0]),
        ("other users", [1, 1, 1]),
        ("another file", [1, 1, 1]),
        ("no identity", [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("held", [0, 2**26])
def test_one_rank_of_a_machine_unpacks_for_all(tmp_path, how, times, held):
    (tmp_path / "a.json").write_bytes(FILES["wrapped"])
    found = on_ranks(3, unpacked_on, tmp_path, tmp_path / "a.json", how, held)
    assert [records for records, _ in found] == [RECORDS] * 3 and [number for _, number in found] == times


@pytest.mark.slow
def test_all_ranks_end_where_one_has_no_room_to_unpack(tmp_path):
    (tmp_path / "a.json").write_bytes(FILES["wrapped"])
    assert on_ranks(3, unpacked_on, tmp_path, tmp_path / "a.json", "full", 0) == ["no room"] * 3


@pytest.mark.slow
def test_a_defect_while_one_unpacks_ends_all_ranks(tmp_path):
    (tmp_path / "a.json").write_bytes(FILES["wrapped"])
    own, *others = on_ranks(3, unpacked_on, tmp_path, tmp_path / "a.json", "defect", 0)
    assert own == ("TypeError", "no JSON") and others == [("ValueError", "rank 0: TypeError: no JSON")] * 2


@pytest.mark.slow
def test_ranks_wait_for_one_that_unpacks_longer_than_a_collective_may_last(tmp_path):
    (tmp_path / "a.json").write_bytes(FILES["wrapped"])
    found = on_ranks(3, unpacked_on, tmp_path, tmp_path / "a.json", "late", 0, timeout=6)
    assert [records for records, _ in found] == [RECORDS] * 3


def test_an_error_of_the_source_is_not_blamed_on_the_temporary_folder():
    def lines():
        yield b"{}\n"
        raise OSError(errno.EIO, "Input/output error", "a.json")

    with pytest.raises(OSError, match="Input/output error: 'a.json'"):
        unpacking.unpacked("a.json", lines())


def test_a_pipe_is_read_once():
    reading, writing = os.pipe()
    os.write(writing, FILES["lines"])
    os.close(writing)
    file, _ = scanned(f"/dev/fd/{reading}")
    os.close(reading)
    assert [file[i] for i in range(len(file))] == RECORDS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n".join(LINES) + b'\n{"id": 1,}\n', "a.json: line 31, column 10: "),
        (b"\n".join(LINES) + b"\n[1]x\n", "a.json: line 31, column 4: Extra data"),
        (json.dumps(RECORDS).encode()[:-1] + b",]", "a.json: line 1, column "),
        (json.dumps(RECORDS).encode()[:-1], "a.json: line 1, column "),
        (json.dumps(RECORDS).encode() + b" x", "a.json: line 1, column .*Extra data"),
        (b"\n".join(LINES) + b'\n{"id": "\xff"}', r"a.json: byte \d+ is not UTF-8"),
        (b"\n".join([*LINES, LINES[5].replace(b"Blue", b"Bl\xff")]), r"a.json: byte \d+ is not UTF-8"),
        (b"[%s, %s]" % (LINES[5], LINES[6].replace(b"Blue", b"Bl\xff")), r"a.json: byte \d+ is not UTF-8"),
        (b'[{"q": "caf\xe9"}]', r"a.json: byte 11 is not UTF-8"),
        (b"", "a.json is empty"),
    ],
)
@pytest.mark.parametrize("chunk", [200, 2**24])
def test_what_is_wrong_is_told_as_of_a_whole_file(tmp_path, monkeypatch, content, message, chunk):
    monkeypatch.setattr(scanning, "CHUNK", chunk)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        table(tmp_path / "a.json")
    monkeypatch.setattr(scanning, "READ_AGAIN", 10)  # of a file too large to be read as a whole
    with pytest.raises(ValueError, match=r"a.json"):
        table(tmp_path / "a.json")


@pytest.mark.parametrize("content", [LINES[0][:-3] + b"," + LINES[1], b"\n,\n".join(LINES), LINES[0]])
def test_a_large_faulty_array_is_not_read_as_a_whole(tmp_path, monkeypatch, content):
    sizes, read = [], scanning.read
    monkeypatch.setattr(scanning, "read", lambda file, at, size: sizes.append(size) or read(file, at, size))
    monkeypatch.setattr(scanning, "CHUNK", 10)
    monkeypatch.setattr(scanning, "READ_AGAIN", 1000)
    monkeypatch.setattr(on_disk.records, "read_records", lambda path: pytest.fail("the file was read as a whole"))
    (tmp_path / "a.json").write_bytes(b"[" + content + b" " * 5000)
    with pytest.raises(ValueError, match=r"a.json: record \d+ .from 0., or what stands around it, is no JSON; mend"):
        table(tmp_path / "a.json")
    assert max(sizes[1:]) <= 1000  # the first tells the file's form


BLANK_LINES = {"none to Python": ("\u00a0", 2), "a separator": ("\x1c", 2), "JSON's": (" \t\r", None)}


@pytest.mark.parametrize(("blank", "fault"), BLANK_LINES.values(), ids=BLANK_LINES)
def test_a_blank_line_is_the_same_to_all(tmp_path, blank, fault):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([LINES[0], blank.encode(), LINES[1]]))
    for read in (table, read_records):
        if fault is None:
            assert len(read(tmp_path / "a.jsonl")) == 2
        else:
            with pytest.raises(ValueError, match=rf"a.jsonl: line {fault}, column 1: Expecting value"):
                read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(("chunk", "limit"), [(40, 2**30), (2**24, 10)])
def test_late_carriage_returns_are_told_with_what_replaces_them(tmp_path, monkeypatch, chunk, limit):
    monkeypatch.setattr(scanning, "CHUNK", chunk)
    monkeypatch.setattr(scanning, "READ_AGAIN", limit)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.jsonl").write_bytes(b"\n".join(LINES[:9]) + b"\r" + LINES[9])
    with pytest.raises(
        ValueError, match="some lines end with a carriage return alone; write it with line feeds"
    ) as told:
        table("a b.jsonl")
    command = str(told.value).partition("(")[2].partition(")")[0]
    subprocess.run(command, shell=True, check=True)
    assert len(table("NEW.jsonl")) == 10


@pytest.mark.parametrize("form", ["%s\n%s", "[%s, %s]", '{"data": [%s, %s]}'])
@pytest.mark.parametrize(("deep", "refused"), [(99, False), (100, True), (400, True)])
def test_a_record_that_is_nested_deep_is_told_as_the_file_is_scanned(tmp_path, form, deep, refused):
    written = LINES[1].decode()
    (tmp_path / "a.json").write_text(form % (written, written[:-2] + f"{'[' * deep}{']' * deep}}}"))
    if refused:
        with pytest.raises(ValueError, match=r"a.json: record 1 .from 0. is nested over 100 deep, .*; leave it out"):
            table(tmp_path / "a.json")
        (tmp_path / "a.json").write_text(form % (written, written))
    assert len(table(tmp_path / "a.json")) == 2


def test_a_record_too_deep_for_the_parser_or_its_counterpart_is_told_alike(tmp_path, monkeypatch):
    def dumps(value):
        raise RecursionError

    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*LINES[:2], b'{"id": ' + b"[" * 9999 + b"]" * 9999 + b"}"]))
    with pytest.raises(ValueError, match=r"a.jsonl: record 2 .from 0. is nested over 100 deep"):
        table(tmp_path / "a.jsonl")
    monkeypatch.setattr(json, "dumps", dumps)
    (tmp_path / "b.json").write_bytes(FILES["wrapped"])
    with pytest.raises(ValueError, match=r"b.json: record 0 .from 0. is nested over 100 deep"):
        table(tmp_path / "b.json")


def test_a_file_that_was_changed_is_not_read_on(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(FILES["lines"])
    file, _ = scanned(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"other")
    os.replace(tmp_path / "b.jsonl", tmp_path / "a.jsonl")
    assert file[0] == RECORDS[0]  # the old one, which this process holds open
    file = RecordFile(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_bytes(FILES["lines"])
    list(file.scan())
    with open(tmp_path / "c.jsonl", "ab") as more:
        more.write(b"\n")
    with pytest.raises(ValueError, match="c.jsonl was changed since this run first read it; start the run again"):
        file[0]


def table(path, missing=lambda name: None, use_start_end=True):
    made = RecordTable(
        lambda value, number: examine(value, number, policy=POLICIES["none"], use_start_end=use_start_end), missing
    )
    made.add(path)
    return made


@pytest.mark.parametrize("gap", ["", " ", ",,", ";", ", ,", ",\x0b", ",x", "}, "])
def test_what_stands_between_members_of_an_array_is_looked_at(tmp_path, gap):
    (tmp_path / "a.json").write_bytes(b"[" + gap.encode().join(LINES[5:9]) + b"]")
    with pytest.raises(ValueError, match=r"a.json: line 1, column \d+"):
        table(tmp_path / "a.json")


@pytest.mark.parametrize("form", ["%s", "[%s]", '{"data": [%s]}'])
def test_of_a_field_that_stands_twice_the_last_counts(tmp_path, form):
    turns = '"conversations": [{"from": "human", "value": "x", "value": "<video>"}, {"from": "gpt", "value": "A"}]'
    for written in (
        f'{{"id": "1", "id": "2", "video": "a", "video": "b", {turns}}}',
        f'{{"id": "2", "video": "a", "conversations": [], {turns}, "video": "b"}}',
    ):
        (tmp_path / "a.json").write_text(form % written)
        expected = {**record(2, question="<video>", answer="A"), "id": "2", "video": "b"}
        assert list(table(tmp_path / "a.json")) == read_records(tmp_path / "a.json") == [expected]


def test_a_table_is_the_usable_records_of_its_files(tmp_path):
    given = [
        *RECORDS,
        {"conversations": []},
        record(7, videos=["v_1.mp4", "gone"]),
        record(8, question="<video><video>"),
    ]
    given.append({**record(9, question="<video><video>"), "videos": ["v_2.mp4", "v_9.mp4"]})
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(json.dumps(each).encode() for each in given))
    (tmp_path / "b.json").write_bytes(json.dumps([record(1, video="gone"), *RECORDS[:2]]).encode())
    asked = []
    made = table(tmp_path / "a.jsonl", lambda name: asked.append(name) or (f"{name}!" if name == "gone" else None))
    made.add(tmp_path / "b.json")
    expected = [
        examine(each, i, policy=POLICIES["none"], use_start_end=True).record
        for i, each in [*enumerate([*RECORDS, None, None, None, given[-1]]), *enumerate([None, *RECORDS[:2]])]
        if each is not None
    ]
    assert list(made) == expected and made.counts == [31, 2] and made.unusable == 4 and len(made.bad) == 4
    assert made.bad[-1] == f"{tmp_path / 'b.json'}: record 0 (from 0): gone!"
    assert made.names == list(dict.fromkeys(name for i in range(len(made)) for name in made.videos(i)))
    assert sorted(asked) == sorted({*made.names, "gone"})
    assert [made.videos(i) for i in range(len(made))] == [
        each.get("videos") or ([each["video"]] if "video" in each else []) for each in expected
    ]
    rows = np.arange(len(made.names)) + 10
    assert made.sum_over_videos(rows).tolist() == [
        sum(rows[made.names.index(name)] for name in made.videos(i)) for i in range(len(made))
    ]
    assert made.place(32) == f"{tmp_path / 'b.json'}: record 2 (from 0)"
    assert made.sizes()[0] == len(LINES[0]) and made[-1] == expected[-1]
    assert [*made.remarks.counts.values()] == [1, 1]  # <video> without a video; "video" beside "videos"


@pytest.mark.parametrize("form", [b"%s\n%s", b"[%s, %s]"])
def test_a_role_in_a_text_is_remarked(tmp_path, form):
    (tmp_path / "a.json").write_bytes(form % (LINES[6].replace(b"Blue.", b"a ASSISTANT: b"), LINES[7]))
    assert table(tmp_path / "a.json").remarks.counts.total() == 1


def test_a_table_of_plain_records_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(LINES[5:]))
    made = table(tmp_path / "a.jsonl")
    assert list(made) == RECORDS[5:] and made.names == ["v_2.mp4", "v_0.mp4", "v_1.mp4"]
