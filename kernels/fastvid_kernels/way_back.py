"""The way from the keys that segments read back to the packed rows that they are copies of."""

from collections.abc import Callable
from dataclasses import dataclass

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


__all__ = ["WayBack"]
