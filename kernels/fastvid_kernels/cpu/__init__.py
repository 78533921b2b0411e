"""The CPU wing's one door: how CPUs compute what a GPU's kernels do.

Elementwise operations are C++ for bf16 where the CPU has AVX512-BF16 and a compiler is there (`rows`), and otherwise
chains of torch's operations, block of rows by block of rows (`row_blocks`). Each stands here as the passes that the
kernel's autograd function takes: (forward, backward). Attention in bf16 is C++ or impossible. Frozen matrices can be
held in the layouts that oneDNN multiplies.
"""

from .attention import avx512_attention
from .attention import obstacle as attention_obstacle
from .feed_forward import SWIGLU, quick_gelu
from .loss import softmax_gradient
from .norm import ADD_RMS_NORM, add_layer_norm
from .prepacked import PrepackedProduct, PrepackedWeight, can_prepack
from .rotary import rotate
from .row_blocks import BLOCK_NUMBERS
from .rows import obstacle as rows_obstacle
from .splice import SPLICE_VIDEO

__all__ = [
    "ADD_RMS_NORM",
    "BLOCK_NUMBERS",
    "SPLICE_VIDEO",
    "SWIGLU",
    "PrepackedProduct",
    "PrepackedWeight",
    "add_layer_norm",
    "attention_obstacle",
    "avx512_attention",
    "can_prepack",
    "quick_gelu",
    "rotate",
    "rows_obstacle",
    "softmax_gradient",
]
