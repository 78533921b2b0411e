"""Benchmarks: from their own files to samples, and from answers to the files that upstream's scripts read."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastvid.data.parquet import read_parquet
from fastvid.data.records import place, read_records, read_text
from fastvid.evaluation.options import LETTERS, right_option, without_labels
from fastvid.files import StrPath, shown

GROUPS = ("summary", "spatial", "reasoning")  # types of VCGBench-Diverse that have a score of their own
_VIDEO = ("video", "videoID", "video_name", "video_id", "video_path")


@dataclass(frozen=True)
class Sample:
    """What a benchmark asks about one video.

    Attributes:
        id: of this sample, in all files of the task.
        video: the file's name, as the benchmark has it.
        texts: the question; two of a test of consistency.
        answer: the right one.
        kind: decides how it is judged, see `fastvid.evaluation.grading.ASPECTS`.
        group: of which a score of its own is told; "" without.
        options: of a multiple choice; the right one is `options[right]`.
        part: (first, last) second that the question is about; None: the whole video.
        record: as it stands in the benchmark's file.
    """

    id: str
    video: str
    texts: tuple[str, ...]
    answer: str
    kind: str
    group: str = ""
    options: tuple[str, ...] = ()
    right: int | None = None
    part: tuple[float, float] | None = None
    record: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        files: from what --annotations names to the files that are read, {role: path}.
        samples: from those to samples.
        upstream: from (record, answers) to the record that upstream's inference script writes.
    """

    files: Callable[[Path], dict[str, Path]]
    samples: Callable[[dict[str, Path]], list[Sample]]
    upstream: Callable[[dict, Sequence[str]], dict]


def read_samples(name: str, annotations: StrPath) -> tuple[list[Sample], list[Path]]:
    """(samples in the files' order, the files) of a task.

    Args:
        name: of `TASKS`.
        annotations: file or folder.

    Raises:
        ValueError: a file is missing or is not what the benchmark has; says which record.
    """
    path, task = Path(annotations), TASKS[name]
    if not path.exists():
        raise ValueError(f"--annotations {shown(path)} does not exist; give the benchmark's file or folder")
    files = task.files(path)
    samples = task.samples(files)
    if not samples:
        raise ValueError(f"--annotations {shown(path)} holds no question")
    known = {}
    for number, sample in enumerate(samples):
        if known.setdefault(sample.id, number) != number:
            raise ValueError(
                f"--annotations {shown(path)}: questions {known[sample.id]} and {number} (from 0) have one id, "
                f"{shown(sample.id)}; give each record an id of its own, and each file another name"
            )
    return samples, list(files.values())


def upstream_files(name: str, samples: Iterable[Sample], answers: Mapping[str, Sequence[str]]) -> dict[str, list]:
    """{file name: records} as upstream's inference scripts write them, of the samples that have answers.

    Args:
        samples: as `read_samples` gave them.
        answers: {id: texts, one for each question}.
    """
    files = {}
    for sample in samples:
        if sample.id in answers:
            file = f"{sample.kind}.json" if name == "vcg" else f"{name}.json"
            files.setdefault(file, []).append(TASKS[name].upstream(sample.record, answers[sample.id]))
    return files


def _found(**patterns):
    """Finds the file of each role in a folder, by a piece of its name; a file that is given alone has the one role that
    its name tells, or the first."""

    def find(path):
        if path.is_file():
            role = next((role for role, piece in patterns.items() if piece in path.name.lower()), next(iter(patterns)))
            return {role: path}
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        found = {}
        for role, piece in patterns.items():
            fitting = [file for file in files if piece in file.name.lower()]
            if len(fitting) > 1:
                names = ", ".join(shown(file.name) for file in fitting)
                raise ValueError(
                    f"{shown(path)} holds several files with {piece!r} in their names ({names}); leave one"
                )
            if fitting:
                found[role] = fitting[0]
        if not found:
            raise ValueError(
                f"{shown(path)} holds no file of this benchmark: a name must hold one of "
                f"{', '.join(map(repr, patterns.values()))}; give the folder of the benchmark's annotations"
            )
        return found

    return find


