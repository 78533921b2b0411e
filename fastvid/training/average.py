"""An exponential moving average of what is trained: smoother than the last step's weights, and often better."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from fastvid.dist.sharding import local_shard, sharded_like


class Average:
    """In fp32, of each rank's shards, whatever dtype the parameters have.

    Checkpoints hold it as their "model", so that whatever reads them takes it, and the parameters as "training".

    After update t (from 0) it keeps the share min(`decay`, (1 + t) / (10 + t)) of itself, as diffusers' EMAModel and
    TensorFlow's moving averages do: the weights that training began with are soon forgotten.

    Args:
        parameters: what is trained, by name; the average begins as their values.
        decay: below 1.
    """

    def __init__(self, parameters: Mapping[str, Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values = {name: self._local(name).float().clone() for name in parameters}

    def _local(self, name):
        return local_shard(self.parameters[name].detach())

    @torch.no_grad()
    def update(self, step: int, failed_step: Tensor) -> None:
        """Take in the parameters after update `step`.

        Args:
            failed_step: [] int64 on the device; from 0 on the average stays as it is (`Optimizer.failed_step`).
        """
        share = 1.0 - min(self.decay, (1 + step) / (10 + step))
        weight = torch.where(failed_step < 0, share, 0.0).float()  # on the device: the host waits for nothing
        for name, value in self.values.items():
            value.lerp_(self._local(name).float(), weight)

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a checkpoint; those of sharded parameters as DTensors."""
        return {name: sharded_like(self.parameters[name], value) for name, value in self.values.items()}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it, the parameters are the average, rounded to their dtype. They take as much memory once more."""
        trained = {name: self._local(name).clone() for name in self.values}
        try:
            for name, value in self.values.items():
                self._local(name).copy_(value)
            yield
        finally:
            for name, value in trained.items():
                self._local(name).copy_(value)
