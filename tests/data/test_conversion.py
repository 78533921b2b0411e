"""Records of other trainers: the style of each, and what becomes of it."""

import json
import re

import pytest
from conftest import ROOT

from fastvid import convert
from fastvid.config import STYLES, ConvertConfig
from fastvid.config.policy import POLICIES
from fastvid.data.annotations import examine
from fastvid.data.conversion import convert_any, style_of
from fastvid.data.records import read_records
from fastvid.evaluation.tasks import read_samples

ASKED = [{"from": "human", "value": "<video>\nWhich?"}, {"from": "gpt", "value": "blue"}]


def examples():
    """(style, record, training record) of the page on styles."""
    page = (ROOT / "docs" / "record-styles.md").read_text()
    for style, given, made in re.findall(
        r"^## .*?\(`(\w+)`\).*?```json\n(.*?)```.*?```json\n(.*?)```", page, re.S | re.M
    ):
        yield style, json.loads(given), json.loads(made)


EXAMPLES = list(examples())


@pytest.mark.parametrize(("style", "given", "made"), EXAMPLES)
def test_the_examples_of_the_page(style, given, made):
    assert style_of(given) == style
    for named in (style, "auto"):
        assert convert_any([given], path="in.json", style=named).records == [made]
    # What is written is what training reads without a remark.
    found = examine(made, policy=POLICIES["none"], use_start_end=True)
    assert found.fault is None and found.remarks == []


@pytest.mark.parametrize(("style", "given", "made"), EXAMPLES)
def test_a_table_of_several_sets_has_nulls_for_the_fields_of_the_others(style, given, made):
    others = {field for _, record, _ in EXAMPLES for field in record} | {"instruction", "output", "question", "answer"}
    (kept,) = convert_any([{**dict.fromkeys(others), **given}], path="in.parquet").records
    assert style_of({**dict.fromkeys(others), **given}) == style
    assert {name: value for name, value in kept.items() if value is not None} == made


def test_turns_of_several_sets_have_nulls_as_well():
    turns = [{**dict.fromkeys(("role", "content")), **turn} for turn in ASKED]
    others = [
        {"from": None, "value": None, "role": role, "content": turn["value"]}
        for role, turn in zip(("user", "assistant"), ASKED)
    ]
    done = convert_any([{"video": "a", "conversations": turns}, {"video": "a", "conversations": others}], path="p")
    assert [record["conversations"] for record in done.records] == [ASKED, ASKED]


def test_nulls_of_videoinstruct_are_told_as_of_the_reference():
    for fields, fault in (({"q": None, "a": "b", "video_id": "v"}, "q"), (dict.fromkeys(("q", "a", "video_id")), "q")):
        assert convert_any([fields], path="p", on_bad="drop").dropped == [(0, fault, "is null, not text")]
    asked = {"q": None, "a": None, "video_id": "v", "video": "a", "conversations": ASKED}
    assert convert_any([asked], path="p").unchanged == 1


def test_every_style_has_an_example():
    assert {style for style, *_ in EXAMPLES} == set(STYLES) - {"auto"}


def test_a_bad_record_costs_itself_and_kinds_have_a_line_each(tmp_path, capsys):
    good = {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "blue"}]}
    tool = {"messages": [good["messages"][0], {"role": "tool", "content": "x"}]}
    two = {"video": "a.mp4", "conversations": [{**ASKED[0], "value": "<image><image>"}, ASKED[1]]}
    inside = {**good, "images": [{"bytes": 3, "path": None}]}
    (tmp_path / "in.json").write_text(json.dumps([good, tool, 7, two, inside, tool, good]))
    flags = ["--input_json_file", str(tmp_path / "in.json"), "--output_json_file", str(tmp_path / "out.json")]
    assert convert.main(flags) == 0
    out, err = capsys.readouterr()
    assert out == "Total annotations retained: 2\n" and len(read_records(tmp_path / "out.json")) == 2
    lines = err.splitlines()
    assert lines[0] == f"{tmp_path / 'in.json'}: 7 records: 4 messages, 1 of no known style, 1 llava_video, 1 sharegpt"
    (tools,) = (line for line in lines if '"tool"' in line)
    assert tools.startswith("2 records cannot be converted: field 'messages' turn 1 is from")
    assert tools.endswith(f"(first: {tmp_path / 'in.json'}: record 1 (from 0))")
    assert sum("cannot be converted" in line for line in lines) == 4
    with pytest.raises(ValueError, match=r"record 1 .*turn 1 is from"):
        convert.main([*flags, "--on_bad", "error"])


