"""AdamW over each rank's shards, the learning-rate schedule, and the latch that a non-finite step closes.

The optimizer sees plain local tensors, never DTensors: torch's fused AdamW runs on them, and so does any other
kernel that knows nothing of sharding.
"""

import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fastvid.parallel import local_shard


def learning_rate(step, *, peak, total_steps, warmup_steps, schedule):
    """Learning rate of update `step` (from 0), as transformers' schedules have it: the first warm-up update uses 0."""
    if step < warmup_steps and schedule != "constant":
        return peak * step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if schedule == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak


class Optimizer:
    """AdamW on local shards with global-norm clipping and a finite latch.

    The first non-finite loss or gradient norm, on any rank, closes the latch on the device: from that update on,
    parameters, moments and step counts stay as they were before it. Nothing here waits for the device; `failed_step`
    is read where the host synchronises anyway.

    Args:
        named_parameters: (name, parameter) pairs that require gradients; fp32, replicated or FSDP2-sharded on dim 0.
        config: learning_rate, weight_decay, adam_beta1/2, adam_epsilon, max_grad_norm.
        device: where the parameters live.
    """

    def __init__(self, named_parameters, config, device):
        self.parameters = dict(named_parameters)
        self.max_norm = config.max_grad_norm
        self.failed_step = torch.full((), -1, dtype=torch.int64, device=device)
        # fp32 shards that share the parameters' storage.
        self.shards = {name: torch.nn.Parameter(local_shard(p.detach())) for name, p in self.parameters.items()}
        # Biases and norms (the vectors) do not decay.
        decayed = [self.shards[name] for name, p in self.parameters.items() if p.ndim >= 2]
        others = [self.shards[name] for name, p in self.parameters.items() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True)

    def step(self, step, lr, loss):
        """Clip, update, and zero the gradients.

        Args:
            step: number of this update, for the latch.
            lr: learning rate of this update.
            loss: this rank's share of the step's loss, a scalar on the device; the shares sum to the loss.

        Returns:
            (loss, gradient norm before clipping), both global, on the device.
        """
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            self.shards[name].grad = None if gradient is None else local_shard(gradient)
        loss, norm = self._global_loss_and_norm(loss)
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.failed_step.masked_fill_((self.failed_step < 0) & bad, step)
        if self.max_norm > 0:
            clip = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([s.grad for s in self.shards.values() if s.grad is not None], clip)
        # torch's fused AdamW leaves parameters, moments and step counts alone where found_inf is 1.
        self.adamw.found_inf = (self.failed_step >= 0).float()
        self.adamw.grad_scale = None
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for name, parameter in self.parameters.items():
            self.shards[name].grad = parameter.grad = None
        return loss, norm

    def _global_loss_and_norm(self, loss):
        """Loss and gradient norm over all ranks, in one all-reduce of two numbers."""
        sharded, replicated = [], []
        for name, shard in self.shards.items():
            if shard.grad is not None:
                (sharded if isinstance(self.parameters[name], DTensor) else replicated).append(shard.grad)
        sums = torch.stack([loss.detach().float(), _square_sum(sharded, loss.device)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        return sums[0], (sums[1] + _square_sum(replicated, loss.device)).sqrt()

    def state_tensors(self):
        """Moments and step counts by name, for a checkpoint; those of sharded parameters as DTensors."""
        tensors = {}
        for name, shard in self.shards.items():
            self._ensure_state(shard)
            for key, value in self.adamw.state[shard].items():
                parameter = self.parameters[name]
                if isinstance(parameter, DTensor) and value.ndim:
                    value = DTensor.from_local(value, parameter.device_mesh, parameter.placements, run_check=False,
                                               shape=parameter.shape, stride=parameter.stride())
                tensors[f"{name}.{key}"] = value
        return tensors

    def _ensure_state(self, shard):
        """Give `shard` the moments that the first update would, so that a checkpoint can be loaded into them."""
        if not self.adamw.state[shard]:
            self.adamw.state[shard].update(
                step=torch.zeros((), dtype=torch.float32, device=shard.device),
                exp_avg=torch.zeros_like(shard), exp_avg_sq=torch.zeros_like(shard))


def _square_sum(gradients, device):
    """Sum of squares of fp32 tensors, on their device."""
    if not gradients:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(gradients)).square().sum()
