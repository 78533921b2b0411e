"""Token ids, supervised spans and refusals of records; prompts for inference."""

import json

import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.config.policy import POLICIES
from fastvid.data.conversation import SYSTEM, encode_sample, inference_prompt
from fastvid.data.tokenizer import load_tokenizer

RECORDED = json.loads((GOLDEN / "tokens.json").read_text())
ENTRIES = [(config, name) for config, results in RECORDED["results"].items() for name in results]
REFERENCE, DEFAULT = POLICIES["reference"], POLICIES["none"]


def expanded(runs):
    """Ids of a recording, whose runs are written as [token, count]."""
    return [i for run in runs for i in ([run[0]] * run[1] if isinstance(run, list) else [run])]


def record(*turns, video="clip.pkl", **more):
    """A record whose turns are by human and gpt in turn."""
    conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": "r", **({"video": video} if video else {}), "conversations": conversations, **more}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Small tokenizers of LLaMA's kind, with and without start and end."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("tokenizer")
    text = [SYSTEM["vicuna_v1_1"], "USER: What ASSISTANT: A man rides a red bike.", "cat dog and or"]
    SentencePieceTrainer.train(
        sentence_iterator=iter(text * 5),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=350,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return {use: load_tokenizer(folder, use) for use in (True, False)}


@pytest.fixture(scope="module")
def encode(tokenizers):
    def encode(record, policy=DEFAULT, use_start_end=True, video_tokens=5, max_length=2048):
        return encode_sample(
            record,
            tokenizers[use_start_end],
            rows_of=lambda name: video_tokens,
            use_start_end=use_start_end,
            max_length=max_length,
            policy=policy,
        )

    return encode


def supervised_text(sample, tokenizer):
    """What each span decodes to, with its </s> marked as |."""
    return [
        "|".join(tokenizer.decode(part) for part in _split(sample.token_ids[start:end], tokenizer.eos))
        for start, end in sample.supervised
    ]


def _split(ids, at):
    parts = [[]]
    for i in ids:
        if i == at:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


@pytest.fixture(scope="module")
def llama(tiny):
    """The reference's tokenizer, with and without start and end."""
    return {use: load_tokenizer(tiny / "model336", use) for use in (True, False)}


def encode_recorded(llama, config, name, policy):
    use_start_end, rows = "nose" not in config, RECORDED["meta"]["configs"][config.replace("_textonly", "")]
    video = {} if "textonly" in config else {"video": "clip.pkl"}
    tokenizer = llama[use_start_end]
    return encode_sample(
        {"id": name, **video, "conversations": RECORDED["conversations"][name]},
        tokenizer,
        max_length=2048,
        rows_of=lambda name: rows["video_token_len"],
        use_start_end=use_start_end,
        policy=policy,
    ), tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(("config", "name"), ENTRIES)
def test_parity_gives_the_references_ids_and_spans(llama, config, name):
    sample, _ = encode_recorded(llama, config, name, REFERENCE)
    recorded = RECORDED["results"][config][name]
    if "error" in recorded:
        assert sample.refused and sample.token_ids == []
        return
    assert sample.token_ids == expanded(recorded["ids"])
    assert [list(span) for span in sample.supervised] == recorded["sup"]
    assert sample.warning == recorded["warn"]


@pytest.mark.parametrize(("config", "name"), ENTRIES)
def test_default_gives_the_same_ids_and_supervises_every_answer_as_written(llama, config, name):
    sample, tokenizer = encode_recorded(llama, config, name, DEFAULT)
    recorded = RECORDED["results"][config][name]
    if "error" in recorded:
        assert sample.refused and sample.token_ids == []
        return
    assert sample.token_ids == expanded(recorded["ids"])
    if recorded["sup"]:
        assert [list(span) for span in sample.supervised] == recorded["sup"]
        return
    # Here the reference masks the whole sample.
    turns = RECORDED["conversations"][name]
    answers = [turn["value"] for turn in turns[turns[0]["from"] == "gpt" :][1::2] if turn["value"]]
    if not answers or name == "very_long_question_video_last":
        assert sample.refused and not sample.supervised
        return
    assert sample.warning and not sample.refused
    # <unk> decodes to nothing, and what follows it begins with a space as every text does.
    whole = [answer.replace("</s>", "|").replace("<unk>", " ") + "|" for answer in answers]
    shown = supervised_text(sample, tokenizer)
    assert len(sample.token_ids) == 2048 or shown == whole
    assert all(text.startswith(part) for part, text in zip(shown, whole, strict=True))


@pytest.mark.parametrize("name", RECORDED["inference_prompts"])
def test_inference_prompt_is_the_references(llama, name):
    conv_mode, rows, sound = name.split("|")
    ids = inference_prompt(
        "What is happening in the video?",
        llama[True],
        video_tokens=int(rows),
        use_start_end=True,
        conv_mode=conv_mode,
        transcript="hello there" if sound == "asr" else None,
    )
    assert ids == expanded(RECORDED["inference_prompts"][name]["slow"])


def reference_labels(prompt, ids, tokenizer, video_ids, max_length):
    """SPEC'd masking, written as the reference runs it: over an array of labels."""
    labels = [True] * len(ids)

    def mask(start, end):
        for i in range(start, min(end, len(labels))):
            labels[i] = False

    current = 1
    mask(0, 1)
    for text in prompt.split("</s>"):
        if text == "":
            break
        parts = text.split(" ASSISTANT: ")
        if len(parts) != 2:
            break
        mask(current, current + 1 + len(tokenizer.encode(parts[0] + " ASSISTANT: ", video_ids)) - 2)
        current += 1 + len(tokenizer.encode(text, video_ids))
    mask(current, len(labels))
    total = sum(i != tokenizer.unk for i in ids)
    return [False] * len(ids) if current < max_length and current != total else labels


PIECES = st.sampled_from(
    [
        "cat",
        " ",
        "dog.",
        "\n",
        "</s>",
        "<unk>",
        "<s>",
        " ASSISTANT: ",
        "USER:",
        "ASSISTANT:",
        "<video>",
        "é",
        "🎬",
        "  ",
    ]
)
MESSAGE = st.lists(PIECES, max_size=5).map("".join)


@pytest.mark.slow
@given(st.lists(MESSAGE, min_size=1, max_size=5), st.integers(20, 120), st.booleans())
@settings(max_examples=150, deadline=None)
def test_parity_spans_equal_the_arrays_of_the_reference(encode, tokenizers, messages, max_length, use_start_end):
    tokenizer = tokenizers[use_start_end]
    sample = encode(record(*messages), REFERENCE, use_start_end, max_length=max_length)
    text = f"{SYSTEM['vicuna_v1_1']} "
    for i, message in enumerate(messages):
        text += ("ASSISTANT:" if i % 2 else "USER:") + (f" {message}" + ("</s>" if i % 2 else " ") if message else "")
    expected = reference_labels(text, sample.token_ids, tokenizer, [tokenizer.video_ids(5)], max_length)
    labels = [False] * len(sample.token_ids)
    for start, end in sample.supervised:
        assert start < end
        labels[start:end] = [True] * (end - start)
    assert labels == expected
    assert sample.token_ids == [tokenizer.bos, *tokenizer.encode(text, [tokenizer.video_ids(5)])][:max_length]


@pytest.mark.slow
@given(st.lists(st.tuples(MESSAGE, MESSAGE.filter(bool)), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_default_spans_hold_each_answer_and_its_end_and_nothing_else(encode, tokenizers, turns):
    sample = encode(record(*[text for turn in turns for text in turn]), max_length=10_000)
    tokenizer, video_ids = tokenizers[True], [tokenizers[True].video_ids(5)]
    assert len(sample.supervised) == len(turns)
    for (start, end), (_, answer) in zip(sample.supervised, turns):
        # ":" ends the prompt's last token, and the answer is encoded after it: "▁" begins a token there.
        whole = tokenizer.encode(f"ASSISTANT: {answer}</s>", video_ids)
        assert sample.token_ids[start:end] == whole[len(tokenizer.encode("ASSISTANT:")) :]


def test_an_empty_answer_is_the_role_alone_and_has_no_span(encode, tokenizers):
    sample = encode(record("<video>", "", "dog", "cat"))
    assert supervised_text(sample, tokenizers[True]) == ["cat|"]
    ending = tokenizers[True].encode("ASSISTANT:USER: dog ASSISTANT: cat</s>")
    assert sample.token_ids[-len(ending) :] == ending


@pytest.mark.parametrize("text", ["a</s>b", "a<unk>b", "a ASSISTANT: b"])
def test_what_the_reference_masks_is_supervised_with_one_warning_per_kind(encode, text):
    first, second = encode(record("<video>", text)), encode(record("<video>\nWhat", "x" + text))
    assert first.supervised and first.refused is None
    assert first.warning == second.warning and "as written" in first.warning
    masked = encode(record("<video>", text), REFERENCE)
    assert not masked.supervised and masked.warning.startswith("WARNING: tokenization mismatch")
    assert masked.refused is None  # the reference keeps it in its batch


def test_video_record_expands_and_text_record_does_not(encode, tokenizers):
    tokens = tokenizers[True].tokens
    sample = encode(record("What\n<video>", "cat"))
    start = sample.token_ids.index(tokens.start)
    assert sample.token_ids[start : start + 7] == [tokens.start, *[tokens.patch] * 5, tokens.end]
    assert sample.videos == ["clip.pkl"] and sample.refused is None
    text_only = encode(record("What\n<video>", "cat", video=None))
    assert tokens.patch not in text_only.token_ids and text_only.videos == []
    assert text_only.refused is None and "stays text" in text_only.warning


def test_several_videos_need_a_list_of_them(encode, tokenizers):
    listed = encode(record("<video> or <video>", "cat", video=None, videos=["a", "b"]))
    assert listed.refused is None and listed.videos == ["a", "b"]
    assert listed.token_ids.count(tokenizers[True].tokens.patch) == 10
    alone = encode(record("<video> or <video>", "cat"))
    assert "2 <video> in the text for 1 video" in alone.refused
    assert alone.token_ids == listed.token_ids and alone.supervised == listed.supervised


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("What", "cat"), "0 <video> in the text for 1 video"),
        (record("<video>", ""), "no supervised token"),
        (record("<video>"), "no supervised token"),
        (record("<video>", "see <vid_patch>"), "holds <vid_patch>"),
        (record("<video>", "see <vid_end>"), "holds <vid_end>"),
        (record("What", "see <vid_patch>", video=None), "holds <vid_patch>"),
        (record("<image>", "cat", video=None), "the text holds <image>"),
        ({**record("What", "cat", video=None), "image": "a.jpg"}, "put <image> into the question"),
    ],
)
def test_refused_records_still_show_their_tokens(encode, bad, reason):
    sample = encode(bad)
    assert reason in sample.refused and sample.token_ids


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(), "conversations"),
        ("text", "is text"),
        ({"id": "r"}, "conversations"),
        ({"id": "r", "video": 3, "conversations": record("a", "b")["conversations"]}, "video"),
        ({"id": "r", "conversations": [{"from": "human", "value": "a"}] * 2}, "turn 1 is from human again"),
        ({"id": "r", "conversations": [{"from": "gpt", "value": "a"}] * 2}, "turn 1 is from gpt again"),
        ({"id": "r", "conversations": [{"from": "system", "value": "a"}]}, "no turn from human or gpt"),
        ({"id": "r", "conversations": [{"from": "tool", "value": "a"}]}, 'turn 0 is from "tool"'),
        ({"id": "r", "conversations": [{"from": "human", "value": None}]}, "turn 0"),
    ],
)
def test_records_without_a_conversation_are_refused_without_tokens(encode, bad, reason):
    for policy in (DEFAULT, REFERENCE):
        sample = encode(bad, policy)
        assert reason in sample.refused and sample.token_ids == [] and sample.supervised == []


