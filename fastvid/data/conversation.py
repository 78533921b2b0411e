"""From a record to token ids and the spans of them that are supervised; prompts for inference.

v1 is LLaVA's template vicuna_v1_1: ``{system} USER: {question} ASSISTANT: {answer}</s>USER: …``. Tokenizers that are
not of LLaMA 2's kind have the template of their family (`ChatTemplate`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastvid.config.policy import Policy
from fastvid.data.annotations import asked_and_answered, examine, placeholder_in
from fastvid.data.names import ASSISTANT, EOS, USER, VIDEO
from fastvid.data.styles import half_character, record_videos
from fastvid.data.tokenizer import ChatTokenizer, ModelTokenizer, VideoTokenizer, load_tokenizer

__all__ = ["EncodedSample", "VideoTokenizer", "encode_sample", "inference_prompt", "load_tokenizer"]

_VIDEO_SYSTEM = (
    "You are able to understand the video content that the user provides, and assist the user with a variety of tasks "
    "using natural language.Follow the instructions carefully and explain your answers in detail based on the "
    "provided video."
)  # no space after the full stop: so the models were tuned
SYSTEM = {
    "vicuna_v1_1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.",
    "pg-video-llava": f"You are PG-Video-LLaVA, a large vision-language assistant. {_VIDEO_SYSTEM}",
    "video-chatgpt_v1": f"You are Video-ChatGPT, a large vision-language assistant. {_VIDEO_SYSTEM}",
}
CHAT_TEMPLATE = "chat_template"
TRAINING_TEMPLATES = {"v1": "vicuna_v1_1", "vicuna_v1_1": "vicuna_v1_1", CHAT_TEMPLATE: CHAT_TEMPLATE}


@dataclass(frozen=True)
class EncodedSample:
    """What the model sees of one record.

    Attributes:
        id: the record's.
        token_ids: BOS first where the template has it, each video's placeholders written out; empty where the record
            allows none to be made.
        supervised: [start, end) of the tokens that are to be predicted.
        videos: names of the videos, in the order of their placeholders.
        remarks: what a reader of a report should know; the same text for each sample of the same kind, or the
            reference's own message when labels are found as the reference finds them.
        refused: why training cannot use the sample; None if it can.
    """

    id: str
    token_ids: list[int] = field(default_factory=list)
    supervised: list[tuple[int, int]] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    refused: str | None = None

    @property
    def warning(self) -> str | None:
        """All remarks as one text; None without any."""
        return "; ".join(self.remarks) or None


def encode_sample(
    record: Any,
    tokenizer: ModelTokenizer,
    *,
    rows_of: Callable[[str], int],
    use_start_end: bool,
    max_length: int,
    policy: Policy,
    version: str = "auto",
    question_order: str = "reference",
    number: int = 0,
) -> EncodedSample:
    """Token ids and supervised spans of one training record.

    Args:
        record: as `fastvid.data.annotations` describes it; anything else is refused, not raised.
        tokenizer: as `load_tokenizer` gives it for the same `use_start_end`.
        rows_of: from a video's name to its rows, which may differ from video to video; where it raises ValueError or
            OSError (features that cannot be used) the record is refused.
        max_length: longest sample in tokens, BOS included; what is beyond it is cut off.
        policy: `fastvid.config.Policy`.
        version: as for `settled_version`.
        question_order: "reference" or "video_first" (`ordered`).
        number: of the record in its file, which names one without an id.

    Returns:
        EncodedSample

    Raises:
        ValueError: as `settled_version`.
    """
    version = settled_version(version, tokenizer, policy)
    assert use_start_end == (tokenizer.tokens.start is not None), "the tokenizer was loaded for other placeholders"
    examined = examine(record, number, policy=policy, use_start_end=use_start_end)
    if examined.record is None:
        assert examined.fault is not None
        name = record.get("id", number) if isinstance(record, dict) else ""
        return EncodedSample(str(name), refused=examined.fault.text)
    record, remarks = examined.record, examined.remarks
    name, videos, texts = record["id"], list(record_videos(record)), asked_and_answered(record)
    if videos:
        texts[::2] = [ordered(question, question_order) for question in texts[::2]]
    try:
        rows = [rows_of(name) for name in videos]
        if isinstance(tokenizer, ChatTokenizer):
            ids, spans = _by_chat_template(tokenizer, texts, rows)
        else:
            prompt, ids, spans, video_ids = _by_v1(tokenizer, _system(version), texts, rows)
    except (ValueError, OSError) as error:
        return EncodedSample(name, videos=videos, refused=examined.fault.text if examined.fault else str(error))
    length = len(ids)
    del ids[max_length:]
    if policy.mask_by_retokenizing:
        supervised, warning = _upstream_spans(prompt, ids, tokenizer, video_ids, max_length)
        remarks = [warning] if warning else []
    else:
        supervised = [(start, min(end, len(ids))) for start, end in spans if start < min(end, len(ids))]
    refused = examined.fault and examined.fault.text
    refused = refused or _cut_video(texts, ids, tokenizer.tokens, rows, length)
    if length > max_length and not supervised and not policy.mask_by_retokenizing:
        refused = refused or (
            f"no supervised token: no answer within the first {max_length} of {length} tokens (--model_max_length)"
        )
    if length > max_length and not refused and not policy.mask_by_retokenizing:
        remarks = [*remarks, f"cut to its first {max_length} tokens (--model_max_length)"]
    return EncodedSample(name, ids, supervised, videos, remarks, refused)


def settled_version(version: str, tokenizer: ModelTokenizer, policy: Policy | None = None) -> str:
    """The training template that is meant: "auto" is v1 for tokenizers of LLaMA 2's kind, and the family's otherwise.

    Args:
        version: "auto" or one of `TRAINING_TEMPLATES`.
        tokenizer: as `load_tokenizer` gives it.
        policy: `fastvid.config.Policy`, which may rule a template out.

    Raises:
        ValueError: an unknown template, or one that the tokenizer or the policy does not allow.
    """
    own = "v1" if tokenizer.template is None else CHAT_TEMPLATE
    if version not in ("auto", *TRAINING_TEMPLATES):
        known = (
            [CHAT_TEMPLATE] if own == CHAT_TEMPLATE else [each for each in TRAINING_TEMPLATES if each != CHAT_TEMPLATE]
        )
        raise ValueError(f"--version {version} is no template; known: {', '.join(['auto', *known])}")
    if version != "auto" and (version == CHAT_TEMPLATE) != (own == CHAT_TEMPLATE):
        raise ValueError(
            f"--version {version}: the tokenizer in {tokenizer.folder} is {'' if own == 'v1' else 'not '}of LLaMA 2's "
            f"kind, whose template is v1; give --version {own}, or leave it out"
        )
    if own == CHAT_TEMPLATE and policy is not None and policy.mask_by_retokenizing:
        raise ValueError(
            f"--parity reference: the reference has no model with a tokenizer as in {tokenizer.folder}; leave it out"
        )
    return own if version == "auto" else version


def _by_v1(tokenizer, system, texts, rows):
    """(text, ids, supervised spans, ids of each video) of a conversation in v1."""
    prompt, answers = _prompt(system, texts)
    video_ids = [tokenizer.video_ids(number) for number in rows] or None
    ids, marks = tokenizer.encode_marked(prompt, [at for answer in answers for at in answer], video_ids)
    spans = [(start + 1, end + 1) for start, end in zip(marks[::2], marks[1::2])]
    return prompt, [tokenizer.bos, *ids], spans, video_ids


def _by_chat_template(tokenizer, texts, rows):
    """(ids, supervised spans) of a conversation in the family's template."""
    texts = [tokenizer.as_text(text) for text in texts]
    if rows:
        texts = [text.replace(VIDEO, tokenizer.video) for text in texts]
    text, answers = tokenizer.template.conversation(texts)
    return tokenizer.encode(text, rows, answers)


