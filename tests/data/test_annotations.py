"""What training, validation and inspection make of a record."""

import copy
import re

import pytest

from fastvid.config.policy import POLICIES
from fastvid.data.annotations import Remarks, examine
from fastvid.data.styles import record_videos

ASK, TELL = {"from": "human", "value": "What?\n<video>"}, {"from": "gpt", "value": "That."}
TEXT = {"from": "human", "value": "What?"}
TRAINING = {"id": "v_1", "video": "v_1.pkl", "conversations": [ASK, TELL]}


def look_at(record, parity="none", use_start_end=True, number=7):
    return examine(record, number, policy=POLICIES[parity], use_start_end=use_start_end)


def turns(*texts, first="human"):
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"videos": None},
        {"videos": []},
        {"image": None, "images": [], "audio": ""},
        {"fps": 3, "keep": True},
    ],
)
def test_well_formed_records_are_taken_as_they_are(change):
    given = {**TRAINING, **change}
    before = copy.deepcopy(given)
    found = look_at(given)
    assert (found.record, found.fault, found.remarks) == (TRAINING, None, []) and given == before
    again = look_at(found.record)
    assert again.record == found.record and not again.remarks


@pytest.mark.parametrize("parity", ["none", "reference"])
@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"video": 3}, "video", "is not a file name"),
        ({"video": ""}, "video", "is not a file name"),
        ({"video": ["a.pkl", 3]}, "video", "is not a list of file names"),
        ({"videos": {"a": 1}}, "videos", "is not a list of file names"),
        ({"videos": ["a.pkl", ""]}, "videos", "is not a list of file names"),
        ({"conversations": []}, "conversations", "is not a list of turns"),
        ({"conversations": None}, "conversations", "is not a list of turns"),
        ({"conversations": ["hi"]}, "conversations", "turn 0 is text, not an object"),
        ({"conversations": [TEXT, {"from": "system", "value": "b"}]}, "conversations", 'turn 1 is from "system"'),
        (
            {"conversations": [TEXT, {"from": "ob\nserver", "value": "b"}]},
            "conversations",
            "turn 1 is from \"'ob\\nserver'\"; write",
        ),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "conversations", "turn 0 does not say"),
        ({"conversations": [{"from": "human", "value": None}]}, "conversations", 'turn 0 has no text as "value"'),
        ({"conversations": [{"from": "human", "value": True}]}, "conversations", "turn 0 has no text"),
        ({"conversations": [{"from": "human", "value": float("nan")}]}, "conversations", "turn 0 has no text"),
        (
            {"conversations": [{"from": "human", "value": "a \ud800 b"}]},
            "conversations",
            r"turn 0 holds '\ud800', half of a surrogate pair",
        ),
        ({"conversations": [ASK, TEXT, TELL]}, "conversations", "turn 1 is from human again"),
        ({"conversations": [TELL, TELL]}, "conversations", "turn 1 is from gpt again"),
    ],
)
def test_malformed_records(change, field, reason, parity):
    found = look_at({**TRAINING, **change}, parity)
    assert found.record is None and found.fault.kind == f"malformed record, field '{field}'"
    assert found.fault.text.startswith(f"field '{field}' {reason}")


def test_what_is_no_record():
    assert look_at("x").fault == ("malformed record", "the record is text, not an object")
    assert 'is missing (the record has Q, A); write "conversations"' in look_at({"Q": "a", "A": "b"}).fault.text
    assert "fastvid convert" in look_at({"q": "a", "a": "b", "video_id": "c"}).fault.text