def _every(*endings):
    """Finds all files with one of the endings, each a role of its own."""

    def find(path):
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in endings)
        if not files:
            raise ValueError(
                f"{shown(path)} holds no file that ends in {', '.join(endings)}; give the benchmark's folder"
            )
        return {str(number): file for number, file in enumerate(files)}

    return find


def _text(record, key, where):
    value = record.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f'{where} has no text as "{key}"; give the benchmark\'s own file')
    return value


def _records(path):
    """(place, record) of a JSON or JSONL file."""
    return _objects((place(path, number), record) for number, record in enumerate(read_records(path)))


def _objects(records):
    records = list(records)
    for where, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{where} is no object; give the benchmark's own file")
    return records


def _vcg(files):
    samples = []
    for kind, path in files.items():
        for number, (where, record) in enumerate(_records(path)):
            paired = "Q1" in record
            samples.append(
                Sample(
                    f"{kind}/{number}",
                    _text(record, "video_name", where),
                    tuple(_text(record, key, where) for key in (("Q1", "Q2") if paired else ("Q",))),
                    _text(record, "A", where),
                    "consistency" if paired else kind,
                    record=record,
                )
            )
    return samples


def _diverse(files):
    samples = []
    for where, record in _records(files["qa"]):
        kind = _text(record, "type", where)
        paired = "Q1" in record
        samples.append(
            Sample(
                _text(record, "id", where),
                _text(record, "video_name", where),
                tuple(_text(record, key, where) for key in (("Q1", "Q2") if paired else ("Q",))),
                _text(record, "A", where),
                "consistency" if paired else "temporal" if kind == "temporal" else "generic",
                kind if kind in GROUPS else "",
                record=record,
            )
        )
    return samples


def _activitynet(files):
    if files.keys() != {"questions", "answers"}:
        raise ValueError("activitynet_qa needs test_q.json and test_a.json: give --annotations the folder of both")
    questions, answers = (_records(files[role]) for role in ("questions", "answers"))
    by_id = {}
    for where, record in answers:
        name = _text(record, "question_id", where)
        if by_id.setdefault(name, record) is not record:
            raise ValueError(f"{where}: another record answers {shown(name)} too; leave the right one")
    samples = []
    for where, record in questions:
        name = _text(record, "question_id", where)
        if name not in by_id:
            raise ValueError(
                f"{where}: {shown(files['answers'])} has no answer to {name!r}; give the two files of one set"
            )
        answer = _text(by_id[name], "answer", where)
        question = _text(record, "question", where)
        written = {"id": record["question_id"], "question": question, "answer": answer}
        samples.append(Sample(name, _text(record, "video_name", where), (question,), answer, "qa", record=written))
    return samples


def _msvd(files):
    if files.keys() != {"qa", "mapping"}:
        raise ValueError("msvd_qa needs its questions and youtube_mapping.txt: give --annotations the folder of both")
    names = {}
    for line in read_text(files["mapping"]).splitlines():
        name, _, number = line.rpartition(" ")
        names[number.removeprefix("vid")] = name
    samples = []
    for number, (where, record) in enumerate(_records(files["qa"])):
        video = _text(record, "video_id", where)
        if video not in names:
            raise ValueError(f"{where}: {shown(files['mapping'])} has no vid{video}; give the two files of one set")
        samples.append(_question(_name(record, "id", number), names[video], record, where))
    return samples


def _msrvtt(files):
    return [
        _question(_name(record, "id", number), f"video{_text(record, 'video_id', where)}", record, where)
        for number, (where, record) in enumerate(_records(files["qa"]))
    ]


def _tgif(files):
    path = files["qa"]
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path)), delimiter="\t"))
    except csv.Error as error:
        raise ValueError(f"{shown(path)} is no table with tabs ({error}); give the benchmark's own file") from error
    for number, row in enumerate(rows):
        if any("\t" in text or "\n" in text for text in row.values() if isinstance(text, str)):
            raise ValueError(
                f"{place(path, number)} reaches over several lines or columns: a quotation mark in it is not closed; "
                "write it twice within two others, or take it out"
            )
    return [
        _question(str(number), _text(row, "gif_name", place(path, number)), row, place(path, number))
        for number, row in enumerate(rows)
    ]


