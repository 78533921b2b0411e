"""tokenizer.json with the video tokens and the family's chat template: all families but LLaMA 1 and 2.

The tokenizers library encodes a rendered conversation at once, special tokens included, as transformers'
`apply_chat_template` does. A video is one placeholder there, whose id then becomes as many as the video has rows. But a
special token that a record or a user writes out is text: it neither ends a turn nor begins one.
"""

import bisect
import json
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from fastvid.batch import VideoTokens
from fastvid.data.names import END, PATCH, START, VIDEO
from fastvid.data.templates import ChatTemplate, read_chat_template
from fastvid.files import StrPath, read_json_object, write_json, wrong_content

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_WRITTEN = "\ue002{}\ue003"  # in the place of a special token that is text: characters of no script


class ChatTokenizer:
    """Conversations to ids and back. Made by `load_tokenizer`.

    Args:
        folder: holds tokenizer.json.
        use_start_end: as `load_tokenizer` takes it.

    Attributes:
        template: `ChatTemplate`.
        bos, eos, pad: ids, as the folder's files name them; None where they name none.
        stops: ids that end an answer: that of the template's turn, and eos.
        tokens: ids of the video tokens, and which of them the folder lacked.

    Raises:
        ValueError: the folder's files cannot be read, or lack what training needs.
    """

    def __init__(self, folder: Path, use_start_end: bool | None):
        self.folder = folder
        self._tokenizer, known = _read(folder / "tokenizer.json", use_start_end)
        names = _special_names(folder)
        ids = {name: self._tokenizer.token_to_id(token) for name, token in names.items()}
        self.bos, self.eos, self.pad = (ids.get(name) for name in ("bos_token", "eos_token", "pad_token"))
        before = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        use_start_end = None not in (known[START], known[END]) if use_start_end is None else use_start_end
        used = (PATCH, START, END) if use_start_end else (PATCH,)
        self._add(used)
        video = {token: self._id(token) for token in used}
        self._unused = {token: i for token, i in known.items() if i is not None and token not in used}
        self.tokens = VideoTokens(
            video[PATCH],
            video.get(START),
            video.get(END),
            max(before, *(i + 1 for i in (*video.values(), *self._unused.values()))),
            tuple(i for i in video.values() if i >= before),
        )
        added = self._tokenizer.get_added_tokens_decoder()
        self._names = {i: token.content for i, token in added.items()}
        self.template = self._template(names)
        if self.eos is None:
            raise ValueError(
                f"{folder}/tokenizer_config.json names no eos_token of tokenizer.json; copy the model's folder again"
            )
        self.stops = tuple(dict.fromkeys((self._id(self.template.turn_end), self.eos)))
        controls = {token.content for token in added.values() if token.special} | {self.template.turn_end}
        self._controls = sorted(controls - {PATCH, START, END, VIDEO}, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, self._controls)))
        self._renamed = None  # `_Renamed`, once a text writes out a special token

    def _id(self, token):
        """Of a token that is there."""
        number = self._tokenizer.token_to_id(token)
        assert number is not None, f"{token} is a token of this tokenizer"
        return number

    def _add(self, tokens):
        from tokenizers import AddedToken

        self._tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])

    def _template(self, names):
        source = read_chat_template(self.folder)
        if source is None:
            raise ValueError(
                f"{self.folder} has no chat template (chat_template.jinja, or in tokenizer_config.json), and its "
                "tokenizer is not of LLaMA 2's kind, for which v1 is: give the folder of the model's instruct version"
            )
        try:
            return ChatTemplate(source, names, list(self._names.values()))
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error

    @property
    def video(self) -> str:
        """What stands for a video in a text."""
        return PATCH if self.tokens.start is None else START + PATCH + END

    def as_text(self, text: str) -> str:
        """What a record or a user wrote, in which `encode` takes special tokens for text; templates leave it as it is.

        Args:
            text: without placeholders of videos, but for a record's ``<video>``.
        """
        return self._control.sub(lambda written: _WRITTEN.format(self._controls.index(written[0])), text)

    def encode(
        self, text: str, rows: Sequence[int] = (), spans: Sequence[tuple[int, int]] = ()
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered text, and the tokens [start, end) of each of `spans` of its characters.

        As transformers has it, a token that a span cuts is within it.

        Args:
            text: special tokens and videos (`video`) written out; those of records and users as `as_text` leaves them.
            rows: of each video.
        """
        if re.search(_WRITTEN.format(r"\d+"), text):
            self._renamed = self._renamed or _Renamed(self._tokenizer, self._controls)
            encoded, offsets, spans = self._renamed.encode(text, spans)
        else:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            encoded, offsets = encoding.ids, encoding.offsets
        begins, ends = [begin for begin, _ in offsets], [end for _, end in offsets]
        found = [(bisect.bisect_right(ends, start), bisect.bisect_left(begins, end)) for start, end in spans]
        ids, places, left = [], [], iter(rows)
        for i in encoded:
            places.append(len(ids))
            ids += [i] * next(left, 1) if i == self.tokens.patch and rows else [i]
        places.append(len(ids))
        return ids, [(places[start], places[end]) for start, end in found]

    def name(self, token_id: int) -> str | None:
        """How a special or added token is written; None for a piece of text."""
        return self._names.get(token_id)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, without special and added tokens."""
        return self._tokenizer.decode([i for i in ids if i not in self._names], skip_special_tokens=False)

    def save(self, folder: StrPath) -> None:
        """Write this tokenizer, video tokens included, for `load_tokenizer` and for transformers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (self.folder / name).is_file() and (self.folder / name).resolve() != (folder / name).resolve():
                shutil.copyfile(self.folder / name, folder / name)
        video = {i: token for i, token in self._names.items() if token in (PATCH, START, END)}
        video |= {i: token for token, i in self._unused.items()}
        entries = {i: _entry(token) for i, token in sorted(video.items())}
        table = read_json_object(folder / "tokenizer.json")
        table["added_tokens"] = [each for each in table.get("added_tokens", []) if each["id"] not in entries]
        table["added_tokens"] += [{"id": i, **entry} for i, entry in entries.items()]
        write_json(folder / "tokenizer.json", table)
        config = read_json_object(folder / "tokenizer_config.json")
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] |= {str(i): entry for i, entry in entries.items()}
        write_json(folder / "tokenizer_config.json", config)


class _Renamed:
    """A tokenizer whose special tokens have names that nobody can write, so that their own names are text.

    Args:
        tokenizer: of the tokenizers library.
        controls: names of its special tokens, the longest first.
    """

    def __init__(self, tokenizer, controls):
        from tokenizers import Tokenizer

        secret = secrets.token_hex(16)
        self._controls, self._names = controls, {name: f"\ue004{secret} {i}\ue005" for i, name in enumerate(controls)}
        self._cut = re.compile("|".join([_WRITTEN.format(r"(\d+)"), *map(re.escape, controls)]))
        table = json.loads(tokenizer.to_str())
        for token in table["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        self._tokenizer = Tokenizer.from_str(json.dumps(table))
        # The library gives ids anew to tokens that are not of the vocabulary.
        added = tokenizer.get_added_tokens_decoder()
        self._ids = {
            self._tokenizer.token_to_id(self._names.get(str(token.content), str(token.content))): i
            for i, token in added.items()
        }

    def encode(self, text, spans):
        """(Ids of a text as of `ChatTokenizer.as_text`; [begin, end) of each in another text; `spans` in that text)."""
        parts, at, places = [], 0, [(0, 0)]  # (place in the text, the same in the other one) after each change
        for found in self._cut.finditer(text):
            number = found[1]
            if number is None:
                new = self._names[found[0]]
            else:  # of a number too large the characters are what was written
                new = self._controls[int(number)] if int(number) < len(self._controls) else found[0]
            parts += [text[at : found.start()], new]
            before = places[-1][1] + found.start() - places[-1][0]
            places.append((found.end(), before + len(new)))
            at = found.end()
        encoding = self._tokenizer.encode("".join([*parts, text[at:]]), add_special_tokens=False)

        def moved(place):
            old, new = places[bisect.bisect_right(places, place, key=lambda pair: pair[0]) - 1]
            return new + place - old

        ids = [self._ids.get(i, i) for i in encoding.ids]
        return ids, encoding.offsets, [(moved(start), moved(end)) for start, end in spans]


def _entry(token):
    """An added token as files describe it."""
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": token, **plain, "special": True}


def _read(path, use_start_end):
    """(the library's tokenizer of a tokenizer.json, {video token: its id there, or None}).

    Without start and end tokens, those that the file knows are ordinary text.
    """
    from tokenizers import Tokenizer

    if not path.is_file():
        raise ValueError(
            f"{path.parent} holds no tokenizer.json, which this model's tokens are made with; download it "
            "(`hf download NAME tokenizer.json --local-dir FOLDER`)"
        )
    if fault := wrong_content(path):
        raise ValueError(f"{path} {fault}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        known = {token: tokenizer.token_to_id(token) for token in (PATCH, START, END)}
        if use_start_end is False and {known[START], known[END]} != {None}:
            table = read_json_object(path)
            table["added_tokens"] = [each for each in table["added_tokens"] if each["content"] not in (START, END)]
            tokenizer = Tokenizer.from_str(json.dumps(table))
    except ValueError:
        raise
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise ValueError(f"{path} is no tokenizer file ({error}); copy the model's folder again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = False
    return tokenizer, known


def _special_names(folder):
    """{name: text} of the special tokens that a folder's files name."""
    said = read_json_object(folder / "special_tokens_map.json") | read_json_object(folder / "tokenizer_config.json")
    texts = {name: value["content"] if isinstance(value := said.get(name), dict) else value for name in _NAMES}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
