"""What a row of the kernels' benchmark is made of."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

import torch
from fastvid_kernels.dispatch import INTERPRETED


@dataclass(frozen=True)
class Case:
    """One job of one kernel at one shape.

    Attributes:
        kernel: name of the public function.
        job: "forward", "backward", or what else tells this kernel's cases apart.
        shapes: {letter: size, "dtype": …}, for the reader.
        make: (generator, device) → the inputs, fresh at every call.
        ways: {name: inputs → call without arguments}; "ours" first. The calls return a tensor or a tuple of them.
        expected: way that returns what all must: the plain reference, in fp32 or wider.
        bytes: least that must move through memory, or 0 where FLOPs count.
        flops: that the job takes at least, or 0 where bytes count.
        tolerance: of the comparison; None for the dtype's own.
        looser: {way: its own tolerance}, of ways that round more often than the kernel, or elsewhere.
    """

    kernel: str
    job: str
    shapes: dict
    make: Callable
    ways: dict
    expected: Callable
    bytes: int = 0
    flops: int = 0
    tolerance: float | None = None
    looser: dict = field(default_factory=dict)

    @property
    def name(self):
        sizes = " ".join(f"{letter}={size}" for letter, size in self.shapes.items() if letter != "dtype")
        return f"{self.job} {sizes} {self.shapes['dtype']}".strip()


@dataclass(frozen=True)
class Gradients:
    """Way of timing a function's backward alone: the forward is run while preparing.

    Attributes:
        function: inputs without the last one → a tensor or a tuple of them.
        wrt: places of the inputs whose gradients are due. The last input holds the incoming gradients, in a tuple.
    """

    function: Callable
    wrt: tuple = field(default=(0,))

    def __call__(self, *inputs):
        *inputs, incoming = inputs
        due = [inputs[place].detach().requires_grad_() for place in self.wrt]
        for place, leaf in zip(self.wrt, due):
            inputs[place] = leaf
        outputs = self.function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return lambda: torch.autograd.grad(outputs, due, incoming)


def ways_of(way, functions):
    """{name: way of timing} of {name: function}."""
    return {name: way(function) for name, function in functions.items()}


def forward(function):
    """Way of timing a function as it is, without gradients."""
    return lambda *inputs: torch.no_grad()(partial(function, *inputs))


def in_fp32(way):
    """A way, given its inputs in fp32."""

    def wide(x):
        if isinstance(x, tuple):
            return tuple(map(wide, x))
        return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return lambda *inputs: way(*map(wide, inputs))


class Later:
    """A function that is made when it is first called: imports and compilers start only where their rows are
    measured."""

    def __init__(self, make):
        self.make, self.function = make, None

    def __call__(self, *inputs):
        if self.function is None:
            self.function = self.make()
        return self.function(*inputs)


def with_compiled(functions):
    """`functions` with "torch.compile" of the eager one, on CUDA: on a CPU it would want a C++ compiler."""
    if torch.cuda.is_available():
        functions["torch.compile"] = Later(lambda: torch.compile(functions["eager"], dynamic=False))
    return functions


def library(package, name, make, *, triton=False):
    """{name: what `make` returns, made when it is first called} if the package is installed and can run here, else {}.

    It runs on a GPU; one written in Triton also where Triton is interpreted.
    """
    there = (torch.cuda.is_available() or (triton and INTERPRETED)) and find_spec(package)
    return {name: Later(make)} if there else {}


def normal(generator, device, *shape, dtype=torch.bfloat16, scale=1.0):
    """Random normal numbers, drawn on the device."""
    return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)
