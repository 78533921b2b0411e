"""The memory that a dry run prints, against what the run's batches really take."""

import dataclasses
import json
import random

import pytest
import torch
import training_run
from attention_parts import CPU
from pairs import pairs
from training_run import config_of, write_run

from fastvid import train
from fastvid.config import TrainConfig
from fastvid.data import largest
from fastvid.dist import parallel
from fastvid.features.file import save_features
from fastvid.model.attention import SDPA
from fastvid.model.linear import Linear
from fastvid.training import memory, planning
from fastvid.training.live_bytes import LiveBytes

WORLD = parallel.World(0, 1, 0, torch.device("cpu"), False)
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "ROWS", 250)  # most rows are a video's, as in real data
        return write_run(tmp_path_factory.mktemp("run"), **SIZES)


TRAINED = {"adapter": [], "full": ["--tune_mm_mlp_adapter", "False"]}
DATA = {
    "samples": ["--per_device_train_batch_size", "6"],
    "rows": ["--tokens_per_batch", "1500"],
    "shared": ["--tokens_per_batch", "1500", "--share_video", "--question_order", "video_first"],
    "reference": ["--per_device_train_batch_size", "6", "--parity", "reference"],
    "sdpa": ["--tokens_per_batch", "1500", "--attn_implementation", "sdpa"],
}
DTYPES = {"bf16": "True", "fp32": "False"}
RECOMPUTED = ["none", "1", "2", "selective", "full"]


def measured(state, batches):
    """Bytes of the largest step of `batches`, weights and optimizer included."""
    constant = sum(x.nbytes for layer in state.model._prefix or () for x in layer)
    peaks = []
    for batch in batches:
        state.model(batch).backward()
        with LiveBytes() as live:
            state.model(batch).backward()
        peaks.append(live.peak)
    trained = sum(p.nbytes for p in state.model.parameters() if p.requires_grad)
    copies = sum(
        2 * p.nbytes
        for linear in state.model.decoder.modules()
        if getattr(linear, "_prepacked", None) is not None
        for p in linear.parameters()
    )
    return sum(p.nbytes for p in state.model.parameters()) + constant + copies + 3 * trained + max(peaks)


# The last: recomputation begins late, and decides the peak.
CASES = [*pairs(DATA, RECOMPUTED, TRAINED, DTYPES), ("samples", "selective", "adapter", "bf16")]


@pytest.mark.slow
@pytest.mark.parametrize("data, recompute, trained, dtype", dict.fromkeys(CASES))
def test_a_batch_takes_what_is_estimated(run, monkeypatch, data, trained, dtype, recompute):
    """Never more, and hardly less."""
    found, estimate = [], memory.estimate
    monkeypatch.setattr(memory, "estimate", lambda *a, **k: found.append((a, k)) or estimate(*a, **k))
    state = train.build(
        config_of(
            run,
            "unused",
            "--dataloader_num_workers",
            "0",
            "--bf16",
            DTYPES[dtype],
            "--recompute",
            recompute,
            *DATA[data],
            *TRAINED[trained],
        ),
        WORLD,
    )
    arguments, options = found[-1]
    batch = max(state.loader.read(0)[0] + state.loader.read(1)[0], key=lambda batch: batch.num_rows - batch.frozen_rows)
    expected = estimate(*arguments, **{**options, **planning.rows_of(batch)})
    taken = measured(state, [batch])
    assert taken <= expected.total <= 1.02 * taken


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--tokens_per_batch", "1500"],
        ["--tokens_per_batch", "1500", "--recompute", "full"],
        ["--per_device_train_batch_size", "6"],
        ["--tokens_per_batch", "1500", "--share_video", "--tune_mm_mlp_adapter", "False"],
        ["--tokens_per_batch", "1500", "--share_video", "--question_order", "video_first"],
    ],
    ids=" ".join,
)
def test_the_plan_is_for_the_largest_batch_of_the_run(run, options):
    state = train.build(config_of(run, "unused", "--dataloader_num_workers", "0", "--bf16", "True", *options), WORLD)
    batches = [batch for batches, _ in state.loader.iterate() for batch in batches]
    taken = measured(state, batches)
    assert taken <= state.plan.estimated <= 1.1 * taken


@pytest.mark.slow
@pytest.mark.parametrize("given, chosen", [("0", "none"), ("1", 1), ("3", "full"), ("selective", "selective")])
def test_layers_recomputed_by_hand(run, given, chosen, caplog):
    caplog.set_level("INFO", "fastvid")
    state = train.build(config_of(run, "unused", "--recompute", given), WORLD)
    assert f"recompute {chosen}" in caplog.text
    prepacked = {
        linear._prepacked is not None for linear in state.model.decoder.modules() if isinstance(linear, Linear)
    }
    assert prepacked == {chosen in ("none", "selective")}  # whoever recomputes layers is short of memory