@pytest.mark.parametrize("use_start_end", [True, False])
def test_truncation_keeps_whole_videos_or_refuses(encode, tokenizers, use_start_end):
    whole = encode(record("<video>", "cat dog cat"), use_start_end=use_start_end)
    last = max(i for i, token in enumerate(whole.token_ids) if token in tokenizers[use_start_end].video_ids(1)) + 1
    for policy in (DEFAULT, REFERENCE):
        cut = encode(record("<video>", "cat dog cat"), policy, use_start_end, max_length=last - 1)
        assert "a video is cut" in cut.refused and cut.token_ids == whole.token_ids[: last - 1]
    unanswered = encode(record("<video>", "cat dog cat"), use_start_end=use_start_end, max_length=last)
    assert "--model_max_length" in unanswered.refused and "cut" not in unanswered.refused
    start = whole.supervised[0][0]
    short = encode(record("<video>", "cat dog cat"), use_start_end=use_start_end, max_length=start + 1)
    assert short.supervised == [(start, start + 1)] and short.refused is None


def test_first_turn_from_gpt_is_left_out(encode):
    late = record("<video>", "cat")
    late["conversations"].insert(0, {"from": "gpt", "value": "hello"})
    sample = encode(late)
    assert sample.token_ids == encode(record("<video>", "cat")).token_ids
    assert "left out" in sample.warning


