"""Benchmarks' own files, made by hand: which samples they hold, and what is written for upstream's scripts."""

import json
import math
import re

import pytest
from conftest import ROOT

from fastvid.evaluation.tasks import TASKS, read_samples, upstream_files


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def facts(samples):
    return [(each.id, each.video, each.texts, each.answer, each.kind) for each in samples]


GENERIC = [{"video_name": "v_1", "Q": "what?", "A": "a cat"}, {"video_name": "v_1", "Q": "who?", "A": "a man"}]
PAIRED = [{"video_name": "v_2", "Q1": "what?", "Q2": "which?", "A": "a dog"}]


def test_vcg(tmp_path):
    write(tmp_path, generic_qa__json=GENERIC, temporal_qa__json=GENERIC[:1], consistency_qa__json=PAIRED)
    samples, files = read_samples("vcg", tmp_path)
    assert facts(samples) == [
        ("generic/0", "v_1", ("what?",), "a cat", "generic"),
        ("generic/1", "v_1", ("who?",), "a man", "generic"),
        ("temporal/0", "v_1", ("what?",), "a cat", "temporal"),
        ("consistency/0", "v_2", ("what?", "which?"), "a dog", "consistency"),
    ]
    assert len(files) == 3
    answers = {"generic/1": ["him"], "temporal/0": ["it"], "consistency/0": ["one", "two"]}
    assert upstream_files("vcg", samples, answers) == {
        "generic.json": [{**GENERIC[1], "pred": "him"}],
        "temporal.json": [{**GENERIC[0], "pred": "it"}],
        "consistency.json": [{**PAIRED[0], "pred1": "one", "pred2": "two"}],
    }
    alone, _ = read_samples("vcg", tmp_path / "consistency_qa.json")
    assert [each.id for each in alone] == ["consistency/0"]


def test_vcg_diverse(tmp_path):
    records = [
        {"id": 5, "type": "summary", "video_name": "a", "Q": "what?", "A": "x"},
        {"id": 6, "type": "temporal", "video_name": "a", "Q": "when?", "A": "y"},
        {"id": 7, "type": "consistency", "video_name": "b", "Q1": "one?", "Q2": "two?", "A": "z"},
    ]
    samples, _ = read_samples("vcg_diverse", write(tmp_path, vcgbench_diverse_qa__json=records))
    assert [(each.id, each.kind, each.group) for each in samples] == [
        ("5", "generic", "summary"),
        ("6", "temporal", ""),
        ("7", "consistency", ""),
    ]
    written = upstream_files("vcg_diverse", samples, {"5": ["p"], "7": ["q", "r"]})["vcg_diverse.json"]
    assert written == [
        {"video_name": "a", "prompt": "what?", "text": "p", "answer": "x", "ann_id": 5},
        {
            "video_name": "b",
            "prompt_1": "one?",
            "text_1": "q",
            "prompt_2": "two?",
            "text_2": "r",
            "answer": "z",
            "ann_id": 7,
        },
    ]


def test_activitynet_joins_by_id(tmp_path):
    """Upstream joins the two lists by position."""
    questions = [{"video_name": "x", "question": q, "question_id": f"x_{i}"} for i, q in enumerate("ab")]
    answers = [{"answer": "two", "question_id": "x_1"}, {"answer": "one", "question_id": "x_0"}]
    samples, _ = read_samples("activitynet_qa", write(tmp_path, test_q__json=questions, test_a__json=answers))
    assert facts(samples) == [("x_0", "x", ("a",), "one", "qa"), ("x_1", "x", ("b",), "two", "qa")]
    assert upstream_files("activitynet_qa", samples, {"x_0": ["no"]}) == {
        "activitynet_qa.json": [{"id": "x_0", "question": "a", "answer": "one", "pred": "no"}]
    }


def test_msvd_has_a_mapping(tmp_path):
    record = {"video_id": 1301, "id": 9, "question": "what?", "answer": "cat"}
    write(tmp_path, test_qa__json=[record], youtube_mapping__txt="abc_1 vid1300\n-4wsuPCjDBc_5_15 vid1301\n")
    samples, _ = read_samples("msvd_qa", tmp_path)
    assert facts(samples) == [("9", "-4wsuPCjDBc_5_15", ("what?",), "cat", "qa")]
    assert upstream_files("msvd_qa", samples, {"9": ["dog"]})["msvd_qa.json"] == [{**record, "pred": "dog"}]


