"""SwiGLU, quick-GELU, RMSNorm, LayerNorm and rotary embedding of bf16 rows on CPUs with AVX512-BF16: `rows.cpp`.

Each function writes into its outputs what the kernel of its name computes, in one pass over the rows, where torch's
chains take ten. Rows are dense bf16 on the CPU; nothing is checked here but by `serve`.
"""

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .build import foreseen_obstacle, load

SOURCE = Path(__file__).with_suffix(".cpp")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES = {
    "quick_gelu": [_POINTER] * 2 + [_INT] * 2,
    "swiglu_forward": [_POINTER] * 2 + [_INT] * 3,
    "swiglu_backward": [_POINTER] * 3 + [_INT] * 3,
    "norm_forward": [_POINTER] * 6 + [_INT] * 2 + [ctypes.c_float, _INT],
    "norm_backward": [_POINTER] * 6 + [_INT] * 3,
    "layer_norm": [_POINTER] * 6 + [_INT] * 2 + [ctypes.c_float, _INT],
    "rotate": [_POINTER] * 4 + [_INT] * 5,
}


@functools.cache
def _library():
    """The loaded library, or why there is none."""
    found = load(
        SOURCE,
        instead="norms, rotations, SwiGLU and quick-GELU in bf16 are chains of torch's operations "
        "instead of this CPU's AVX512-BF16, at a third of the speed",
    )
    if not isinstance(found, str):
        for name, types in _SIGNATURES.items():
            getattr(found, name).argtypes, getattr(found, name).restype = types, None
    return found


def obstacle() -> str | None:
    """Why this cannot run here, or None. Compiles at the first call."""
    found = _library()
    return found if isinstance(found, str) else None


def serve(*tensors: torch.Tensor, dtypes: Iterable[torch.dtype] | None = None) -> bool:
    """Whether this computes what is made of `tensors`, whose rows are of `dtypes` (None: the first one's).

    On meta tensors it computes nothing, and compiles nothing.
    """
    if any(dtype != torch.bfloat16 for dtype in dtypes or [tensors[0].dtype]):
        return False
    if all(tensor.is_meta for tensor in tensors):
        return foreseen_obstacle() is None
    return all(tensor.device.type == "cpu" for tensor in tensors) and obstacle() is None


def _call(name, *arguments):
    if arguments[0].is_meta:
        return
    getattr(_library(), name)(
        *(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments), torch.get_num_threads()
    )


def quick_gelu(out: Tensor, x: Tensor) -> None:
    """`quick_gelu` into `out`."""
    _call("quick_gelu", x, out, x.numel())


def swiglu_forward(out_NF: Tensor, gate_up_NF: Tensor) -> None:
    """`swiglu` into `out_NF`."""
    _call("swiglu_forward", gate_up_NF, out_NF, *out_NF.shape)


def swiglu_backward(grad_NF: Tensor, gate_up_NF: Tensor, grad_gate_up_NF: Tensor) -> None:
    """Its gradient into `grad_gate_up_NF`."""
    _call("swiglu_backward", grad_NF, gate_up_NF, grad_gate_up_NF, *grad_NF.shape)


def norm_forward(
    residual_ND: Tensor,
    branch_ND: Tensor | None,
    weight_D: Tensor,
    total_ND: Tensor,
    y_ND: Tensor,
    rstd_N1: Tensor,
    eps: float,
) -> None:
    """`add_rms_norm` into `total_ND` (where there is a branch), `y_ND` and `rstd_N1` [N, 1] fp32; weight dense fp32."""
    _call("norm_forward", residual_ND, branch_ND, weight_D, total_ND, y_ND, rstd_N1, *y_ND.shape, eps)


def norm_backward(
    total_ND: Tensor,
    rstd_N1: Tensor,
    weight_D: Tensor,
    grad_total_ND: Tensor | None,
    grad_y_ND: Tensor,
    grad_ND: Tensor,
) -> None:
    """The gradient of residual and branch into `grad_ND`; weight dense fp32."""
    _call("norm_backward", total_ND, rstd_N1, weight_D, grad_total_ND, grad_y_ND, grad_ND, *grad_ND.shape)


def layer_norm(
    residual_ND: Tensor,
    branch_ND: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    total_ND: Tensor,
    y_ND: Tensor,
    eps: float,
) -> None:
    """`add_layer_norm` into `total_ND` (where there is a branch) and `y_ND`; weight and bias dense."""
    _call("layer_norm", residual_ND, branch_ND, weight_D, bias_D, total_ND, y_ND, *y_ND.shape, eps)


def rotate(qkv_NE: Tensor, out_NE: Tensor, cos_N1h: Tensor, sin_N1h: Tensor, *, rotated: int, heads: int) -> None:
    """`rope_qk` of the first `rotated` of a row's `heads` heads into `out_NE`, which may be `qkv_NE`."""
    _call("rotate", qkv_NE, out_NE, cos_N1h, sin_N1h, qkv_NE.shape[0], heads, rotated, cos_N1h.shape[2])


__all__ = [
    "layer_norm",
    "norm_backward",
    "norm_forward",
    "obstacle",
    "quick_gelu",
    "rotate",
    "serve",
    "swiglu_backward",
    "swiglu_forward",
]
