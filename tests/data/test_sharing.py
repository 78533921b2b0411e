"""Samples that share a video: who they are, how they stay together, and that sharing changes no gradient."""

import json
import random
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import assert_same_gradients, loss_and_gradients
from training_run import SAMPLES, config_of, three_a_video, write_run

from fastvid import train
from fastvid.config.policy import POLICIES
from fastvid.data import sharing
from fastvid.data.conversation import encode_sample, inference_prompt, ordered, system_prefix
from fastvid.data.packing import pack
from fastvid.data.sharing import Groups
from fastvid.dist import parallel

WORLD = parallel.World(0, 1, 0, torch.device("cpu"), False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three questions for each of four videos, each third after its video's rows; two records without one."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    records = three_a_video(folder, "safetensors")
    for i in range(2):
        records.append(
            {
                "id": f"text{i}",
                "conversations": [
                    {"from": "human", "value": "why is the house red"},
                    {"from": "gpt", "value": f"see the cat {i}"},
                ],
            }
        )
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def build(run, *more):
    return train.build(config_of(run, "unused", "--dataloader_num_workers", "0", *more), WORLD)


# --- the gradient


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--tune_mm_mlp_adapter", "False"]], ids=["adapter", "full"])
@pytest.mark.parametrize("order", ["reference", "video_first"])
def test_the_gradient_of_a_group_is_that_of_its_samples_apart(run, mode, order):
    state = build(run, "--share_video", "--question_order", order, *mode)
    loader = state.loader
    samples = [loader.samples.read(index) for index in range(len(loader.samples))]
    tokens, channels = state.tokenizer.tokens, loader.samples.channels
    shared = pack(samples, tokens, channels, **loader.packing)
    apart = [pack([one], tokens, channels) for one in samples]
    saved = sum(batch.num_rows for batch in apart) - shared.num_rows
    videos = 4 * (2 if order == "video_first" else 1) * (8 + 2)
    system = len(system_prefix(state.tokenizer)) * (SAMPLES + 2 - bool(mode))
    assert saved == videos + system and shared.sample_rows == sum(batch.num_rows for batch in apart)
    loss, gradients = loss_and_gradients(state.model, shared)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    expected_loss, expected = loss_and_gradients(state.model, *apart)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients, expected, 1e-5)


@pytest.mark.slow
def test_training_with_and_without_sharing_takes_the_same_steps(run, tmp_path):
    """The samples of a step depend on whether videos stay together; what is computed of them does not."""
    state, other = build(run, "--share_video"), build(run, "--share_video")
    other.loader.packing["share"] = False
    for step in range(3):
        shared, apart = (each.loader.read(step)[0] for each in (state, other))
        assert [b.sample_ids for b in shared] == [b.sample_ids for b in apart]
        results = train.train_step(state, shared), train.train_step(other, apart)
        assert results[0].loss.item() == pytest.approx(results[1].loss.item(), rel=1e-5)


# --- who shares


def record(*turns, video="v.pkl", **more):
    conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": "r", **({"video": video} if video else {}), "conversations": conversations, **more}


def test_groups_are_samples_whose_prompts_are_one_up_to_the_video():
    records = [
        record("<video>\nwhat", "a"),
        record("<video>\nwhy", "b"),
        record("what\n<video>", "a"),
        record("why\n<video>", "b"),
        record("why\n<video>", "c"),
        record("<video>\nwhat", "a", video="w.pkl"),
        record("hello", "a", video=None),
        record("hello", "a", video=None),
        record("hi", "a", "<video>\nwhat", "b"),
        record("<video>\nwhat", "<video>", "why", "a"),
        {
            **record("<video>\nwhat", "a"),
            "conversations": [{"from": "gpt", "value": "x"}, *record("<video>\nwhat", "a")["conversations"]],
        },
        record("<video> and <video>\nwhat", "a", video=None, videos=["a", "b"]),
        record("<video> and <video>\nwhy", "a", video=None, videos=["a", "b"]),
    ]
    assert Groups.of_records(records, "reference").of.tolist() == [0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 0, 8, 8]
    assert Groups.of_records(records, "video_first").of.tolist()[:6] == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("processes", [0, 2])