def test_msrvtt_and_tgif(tmp_path):
    samples, _ = read_samples(
        "msrvtt_qa", write(tmp_path, test_qa__json=[{"video_id": 7010, "id": 1, "question": "q", "answer": "a"}])
    )
    assert facts(samples) == [("1", "video7010", ("q",), "a", "qa")]
    table = "gif_name\tquestion\tanswer\tdescription\ntumblr_1\twhat, is?\tdogs\ta, b\n"
    samples, _ = read_samples("tgif_qa", write(tmp_path, frameqa__csv=table) / "frameqa.csv")
    assert facts(samples) == [("0", "tumblr_1", ("what, is?",), "dogs", "qa")]
    assert upstream_files("tgif_qa", samples, {"0": ["cat"]})["tgif_qa.json"] == [
        {"gif_name": "tumblr_1", "question": "what, is?", "answer": "dogs", "description": "a, b", "pred": "cat"}
    ]


def test_mvbench(tmp_path):
    record = {"video": "v.mp4", "question": "q", "candidates": ["up", "down"], "answer": "down"}
    write(tmp_path, moving__json=[record], star__json=[{**record, "start": 1.5, "end": 9}])
    samples, _ = read_samples("mc", tmp_path)
    assert [(each.id, each.group, each.options, each.right, each.part) for each in samples] == [
        ("moving/0", "moving", ("up", "down"), 1, None),
        ("star/0", "star", ("up", "down"), 1, (1.5, 9)),
    ]


