"""Records that show by their bytes that nothing is wrong: the pattern that promises it, and what finds them quickly."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.config.policy import POLICIES
from fastvid.data import plain as plain_records
from fastvid.data.annotations import examine
from fastvid.data.marks import Marks
from fastvid.data.plain import PLAIN, ROLE, laid_out, look


def record(i=0, question="<video>\nWhich?", answer="Blue."):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"v_{i}", "video": f"v_{i % 3}.mp4", "conversations": turns}


# Pieces of what records are written with; whatever they add up to, the pattern may only match what is fine.
PIECES = [
    '"', "\\", "\\n", "\\u003c", "\\u0041SSISTANT", "\\ud83c", "\\udf73", "\\ud83c\\udf73", "\\u00e9", "é", "\x01", "<",
    "<video>", "<image>", "</s>", "<unk>", "<vid_start>", "ASSISTANT", " ASSISTANT: ", " ", "word", "", "\\t",
    "\\/", "\\x", "\\\\", '\\"', "\\u12", "\x85", "\n",
]  # fmt: skip
NAMES = ["a.mp4", "b", "", "file://a.mp4", "data:x", "file:", "file:///a", "https://a/b.mp4"]
texts = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)


def written(data):
    """A record of such pieces, as bytes."""
    kind, name = data.draw(st.sampled_from(["video", "image"])), data.draw(st.sampled_from(NAMES))
    medium = data.draw(st.sampled_from([f'"{kind}": "{name}", ', "", '"videos": ["a"], ']))
    said = data.draw(st.lists(st.tuples(texts, texts), min_size=1, max_size=2))
    said[0] = (data.draw(st.sampled_from(["<video>", "<image>", ""])) + said[0][0], said[0][1])
    turns = ", ".join(
        f'{{"from": "human", "value": "{question}"}}, {{"from": "gpt", "value": "{answer}"}}'
        for question, answer in said
    )
    return f'{{"id": "{data.draw(texts)}", {medium}"conversations": [{turns}]}}'.encode()


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_what_the_pattern_matches_is_fine_as_it_stands(data):
    given = written(data)
    match = PLAIN.fullmatch(given)
    if match is None or ROLE in given:
        return
    for policy in POLICIES.values():
        found = examine(json.loads(given), policy=policy, use_start_end=True)
        assert found.fault is None and found.remarks == []
    assert found.record.get("video") == (None if match[3] is None else match[3].decode())


def between(given, glue, end=b""):
    """(bytes that hold the given ones, where these begin, where they end)."""
    ends = np.cumsum([len(each) + len(glue) for each in given]) - len(glue)
    begins = np.append(0, ends[:-1] + len(glue))
    return glue.join(given) + end, begins, ends


def by_pattern(data, begins, ends):
    """What `look` finds, by the pattern alone."""
    found = [PLAIN.fullmatch(data, begin, end) for begin, end in zip(begins, ends)]
    return [None if match is None else match[3] or b"" for match in found]


def told(data, found):
    names = [data[begin:end] for begin, end in found.names.tolist()]
    return [name if plain else None for name, plain in zip(names, found.plain.tolist(), strict=True)]


def narrow(text):
    """A record as `written` without blanks between its parts."""
    return text.replace(b'": ', b'":').replace(b'", "', b'","').replace(b'"}, {', b'"},{')


def check_quick_ones(given):
    """What numpy finds of some records is what the pattern finds of each."""
    for glue, end in ((b"\n", b""), (b" ", b"\\"), (b", ", b"]")):
        data, begins, ends = between(given, glue, end)
        expected, marks = by_pattern(data, begins, ends), Marks(data)
        assert told(data, look(marks, begins, ends)) == expected
        own_begins, own_ends, found = laid_out(marks)
        assert told(data, found) == by_pattern(data, own_begins, own_ends), "what it takes for a record is one"


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_is_looked_at_quickly_is_what_the_pattern_matches(data):
    given = [written(data) for _ in range(3)]
    check_quick_ones([narrow(each) if data.draw(st.booleans()) else each for each in given])


def test_every_two_pieces_side_by_side_are_looked_at_quickly_as_the_pattern_does():
    turns = '[{"from": "human", "value": "%s"}, {"from": "gpt", "value": "%s"}%s]'
    given = []
    for piece in (a + b for a in PIECES for b in PIECES):
        for identity, name, asked, answered, more in (
            (piece, "v", "a<video>b", "c", ""),
            ("i", piece, "<video>", "c", ""),
            ("i", "v", f"a{piece}b", "c", ""),
            ("i", "v", "<video>", f"a{piece}b", ""),
            ("i", "v", "<video>", "a", f', {{"from": "human", "value": "{piece}"}}, {{"from": "gpt", "value": ""}}'),
        ):
            for medium in (f'"video": "{name}", ', ""):
                said = turns % (asked, answered, more)
                given.append(f'{{"id": "{identity}", {medium}"conversations": {said}}}'.encode())
    check_quick_ones(given)
    check_quick_ones([*map(narrow, given)])


def test_every_byte_of_a_record_counts():
    """Left out, twice, or another one."""
    turns = record(question="Q", answer="A")["conversations"]
    more = record(question="R", answer="")["conversations"]
    bases = [
        record(question="<video>", answer="A"),
        record(question="a <video>", answer="A\n"),
        {"id": "", "image": "b", "conversations": [*record(question="<image>", answer="A")["conversations"], *more]},
        {"id": "1", "conversations": turns},
        {"id": "1", "video": "a", "conversations": [*turns, *record(question="<video>", answer="A")["conversations"]]},
        {"id": "1", "video": "a", "conversations": record(question="Q", answer="<video>")["conversations"]},
    ]
    given = []
    for base in map(json.dumps, bases):
        given.append(base.encode())
        for at in range(len(base)):
            others = ["", base[at] * 2, "x", '"', "\\", "<", ",", "{", "]", " ", "\n"]
            given += [(base[:at] + other + base[at + 1 :]).encode() for other in others]
    check_quick_ones(given)
    check_quick_ones([*map(narrow, given)])


def test_records_as_convert_writes_them_need_no_pattern(monkeypatch):
    monkeypatch.setattr(plain_records, "PLAIN", None)
    one, turns = record(7, answer='é "quoted", \n'), record(question="a")["conversations"]
    image = {"id": "1", "image": "a.jpg", "conversations": record(question="<image>")["conversations"]}
    given = [
        one,
        image,
        {"id": "", "conversations": turns * 3},
        {**record(), "conversations": [*one["conversations"], *turns]},
    ]
    for separators in ((", ", ": "), (",", ":")):
        for ascii_alone in (False, True):
            data, begins, ends = between(
                [json.dumps(each, separators=separators, ensure_ascii=ascii_alone).encode() for each in given], b"\n"
            )
            assert told(data, look(Marks(data), begins, ends)) == [b"v_1.mp4", b"a.jpg", b"", b"v_0.mp4"]


def test_a_whole_character_of_two_escapes_is_plain():
    sound, half = (record(answer=text) for text in ("\U0001f373", "\ud83c a"))
    assert PLAIN.fullmatch(json.dumps(sound).encode()) and not PLAIN.fullmatch(json.dumps(half).encode())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["video", "image"])
def test_the_pattern_takes_names_as_they_stand(kind, name):
    given = {"id": "0", kind: name, "conversations": record(question=f"<{kind}>")["conversations"]}
    found = examine(given, policy=POLICIES["none"], use_start_end=True)
    as_it_stands = found.record is not None and found.record.get("video") == name
    data = json.dumps(given).encode()
    assert (PLAIN.fullmatch(data) is not None) == as_it_stands
    assert told(data, look(Marks(data), np.array([0]), np.array([len(data)]))) == [
        name.encode() if as_it_stands else None
    ]


def test_what_convert_writes_matches():
    for separators in ((", ", ": "), (",", ":")):
        for each in (record(), record(answer="é “quoted”\n"), {**record(), "image": "a"}, record(question="a <video>")):
            given = {key: value for key, value in each.items() if key != "video" or "image" not in each}
            if "image" in given:
                turns = record(question="<image>")["conversations"]
                given = {"id": "1", "image": "a", "conversations": turns}
            assert PLAIN.fullmatch(json.dumps(given, separators=separators).encode()), given
    assert PLAIN.fullmatch(json.dumps({"id": "t", "conversations": record(question="a")["conversations"] * 2}).encode())
    assert not PLAIN.fullmatch(json.dumps(record(question="<video><video>")).encode())
