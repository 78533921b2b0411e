"""NEFTune: uniform noise on the embeddings of text, in training only (arXiv:2310.05914).

Dimensions: N packed rows, D channels of the decoder.
"""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor


class Noise(NamedTuple):
    """What a micro-batch's noise is drawn from.

    Attributes:
        alpha: it lies within ± alpha / √(L · D), L the tokens of the micro-batch's longest sample.
        numbers: the same numbers draw the same noise.
    """

    alpha: float
    numbers: tuple[int, ...]


def generator_of(key: str, device: torch.device) -> torch.Generator:
    """A generator that draws the same for the same key."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest())
    return torch.Generator(device).manual_seed(seed)


def with_noise(x_ND: Tensor, noise: Noise, *, longest: int, video_rows: Tensor) -> Tensor:
    """x with noise on its text rows, [N, D] in its dtype. Rows of videos stay, as in LLaVA under transformers.

    Args:
        longest: tokens of the longest sample, as transformers counts them in a padded batch.
        video_rows: [P] int64, rows that are not text.
    """
    bound = noise.alpha / math.sqrt(max(1, longest) * x_ND.shape[1])
    drawn_ND = torch.empty(x_ND.shape, dtype=torch.float32, device=x_ND.device)
    if not x_ND.is_meta:
        drawn_ND.uniform_(-bound, bound, generator=generator_of(f"embeddings {noise.numbers}", x_ND.device))
    return x_ND + drawn_ND.index_fill_(0, video_rows, 0.0).to(x_ND.dtype)


__all__ = ["Noise", "generator_of", "with_noise"]
