"""CLIP's activation, x · sigmoid(1.702 x), in one pass and without gradients: for the frozen vision towers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import avx512_rows
from .dispatch import choose, launch, refuse_gradients


def quick_gelu_reference(x):
    """`quick_gelu` in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def _tiles():
    """Elements of a program: 8 a thread, one 16-byte load of 16-bit numbers."""
    return 1024


@triton.jit  # specialised on the count: loads are wide where Triton knows that 16 divides it, as it does every width
def _quick_gelu_kernel(x_ptr, out_ptr, elements, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    x = tl.load(x_ptr + place, mask=inside).to(tl.float32)
    tl.store(out_ptr + place, (x * tl.sigmoid(1.702 * x)).to(out_ptr.dtype.element_ty), mask=inside)


def quick_gelu(x: Tensor, *, impl: str = "auto") -> Tensor:
    """x · sigmoid(1.702 x), the approximation of GELU (arXiv:1606.08415) that OpenAI's CLIP was trained with.

    Args:
        x: any shape, fp32, bf16 or fp16. Copied if not contiguous.
        impl: "auto" (Triton on CUDA tensors, C++ for bf16 on CPUs with AVX512-BF16, else torch), "triton", "avx512" or
            "reference" (plain torch).

    Returns:
        The same shape and dtype, computed in fp32 and rounded once.

    Raises:
        ValueError: another dtype, a gradient would be due, `impl` is unknown or cannot run here.
    """
    if not x.is_floating_point():
        raise ValueError(f"quick_gelu: x must be floating-point, found {x.dtype}")
    refuse_gradients(x, name="quick_gelu")
    implementation = choose(impl, x, name="quick_gelu", dtypes=[x.dtype])
    if implementation == "torch":
        return quick_gelu_reference(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    if implementation == "avx512":
        avx512_rows.quick_gelu(out, x)
    else:
        BLOCK = _tiles()
        launch(_quick_gelu_kernel, (triton.cdiv(x.numel(), BLOCK),), x, out, x.numel(), BLOCK, num_warps=4)
    return out


__all__ = ["quick_gelu", "quick_gelu_reference"]