def ordered(question: str, question_order: str) -> str:
    """A question with the videos that stand at its end put before it, if `question_order` is "video_first"."""
    asked = question.rstrip()
    while question_order == "video_first" and asked.endswith(VIDEO):
        asked = asked.removesuffix(VIDEO).rstrip()
    videos = question[len(asked) :].split()
    if not asked or not videos or VIDEO in asked:  # videos keep their order
        return question
    return "\n".join([*videos, asked])


def system_prefix(tokenizer: ModelTokenizer, version: str = "auto") -> tuple[int, ...]:
    """Ids with which every training sample begins, BOS included: of v1 the system text and " USER:".

    Args:
        tokenizer: as `load_tokenizer` gives it.
        version: as for `settled_version`.

    Returns:
        tuple of ids. A sample cut short, or with a text that a tokenizer joins to the last one, begins otherwise.

    Raises:
        ValueError: as `settled_version`.
    """
    version = settled_version(version, tokenizer)
    if isinstance(tokenizer, ChatTokenizer):
        return tuple(tokenizer.encode(tokenizer.template.prefix)[0])
    return (tokenizer.bos, *tokenizer.encode(f"{_system(version)} {USER}:"))


def _system(version):
    """The system text of v1 under one of its names."""
    return SYSTEM[TRAINING_TEMPLATES[version]]


