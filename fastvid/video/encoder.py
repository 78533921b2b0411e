"""Frames to features: patchify → vision tower up to its last layer but one → pooling.

Dimensions: T frames, B frames per pass, P patches per frame, K values of a patch row, R rows of a video's features, C
channels.

Of CLIP's towers the features are those of PG-Video-LLaVA (336 pixels) and Video-ChatGPT (224): ``hidden_states[-2][:,
1:]`` of ``CLIPVisionModel``, pooled, up to the rounding of 16 bits; of SigLIP's likewise (`fastvid.video.towers`).
"""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from fastvid_kernels import frame_patchify, yuv_patchify
from fastvid_kernels.patch_rows import row_length
from torch import Tensor

from fastvid.config.pooling import RECIPE, Pooling
from fastvid.files import StrPath
from fastvid.video.passes import Passes
from fastvid.video.towers.choice import revisions
from fastvid.video.towers.load import open_tower
from fastvid.video.towers.products import check_fp8


def open_device(name: str | torch.device | None = None) -> torch.device:
    """The torch device that a user means; by default a GPU if there is one.

    Raises:
        ValueError: this machine, or this build of torch, has no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); cpu can be used everywhere") from error


def make_current(device: torch.device) -> None:
    """Make a GPU the process's current one: else it would open a context, and pin memory, on the first GPU as well.

    For commands, whose process is their own: a library's caller chooses his own current GPU.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def default_dtype(device: torch.device, plain: bool = False) -> torch.dtype:
    """What a tower computes in unless told: float16 on a GPU; on a CPU bfloat16 if it multiplies that, else float32.

    `plain`: float32 on a CPU in any case.
    """
    if device.type != "cpu":
        return torch.float16
    if plain:
        return torch.float32
    multiplies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if multiplies else torch.float32


class FeatureEncoder:
    """A CLIP, SigLIP or DINO vision tower that turns a video's frames into its features.

    Every pass of the tower has the same number of frames, the last one padded, because the rows of a matrix product
    depend on how many there are: so a video's features depend on nothing but its frames (`fastvid.video.passes`).

    Args:
        tower: Hugging Face folder or hub id of a CLIP, SigLIP or DINO model, or of its vision tower.
        device: default: a GPU if there is one.
        dtype: precision of the tower; default: `default_dtype`, of `plain`.
        batch_size: most frames per pass; evened out, so that 100 frames at 32 are four passes of 25.
        num_temporal: most frames per video, and temporal rows of the features unless `pooling` says otherwise.
        pooling: what a video's rows are, as ``--pooling`` says it.
        fp8: multiply the tower's matrices in FP8, which changes the features.

    Attributes:
        pooling: a `fastvid.config.pooling.Pooling`; rows: of every video's features.
        tower: the `VisionTower`; image_size, patch_size, num_patches, hidden_size are its own.
        revision: what identifies the weights: hub commit, or hash of the folder's files.

    Raises:
        ValueError: the tower is missing, or of no kind that is known; the device is none of this machine's; FP8 is
            asked for where the GPU has no units for it or the tower's sizes do not fit them; `pooling` does not go with
            the frames or the tower's patches.
    """

    def __init__(
        self,
        tower: StrPath,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 32,
        num_temporal: int = 100,
        pooling: str = RECIPE,
        plain: bool = False,
        fp8: bool = False,
    ):
        if batch_size < 1 or num_temporal < 1:
            raise ValueError(f"batch size ({batch_size}) and frames per video ({num_temporal}) must be at least 1")
        self.device = open_device(device)
        self.dtype = dtype or default_dtype(self.device, plain)
        self.num_temporal, self.pooling = num_temporal, Pooling.parse(pooling)
        self.batch_size = -(-num_temporal // -(-num_temporal // batch_size))
        if fp8:
            check_fp8(self.device)
        self.tower = open_tower(tower, self.device, self.dtype, fp8=fp8)
        self.image_size, self.patch_size = self.tower.image_size, self.tower.patch_size
        self.num_patches, self.hidden_size = self.tower.num_patches, self.tower.hidden_size
        self.rows = self.pooling.rows(num_temporal, self.num_patches)
        self._patchify: dict[str, Any] = {
            "size": self.image_size,
            "patch": self.patch_size,
            "mean": self.tower.mean,
            "std": self.tower.std,
            "dtype": torch.float16,
        }
        self.revision = revisions(tower)[0]
        self._idle = []

    def encode(self, frames: Tensor | np.ndarray, *, still: bool = False) -> Tensor:
        """The features of one video, or of an image. From any thread.

        Args:
            frames: [T, H, W, 3] uint8 RGB, tensor or array, 1 ≤ T ≤ num_temporal, any H and W.
            still: they are an image, whose rows are its patches'.

        Returns:
            [R, C] float16, on the CPU. Of the recipe's pooling: frame means, zero rows up to num_temporal, position
            means. Of an image [P, C].

        Raises:
            ValueError: no frames, or too many.
        """
        with self._passes() as passes:
            return passes.one(frames, still=still)

    def encode_patches(self, patches_TPK: Tensor) -> Tensor:
        """The features of one video, as `encode`, of its frames' patch rows as `patch_rows` makes them."""
        with self._passes() as passes:
            return passes.one(patches_TPK=patches_TPK)

    def patch_rows(self, planes: Sequence[tuple[Tensor, Tensor, Tensor]], factors: tuple[int, ...]) -> Tensor:
        """Patch rows [T, P, K] float16 of raw planes [(Y, U, V)] on the device: see `yuv_patchify`."""
        return yuv_patchify(planes, [factors] * len(planes), **self._patchify)

    def frame_rows(self, frames: Tensor) -> Tensor:
        """Patch rows [T, P, K] float16 of frames [T, H, W, 3] uint8 RGB on any device: see `frame_patchify`."""
        return frame_patchify(frames.to(self.device), **self._patchify)

    def empty_patch_rows(self, count: int) -> Tensor:
        """[count, P, K] float16 on the device, for `patch_rows`."""
        return torch.empty(
            count, self.num_patches, row_length(self.patch_size), dtype=torch.float16, device=self.device
        )

    def refuse_count(self, count: int) -> None:
        """Raise ValueError if a video may not have so many frames."""
        if not 1 <= count <= self.num_temporal:
            raise ValueError(f"a video must have 1 to {self.num_temporal} frames, found {count}")

    @contextmanager
    def _passes(self):
        """`Passes` that no other thread has, until their result is there, so that the device is done with them.

        After an exception they are not used again, for the device may not be done.
        """
        try:
            passes = self._idle.pop()
        except IndexError:
            passes = Passes(self)
        yield passes
        self._idle.append(passes)
