"""Bytes that tensors hold, counted as operations make them and as they go."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts storages that are created in this context, on any device, "meta" included.

    Attributes:
        now: bytes of those that are alive.
        peak: the most that ever were; whoever measures in phases sets it back to `now`.
    """

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in [*args, *(kwargs or {}).values()] if self._seen(t)}
        results = function(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, (tuple, list)) else [results]:
            if self._seen(tensor) and tensor.untyped_storage()._cdata not in given:
                self._add(tensor.untyped_storage())
        return results

    @staticmethod
    def _seen(value):
        """Whether it is a tensor with a storage: oneDNN's own have none."""
        return isinstance(value, torch.Tensor) and not value.is_mkldnn

    def _add(self, storage):
        key = storage._cdata
        if key in self.storages and self.storages[key][0]() is not None:
            return
        size = storage.nbytes()

        def gone(_):
            self.now -= size

        self.storages[key] = weakref.ref(storage, gone), size
        self.now += size
        self.peak = max(self.peak, self.now)