def inference_prompt(
    question: str,
    tokenizer: ModelTokenizer,
    *,
    video_tokens: int,
    use_start_end: bool,
    conv_mode: str,
    transcript: str | None = None,
    history: Sequence[tuple[str, str]] = (),
    question_order: str = "reference",
    answer: str | None = None,
) -> list[int]:
    """Token ids of a question about one video, up to where the answer begins.

    Args:
        question: text; a literal ``<video>`` in it stays text.
        tokenizer: as `load_tokenizer` gives it for the same `use_start_end`.
        video_tokens: rows of the video (temporal + spatial).
        conv_mode: system text, one of `SYSTEM`; or "chat_template", the family's.
        transcript: of the video's sound, if there is one.
        history: (question, answer) turns before this one.
        question_order: "reference": the video stands after the first question; "video_first": before it.
        answer: an answer that follows, up to the token that ends its turn, in training's tokens.

    Raises:
        ValueError: a `conv_mode` that is unknown or not the tokenizer's, or a text that holds one of the model's own
            placeholders or no character.
    """
    check_conv_mode(conv_mode, tokenizer)
    assert use_start_end == (tokenizer.tokens.start is not None), "the tokenizer was loaded for other placeholders"
    questions = [asked for asked, _ in history] + [question]
    answers = [answer for _, answer in history]
    for text in (*questions, *answers, transcript or "", answer or ""):
        if fault := placeholder_in(text, use_start_end):
            raise ValueError(f"question {question!r}: {fault}")
        if half := half_character(text):
            raise ValueError(f"question {question!r}: the text holds {half}")
    after_video = f'\nThe noisy audio transcript of this video is:\n"{transcript}"' if transcript else ""
    if isinstance(tokenizer, ChatTokenizer):
        questions, answers = ([tokenizer.as_text(text) for text in texts] for texts in (questions, answers))
        first = [questions[0], tokenizer.video]
        after_video = tokenizer.as_text(after_video)
        questions[0] = "\n".join(first[::-1] if question_order == "video_first" else first) + after_video
        texts = [text for turn in zip(questions, answers) for text in turn] + questions[-1:]
        if answer is None:
            return tokenizer.encode(tokenizer.template.question(texts), [video_tokens])[0]
        text, spans = tokenizer.template.conversation([*texts, tokenizer.as_text(answer)])
        return tokenizer.encode(text[: spans[-1][1]], [video_tokens])[0]
    messages = [text for turn in zip(questions[1:], [*answers[1:], ""]) for text in turn]
    after_video += f" {ASSISTANT}:"
    if answers:
        after_video += f" {answers[0]}{EOS}" + _turns(messages)[0]
    if answer is not None:
        after_video += f" {answer}{EOS}"
    before_video = f"{SYSTEM[conv_mode]} {USER}:"
    if question_order == "video_first":
        after_video = questions[0] + after_video
    else:
        before_video += f" {questions[0]}"
    # A video cuts the text in two pieces that are encoded apart, without the white space next to it.
    return [
        tokenizer.bos,
        *tokenizer.encode(before_video.rstrip()),
        *tokenizer.video_ids(video_tokens),
        *tokenizer.encode(after_video.lstrip()),
    ]


