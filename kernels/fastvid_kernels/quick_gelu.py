"""CLIP's activation, x · sigmoid(1.702 x), in one pass and without gradients: for the frozen vision towers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cpu
from .dispatch import launch, refuse_gradients, use_triton
from .plain import wide


def quick_gelu_reference(x: Tensor) -> Tensor:
    """`quick_gelu` in plain torch."""
    x_wide = wide(x)
    return (x_wide * torch.sigmoid(1.702 * x_wide)).to(x.dtype)


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
        impl: "auto" (Triton on CUDA tensors, else `cpu`), "triton" or "reference" (`quick_gelu_reference`).

    Returns:
        The same shape and dtype, computed in fp32 and rounded once.

    Raises:
        ValueError: another dtype, a gradient would be due, `impl` is unknown or cannot run here.
    """
    if not x.is_floating_point():
        raise ValueError(f"quick_gelu: x must be floating-point, found {x.dtype}")
    refuse_gradients(x, name="quick_gelu")
    if not use_triton(impl, x, name="quick_gelu"):
        return quick_gelu_reference(x) if impl == "reference" else cpu.quick_gelu(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    BLOCK = _tiles()
    launch(_quick_gelu_kernel, (triton.cdiv(x.numel(), BLOCK),), x, out, x.numel(), BLOCK, num_warps=4)
    return out


__all__ = ["quick_gelu", "quick_gelu_reference"]
