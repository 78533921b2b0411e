"""Other trainers' records: what is read, and what is named."""

import pytest

from fastvid.data.styles import Unreadable, canonical

READ = {
    "id": "0",
    "video": "a.mp4",
    "conversations": [{"from": "human", "value": "<video>\nWhich?"}, {"from": "gpt", "value": "blue"}],
}


def pairs(*texts, role="from", text="value", names=("human", "gpt")):
    return [{role: names[i % 2], text: said} for i, said in enumerate(texts)]


@pytest.mark.parametrize(
    ("record", "remark"),
    [
        (
            {"video": "a.mp4", "conversations": pairs("<video>\nWhich?", "blue", names=("user", "assistant"))},
            "user and",
        ),
        ({"video": "a.mp4", "conversations": pairs("<video>\nWhich?", "blue", names=("Human", "GPT"))}, "user and"),
        ({"video": ["a.mp4"], "conversations": pairs("<video>\nWhich?", "blue")}, "field 'video' is a list"),
        ({"videos": "a.mp4", "conversations": pairs("<video>\nWhich?", "blue")}, "field 'videos' is one name"),
        ({"video": "a.mp4", "conversations": pairs("<image>\nWhich?", "blue")}, "<image> is read as <video>"),
        ({"video": "a.mp4", "conversations": pairs("<Video>\nWhich?", "blue")}, "<Video> is read as <video>"),
        *[
            ({"video": "a.mp4", "conversations": pairs(f"{spelled}\nWhich?", "blue")}, f"{spelled} is read as <video>")
            for spelled in (
                "<Video><VideoHere></Video>",
                "<video></video>",
                "<VideoHere>",
                "<vid>",
                "<video/>",
                "< video >",
                "<video_placeholder>",
                "<|vision_start|><|video_pad|><|vision_end|>",
                "<|video|>",
            )
        ],
        ({"video": "a.mp4", "question": "<video>\nWhich?", "answer": "blue"}, "fields 'question' and 'answer'"),
        ({"video": "a.mp4", "conversations": pairs("<video>\nWhich?", "blue", names=("human ", "gpt"))}, "user and"),
        (
            {"video": "a.mp4", "conversations": pairs("<video>\nWhich?", "blue"), "start": 3.5},
            "field 'start' is not used",
        ),
        (
            {"video": "a.mp4", "conversations": pairs("<video>\nWhich?", "blue"), "loss": False},
            "field 'loss' is not used",
        ),
        ({"video": "a.mp4", "conversation": pairs("<video>\nWhich?", "blue")}, "field 'conversation' is read"),
        (
            {"video": "a.mp4", "conversations": [{"from": "system", "value": "Be short."}, *READ["conversations"]]},
            "the first turn, from system, is left out",
        ),
        ({"videos": ["a.mp4"], "query": "<video>\nWhich?", "response": "blue"}, "fields 'query' and 'response'"),
        ({"videos": ["a.mp4"], "instruction": "<video>", "input": "Which?", "output": "blue"}, "fields 'instruction'"),
        ({"video": "a.mp4", "QA": [{"i": "", "q": "Which?", "a": "blue"}]}, "with <video> before the first question"),
    ],
)
def test_what_is_unmistakably_meant_is_read_with_a_remark(record, remark):
    read, remarks = canonical(record)
    assert read == READ and len(remarks) == 1 and remark in remarks[0]


def test_messages_of_role_and_content():
    said = pairs("<video>\nWhich?", "blue", role="role", text="content", names=("user", "assistant"))
    read, remarks = canonical({"messages": [{"role": "system", "content": ""}, *said], "videos": ["a.mp4"]})
    assert read == READ and len(remarks) == 2 and "field 'messages' is read" in remarks[0]


def test_a_number_is_taken_as_its_digits():
    for value, text in ((3, "3"), (0.5, "0.5"), (10**400, "1" + "0" * 400)):
        read, remarks = canonical({"conversations": pairs("How many?", value)})
        assert read["conversations"][1]["value"] == text and len(remarks) == 1


def test_history_comes_first():
    read, _ = canonical({"query": "b", "response": "c", "history": [["<video>", "a"]], "videos": ["v"]})
    assert [turn["value"] for turn in read["conversations"]] == ["<video>", "a", "b", "c"]