def check_conv_mode(conv_mode: str, tokenizer: ModelTokenizer) -> None:
    """Refuse a template that is unknown, or not the tokenizer's (ValueError)."""
    if conv_mode not in (*SYSTEM, CHAT_TEMPLATE):
        known = SYSTEM if tokenizer.template is None else [CHAT_TEMPLATE]
        raise ValueError(f"--conv_mode {conv_mode} is no template; known: {', '.join(known)}")
    if (conv_mode == CHAT_TEMPLATE) != (tokenizer.template is not None):
        raise ValueError(
            f"--conv_mode {conv_mode} is not for the tokenizer in {tokenizer.folder}; leave --conv_mode out"
        )


def _prompt(system, messages):
    """The text of a conversation, and where in it each answer begins and ends (its </s> included)."""
    text, answers = _turns(messages)
    begin = len(system) + 1
    return f"{system} {text}", [(start + begin, end + begin) for start, end in answers]


def _turns(messages):
    """`_prompt` without the system text: questions and answers in turn; an empty one gives its role alone."""
    text, answers = "", []
    for number, message in enumerate(messages):
        is_answer = number % 2 == 1
        text += (ASSISTANT if is_answer else USER) + ":"
        if message:
            begin = len(text)
            text += f" {message}" + (EOS if is_answer else " ")
            if is_answer:
                answers.append((begin, len(text)))
    return text, answers


def _upstream_spans(prompt, ids, tokenizer, video_ids, max_length):
    """The reference's labels: each round's prefix is tokenized again, and its length counted from the last round on.

    Source: `preprocess_v1` in video_chatgpt/train/train.py of PG-Video-LLaVA, whose labels this equals where the
    count goes wrong as well.

    Returns:
        (spans, the message that the reference prints when it masks the whole sample)
    """
    separator = f" {ASSISTANT}: "
    spans, current, seen = [], 1, 0
    for text in prompt.split(EOS):
        parts = text.split(separator)
        if len(parts) != 2:
            break
        # The reference counts BOS in both lengths: in the first it takes off two, in the second it stands for </s>.
        left = video_ids and video_ids[min(seen, len(video_ids) - 1) :]
        start = current + len(tokenizer.encode(parts[0] + separator, left)) - 1
        current += len(tokenizer.encode(text, left)) + 1
        seen += text.count(VIDEO)
        if start < min(current, len(ids)):
            spans.append((start, min(current, len(ids))))
    total = sum(i != tokenizer.unk for i in ids)
    if current < max_length and current != total:
        return [], f"WARNING: tokenization mismatch: {current} vs. {total}. (ignored)"
    return spans, None


def _cut_video(texts, ids, tokens, rows, length):
    """Why the videos of `texts`, which have `rows` each, are not whole in `ids`; None if they are."""
    if not rows:
        return None
    kept = ids.count(tokens.patch if tokens.end is None else tokens.end)
    if kept < (sum(rows) if tokens.end is None else sum(text.count(VIDEO) for text in texts)):
        return (
            f"a video is cut: the sample has {length} tokens, --model_max_length keeps {len(ids)}; raise it, "
            "or shorten the text before the video"
        )
    return None
