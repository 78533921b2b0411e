"""A family's own chat template: conversations as text, and where in it the answers stand.

Templates are Jinja, which transformers renders in its sandbox. They come with model folders, as chat_template.jinja or
in tokenizer_config.json.
"""

import re
from pathlib import Path
from typing import Any

from fastvid.files import naming, read_json_object

# Llama 3.2 and SmolLM3 write the day; a model that is asked later reads the prompt that it was trained on. Llama 3.1's.
_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro +%}"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "\ue000{}\ue001"  # of an answer: characters of no script


class ChatTemplate:
    """Renders questions and answers in turn, without a system message: most templates have one of their own.

    Args:
        source: Jinja.
        names: the special tokens that templates write by name: bos_token, eos_token, ….
        special: the texts of all special tokens.

    Attributes:
        source: Jinja.
        turn_end: the special token that ends an answer.
        prefix: the text with which all conversations begin.

    Raises:
        ValueError: the template cannot be rendered, or ends no answer with a special token.
    """

    def __init__(self, source: str, names: dict[str, str], special: list[str]):
        self.source = _DAY + source if "strftime_now" in source else source
        self._names = names
        longest_first = sorted(special, key=len, reverse=True)
        self._special = tuple(special)
        self._turn_end = re.compile(r"\s*(" + "|".join(map(re.escape, longest_first)) + ")")
        self._marked = _MARKS.search(source) is not None
        self._lead = 0
        text, [(start, end)] = self.conversation(["a", "b"])
        answer = text[start:end].rstrip()
        turn_end = next((token for token in longest_first if answer.endswith(token)), None)
        if turn_end is None:
            raise ValueError(f"the chat template ends an answer with {text[end:]!r}, which is no special token")
        self.turn_end = turn_end
        asked = self.question(["a"])
        if not self._marked and text.startswith(asked) and text[len(asked) : start].isspace():
            self._lead = start - len(asked)  # a space between a prompt and its answer is the model's to write
        self.prefix = _common(asked, self.question(["b"]))

    def conversation(self, texts: list[str]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and [start, end) of each answer in it, with the token that ends its turn.

        Where the template marks what a model writes ({% generation %}), that is the answer. An empty one is none.

        Args:
            texts: questions and answers in turn.

        Raises:
            ValueError: the template refuses the conversation, or rewrites an answer.
        """
        if self._marked:
            text, [marks] = self._render(texts, return_assistant_tokens_mask=True)
            if len(marks) != len(texts[1::2]):
                raise ValueError(f"the chat template marks {len(marks)} answers of {len(texts[1::2])}")
        else:
            text = self._render(texts)[0]
            marks = self._answers(texts, text)
        spans = zip(marks, texts[1::2])
        return text, [(start - self._lead, self._end(text, end)) for (start, end), answer in spans if answer]

    def question(self, texts: list[str]) -> str:
        """The text of a conversation whose last text is a question, up to where its answer begins."""
        return self._render(texts, add_generation_prompt=True)[0]

    def _end(self, text, end):
        """Where the turn ends whose answer ends at `end`."""
        if self._marked and text[:end].rstrip().endswith(self._special):
            return end  # the mark holds the token
        found = self._turn_end.match(text, end)
        return found.end() if found else end

    def _answers(self, texts, text):
        """[start, end) of the answers in `text`: what stands between them is found with others in their place."""
        stand_ins = [_STAND_IN.format(i) for i in range(len(texts[1::2]))]
        other = self._render([texts[i] if i % 2 == 0 else stand_ins[i // 2] for i in range(len(texts))])[0]
        between, spans = re.split("|".join(map(re.escape, stand_ins)), other) if stand_ins else [other], []
        if len(between) != len(stand_ins) + 1:
            raise ValueError("the chat template has an answer twice, or not at all")
        at = 0
        for k, (before, after, answer) in enumerate(zip(between, between[1:], texts[1::2])):
            start = at + len(before)
            is_last = k + 2 == len(between)
            at = next(
                (
                    start + len(written)
                    for written in _trimmed(answer, text, start)
                    if text.startswith(written + after, start)
                    and (not is_last or start + len(written + after) == len(text))
                ),
                None,
            )
            if at is None or not text.startswith(before, start - len(before)):
                raise ValueError("the chat template rewrites an answer, so that it is not known what to supervise")
            spans.append((start, at))
        return spans

    def _render(self, texts, **options) -> tuple[str, Any]:
        """(text, where the template marks what a model writes)."""
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        try:
            (text,), marks = render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                enable_thinking=False,  # of Qwen3 and SmolLM3: answers to questions about videos
                **self._names,
                **options,
            )
        except Exception as error:  # a template may raise whatever Python's operations do
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the chat template cannot be rendered ({said})") from error
        return text, marks


def read_chat_template(folder: Path) -> str | None:
    """The Jinja of a folder's chat template; None without one."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        with naming(path):
            return path.read_text(encoding="utf-8")
    found = read_json_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {each.get("name"): each.get("template") for each in found}.get("default")
    return found if isinstance(found, str) else None


def _trimmed(answer, text, start):
    """What templates that trim white space, or some of it, at an answer's ends may have made of it; the longest first.

    Args:
        text, start: where the answer stands, with as much white space before it as the template left.
    """
    left = len(answer) - len(answer.lstrip())
    right = max(left, len(answer.rstrip()))
    stands = text[start : start + left]
    blank = len(stands) - len(stands.lstrip())
    for begin in range(left + 1) if left == len(answer) else [left - blank]:
        for end in range(len(answer), right - 1, -1):
            yield answer[begin:end]


def _common(one, other):
    """What two texts have in common at their beginning."""
    return one[: next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))]
