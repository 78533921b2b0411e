"""Frozen matrices in 8 or 4 bits: FP8 for speed, int8 and NF4 for cards that cannot hold them in 16.

- "fp8": each matrix twice in e4m3, once for each product (y = x·Wᵀ and its gradient g·W), with a scale per column of
  that product; rows of x and g are quantised as they come (arXiv:2209.05433). FP8 units multiply; on a CPU the same
  quantised values are multiplied in fp32. As many bytes as bf16. A kernel may have quantised rows already (`Fp8Rows`).
- "int8": a scale per row, the weights of LLM.int8() (arXiv:2208.07339); multiplied in the compute dtype, so that
  outliers of x need no care, and no search for them waits for the GPU. Half the bytes.
- "nf4": blocks of 64 with scales that are themselves quantised (QLoRA, arXiv:2305.14314), by bitsandbytes; multiplied
  in the compute dtype. A quarter of the bytes.

Dimensions: N rows, I inputs and O outputs of a matrix.
"""

import importlib.util
import logging
from typing import Any

import torch
from fastvid_kernels.plain import last_rows
from fastvid_kernels.quantize_fp8 import FP8_CAPABILITY, FP8_SIDE, Fp8Rows, quantize_fp8, scaled_product
from torch import Tensor, nn

log = logging.getLogger("fastvid")

NF4_BLOCK, SCALES_BLOCK = 64, 256


class _Product(torch.autograd.Function):
    """x·Wᵀ of a frozen W. Saves nothing for backward: all that it needs is the matrix."""

    @staticmethod
    def forward(ctx, x_NI, matrix, outputs, every_NI):
        ctx.matrix, ctx.outputs = matrix, outputs
        if every_NI is None:
            return matrix.product(x_NI, outputs)
        return _last(ctx, len(x_NI), matrix.product(every_NI, outputs))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_NO, *_):
        return None if g_NO is None else ctx.matrix.gradient(g_NO, ctx.outputs), None, None, None


def _last(ctx, rows, y_NO):
    """(the last rows, which alone have gradients; all of them)."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(y_NO)
    return last_rows(y_NO, rows), y_NO


class QuantizedLinear(nn.Module):
    """y = x·Wᵀ (+ b) with a frozen W in few bits. Holds none until `quantize_` gives it one; has no parameter but b.

    Its buffers are no part of a state dict: they are made from the model folder's weights whenever a run starts.

    Args:
        bias_dtype: of a frozen bias; None: no bias.
    """

    def __init__(self, inputs: int, outputs: int, *, bias_dtype: torch.dtype | None = None):
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.bias = None
        if bias_dtype is not None:
            self.bias = nn.Parameter(torch.empty(outputs, dtype=bias_dtype), requires_grad=False)

    def forward(
        self, x_NI: Tensor, *, outputs: slice | None = None, every: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x·Wᵀ (+ b), [N, O] in x's dtype.

        Args:
            outputs: compute these columns only, consecutive ones: rows of W. None: all.
            every: as of `fastvid.model.linear.Linear`.
        """
        return _Product.apply(x_NI, self, outputs or slice(None), every)

    def quantize_(self, weight_OI: Tensor) -> None:
        """Hold `weight_OI`, of any floating dtype, on its device."""
        raise NotImplementedError

    def product(self, x_NI: Tensor, outputs: slice) -> Tensor:
        """x·W[outputs]ᵀ (+ b[outputs]) in x's dtype."""
        raise NotImplementedError

    def gradient(self, g_NO: Tensor, outputs: slice) -> Tensor:
        """g·W[outputs] in g's dtype."""
        raise NotImplementedError

    def with_bias(self, y_NO: Tensor, outputs: slice) -> Tensor:
        """A product, to which the bias was added in place."""
        return y_NO if self.bias is None else y_NO.add_(self.bias[outputs])

    def _hold(self, **tensors):
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


