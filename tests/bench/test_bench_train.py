"""The benchmark of the training step: its data, its baselines, and what it counts."""

import math
import statistics
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from attention_cases import bounds
from fastvid_kernels.cpu import attention_obstacle, avx512_attention
from torch.nn import functional

from bench import train_data, train_rows, train_step
from bench.executed import ExecutedFlops, executed_flops, matmul_rate, varlen_flops
from bench.train_presets import BASELINES, LORA_BASELINES, PRESETS, ROWS, Shape
from fastvid.config import TrainConfig
from fastvid.data.conversation import system_prefix
from fastvid.data.dataset import SampleSet
from fastvid.data.tokenizer import load_tokenizer
from fastvid.features.folder import FeatureFolder

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bench")
    train_data.write(made, TINY.shape, TINY.videos, budget_videos=3)
    return made


def test_samples_have_the_real_lengths(tmp_path):
    """830 rows and 75 supervised on average, 7.5 questions a video, system text as long as LLaMA's tokenizer makes
    it."""
    train_data.write(tmp_path, Shape(16, 1, 2, 16, 640), videos=4)
    tokenizer = load_tokenizer(str(tmp_path / "model"), True)
    config = TrainConfig(
        str(tmp_path / "model"), [str(tmp_path / "train.json")], output_dir="", mm_use_vid_start_end=True
    )
    samples = SampleSet(config.data_path, tokenizer, FeatureFolder(tmp_path / "feats"), config)
    encoded = [samples.encode(i) for i in range(len(samples))]
    assert len(encoded) == 4 * 7.5 and not any(sample.refused for sample in encoded)
    lengths = [len(sample.token_ids) for sample in encoded]
    supervised = [sum(end - start for start, end in sample.supervised) for sample in encoded]
    assert statistics.mean(lengths) == pytest.approx(830, abs=2)
    assert statistics.mean(supervised) == pytest.approx(75, abs=1)
    assert max(supervised) > 3 * statistics.median(supervised)
    assert abs(len(system_prefix(tokenizer, "v1")) - 34) <= 3
    first = [sample.token_ids.index(tokenizer.tokens.start) for sample in encoded]
    assert len(set(first[1::2])) == 1 and len(set(first[::2])) > 5  # video first and question first in turn


def test_data_depend_on_the_seed_alone(tmp_path, folder):
    for name, seed in (("same", 0), ("other", 1)):
        train_data.write(tmp_path / name, TINY.shape, TINY.videos, seed, 3)
    # sentencepiece writes the file's own path into tokenizer.model
    files = sorted(
        path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".safetensors", ".json", ".vocab")
    )
    assert len(files) == 11

    def equal(name):
        return [(tmp_path / name / file).read_bytes() == (folder / file).read_bytes() for file in files]

    assert all(equal("same")) and not all(equal("other"))


def test_parameters_of_a_shape():
    assert Shape(4096, 32, 32, 11008, 32000).parameters == 6_738_415_616  # LLaMA 7B


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.mm(a, b, out=torch.empty(a.shape[0], b.shape[1]))

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g @ b.T, torch.addmm(torch.zeros_like(b), a.T, g)


def test_products_are_counted_in_functions_too():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    with ExecutedFlops() as counter:
        Product.apply(a, b).sum().backward()
        torch.zeros(2, 3, 4).baddbmm_(torch.randn(2, 3, 6), torch.randn(2, 6, 4))
        a.exp()
    assert counter.total == 3 * 2 * 3 * 5 * 7 + 2 * 2 * 3 * 6 * 4


def test_a_product_with_a_dtype_of_its_own_is_counted():
    """As a trained head's gradient is computed on a GPU: CPUs have no such product, so a stand-in is dispatched."""

    class AddmmOnGPU:
        _overloadpacket = torch.ops.aten.addmm

        def __call__(self, total, a, b, dtype, out):
            return out

    counter, total = ExecutedFlops(), torch.zeros(3, 5)
    counter.__torch_dispatch__(
        AddmmOnGPU(), (), (total, torch.zeros(3, 4), torch.zeros(4, 5), torch.float32), {"out": total}
    )
    assert counter.total == 2 * 3 * 4 * 5