@pytest.mark.parametrize("use_start_end", [True, False])
def test_videos_of_one_sample_have_rows_of_their_own(tokenizers, use_start_end):
    tokenizer = tokenizers[use_start_end]
    two = record("<video> cat", "dog", "<video> or dog", "red", video=None, videos=["a", "b"])

    def encoded(policy, max_length=2048, **rows):
        return encode_sample(
            two, tokenizer, rows_of=rows.__getitem__, use_start_end=use_start_end, max_length=max_length, policy=policy
        )

    sample = encoded(DEFAULT, a=5, b=2)
    at = [i for i, token in enumerate(sample.token_ids) if token == tokenizer.tokens.patch]
    assert len(at) == 7 and at[4] - at[0] == 4 and at[6] - at[5] == 1 and at[5] - at[4] > 1
    assert supervised_text(sample, tokenizer) == ["dog|", "red|"] and not sample.refused
    assert encoded(REFERENCE, a=5, b=2).supervised == sample.supervised
    end = at[-1] + 1 + use_start_end
    assert "a video is cut" in encoded(DEFAULT, end - 1, a=5, b=2).refused
    assert encoded(DEFAULT, end, a=5, b=2).refused is None

    def gone(name):
        raise OSError(f"{name} is gone")

    refused = encode_sample(two, tokenizer, rows_of=gone, use_start_end=use_start_end, max_length=99, policy=DEFAULT)
    assert refused.refused == "a is gone" and refused.token_ids == [] and refused.videos == ["a", "b"]


