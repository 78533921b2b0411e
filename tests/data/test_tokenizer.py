"""Text to ids as the reference's tokenizer makes them, for every kind of folder."""

import json
import shutil

import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.data.tokenizer import load_tokenizer

PROBES = json.loads((GOLDEN / "tokens.json").read_text())["probes_slow"]
TEXT = (
    "A man rides a bike in the park. A woman walks, and the dog runs along the beach. What is the person doing in "
    "this video? The person plays cards; then they talk. USER: ASSISTANT: Two people dance in a room. "
) * 20


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with nothing but a small tokenizer.model of LLaMA's kind."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("plain")
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split(". ")),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.995,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A folder with nothing but a small tokenizer.json, in LLaMA's form."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, max_token_length=6
    )
    tokenizer.train_from_iterator(TEXT.split(" "), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("text", PROBES)
def test_ids_are_the_references(tiny, text):
    tokenizer = load_tokenizer(tiny / "model336", True)
    assert [tokenizer.bos, *tokenizer.encode(text)] == PROBES[text]


def test_folder_with_nothing_but_the_sentencepiece_model_gives_the_same_ids(recipe, tiny, tmp_path):
    shutil.copy(tiny / "model336" / "tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path, True)
    assert {text: [tokenizer.bos, *tokenizer.encode(text)] for text in PROBES} == PROBES
    assert tokenizer.tokens.added == tuple(range(recipe.BASE_VOCAB, recipe.BASE_VOCAB + 3))


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["Metaspace", "Prepend"])
def test_folder_with_nothing_but_llamas_tokenizer_json_gives_the_same_ids(tiny, tmp_path, prefix):
    """As transformers 5 writes it (a prefix step that leaves out the dummy prefix before a space) and as 4 did."""
    from transformers import LlamaTokenizer

    LlamaTokenizer.from_pretrained(tiny / "model336").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    table = json.loads(path.read_text())
    # The hub's files rank merges by score: those of white space, which score lowest, come last.
    table["model"]["merges"].sort(key=lambda merge: set("".join(merge)) == {"▁"})
    assert table["pre_tokenizer"]["type"] == "Metaspace" and table["normalizer"] is None
    if prefix == "Prepend":
        table["pre_tokenizer"] = None
        table["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }
    path.write_text(json.dumps(table))
    assert not (tmp_path / "tokenizer.model").exists()
    tokenizer = load_tokenizer(tmp_path, True)
    assert tokenizer.tokens.added == ()
    assert {text: [tokenizer.bos, *tokenizer.encode(text)] for text in PROBES} == PROBES
    exact, text = load_tokenizer(tiny / "model336", True), "A café,  naïve 你好 🎬.\n    x<s>  y </s> z ASSISTANT: w"
    assert tokenizer.encode_marked(text, [5, 29, len(text) - 2]) == exact.encode_marked(text, [5, 29, len(text) - 2])


@pytest.mark.slow
@given(st.text(alphabet="ab .,\n\té你🎬▁", max_size=30))
@settings(max_examples=80, deadline=None)
def test_plain_text_is_what_sentencepiece_makes_of_it(plain, text):
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(plain / "tokenizer.model"))
    assert load_tokenizer(plain, True).encode(text) == processor.encode(text)


@pytest.mark.parametrize("kind", ["plain", "bpe"])
def test_missing_tokens_take_the_ids_after_the_last_one(kind, request):
    folder = request.getfixturevalue(kind)
    both, patch_only = load_tokenizer(folder, True).tokens, load_tokenizer(folder, False).tokens
    size = both.patch
    assert (both.start, both.end, both.vocab_size) == (size + 1, size + 2, size + 3)
    assert both.added == (size, size + 1, size + 2)
    assert (patch_only.patch, patch_only.start, patch_only.end) == (size, None, None)
    assert (patch_only.vocab_size, patch_only.added) == (size + 1, (size,))
    assert load_tokenizer(folder, None).tokens == patch_only


@pytest.mark.parametrize("kind", ["plain", "bpe"])
def test_tokens_that_a_folder_holds_keep_their_ids(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    size = load_tokenizer(folder, False).tokens.patch
    ids = {"<vid_end>": size, "<image>": size + 1, "<vid_patch>": size + 5}
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    tokenizer = load_tokenizer(tmp_path, True)
    assert (tokenizer.tokens.patch, tokenizer.tokens.end) == (size + 5, size)
    assert (tokenizer.tokens.start, tokenizer.tokens.added) == (size + 6, (size + 6,))
    assert tokenizer.tokens.vocab_size == size + 7
    assert tokenizer.encode("<vid_start><vid_patch><vid_end><image>") == [size + 6, size + 5, size, size + 1]


def test_a_folders_own_video_token_gives_way_to_videos_alone(plain, tmp_path):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    video = load_tokenizer(plain, False).tokens.patch
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<video>": video}))
    tokenizer = load_tokenizer(tmp_path, False)
    a, b, patches = tokenizer.encode("a"), tokenizer.encode("b"), tokenizer.video_ids(2)
    assert tokenizer.encode("a<video>b") == [*a, video, *b]
    assert tokenizer.encode("a<video>b", [patches]) == [*a, *patches, *b]


def test_folder_whose_vocabulary_holds_the_tokens(bpe, tmp_path):
    table = json.loads((bpe / "tokenizer.json").read_text())
    table["model"]["vocab"] |= {"<vid_patch>": 700, "<vid_start>": 701, "<vid_end>": 702}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    tokens = load_tokenizer(tmp_path, None).tokens
    assert (tokens.patch, tokens.start, tokens.end, tokens.vocab_size, tokens.added) == (700, 701, 702, 703, ())


@pytest.mark.parametrize("kind", ["plain", "bpe"])
def test_white_space_is_stripped_around_video_tokens_only(kind, request):
    tokenizer = load_tokenizer(request.getfixturevalue(kind), True)
    start, end = tokenizer.tokens.start, tokenizer.tokens.end
    assert tokenizer.encode("a \n<vid_start>\u3000 b") == [*tokenizer.encode("a"), start, *tokenizer.encode("b")]
    assert tokenizer.encode("a </s> b") == [*tokenizer.encode("a "), tokenizer.eos, *tokenizer.encode(" b")]
    assert tokenizer.encode("a\n<video> b", [[start, 7, end]]) == [
        *tokenizer.encode("a"),
        start,
        7,
        end,
        *tokenizer.encode("b"),
    ]


def test_each_video_becomes_its_own_ids_and_those_beyond_the_last_become_its(plain):
    tokenizer = load_tokenizer(plain, True)
    one, two = tokenizer.video_ids(3), tokenizer.video_ids(1)
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.encode("<video>a<video>b<video>", [one, two]) == [*one, *a, *two, *b, *two]
    assert len(one) == 5 and len(two) == 3


@pytest.mark.parametrize("kind", ["plain", "bpe"])
def test_unused_start_and_end_are_text_even_where_the_folder_holds_them(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    load_tokenizer(folder, True).save(tmp_path)
    held, lacking = load_tokenizer(tmp_path, False), load_tokenizer(folder, False)
    assert held.tokens.start is None
    assert held.encode("see <vid_start> here") == lacking.encode("see <vid_start> here")
    held.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again", None).tokens == load_tokenizer(tmp_path, True).tokens


@pytest.mark.parametrize("kind", ["plain", "bpe"])
@given(
    words=st.lists(st.sampled_from(["man", "rides", "a", "é", "🎬", "  ", "park."]), min_size=1, max_size=12),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_marks_count_the_tokens_that_begin_before_them(kind, request, words, data):
    tokenizer = load_tokenizer(request.getfixturevalue(kind), True)
    first = data.draw(st.integers(0, len(words)))
    head, tail = " ".join(words[:first]), " " + " ".join(words[first:]) if words[first:] else ""
    text = head + tail + "</s>" + head + tail
    marks = [len(head), len(head + tail) + 4, len(head + tail) + 4 + len(head)]
    ids, counts = tokenizer.encode_marked(text, marks)
    whole = tokenizer.encode(head + tail)
    assert ids == [*whole, tokenizer.eos, *whole]
    assert counts[1] == len(whole) + 1 and counts[2] - counts[1] == counts[0]
    if head and tail and not head.endswith(" ") and words[first].strip():  # "▁" begins a token there
        assert whole[: counts[0]] == tokenizer.encode(head)


@pytest.mark.parametrize("kind", ["plain", "bpe"])
def test_decoding_leaves_out_tokens_and_never_characters(kind, request):
    tokenizer = load_tokenizer(request.getfixturevalue(kind), True)
    ids = [tokenizer.bos, *tokenizer.encode("plays cards"), tokenizer.tokens.patch, tokenizer.eos]
    assert tokenizer.decode([*ids, tokenizer.tokens.vocab_size, 10**6]) == "plays cards"


@pytest.mark.parametrize("kind", ["plain", "bpe"])
@pytest.mark.parametrize("use_start_end", [True, False])
def test_saved_tokenizer_is_the_same(kind, use_start_end, request, tmp_path):
    tokenizer = load_tokenizer(request.getfixturevalue(kind), use_start_end)
    tokenizer.save(tmp_path)
    saved = load_tokenizer(tmp_path, None)
    text = "USER: What is this?\n<vid_start><vid_patch><vid_end> ASSISTANT: a man</s>"
    assert saved.encode(text) == tokenizer.encode(text)
    assert saved.tokens.added == () and saved.tokens.start == tokenizer.tokens.start
    saved.save(tmp_path)  # over itself
    assert load_tokenizer(tmp_path, None).tokens == saved.tokens


@pytest.mark.slow
def test_transformers_reads_a_saved_tokenizer_alike(tiny, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(tiny / "model336", True)
    tokenizer.save(tmp_path)
    text = "USER: What is this?\n<vid_start><vid_patch><vid_patch><vid_end> ASSISTANT: a man</s>USER: And? ASSISTANT: x"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == [tokenizer.bos, *tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, None, "holds no tokenizer.model or tokenizer.json"),
        ("tokenizer.model", b"no model", "tokenizer.model is no sentencepiece model"),
        ("tokenizer.json", b"{", "tokenizer.json is no tokenizer file"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "tokenizer.model is a git-lfs pointer"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "tokenizer.json is a git-lfs pointer"),
        ("tokenizer_config.json", b"version https://git-lfs.github.com/spec/v1\n", "config.json is a git-lfs pointer"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json is no JSON object"),
    ],
)
def test_unusable_folder_is_an_error_that_names_the_file(plain, tmp_path, name, content, message):
    if name == "tokenizer_config.json":
        shutil.copy(plain / "tokenizer.model", tmp_path)
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path, True)
    assert str(tmp_path) in str(caught.value)


def test_tokenizer_of_another_family_is_refused(bpe, tmp_path):
    text = (bpe / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("</s>", "<|end|>"))
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(tmp_path, True)
