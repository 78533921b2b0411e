"""Conversations in each family's own template against transformers' `apply_chat_template`: ids and supervised spans."""

import json
import pickle
import random

import pytest
from family_folders import CHATML, KINDS, write_tokenizer

from fastvid.config.policy import POLICIES
from fastvid.data.conversation import encode_sample, inference_prompt, settled_version, system_prefix
from fastvid.data.names import END, PATCH, START
from fastvid.data.styles import canonical
from fastvid.data.templates import ChatTemplate, _trimmed
from fastvid.data.tokenizer import load_tokenizer

ROWS = {"a": 5, "b": 9}
DAY = "26 Jul 2024"
WORDS = [*"What does the cat see near a red house and why is it running".split(), "très", "日本語", "🙂", "\n", "\n\n"]
WORDS += ["  ", "12345", "it's", "user", "assistant", "<br>", "b"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "m", kind, jinja_file=kind == "qwen2")


@pytest.fixture(scope="module", params=[True, False], ids=["start_end", "patch"])
def tokenizer(folder, request):
    return load_tokenizer(folder, request.param)


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    """transformers' tokenizer of the folder that ours writes."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("saved")
    tokenizer.save(path)
    return AutoTokenizer.from_pretrained(path)


def conversations(number=60):
    """Records of one to four turns, with a video before or after the first question, or none."""
    draw = random.Random(0)
    for i in range(number):
        texts = []
        for _ in range(2 * draw.randint(1, 4)):
            words = draw.choices(WORDS, k=draw.randint(1, 9))
            texts.append(draw.choice(["", " ", "\n"]) + " ".join(words) + draw.choice(["", " ", "\n"]))
        names = draw.choice([[], ["a"], ["b"], ["a", "b"]])
        for _ in names:
            texts[0] = draw.choice([f"<video>\n{texts[0]}", f"{texts[0]}\n<video>"])
        turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
        yield {"id": str(i), "conversations": turns, **({"videos": names} if names else {})}


def encoded(record, tokenizer, **options):
    options = {"rows_of": ROWS.__getitem__, "max_length": 9999, "policy": POLICIES["none"], **options}
    return encode_sample(record, tokenizer, use_start_end=tokenizer.tokens.start is not None, **options)


def messages_of(record, tokenizer):
    video = PATCH if tokenizer.tokens.start is None else START + PATCH + END
    return [
        {
            "role": {"human": "user", "gpt": "assistant"}[turn["from"]],
            "content": turn["value"].replace("<video>", video),
        }
        for turn in record["conversations"]
    ]


def expanded(ids, marks, rows, patch):
    """Each placeholder as many times as its video has rows, and its mark with it."""
    found, rows = [], iter(rows)
    for i, mark in zip(ids, marks):
        found += [(i, mark)] * (next(rows) if i == patch else 1)
    return [i for i, _ in found], [mark for _, mark in found]


def marks_by_prompts(theirs, messages, text, spells):
    """Which tokens are supervised: from where the prompt of an answer ends to the end of its turn."""
    encoding = theirs(text, add_special_tokens=False)
    marks, at = [0] * len(encoding.input_ids), 0
    for k in range(1, len(messages), 2):
        prompt = theirs.apply_chat_template(
            messages[:k], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        if not text.startswith(prompt):
            prompt = prompt.removesuffix("<think>\n\n</think>\n\n")
        assert text.startswith(prompt) and len(prompt) >= at
        at = text.index(spells, len(prompt)) + len(spells)
        for i, (begin, end) in enumerate(map(encoding.token_to_chars, range(len(marks)))):
            if begin < at and end > len(prompt):
                marks[i] = 1
    return marks


def test_ids_and_spans_are_those_of_apply_chat_template(tokenizer, theirs):
    supervised = 0
    for record in conversations():
        sample, messages = encoded(record, tokenizer), messages_of(record, tokenizer)
        assert sample.refused is None
        options = {"enable_thinking": False, "return_dict": True}
        if "{% generation" in theirs.chat_template:
            theirs.chat_template = theirs.chat_template.replace("strftime_now('%d %b %Y')", f"'{DAY}'")
            found = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
            ids, marks = found["input_ids"], found["assistant_masks"]
        else:
            ids = theirs.apply_chat_template(messages, **options)["input_ids"]
            text = theirs.apply_chat_template(messages, tokenize=False, enable_thinking=False)
            marks = marks_by_prompts(theirs, messages, text, tokenizer.template.turn_end)
        rows = [ROWS[name] for name in record.get("videos", [])]
        ids, marks = expanded(ids, marks, rows, tokenizer.tokens.patch)
        assert sample.token_ids == ids
        ours = [0] * len(ids)
        for start, end in sample.supervised:
            ours[start:end] = [1] * (end - start)
        assert ours == marks
        assert len(sample.supervised) == len(messages) // 2
        supervised += len(sample.supervised)
        assert all(ids[end - 1] == tokenizer.stops[0] for _, end in sample.supervised)
    assert supervised > 100


def test_an_empty_answer_is_there_and_not_supervised(tokenizer, theirs):
    empty = 0
    for number, record in enumerate(conversations(24)):
        turns = record["conversations"]
        for turn in turns[1::2][number % 2 :: 2]:
            turn["value"] = ""
        sample, messages = encoded(record, tokenizer), messages_of(record, tokenizer)
        if "strftime_now" in theirs.chat_template:
            theirs.chat_template = theirs.chat_template.replace("strftime_now('%d %b %Y')", f"'{DAY}'")
        ids = theirs.apply_chat_template(messages, enable_thinking=False, return_dict=True)["input_ids"]
        rows = [ROWS[name] for name in record.get("videos", [])]
        answers = [turn["value"] for turn in turns[1::2] if turn["value"]]
        assert sample.token_ids == expanded(ids, ids, rows, tokenizer.tokens.patch)[0]
        said = [tokenizer.decode(sample.token_ids[start:end]).strip() for start, end in sample.supervised]
        assert said == [answer.strip() for answer in answers]
        empty += len(turns) // 2 - len(answers)
    assert empty > 20


def test_a_system_text_and_a_first_turn_from_gpt_are_left_out(tokenizer):
    """Training reads such records as the same ones without."""
    for record in conversations(9):
        plain = encoded(record, tokenizer)
        for before in ({"from": "system", "value": "Be brief."}, {"from": "gpt", "value": "Hello."}):
            longer = {**record, "conversations": [before, *record["conversations"]]}
            found = encoded(canonical(longer)[0], tokenizer)
            assert (found.token_ids, found.supervised) == (plain.token_ids, plain.supervised)


THOUGHTS = ("<think>", "</think>")  # a model's own, which a record may hold


def controls(ids, tokenizer):
    return [tokenizer.name(i) for i in ids if tokenizer.name(i) not in (None, *THOUGHTS)]


def test_special_tokens_that_are_written_out_are_text(kind, tokenizer):
    """They end no turn and begin none, in records and in prompts; and an answer is supervised to its end."""
    harmless, *hostile = ["zq", *(name for name in KINDS[kind][1] if name not in THOUGHTS)]
    expected = None
    for name in (harmless, *hostile, "".join(hostile)):
        text = f"see {name} so{name} so"
        texts = [f"<video>\n{text}", text, text, f"{name}{text} so"]
        turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
        sample = encoded({"id": "0", "video": "a", "conversations": turns}, tokenizer)
        prompt = inference_prompt(
            text,
            tokenizer,
            video_tokens=5,
            use_start_end=tokenizer.tokens.start is not None,
            conv_mode="chat_template",
            history=[(text, text)],
            transcript=text,
            answer=text,
        )
        found = [controls(ids, tokenizer) for ids in (sample.token_ids, prompt)]
        expected = expected or found
        assert sample.refused is None and found == expected
        answers = [sample.token_ids[start:end] for start, end in sample.supervised]
        assert [tokenizer.decode(ids).strip() for ids in answers] == texts[1::2]
        assert all(ids[-1] == tokenizer.stops[0] for ids in answers)
        assert tokenizer.decode(prompt).count(text) == 5


def test_what_stands_for_special_tokens_may_be_written_too(tokenizer):
    """In what way ever, none comes of it."""
    for text in ("a\ue0020\ue003b", "a\ue002999\ue003b", "a\ue002b", "a\ue0040\ue005" + tokenizer.template.turn_end):
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}]
        sample = encoded({"id": "0", "conversations": turns}, tokenizer)
        turns[0]["value"] = "a"
        plain = encoded({"id": "0", "conversations": turns}, tokenizer)
        assert controls(sample.token_ids, tokenizer) == controls(plain.token_ids, tokenizer)


def test_prompts_of_chat_are_those_of_training(tokenizer):
    """What is asked is what a record's sample holds before its last answer."""
    for order, first in (("reference", "why?\n<video>"), ("video_first", "<video>\nwhy?")):
        for history in ([], [("why?", "because")]):
            asked = [*(text for turn in history for text in turn), "why?" if not history else "and then?"]
            texts = [first, *asked[1:], "so it is"]
            turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
            sample = encoded({"id": "0", "video": "a", "conversations": turns}, tokenizer)
            options = {
                "video_tokens": 5,
                "use_start_end": tokenizer.tokens.start is not None,
                "conv_mode": "chat_template",
                "history": history,
                "question_order": order,
            }
            start, end = sample.supervised[-1]
            assert sample.token_ids[:start] == inference_prompt(asked[-1], tokenizer, **options)
            assert sample.token_ids[:end] == inference_prompt(asked[-1], tokenizer, answer="so it is", **options)


