"""The way from the keys that segments read back to the packed rows that they are copies of.

Dimensions: N packed rows, B queries of the second of two parts, M key rows, H query heads, K key/value heads,
d channels per head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class WayBack:
    """Which keys each packed row is.

    Dimensions: N packed rows, M key rows, C constant rows.

    Attributes:
        starts_N1: [N+1] int32, where each packed row's places begin in `places`, and their end.
        places: int32, the keys that are packed row 0, those that are row 1, …, ascending.
        constant_rows: C.
    """

    starts_N1: Tensor
    places: Tensor
    constant_rows: int

    @staticmethod
    def of(rows_M: Tensor, constant_rows: int, num_rows: int) -> "WayBack":
        """From the row that each key is, of `num_rows` packed rows behind the constant ones. On the CPU."""
        order = rows_M.argsort(stable=True)
        starts_N1 = torch.searchsorted(rows_M[order], torch.arange(num_rows + 1) + constant_rows)
        first = int(starts_N1[0])
        return WayBack((starts_N1 - first).int(), order[first:].int(), constant_rows)

    def map(self, function: Callable[[Tensor], Tensor]) -> "WayBack":
        """The same with `function` applied to both tensors."""
        return WayBack(function(self.starts_N1), function(self.places), self.constant_rows)


class Twice(NamedTuple):
    """Queries and keys that attention reads in two parts, each of which has a gradient of its own.

    Attributes:
        first_query: the second part's queries are this one and all after it.
        keys: so many keys, the first ones, are the first part's.
        first_key: the second part's keys begin with this one.
        shared: so many keys are the second part's.
    """

    first_query: int
    keys: int
    first_key: int
    shared: int

    def split(self, q_NHd: Tensor, k_MKd: Tensor, v_MKd: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of the first part, then of the second, in the same memory."""
        shared = slice(self.first_key, self.first_key + self.shared)
        q_BHd, keys = q_NHd[self.first_query :], self.keys
        return q_NHd, k_MKd[:keys], v_MKd[:keys], q_BHd, k_MKd[shared], v_MKd[shared]


__all__ = ["Twice", "WayBack"]
