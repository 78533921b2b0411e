"""Batches on their way to the device: copied on a stream of their own, one ahead of the one in use."""

from collections.abc import Iterable, Iterator

import torch

from fastvid.batch import PackedBatch


class Staging:
    """Copies batches to `device`.

    On a GPU the copies lie on a side stream, so that they wait for no computation and no computation waits for any but
    its own; the host waits for none, if the batches are in page-locked memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copies(self, batches: Iterable[PackedBatch]) -> Iterator[PackedBatch]:
        """Yield each of `batches` on the device, while the next is being copied."""
        ahead = None
        for batch in batches:
            begun = self._begin(batch)
            if ahead is not None:
                yield self._ready(*ahead)
            ahead = begun
        if ahead is not None:
            yield self._ready(*ahead)

    def _begin(self, batch):
        if self._stream is None:
            return batch.to(self.device), None
        with torch.cuda.stream(self._stream):
            return batch.to(self.device, non_blocking=True), self._stream.record_event()

    def _ready(self, batch, event):
        if event is not None:
            user = torch.cuda.current_stream(self.device)
            user.wait_event(event)

            def used_by_user(tensor):  # its memory, of the side stream's pool, is not free before the user is done
                tensor.record_stream(user)
                return tensor

            batch.map(used_by_user)
        return batch
