"""Which implementation a call takes: the Triton kernel or plain torch."""

import os

import triton

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


__all__ = ["INTERPRETED", "use_triton"]
