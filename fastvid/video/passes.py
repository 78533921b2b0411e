"""Frames of videos through the tower, in passes of a fixed number of frames; the rests of several videos share a pass.

Dimensions: B frames of a pass, T frames of a video, P patches per frame, K values of a patch row, C channels, R rows of
a video's features, as its pooling makes them.

A frame's states must not depend on what else is in its pass, nor on its place there: else a video's features would
depend on the videos that happened to be decoded beside it. Matrix products of a fixed shape keep to that on every
device we know. Whether they do here is asked twice before the first pass is shared: of one frame at every place of a
pass, and of the same frame beside others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fastvid_kernels import grid_pool, spatio_temporal_pool
from torch import Tensor

from fastvid.video.towers.graph import GraphedStates

if TYPE_CHECKING:
    from fastvid.video.encoder import FeatureEncoder


@dataclass
class Features:
    """The features of one video, which may still be on their way from the GPU.

    Attributes:
        key: what the video was added as.
        seconds: that the thread of the tower spent on its passes.
    """

    key: Any
    seconds: float
    _features_RC: Tensor | None = None
    _copied: torch.cuda.Event | None = None
    _error: Exception | None = None

    def result(self) -> Tensor:
        """[R, C] float16 on the CPU. Waits for the device; from any thread.

        Raises:
            torch.OutOfMemoryError: there was no memory for a pass of it.
        """
        if self._error is not None:
            raise self._error
        if self._copied is not None:
            self._copied.synchronize()
        assert self._features_RC is not None
        return self._features_RC


@dataclass
class _Video:
    """A video of which some frames are still to come to the tower."""

    key: Any
    count: int
    rows: Callable[[int, int], Tensor]  # patch rows [n, P, K] from a frame on
    still: bool = False
    begun: int = 0
    seconds: float = 0.0
    states_TPC: Tensor | None = None
    error: Exception | None = None


class Passes:
    """From one thread at a time, whose stream must be done before another thread takes over.

    Args:
        encoder: `fastvid.video.encoder.FeatureEncoder`.

    Attributes:
        notes: what a user should know, a line each.
    """

    def __init__(self, encoder: FeatureEncoder):
        self.encoder, self.notes = encoder, []
        self._states = GraphedStates(encoder.tower, encoder.batch_size, encoder.device)
        self._waiting, self._shares = deque(), None  # whether passes may be shared; None: not known yet

    @property
    def waits(self) -> bool:
        """Whether a video waits for others to fill a pass with, or for `flush`."""
        return bool(self._waiting)

    @torch.no_grad()
    def add(
        self,
        key: Any,
        frames: Tensor | np.ndarray | None = None,
        patches_TPK: Tensor | None = None,
        *,
        still: bool = False,
    ) -> list[Features]:
        """Compute what fills passes: the whole ones of this video, then rests of several.

        Args:
            key: returned with the features.
            frames: [T, H, W, 3] uint8 RGB, tensor or array; or None.
            patches_TPK: patch rows on the device, in place of frames.
            still: it is an image, whose features are its patches' alone.

        Returns:
            those videos that are done now.

        Raises:
            ValueError: no frames, or too many.
        """
        B, encoder = self.encoder.batch_size, self.encoder
        whole = patches_TPK if frames is None else torch.as_tensor(frames)
        assert whole is not None, "frames, or patch rows of them"
        encoder.refuse_count(len(whole))
        if frames is None:
            video = _Video(key, len(whole), lambda start, n: whole[start : start + n], still)
        else:
            video = _Video(key, len(whole), lambda start, n: encoder.frame_rows(whole[start : start + n]), still)
        while video.count - video.begun >= B and video.error is None:
            self._run([(video, B)])
        if video.error is not None or video.begun == video.count:
            return [self._done(video)]
        self._waiting.append(video)
        done = []
        while self._waiting and (self._shares is False or self._rests() >= B):
            done += self._rest()
        return done

    @torch.no_grad()
    def flush(self) -> list[Features]:
        """Compute what is left, though it does not fill a pass; the videos that are done now."""
        done = []
        while self._waiting:
            done += self._rest()
        return done

    def one(
        self,
        frames: Tensor | np.ndarray | None = None,
        patches_TPK: Tensor | None = None,
        *,
        still: bool = False,
    ) -> Tensor:
        """The features of one video alone, as `Features.result` gives them; otherwise as `add`."""
        return (self.add(None, frames, patches_TPK, still=still) or self.flush())[0].result()

    def _rests(self):
        return sum(video.count - video.begun for video in self._waiting)

    def _rest(self):
        """Compute one pass of what waits; the videos that are done now."""
        parts, room = [], self.encoder.batch_size
        for video in self._waiting:
            n = min(room, video.count - video.begun)
            if n:
                parts.append((video, n))
            room -= n
            if not room or self._shares is False:
                break
        self._run(parts)
        done = [video for video, _ in parts if video.begun == video.count or video.error is not None]
        for video in done:
            self._waiting.remove(video)
        return [self._done(video) for video in done]

    def _run(self, parts):
        """Compute the next `n` frames of each video, [(video, n)], in one pass; a second time with memory given back.

        Without memory for it these videos fail, and no other.
        """
        start = time.perf_counter()
        error = _short_of_memory(lambda: self._compute(parts))
        if error is not None:
            torch.cuda.empty_cache()
            error = _short_of_memory(lambda: self._compute(parts))
        if error is not None:
            for video, _ in parts:
                video.error, video.states_TPC = error, None
        for video, n in parts:
            video.begun += n
            video.seconds += time.perf_counter() - start

    def _compute(self, parts):
        rows = [video.rows(video.begun, n) for video, n in parts]
        if len(parts) > 1 and self._shares is None:
            self._shares = self._can_share(rows)
            if not self._shares:
                self.notes.append(
                    "frames of several videos do not share passes of the tower: here its numbers depend "
                    "on a frame's place"
                )
        if len(parts) > 1 and not self._shares:
            for part, own in zip(parts, rows):
                self._keep([part], self._states(own))
        else:
            self._keep(parts, self._states(torch.cat(rows) if len(rows) > 1 else rows[0]))

    def _can_share(self, rows):
        """Whether a frame has the same states, to the bit, at every place of a pass, and beside any others."""
        frame_1PK, B = rows[-1][:1], self.encoder.batch_size
        everywhere_BPC = self._states(frame_1PK.expand(B, -1, -1)).view(torch.int16).clone()
        beside_others_1PC = self._states(torch.cat([*rows[:-1], frame_1PK]))[-1:].view(torch.int16)
        return bool((everywhere_BPC == beside_others_1PC).all())

    def _keep(self, parts, states_BPC):
        """Copy the states of a pass, which the next one overwrites, to the videos that they are of."""
        encoder, start = self.encoder, 0
        for video, n in parts:
            if video.states_TPC is None:
                video.states_TPC = torch.empty(
                    video.count, encoder.num_patches, encoder.hidden_size, dtype=torch.float16, device=encoder.device
                )
            video.states_TPC[video.begun : video.begun + n].copy_(states_BPC[start : start + n])
            start += n

    def _done(self, video):
        features = Features(video.key, video.seconds)
        features._error = video.error or _short_of_memory(lambda: self._pool(video, features))
        return features

    def _pool(self, video, features):
        features_RC = self._pooled(video)
        if features_RC.device.type != "cuda":
            features._features_RC = features_RC.cpu()
            return
        # Through pinned memory, so that the next pass is queued meanwhile. The device may not be the current one.
        with torch.cuda.device(features_RC.device):
            on_host = torch.empty(features_RC.shape, dtype=features_RC.dtype, pin_memory=True)
            on_host.copy_(features_RC, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        features._features_RC, features._copied = on_host, copied

    def _pooled(self, video):
        pooling, states_TPC = self.encoder.pooling, video.states_TPC
        if video.still:  # the states of its patches: means over frames are those of the only one
            return spatio_temporal_pool(states_TPC, num_temporal=1)[1:].clone()
        if not pooling.grids:
            return spatio_temporal_pool(states_TPC, num_temporal=self.encoder.num_temporal)
        groups = [grid_pool(states_TPC, grid, over_time=pooling.over_time) for grid in pooling.grids]
        return torch.cat(groups) if len(groups) > 1 else groups[0]


def _short_of_memory(compute) -> torch.OutOfMemoryError | None:
    """Call `compute`: the error if there is no memory for it.

    Without the error's traceback, which would keep what was computed so far.
    """
    try:
        compute()
    except torch.OutOfMemoryError as error:
        error.__context__ = None
        return error.with_traceback(None)
    return None