ASKED_OF = {"question": "Which?", "answer": "blue"}
NOT_CONVERTED = {
    "activitynet-qa": (
        {**ASKED_OF, "video_name": "v_1"},
        "field 'video_name' is not read; a record names its",
    ),
    "msvd-qa": ({**ASKED_OF, "id": 3, "video_id": 1301}, "field 'video_id' is not read; a record names its"),
    "msvd-qa, its first video": ({**ASKED_OF, "video_id": 0}, "field 'video_id' is not read; a record names its video"),
    "vqa": ({**ASKED_OF, "image_id": 458752}, "field 'image_id' is not read; a record names its image in 'image'"),
    "vqa, its first image": ({**ASKED_OF, "image_id": 0}, "field 'image_id' is not read"),
    "tgif-qa": ({**ASKED_OF, "gif_name": "tumblr_1"}, "field 'gif_name' is not read; a record names its"),
    "plm, clips": ({**ASKED_OF, "metadata": {"source_video_id": "v"}}, "field 'metadata.source_video_id' is not read"),
    "audio": (
        {
            "messages": [{"role": "user", "content": "<audio>Hm?"}, {"role": "assistant", "content": "a"}],
            "audios": ["a"],
        },
        "field 'audios': only videos, images and text are trained on",
    ),
    "vcgbench": ({"Q": "Which?", "A": "blue", "video_name": "v"}, "is of VCGBench.*fastvid evaluate --task vcg"),
    "vcgbench, consistency": ({"Q1": "a", "Q2": "b", "A": "c", "video_name": "v"}, "is of VCGBench, which is no train"),
    "video-mme": (
        {"videoID": "v", "question": "Which?", "options": ["A"]},
        "fastvid evaluate --task mc",
    ),
    "molmo2": ({"video": "v", "message_lists": [[ASKED_OF]]}, "several conversations about one video; write each as a"),
    "plm, regions": (
        {"uid": 1, "video": "v", "caption": "c", "start_frame": 0},
        "a caption and no question with an answer; ",
    ),
    "captions by time": ({"video_id": "v", "captions": [{"content": "c"}]}, "holds a caption and no question"),
    "an answer that nobody asked for": ({"messages": [{"role": "assistant", "content": "a"}]}, "has no answer"),
    "preferences": ({"prompt": "Which?", "chosen": "a", "rejected": "b"}, "preferences are not trained on"),
    "frames": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "video", "video": ["0"]}, {"type": "text", "text": "a"}],
                },
                {"role": "assistant", "content": "blue"},
            ]
        },
        "turn 0, part 0 does not name a file, but a list",
    ),
}


@pytest.mark.parametrize(("given", "reason"), NOT_CONVERTED.values(), ids=NOT_CONVERTED)
def test_what_is_not_converted_says_why(given, reason):
    done = convert_any([given], path="p", on_bad="drop")
    assert not done.records and len(done.kinds("p")) == 1 and re.search(reason, done.kinds("p")[0])


def test_what_is_not_converted_is_told_once_and_with_its_fields():
    for name, (given, _) in NOT_CONVERTED.items():
        (told,) = convert_any([given], path="p", on_bad="drop").kinds("p")
        assert told.count("not converted") == 0 and told.count("cannot be converted") == 1
        if style_of(given) is None:
            assert f"(it has {', '.join(list(given)[:8])})" in told, name


