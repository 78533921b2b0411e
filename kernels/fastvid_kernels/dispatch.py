"""Whether a call takes the Triton kernel; and how a kernel is launched."""

import os

import torch
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
        ValueError: no such `impl`, "triton" where the kernel cannot run, or tensors of a GPU and another device.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"{name}: impl must be 'auto', 'triton' or 'reference', found {impl!r}")
    if impl == "reference":
        return False
    on_gpu = all(tensor.is_cuda for tensor in tensors)
    if any(tensor.device != tensors[0].device for tensor in tensors) and any(tensor.is_cuda for tensor in tensors):
        raise ValueError(f"{name}: all tensors must lie on one device, found {_devices(tensors)}")
    if impl == "auto":
        return on_gpu or (INTERPRETED and os.environ.get("TRITON_INTERPRET") == "1")
    if not (on_gpu or INTERPRETED):
        raise ValueError(
            f"{name}: impl='triton' needs CUDA tensors, found {_devices(tensors)}; use impl='auto', or "
            "set TRITON_INTERPRET=1 before fastvid_kernels is imported to interpret the kernel"
        )
    return True


def _devices(tensors):
    return ", ".join(sorted({str(tensor.device) for tensor in tensors}))


def refuse_gradients(*tensors, name):
    """Refuse to compute what a gradient would have to come back through, for operations that have none.

    Raises:
        ValueError: gradients are on, and a tensor requires one.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(f"{name} has no gradient, and one of its inputs requires one; call it under torch.no_grad()")


def launch(kernel, grid, *arguments, **options):
    """``kernel[grid](*arguments, **options)`` on the device of the first argument, a tensor.

    Triton launches on the process's current device, whatever device the arguments' addresses are of.
    """
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)


__all__ = ["INTERPRETED", "launch", "refuse_gradients", "use_triton"]