@pytest.mark.parametrize("causal", [True, False])
def test_attention_counts_what_it_computes(causal):
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    _, flops = executed_flops(
        lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()
    )
    pairs = 16 * 17 // 2 if causal else 16 * 16
    assert flops == (2 + 5) * 2 * 2 * 3 * 8 * pairs


@pytest.mark.skipif(attention_obstacle() is not None, reason=f"attention for AVX512-BF16: {attention_obstacle()}")
def test_attention_by_avx512_counts_pairs_up_to_the_diagonal():
    q, k, v = (torch.randn(n, 3, 16, dtype=torch.bfloat16, requires_grad=True) for n in (5, 6, 6))
    given = bounds([3, 2]), bounds([4, 2])
    _, flops = executed_flops(lambda: avx512_attention(q, k, v, *given).sum().backward())
    assert flops == (2 + 5) * 2 * 3 * 16 * ((2 + 3 + 4) + (1 + 2))


def test_attention_on_packed_rows_counts_pairs_up_to_the_diagonal():
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([0, 4, 6], dtype=torch.int32)
    rows = torch.empty(5, 2, 8)
    pairs = (2 + 3 + 4) + (1 + 2)
    arguments = dict(zip(("query", "key", "value", "cu_q", "cu_k"), (rows, rows, rows, *bounds)))
    assert varlen_flops(arguments, 2) == varlen_flops(arguments | {"is_causal": True}, 2) == 2 * 2 * 8 * 2 * pairs
    assert varlen_flops(arguments | {"causal": False}, 2) == 2 * 2 * 8 * 2 * (3 * 4 + 2 * 2)
    assert varlen_flops({"query": rows, "key": rows, "value": rows}, 2) == 0


@pytest.mark.slow
def test_rate_of_a_matrix_product_is_the_fastest_call():
    times = iter([0.0, 0.0, 2.0, 2.0, 2.5, 3.0, 6.0, 7.0])  # begin, three calls, and a look at the clock

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.executed.time", SimpleNamespace(perf_counter=lambda: next(times)))
        assert matmul_rate(torch.float32, torch.device("cpu"), seconds=0.3) == pytest.approx(2 * 2048**3 / 0.5)


def first(name, folder, dtype="fp32", micro_batch=8):
    return train_rows.answer(train_rows.make(name, folder, train_rows.DTYPES[dtype], micro_batch), "first")


@pytest.fixture(scope="module")
def firsts(folder):
    names = (
        *BASELINES,
        "packed",
        "kept",
        "last",
        "apart",
        "exact",
        "recomputed",
        "smallest",
        "strong_video_first",
        "shared",
    )
    return {name: first(name, folder) for name in names}


@pytest.mark.slow
def test_every_exact_row_has_the_loss_and_gradient_of_the_reference(firsts):
    rows = [{"row": name, "dtype": "fp32", **found} for name, found in firsts.items()]
    assert list(train_step.compare(rows)) == []
    assert firsts["strong_video_first"]["norm"] != pytest.approx(firsts["strong"]["norm"], rel=1e-3)
    assert all(found["samples"] == 15 for found in firsts.values())
    assert math.log(640) - 0.5 < firsts["reference"]["loss"] < math.log(640) + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"loss": 1.0001}, {"norm": 1.001}, {"loss": math.nan}])
def test_another_loss_or_gradient_is_a_fault(firsts, change):
    ((key, factor),) = change.items()
    rows = [{"row": name, "dtype": "fp32", **firsts[name]} for name in ("reference", "exact")]
    rows[1][key] *= factor
    (fault,) = train_step.compare(rows)
    assert fault.startswith(f"fp32 exact: {key}")


@pytest.mark.slow
def test_without_the_reference_rows_must_equal_each_other(firsts):
    rows = [
        {"row": name, "dtype": "fp32", **firsts[name]} for name in ("strong", "exact", "strong_video_first", "shared")
    ]
    assert list(train_step.compare(rows)) == []
    rows[1]["norm"] *= 1.001
    (fault,) = train_step.compare(rows)
    assert fault.startswith("fp32 exact: norm") and "strong has" in fault


