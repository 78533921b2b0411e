"""Which implementation a call takes: the Triton kernel, C++, or plain torch."""

import os

import torch
import triton

from . import avx512_rows

# Triton decides when a kernel is decorated, so this module and the kernels, imported together, agree.
INTERPRETED: bool = triton.knobs.runtime.interpret


def use_triton(impl, *tensors, name):
    """Whether `impl` means the Triton kernel for these tensors.

    "auto" takes the kernel for CUDA tensors, and anywhere under Triton's interpreter while ``TRITON_INTERPRET=1``.

    Args:
        impl: "auto", "triton" or "reference".
        tensors: everything that the kernel would read.
        name: of the operation, for messages.

    Raises:
        ValueError: no such `impl`, or "triton" where the kernel cannot run.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"{name}: impl must be 'auto', 'triton' or 'reference', found {impl!r}")
    if impl == "reference":
        return False
    on_gpu = all(tensor.is_cuda for tensor in tensors)
    if impl == "auto":
        return on_gpu or (INTERPRETED and os.environ.get("TRITON_INTERPRET") == "1")
    if not (on_gpu or INTERPRETED):
        devices = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        raise ValueError(f"{name}: impl='triton' needs CUDA tensors, found {devices}; use impl='auto', or set "
                         "TRITON_INTERPRET=1 before fastvid_kernels is imported to interpret the kernel")
    return True


def choose(impl, *tensors, name, dtypes):
    """The implementation of a kernel that `avx512_rows` has too: "triton", "avx512" or "torch".

    "auto" takes C++ for bf16 on CPUs with AVX512-BF16 where `use_triton` takes no kernel.

    Args:
        impl: "auto", "triton", "avx512" or "reference".
        tensors: everything that the kernel would read.
        name: of the operation, for messages.
        dtypes: of the rows that it reads and writes.

    Raises:
        ValueError: no such `impl`, or one that cannot run here.
    """
    if impl == "avx512":
        if reason := _avx512_obstacle(tensors, dtypes):
            raise ValueError(f"{name}: impl='avx512' is impossible: {reason}; use impl='auto'")
        return "avx512"
    if use_triton(impl, *tensors, name=name):
        return "triton"
    return "avx512" if impl == "auto" and _avx512_obstacle(tensors, dtypes) is None else "torch"


def _avx512_obstacle(tensors, dtypes):
    if any(dtype != torch.bfloat16 for dtype in dtypes) or any(tensor.device.type != "cpu" for tensor in tensors):
        return "it is for bfloat16 on the CPU"
    return avx512_rows.obstacle()


__all__ = ["INTERPRETED", "choose", "use_triton"]
