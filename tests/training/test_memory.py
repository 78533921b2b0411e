"""The memory estimate against what a step really holds, and the choice of recomputation."""

import dataclasses
import importlib
import json
import pkgutil
import sys

import fastvid_kernels
import pytest
import torch
from conftest import ROOT
from fastvid_kernels.cpu import attention as attention_of_cpu
from fastvid_kernels.cpu import rows as rows_of_cpu
from fastvid_kernels.linear_cross_entropy import linear_cross_entropy
from model_cases import (
    ADAPTER,
    END,
    FULL,
    LORA,
    PATCH,
    SEVEN_BILLION,
    START,
    model_config,
    pack,
    random_model,
    random_sample,
)
from pairs import each_pair

from fastvid.batch import VideoTokens
from fastvid.config.policy import Trainable
from fastvid.data import packing
from fastvid.data.conversation import EncodedSample
from fastvid.model.attention import SDPA, Attention, choose_attention
from fastvid.model.branches import Parts
from fastvid.model.lora import draw_dropout
from fastvid.training import layer_memory
from fastvid.training.live_bytes import LiveBytes
from fastvid.training.memory import _CUBLAS_WORKSPACES, choose_recompute, estimate, parameter_counts
from fastvid.training.planning import rows_of

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
}
CONFIG = model_config(mm_hidden_size=24, **SIZES)
MODES = ["none", "selective", 1, 2, "full"]
TRAINED = {"adapter": ADAPTER, "full": FULL, "head": Trainable(head=True), "lora": LORA}


def batch(video=150, samples=2):
    generator = torch.Generator().manual_seed(0)
    samples = [random_sample(generator, text=(9, 30), video=video, answer=20) for _ in range(samples)]
    rows = pack(samples, channels=24, generator=generator).parted()
    return dataclasses.replace(rows, features=rows.features.half())  # as files hold them


def chosen(dtype):
    """The attention of this CPU."""
    return choose_attention("auto", torch.device("cpu"), dtype, SIZES["head_dim"])


def options(rows, **changes):
    settings = {"trainable": ADAPTER, "compute_dtype": torch.float32, "fp32_residual": False, **changes}
    return {
        **settings,
        **rows_of(rows),
        "on_cpu": True,
        "one_call_per_segment": chosen(settings["compute_dtype"]) is SDPA,
    }


