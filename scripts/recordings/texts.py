"""Conversion, tokens, labels and prompts, by upstream's scripts, data set and inference."""

import contextlib
import copy
import io
import json
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from recordings import upstream

PAIRS = [  # question, answer, id
    ("What is on the table?", "A bowl of plums.", "v_one"),
    ("Where are they?", "On a bridge,\nover a river.", "v_two"),
    ("¿Qué pasa? 発車", "El tren sale 🚂 — “a tiempo”.", "v_ünï"),
    ("Who speaks?", "Nobody.", "v_absent"),
    ("  Spaces around?  ", "  kept  ", "v_three"),
    ('Quotes "and" \\ slashes?', "tab\there", "v_four"),
    ("", "An empty question.", "v_five"),
    ("Cut at its dot?", "", "v_dot.part"),
    ("The part before it?", "Yes.", "v_dot"),
    ("Again the first?", "Again.", "v_one"),
    ("Other case?", "Another video.", "V_ONE"),
    ("A dash?", "First.", "-v_six"),
    ("<video> twice?", "It stays.", "v_seven"),
]
FOLDERS = {
    "fa": [f"{name}.pkl" for name in "v_one v_two v_ünï v_three v_four v_five v_dot.part -v_six".split()] + ["NOTE"],
    "fempty": [],
}
# Short words that are one token each in any tokenizer of this kind, for texts whose length is to be met.
WORD = " a"


def convert(checkout):
    """Outputs of the two scripts, to the byte."""
    records = [dict(zip(("q", "a", "video_id"), pair)) for pair in PAIRS]
    plain, filtered = (
        Path(checkout) / "scripts" / f"{name}.py"
        for name in ("convert_instruction_json_to_training_format", "filter_for_missing_videos")
    )
    outputs = {}
    with tempfile.TemporaryDirectory() as work:
        for folder, names in FOLDERS.items():
            Path(work, folder).mkdir()
            for name in names:
                Path(work, folder, name).touch()
        Path(work, "in.json").write_text(json.dumps(records))
        runs = {"pgvl_convert": (plain, None)}
        runs |= {"pgvl_filter_a": (filtered, "fa"), "pgvl_filter_empty_dir": (filtered, "fempty")}
        for name, (script, folder) in runs.items():
            argv = [sys.executable, str(script), "--input_json_file", "in.json", "--output_json_file", "out.json"]
            argv += ["--clip_feature_path", folder] if folder else []
            done = subprocess.run(argv, cwd=work, capture_output=True, text=True, check=True)
            text = Path(work, "out.json").read_text()
            outputs[name] = {
                "returncode": done.returncode,
                "stdout": done.stdout,
                "raw_text": text,
                "parsed": json.loads(text),
            }
    meta = {"function": "the two scripts, as processes"}
    return {"meta": meta, "input": records, "feature_dirs": FOLDERS, "outputs": outputs}


