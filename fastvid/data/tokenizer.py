"""LLaMA 2's tokenizer with the video tokens: text to ids exactly as the reference's tokenizer makes them.

The reference's tokenizer (transformers 4.28, slow) cuts the text at special tokens, strips white space around *added*
ones, and encodes each piece of text on its own, with its own dummy prefix. That cutting is done here; each piece is
encoded by sentencepiece itself, or by the folder's tokenizer.json where there is no tokenizer.model. transformers'
own LlamaTokenizer is not used: up to 5.23 it ranks merges by id instead of by score, so that text with two spaces in
a row gets other ids, and it drops the dummy prefix of a piece that starts with a space.
"""

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastvid.batch import VideoTokens
from fastvid.data.chat_tokenizer import ChatTokenizer
from fastvid.data.names import BOS, END, EOS, PATCH, START, UNK, VIDEO
from fastvid.files import StrPath, model_folder, read_json_object, write_json, wrong_content

# What config.json calls a model whose tokenizer may be of LLaMA 2's kind: the words of `fastvid.weights.families`.
LLAMA_TYPES = ("llama", "llava", "llava_llama", "videochatgpt", "video_chatgpt")
_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class _SentencePiece:
    """tokenizer.model through sentencepiece, as the reference reads it."""

    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor

        if fault := wrong_content(path):
            raise ValueError(f"{path} {fault}")
        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} is no sentencepiece model ({error}); copy the model's folder again") from error
        pieces = range(self._processor.get_piece_size())
        self._ids = {self._processor.id_to_piece(i): i for i in pieces}
        self._bytes = {self._processor.id_to_piece(i) for i in pieces if self._processor.is_byte(i)}
        names = map(self._processor.id_to_piece, pieces)
        self._lengths = [1 if piece in self._bytes else len(piece.encode()) for piece in names]
        self._unk = self._processor.unk_id()
        self.size = len(pieces)

    def token_id(self, token):
        return self._ids.get(token)

    def encode(self, text):
        return self._processor.encode(text)

    def encode_cut(self, text, cut):
        ids = self._processor.encode(text)
        # Pieces spell the normalized text; a byte piece such as <0xF0> stands for one byte of it.
        left = len(self._processor.normalize(text[:cut]).encode())
        if self._unk in ids:  # any text may have become that
            pieces = self._processor.encode(text, out_type=str)
            lengths = (1 if piece in self._bytes else len(piece.encode()) for piece in pieces)
        else:
            lengths = (self._lengths[i] for i in ids)
        count = 0
        for length in lengths:
            if left <= 0:
                break
            left -= length
            count += 1
        return ids, count

    def decode(self, ids):
        return self._processor.decode(ids)