@pytest.mark.slow
@each_pair(
    trained=TRAINED,
    recompute=MODES,
    dtypes=[(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
def test_saved_bytes_are_what_forward_leaves_alive(trained, recompute, dtypes):
    rows, trainable, (dtype, fp32_residual) = batch(), TRAINED[trained], dtypes
    more = {"fp32_residual": fp32_residual, "attention": chosen(dtype)}
    model = random_model(CONFIG, trainable, dtype, recompute=recompute, **more)
    with LiveBytes() as live:
        loss = model(rows)
        alive = live.now - loss.nbytes
    expected = estimate(
        CONFIG,
        recompute=recompute,
        **options(rows, trainable=trainable, compute_dtype=dtype, fp32_residual=fp32_residual),
    )
    assert alive <= expected.activations <= 1.02 * alive


def check_total(config, rows, **settings):
    """Of a further micro-batch, which finds gradients."""
    dtype = settings["compute_dtype"]
    model = random_model(config, settings["trainable"], dtype, recompute=settings["recompute"], attention=chosen(dtype))
    draw_dropout(model, (0,))
    model(rows).backward()
    with LiveBytes() as live:
        model(rows).backward()
    expected = estimate(config, **options(rows, **settings))
    stored = sum(p.nbytes for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    taken = stored + live.peak + 3 * 4 * trained
    assert taken <= expected.total <= 1.02 * taken


@pytest.mark.slow
@each_pair(recompute=MODES, trained=["adapter", "full", "lora"], dtype=[torch.float32, torch.bfloat16])
def test_total_is_near_the_peak_of_a_step(recompute, trained, dtype):
    check_total(CONFIG, batch(), recompute=recompute, compute_dtype=dtype, trainable=TRAINED[trained])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [ADAPTER, FULL], ids=["adapter", "full"])
def test_total_where_tables_and_logits_are_large(tied, dtype, trainable):
    config = model_config(
        mm_hidden_size=24, **{**SIZES, "num_layers": 1, "vocab_size": 20000, "tie_word_embeddings": tied}
    )
    check_total(config, batch(30), recompute="none", compute_dtype=dtype, trainable=trainable)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [ADAPTER, FULL, LORA], ids=["adapter", "full", "lora"])
def test_total_of_other_families(dtype, trainable):
    config = model_config(
        mm_hidden_size=24, **{**SIZES, "num_layers": 5}, qkv_bias=True, qk_norm=True, unrotated_layers=(1,)
    )
    check_total(config, batch(), recompute="none", compute_dtype=dtype, trainable=trainable)


@pytest.fixture
def kernels_of_nothing(monkeypatch):
    """Tensors are made as on a GPU, whose kernels are launched; here they write nothing."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in pkgutil.iter_modules(fastvid_kernels.__path__, "fastvid_kernels."):
        module = importlib.import_module(module.name)
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", lambda *arguments, **options: None)


def videos_of_questions(questions, *, frozen, share):
    """Two videos of 120 rows behind a system prompt, so many questions about each."""
    generator, samples, prefix = torch.Generator().manual_seed(0), [], [5, 6, 7, 8]
    for name in "ab":
        features_RC = torch.randn(120, 24, generator=generator)
        for i in range(questions):
            words = torch.randint(3, PATCH, (6 + i % 3,), generator=generator).tolist()
            ids = [*prefix, START, *[PATCH] * 120, END, *words]
            samples.append((EncodedSample(name, ids, [(len(ids) - 4, len(ids))], [name]), [features_RC]))
    tokens = VideoTokens(patch=PATCH, start=START, end=END, vocab_size=100)
    return packing.pack(samples, tokens, 24, prefix=prefix, frozen=frozen, share=share), prefix


@pytest.mark.slow
@each_pair(
    kind=["own rows", "prefix", "shared", "prefix, shared", "full, own rows", "full, shared"],
    recompute=["none", "full", 1],
    dtype=[torch.float32, torch.bfloat16],
)
def test_total_where_kernels_run_and_attention_is_sdpa(kernels_of_nothing, kind, dtype, recompute):
    """As on a GPU in fp32, or without a library that can be trusted."""
    frozen, share, trainable = "prefix" in kind, "shared" in kind, FULL if "full" in kind else ADAPTER
    rows, prefix = videos_of_questions(8 if share else 1, frozen=frozen, share=share)
    model = random_model(CONFIG, trainable, dtype, recompute=recompute)
    if frozen:
        model.keep_prefix(prefix)
    model(rows).backward()
    with LiveBytes() as live:
        model(rows).backward()
    expected = estimate(
        CONFIG,
        trainable=trainable,
        compute_dtype=dtype,
        recompute=recompute,
        one_call_per_segment=True,
        **rows_of(rows),
    )
    constant = sum(x.nbytes for layer in model._prefix or () for x in layer)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    taken = sum(p.nbytes for p in model.parameters()) + constant + 3 * 4 * trained + live.peak
    assert taken <= expected.total - _CUBLAS_WORKSPACES <= 1.12 * taken


def attention_that_allocates_as_flash(segments):
    """FlashAttention 2's tensors, without numbers, on any device."""

    def forward(q, k, v, layout, causal):
        return q.new_zeros(q.shape), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)

    def backward(grad, q, k, v, out, lse, layout, causal):
        return layer_memory._flash_backward(q, k, v, segments)

    return Attention("flash", lambda *_: pytest.fail("branches are computed in parts"), parts=Parts(forward, backward))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full", 1])
@pytest.mark.parametrize("kind", ["shared", "prefix, shared", "full, shared"])
def test_total_where_attention_is_in_parts(kernels_of_nothing, kind, recompute):
    frozen, trainable = "prefix" in kind, FULL if "full" in kind else ADAPTER
    rows, _ = videos_of_questions(8, frozen=frozen, share=True)
    attention = attention_that_allocates_as_flash(rows_of(rows)["segments"])
    model = random_model(CONFIG, trainable, torch.bfloat16, recompute=recompute, attention=attention)
    if frozen:
        kept = torch.zeros(2, 4, CONFIG.decoder.num_kv_heads, 16, dtype=torch.bfloat16)
        model._prefix = [tuple(kept)] * len(model.decoder.layers)
    model(rows).backward()
    with LiveBytes() as live:
        model(rows).backward()
    settings = {"trainable": trainable, "compute_dtype": torch.bfloat16, "recompute": recompute}
    expected, gathering = (estimate(CONFIG, **settings, **rows_of(rows, in_parts)) for in_parts in (True, False))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    constant = kept.nbytes * len(model.decoder.layers) if frozen else 0
    taken = sum(p.nbytes for p in model.parameters()) + constant + 3 * 4 * trained + live.peak
    assert taken <= expected.total - _CUBLAS_WORKSPACES <= 1.12 * taken
    assert expected.total < gathering.total


@pytest.mark.parametrize("vocab_size", [4032, 4003])
@pytest.mark.parametrize("trainable", [ADAPTER, dataclasses.replace(ADAPTER, head=True)], ids=["frozen", "trained"])
def test_the_head_is_padded_where_kernels_run(kernels_of_nothing, monkeypatch, trainable, vocab_size):
    """Products for a trained head widen no factor on a GPU."""
    module = sys.modules[linear_cross_entropy.__module__]
    monkeypatch.setattr(module, "_add_product", lambda *tensors: None)
    config = model_config(mm_hidden_size=24, **{**SIZES, "vocab_size": vocab_size, "num_layers": 1})
    batch, settings = videos_of_questions(1, frozen=False, share=False)[0], {"compute_dtype": torch.bfloat16}
    model = random_model(config, trainable, torch.bfloat16)
    model(batch).backward()
    with LiveBytes() as live:
        model(batch).backward()
    expected = estimate(config, trainable=trainable, one_call_per_segment=True, **settings, **rows_of(batch))
    assert live.peak <= expected.activations + expected.working - _CUBLAS_WORKSPACES <= 1.02 * live.peak


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trainable", [ADAPTER, FULL], ids=["adapter", "full"])
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_parameter_counts(tied, trainable, projector):
    config = model_config(projector, tie_word_embeddings=tied, num_kv_heads=2)
    found = {}
    for name, parameter in random_model(config, trainable).named_parameters():
        part = name.split(".")[0]
        found[part] = found.get(part, 0) + parameter.numel()
    assert parameter_counts(config, trainable) == found


def seven_billion(**changes):
    config = model_config(**SEVEN_BILLION, max_position_embeddings=4096)
    settings = {"trainable": ADAPTER, "rows": 8 * 830, "supervised_rows": 8 * 75, "compute_dtype": torch.bfloat16}
    return config, {**settings, **changes}


def test_seven_billion_parameters():
    config, settings = seven_billion()
    adapter = estimate(config, **settings)
    assert adapter.weights == pytest.approx(2 * 6.74e9, rel=0.02)
    assert adapter.gradients == 4 * (4096 * 1024 + 4096 * 4096 + 4 * 4096)
    assert adapter.activations / (8 * 830) == pytest.approx(32 * 93.3e3, rel=0.02)
    full = estimate(config, **{**settings, "trainable": FULL}, recompute="full")
    assert full.weights + full.gradients + full.optimizer == pytest.approx(16 * 6.74e9, rel=0.02)


# The largest micro-batch of rows of the ladder: fields of `BatchRows`, and what the row's flags choose.
BATCHES = {
    "exact": ((6368, 781, 5408, 34, 142, 6782, 6774, 8), {}),
    "exact_16896": ((16546, 1712, 14196, 34, 265, 17525, 17504, 21), {}),
    "whole": ((6782, 781, 5408, 0, 0, 0, 6774, 8), {}),
    "shared": ((3363, 1313, 1352, 34, 0, 14111, 12672, 17), {}),
    "fp8": ((6368, 781, 5408, 34, 142, 6782, 6774, 8), {"frozen_dtype": "fp8"}),
    "shared_fp8": ((6250, 2249, 2704, 34, 0, 27746, 24868, 34), {"frozen_dtype": "fp8"}),
    "full": (
        (6782, 781, 5408, 0, 0, 0, 6774, 8),
        {"trainable": FULL, "trained_dtype": torch.bfloat16, "optimizer": "adamw_8bit"},
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_gpu_took_what_is_estimated(name):
    """All but the adapter's first weights, of which the benchmark keeps a copy, and the step's batches.

    The GPU ran when frozen rows were computed apart, and nothing of them waited for backward but where keys lie.
    """
    rows = json.loads((ROOT / "bench" / "results" / "train-gpu-7b-h200.json").read_text())["rows"]
    (peak,) = (row["peak_bytes"] for row in rows if row["row"] == name)
    numbers, changes = BATCHES[name]
    config, settings = seven_billion(**changes)
    settings |= dict(zip((f.name for f in dataclasses.fields(layer_memory.BatchRows)), numbers))
    apart = settings | {"frozen_rows": 0}
    assert estimate(config, **apart).total == pytest.approx(peak, rel=0.005)
    together = estimate(config, **settings).total / estimate(config, **apart).total
    assert 1 <= together < 1.014, "with others, frozen rows take what the live ones do, but for gradients"


@pytest.mark.parametrize("recompute", ["none", "selective", 1])
def test_an_estimate_compiles_nothing(monkeypatch, recompute):
    """Whether C++ will run or chains of torch's operations, which take more."""

    def refuse(*arguments, **options):
        raise AssertionError("compiled")

    for module in (rows_of_cpu, attention_of_cpu):
        monkeypatch.setattr(module, "_library", refuse)
    totals = []
    for obstacle in (None, "no such CPU"):
        monkeypatch.setattr(rows_of_cpu, "foreseen_obstacle", lambda obstacle=obstacle: obstacle)
        layer_memory._measured.cache_clear()
        settings = {"rows": 340, "supervised_rows": 40, "recompute": recompute, "on_cpu": True}
        totals.append(estimate(CONFIG, trainable=ADAPTER, compute_dtype=torch.bfloat16, **settings).total)
    layer_memory._measured.cache_clear()
    assert totals[0] < totals[1]


def test_sharding_divides_what_is_sharded():
    config, settings = seven_billion(trainable=FULL, trained_dtype=torch.bfloat16)
    one = estimate(config, **settings, recompute="full")
    eight = estimate(config, **settings, recompute="full", world_size=8, sharded=True)
    assert eight.gradients == one.gradients // 8 and eight.optimizer == one.optimizer // 8
    assert one.weights / 8 < eight.weights < one.weights / 8 + 2 * 2**30
    assert eight.activations == one.activations
    config, settings = seven_billion()
    adapter = estimate(config, **settings, world_size=8, shard_trained=True)
    replicated = estimate(config, **settings)
    assert adapter.optimizer == replicated.optimizer // 8
    assert replicated.weights - adapter.weights == pytest.approx(replicated.gradients * 7 / 8, abs=4)


def test_gradients_that_are_sums_are_fp32():
    config, settings = seven_billion(trainable=FULL, trained_dtype=torch.bfloat16)
    one, sums = (estimate(config, **settings, summed=summed) for summed in (False, True))
    assert sums.gradients == 2 * one.gradients and sums.total - one.total == one.gradients
    masters = settings | {"trained_dtype": torch.float32}
    assert estimate(config, **masters, summed=True) == estimate(config, **masters)


def test_an_average_takes_four_bytes_of_each_trained_parameter():
    settings = {"trainable": FULL, "rows": 100, "supervised_rows": 10, "compute_dtype": torch.float32}
    plain, averaged = (estimate(CONFIG, **settings, averaged=flag) for flag in (False, True))
    assert averaged.optimizer - plain.optimizer == 4 * sum(parameter_counts(CONFIG, FULL).values())
    assert averaged.total - plain.total == averaged.optimizer - plain.optimizer


@pytest.mark.parametrize("trainable", [ADAPTER, FULL], ids=["adapter", "full"])
def test_as_few_layers_are_recomputed_as_fit(trainable):
    config, settings = seven_billion(trainable=trainable)
    choices = ["none", *range(1, 32), "full"]
    totals = [estimate(config, recompute=choice, **settings).total for choice in choices]
    assert totals == sorted(totals, reverse=True)
    assert all(choose_recompute(total, config, **settings) == choices[totals.index(total)] for total in totals)
    assert choose_recompute(totals[0] - 1, config, **settings) == 1
    assert choose_recompute(0, config, **settings) == "full"
    assert totals[0] - totals[16] > 0.45 * (totals[0] - totals[-1])
    assert [estimate(config, recompute=k, **settings).total for k in (0, 32)] == [totals[0], totals[-1]]


def test_a_gpu_takes_more_than_the_tensors_of_the_model():
    """FlashAttention sums the queries' gradient in fp32; cuBLAS has its workspaces. Shared keys' gradients are summed
    in registers, beside copies of keys and values that backward has made again before."""
    config, settings = seven_billion()
    gpu, cpu = (estimate(config, recompute="full", on_cpu=on_cpu, **settings) for on_cpu in (False, True))
    assert gpu.working - cpu.working >= 64 * 2**20
    rows, keys, width = settings["rows"], 28_000, 4096
    shared = estimate(config, **settings, key_rows=keys, last_key_rows=keys, segments=40)
    gradients = 2 * (2 * rows + 2 * keys) * width
    own = rows * (2 * width + 4 + 2 * (2 * 11008)) - rows * width * 2  # of the feed-forward block, which is gone
    last = estimate(config, **settings, last_key_rows=keys).working - 64 * 2**20
    assert (
        shared.working - 64 * 2**20 >= gradients + max(2 * 2 * keys * width + 4 * rows * width, 4 * keys * width) - own
    )
    keys_and_values = 2 * 2 * keys * width
    assert 0.98 * 2 * keys_and_values <= last <= 2 * keys_and_values


def test_gradients_of_copies_are_summed_in_a_flat_one():
    """When activations are gone: it counts where they are fewer than the gradients."""
    config, settings = seven_billion(trainable=FULL, rows=600, supervised_rows=60)
    alone, summed = (estimate(config, recompute="full", sums_replicated=flag, **settings) for flag in (False, True))
    assert summed.activations + summed.working == summed.gradients > alone.activations + alone.working
    config, settings = seven_billion()
    assert estimate(config, **settings, sums_replicated=True) == estimate(config, **settings)


def test_a_sharded_layer_has_its_whole_gradient_for_a_while():
    config, settings = seven_billion(trainable=FULL, trained_dtype=torch.bfloat16)
    one = estimate(config, **settings, recompute="full")
    eight = estimate(config, **settings, recompute="full", world_size=8, sharded=True)
    assert eight.working - one.working == 6 * (4 * 4096**2 + 3 * 4096 * 11008)
    rounded = estimate(config, **settings, recompute="full", world_size=8, sharded=True, sent_rounded=True)
    assert rounded.working - one.working == 8 * (4 * 4096**2 + 3 * 4096 * 11008)


def test_summary_is_a_table():
    config, settings = seven_billion()
    text = str(estimate(config, **settings))
    assert text.splitlines()[0] == "memory per rank (recompute none):"
    assert str(estimate(config, **settings, recompute=5)).splitlines()[0] == "memory per rank (recompute 5 layers):"
    assert [line.split()[0] for line in text.splitlines()[1:]] == [
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "working",
        "total",
    ]
    weights = dataclasses.replace(estimate(config, **settings), weights=3 * 2**30)
    assert "weights          3.000 GiB" in str(weights)
