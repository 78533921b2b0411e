"""FP8 layers whose rows leave kernels in e4m3 compute, to the bit, what those do whose products quantise rows."""

import pytest
import torch
from fastvid_kernels.quantize_fp8 import Fp8Rows, quantize_fp8
from fastvid_kernels.swiglu import swiglu
from model_cases import END, FEW, PATCH, PREFIX, START, loss_and_gradients, model_config, with_prefix
from test_frozen_dtype import SIZES, random_quantized

from fastvid.batch import VideoTokens
from fastvid.data.conversation import EncodedSample
from fastvid.data.packing import pack
from fastvid.model import quantize
from fastvid.model.decoder import DecoderLayer
from fastvid.model.fp8_block import gate_up_swiglu, product_back_in_fp8
from fastvid.model.norm import RMSNorm
from fastvid.model.quantize import Fp8Linear

KINDS = {
    "mha": {},
    "gqa, a bias, norms of heads": {"config": model_config(**SIZES, qkv_bias=True, qk_norm=True)},
    "no positions, full": {"config": model_config(unrotated_layers=(0,)), "recompute": "full"},
    "bf16": {"compute_dtype": torch.bfloat16},
    "fp32 residual, selective": {"compute_dtype": torch.bfloat16, "fp32_residual": True, "recompute": "selective"},
    "one layer": {"config": model_config(num_layers=1)},
}
LAYERS = 2


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels run, interpreted, on models smaller than FP8 units want them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(quantize, "FP8_SIDE", 4)


@pytest.fixture
def quantised(monkeypatch):
    """Shapes of all rows that products quantise."""
    shapes = []
    monkeypatch.setattr(quantize, "quantize_fp8", lambda x: shapes.append(tuple(x.shape)) or quantize_fp8(x))
    return shapes


def products_quantise(model):
    """Have `model` write rows as it does in other formats."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.for_fp8 = False
        if isinstance(module, DecoderLayer):
            module.back_in_fp8 = set()


def prepared(**options):
    """A model that keeps the prefix. To make it needs no kernel, and an interpreter is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET")
        model, _ = random_quantized("fp8", **options)
        model.keep_prefix(PREFIX)
    return model


def alike(frozen=False):
    """Few rows, because an interpreter is slow; all alike, or with the prefix kept and the frozen rows apart."""
    plain, batch = with_prefix(text_only=False, shapes=FEW)
    return batch.parted() if frozen else plain


def shared():
    """Several questions about each of two videos: rows of a video are keys of all its branches."""
    generator, samples = torch.Generator().manual_seed(0), []
    videos = {name: torch.randn(3, 12, generator=generator) for name in "ab"}
    for name, length in (("a", 2), ("b", 1), ("a", 3)):
        words = torch.randint(3, PATCH, (length + 4,), generator=generator).tolist()
        ids = [*PREFIX, START, *[PATCH] * 3, END, *words]
        samples.append((EncodedSample(name, ids, [(len(ids) - 4, len(ids))], [name]), [videos[name]]))
    tokens = VideoTokens(patch=PATCH, start=START, end=END, vocab_size=100)
    return pack(samples, tokens, 12, prefix=tuple(PREFIX), frozen=True, share=True)


def assert_same_bits(found, expected):
    assert found[0] == expected[0] and found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        assert torch.equal(gradient, expected[1][name]), name


BATCHES = {"all rows alike": alike, "frozen rows": lambda: alike(frozen=True), "shared videos": shared}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, which",
    [
        *((kind, "frozen rows") for kind in KINDS if kind not in ("mha", "bf16")),
        ("mha", "all rows alike"),
        ("bf16", "shared videos"),
    ],
)
def test_equals_products_that_quantise(kind, which, quantised):
    batch = BATCHES[which]()
    model = prepared(**KINDS[kind])
    quantised.clear()
    found = loss_and_gradients(model, batch)
    fused = len(quantised)
    products_quantise(model)
    quantised.clear()
    assert_same_bits(found, loss_and_gradients(model, batch))
    assert 0 < fused < len(quantised)


@pytest.mark.slow
def test_one_of_a_layers_eight_factors_is_quantised_by_a_product(quantised):
    """The inputs of o, which attention makes."""
    batch = alike()
    model = prepared(config=model_config(num_layers=LAYERS))
    D, N = 32, batch.num_rows
    quantised.clear()
    loss_and_gradients(model, batch)
    assert quantised == [(N, D)] * LAYERS


@pytest.mark.slow
def test_saves_what_is_saved_where_products_quantise():
    def saved(model):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x
        ):
            loss = model(alike(frozen=True))
        assert loss.requires_grad
        return sum(sizes.values())

    model = prepared()
    found = saved(model)
    products_quantise(model)
    assert found == saved(model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_gate_up_and_swiglu(rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    gate_up, x = Fp8Linear(64, 96), torch.randn(rows, 64, generator=generator).to(dtype)
    gate_up.quantize_(torch.randn(96, 64, generator=generator) / 8)
    grad = torch.randn(rows, 48, generator=generator).to(dtype)
    plain = x.clone().requires_grad_()
    expected = swiglu(gate_up(plain))
    expected.backward(grad)
    stand_in = torch.empty_like(x).requires_grad_()
    found = gate_up_swiglu(Fp8Rows(stand_in, *quantize_fp8(x)), gate_up)
    bits, scale = quantize_fp8(expected.detach())
    assert torch.equal(found.bits_ND.float(), bits.float()) and torch.equal(found.scale_N, scale)
    found.stand_in_ND.backward(grad)
    assert torch.equal(stand_in.grad, plain.grad) and stand_in.grad.dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_fp8", [False, True], ids=["rows", "e4m3 rows"])
def test_product_whose_gradient_comes_back_in_e4m3(in_fp8, dtype):
    generator = torch.Generator().manual_seed(0)
    matrix, x, grad = Fp8Linear(64, 96), *(torch.randn(5, n, generator=generator).to(dtype) for n in (64, 96))
    matrix.quantize_(torch.randn(96, 64, generator=generator) / 8)
    leaf = x.clone().requires_grad_()
    expected = matrix(leaf)
    expected.backward(grad)
    given = torch.empty_like(x).requires_grad_() if in_fp8 else x.clone().requires_grad_()
    found, every = product_back_in_fp8(Fp8Rows(given, *quantize_fp8(x)) if in_fp8 else given, matrix)
    assert every is None
    assert torch.equal(found.rows_ND, expected) and not found.rows_ND.requires_grad
    # FSDP2 warns of views between its units.
    assert all(x.requires_grad and not x._is_view() and x.untyped_storage().nbytes() <= 4 for x in found[1:])
    torch.autograd.backward(found[1:], quantize_fp8(grad))
    assert torch.equal(given.grad, leaf.grad) and given.grad.dtype == dtype
