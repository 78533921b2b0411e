"""From a record to token ids and the spans of them that are supervised; prompts for inference.

The template is LLaVA's vicuna_v1_1: ``{system} USER: {question} ASSISTANT: {answer}</s>USER: …``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastvid.data.annotations import asked_and_answered, examine, placeholder_in
from fastvid.data.names import ASSISTANT, EOS, USER, VIDEO
from fastvid.data.styles import half_character, record_videos
from fastvid.data.tokenizer import VideoTokenizer, load_tokenizer
from fastvid.policy import Policy

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
TRAINING_TEMPLATES = {"v1": "vicuna_v1_1", "vicuna_v1_1": "vicuna_v1_1"}


@dataclass(frozen=True)
class EncodedSample:
    """What the model sees of one record.

    Attributes:
        id: the record's.
        token_ids: BOS first, each video's placeholders written out; empty where the record allows none to be made.
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
    tokenizer: VideoTokenizer,
    *,
    rows_of: Callable[[str], int],
    use_start_end: bool,
    max_length: int,
    policy: Policy,
    version: str = "v1",
    question_order: str = "reference",
    number: int = 0,
) -> EncodedSample:
    """Token ids and supervised spans of one training record.

    Args:
        record: as `fastvid.data.annotations` describes it; anything else is refused, not raised.
        tokenizer: `VideoTokenizer`, loaded with the same `use_start_end`.
        rows_of: from a video's name to its rows, which may differ from video to video; where it raises ValueError or
            OSError (features that cannot be used) the record is refused.
        max_length: longest sample in tokens, BOS included; what is beyond it is cut off.
        policy: `fastvid.config.Policy`.
        version: training template.
        question_order: "reference" or "video_first" (`ordered`).
        number: of the record in its file, which names one without an id.

    Returns:
        EncodedSample

    Raises:
        ValueError: an unknown `version`.
    """
    system = _system(version)
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
    prompt, answers = _prompt(system, texts)
    try:
        rows = [rows_of(name) for name in videos]
    except (ValueError, OSError) as error:
        return EncodedSample(name, videos=videos, refused=examined.fault.text if examined.fault else str(error))
    video_ids = [tokenizer.video_ids(number) for number in rows] or None
    ids, marks = tokenizer.encode_marked(prompt, [at for answer in answers for at in answer], video_ids)
    ids.insert(0, tokenizer.bos)
    length = len(ids)
    del ids[max_length:]
    if policy.mask_by_retokenizing:
        supervised, warning = _reference_spans(prompt, ids, tokenizer, video_ids, max_length)
        remarks = [warning] if warning else []
    else:
        spans = [(start + 1, end + 1) for start, end in zip(marks[::2], marks[1::2])]
        supervised = [(start, min(end, len(ids))) for start, end in spans if start < min(end, len(ids))]
    refused = examined.fault and examined.fault.text
    refused = refused or _cut_video(prompt, ids, tokenizer.tokens, rows, length)
    if length > max_length and not supervised and not policy.mask_by_retokenizing:
        refused = refused or (
            f"no supervised token: no answer within the first {max_length} of {length} tokens (--model_max_length)"
        )
    if length > max_length and not refused and not policy.mask_by_retokenizing:
        remarks = [*remarks, f"cut to its first {max_length} tokens (--model_max_length)"]
    return EncodedSample(name, ids, supervised, videos, remarks, refused)


def ordered(question: str, question_order: str) -> str:
    """A question with the videos that stand at its end put before it, if `question_order` is "video_first"."""
    asked = question.rstrip()
    while question_order == "video_first" and asked.endswith(VIDEO):
        asked = asked.removesuffix(VIDEO).rstrip()
    videos = question[len(asked) :].split()
    if not asked or not videos or VIDEO in asked:  # videos keep their order
        return question
    return "\n".join([*videos, asked])


def system_prefix(tokenizer: VideoTokenizer, version: str = "v1") -> tuple[int, ...]:
    """Ids with which every training sample begins, BOS included: the system text and " USER:".

    Args:
        tokenizer: `VideoTokenizer`.
        version: training template.

    Returns:
        tuple of ids. A sample cut short, or with a text that a tokenizer joins to the colon, begins otherwise.

    Raises:
        ValueError: an unknown `version`.
    """
    return (tokenizer.bos, *tokenizer.encode(f"{_system(version)} {USER}:"))


def _system(version):
    """The system text of a training template."""
    if version not in TRAINING_TEMPLATES:
        raise ValueError(f"--version {version} is no template; known: {', '.join(TRAINING_TEMPLATES)}")
    return SYSTEM[TRAINING_TEMPLATES[version]]


def inference_prompt(
    question: str,
    tokenizer: VideoTokenizer,
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
        tokenizer: `VideoTokenizer`, loaded with the same `use_start_end`.
        video_tokens: rows of the video (temporal + spatial).
        conv_mode: system text, one of `SYSTEM`.
        transcript: of the video's sound, if there is one.
        history: (question, answer) turns before this one.
        question_order: "reference": the video stands after the first question; "video_first": before it.
        answer: an answer that follows, up to its </s>, in the tokens in which training would have it.

    Raises:
        ValueError: an unknown `conv_mode`, or a text that holds one of the model's own placeholders or no character.
    """
    if conv_mode not in SYSTEM:
        raise ValueError(f"--conv_mode {conv_mode} is no template; known: {', '.join(SYSTEM)}")
    assert use_start_end == (tokenizer.tokens.start is not None), "the tokenizer was loaded for other placeholders"
    questions = [asked for asked, _ in history] + [question]
    answers = [answer for _, answer in history]
    for text in (*questions, *answers, transcript or "", answer or ""):
        if fault := placeholder_in(text, use_start_end):
            raise ValueError(f"question {question!r}: {fault}")
        if half := half_character(text):
            raise ValueError(f"question {question!r}: the text holds {half}")
    after_video = f'\nThe noisy audio transcript of this video is:\n"{transcript}"' if transcript else ""
    messages = [text for turn in zip(questions[1:], answers[1:] + [""]) for text in turn]
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


def _reference_spans(prompt, ids, tokenizer, video_ids, max_length):
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


def _cut_video(prompt, ids, tokens, rows, length):
    """Why the videos, which have `rows` each, are not whole in `ids`; None if they are."""
    if not rows:
        return None
    kept = ids.count(tokens.patch if tokens.end is None else tokens.end)
    if kept < (sum(rows) if tokens.end is None else prompt.count(VIDEO)):
        return (
            f"a video is cut: the sample has {length} tokens, --model_max_length keeps {len(ids)}; raise it, "
            "or shorten the text before the video"
        )
    return None