@pytest.mark.parametrize("name", PRESETS)
def test_every_row_of_a_preset_is_compared_with_another(name):
    for names in PRESETS[name].rows.values():
        for row in map(ROWS.get, names):
            assert row.like is None or row.like in names or sum(ROWS[other].like == row.like for other in names) > 1


@pytest.mark.slow
def test_rows_compute_less_from_idea_to_idea(firsts):
    order = ("reference", "strong", "tuned", "kept", "last", "apart", "shared")
    flops = [firsts[name]["flops"] for name in order]
    assert flops == sorted(flops, reverse=True) and len(set(flops)) == len(flops)
    assert firsts["recomputed"]["flops"] > 1.2 * firsts["exact"]["flops"]
    rows = [firsts[name]["rows"] for name in ("strong", "tuned", "packed", "shared")]
    assert rows == sorted(rows, reverse=True) and len(set(rows)) == len(rows)
    assert firsts["strong"]["rows"] == firsts["reference"]["rows"]
    assert firsts["packed"]["rows"] == firsts["exact"]["sample_rows"] == firsts["reference"]["sample_rows"]


@pytest.mark.slow
def test_rows_of_lora_have_the_loss_and_gradient_of_peft(folder):
    pytest.importorskip("peft")
    names = (*LORA_BASELINES, "lora")
    rows = [{"row": name, "dtype": "fp32", **first(name, folder)} for name in names]
    assert list(train_step.compare(rows)) == []
    assert rows[0]["flops"] > rows[1]["flops"] > rows[2]["flops"]
    row = train_rows.make("lora_tuned", folder, torch.bfloat16, 8)
    ours = train_rows.make("lora", folder, torch.bfloat16, 8)
    assert {p.dtype for p in row.model.parameters()} == {torch.bfloat16}
    trained = sum(p.numel() for p in ours.state.optimizer.parameters.values())
    assert sum(p.numel() for p in row.trained) == trained


@pytest.mark.slow
def test_rows_for_a_gpu_run_at_tiny_sizes(folder, firsts):
    """Their figures are a GPU's; that their command lines and steps work is seen here."""
    names = [name for name in PRESETS["gpu-7b"].rows["bf16"] if name not in firsts] + [*BASELINES, "exact", "shared"]
    if find_spec("bitsandbytes") is None:
        names.remove("smallest_nf4")
    assert {"fp8", "shared_fp8", "full"} <= set(names)
    rows = [{"row": name, "dtype": "bf16", **first(name, folder, "bf16")} for name in names]
    assert list(train_step.compare(rows)) == []
    full = rows[names.index("full")]
    assert full["flops"] > 1.3 * firsts["exact"]["flops"] and full["norm"] > 1.5 * firsts["exact"]["norm"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", "strong"])
def test_the_whole_table_is_trained_but_two_rows_move(folder, name):
    row = train_rows.make(name, folder, torch.float32, 8)
    table = row.model.model.embed_tokens.weight
    assert table.requires_grad and not row.model.lm_head.weight.requires_grad
    before = table.detach().clone()
    row.step()
    assert torch.equal(table, before)  # learning rate 0
    row.step()
    moved = (table != before).any(1).nonzero().flatten().tolist()
    assert moved == [row.tokens.start, row.tokens.end]
    assert row.model.model.gradient_checkpointing == (name == "reference") and table.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("name, embeddings", [("strong", 640), ("tuned", 2)])
def test_weights_in_bf16_and_what_is_tuned_by_hand(folder, name, embeddings):
    row = train_rows.make(name, folder, torch.bfloat16, 8)
    assert {p.dtype for p in row.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in row.projector.parameters()} == {torch.float32}
    assert sum(p.numel() for p in row.trained) == sum(p.numel() for p in row.projector.parameters()) + embeddings * 64
    by_length = row.batches[0]["ids"].shape[1] <= row.batches[1]["mask"].sum(1).min()
    assert by_length == (name == "tuned")
    masks = []
    row.model.register_forward_pre_hook(lambda *call: masks.append(call[2]["attention_mask"]), with_kwargs=True)
    found = train_rows.answer(row, "step")
    assert found["seconds"] > 0 and math.isfinite(found["loss"])
    given = [batch["mask"] if name == "strong" else None for batch in row.batches]
    assert all(mask is expected for mask, expected in zip(masks, given, strict=True))
