"""Chat completions as OpenAI's interface has them: what a request asks, and what is sent back.

What would change an answer and is not served is refused, not passed over. Fields that change none are.
"""

import json
import time
from dataclasses import dataclass
from typing import Any

from fastvid.serving.errors import ApiError

_MOST_STOPS, _LONGEST_STOP = 16, 256
# {field: values of it that ask for nothing}; vLLM's own as well, which its clients send. Its "media_io_kwargs" is
# passed over: lmms-eval names a number of frames in it whatever the model, and videos are read as the weights were
# trained.
_ASIDE = {
    "add_generation_prompt": (None, True),
    "audio": (None,),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}, {"enable_thinking": False}),
    "continue_final_message": (None, False),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None, []),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "ignore_eos": (None, False),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1),
    "logit_bias": (None, {}),
    "logits_processors": (None, []),
    "logprobs": (None, False),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "presence_penalty": (None, 0),
    "prompt_logprobs": (None, 0),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "skip_special_tokens": (None, True),
    "stop_token_ids": (None, []),
    "structured_outputs": (None,),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_k": (None, -1, 0),
    "top_logprobs": (None, 0),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}


@dataclass(frozen=True)
class Media:
    """What a request is about: the address of a video, or those of pictures that stand for its frames.

    Attributes:
        urls: one of a video, or one for each picture, in order.
        pictures: whether they are pictures.
    """

    urls: tuple[str, ...]
    pictures: bool


@dataclass(frozen=True)
class Asked:
    """A request for a chat completion.

    Attributes:
        model: as it names it.
        question: the last message's text.
        history: (question, answer) turns before it.
        media: `Media`.
        stop: texts that end an answer; they are not part of it.
        sampling: what `Chat.request` takes, of what the request names: max_new_tokens, temperature, top_p, seed.
        stream: answer piece by piece; `usage` then: count tokens at the end.
    """

    model: str | None
    question: str
    history: tuple[tuple[str, str], ...]
    media: Media
    stop: tuple[str, ...]
    sampling: dict[str, Any]
    stream: bool
    usage: bool


def read(body: bytes, longest_text: int, name: str) -> Asked:
    """The request that a body holds.

    Args:
        longest_text: most characters of all messages' texts together.
        name: of the model that is served.

    Raises:
        ApiError: 400; 404 of another model, whatever else is wrong.
    """
    value = _json(body)
    model = _of_kind(value, "model", str)
    if model not in (None, name):
        raise no_model(model, name)
    for field, harmless in _ASIDE.items():
        if value.get(field) not in harmless:
            raise _bad(field, "is not served; leave it out")
    if value.get("n") not in (None, 1):
        raise _bad("n", "must be 1: send the request again for another answer")
    options = value.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _bad("stream_options", "must be an object")
    question, history, media = _conversation(value.get("messages"), longest_text)
    return Asked(
        model=model,
        question=question,
        history=history,
        media=media,
        stop=_stops(value.get("stop")),
        sampling=_sampling(value),
        stream=bool(_of_kind(value, "stream", bool)),
        usage=bool(_of_kind(options or {}, "include_usage", bool)),
    )


def no_model(asked: str, name: str) -> ApiError:
    """What somebody is told who asks for another model than the one that is served."""
    told = f"there is no model {asked[:80]!r} here, but {name!r}"
    return ApiError(404, told, param="model", code="model_not_found")


def _json(body):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise ApiError(400, f"the request's body is no JSON: {why}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the request's body must be a JSON object")
    return value


def _sampling(value):
    found = {}
    longest = [name for name in ("max_completion_tokens", "max_tokens") if value.get(name) is not None]
    if longest:
        found["max_new_tokens"] = _number(value, longest[0], int, 1, None)
    for name, low, high in (("temperature", 0, 2), ("top_p", 0, 1)):
        if value.get(name) is not None:
            found[name] = float(_number(value, name, (int, float), low, high))
    if value.get("seed") is not None:
        found["seed"] = _number(value, "seed", int, None, None) % 2**63
    return found