def test_groups_are_numbered_as_their_samples_come_whoever_looks_at_them(monkeypatch, processes):
    monkeypatch.setattr(sharing, "_CHUNK", 7)
    draw = random.Random(0)
    asked = [f"{draw.randrange(9)}\n<video>" if draw.random() < 0.8 else "\ud800" for _ in range(60)]
    records = [record(question, "a", video=f"{draw.randrange(3)}.mp4") for question in asked]
    numbers, expected = {}, []
    for index, each in enumerate(records):
        key = (each["video"], asked[index]) if "<video>" in asked[index] else index
        expected.append(numbers.setdefault(key, len(numbers)))
    assert Groups.of_records(records, "reference", processes).of.tolist() == expected


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.data())
def test_together_and_spread_lose_nothing(of, data):
    groups = Groups(np.array(of))
    indices = np.array(data.draw(st.permutations(range(len(of)))))
    together = groups.together(indices)
    assert sorted(together) == sorted(indices)
    runs = groups.runs(together)
    assert [i for run in runs for i in run] == together.tolist() and len(runs) == len(set(of))
    firsts = [of[run[0]] for run in runs]
    assert firsts == list(dict.fromkeys(of[i] for i in indices)), "groups come in the order of their first"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(of)), max_size=4)))
    sizes = np.diff([0, *cuts, len(of)]).tolist()
    batches = groups.spread(together, sizes)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(chain.from_iterable(batches)) == sorted(indices)


def test_spread_cuts_a_group_only_where_no_batch_has_room():
    groups = Groups(np.array([0] * 5 + [1] * 3 + [2] * 4 + [3] * 4))
    batches = groups.spread(np.arange(16), [8, 8])
    assert sorted(sorted(set(groups.of[batch])) for batch in batches) == [[0, 1], [2, 3]]
    cut = groups.spread(np.arange(16), [6, 6, 4])
    assert sum(len(set(groups.of[batch])) for batch in cut) == 5, "one group lies in two batches"


# --- the order of question and video


@pytest.mark.parametrize(
    "question, expected",
    [
        ("what is it\n<video>", "<video>\nwhat is it"),
        ("<video>\nwhat", "<video>\nwhat"),
        ("what <video> ", "<video>\nwhat"),
        ("two\n<video>\n<video>", "<video>\n<video>\ntwo"),
        ("see <video> here", "see <video> here"),
        ("<video>", "<video>"),
        ("<video> or\n<video>", "<video> or\n<video>"),
        ("plain", "plain"),
        ("", ""),
    ],
)
def test_videos_at_a_questions_end_come_first(question, expected):
    assert ordered(question, "video_first") == expected
    assert ordered(question, "reference") == question


def test_question_order_reaches_the_tokens(run):
    state = build(run)
    options = {"rows_of": lambda name: 4, "use_start_end": True, "max_length": 512, "policy": state.config.policy}
    last, first = (
        record(text, "<video>" if text.endswith("<video>") else "cat")
        for text in ("what is red\n<video>", "<video>\nwhat is red")
    )
    last["conversations"][1]["value"] = "cat"
    encoded = [
        encode_sample(r, state.tokenizer, question_order=order, **options)
        for r, order in ((last, "reference"), (last, "video_first"), (first, "reference"), (first, "video_first"))
    ]
    assert encoded[0].token_ids != encoded[1].token_ids
    assert encoded[1] == encoded[2] == encoded[3] and encoded[1].refused is None


@pytest.mark.parametrize("order", ["reference", "video_first"])
def test_a_question_is_asked_in_the_order_that_was_trained(run, order):
    tokenizer = build(run).tokenizer
    trained = encode_sample(
        record("what is red\n<video>", "cat", "why", "red"),
        tokenizer,
        question_order=order,
        rows_of=lambda name: 4,
        use_start_end=True,
        max_length=512,
        policy=POLICIES["none"],
    )
    asked = inference_prompt(
        "why",
        tokenizer,
        video_tokens=4,
        use_start_end=True,
        conv_mode="vicuna_v1_1",
        history=[("what is red", "cat")],
        question_order=order,
    )
    assert asked == trained.token_ids[: len(asked)] and len(asked) <= trained.supervised[1][0]


def test_every_sample_begins_with_the_system_prefix(run):
    state = build(run)
    prefix = system_prefix(state.tokenizer)
    assert prefix[0] == state.tokenizer.bos and state.loader.prefix == prefix
    assert all(tuple(state.loader.samples.encode(i).token_ids[: len(prefix)]) == prefix for i in range(SAMPLES + 2))
    assert build(run, "--tune_mm_mlp_adapter", "False").loader.prefix == (), "a trained model's would change"
    with pytest.raises(ValueError, match="--version v9 is no template"):
        system_prefix(state.tokenizer, "v9")