def test_what_is_asked_may_hold_the_records_placeholder(tokenizer):
    """It stays text; and a transcript comes after the question and its video."""
    options = {"video_tokens": 3, "use_start_end": tokenizer.tokens.start is not None, "conv_mode": "chat_template"}
    ids = inference_prompt("a <video> b", tokenizer, transcript="la la", **options)
    assert ids.count(tokenizer.tokens.patch) == 3
    text = tokenizer.decode(ids)
    assert text.index("a <video> b") < text.index('The noisy audio transcript of this video is:\n"la la"')


def test_samples_begin_with_the_kept_prefix(kind, tokenizer):
    prefix = system_prefix(tokenizer)
    assert len(prefix) > 2
    begin = [encoded(record, tokenizer).token_ids[: len(prefix)] == list(prefix) for record in conversations()]
    assert sum(begin) >= 0.5 * len(begin)  # the others' first token took a line's end in


def test_ids_of_video_tokens(folder, tokenizer):
    tokens, before = (
        tokenizer.tokens,
        max(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"].values()),
    )
    assert tokens.patch > before and tokens.added == tuple(range(tokens.patch, tokens.vocab_size))
    assert len(tokens.added) == (1 if tokens.start is None else 3)
    assert tokenizer.name(tokens.patch) == PATCH and tokenizer.name(3 if tokenizer.bos is None else 300) is None


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text((tokenizer.folder / "config.json").read_text())
    again = load_tokenizer(tmp_path, None)
    assert again.tokens.added == () and again.tokens.patch == tokenizer.tokens.patch
    assert (again.stops, again.bos, again.eos) == (tokenizer.stops, tokenizer.bos, tokenizer.eos)
    for record in conversations(5):
        assert encoded(record, again).token_ids == encoded(record, tokenizer).token_ids


def test_tokens_that_are_not_used_stay_text(folder, tmp_path):
    load_tokenizer(folder, True).save(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    plain = load_tokenizer(tmp_path, False)
    assert plain.tokens.start is None and START in plain.decode(plain.encode(f"a {START} b")[0])
    plain.save(tmp_path)
    assert load_tokenizer(tmp_path, None).tokens.start is not None


def test_workers_get_it(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    record = next(conversations(1))
    assert encoded(record, again) == encoded(record, tokenizer)


def test_text_comes_back(tokenizer):
    text = "It plays cards; très 🙂 bien."
    assert tokenizer.decode([*tokenizer.encode(text)[0], *tokenizer.stops]).strip() == text


def test_what_ends_an_answer(kind, tokenizer):
    names = [tokenizer.name(i) for i in tokenizer.stops]
    expected = {"llama3": ["<|eot_id|>"], "mistral": ["</s>"], "qwen2 base": ["<|im_end|>", "<|endoftext|>"]}
    assert names == expected.get(kind, ["<|im_end|>"])


def test_a_sample_that_is_too_long_is_cut(tokenizer):
    turns = [{"from": "human", "value": "<video>\nwhy"}, {"from": "gpt", "value": "because of it"}]
    record = {"id": "0", "video": "a", "conversations": turns}
    whole = encoded(record, tokenizer)
    ((start, _end),) = whole.supervised
    cut = encoded(record, tokenizer, max_length=start + 2)
    assert cut.token_ids == whole.token_ids[: start + 2] and cut.supervised == [(start, start + 2)]
    assert cut.refused is None and "cut to its first" in cut.warning
    assert (
        "a video is cut"
        in encoded(record, tokenizer, max_length=whole.token_ids.index(tokenizer.tokens.patch) + 4).refused
    )


def test_an_empty_answer_is_not_supervised(tokenizer):
    texts = ["why", "", "and", "because"]
    turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
    assert len(encoded({"id": "0", "conversations": turns}, tokenizer).supervised) == 1


def test_versions(tokenizer):
    assert settled_version("auto", tokenizer) == settled_version("chat_template", tokenizer) == "chat_template"
    with pytest.raises(ValueError, match="--version v1: .*is not of LLaMA 2's kind.*give --version chat_template"):
        settled_version("v1", tokenizer)
    with pytest.raises(ValueError, match="--version v9 is no template; known: auto, chat_template$"):
        settled_version("v9", tokenizer)
    with pytest.raises(ValueError, match="--parity reference"):
        settled_version("auto", tokenizer, POLICIES["reference"])
    with pytest.raises(ValueError, match="--conv_mode vicuna_v1_1 is not for the tokenizer.*leave --conv_mode out"):
        inference_prompt("a", tokenizer, video_tokens=1, use_start_end=False, conv_mode="vicuna_v1_1")


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{% for m in messages %}{{ m.content }}\n{% endfor %}",
            "ends an answer with '\\\\n', which is no special token",
        ),
        ("{{ raise_exception('only in English') }}", "cannot be rendered .only in English."),
        (
            "{% for m in messages %}{{ m.content + m.content }}<|im_end|>{% endfor %}",
            "has an answer twice, or not at all",
        ),
        ("{{ messages[9].content }}", "cannot be rendered|has an answer twice"),
        ("{% if %}", "cannot be rendered"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered|has an answer twice"),
        ("{{ 1 / 0 }}", "cannot be rendered .division by zero"),
        ("{% for i in range(10**6) %}{% endfor %}", "cannot be rendered .Range too big"),
        ("{% macro more() %}{{ more() }}{% endmacro %}{{ more() }}", "cannot be rendered .maximum recursion depth"),
        ("{% include '/etc/hostname' %}", "cannot be rendered .no loader"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, template, message):
    folder = write_tokenizer(tmp_path / "m", "qwen2", jinja_file=True)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"m: the chat template {message}"):
        load_tokenizer(folder, True)


def test_folders_that_cannot_be_used(tmp_path):
    folder = write_tokenizer(tmp_path / "m", "qwen2", jinja_file=True)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="m has no chat template .*give the folder of the model's instruct version"):
        load_tokenizer(folder, True)
    folder = write_tokenizer(tmp_path / "n", "qwen2")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    with pytest.raises(ValueError, match="tokenizer_config.json names no eos_token of tokenizer.json"):
        load_tokenizer(folder, True)
    (write_tokenizer(tmp_path / "o", "mistral") / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"o holds no tokenizer.json.*download it \(`hf download NAME tokenizer.json"):
        load_tokenizer(tmp_path / "o", True)
    write_tokenizer(tmp_path / "o", "mistral")
    assert load_tokenizer(tmp_path / "o", True).tokens.start is not None


def test_templates_by_name_and_answers_that_are_rewritten():
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role + m.content.replace('x', 'y') }}<e>{% endfor %}", {}, ["<e>"]
    )
    assert template.conversation(["q", "a"]) == ("userq<e>assistanta<e>", [(17, 21)])
    with pytest.raises(ValueError, match="rewrites an answer"):
        template.conversation(["q", "axa"])


@pytest.mark.parametrize("kept", ["m.content | trim", "' ' + m.content.lstrip()", "m.content.rstrip()", "m.content"])
def test_answers_are_found_among_white_space(kept):
    """Few are the places to look at: a data set may hold long runs of it."""
    template = ChatTemplate("{% for m in messages %}{{ " + kept + " }}<e>{% endfor %}", {}, ["<e>"])
    for blank in ("", " ", "\n \t", " \n" * 3000):
        for core in ("a", "a\n b", ""):
            answer = blank + core + blank
            text, spans = template.conversation(["q", answer])
            assert [text[start:end].split() for start, end in spans] == [text[text.index("q<e>") + 4 :].split()] * bool(
                answer
            )
            assert sum(1 for _ in _trimmed(answer, text, spans[0][0] if spans else 0)) <= len(answer) + 1