GUESSED = [
    {"chosen": "a", "video": "v.mp4"},  # and none that is rejected
    {"options": ["a", "b"], "video": "v.mp4"},  # and no question
    {"Q": "Which?", "video": "v.mp4"},
    {"text": "a", "caption": None, "message_lists": None},  # of a table of several sets
]


@pytest.mark.parametrize("given", GUESSED)
def test_one_field_is_no_reason(given):
    (told,) = convert_any([given], path="p", on_bad="drop").kinds("p")
    assert "a style that is not known; docs/record-styles.md" in told


def test_a_source_that_is_empty_names_no_video():
    done = convert_any([{**ASKED_OF, "metadata": {"source_video_id": None}}], path="p")
    assert len(done.records) == 1 and not done.dropped


def test_what_is_not_converted_is_taken_once_mended_as_told(tmp_path):
    def written(name, records):
        (tmp_path / name).write_text(json.dumps(records))
        return tmp_path / name

    caption, several = NOT_CONVERTED["plm, regions"][0], NOT_CONVERTED["molmo2"][0]["message_lists"]
    mended = [{"video": "v", "question": "Describe it.", "answer": caption["caption"]}]
    mended += [{"video": "v", **each} for conversation in several for each in conversation]
    assert len(convert_any(mended, path="p").records) == 2
    samples, _ = read_samples("vcg", written("generic_qa.json", [NOT_CONVERTED["vcgbench"][0]]))
    assert [sample.texts for sample in samples] == [("Which?",)]
    choice = {**NOT_CONVERTED["video-mme"][0], "options": ["red", "blue"], "answer": "B"}
    samples, _ = read_samples("mc", written("choices.json", [choice]))
    assert [sample.options[sample.right] for sample in samples] == ["blue"]
    named = {**NOT_CONVERTED["activitynet-qa"][0], "video": "v_1.mp4"}
    assert convert_any([named], path="p").records[0]["video"] == "v_1.mp4"


def test_texts_of_prompt_and_completion_are_a_question_and_its_answer():
    done = convert_any([{"prompt": "Which?", "completion": "blue"}, {**ASKED_OF, "video": "v.mp4"}], path="p")
    assert [record["conversations"][1]["value"] for record in done.records] == ["blue", "blue"]
    assert done.records[1]["video"] == "v.mp4" and done.styles == {"alpaca": 2}


def test_a_style_that_is_named_is_the_only_one():
    swift = {"query": "<video>Which?", "response": "blue", "videos": ["a.mp4"]}
    done = convert_any([swift, {**swift, "QA": []}], path="in.json", style="swift")
    assert len(done.records) == 1 and done.dropped == [(1, "", "is of the style videochat2, not of --from swift")]


def test_a_role_that_is_no_text_is_a_malformed_record():
    done = convert_any([{"conversations": [{"from": ["human"], "value": "x"}]}], path="p")
    assert done.dropped == [(0, "conversations", 'turn 0 does not say that it is "from": "human" or "gpt"')]


@pytest.mark.parametrize("style", ["videoinstruct", "training", "llava"])
def test_a_malformed_record_ends_only_a_file_of_the_reference(style):
    (good,) = (given for name, given, _ in EXAMPLES if name == style)
    again = {"conversations": [*ASKED, ASKED[1]]}  # of the style "training", as the texts beside LLaVA's images are
    if style == "llava":
        done = convert_any([good, again, 7], path="p")
        assert len(done.records) == 1 and [index for index, *_ in done.dropped] == [1, 2]
    else:
        with pytest.raises(ValueError, match=r"p: record 1 \(from 0\): .* turn 2 is from gpt again.*--on_bad drop"):
            convert_any([good, again, 7], path="p")


@pytest.mark.parametrize("style", ["auto", "videoinstruct"])
def test_a_field_that_videoinstruct_lacks_is_named(style):
    with pytest.raises(ValueError, match=r"record 0 .from 0.: field 'a' is missing"):
        convert_any([{"q": "Which?", "video_id": "v"}], path="p", style=style)


