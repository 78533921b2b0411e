"""Records that are refused, what is said, and the records as mended."""

VIDEOS = ("a.mp4", "b.mp4", "sub/c.mp4")
TURNS = [{"from": "human", "value": "what does the cat see\n<video>"}, {"from": "gpt", "value": "a red house"}]
GOOD = {"id": "a", "video": "a.mp4", "conversations": TURNS}


def asked(question, answer="a house", **more):
    return {**GOOD, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


LEFT_OUT = None
# (record, what is said, the record as mended)
RECORDS = [
    (
        asked("<video> what <vid_patch>"),
        "which is the model's own placeholder; take it out of the text",
        asked("<video> what"),
    ),
    (
        without({**asked("what"), "video_path": "a.mp4"}, "video"),
        "a record names its video in 'video'",
        asked("<video> what"),
    ),
    (
        without({**asked("<video> what"), "clip": "a.mp4"}, "video"),
        "field 'clip' is not read; a record names its video",
        asked("<video> what"),
    ),
    (
        without({**asked("what"), "image": "picture.jpg"}, "video"),
        "0 <image> in the text for 1 image; put <image> into the question",
        without({**asked("<image> what"), "image": "picture.jpg"}, "video"),
    ),
    (
        without({**asked("<image> what"), "img": "picture.jpg"}, "video"),
        "field 'img' is not read; a record names its image in 'image'",
        without({**asked("<image> what"), "image": "picture.jpg"}, "video"),
    ),
    (
        without(asked("<image> what"), "video"),
        "the text holds <image>, but the record names no file; name its image in 'image'",
        without({**asked("<image> what"), "image": "picture.jpg"}, "video"),
    ),
    (
        without({**asked("<image> what"), "image": "data:image/png;base64,iVBO"}, "video"),
        "field 'image' holds the file itself; write it to a file, and name that",
        without({**asked("<image> what"), "image": "picture.jpg"}, "video"),
    ),
    (
        without({**asked("<depth> what"), "depth": "a.png"}, "video"),
        "field 'depth': only videos … leave the record out",
        LEFT_OUT,
    ),
    (
        without(asked("<audio> what"), "video"),
        "names no file: only videos, images and text are trained on; leave the record",
        LEFT_OUT,
    ),
    (
        asked("<video> or <video>"),
        'a record of several videos lists them as "videos", one for each placeholder',
        without(asked("<video> or <video>", videos=["a.mp4", "b.mp4"]), "video"),
    ),
    (
        {**GOOD, "conversations": [TURNS[1] | {"value": "<video>"}, *asked("what")["conversations"]]},
        "the first turn is from gpt and left out; put <video> into the question",
        {**GOOD, "conversations": [TURNS[1] | {"value": "hello"}, *asked("<video> what")["conversations"]]},
    ),
    (asked("what"), "put <video> into the question", asked("<video> what")),
    (
        {**GOOD, "conversations": [{**TURNS[0], "value": "what"}, {**TURNS[1], "value": "<image> a house"}]},
        "in an answer, which shows nothing; put it into the question",
        asked("<video> what"),
    ),
    (
        {"messages": [{"role": "system", "content": [{"video": "a.mp4"}]}, {"role": "user", "content": "what"}]},
        "turn 0, from system, holds a file; put it into a question",
        GOOD,
    ),
    (
        without(asked("what", videos=["a.mp4", "b.mp4"]), "video"),
        "into the question, once for each video",
        without(asked("<video> what <video>", videos=["a.mp4", "b.mp4"]), "video"),
    ),
    (
        {"Q": "what", "A": "a house", "video": "a.mp4"},
        'write "conversations": [{"from": "human", "value": question}',
        asked("<video> what"),
    ),
    ({**GOOD, "conversations": [*TURNS, {"from": "narrator", "value": "x"}]}, "and leave other turns out", GOOD),
    (
        {**GOOD, "conversations": [{**TURNS[0], "from": "visitor"}, TURNS[1]]},
        'is from "visitor"; write "human" for who asks and "gpt" for who answers',
        GOOD,
    ),
    (
        {**GOOD, "conversations": [{"value": TURNS[0]["value"]}, TURNS[1]]},
        'turn 0 does not say that it is "from": "human" or "gpt"',
        GOOD,
    ),
    (
        {**GOOD, "conversations": [[turn["value"] for turn in TURNS]]},
        'turn 0 is a list, not an object; write "conversations": [{"from": "human", "value": question}',
        GOOD,
    ),
    (
        {**GOOD, "conversations": [{"from": "human", "text": TURNS[0]["value"]}, TURNS[1]]},
        'turn 0 has no text as "value" (it has from, text)',
        GOOD,
    ),
    ({**GOOD, "conversations": [TURNS[0], TURNS[0], TURNS[1]]}, "human and gpt must take turns", GOOD),
    (
        {**GOOD, "conversations": [{"from": "human", "value": [{"type": "audio"}, {"text": "what"}]}, TURNS[1]]},
        "part 0 is of the type audio; only text, images and videos are read",
        {**GOOD, "conversations": [{"from": "human", "value": [{"type": "video"}, {"text": "what"}]}, TURNS[1]]},
    ),
    ({**GOOD, "video": "https://a.b/a.mp4"}, "it is a URL, and must be downloaded first", GOOD),
    ({**GOOD, "video": "sub\\c.mp4"}, "sub-folders are written with /", {**GOOD, "video": "sub/c.mp4"}),
    ({**GOOD, "video": "/data/a.mp4"}, "it is absolute; give it relative to feats", GOOD),
    ({**GOOD, "video": "../feats/a.mp4"}, 'it has ".."; give it relative to feats', GOOD),
]