def conversations():
    """{name: turns}: what decides ids and masks, and what goes wrong upstream."""
    pairs = {
        "question_first": ("What is in the video?\n<video>", "A man rides a bike."),
        "video_first": ("<video>\nWhat is in the video?", "A woman walks her dog."),
        "three_rounds": ("<video>\nWho?", "A girl.", "Where?", "In a café.", "And then?", "She leaves; it rains."),
        "other_scripts": ("这是什么?\n<video>", "一只猫 🐈‍⬛ и собака."),
        "newline_first": ("What?\n<video>", "\nA list:\n1. one\n2. two"),
        "spaces_around": ("  What?  \n<video>", "  two  spaces  "),
        "punctuation_first": ("What?\n<video>", "...yes!"),
        "emoji_first": ("<video>\nMood?", "🎉 party"),
        "role_in_answer": ("What?\n<video>", "He says ASSISTANT: hello"),
        "role_without_space": ("What?\n<video>", "ASSISTANT: hello"),
        "user_in_answer": ("What?\n<video>", "He says USER: hello"),
        "end_in_answer": ("What?\n<video>", "one</s>two"),
        "end_ends_answer": ("What?\n<video>", "one</s>"),
        "begin_in_answer": ("What?\n<video>", "one <s> two"),
        "unknown_in_question": ("What is <unk> here?\n<video>", "a thing"),
        "unknown_in_answer": ("What?\n<video>", "a <unk> thing"),
        "start_token_in_answer": ("What?\n<video>", "a <vid_start> b"),
        "video_in_answer": ("What?\n<video>", "see <video> here"),
        "two_videos": ("<video> or <video>?", "the first"),
        "video_in_the_middle": ("Is <video> long?", "No."),
        "nothing_but_a_video": ("<video>", "A park."),
        "empty_answer": ("What?\n<video>", ""),
        "answer_of_a_space": ("What?\n<video>", " "),
        "empty_later_question": ("What?\n<video>", "One.", "", "Two."),
        "empty_first_answer": ("What?\n<video>", "", "And?", "Two."),
        "question_last": ("What?\n<video>",),
        "marks_and_code": ("<b>bold</b>?\n<video>", "if (a < b) { return &x; } // 100%"),
        "right_to_left": ("שלום\u200f?\n<video>", "مرحبا \u200bبالعالم"),
        "no_break_spaces": ("What?\u00a0<video>\u3000", "\u00a0yes\u3000"),
        "three_hundred_words": ("Count.\n<video>", ("a" + WORD * 299)),
        "answer_is_cut": ("Describe all.\n<video>", "It goes on" + WORD * 2100),
        "very_long_question_video_last": ("Read" + WORD * 2100 + "\n<video>", "Yes."),
        "cut_in_the_first_round": ("What?\n<video>", "It goes on" + WORD * 2100, "And?", "Done."),
        "cut_and_mismatched": ("What?\n<video>", "x ASSISTANT: y" + WORD * 2100),
    }
    turns = {
        name: [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        for name, texts in pairs.items()
    }
    late = turns["question_first"]
    turns["gpt_begins"] = [{"from": "gpt", "value": "Hello."}, *late]
    turns["gpt_alone"] = [{"from": "gpt", "value": "Hello."}]
    turns["human_twice"] = [late[0], late[0], late[1]]
    turns["empty"] = []
    return turns


def tokens(base, record_tokens):
    """tokens.json. `base`: {"336": model's folder without video tokens, …}; `record_tokens`: the rows of each video."""
    configs = {
        f"{variant}_{'se' if use else 'nose'}": {"video_token_len": rows, "mm_use_vid_start_end": use}
        for variant, rows in record_tokens.items()
        for use in (True, False)
    }
    told = conversations()
    longest = {name: _of_length(base["336"], told["question_first"], length) for name, length in LENGTHS.items()}
    told |= longest
    results = {}
    for config in ("336_se", "336_nose", "224_se"):
        variant, settings = config[:3], configs[config]
        results[config] = _encode(_tokenizer(base[variant], settings["mm_use_vid_start_end"]), told, settings)
    texts = {"question_first": told["question_first"]}
    slow = _tokenizer(base["336"], True)
    results["336_se_textonly"] = _encode(slow, texts, configs["336_se"], video=False)
    prompts = {
        f"{mode}|{record_tokens['336']}|{'asr' if transcript else 'noasr'}": _prompt(
            mode, slow, record_tokens["336"], transcript
        )
        for mode in ("pg-video-llava", "video-chatgpt_v1", "vicuna_v1_1")
        for transcript in (None, "hello there")
    }
    meta = {
        "function": "LazySupervisedDataset (textonly: preprocess alone); video_chatgpt_infer; the slow tokenizer",
        "configs": configs,
        "encoding": "ids: an id or [id, count]; sup: [start, end) of labels that are not -100; warn: what is printed",
    }
    probes = {text: slow(text).input_ids for text in PROBES}
    return {
        "meta": meta,
        "conversations": told,
        **{"results": results, "inference_prompts": prompts, "probes_slow": probes},
    }


LENGTHS = {"as_long_as_may_be": 2048, "longer_by_one": 2049}
PROBES = ["", " ", "\n", "a", "a b", "  a", "a<video>b", "<vid_patch><vid_patch>", "a\n<vid_start>"]
PROBES += ["a \n <vid_start> b", "<vid_end>\nWhat", "<vid_end> What", "<vid_end>What", "x</s>y", "x </s> y"]
PROBES += [" <s> a", "<unk>", "12 345", "☀ ☃"]
PROBES += ["USER: hi ASSISTANT:", "USER: hi ASSISTANT: ", "</s>USER: hi", "\u00a0<vid_start>\u3000", "\tx  y\u200b"]


def _of_length(folder, turns, length):
    """A conversation of exactly `length` ids at 676 rows, by words of one token."""
    tokenizer, settings = _tokenizer(folder, True), {"video_token_len": 676, "mm_use_vid_start_end": True}
    tokenizer.model_max_length = 10_000

    def ids(words):
        longer = [turns[0], {"from": "gpt", "value": "a" + WORD * words}]
        return longer, _encode(tokenizer, {"x": longer}, settings)["x"]["n"]

    found, n = ids(length - ids(0)[1])
    assert n == length
    return found


def _tokenizer(folder, use_start_end):
    """As train() makes it."""
    import transformers
    from video_chatgpt.model import VideoChatGPTLlamaForCausalLM

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, model_max_length=2048, padding_side="right", use_fast=False
    )
    model = VideoChatGPTLlamaForCausalLM.from_pretrained(folder)
    model.initialize_vision_tokenizer(use_start_end, tokenizer, "cpu", tune_mm_mlp_adapter=True)
    return tokenizer