@pytest.mark.parametrize(
    "given, message",
    [
        ("4", "--recompute 4: the model has 3 layers"),
        ("some", "--recompute some: give auto, none, selective, full, or how"),
        ("-1", "--recompute -1: give auto"),
    ],
)
def test_other_recomputation_is_refused(run, given, message):
    with pytest.raises(ValueError, match=message):
        train.build(config_of(run, "unused", f"--recompute={given}"), WORLD)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", ["True", "False"], ids=["bf16", "fp32"])
def test_auto_recomputes_as_few_layers_as_fit(tmp_path, monkeypatch, caplog, bf16):
    """Enough layers that recomputation pays, whatever this CPU needs to recompute one."""
    caplog.set_level("INFO", "fastvid")
    run, found, estimate = write_run(tmp_path / "run", **{**SIZES, "num_hidden_layers": 12}), [], memory.estimate
    monkeypatch.setattr(memory, "estimate", lambda *a, **k: found.append((a, k)) or estimate(*a, **k))
    monkeypatch.setattr(planning, "can_prepack", lambda *_: False)

    def chosen(available):
        monkeypatch.setattr(parallel, "device_memory", lambda _: available)
        return train.build(config_of(run, "unused", "--bf16", bf16), WORLD).plan.recompute

    assert chosen(2**40) == "none"
    arguments, options = found[-1]
    totals = {
        layers or "none": estimate(*arguments, **{**options, "recompute": layers or "none"}).total
        for layers in range(12)
    }
    assert totals[11] < totals["none"]
    for available in (totals["none"] - 1, totals[11]):
        fewest = next(layers for layers, total in totals.items() if total <= available)
        assert chosen(available) == fewest and f"recompute {fewest} layers" in caplog.text
    assert chosen(min(totals.values()) - 1) == "full"


@pytest.mark.parametrize("distributed", [False, True])
def test_a_gpu_is_not_planned_to_be_full(monkeypatch, distributed):
    world = parallel.World(0, 1, 0, torch.device("cuda"), distributed)
    monkeypatch.setattr(parallel, "device_memory", lambda _: 100 * 2**30)
    config = TrainConfig("", [], output_dir="")
    available, said = planning._available(config, world)
    assert available == 92 * 2**30 - distributed * 2**30
    assert "92% of 100.0 GiB free" in said and ("less 1 GiB for NCCL" in said) == distributed
    assert planning._available(config, WORLD) == (100 * 2**30, "")


