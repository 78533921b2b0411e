"""Whether a call takes the Triton kernel; and how a kernel is launched."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from triton import knobs

# Triton decides when a kernel is decorated, so this module and the kernels, imported together, agree.
INTERPRETED: bool = knobs.runtime.interpret
_STOOD_FOR = ContextVar("stood_for", default="cpu")
_WATCHERS: list[Callable[[Any, tuple, dict], object]] = []


@contextmanager
def meta_stands_for(device_type: str) -> Iterator[None]:
    """Within this context meta tensors are treated as those of "cuda" or "cpu" are; otherwise, as those of "cpu".

    Functions allocate what they would there, for whoever counts it. Nothing is launched, called or compiled.
    """
    token = _STOOD_FOR.set(device_type)
    try:
        yield
    finally:
        _STOOD_FOR.reset(token)


@contextmanager
def watch_launches(watcher: Callable[[Any, tuple, dict], object]) -> Iterator[None]:
    """Within this context `watcher` is called with every kernel that is launched, its arguments, and those by name.

    In every thread, as a GPU's backward has its own. Also with those that are not launched, as their tensors are
    "meta": for whoever counts what they would move.
    """
    _WATCHERS.append(watcher)
    try:
        yield
    finally:
        _WATCHERS.remove(watcher)


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether it lies on a GPU, or stands for a tensor that does."""
    return tensor.is_cuda or (tensor.is_meta and _STOOD_FOR.get() == "cuda")


def use_triton(impl: str, *tensors: torch.Tensor, name: str) -> bool:
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
    kernel = all(on_gpu(tensor) for tensor in tensors)
    if any(tensor.device != tensors[0].device for tensor in tensors) and any(tensor.is_cuda for tensor in tensors):
        raise ValueError(f"{name}: all tensors must lie on one device, found {_devices(tensors)}")
    if impl == "auto":
        return kernel or (INTERPRETED and os.environ.get("TRITON_INTERPRET") == "1")
    if not (kernel or INTERPRETED):
        raise ValueError(
            f"{name}: impl='triton' needs CUDA tensors, found {_devices(tensors)}; use impl='auto', or "
            "set TRITON_INTERPRET=1 before fastvid_kernels is imported to interpret the kernel"
        )
    return True


def _devices(tensors):
    return ", ".join(sorted({str(tensor.device) for tensor in tensors}))


def refuse_gradients(*tensors: torch.Tensor, name: str) -> None:
    """Refuse to compute what a gradient would have to come back through, for operations that have none.

    Raises:
        ValueError: gradients are on, and a tensor requires one.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(f"{name} has no gradient, and one of its inputs requires one; call it under torch.no_grad()")


def launch(kernel: Any, grid: tuple, *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)`` on the device of the first argument, a tensor.

    Triton launches on the process's current device, whatever device the arguments' addresses are of. On meta tensors
    nothing is launched.
    """
    for watcher in _WATCHERS:
        watcher(kernel, arguments, options)
    if arguments[0].is_meta:
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)


__all__ = ["INTERPRETED", "launch", "meta_stands_for", "on_gpu", "refuse_gradients", "use_triton", "watch_launches"]
