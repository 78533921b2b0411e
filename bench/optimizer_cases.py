"""Rows of the optimizer's kernels.

Dimensions: E elements of a shard.
"""

from types import FunctionType

import torch
from fastvid_kernels.adamw8bit_step import adamw8bit_step, adamw8bit_step_reference, dynamic_map
from fastvid_kernels.adamw_step import adamw_step, adamw_step_reference

from bench.cases import Case, Later, library, normal

BLOCK = 256
SETTINGS = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "step": 10}


def _in_place(update, written=(0, 4, 5)):
    """Way of timing an update: returns the arguments `written` to, of 8-bit steps codes aside (a tie may go either
    way)."""

    def prepare(*tensors):
        def call():
            update(*tensors)
            return tuple(tensors[place] for place in written)

        return call

    return prepare


def _case(E, dtype):
    def inputs(generator, device):
        def codes():
            return torch.randint(256, (E,), generator=generator, dtype=torch.uint8, device=device)

        def scales(largest):
            return largest * (0.5 + 0.5 * torch.rand(-(-E // BLOCK), generator=generator, device=device))

        return (
            normal(generator, device, E, dtype=dtype, scale=0.02),
            normal(generator, device, E, dtype=dtype, scale=1e-3),
            codes(),
            codes(),
            scales(1e-3),
            scales(1e-6),
        )

    functions = {
        "ours": lambda *tensors: adamw8bit_step(*tensors, **SETTINGS),
        "eager": lambda *tensors: adamw8bit_step_reference(*tensors, **SETTINGS),
    }
    if torch.cuda.is_available() and dtype == torch.float32:  # the random bits of bf16 parameters are no fair job
        functions["torch.compile"] = Later(_compiled)
    functions |= library("bitsandbytes", "bitsandbytes", _bitsandbytes)
    # Parameter and codes are read and written, the gradient is read; two scales a block are read and written.
    moved = E * (3 * dtype.itemsize + 4) + -(-E // BLOCK) * 16
    shapes = {"E": E, "dtype": str(dtype).removeprefix("torch.")}
    return Case(
        "adamw8bit_step",
        "update",
        shapes,
        inputs,
        {name: _in_place(f) for name, f in functions.items()},
        _in_place(functions["eager"]),
        moved,
        tolerance=2**-7,
    )


def _case_of_32_bits(E):
    """bf16 weights; torch has no step that rounds them stochastically."""

    def inputs(generator, device):
        moments = [normal(generator, device, E, dtype=torch.float32, scale=1e-3) for _ in range(2)]
        return (
            normal(generator, device, E, dtype=torch.bfloat16, scale=0.02),
            normal(generator, device, E, dtype=torch.bfloat16, scale=1e-3),
            moments[0],
            moments[1].square(),
        )

    functions = {
        "ours": lambda *tensors: adamw_step(*tensors, **SETTINGS),
        "eager": lambda *tensors: adamw_step_reference(*tensors, **SETTINGS),
    }
    ways = {name: _in_place(function, (0, 2, 3)) for name, function in functions.items()}
    # Parameter and moments are read and written, the gradient is read.
    return Case(
        "adamw_step", "update", {"E": E, "dtype": "bfloat16"}, inputs, ways, ways["eager"], 22 * E, tolerance=2**-7
    )


def _compiled():
    """The plain step compiled, without its tables: the compiler would make them at each call, on a CPU wrongly."""
    plain = adamw8bit_step_reference
    names = plain.__globals__ | {"dynamic_map": torch.compiler.disable(dynamic_map)}
    step = FunctionType(plain.__code__, names, plain.__name__)
    step.__kwdefaults__ = plain.__kwdefaults__
    return torch.compile(lambda *tensors: step(*tensors, **SETTINGS), dynamic=False)


def _bitsandbytes():
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    def update(param, grad, state1, state2, absmax1, absmax2):
        maps = [dynamic_map(signed, param.device) for signed in (True, False)]
        optimizer_update_8bit_blockwise(
            "adam",
            grad,
            param,
            state1,
            state2,
            SETTINGS["beta1"],
            SETTINGS["beta2"],
            0.0,
            0.0,
            SETTINGS["eps"],
            SETTINGS["step"],
            SETTINGS["lr"],
            *maps,
            absmax1,
            absmax2,
            SETTINGS["weight_decay"],
        )

    return update


def cases(small):
    for dtype in (torch.bfloat16, torch.float32):
        yield _case(1000 if small else 2**26, dtype)
    yield _case_of_32_bits(1000 if small else 2**26)
