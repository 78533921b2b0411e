"""Frozen matrices in few bits: products and gradients against the plain ones, sizes, and what is refused."""

import sys
from types import SimpleNamespace

import pytest
import torch
from fastvid_kernels.quantize_fp8 import quantize_fp8_reference, scaled_product
from model_cases import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvid.model import quantize
from fastvid.model.quantize import FORMATS, check_device, matrix_bytes
from fastvid.training.live_bytes import LiveBytes

IN, OUT, ROWS = 64, 96, 37
SLICES = [None, slice(32, 96), slice(0, 16)]
# Largest relative error of a row of a product of normal factors: of both factors' rounding, or of the matrix's alone.
PRODUCT_ERROR = {"fp8": 0.045, "int8": 0.010, "nf4": 0.110}


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def quantized(frozen_dtype, weight_OI):
    linear = FORMATS[frozen_dtype](*reversed(weight_OI.shape))
    linear.quantize_(weight_OI)
    return linear


def matrices(frozen_dtype, linear):
    """The matrices that the product and its gradient multiply by, fp32 [outputs, inputs]."""
    if frozen_dtype == "fp8":
        return (linear.w_OI.float() * linear.scale_O[:, None]), (linear.w_IO.float() * linear.scale_I[:, None]).T
    return (linear.dequantized(torch.float32),) * 2


def factor(frozen_dtype, rows):
    """The left factor as it is multiplied."""
    if frozen_dtype != "fp8":
        return rows
    bits, scale = quantize_fp8_reference(rows)
    return bits.float() * scale[:, None]


@pytest.mark.parametrize("outputs", SLICES)
@pytest.mark.parametrize("frozen_dtype", FORMATS)
def test_product_and_gradient_are_those_of_a_plain_linear_of_the_same_values(frozen_dtype, outputs):
    linear = quantized(frozen_dtype, random(OUT, IN, scale=0.02))
    x = random(ROWS, IN, seed=1).requires_grad_()
    y = linear(x, outputs=outputs)
    g = random(*y.shape, seed=2, scale=1e-6)
    y.backward(g)
    forward, backward = (matrix[outputs or slice(None)] for matrix in matrices(frozen_dtype, linear))
    assert_close(y, factor(frozen_dtype, x.detach()) @ forward.T)
    assert_close(x.grad, factor(frozen_dtype, g) @ backward)


@pytest.mark.parametrize("frozen_dtype", FORMATS)
def test_bf16_differs_from_fp32_by_its_own_rounding(frozen_dtype):
    linear = quantized(frozen_dtype, random(OUT, IN, scale=0.02))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        x = random(ROWS, IN, seed=1).bfloat16().to(dtype).requires_grad_()
        y = linear(x)
        y.backward(random(ROWS, OUT, seed=2).bfloat16().to(dtype))
        assert y.dtype == x.grad.dtype == dtype
        results.append((y, x.grad))
    for found, expected in zip(*reversed(results)):
        assert_close(found, expected, 2**-7)


@pytest.mark.parametrize("frozen_dtype", FORMATS)
def test_error_against_bf16(frozen_dtype):
    """Of values of the sizes that a decoder has, with a row that sticks out: it spoils no other."""
    weight, x, g = random(512, 256, scale=0.02), random(ROWS, 256, seed=1), random(ROWS, 512, seed=2, scale=1e-7)
    x[3] *= 100
    g[4] *= 1000
    x, g = x.bfloat16().requires_grad_(), g.bfloat16()
    y = quantized(frozen_dtype, weight.bfloat16())(x)
    y.backward(g)
    plain_y, plain_dx = x.detach().float() @ weight.bfloat16().float().T, g.float() @ weight.bfloat16().float()
    for found, plain in ((y, plain_y), (x.grad, plain_dx)):
        error = ((found.float() - plain).norm(dim=1) / plain.norm(dim=1)).max().item()
        assert PRODUCT_ERROR[frozen_dtype] / 2 < error < PRODUCT_ERROR[frozen_dtype]


def test_int8_rounds_to_the_nearest_step():
    weight = random(OUT, IN)
    weight[5] = 0
    linear = quantized("int8", weight)
    steps = weight.abs().amax(1) / 127
    assert ((linear.dequantized(torch.float32) - weight).abs() <= 0.5001 * steps[:, None]).all()
    assert torch.equal(linear.dequantized(torch.float32)[5], torch.zeros(IN))


def test_int8_is_what_bitsandbytes_stores():
    from bitsandbytes.functional import int8_vectorwise_quant

    weight = random(OUT, IN, scale=0.02)
    bits, largest, _ = int8_vectorwise_quant(weight)
    linear = quantized("int8", weight)
    assert torch.equal(linear.w_OI, bits) and torch.equal(linear.scale_O, largest / 127)