class Fp8Linear(QuantizedLinear):
    """Both factors in e4m3, one scale per row of the left and column of the right one."""

    w_OI: Tensor
    scale_O: Tensor
    w_IO: Tensor
    scale_I: Tensor

    def __init__(self, inputs: int, outputs: int, **options: Any):
        super().__init__(inputs, outputs, **options)
        if inputs % FP8_SIDE or outputs % FP8_SIDE:
            raise ValueError(
                f"--frozen_dtype fp8: a matrix of the decoder is {outputs} × {inputs}, and FP8 units "
                f"multiply in steps of {FP8_SIDE}; choose another --frozen_dtype"
            )

    def quantize_(self, weight_OI: Tensor) -> None:
        w_OI, scale_O = quantize_fp8(weight_OI)
        w_IO, scale_I = quantize_fp8(weight_OI.T)
        self._hold(w_OI=w_OI, scale_O=scale_O, w_IO=w_IO, scale_I=scale_I)

    def forward(
        self, x_NI: Tensor | Fp8Rows, *, outputs: slice | None = None, every: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The same, also of rows in e4m3: in the dtype of their stand-in, which gets their gradient. If it has fewer
        rows, these are the last ones, and others stand before, as in `every`."""
        if isinstance(x_NI, Fp8Rows):
            return _ProductOfFp8.apply(*x_NI, self, outputs or slice(None))
        return super().forward(x_NI, outputs=outputs, every=every)

    def product(self, x_NI: Tensor, outputs: slice) -> Tensor:
        return self.product_of_fp8(*quantize_fp8(x_NI), outputs, x_NI.dtype)

    def gradient(self, g_NO: Tensor, outputs: slice) -> Tensor:
        return self.gradient_of_fp8(*quantize_fp8(g_NO), outputs, g_NO.dtype)

    def product_of_fp8(self, bits_NI: Tensor, scale_N: Tensor, outputs: slice, dtype: torch.dtype) -> Tensor:
        """`product` in `dtype` of rows as `quantize_fp8` returns them."""
        y_NO = scaled_product(bits_NI, scale_N, self.w_OI[outputs], self.scale_O[outputs], dtype)
        return self.with_bias(y_NO, outputs)

    def gradient_of_fp8(self, bits_NO: Tensor, scale_N: Tensor, outputs: slice, dtype: torch.dtype) -> Tensor:
        """`gradient` in `dtype` of rows as `quantize_fp8` returns them."""
        return scaled_product(bits_NO, scale_N, self.w_IO[:, outputs], self.scale_I, dtype)


class _ProductOfFp8(torch.autograd.Function):
    """The product of rows in e4m3. Saves nothing either."""

    @staticmethod
    def forward(ctx, stand_in_NI, bits_NI, scale_N, matrix, outputs):
        ctx.matrix, ctx.outputs = matrix, outputs
        y_NO = matrix.product_of_fp8(bits_NI, scale_N, outputs, stand_in_NI.dtype)
        return y_NO if len(stand_in_NI) == len(bits_NI) else _last(ctx, len(stand_in_NI), y_NO)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_NO, *_):
        return None if g_NO is None else ctx.matrix.gradient(g_NO, ctx.outputs), None, None, None, None


class _DequantizedLinear(QuantizedLinear):
    """Multiplies by W as its bits say, in the dtype of the other factor; W exists for the time of a product."""

    def dequantized(self, dtype: torch.dtype, outputs: slice = slice(None)) -> Tensor:
        """W[outputs] in `dtype`."""
        raise NotImplementedError

    def product(self, x_NI, outputs):
        return self.with_bias(x_NI @ self.dequantized(x_NI.dtype, outputs).T, outputs)

    def gradient(self, g_NO, outputs):
        return g_NO @ self.dequantized(g_NO.dtype, outputs)


class Int8Linear(_DequantizedLinear):
    """Integers from −127 to 127, and the step of each row."""

    w_OI: Tensor
    scale_O: Tensor

    def quantize_(self, weight_OI: Tensor) -> None:
        weight_OI = weight_OI.float()
        largest_O = weight_OI.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
        self._hold(w_OI=torch.round(weight_OI * (127.0 / largest_O)[:, None]).to(torch.int8), scale_O=largest_O / 127.0)

    def dequantized(self, dtype: torch.dtype, outputs: slice = slice(None)) -> Tensor:
        w_OI = self.w_OI[outputs]
        # Multiplied in fp32 and rounded once, without a copy in fp32.
        return torch.mul(w_OI, self.scale_O[outputs, None], out=torch.empty_like(w_OI, dtype=dtype))


class Nf4Linear(_DequantizedLinear):
    """Two weights in a byte: places in the table of 16 quantiles of the normal distribution; see bitsandbytes."""

    packed: Tensor
    scales: Tensor
    offset: Tensor
    code: Tensor
    scales_of_scales: Tensor
    code_of_scales: Tensor

    def quantize_(self, weight_OI: Tensor) -> None:
        from bitsandbytes import functional as bnb

        if weight_OI.dtype == torch.float64:
            weight_OI = weight_OI.float()
        packed, state = bnb.quantize_4bit(weight_OI, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
        assert state.state2 is not None, "of compressed statistics"
        self._hold(
            packed=packed,
            scales=state.absmax,
            offset=state.offset,
            code=state.code,
            scales_of_scales=state.state2.absmax,
            code_of_scales=state.state2.code,
        )

    def dequantized(self, dtype: torch.dtype, outputs: slice = slice(None)) -> Tensor:
        from bitsandbytes import functional as bnb

        scales = bnb.QuantState(
            self.scales_of_scales, code=self.code_of_scales, blocksize=SCALES_BLOCK, dtype=torch.float32
        )
        state = bnb.QuantState(
            self.scales,
            shape=(self.outputs, self.inputs),
            code=self.code,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.offset,
            state2=scales,
        )
        return bnb.dequantize_4bit(self.packed, state)[outputs]


FORMATS = {"fp8": Fp8Linear, "int8": Int8Linear, "nf4": Nf4Linear}


def matrix_bytes(frozen_dtype: str, inputs: int, outputs: int) -> int:
    """What a matrix takes in one of `FORMATS`, scales included."""
    weights = inputs * outputs
    if frozen_dtype == "fp8":
        return 2 * weights + 4 * (inputs + outputs)
    if frozen_dtype == "int8":
        return weights + 4 * outputs
    assert frozen_dtype == "nf4"
    blocks = -(-weights // NF4_BLOCK)
    # The two tables and the offset are a matrix's own.
    return -(-weights // 2) + blocks + 4 * -(-blocks // SCALES_BLOCK) + 4 * (16 + 256 + 1)


def check_device(frozen_dtype: str, device: torch.device) -> None:
    """Whether this machine computes with `frozen_dtype`, one of `FORMATS`.

    Raises:
        ValueError: the GPU has no FP8 units, or bitsandbytes is missing; with the remedy.
    """
    if frozen_dtype == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--frozen_dtype nf4 needs bitsandbytes: pip install 'bitsandbytes>=0.50', or choose int8")
    if frozen_dtype == "fp8" and device.type != "cuda":
        log.info("--frozen_dtype fp8 on a CPU: the same quantised values, multiplied in fp32; slower than bf16")
    elif frozen_dtype == "fp8" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        name, found = torch.cuda.get_device_name(device), ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ValueError(
            f"--frozen_dtype fp8: {name} (compute capability {found}) has no FP8 units, which begin with "
            "8.9 (Ada, Hopper); choose auto, int8 or nf4"
        )
