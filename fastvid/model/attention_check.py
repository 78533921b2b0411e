"""Which attention a model uses, settled when it is built: on a GPU the first library that proves to be right there.

Dimensions: N query rows, M key/value rows, H query heads, K key/value heads, d channels per head.
"""

import functools
import logging
from dataclasses import replace
from functools import partial

import torch

from fastvid.batch import AttentionLayout, Branches
from fastvid.model.attention import SDPA, Attention, choose_attention, gpu_libraries
from fastvid.model.flash import kernel_obstacle, said

log = logging.getLogger("fastvid")

# How much further than SDPA in the same dtype a library's values or gradients may lie from SDPA's in fp32, as a part of
# the largest: 4 units in bf16's last place, and as much again as SDPA. A wrong mask or head shifts them by tens of
# percent.
TRUSTED = 2**-6


def settle_attention(
    implementation: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    channels: int,
    *,
    gradients: bool = True,
) -> Attention:
    """What a model is to attend by for as long as it lives.

    Under "auto" on a GPU no library is trusted for being there. Each, best first, computes two small segments with the
    model's heads, once per process. One that raises, or differs from SDPA, costs a warning, and the next is tried. The
    one that is taken, or named, then computes branches in parts. Where that fails, it serves without: keys are
    gathered.

    Args:
        implementation: as of `choose_attention`; of what is named only the parts are tested, for nobody named these.
        device, dtype: of the model's queries, keys and values.
        heads, kv_heads, channels: H, K, d.
        gradients: test them, and branches, too. Without, as inference has neither, no library compiles its backward.

    Raises:
        ValueError: `implementation` is none, or cannot be used here.
    """
    # A library may refuse to be repeatable: what was tested without is another thing.
    asked = device, dtype, (heads, kv_heads, channels), gradients, torch.are_deterministic_algorithms_enabled()
    if implementation != "auto" or kernel_obstacle(device, dtype):
        found = choose_attention(implementation, device, dtype, channels)
    else:
        found = _first_that_is_right(*asked)
    return _with_right_parts(found, *asked) if gradients else replace(found, parts=None)


@functools.cache
def _first_that_is_right(device, dtype, sizes, gradients, repeatable):
    for library in gpu_libraries(device):
        if not (fault := _fault(library, _two_segments(), device, dtype, sizes, gradients)):
            return library
        log.warning("attention: %s is not used: %s", library, fault)
    return SDPA


@functools.cache
def _with_right_parts(attention, device, dtype, sizes, gradients, repeatable):
    """The same without parts, where these fail."""
    if attention.parts is None:
        return attention
    fault = _fault(attention, _branches(), device, dtype, sizes, gradients)
    if not fault:
        return attention
    log.warning("attention: keys of shared videos are gathered, for %s fails in parts: %s", attention, fault)
    return replace(attention, parts=None)


def _two_segments():
    """Of unequal queries and keys, where masks may be aligned in two ways."""
    return AttentionLayout.of_lengths([40, 133], [200, 150])


def _branches():
    """Two beginnings, behind a segment of its own; two branches of the first one, and one of the second."""
    own, keys = [20, 150, 70, 40, 9, 33], [20, 150, 70, 190, 159, 103]
    runs = [(0, 20), (20, 150), (170, 70), (20, 150), (240, 40), (20, 150), (280, 9), (170, 70), (289, 33)]
    kv_rows = torch.cat([torch.arange(size) + first for first, size in runs])
    branches = Branches(AttentionLayout.of_lengths(own), AttentionLayout.of_lengths([49, 33], [150, 70]), 240, 20)
    return AttentionLayout.of_lengths(own, keys, kv_rows, branches)


def _fault(library, layout, device, dtype, sizes, gradients):
    """Why a library cannot be trusted with such queries, keys and values, or None."""
    heads, kv_heads, channels = sizes
    lengths = layout.lengths
    layout = layout.map(lambda tensor: tensor.to(device))
    queries, keys = sum(lengths[0]), sum(lengths[1] if layout.kv_rows is None else lengths[0])
    random = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    shapes = (queries, heads), (keys, kv_heads), (keys, kv_heads)
    tensors = [random(*shape, channels).to(dtype) for shape in shapes]
    grad_NHd = random(queries, heads, channels).to(dtype)

    def results(function, tensors):
        leaves = [x.requires_grad_(gradients) for x in tensors]
        with torch.set_grad_enabled(gradients):
            out_NHd = function(*leaves, layout)
        return out_NHd, *(torch.autograd.grad(out_NHd, leaves, grad_NHd.to(out_NHd.dtype)) if gradients else ())

    def distances(found):
        return [((ours - true).abs().max() / true.abs().max()).item() for ours, true in zip(found, exact)]

    exact = results(SDPA, [x.float() for x in tensors])
    usual = distances(results(SDPA, [x.clone() for x in tensors]))
    try:
        errors = distances(results(library, tensors))
    except Exception as error:  # whatever a broken installation raises
        return f"it raises {said(error)}"
    names = "values", "queries' gradients", "keys' gradients", "values' gradients"
    return next(
        (
            f"its {name} differ from SDPA's by {error:.2g} of the largest"
            for name, error, limit in zip(names, errors, usual)
            if not error <= 2 * limit + TRUSTED
        ),
        None,
    )
