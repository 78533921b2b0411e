"""LoRA: low-rank matrices beside frozen ones (arXiv:2106.09685), one product A for what is computed together.

A layer computes queries, keys and values in one product, and gate and up in another. A's of such targets lie one under
the other, so that x is read once; each target has its own B. The frozen matrix may be stored in any form.

Dimensions: N rows, I inputs and O outputs of a frozen matrix, r rank, R = r · (number of targets), P outputs of the
targets together, T targets of o outputs each that go together.
"""

from typing import NamedTuple

import torch
from fastvid_kernels.dispatch import on_gpu
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastvid.config.policy import Lora
from fastvid.model.config import DecoderConfig
from fastvid.model.linear import Linear
from fastvid.model.noise import generator_of
from fastvid.model.quantize import QuantizedLinear

_MATRICES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


class Beside(NamedTuple):
    """What lies beside one of a layer's frozen matrices.

    Attributes:
        inputs: of the matrix.
        columns: {target: (first, last) of its outputs}, in their order.
    """

    inputs: int
    columns: dict[str, tuple[int, int]]

    @property
    def outputs(self) -> int:
        """Of all targets together."""
        return sum(last - first for first, last in self.columns.values())


def beside(config: DecoderConfig, lora: Lora) -> dict[str, Beside]:
    """{name of a layer's matrix: what lies beside it}, of those matrices that hold a target."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    D, F = config.hidden_size, config.intermediate_size
    sizes = {
        "q_proj": queries,
        "k_proj": keys,
        "v_proj": keys,
        "o_proj": D,
        "gate_proj": F,
        "up_proj": F,
        "down_proj": D,
    }
    inputs = {"qkv": D, "o": queries, "gate_up": D, "down": F}
    found = {}
    for matrix, targets in _MATRICES.items():
        columns, first = {}, 0
        for target in targets:
            if target in lora.targets:
                columns[target] = first, first + sizes[target]
            first += sizes[target]
        if columns:
            found[matrix] = Beside(inputs[matrix], columns)
    return found


def shapes(config: DecoderConfig, lora: Lora) -> dict[str, tuple[int, int]]:
    """{name within a layer: shape} of what LoRA trains there."""
    return {
        f"lora.{matrix}.{which}.weight": shape
        for matrix, found in beside(config, lora).items()
        for which, shape in (
            ("a", (lora.rank * len(found.columns), found.inputs)),
            ("b", (found.outputs, lora.rank)),
        )
    }


class LoraBranch(nn.Module):
    """A frozen matrix's product of x plus scaling · dropout(x)·Aᵀ·Bᵀ, in x's dtype.

    Attributes:
        a, b: `a.weight` [R, I] and `b.weight` [P, r] hold the targets' own one under the other.
        drawn: what the values that dropout leaves out are drawn from; None: it leaves out none.

    Args:
        place: the frozen matrix.
        lora: rank, scaling and dropout.
        dtype: of the parameters.
        inplace: overwrite the product. Not where selective recomputation keeps it.
    """

    def __init__(self, place: Beside, lora: Lora, *, dtype: torch.dtype, inplace: bool):
        super().__init__()
        self.settings, self.place, self.inplace = lora, place, inplace
        self.a = Linear(place.inputs, lora.rank * len(place.columns), dtype=dtype, trained=True)
        self.b = Linear(lora.rank, place.outputs, dtype=dtype, trained=True)
        self.drawn: str | None = None

    def forward(self, matrix: Linear | QuantizedLinear, x_NI: Tensor, outputs: slice | None = None) -> Tensor:
        """[N, O]: the frozen matrix's product of x, with what is added to it.

        Args:
            matrix: the frozen one.
            x_NI: rows.
            outputs: compute these outputs only, those of whole targets; None: all.
        """
        wanted = outputs or slice(None)
        begin, end = wanted.start or 0, wanted.stop
        found = [
            (i, first, last)
            for i, (first, last) in enumerate(self.place.columns.values())
            if first >= begin and (end is None or last <= end)
        ]
        if not found:
            return matrix(x_NI, outputs=outputs)
        # Targets follow each other in A and in B as in the matrix, and so do those that are found.
        r, widths = self.settings.rank, [last - first for first, last in self.place.columns.values()]
        before, width = sum(widths[: found[0][0]]), sum(last - first for _, first, last in found)
        # Used whole, they are not sliced: the gradient of a slice is copied into zeros.
        rows = (slice(r * found[0][0], r * (found[-1][0] + 1)), slice(before, before + width))
        some = rows if len(found) < len(widths) else (None, None)
        a_RI, b_Pr = (each.cast_weight(part, x_NI.dtype) for each, part in zip((self.a, self.b), some))
        columns = tuple((first - begin, last - begin) for _, first, last in found)
        key = None if self.drawn is None or not self.settings.dropout else f"{self.drawn} {begin}"
        settings = columns, self.settings, key, self.inplace
        return _Product.apply(x_NI, a_RI, b_Pr, matrix, outputs or slice(None), settings)


class _Product(torch.autograd.Function):
    """Saves x and x·Aᵀ; what dropout leaves out is drawn again. Both gradients of x are summed as they are made."""

    @staticmethod
    def forward(ctx, x_NI, a_RI, b_Pr, matrix, outputs, settings):
        columns, lora, key, inplace = settings
        y_NO = matrix.product(x_NI, outputs)
        if not inplace:
            y_NO = y_NO.clone()
        dropped_NI, scaling = _dropped(x_NI, lora, key)
        h_NR = _without(x_NI, dropped_NI) @ a_RI.T
        for y_TNo, h_TNr, b_Tor in _by_targets(columns, lora.rank, y_NO, h_NR, b_Pr):
            _add_product(y_TNo, h_TNr, b_Tor.mT, scaling)
        ctx.save_for_backward(x_NI, h_NR, a_RI, b_Pr)
        ctx.settings = columns, lora, key
        ctx.matrix, ctx.outputs = matrix, outputs
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, g_NO):
        x_NI, h_NR, a_RI, b_Pr = ctx.saved_tensors
        columns, lora, key = ctx.settings
        dropped_NI, scaling = _dropped(x_NI, lora, key)
        g_h_NR, g_b_Pr = torch.empty_like(h_NR), torch.empty_like(b_Pr)
        given = _by_targets(columns, lora.rank, g_NO, h_NR, b_Pr)
        for (g_TNo, h_TNr, b_Tor), (_, g_h_TNr, g_b_Tor) in zip(
            given, _by_targets(columns, lora.rank, g_NO, g_h_NR, g_b_Pr)
        ):
            _add_product(g_h_TNr, g_TNo, b_Tor, scaling, beta=0)  # which reads nothing of what it writes to
            _add_product(g_b_Tor, g_TNo.mT, h_TNr, scaling, beta=0)
        g_a_RI = g_h_NR.T @ _without(x_NI, dropped_NI)
        g_x_NI = None
        if ctx.needs_input_grad[0]:
            g_x_NI = ctx.matrix.gradient(g_NO, ctx.outputs)
            if dropped_NI is None:
                g_x_NI.addmm_(g_h_NR, a_RI)
            else:
                g_x_NI.add_((g_h_NR @ a_RI).masked_fill_(dropped_NI, 0))
        return g_x_NI, g_a_RI, g_b_Pr, None, None, None


def _by_targets(columns, rank, y_NO, h_NR, b_Pr):
    """(columns of the product [T, N, o], rows times A's [T, N, r], B's [T, o, r]) of T targets, in the same memory.

    On a GPU targets side by side of the same width go together, in one launch; elsewhere T is 1: a CPU's products of
    many matrices would copy what lies apart.
    """
    widths = [last - first for first, last in columns]
    ends = [last for _, last in columns[:-1]]
    together = on_gpu(y_NO) and len(set(widths)) == 1 and ends == [first for first, _ in columns[1:]]
    sizes = [len(columns)] if together else [1] * len(columns)
    at = 0
    for targets in sizes:
        width, some = widths[at], slice(columns[at][0], columns[at + targets - 1][1])
        before = sum(widths[:at])
        yield (
            y_NO[:, some].unflatten(1, (targets, width)).transpose(0, 1),
            h_NR[:, rank * at : rank * (at + targets)].unflatten(1, (targets, rank)).transpose(0, 1),
            b_Pr[before : before + targets * width].unflatten(0, (targets, width)),
        )
        at += targets


def _add_product(to_Tab, x_Tac, y_Tcb, scaling, beta=1):
    """The product of each x and y, times `scaling`, added to `beta` times what is there."""
    if len(to_Tab) == 1:
        to_Tab[0].addmm_(x_Tac[0], y_Tcb[0], beta=beta, alpha=scaling)
    else:
        to_Tab.baddbmm_(x_Tac, y_Tcb, beta=beta, alpha=scaling)


def _without(x_NI, dropped_NI):
    return x_NI if dropped_NI is None else x_NI.masked_fill(dropped_NI, 0)


def _dropped(x_NI, lora, key):
    """(bool [N, I], where dropout leaves x out, or None; the factor on the branch), the same for the same key.

    A value takes 16 random bits, a quarter of a draw: drawing costs a CPU as much as the products do.
    """
    if key is None:
        return None, lora.scaling
    count, steps = x_NI.numel(), 1 << 16
    left_out = min(round(lora.dropout * steps), steps - 1)
    draws = torch.empty(-(-count // 4), dtype=torch.int64, device=x_NI.device)
    if not x_NI.is_meta:
        draws.random_(-(1 << 63), None, generator=generator_of(key, x_NI.device))
    dropped = draws.view(torch.int16)[:count] < left_out - steps // 2
    return dropped.view_as(x_NI), lora.scaling * steps / (steps - left_out)


def delta(a_rI: Tensor, b_Or: Tensor, lora: Lora) -> Tensor:
    """What a target's A and B add to its frozen matrix, [O, I] fp32."""
    return (b_Or.float() @ a_rI.float()) * lora.scaling


def draw_dropout(model: nn.Module, what: tuple[int, ...] | None) -> None:
    """From now on, dropout leaves out values drawn from these numbers and from the place in the model; None: none.

    The same numbers leave out the same values, in backward, under recomputation and when a run is repeated.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraBranch):
            module.drawn = None if what is None else f"{what} {name}"


__all__ = ["Beside", "LoraBranch", "beside", "delta", "draw_dropout", "shapes"]