def test_later_questions_of_video_chat2():
    read, remarks = canonical(
        {"video": "v", "QA": [{"i": "Look.", "q": "A?", "a": 1}, {"i": "x", "q": "B?", "a": "b"}]}
    )
    assert [turn["value"] for turn in read["conversations"]] == ["<video>\nLook.\nA?", "1", "B?", "b"]
    assert any("field 'i' of a later entry" in remark for remark in remarks)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "type input_audio"),
        (
            {"messages": [{"role": "system", "content": [{"image": "a.jpg"}]}, {"role": "user", "content": "a"}]},
            "turn 0, from system, holds a file; put it into a question",
        ),
        (
            {"messages": [{"role": "user", "content": "Draw."}, {"role": "model", "content": [{"video": "a.mp4"}]}]},
            "turn 1, from model, holds a file; put it into a question",
        ),
        (  # named beside the turns, whose question shows it as well
            {
                "images": ["a.jpg"],
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, "Draw."]},
                    {"role": "assistant", "content": [{"type": "image"}]},
                ],
            },
            "turn 1, from assistant, holds a file; put it into a question",
        ),
        ({"query": "a", "response": "b", "history": ["c"]}, "not a list of .question, answer."),
        ({"query": None, "response": "b"}, "no text as .query."),
        ({"video": "v", "QA": [{"q": "a"}]}, "entry 0 is not an object of q and a"),
        ({"Q": "a", "A": "b", "video_name": "c"}, "the record has Q, A, video_name"),
        ({}, "no fields"),
        ({"conversations": [{"from": "human", "text": "a"}]}, r"no text as .value. \(it has from, text\)"),
        ({"conversations": '[{"from": "human"}]'}, "not a list of turns with at least one, but text"),
        ({"conversations": pairs("a", "b"), "video": {"path": 1}}, "not a file name, but an object"),
        ({"conversations": pairs("a", "b"), "videos": [{"a": 1}]}, "not a list of file names, but holds an object"),
        ({"conversations": pairs("a", "b"), "image": {"bytes": "x", "path": "a"}}, "holds the file itself"),
        ({"conversations": pairs("a", "b"), "images": ["data:image/png;base64,x"]}, "holds the file itself"),
    ],
)
def test_the_rest_is_named(record, reason):
    with pytest.raises(Unreadable, match=reason):
        canonical(record)


def test_placeholders_of_another_spelling_are_read_only_where_they_are_the_only_ones():
    for videos, asked in ((["v"], "<image> or <video>"), (["v"], "<image> <image>"), (["v", "w"], "<image> <Image>")):
        read, remarks = canonical({"videos": videos, "conversations": pairs(asked, "blue")})
        assert read["conversations"][0]["value"] == asked and not remarks


def test_images_are_videos_of_one_frame():
    read, remarks = canonical({"id": "i", "image": "a.jpg", "conversations": pairs("<image>\nWhat?", "A cat.")})
    assert read == {"id": "i", "video": "a.jpg", "conversations": pairs("<video>\nWhat?", "A cat.")} and not remarks


def test_images_and_videos_are_in_the_order_of_their_placeholders():
    record = {"images": ["a.png", "b.png"], "video": "v.mp4", "conversations": pairs("<image> <video> <image>", "c")}
    read, remarks = canonical(record)
    assert read["videos"] == ["a.png", "v.mp4", "b.png"] and not remarks
    assert read["conversations"][0]["value"] == "<video> <video> <video>"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "a.mp4"},
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
        {"type": "video_url", "video_url": {"url": "file://a.mp4"}},
        {"type": "video", "path": "a.mp4"},
        {"video": "a.mp4"},
        {"type": "video"},
    ],
)
def test_parts_of_a_turn(part):
    user = {"role": "user", "content": [part, {"type": "text", "text": "Which?"}]}
    record = {"messages": [user, {"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]}
    if part == {"type": "video"}:  # named beside the turns
        record["videos"] = ["a.mp4"]
    read, remarks = canonical(record)
    assert read == {**READ, "id": "0"} and any("parts of a turn" in remark for remark in remarks)
