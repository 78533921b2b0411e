"""How near an FP8 tower's features are to those of the same tower as its weights are, measured in the run itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cosine_similarity

if TYPE_CHECKING:
    from fastvid.video.encoder import FeatureEncoder
    from fastvid.video.pipeline import Prepared


class Fidelity:
    """Compares the features of the first video of a run; that costs it a second tower, until they are compared.

    Args:
        make_encoder: makes the `FeatureEncoder` of the unquantised tower.
    """

    def __init__(self, make_encoder: Callable[[], FeatureEncoder]):
        self._make, self._first, self._line = make_encoder, threading.Lock(), None

    def compare(self, name: str, prepared: Prepared, features_RC: torch.Tensor) -> None:
        """Compare a video's features, unless another's were. From any thread.

        Args:
            name: of the video, for the line.
            prepared: its `fastvid.video.pipeline.Prepared`.
            features_RC: of the FP8 tower, [rows, C] on the CPU.
        """
        if not self._first.acquire(blocking=False):  # never released: another video is, or was, the first
            return
        try:
            encoder = self._make()
            if prepared.patches is not None:
                exact_RC = encoder.encode_patches(prepared.patches)
            else:
                assert prepared.frames is not None
                exact_RC = encoder.encode(prepared.frames, still=prepared.info.still)
        except torch.OutOfMemoryError:
            self._line = "--tower_dtype fp8: there was no memory to compare its features with the unquantised tower's"
            return
        filled_R = exact_RC.norm(dim=1, dtype=torch.float32) > 0
        cosine_R = cosine_similarity(features_RC[filled_R].float(), exact_RC[filled_R].float(), dim=1)
        self._line = (
            f"--tower_dtype fp8: the features of {name} have a cosine of {cosine_R.mean():.5f} to those of "
            f"the unquantised tower on average, {cosine_R.min():.5f} at least"
        )

    def told(self) -> list[str]:
        """The line that says what was found; none before a video was compared."""
        return [] if self._line is None else [self._line]
