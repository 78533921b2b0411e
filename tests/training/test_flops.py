"""Operations of a step: the formula against what torch counts, and what it leaves out."""

import itertools
from dataclasses import replace

import pytest
import torch
from model_cases import (
    ADAPTER,
    FULL,
    LORA,
    SEVEN_BILLION,
    fill,
    model_config,
    prepared,
    random_batch,
    random_model,
    with_prefix,
)
from torch.utils.flop_counter import FlopCounterMode

from fastvid.batch import AttentionLayout
from fastvid.model.attention import Attention
from fastvid.training import flops
from fastvid.training.flops import Formula, StepCounts

# In place, which torch does not count by itself.
MORE = {torch.ops.aten.addmm_: lambda y, a, b, out_shape, **_: 2 * a[0] * a[1] * b[1]}


def dense_attend(q_NHd, k_NKd, v_NKd, layout):
    """Attention over whole segments, two products forward and four backward, whose every pair torch counts."""
    parts, bounds = [], layout.cu_seqlens_q.tolist()
    for first, last in itertools.pairwise(bounds):
        q, k, v = (x[first:last].transpose(0, 1) for x in (q_NHd, k_NKd, v_NKd))
        parts.append(((q @ k.transpose(1, 2)).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def all_pairs(layout, live):
    queries, keys = layout.cu_seqlens_q.diff().long(), layout.cu_seqlens_k.diff().long()
    return int((queries * keys).sum()), int((queries * keys * live).sum())


@pytest.mark.parametrize("trainable", [ADAPTER, FULL, LORA], ids=["adapter", "full", "lora"])
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_the_formula_is_what_torch_counts(monkeypatch, trainable, projector):
    """Without shortcuts: the last layer and the head see all rows (the head's loss is plain here)."""
    monkeypatch.setattr(flops, "_pairs", all_pairs)
    config = model_config(projector_type=projector)
    model = random_model(config, trainable=trainable, attention=Attention("dense", dense_attend))
    batch = random_batch()
    with FlopCounterMode(display=False, custom_mapping=MORE) as counter:
        model.logits(model.hidden(batch)).logsumexp(-1).sum().backward()
    everything = replace(
        batch,
        loss_layout=None,
        loss_rows=torch.arange(batch.num_rows),
        targets=torch.zeros(batch.num_rows, dtype=torch.int64),
    )
    assert Formula(config, trainable).of_batch(everything) == counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize(
    "trainable", [ADAPTER, FULL, replace(ADAPTER, head=True), LORA], ids=["adapter", "full", "and the head", "lora"]
)
@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_model_multiplies_what_the_formula_counts(monkeypatch, trainable, text_only, kv_heads):
    """Prefix, frozen rows and the last layer as training has them; attention is left out of both counts."""
    monkeypatch.setattr(flops, "_pairs", lambda layout, live: (0, 0))
    plain, batch = with_prefix(text_only)
    config = model_config(num_kv_heads=kv_heads)
    model = random_model(config, trainable=trainable)
    whole = not trainable.text_is_constant
    batch = plain.parted() if whole else batch.parted()
    if not whole:
        prepared(model)
    with FlopCounterMode(display=False, custom_mapping=MORE) as counter:
        model(batch).backward()
    products = sum(
        count
        for operator, count in counter.get_flop_counts()["Global"].items()
        if str(operator) in ("aten.mm", "aten.addmm", "aten.addmm_")
    )
    # The head's kernel also computes the gradient of supervised rows that need none (samples without video).
    needless = 2 * 32 * 100 * int((batch.loss_rows < batch.frozen_rows).sum())
    assert Formula(config, trainable).of_batch(batch) == products - needless
    assert bool(needless) == (text_only and not whole)


def by_rows(config, batch):
    """An adapter step's operations, row by row and pair by pair."""
    sizes = config.decoder
    d, width, kv = sizes.hidden_size, sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    supervised = set(batch.loss_rows.tolist())
    queries, keys = batch.layout.cu_seqlens_q.tolist(), batch.layout.cu_seqlens_k.tolist()
    operations = batch.video_rows.numel() * (4 * config.mm_hidden_size * d + 6 * d * d)
    for s in range(len(queries) - 1):
        for row in range(queries[s], queries[s + 1]):
            passes = 1 if row < batch.frozen_rows else 2
            seen = keys[s + 1] - keys[s] - (queries[s + 1] - 1 - row)
            for layer in range(sizes.num_layers):
                operations += passes * 2 * d * 2 * kv
                if layer < sizes.num_layers - 1 or row in supervised:
                    operations += passes * 2 * (2 * d * width + 3 * d * sizes.intermediate_size)
                    operations += (4 if passes == 1 else 12) * seen * width
            operations += passes * 2 * d * sizes.vocab_size * (row in supervised)
    return operations


def test_what_need_not_be_computed_does_not_count():
    """Two frozen pieces that attend to four rows of the constant prefix, then three live ones, one shared by two."""
    queries = AttentionLayout.of_lengths([3, 2, 6, 4, 5])
    keys = AttentionLayout.of_lengths([4 + 3, 4 + 2, 4 + 3 + 6, 4 + 3 + 6 + 4, 4 + 3 + 6 + 5])
    layout = replace(
        queries,
        cu_seqlens_k=keys.cu_seqlens_q,
        max_seqlen_k=keys.max_seqlen_q,
        kv_rows=torch.zeros(int(keys.cu_seqlens_q[-1]), dtype=torch.int64),
    )
    loss_rows = torch.tensor([3, 4, 13, 14, 17, 19])  # of a sample without video, and of both branches
    batch = replace(
        random_batch(),
        token_ids=torch.zeros(20, dtype=torch.int64),
        layout=layout,
        loss_rows=loss_rows,
        targets=loss_rows,
        loss_layout=layout.of_rows(loss_rows),
        video_rows=torch.arange(5, 11),
        prefix_rows=4,
        frozen_rows=5,
        sample_rows=50,
        sample_ids=["a", "b", "c"],
    )
    config = model_config(num_kv_heads=2)
    formula = Formula(config, ADAPTER)
    assert formula.of_batch(batch) == by_rows(config, batch)
    assert formula.of_batch(replace(batch, frozen_rows=0)) > formula.of_batch(batch)
    assert formula.of_batch(replace(batch, loss_layout=None)) > formula.of_batch(batch)
    assert formula.counts(batch) == StepCounts(3, 20, 6, 50, 0, formula.of_batch(batch))


def test_a_batch_of_no_sample_is_padding():
    batch = replace(random_batch(), sample_ids=[])
    counts = Formula(model_config(), ADAPTER).counts(batch)
    assert counts.padding_rows == counts.rows == batch.num_rows and counts.samples == counts.sample_rows == 0
    assert flops.total([counts, StepCounts(1, 2, 3)]) == StepCounts(
        1, counts.rows + 2, batch.num_supervised + 3, 0, counts.rows, counts.flops
    )


def test_a_7b_row_is_what_the_usual_count_says():
    """4 and 6 per weight and row of LLaVA-1.5-7B; its attention at 830 rows."""
    config = model_config(**SEVEN_BILLION)
    layout = AttentionLayout.of_lengths([830])
    batch = replace(
        random_batch(),
        token_ids=torch.zeros(830, dtype=torch.int64),
        layout=layout,
        loss_rows=torch.arange(830),
        targets=torch.arange(830),
        video_rows=torch.arange(0),
    )
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32003 * 4096
    attention = 12 * 32 * 4096 * 830 * 831 // 2
    for trainable, factor in ((ADAPTER, 4), (FULL, 6)):
        formula = Formula(config, trainable)
        assert formula.of_batch(batch) == factor * weights * 830 + attention
        assert str(formula).startswith(f"{factor} x 202,375,168 {'frozen' if factor == 4 else 'trained'} weights")


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB300", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A30", 165),
        ("NVIDIA A40", 150),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 5090", 209),
    ],
)
def test_known_gpus_have_a_peak(name, tera):
    assert flops.peak_flops(name) == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce GTX 1080",
        "Tesla V100-SXM2-32GB",
        "Tesla T4",
        "NVIDIA A10G",
        "NVIDIA A16",
        "NVIDIA A2",
        "NVIDIA L20",
        "NVIDIA RTX A4000",
        "NVIDIA RTX A400",
        "NVIDIA RTX 4000 Ada Generation",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA GB10",
        "NVIDIA A100X",
    ],
)
def test_other_gpus_have_none(name):
    """Also where a known card's name is part of theirs."""
    assert flops.peak_flops(name) is None


def test_parameters_are_those_of_the_model():
    config = model_config(num_kv_heads=2)
    model, formula = fill(random_model(config)), Formula(config, ADAPTER)
    layer = model.decoder.layers[0]
    matrices = sum(p.numel() for name, p in layer.named_parameters() if "norm" not in name)
    assert formula.keys_values + formula.others == matrices
    assert sum(formula.projector) == sum(p.numel() for p in model.projector.parameters() if p.ndim == 2)
    assert formula.head == model.head_weight.numel()