def _name(record, key, number):
    """A record's own id, or its number."""
    return str(number if record.get(key) is None else record[key])


def _question(name, video, record, where):
    return Sample(name, video, (_text(record, "question", where),), _text(record, "answer", where), "qa", record=record)


def _choices(files):
    samples = []
    for path in files.values():
        for number, (where, record) in enumerate(_table(path)):
            options = next((record[key] for key in ("candidates", "options") if key in record), None)
            if (
                not isinstance(options, list)
                or not 2 <= len(options) <= len(LETTERS)
                or not all(isinstance(option, str | int | float) for option in options)
            ):
                raise ValueError(f'{where} has no list of options as "candidates" or "options"; give a multiple choice')
            right = right_option(options, record.get("answer"), where)
            options = without_labels(tuple(map(str, options)))
            video = next((key for key in _VIDEO if key in record), "video")
            group = path.stem if len(files) > 1 else str(record.get("task_type") or record.get("duration") or "")
            samples.append(
                Sample(
                    f"{path.stem}/{_name(record, 'question_id', number)}",
                    _text(record, video, where),
                    (_text(record, "question", where),),
                    options[right],
                    "choice",
                    group,
                    options,
                    right,
                    _part(record, where),
                    record,
                )
            )
    return samples


def _part(record, where):
    ends = tuple(record.get(key) for key in ("start", "end"))
    if ends == (None, None):
        return None
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends):
        told = " and ".join(shown(json.dumps(end, ensure_ascii=False)) for end in ends)
        raise ValueError(f'{where}: "start" and "end" are {told}; give both in seconds, or leave both out')
    return ends


def _table(path):
    """(place, record) of a JSON, JSONL or Parquet file."""
    if path.suffix != ".parquet":
        return _records(path)
    return _objects((place(path, number), row) for number, row in enumerate(read_parquet(path)))


def _plain(files):
    samples = []
    for path in files.values():
        for number, (where, record) in enumerate(_table(path)):
            video = next((key for key in _VIDEO if key in record), "video")
            question, answer = ("Q", "A") if "Q" in record else ("q", "a") if "q" in record else ("question", "answer")
            samples.append(
                Sample(
                    f"{path.stem}/{number}",
                    _text(record, video, where),
                    (_text(record, question, where),),
                    _text(record, answer, where),
                    "match",
                    path.stem if len(files) > 1 else "",
                    record=record,
                )
            )
    return samples


def _with_pred(record, answers):
    names = ("pred",) if len(answers) == 1 else ("pred1", "pred2")
    return {**record, **dict(zip(names, answers))}


def _diverse_record(record, answers):
    """As VideoGPT+ writes it, without its random ids."""
    several = len(answers) > 1
    texts = {}
    for number, answer in enumerate(answers, start=1):
        ending = f"_{number}" if several else ""
        texts |= {f"prompt{ending}": record[f"Q{number}" if several else "Q"], f"text{ending}": answer}
    return {"video_name": record["video_name"], **texts, "answer": record["A"], "ann_id": record["id"]}


_QA = _found(qa="qa")
TASKS = {
    "vcg": Task(_found(generic="generic", temporal="temporal", consistency="consistency"), _vcg, _with_pred),
    "vcg_diverse": Task(_QA, _diverse, _diverse_record),
    "activitynet_qa": Task(_found(questions="_q", answers="_a"), _activitynet, _with_pred),
    "msvd_qa": Task(_found(qa="qa", mapping="mapping"), _msvd, _with_pred),
    "msrvtt_qa": Task(_QA, _msrvtt, _with_pred),
    "tgif_qa": Task(_QA, _tgif, _with_pred),
    "mc": Task(_every(".json", ".jsonl", ".parquet"), _choices, _with_pred),
    "match": Task(_every(".json", ".jsonl", ".parquet"), _plain, _with_pred),
}