@pytest.mark.parametrize(("given", "name"), [("a", "a"), (0, "0"), (2.5, "2.5"), (None, "7"), ([1], "7"), (True, "7")])
def test_any_id_is_a_name(given, name):
    assert look_at({**TRAINING, "id": given}).record["id"] == name
    assert look_at({key: value for key, value in TRAINING.items() if key != "id"}).record["id"] == "7"


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (
            {"video": None, "image": "a.jpg", "conversations": turns("What?", "That.")},
            "<video> placeholders",
            "0 <image> in the text for 1 image; put <image> into the question",
        ),
        (
            {"video": None, "images": ["a.jpg", "b.jpg"], "conversations": turns("<image>What?", "That.")},
            "<video> placeholders",
            "for 2 images; put <image> into the question, once for each image",
        ),
        ({"video": None, "image_path": "a.jpg"}, "the image's name in another field", "names its image in 'image'"),
        ({"video": None, "audio_path": "a.wav"}, "records of something else", "field 'audio_path'"),
        (
            {"video": None, "conversations": turns("<image>\nWhat?", "That.")},
            "placeholders without",
            "name its image in",
        ),
        ({"video": None, "conversations": turns("What?", "That <IMG>.")}, "placeholders without", "<IMG>"),
        ({"video": None, "conversations": turns("<audio> What?", "That.")}, "records of something else", "<audio>"),
        (
            {"image": "a.jpg", "conversations": turns("<image> <image> <video>", "That.")},
            "malformed record, field 'images'",
            "names 1, and the text holds 2 <image>",
        ),
        ({"video": None, "video_path": "a.mp4"}, "the video's name in another field", "'video_path'"),
        *[
            (
                {"video": None, "conversations": turns(f"{spelled}\nWhat?", "That.")},
                kind,
                "the text holds",
            )
            for kind, spelled in (
                ("placeholders without a file", "<ImageHere>"),
                ("placeholders without a file", "<|image_1|>"),
                ("placeholders without a file", "<im_start>"),
                ("placeholders without a file", "<image_placeholder>"),
                ("records of something else", "<audio_pad>"),
            )
        ],
        ({"video": None, "clip": "a.MP4"}, "the video's name in another field", "'clip'"),
        ({"video": None, "media": ["a.pkl"]}, "the video's name in another field", "'media'"),
        (
            {"video": None, "depth": "a.png", "conversations": turns("<depth> What?", "That.")},
            "records of something else",
            "'depth'",
        ),
        (
            {"conversations": turns("What?", "That.")},
            "<video> placeholders",
            "0 <video> .* put <video> into the question",
        ),
        ({"conversations": turns("<video><video>", "That.")}, "<video> placeholders", '2 <video> .* "videos"'),
        ({"conversations": turns("<video>", "<video>")}, "<video> placeholders", '2 <video> .* "videos"'),
        ({"conversations": turns("What?", "<image>")}, "malformed record", "has <image> in an answer"),
        ({"conversations": turns("<image><image>", "That.")}, "<video> placeholders", r"holds 2 <image>"),
        (
            {"conversations": turns("<video>", "What?", "That.", first="gpt")},
            "<video> placeholders",
            "first turn is from gpt and left out",
        ),
        ({"conversations": turns("<video> <vid_patch>", "That.")}, "the model's own placeholders", "<vid_patch>"),
        ({"conversations": turns("<video>", "<vid_end>")}, "the model's own placeholders", "<vid_end>"),
        ({"conversations": turns("<video>")}, "no answer", "no turn from gpt with an answer"),
        ({"conversations": turns("<video>", "")}, "no answer", "no turn from gpt with an answer"),
        ({"conversations": turns("hello", "<video>", first="gpt")}, "no answer", "no turn from gpt with an answer"),
    ],
)
def test_what_cannot_be_trained_on(change, kind, text):
    found = look_at({**TRAINING, **change})
    assert found.fault.kind.startswith(kind) and re.search(text, found.fault.text)


def test_what_depends_on_flags():
    assert look_at({**TRAINING, "conversations": turns("<video>", "<vid_end>")}, use_start_end=False).fault is None
    # the reference keeps a sample without supervised tokens, and masks the others with its own warning
    silent = look_at({**TRAINING, "conversations": turns("<video>", "")}, "reference")
    assert silent.fault is None and silent.remarks == []
    written = {**TRAINING, "conversations": turns("<video>", "a</s>b")}
    assert "as written" in look_at(written).remarks[0] and look_at(written, "reference").remarks == []


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        ({"system": "Answer in French."}, "field 'system' is not used"),
        ({"history": [["a", "b"]]}, "field 'history' is not used"),
        ({"videos": ["v_1.pkl"], "video": "other.pkl"}, "field 'video' is not used beside 'videos'"),
        ({"audio": "a.wav"}, "field 'audio' is not used"),
        ({"image": "thumbnail.jpg"}, "field 'image' is not used"),
        ({"conversations": [{**ASK, "weight": 0}, TELL]}, "field 'weight' of a turn is not used"),
        (
            {"conversations": turns("hello", "<video>", "That.", first="gpt")},
            "the first turn is from gpt: it is left out",
        ),
        ({"video": None}, "<video> in a record without a video: it stays text"),
        ({"conversations": turns("<video> or <image>", "That.")}, "<image> in the text of a record with a video"),
        ({"conversations": turns("What?", "<video>")}, "<video> stands in an answer"),
        (
            {"image": "a.png", "video": None, "conversations": turns("<image>", "Write <image>.")},
            "<image> in the text of a record with a video: it stays text",
        ),
        ({"video": None, "source": "a.mp4", "conversations": turns("What?", "That.")}, "field 'source' is not used"),
        ({"conversations": turns("<video>", "That.", "", "That.")}, "a question is empty"),
    ],
)
def test_what_is_left_out_or_unusual_is_remarked(change, remark):
    found = look_at({**TRAINING, **change})
    assert found.fault is None and len(found.remarks) == 1 and found.remarks[0].startswith(remark)


def test_remarks_are_one_line_a_kind_with_their_number_and_first_record():
    remarks = Remarks()
    for number, said in enumerate([[], ["a"], ["a", "b"], ["a"]]):
        remarks.add(said, "t.json", number)
    assert remarks.lines() == [
        "3 records: a (first: t.json: record 1 (from 0))",
        "1 record: b (first: t.json: record 2 (from 0))",
    ]
    for number in range(40):
        remarks.add([f"kind {number}"], "t.json", number)
    assert len(remarks.lines()) == 21 and remarks.lines()[-1].startswith("… and 22 more")


def test_record_videos():
    assert record_videos(TRAINING) == ["v_1.pkl"]
    assert record_videos({"videos": ["a", "b"], "conversations": []}) == ["a", "b"]
    assert record_videos({"id": "t", "conversations": []}) == []