def _number(value, name, kind, low, high):
    number = value[name]
    if not isinstance(number, kind) or isinstance(number, bool):
        raise _bad(name, f"must be a {'whole ' if kind is int else ''}number")
    if (low is not None and number < low) or (high is not None and number > high):
        raise _bad(name, f"must be {low} {'or more' if high is None else f'to {high}'}")
    return number


def _of_kind(value, name, kind):
    found = value.get(name)
    if found is not None and not isinstance(found, kind):
        raise _bad(name, f"must be a {'text' if kind is str else 'truth value'}")
    return found


def _stops(value):
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS:
        raise _bad("stop", f"must be a text, or a list of at most {_MOST_STOPS}")
    if not all(isinstance(stop, str) and 0 < len(stop) <= _LONGEST_STOP for stop in stops):
        raise _bad("stop", f"must hold texts of 1 to {_LONGEST_STOP} characters")
    return tuple(stops)


def _conversation(messages, longest_text):
    """(question, history, media) of the messages, which question and answer in turn."""
    if not isinstance(messages, list) or not messages:
        raise _bad("messages", "must be a list of messages")
    texts, media, length = [], None, 0
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("system", "developer"):
            raise _bad(where, "the system text is that of the model's training; leave this message out")
        if role != ("assistant" if number % 2 else "user"):
            raise _bad(where, f"must be the {'assistant' if number % 2 else 'user'}'s: the two take turns")
        content = message.get("content")
        if content is None and number % 2:
            content = ""  # as some write an answer of nothing
        text, found = _content(content, f"{where}.content", answer=number % 2 == 1)
        length += len(text)
        if length > longest_text:
            raise _bad(where, f"the messages have more than {longest_text:,} characters: shorten them")
        if found is not None and number:
            raise _bad(where, "a video belongs into the first message")
        media = media or found
        texts.append(text)
    if len(texts) % 2 == 0:
        raise _bad("messages", "must end with the user's question")
    if media is None:
        raise _bad("messages", "the first message must hold a video_url, or image_url parts for its frames")
    return texts[-1], tuple(zip(texts[:-1:2], texts[1:-1:2])), media


def _content(content, where, *, answer):
    """(text, `Media` or None) of a message; an answer alone may be empty, for the model may give none."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _bad(where, "must be a text or a list of parts")
    texts, videos, pictures = [], [], []
    for number, part in enumerate(content):
        place = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise _bad(place, "has no text")
            texts.append(part["text"])
        elif kind in ("video_url", "image_url"):
            named = part.get(kind)
            url = named.get("url") if isinstance(named, dict) else named
            if not isinstance(url, str):
                raise _bad(place, f'must be {{"type": "{kind}", "{kind}": {{"url": …}}}}')
            (videos if kind == "video_url" else pictures).append(url)
        else:
            raise _bad(place, "must be of type text, video_url or image_url")
    text = "\n".join(texts)
    if not text.strip() and not answer:
        raise _bad(where, "holds no text")
    if len(videos) > 1 or (videos and pictures):
        raise _bad(where, "one video at a time: the model was trained on one")
    if not videos and not pictures:
        return text, None
    return text, Media(tuple(videos or pictures), not videos)


def _bad(param, message):
    return ApiError(400, f"{param}: {message}", param=param)


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Tokens of a prompt, its video's rows included, and of its answer."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def completion(key: str, model: str, text: str, finish: str, counted: dict[str, int]) -> dict[str, Any]:
    """A whole answer."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": finish,
    }
    return _object(key, model, "chat.completion", [choice]) | {"usage": counted}


def chunk(key: str, model: str, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    """A piece of an answer."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return _object(key, model, "chat.completion.chunk", [choice])


def usage_chunk(key: str, model: str, counted: dict[str, int]) -> dict[str, Any]:
    """What follows the last piece where the request wants `usage`."""
    return _object(key, model, "chat.completion.chunk", []) | {"usage": counted}


def _object(key, model, kind, choices):
    return {"id": key, "object": kind, "created": int(time.time()), "model": model, "choices": choices}


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + (value if isinstance(value, str) else json.dumps(value)).encode() + b"\n\n"
