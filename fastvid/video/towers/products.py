"""A tower's products with a frozen matrix.

Dimensions: N rows, I channels in, O channels out.
"""

from torch import Tensor
from torch.nn.functional import linear


class Product:
    """x·Wᵀ + b in the dtype of all three: weight [O, I], bias [O]."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        self._weight_OI, self._bias_O = weight_OI, bias_O

    def __call__(self, x_NI: Tensor) -> Tensor:
        """[N, O]."""
        return linear(x_NI, self._weight_OI, self._bias_O)
