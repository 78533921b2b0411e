"""A tower's products with a frozen matrix: as torch multiplies, or in FP8.

Dimensions: N rows, I channels in, O channels out.
"""

import torch
from fastvid_kernels.quantize_fp8 import FP8_CAPABILITY, FP8_SIDE, quantize_fp8, scaled_product
from torch import Tensor
from torch.nn.functional import linear


class Product:
    """x·Wᵀ + b in the dtype of all three: weight [O, I], bias [O]."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        self._weight_OI, self._bias_O = weight_OI, bias_O

    def __call__(self, x_NI: Tensor) -> Tensor:
        """[N, O]."""
        return linear(x_NI, self._weight_OI, self._bias_O)


class Fp8Product:
    """x·Wᵀ + b of factors in e4m3, with a scale per row of x and per output channel of W (arXiv:2209.05433).

    The result has x's dtype. A GPU gives it in bf16; elsewhere the same quantised values are multiplied in fp32.

    Args:
        weight_OI, bias_O: weight and bias, of any floating dtype.

    Raises:
        ValueError: a side of the weight is no multiple of 16.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        if any(side % FP8_SIDE for side in weight_OI.shape):
            raise ValueError(
                f"--tower_dtype fp8: a matrix of the tower is {' × '.join(map(str, weight_OI.shape))}, "
                f"and FP8 units multiply in steps of {FP8_SIDE}; leave the flag out"
            )
        self._weight_OI, self._scale_O = quantize_fp8(weight_OI)
        self._bias_O = bias_O.to(torch.bfloat16 if weight_OI.is_cuda else torch.float32)

    def __call__(self, x_NI: Tensor) -> Tensor:
        """[N, O] in x's dtype."""
        return scaled_product(*quantize_fp8(x_NI), self._weight_OI, self._scale_O, x_NI.dtype, bias_M=self._bias_O)


def check_fp8(device: torch.device) -> None:
    """Whether a device multiplies in FP8, or by the same values in fp32 as a CPU does.

    Raises:
        ValueError: the GPU has no FP8 units.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        name, found = torch.cuda.get_device_name(device), ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ValueError(
            f"--tower_dtype fp8: {name} (compute capability {found}) has no FP8 units, which begin with "
            "8.9 (Ada, Hopper); leave the flag out"
        )