@pytest.mark.slow
@pytest.mark.parametrize("videos", ["alike", "mixed", "some opened"])
@pytest.mark.parametrize(
    "data",
    [["--per_device_train_batch_size", "1", "--num_train_epochs", "1"], ["--tokens_per_batch", "420"]],
    ids=["text", "lengths"],
)
def test_a_late_large_batch_is_found(tmp_path, monkeypatch, data, videos, caplog):
    """One sample is much longer than all others, and no batch of the first steps holds it. Videos of several lengths
    add less than its text."""
    caplog.set_level("INFO", "fastvid")
    folder = write_run(tmp_path / "run", **SIZES)
    records = json.loads((folder / "train.json").read_text())
    if videos != "alike":
        for i in range(0, len(records), 4):
            save_features(folder / "feats" / f"clip{i}.safetensors", torch.zeros(150, training_run.CHANNELS), {})
    if videos == "some opened":
        monkeypatch.setattr(largest, "_MOST_VIDEOS", len(records) // 2)
    config = config_of(folder, "unused", "--dataloader_num_workers", "0", "--max_steps", "40", *data)
    last = train.build(config, WORLD).order.micro_batches(7)[0][0]
    records[last]["conversations"][1]["value"] = " ".join(["running"] * (60 if videos == "alike" else 110))
    (folder / "train.json").write_text(json.dumps(records))
    found = []
    monkeypatch.setattr(
        memory, "estimate", lambda *a, estimate=memory.estimate, **k: found.append(k) or estimate(*a, **k)
    )
    state = train.build(config, WORLD)
    batches = [batch for step in range(40) for batch in state.loader.read(step)[0]]
    most = max(batch.num_rows - batch.frozen_rows for batch in batches)
    guessed = "--tokens_per_batch" not in data
    assert most <= found[-1]["rows"] <= (1.06 * most if guessed else max(batch.num_rows for batch in batches))
    assert ("tokens, guessed from the length of the texts (5% above those read)" in caplog.text) == guessed
    assert f"the largest micro-batch has {'about ' if guessed else ''}{found[-1]['rows']}" in caplog.text


@pytest.mark.slow
def test_videos_of_several_lengths_are_looked_at(tmp_path):
    """A few long videos decide, whose texts are short: their batch is among those read."""
    folder = write_run(tmp_path / "run", **SIZES)
    records = json.loads((folder / "train.json").read_text())
    rng = random.Random(0)
    for i in range(len(records)):
        save_features(
            folder / "feats" / f"clip{i}.safetensors",
            torch.zeros(150 if i == 7 else 10 + i % 3 * 20, training_run.CHANNELS),
            {},
        )
    records[7]["conversations"][1]["value"] = "red"
    records = [records[i % len(records)] | {"id": str(i)} for i in range(60)]
    rng.shuffle(records)
    (folder / "train.json").write_text(json.dumps(records))
    config = config_of(
        folder,
        "unused",
        "--dataloader_num_workers",
        "0",
        "--per_device_train_batch_size",
        "4",
        "--num_train_epochs",
        "4",
    )
    state = train.build(config, WORLD)
    rows = [max(batch.num_rows for batch in state.loader.read(step)[0]) for step in range(state.order.total_steps)]
    steps, _ = largest.largest_steps(state.loader, 4)
    assert max(rows) == max(rows[step] for step in steps) and len(steps) < len(rows) // 4


@pytest.mark.slow
@pytest.mark.parametrize("trained", TRAINED)
def test_batches_of_many_keys_are_looked_at(tmp_path, trained):
    """All batches have about as many rows. In some all samples share one video, so that its rows are everybody's
    keys.
    """
    folder = write_run(tmp_path / "run", **SIZES)
    asked = [{"from": "human", "value": "<video>\nwhat is it?"}, {"from": "gpt", "value": "a red cat"}]
    for i in range(36):
        save_features(folder / "feats" / f"clip{i}.safetensors", torch.zeros(190, training_run.CHANNELS), {})
    (folder / "train.json").write_text(
        json.dumps(
            [{"id": str(i), "video": f"clip{max(0, i - 11)}.safetensors", "conversations": asked} for i in range(47)]
        )
    )
    config = config_of(
        folder,
        "unused",
        "--dataloader_num_workers",
        "0",
        "--tokens_per_batch",
        "700",
        "--share_video",
        *TRAINED[trained],
    )
    state = train.build(config, WORLD)
    steps, _ = largest.largest_steps(state.loader, 4)
    found = [
        max(planning.rows_of(batch)["key_rows"] for batch in state.loader.read(step)[0])
        for step in range(state.order.total_steps)
    ]
    assert max(found[step] for step in steps) == max(found) > 2 * sorted(found)[len(found) // 2]
    assert len(steps) < len(found)


@pytest.mark.parametrize("settled", [SDPA, dataclasses.replace(CPU, name="library", parts=None), CPU], ids=str)
def test_a_gpu_is_planned_with_the_attention_it_runs(run, monkeypatch, settled):
    """In fp32, where "sdpa" is asked for, and where no library is right, a GPU computes segment after segment. Where a
    library gives log-sum-exps, no branch has copies of keys."""
    found = []
    monkeypatch.setattr(
        memory, "estimate", lambda *a, estimate=memory.estimate, **k: found.append(k) or estimate(*a, **k)
    )
    monkeypatch.setattr(parallel, "device_memory", lambda _: 2**40)
    config = config_of(run, "unused", "--dataloader_num_workers", "0", "--bf16", "True")
    state, asked = train.build(config, WORLD), []
    monkeypatch.setattr(planning, "rows_of", lambda *a, rows_of=planning.rows_of: asked.append(a[1:]) or rows_of(*a))
    world = dataclasses.replace(WORLD, device=torch.device("cuda"))
    planning.plan(config, state.model.precision, state.model.config, state.loader, world, settled)
    assert not found[-1]["on_cpu"] and found[-1]["one_call_per_segment"] is (settled is SDPA)
    assert set(asked) == {(settled.parts is not None,)}


def test_a_dry_run_on_a_cpu_plans_for_a_gpus_attention(run, monkeypatch):
    """Whatever this CPU attends by: a GPU has a library, which gives log-sum-exps."""
    asked, found = [], []
    monkeypatch.setattr(planning, "rows_of", lambda *a, rows_of=planning.rows_of: asked.append(a[1:]) or rows_of(*a))
    monkeypatch.setattr(
        memory, "estimate", lambda *a, estimate=memory.estimate, **k: found.append(k) or estimate(*a, **k)
    )
    shared = "--share_video", "True", "--question_order", "video_first"
    options = "--dataloader_num_workers", "0", *shared, "--dry_run", "True", "--memory", "80GiB"
    assert train.prepare(config_of(run, "unused", *options), WORLD).attention is SDPA
    assert set(asked) == {(True,)} and {each["one_call_per_segment"] for each in found} == {False}


@pytest.mark.slow
def test_the_peak_is_told_after_three_steps(run, tmp_path, capsys):
    for steps in ("2", "4"):
        assert train.train(config_of(run, tmp_path / steps, "--max_steps", steps, "--dataloader_num_workers", "0")) == 0
        lines = capsys.readouterr().err.splitlines()
        told = [number for number, line in enumerate(lines) if line.startswith("memory: estimated ")]
        logged = [number for number, line in enumerate(lines) if line.startswith("step ")]
        assert len(told) == (steps == "4") and all(logged[1] < number < logged[2] for number in told)