def test_video_mme_as_it_is(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [
        {
            "video_id": "001",
            "videoID": "fFjv93ACGo8",
            "duration": "short",
            "question_id": "001-1",
            "question": "q",
            "options": ["A. Apples.", "B. A candle.", "C. Three. Four.", "D. Berries."],
            "answer": "C",
        }
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    ((sample,), _) = read_samples("mc", tmp_path / "test.parquet")
    assert (sample.id, sample.video, sample.group) == ("test/001-1", "fFjv93ACGo8", "short")
    assert sample.options == ("Apples.", "A candle.", "Three. Four.", "Berries.")
    assert (sample.right, sample.answer) == (2, "Three. Four.")


@pytest.mark.parametrize("answer, right", [("down", 1), ("B", 1), (0, 0)])
def test_an_answer_is_a_text_a_letter_or_a_number(tmp_path, answer, right):
    record = {"video": "v", "question": "q", "options": ["up", "down"], "answer": answer}
    ((sample,), _) = read_samples("mc", write(tmp_path, a__jsonl=json.dumps(record)) / "a.jsonl")
    assert sample.right == right


def test_match(tmp_path):
    record = {"video": "v", "question": "q", "answer": "red"}
    samples, _ = read_samples("match", write(tmp_path, a__json=[record]) / "a.json")
    assert facts(samples) == [("a/0", "v", ("q",), "red", "match")]


QA = {"video_id": 3, "question": "q", "answer": "a"}
ASKED = {"video_name": "x", "question": "q", "question_id": "1"}
ANSWERED = {"answer": "a", "question_id": "1"}
CHOICE = {"video": "v", "question": "q", "options": ["x", "y"], "answer": "y"}


@pytest.mark.parametrize(
    "task, files, message, mended",
    [
        ("vcg", {"other.json": GENERIC}, "holds no file of this benchmark: .* give", {"generic.json": GENERIC}),
        (
            "vcg",
            {"generic_a.json": GENERIC, "generic_b.json": GENERIC},
            "several files with 'generic' .* leave one",
            {"generic_b.json": None},
        ),
        (
            "vcg",
            {"generic.json": [{"video_name": "v", "Q": "q"}]},
            'record 0 .* no text as "A"; give',
            {"generic.json": GENERIC},
        ),
        ("activitynet_qa", {"test_q.json": [ASKED]}, "needs test_q.json and .* give", {"test_a.json": [ANSWERED]}),
        (
            "activitynet_qa",
            {"test_q.json": [ASKED], "test_a.json": []},
            "no answer to '1'; give the two files",
            {"test_a.json": [ANSWERED]},
        ),
        ("msvd_qa", {"test_qa.json": [QA]}, "needs its questions and .* give", {"mapping.txt": "b vid3\n"}),
        (
            "msvd_qa",
            {"test_qa.json": [QA], "mapping.txt": "b vid2\n"},
            "no vid3; give",
            {"mapping.txt": "b vid2\nc vid3\n"},
        ),
        ("mc", {"a.json": [{**CHOICE, "options": "xy"}]}, "no list of options .* give", {"a.json": [CHOICE]}),
        (
            "mc",
            {"a.json": [{**CHOICE, "answer": "C"}]},
            'record 0 .* "answer" is "C", which is none of the options; give',
            {"a.json": [{**CHOICE, "answer": "B"}]},
        ),
        ("mc", {"a.txt": ""}, "holds no file that ends in .json, .jsonl, .parquet; give", {"a.json": [CHOICE]}),
        ("mc", {"a.json": [7]}, "record 0 .* is no object; give", {"a.json": [CHOICE]}),
        ("mc", {"a.json": []}, "holds no question", {"a.json": [CHOICE]}),
        (
            "mc",
            {"a.json": [{**CHOICE, "question_id": 7}] * 2},
            "give each record an id of its own",
            {"a.json": [{**CHOICE, "question_id": n} for n in (7, 8)]},
        ),
        (
            "mc",
            {"a.json": [{**CHOICE, "start": None, "end": 3}]},
            "give both in seconds, or leave both out",
            {"a.json": [{**CHOICE, "start": 0, "end": 3}]},
        ),
        (
            "activitynet_qa",
            {"test_q.json": [ASKED], "test_a.json": [ANSWERED, ANSWERED]},
            "leave the right one",
            {"test_a.json": [ANSWERED]},
        ),
        (
            "tgif_qa",
            {"qa.csv": "gif_name\tquestion\tanswer\n" + "a" * 200_000 + "\tq\ta\n"},
            "is no table .* give",
            {"qa.csv": "gif_name\tquestion\tanswer\na\tq\ta\n"},
        ),
        ("mc", {"a.parquet": "cut"}, "download it again", {"a.parquet": None, "a.json": [CHOICE]}),
        (
            "tgif_qa",
            {"qa.csv": 'gif_name\tquestion\tanswer\na\t"q\tx\nb\tr"\ty\n'},
            "record 0 .* a quotation mark in it is not closed; write it twice within two others, or",
            {"qa.csv": 'gif_name\tquestion\tanswer\na\t"""q"\tx\nb\tr"\ty\n'},
        ),
        (
            "mc",
            {"a.json": [{**CHOICE, "options": ["B", "A"], "answer": "A"}]},
            '"answer" is "A", which is an option and the letter of another; give the option\'s number',
            {
                "a.json": [
                    {**CHOICE, "options": ["B", "A"], "answer": 1},
                    {**CHOICE, "options": ["A", "B"], "answer": "B"},
                ]
            },
        ),
    ],
)
def test_a_benchmark_is_read_once_mended_as_told(tmp_path, task, files, message, mended):
    def write_all(files):
        for name, content in files.items():
            if content is None:
                (tmp_path / name).unlink()
            else:
                (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))

    write_all(files)
    with pytest.raises(ValueError, match=message):
        read_samples(task, tmp_path)
    write_all(mended)
    assert read_samples(task, tmp_path)[0]


@pytest.mark.parametrize(
    "options, answer, right", [([1, 2, 3], 3, 2), ([0, 1, 2], 1, 1), ([7, 8.5], 8.5, 1), ([7, 8], 1, 1)]
)
def test_a_number_among_numbers(tmp_path, options, answer, right):
    """It is an option, or else an option's place."""
    record = {"video": "v", "question": "how many?", "options": options, "answer": answer}
    ((sample,), _) = read_samples("mc", write(tmp_path, a__json=[record]) / "a.json")
    assert (sample.right, sample.answer) == (right, str(options[right]))


def test_a_number_that_may_be_two_options_is_clear_as_text(tmp_path):
    record = {"video": "v", "question": "how many?", "options": [1, 2, 3], "answer": 1}
    path = write(tmp_path, a__json=[record]) / "a.json"
    with pytest.raises(
        ValueError, match='"answer" is 1, which is an option and .* write the options and the answer as'
    ):
        read_samples("mc", path)
    path.write_text(json.dumps([{**record, "options": ["1", "2", "3"], "answer": "1"}]))
    assert read_samples("mc", path)[0][0].right == 0


def test_parts_that_are_null_are_none(tmp_path):
    """As columns of a Parquet file are that most records lack."""
    path = write(tmp_path, a__json=[{**CHOICE, "start": None, "end": None, "question_id": None}]) / "a.json"
    assert [(each.id, each.part) for each in read_samples("mc", path)[0]] == [("a/0", None)]


@pytest.mark.parametrize(
    "task, files, message",
    [
        (
            "mc",
            {"a.json": [{**CHOICE, "question_id": 7}] * 2},
            "questions 0 and 1 .* have one id, a/7; give each record an id",
        ),
        (
            "mc",
            {"x/a.json": [CHOICE], "y/a.json": [CHOICE]},
            "questions 0 and 1 .* have one id, a/0; .* and each file another name",
        ),
        (
            "vcg_diverse",
            {"qa.json": [{"id": 5, "type": "summary", "video_name": "v", "Q": "q", "A": "a"}] * 2},
            "have one id, 5; give",
        ),
        ("msrvtt_qa", {"qa.json": [{**QA, "id": 1}] * 2}, "have one id, 1; give"),
        (
            "activitynet_qa",
            {"test_q.json": [ASKED], "test_a.json": [ANSWERED, {**ANSWERED, "answer": "b"}]},
            "test_a.json: record 1 .*: another record answers 1 too; leave the right one",
        ),
        ("msrvtt_qa", {"qa.json": [7]}, "record 0 .* is no object"),
        ("vcg_diverse", {"qa.json": [7]}, "record 0 .* is no object"),
        ("activitynet_qa", {"test_q.json": [7], "test_a.json": [7]}, "record 0 .* is no object"),
        ("match", {"a.json": '[{"video": "v", "question": "q", "answer": NaN}]'}, 'record 0 .* no text as "answer"'),
        ("match", {"a.json": "<html>moved</html>"}, "a.json is a web page"),
        ("tgif_qa", {"frameqa_qa.csv": b"gif_name\tquestion\tanswer\n\xff\tq\ta\n"}, "qa.csv.* UTF-8"),
        (
            "tgif_qa",
            {"qa.csv": "gif_name\tquestion\tanswer\n" + "a" * 200_000 + "\tq\ta\n"},
            "qa.csv is no table with tabs .*limit.*; give",
        ),
        ("tgif_qa", {"qa.csv": "gif_name,question,answer\na,q,a\n"}, 'record 0 .* no text as "gif_name"'),
        ("msvd_qa", {"test_qa.json": [QA], "mapping.txt": b"\xff vid3\n"}, "mapping.txt.* UTF-8"),
        ("msvd_qa", {"test_qa.json": [QA], "mapping.txt": "<html>"}, "mapping.txt is a web page"),
        ("mc", {"a.parquet": "no"}, "a.parquet .* download it again"),
        ("mc", {"a.json": [{**CHOICE, "start": "x", "end": 3}]}, 'record 0 .*"start" and "end" are "x" and 3'),
        ("mc", {"a.json": [{**CHOICE, "start": None, "end": 3}]}, 'record 0 .*"start" and "end" are null and 3'),
        ("mc", {"a.json": json.dumps([{**CHOICE, "start": math.nan, "end": 3}])}, '"start" and "end" are NaN and 3'),
        ("mc", {"a.json": [{**CHOICE, "options": ["x", ["y"]], "answer": "x"}]}, "record 0 .* no list of options"),
    ],
)
def test_bad_annotations_cost_one_line(tmp_path, task, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = content if isinstance(content, str | bytes) else json.dumps(content)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_samples(task, tmp_path)


def test_a_missing_path_is_told(tmp_path):
    with pytest.raises(ValueError, match="--annotations .*nowhere does not exist; give the benchmark's file"):
        read_samples("mc", tmp_path / "nowhere")
    (tmp_path / "nowhere").write_text(json.dumps([CHOICE]))
    assert read_samples("mc", tmp_path / "nowhere")[0]


def test_the_guides_records_are_read(tmp_path):
    """The examples of docs/evaluation.md, one of each benchmark."""
    guide = (ROOT / "docs" / "evaluation.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([`c].*[{`].*) \|$", guide.split("A record of each")[1], re.MULTILINE))
    assert rows.keys() == TASKS.keys()
    for task, row in rows.items():
        records = [[json.loads(found)] for found in re.findall(r"`(\{.*?\})`", row)]
        if task == "tgif_qa":
            names = re.findall(r"`(\w+)`", row)
            (tmp_path / "tgif_qa").write_text("\t".join(names) + "\nv_1\tWho runs?\tdog\n")
        elif task in ("activitynet_qa", "msvd_qa"):
            (tmp_path / task).mkdir()
            names = ("test_q.json", "test_a.json") if task == "activitynet_qa" else ("test_qa.json",)
            for name, content in zip(names, records, strict=True):
                (tmp_path / task / name).write_text(json.dumps(content))
            if task == "msvd_qa":
                (tmp_path / task / "youtube_mapping.txt").write_text(re.findall(r"the line `(.*?)`", row)[0] + "\n")
        else:
            (tmp_path / task).write_text(json.dumps(records[0]))
        ((sample,), _) = read_samples(task, tmp_path / task)
        assert sample.video.removesuffix(".mp4") == ("video7010" if task == "msrvtt_qa" else "v_1")