class _TokenizerJson:
    """tokenizer.json through the tokenizers library."""

    def __init__(self, path):
        from tokenizers import Tokenizer, normalizers

        if fault := wrong_content(path):
            raise ValueError(f"{path} {fault}")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise ValueError(f"{path} is no tokenizer file ({error}); copy the model's folder again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # special tokens are cut out before the text gets here
        prefix = self._tokenizer.pre_tokenizer
        if type(prefix).__name__ == "Metaspace" and not prefix.split and prefix.prepend_scheme != "never":
            # transformers 5 writes LLaMA's dummy prefix this way; but Metaspace adds none before a space, as
            # sentencepiece does.
            steps = [normalizers.Prepend(prefix.replacement), normalizers.Replace(" ", prefix.replacement)]
            self._tokenizer.normalizer = normalizers.Sequence(
                ([self._tokenizer.normalizer] if self._tokenizer.normalizer else []) + steps
            )
            self._tokenizer.pre_tokenizer = None
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def token_id(self, token):
        return self._tokenizer.token_to_id(token)

    def encode(self, text):
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_cut(self, text, cut):
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, sum(begin < cut for begin, _ in encoding.offsets)

    def decode(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class VideoTokenizer:
    """Text to ids and back. Made by `load_tokenizer`.

    Attributes:
        template: None: its template is v1.
        bos, eos: ids of <s> and </s>.
        stops: ids that end an answer.
        unk, pad: id of <unk>, which is also the reference's padding; None in a tokenizer without it.
        tokens: ids of the video tokens, and which of them the folder lacked.
    """

    template = None

    def __init__(
        self,
        folder: StrPath,
        backend: _SentencePiece | _TokenizerJson,
        added: dict[str, int],
        tokens: VideoTokens,
        flags: dict[str, tuple[bool, bool]],
        unused: dict[str, int] | None = None,
    ):
        """`added`, `unused`: ids of added tokens; `flags`: (lstrip, rstrip) of those whose files say so."""
        self.folder = Path(folder)
        self.tokens = tokens
        self._unused = unused or {}
        self._backend = backend
        bos, eos = backend.token_id(BOS), backend.token_id(EOS)
        assert bos is not None and eos is not None, "load_tokenizer refuses a folder without them"
        self.bos, self.eos, self.unk = bos, eos, backend.token_id(UNK)
        self.pad, self.stops = self.unk, (eos,)
        names = {BOS: self.bos, EOS: self.eos, UNK: self.unk}
        self._special = {token: [i] for token, i in {**added, **names}.items() if i is not None}
        self._text_size = backend.size
        self._names = {ids[0]: token for token, ids in self._special.items()}
        strips = {token: flags.get(token, (True, True)) for token in added if token not in names}
        strips |= dict.fromkeys((PATCH, START, END, VIDEO), (True, True))
        self._before = {token for token, (left, _) in strips.items() if left}
        self._after = {token for token, (_, right) in strips.items() if right}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._cut_at_videos = re.compile("(" + "|".join(map(re.escape, [VIDEO, *longest_first])) + ")")

    def video_ids(self, rows: int) -> list[int]:
        """The ids that stand for one video of `rows` projected rows, start and end included where they are used."""
        patches = [self.tokens.patch] * rows
        start, end = self.tokens.start, self.tokens.end
        return patches if start is None or end is None else [start, *patches, end]

    def encode(self, text: str, video_ids: Sequence[list[int]] | None = None) -> list[int]:
        """Ids of `text`, without BOS; `video_ids` as `encode_marked` takes them."""
        return self.encode_marked(text, (), video_ids)[0]

    def encode_marked(
        self, text: str, marks: Sequence[int], video_ids: Sequence[list[int]] | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids of `text`, and for each of `marks` how many of them begin before that character.

        Args:
            text: with special tokens written out.
            marks: positions in `text`, ascending, at most one in each stretch between two special tokens.
            video_ids: what each ``<video>`` becomes, in turn; those after the last become what it does. None leaves
                them as text.
        """
        parts = (self._cut if video_ids is None else self._cut_at_videos).split(text)
        ids, counts, at, videos = [], [], 0, 0
        for index, part in enumerate(parts):
            begin, at = at, at + len(part)
            if index % 2 == 0:
                if index and parts[index - 1] in self._after:
                    stripped = part.lstrip()
                    begin += len(part) - len(stripped)
                    part = stripped
                if index + 1 < len(parts) and parts[index + 1] in self._before:
                    part = part.rstrip()
            while len(counts) < len(marks) and marks[len(counts)] <= begin:
                counts.append(len(ids))
            if index % 2:
                if part == VIDEO and video_ids is not None:
                    ids += video_ids[min(videos, len(video_ids) - 1)]
                    videos += 1
                else:
                    ids += self._special[part]
            elif part and len(counts) < len(marks) and marks[len(counts)] < begin + len(part):
                piece_ids, count = self._backend.encode_cut(part, marks[len(counts)] - begin)
                counts.append(len(ids) + count)
                ids += piece_ids
            elif part:
                ids += self._backend.encode(part)
        return ids, counts + [len(ids)] * (len(marks) - len(counts))

    def name(self, token_id: int) -> str | None:
        """How a special or added token is written; None for a piece of text."""
        return self._names.get(token_id)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Special and added tokens are left out, as tokens: their characters in the text stay."""
        return self._backend.decode([i for i in ids if i not in self._names and 0 <= i < self._text_size])

    def save(self, folder: StrPath) -> None:
        """Write this tokenizer, video tokens included, for `load_tokenizer` and for transformers.

        The source's files are copied; those that list added tokens are written anew.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (self.folder / name).is_file() and (self.folder / name).resolve() != (folder / name).resolve():
                shutil.copyfile(self.folder / name, folder / name)
        added = {token: ids[0] for token, ids in self._special.items() if token not in (BOS, EOS, UNK)} | self._unused
        plain = {BOS: self.bos, EOS: self.eos} | ({} if self.unk is None else {UNK: self.unk})
        entries = {
            str(i): {
                "content": token,
                "lstrip": token in self._before,
                "rstrip": token in self._after,
                "normalized": False,
                "single_word": False,
                "special": True,
            }
            for token, i in sorted({**plain, **added}.items(), key=lambda item: item[1])
        }
        config = read_json_object(folder / "tokenizer_config.json")
        config.setdefault(
            "tokenizer_class", "LlamaTokenizer" if (folder / "tokenizer.model").is_file() else "PreTrainedTokenizerFast"
        )
        config |= {
            "added_tokens_decoder": entries,
            "legacy": True,
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BOS,
            "eos_token": EOS,
        }
        if self.unk is not None:
            config |= {"unk_token": UNK, "pad_token": UNK}
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "added_tokens.json", added)
        if (folder / "tokenizer.json").is_file():
            table = read_json_object(folder / "tokenizer.json")
            table["added_tokens"] = [{"id": int(i), **entry} for i, entry in entries.items()]
            write_json(folder / "tokenizer.json", table)


ModelTokenizer = VideoTokenizer | ChatTokenizer


def load_tokenizer(folder: StrPath, use_start_end: bool | None) -> ModelTokenizer:
    """The tokenizer in a model folder, with the video tokens added where it lacks them.

    New tokens take the ids after the last one, in the order <vid_patch>, <vid_start>, <vid_end>.

    One with <s> and </s> is of LLaMA 2's kind, if config.json says that its model is a LLaMA.

    Args:
        folder: holds tokenizer.model or tokenizer.json; of LLaMA 2's kind the former is used where both are.
        use_start_end: have <vid_start> and <vid_end>. Without them those are ordinary text, even where the folder's
            tokenizer knows them. None: as the folder's tokenizer does.

    Returns:
        `VideoTokenizer` of LLaMA 2's kind, `ChatTokenizer` otherwise.

    Raises:
        ValueError: no folder, no tokenizer in it, or one that has neither <s> and </s>, which v1 writes, nor a chat
            template.
    """
    folder = model_folder(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: download the model (hf download) and give its folder")
    if not _of_llama(folder):
        return ChatTokenizer(folder, use_start_end)
    if (folder / "tokenizer.model").is_file():
        backend = _SentencePiece(folder / "tokenizer.model")
    elif (folder / "tokenizer.json").is_file():
        backend = _TokenizerJson(folder / "tokenizer.json")
    else:
        raise ValueError(
            f"{folder} holds no tokenizer.model or tokenizer.json; --model_name_or_path takes a folder "
            "on this machine (`hf download NAME --local-dir FOLDER` makes one)"
        )
    if None in (backend.token_id(BOS), backend.token_id(EOS)):
        return ChatTokenizer(folder, use_start_end)
    added, flags = _added_tokens(folder)
    known = {token: backend.token_id(token) if token not in added else added[token] for token in (PATCH, START, END)}
    if use_start_end is None:
        use_start_end = None not in (known[START], known[END])
    size = max(backend.size, *(i + 1 for i in added.values()), 0)
    new = []
    names = (PATCH, START, END) if use_start_end else (PATCH,)
    for token in names:
        if known[token] is None:
            known[token] = size
            new.append(size)
            size += 1
    used = {token: i for token, i in known.items() if i is not None and token in names}
    others = {token: i for token, i in added.items() if token not in known}
    tokens = VideoTokens(used[PATCH], used.get(START), used.get(END), size, tuple(new))
    unused = {token: i for token, i in known.items() if i is not None and token not in used}
    return VideoTokenizer(folder, backend, {**others, **used}, tokens, flags, unused)


def _of_llama(folder):
    values = read_json_object(folder / "config.json")
    sections = [each for each in (values, values.get("text_config")) if isinstance(each, dict)]
    return all(str(section.get("model_type", "llama")).lower() in LLAMA_TYPES for section in sections)


def _added_tokens(folder):
    """Ids of the tokens that a folder's files add to its vocabulary, and (lstrip, rstrip) where they say so."""
    ids = {token: int(i) for token, i in read_json_object(folder / "added_tokens.json").items()}
    entries = [
        {"id": int(i), **entry}
        for i, entry in read_json_object(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items()
    ]
    entries += read_json_object(folder / "tokenizer.json").get("added_tokens", [])
    flags = {}
    for entry in entries:
        ids.setdefault(entry["content"], entry["id"])
        flags.setdefault(entry["content"], (entry.get("lstrip", False), entry.get("rstrip", False)))
    return ids, flags
