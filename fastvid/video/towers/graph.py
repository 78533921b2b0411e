"""A tower's passes, all of one shape: on a GPU replays of a CUDA graph, elsewhere plain calls.

A pass of a tower launches more than two hundred kernels. Of a graph they are launched together, so that the GPU does
not wait for Python, least of all while other threads of the process decode.

Dimensions: B images of a pass, P patches of an image, K values of a patch row, C channels.
"""

import functools
import logging
import threading
from collections.abc import Callable

import torch
from fastvid_kernels.patch_rows import row_length
from torch import Tensor

from fastvid.video.towers.transformer import VisionTower

log = logging.getLogger("fastvid")

States = Callable[[Tensor], Tensor]  # patch rows [B, P, K] to states [B, P, C]

_WARM_UP = 2  # passes before the capture: kernels are compiled and loaded, libraries choose theirs and make workspaces
_CAPTURING = threading.Lock()  # what begins a capture waits for the whole device, which no stream in capture allows


class GraphedStates:
    """A tower's states of a pass's images or fewer; what is missing of a pass are images of an earlier one.

    Images do not see each other, so that these do not matter.

    Input and output lie at the same place in every call. So an object serves one thread at a time, whose stream must
    be done with one call before another thread makes the next.

    Args:
        tower: `fastvid.video.towers.transformer.VisionTower`.
        batch_size: B, images of every pass.
        device: the tower's.
        capture: makes a replay of a function and its input, as `captured` does, which is the default on a GPU;
            elsewhere there is none. Where it raises RuntimeError, passes are plain calls, and a line says so once.

    Attributes:
        captured: whether calls are replays by now.
    """

    def __init__(
        self,
        tower: VisionTower,
        batch_size: int,
        device: torch.device,
        *,
        capture: Callable[[States, Tensor], Callable[[], Tensor]] | None = None,
    ):
        self._states, self._capture = tower.states, capture or (captured if device.type == "cuda" else None)
        self._replay = None
        self._patches_BPK = torch.zeros(
            batch_size, tower.num_patches, row_length(tower.patch_size), dtype=tower.dtype, device=device
        )

    @property
    def captured(self) -> bool:
        return self._replay is not None

    @torch.no_grad()
    def __call__(self, patches_BPK: Tensor) -> Tensor:
        """States [count, P, C] in the tower's dtype: a view that the next call overwrites.

        Args:
            patches_BPK: patch rows [count, P, K] of at most B images, of any floating dtype and on any device.
        """
        count = len(patches_BPK)
        self._patches_BPK[:count].copy_(patches_BPK)
        if self._capture is not None and self._replay is None:
            try:
                self._replay = self._capture(self._states, self._patches_BPK)
            except torch.OutOfMemoryError:  # whoever calls gives memory back, and tries again
                raise
            except RuntimeError as error:
                self._capture = None
                _tell(str(error).strip().splitlines()[0])
        return (self._states(self._patches_BPK) if self._replay is None else self._replay())[:count]


def captured(states: States, patches_BPK: Tensor) -> Callable[[], Tensor]:
    """A function that computes ``states(patches_BPK)`` of whatever `patches_BPK` then holds, and returns it.

    It returns the same tensor in every call, and works on the stream that is current then. Other threads may work
    meanwhile. See torch.cuda.CUDAGraph.

    Raises:
        RuntimeError: there is no memory for it, or something in it cannot be captured.
    """
    with _CAPTURING, torch.cuda.device(patches_BPK.device):
        own, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(own)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                states(patches_BPK)
        graph = torch.cuda.CUDAGraph()
        # What other threads do, such as allocating for the video that they decode, ends no capture of this one.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            states_BPC = states(patches_BPK)
        own.wait_stream(side)

    def replay():
        graph.replay()
        return states_BPC

    return replay


@functools.cache
def _tell(reason):
    log.warning("no CUDA graph of the vision tower (%s): its kernels are launched one by one", reason)
