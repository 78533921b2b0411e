"""Attention of answers that grow by one row each, whose prompts may begin alike.

Queries that share the beginning of their keys meet it in one product of matrices, which reads it once. (The same idea:
arXiv:2402.05099.) Each answer's own keys are few.

Dimensions: B answers, R rows of the buffer, P rows of a beginning, L rows behind it, H query heads, K key/value heads,
G = H / K, d channels per head.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from fastvid.batch import AttentionLayout

Run = tuple[int, int]  # consecutive rows: the first, and how many


@dataclass(frozen=True)
class Sharing:
    """Consecutive queries whose keys begin alike.

    Attributes:
        first, rows: of the beginning, in the buffer.
        own_BL: [B, L] int64, rows of each query's other keys; those that it does not have are any row.
        hidden_BL: [B, L] fp32, 0, or minus infinity where it has none.
    """

    first: int
    rows: int
    own_BL: Tensor
    hidden_BL: Tensor


@dataclass(frozen=True)
class DecodingLayout:
    """Which rows of a buffer the next row of each answer attends to.

    Attributes:
        alone: of the first queries, whose keys are a run of rows each; None without such.
        shared: of the queries behind them.
    """

    alone: AttentionLayout | None
    shared: tuple[Sharing, ...]

    @staticmethod
    def of(alone: Sequence[Run], shared: Iterable[tuple[Run, Sequence[Run]]]) -> "DecodingLayout":
        """From runs of rows.

        Args:
            alone: a run for each query, in the order of their rows.
            shared: (run of the beginning, a run for each query) of each group.
        """
        return DecodingLayout(_of_runs(alone) if alone else None, tuple(_sharing(*group) for group in shared))

    def map(self, function: Callable[[Tensor], Tensor]) -> "DecodingLayout":
        """The same layout with `function`, which leaves values alone, applied to every tensor."""
        return DecodingLayout(
            self.alone and self.alone.map(function),
            tuple(
                replace(each, own_BL=function(each.own_BL), hidden_BL=function(each.hidden_BL)) for each in self.shared
            ),
        )

    @property
    def sizes_alone(self) -> tuple[int, int]:
        """Queries of `alone`, and rows of the buffer up to the last of their keys."""
        if self.alone is None:
            return 0, 0
        queries, keys = self.alone.lengths
        return sum(queries), sum(keys)


def _of_runs(runs):
    """One query for each run. Rows between those are keys of segments without queries."""
    queries, keys, at = [], [], 0
    for first, rows in runs:
        if first > at:
            queries.append(0)
            keys.append(first - at)
        queries.append(1)
        keys.append(rows)
        at = first + rows
    return AttentionLayout.of_lengths(queries, keys)


def _sharing(beginning, own):
    firsts_B1, rows_B1 = torch.tensor(own)[:, :, None].unbind(1)
    steps_L = torch.arange(int(rows_B1.max()))
    there_BL = steps_L < rows_B1
    hidden_BL = torch.zeros(there_BL.shape).masked_fill_(~there_BL, float("-inf"))
    first, rows = beginning
    return Sharing(first, rows, firsts_B1 + steps_L * there_BL, hidden_BL)


def shared_attention(q_NHd: Tensor, k_RKd: Tensor, v_RKd: Tensor, groups: tuple[Sharing, ...]) -> Tensor:
    """Scaled dot-product attention of the queries of `groups`, one group behind the other; scale is d**-0.5.

    Returns:
        [N, H, d]. The softmax is fp32.
    """
    sizes = [len(group.own_BL) for group in groups]
    assert list(accumulate(sizes))[-1] == len(q_NHd)
    return torch.cat([_of_group(q_BHd, k_RKd, v_RKd, group) for q_BHd, group in zip(q_NHd.split(sizes), groups)])


def _of_group(q_BHd, k_RKd, v_RKd, group):
    (answers, _, d), kv_heads, rows = q_BHd.shape, k_RKd.shape[1], group.rows
    q_BKGd = q_BHd.unflatten(1, (kv_heads, -1)) * d**-0.5
    q_KBGd = q_BKGd.transpose(0, 1)
    k_KPd, v_KPd = (x[group.first : group.first + rows].transpose(0, 1) for x in (k_RKd, v_RKd))
    k_BKLd, v_BKLd = (x[group.own_BL].transpose(1, 2) for x in (k_RKd, v_RKd))
    s_KBGP = (q_KBGd.flatten(1, 2) @ k_KPd.transpose(1, 2)).unflatten(1, (answers, -1))
    s_BKGL = (q_BKGd @ k_BKLd.transpose(2, 3)).float() + group.hidden_BL[:, None, None]
    p_BKGM = torch.cat([s_KBGP.transpose(0, 1).float(), s_BKGL], -1).softmax(-1).to(v_RKd.dtype)
    p_BKGP, p_BKGL = p_BKGM.split([rows, p_BKGM.shape[-1] - rows], -1)
    shared_KBGd = (p_BKGP.transpose(0, 1).flatten(1, 2) @ v_KPd).unflatten(1, (answers, -1))
    return (shared_KBGd.transpose(0, 1) + p_BKGL @ v_BKLd).flatten(1, 2)