def test_an_unknown_style_is_named_by_its_fields():
    done = convert_any([{"lists": [], "clip": "a"}, {}], path="p", on_bad="drop")
    assert done.dropped[0][2].startswith("has lists, clip: a style that is not known")
    assert done.dropped[1][2].startswith("has no fields")


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Write HTML for this picture", "output": "<p><image></p>", "image": "z.jpg"},
        {"query": "What?", "response": "A dog <image> tag", "images": ["z.jpg"]},
        {"query": "What?", "response": "A <video> tag", "videos": ["z.mp4"]},
        {"query": "<image> What?", "response": "A <video> tag", "images": ["z.jpg", "y.jpg"]},
        {"image": "z.jpg", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "<video>"}]},
    ],
)
def test_nothing_is_shown_in_an_answer(record):
    done = convert_any([record], path="p", on_bad="drop")
    assert not done.records and "in an answer, which shows nothing; put it into the question" in done.dropped[0][2]


def test_the_training_form_stays_as_the_reference_reads_it():
    shown = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "<video>"}]
    assert convert_any([{"video": "z.mp4", "conversations": shown}], path="p").unchanged == 1
    twice = convert_any([{"video": "z.mp4", "conversations": [ASKED[0], shown[1]]}], path="p", on_bad="drop")
    assert "has 2 <video> in its text for 1 video" in twice.dropped[0][2]


def test_what_an_answer_says_of_placeholders_stays_text():
    answer = {"from": "gpt", "value": "The tag is <image>."}
    for field, placeholder in (("image", "<image>"), ("video", "<video>")):
        given = {field: "z", "conversations": [{"from": "human", "value": "<image> Which?"}, answer]}
        (made,) = convert_any([given], path="p").records
        assert made["conversations"] == [{"from": "human", "value": f"{placeholder} Which?"}, answer]
        found = examine(made, policy=POLICIES["none"], use_start_end=True)
        assert found.fault is None and found.record["conversations"][1] == answer


def test_names_below_a_folder_are_written_without_it():
    def named(*names):
        return convert_any(
            [{"query": "<video>" * len(names), "response": "b", "videos": list(names)}], path="p", media_root="/data/v"
        )

    assert named("/data/v/sub/a.mp4", "b.mp4").records[0]["videos"] == ["sub/a.mp4", "b.mp4"]
    assert "does not lie in --media_root" in named("/elsewhere/a.mp4").dropped[0][2]


def test_training_records_are_kept_where_all_their_videos_have_features(tmp_path):
    (tmp_path / "v_1.safetensors").touch()
    good = {"id": "v_1", "video": "v_1.pkl", "conversations": ASKED}
    records = [
        good,
        {**good, "video": "no.pkl"},
        {"videos": ["v_1", "no"], "conversations": [{**ASKED[0], "value": "<video><video>"}, ASKED[1]]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "kept": 1},
        {**good, "video": "../x"},
        {"conversations": []},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    places = str(tmp_path / "in.jsonl"), str(tmp_path / "out.json"), str(tmp_path)
    with pytest.raises(ValueError, match=r"record 4 .*is refused.*--on_bad drop"):
        convert.convert(ConvertConfig(*places))
    done = convert.convert(ConvertConfig(*places, on_bad="drop"))
    assert len(done.records) == 2 and read_records(tmp_path / "out.json") == [records[0], records[3]]
    assert done.absent == [(1, "no.pkl"), (2, "no")]
    assert [index for index, *_ in done.dropped] == [4, 5]


def test_videoinstruct_beside_others_keeps_the_place_that_its_number_decides():
    instruct, other = {"q": "What?", "a": "That.", "video_id": "v"}, {"query": "a", "response": "b"}
    done = convert_any([other, instruct, instruct], path="p")
    assert [r["conversations"][0]["value"] for r in done.records] == ["a", "<video>\nWhat?", "What?\n<video>"]