def _encode(tokenizer, told, settings, *, video=True):
    """{name: ids, supervised spans and warning} by upstream's own data set."""
    from video_chatgpt import video_conversation
    from video_chatgpt.train import train

    template = video_conversation.conv_templates["vicuna_v1_1"]
    found = {}
    with tempfile.TemporaryDirectory() as work, mock.patch.object(video_conversation, "default_conversation", template):
        Path(work, "clip.pkl").write_bytes(pickle.dumps(np.zeros((1, 1), np.float16)))
        records = [{"id": name, "video": "clip.pkl", "conversations": turns} for name, turns in told.items()]
        Path(work, "train.json").write_text(json.dumps(records))
        cfg = {
            "is_multimodal": True,
            "sep_video_conv_front": False,
            "video_folder": work,
            "video_token_len": settings["video_token_len"],
            "use_vid_start_end": settings["mm_use_vid_start_end"],
        }
        data = train.LazySupervisedDataset(f"{work}/train.json", tokenizer, cfg)
        for i, (name, turns) in enumerate(told.items()):
            said = io.StringIO()
            try:
                with contextlib.redirect_stdout(said):
                    # Upstream's data set fails on records without a video; what it is made of does not.
                    text = train.preprocess([copy.deepcopy(turns)], tokenizer) if not video else None
                    sample = {key: x[0] for key, x in text.items()} if text else data[i]
            except (AssertionError, IndexError, KeyError) as error:
                found[name] = {"error": f"{type(error).__name__}: {error}"}
                continue
            ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
            supervised = [label != train.IGNORE_INDEX for label in labels]
            assert all(not on or label == id for on, label, id in zip(supervised, labels, ids))
            spans = _spans(supervised)
            found[name] = {
                "n": len(ids),
                "ids": runs(ids),
                "sup": spans,
                "n_sup": sum(supervised),
                "warn": said.getvalue().strip() or None,
                "masked_all": not spans,
            }
    return found


def _spans(supervised):
    """[start, end) of each run of true ones."""
    edges = np.flatnonzero(np.diff(np.array([False, *supervised, False]).astype(int)))
    return edges.reshape(-1, 2).tolist()


def runs(ids):
    """[7, 7, 7, 1] → [[7, 3], 1]."""
    found = []
    for i in ids:
        if found and found[-1][0] == i:
            found[-1][1] += 1
        else:
            found.append([i, 1])
    return [x for i, count in found for x in ([[i, count]] if count > 2 else [i] * count)]


def _prompt(mode, tokenizer, rows, transcript):
    """The ids that video_chatgpt_infer gives a model to continue."""
    import torch
    from video_chatgpt.inference import video_chatgpt_infer

    taken = []

    def generate(ids, **options):
        taken.extend(ids[0].tolist())
        return ids

    def tower(images, **options):
        return SimpleNamespace(hidden_states=[torch.zeros(1, 5, 4)] * 3)

    vision_config = SimpleNamespace(use_vid_start_end=True)
    model = SimpleNamespace(get_model=lambda: SimpleNamespace(vision_config=vision_config), generate=generate)
    processor = SimpleNamespace(preprocess=lambda frames, **options: {"pixel_values": torch.zeros(1, 3, 4, 4)})
    question = "What is happening in the video?"
    with upstream.without_gpu():
        video_chatgpt_infer([], question, mode, model, tower, tokenizer, processor, rows, transcript=transcript)
    return {"slow": runs(taken)}


def train_tokenizer(path):
    """A sentencepiece model of LLaMA's kind and 512 pieces, from the conversations that are recorded."""
    from sentencepiece import SentencePieceTrainer

    texts = [turn["value"] for turns in conversations().values() for turn in turns if len(turn["value"]) < 200]
    texts += ["USER: What is happening in the video? ASSISTANT: The assistant answers the user's questions."] * 8
    lines = [line for text in texts * 4 for line in text.replace("<video>", "").split("\n") if line.strip()]
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()