def test_a_record_is_not_changed_by_encoding(encode):
    given_record = record("<video>", "cat")
    before = json.dumps(given_record)
    encode(given_record)
    assert json.dumps(given_record) == before


def test_unknown_template_is_an_error(tokenizers):
    with pytest.raises(ValueError, match="--version v0"):
        encode_sample(
            record("a", "b"),
            tokenizers[True],
            rows_of=lambda name: 5,
            use_start_end=True,
            max_length=99,
            policy=DEFAULT,
            version="v0",
        )
    with pytest.raises(ValueError, match="--conv_mode mpt"):
        inference_prompt("a", tokenizers[True], video_tokens=5, use_start_end=True, conv_mode="mpt")


def test_inference_with_a_history_is_the_training_prompt_without_its_last_answer(encode, tokenizers):
    sample = encode(record("What\n<video>", "cat", "dog", "red"))
    ids = inference_prompt(
        "dog", tokenizers[True], video_tokens=5, use_start_end=True, conv_mode="vicuna_v1_1", history=[("What", "cat")]
    )
    assert ids == sample.token_ids[: sample.supervised[-1][0]]


def test_a_question_that_says_video_is_text_in_inference(tokenizers):
    tokenizer = tokenizers[False]
    ids = inference_prompt("a <video> b", tokenizer, video_tokens=5, use_start_end=False, conv_mode="vicuna_v1_1")
    assert ids.count(tokenizer.tokens.patch) == 5
    assert ids == [
        tokenizer.bos,
        *tokenizer.encode(f"{SYSTEM['vicuna_v1_1']} USER: a <video> b"),
        *[tokenizer.tokens.patch] * 5,
        *tokenizer.encode("ASSISTANT:"),
    ]


def test_a_question_with_half_a_character_is_refused(tokenizers):
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        inference_prompt("a \udcff b", tokenizers[True], video_tokens=5, use_start_end=True, conv_mode="vicuna_v1_1")