def test_nf4_is_what_bitsandbytes_computes():
    import bitsandbytes

    weight, x = random(OUT, IN, scale=0.02), random(ROWS, IN, seed=1).requires_grad_()
    theirs = bitsandbytes.nn.Linear4bit(IN, OUT, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    theirs.load_state_dict({"weight": weight})
    theirs = theirs.to("cpu")
    y = quantized("nf4", weight)(x)
    assert_close(y, theirs(x.detach()), 1e-5)


def test_nf4_is_within_half_a_gap_of_its_table():
    weight = random(OUT, IN)
    error = (quantized("nf4", weight).dequantized(torch.float32) - weight).abs().view(-1, 64)
    largest = weight.abs().view(-1, 64).amax(1)
    # The widest gap is from −1 to −0.696; scales of scales have their own rounding.
    assert (error <= 0.1525 * largest[:, None] + 0.04 * largest.max()).all()


@pytest.mark.parametrize("shape", [(IN, OUT), (16, 16), (48, 352), (688, 80)])
@pytest.mark.parametrize("frozen_dtype", FORMATS)
def test_bytes(frozen_dtype, shape):
    inputs, outputs = shape
    linear = quantized(frozen_dtype, random(outputs, inputs))
    assert sum(buffer.nbytes for buffer in linear.buffers()) == matrix_bytes(frozen_dtype, inputs, outputs)
    assert not list(linear.parameters()) and not linear.state_dict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen_dtype", FORMATS)
def test_files_of_any_precision(frozen_dtype, dtype):
    weight = random(OUT, IN, scale=0.02).to(dtype)
    assert_close(
        quantized(frozen_dtype, weight)(torch.eye(IN)), quantized(frozen_dtype, weight.float())(torch.eye(IN)), 1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("frozen_dtype", FORMATS)
def test_nothing_is_saved_for_backward(frozen_dtype):
    linear = quantized(frozen_dtype, random(OUT, IN))
    leaf = random(ROWS, IN).requires_grad_()
    with LiveBytes() as live:
        x = leaf * 2
        y = linear(x)
        del x
        assert live.now == y.nbytes
    y.sum().backward()
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("frozen_dtype", FORMATS)
def test_no_rows(frozen_dtype):
    x = torch.empty(0, IN, requires_grad=True)
    y = quantized(frozen_dtype, random(OUT, IN))(x)
    y.sum().backward()
    assert y.shape == (0, OUT) and x.grad.shape == (0, IN)


def test_what_is_multiplied_on_a_gpu_is_laid_out_as_fp8_units_want_it():
    """torch checks the layout of what a GPU would get: left factor row-major, right one column-major, steps of 16."""

    def bits(*shape):
        return torch.empty(*shape, dtype=torch.float8_e4m3fn, device="cuda")

    with FakeTensorMode():
        rows, of_rows, of_outputs, of_inputs = bits(ROWS, IN), *(torch.empty(n, device="cuda") for n in (ROWS, OUT, IN))
        y = scaled_product(rows, of_rows, bits(OUT, IN).narrow(0, 32, 48), of_outputs.narrow(0, 32, 48), torch.bfloat16)
        assert y.shape == (ROWS, 48) and y.dtype == torch.bfloat16
        dx = scaled_product(bits(ROWS, 48), of_rows, bits(IN, OUT).narrow(1, 32, 48), of_inputs, torch.float32)
        assert dx.shape == (ROWS, IN) and dx.dtype == torch.float32
        with pytest.raises(RuntimeError, match="divisible by 16"):
            scaled_product(rows, of_rows, bits(OUT, IN).narrow(0, 32, 40), of_outputs.narrow(0, 32, 40), torch.bfloat16)


def test_sides_that_fp8_units_cannot_multiply_are_refused():
    with pytest.raises(ValueError, match="a matrix of the decoder is 96 × 60.*steps of 16; choose another"):
        FORMATS["fp8"](60, 96)


@pytest.mark.parametrize("capability, refused", [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)])
def test_a_gpu_without_fp8_is_refused_by_name(monkeypatch, capability, refused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    gpu = SimpleNamespace(type="cuda")
    check_device("int8", gpu)
    if not refused:
        return check_device("fp8", gpu)
    with pytest.raises(ValueError, match=r"NVIDIA A100 \(compute capability 8.\d\) has no FP8.*auto, int8 or nf4"):
        check_device("fp8", gpu)


def test_a_cpu_says_that_fp8_is_emulated(caplog):
    caplog.set_level("INFO", "fastvid")
    check_device("fp8", torch.device("cpu"))
    assert "on a CPU: the same quantised values, multiplied in fp32" in caplog.text


def test_nf4_without_bitsandbytes_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs bitsandbytes: pip install"):
        check_device("nf4", torch.device("cpu"))
    check_device("int8", torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("outputs", SLICES)
@pytest.mark.parametrize("frozen_dtype", FORMATS)
def test_a_gpu_computes_what_the_cpu_does(frozen_dtype, outputs):
    if frozen_dtype == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[gpu]'")
    elif frozen_dtype == "fp8" and torch.cuda.get_device_capability() < quantize.FP8_CAPABILITY:
        pytest.skip("no FP8 units")
    weight, results = random(OUT, IN, scale=0.02), []
    for device in ("cpu", "cuda"):
        linear = quantized(frozen_dtype, weight.to(device))
        x = random(ROWS, IN, seed=1).to(device, torch.bfloat16).requires_grad_()
        y = linear(x, outputs=outputs)
        y.backward(random(*y.shape, seed=2, scale=1e-6).to(y))
        results.append((y.float().cpu(), x.grad.float().cpu()))
    for found, expected in zip(*reversed(results)):
        assert_close(found, expected, 2**-6)
