"""AdamW over each rank's shards, the learning-rate schedule, and the latch that a non-finite step closes.

The optimizer sees plain local tensors, never DTensors: torch's fused AdamW runs on them, and so does any other
kernel that knows nothing of sharding.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from fastvid_kernels.adamw8bit_step import BLOCK_SIZE
from fastvid_kernels.adamw_step import adamw_step
from fastvid_kernels.dispatch import on_gpu
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.functional import pad
from torch.optim.adamw import adamw

from fastvid.config import TrainConfig
from fastvid.dist.sharding import local_shard, ranks_of_a_shard, sharded_like
from fastvid.training.adamw8bit import CPU_CHUNK, AdamW8bit, Piece, round_into, takes_8_bits

log = logging.getLogger("fastvid")

# Elements that torch's fused AdamW takes at once on any CPU; what is left over it computes otherwise, in the last bits.
VECTOR = 64


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    schedule: str,
    decay_steps: int = 0,
    min_ratio: float = 0.0,
) -> float:
    """Learning rate of update `step` (from 0), as transformers' schedules have it: the first warm-up update uses 0.

    Args:
        decay_steps: of "warmup_stable_decay": the last steps, in which it falls along a cosine.
        min_ratio: of that and of "cosine_with_min_lr": where it ends, as a share of `peak`. That begins there too.
    """
    if schedule == "warmup_stable_decay":
        begins = total_steps - decay_steps
        if step < warmup_steps:
            share = step / max(1, warmup_steps)
        else:
            share = 1.0 if step < begins else 0.5 * (1.0 + math.cos(math.pi * (step - begins) / max(1, decay_steps)))
        return peak * (share * (1.0 - min_ratio) + min_ratio)
    if step < warmup_steps and schedule != "constant":
        return peak * step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if schedule == "cosine_with_min_lr":
        return peak * (0.5 * (1.0 + math.cos(math.pi * progress)) * (1.0 - min_ratio) + min_ratio)
    if schedule == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak


class AdamW32:
    """AdamW with fp32 moments, by torch's fused step; of bf16 weights on a GPU by `adamw_step`.

    `state`: {name: {"step": fp32 scalar, "exp_avg", "exp_avg_sq": fp32 of the shard's shape}}, as torch.optim.AdamW's.

    Args:
        pieces: {name: `Piece`}, fp32, or bf16 that is rounded stochastically.
        config: adam_beta1/2, adam_epsilon, weight_decay.
        same_bits: weights and moments get the same bits however they are sharded, which torch on a CPU promises for
            neighbours in a vector only.
    """

    def __init__(self, pieces: Mapping[str, Piece], config: TrainConfig, same_bits: bool):
        self.pieces = pieces
        self.options: dict[str, Any] = {
            "beta1": config.adam_beta1,
            "beta2": config.adam_beta2,
            "eps": config.adam_epsilon,
            "amsgrad": False,
            "maximize": False,
            "fused": True,
        }
        self.weight_decay = config.weight_decay
        self.same_bits = same_bits
        self.state = {
            name: {
                "step": torch.zeros((), dtype=torch.float32, device=piece.local.device),
                "exp_avg": torch.zeros_like(piece.local, dtype=torch.float32),
                "exp_avg_sq": torch.zeros_like(piece.local, dtype=torch.float32),
            }
            for name, piece in pieces.items()
        }

    def step(self, gradients: Mapping[str, Tensor], *, step: int, lr: float, clip: Tensor | None, skip: Tensor) -> None:
        """As `AdamW8bit.step`; fp32 gradients are clipped in place."""
        for decays in (True, False):
            # Biases and norms (the vectors) do not decay.
            chosen = {name: g for name, g in gradients.items() if (len(self.pieces[name].shape) > 1) == decays}
            options = dict(self.options, lr=lr, weight_decay=self.weight_decay if decays else 0.0, found_inf=skip)
            together, counts = {}, []
            for name, gradient in chosen.items():
                local = self.pieces[name].local
                # Elements that fill no vector torch computes otherwise on a CPU; on a GPU there are no vectors.
                if local.dtype == torch.float32 and (on_gpu(local) or not self.same_bits):
                    together[name] = gradient
                elif on_gpu(local):
                    self._step_in_kernel(name, gradient, step, clip, options)
                    counts.append(self.state[name]["step"])
                else:
                    self._step_on_copy(name, gradient, step, clip, options)
            if together:
                self._step_in_place(together, clip, options)
            if counts:
                torch._foreach_add_(counts, 1 - skip)

    def _step_in_place(self, gradients, clip, options):
        if clip is not None:
            torch._foreach_mul_(list(gradients.values()), clip)
        states = [self.state[name] for name in gradients]
        adamw(
            [self.pieces[name].local for name in gradients],
            list(gradients.values()),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            **options,
        )

    def _step_in_kernel(self, name, gradient, step, clip, options):
        piece, state = self.pieces[name], self.state[name]
        settings = {key: options[key] for key in ("lr", "beta1", "beta2", "eps", "weight_decay")}
        adamw_step(
            piece.local,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=step + 1,
            clip=clip,
            skip=options["found_inf"],
            seed=piece.seed,
            first=piece.first,
            **settings,
        )

    def _step_on_copy(self, name, gradient, step, clip, options):
        """A chunk at a time, in fp32 and whole vectors. A skipped step leaves the copies, which round to themselves."""
        piece, state = self.pieces[name], self.state[name]
        tensors = [x.view(-1) for x in (piece.local, gradient, state["exp_avg"], state["exp_avg_sq"])]
        for begin in range(0, piece.local.numel(), CPU_CHUNK):
            weights, _, *moments = parts = [x[begin : begin + CPU_CHUNK] for x in tensors]
            count = len(weights)
            new, gradient, *averages = (pad(x.float(), (0, -count % VECTOR)) for x in parts)
            if clip is not None:
                gradient = gradient * clip
            average, average_of_squares = averages
            adamw([new], [gradient], [average], [average_of_squares], [], [state["step"].clone()], **options)
            for moment, copy in zip(moments, averages):
                moment.copy_(copy[:count])
            round_into(weights, new[:count], first=piece.first + begin, seed=piece.seed, step=step + 1)
        state["step"] += 1 - options["found_inf"]


class Optimizer:
    """AdamW on local shards with global-norm clipping and a finite latch.

    The first non-finite loss or gradient norm, on any rank, closes the latch on the device: from that update on,
    parameters, moments and step counts stay as they were before it. Nothing here waits for the device; `failed_step`
    is read where the host synchronises anyway.

    Args:
        named_parameters: (name, parameter) pairs that require gradients; replicated or FSDP2-sharded on dim 0; fp32, or
            bf16, which is rounded stochastically. From now on gradients of replicated bf16 parameters are fp32 where
            they are sums, over micro-batches or ranks: bf16 loses what is small beside the sum.
        config: optim, weight_decay, adam_beta1/2, adam_epsilon, max_grad_norm, seed,
            gradient_accumulation_steps.
        device: where the parameters live.

    Raises:
        ValueError: `optim` needs a package that is missing.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Parameter]], config: TrainConfig, device: torch.device):
        self.parameters = dict(named_parameters)
        self.max_norm = config.max_grad_norm
        self.failed_step = torch.full((), -1, dtype=torch.int64, device=device)
        pieces = {name: Piece.of(name, p, config.seed) for name, p in self.parameters.items()}
        eight_bit = config.optim in ("adamw_8bit", "paged_adamw_8bit")
        coded = {name: piece for name, piece in pieces.items() if eight_bit and takes_8_bits(piece.shape)}
        others = {name: piece for name, piece in pieces.items() if name not in coded}
        if config.gradient_accumulation_steps > 1 or dist.is_initialized():
            for parameter in self.parameters.values():
                if parameter.dtype == torch.bfloat16 and not isinstance(parameter, DTensor):
                    parameter.grad_dtype = torch.float32
        self.rules: list[AdamW32 | AdamW8bit] = [AdamW32(others, config, same_bits=eight_bit)]
        if eight_bit:
            log.info(
                "8-bit moments: %d of %d tensors (matrices whose rows are a multiple of %d); fp32 for the others",
                len(coded),
                len(pieces),
                BLOCK_SIZE,
            )
            self.rules.append(AdamW8bit(coded, config, paged=config.optim == "paged_adamw_8bit"))

    @torch.no_grad()
    def step(self, step: int, lr: float, loss: Tensor, *, projector_lr: float | None = None) -> tuple[Tensor, Tensor]:
        """Clip, update, and zero the gradients.

        Args:
            step: number of this update, for the latch, the bias correction and the random bits; from 0.
            lr: learning rate of this update.
            projector_lr: that of the projector; None: the same.
            loss: this rank's share of the step's loss, a scalar on the device; the shares sum to the loss.

        Returns:
            (loss, gradient norm before clipping), both global, on the device.
        """
        gradients = {name: local_shard(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        loss, norm = self._global_loss_and_norm(loss, gradients)
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.failed_step.masked_fill_((self.failed_step < 0) & bad, step)
        clip = (self.max_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_norm > 0 else None
        skip = (self.failed_step >= 0).float()
        apart = {name for name in gradients if projector_lr is not None and name.startswith("projector.")}
        for rule in self.rules:
            for names, rate in ((gradients.keys() - apart, lr), (apart, projector_lr)):
                chosen = {name: g for name, g in gradients.items() if name in rule.pieces and name in names}
                if chosen and rate is not None:
                    rule.step(chosen, step=step, lr=rate, clip=clip, skip=skip)
        for parameter in self.parameters.values():
            parameter.grad = None
        return loss, norm

    def _global_loss_and_norm(self, loss, gradients):
        """Loss and gradient norm over all ranks, in one all-reduce of two numbers."""
        whole: list[Tensor] = []  # gradients that every rank holds the whole of
        by_copies: dict[int, list[Tensor]] = {}  # {number of ranks that hold the same shard: gradients}
        for name, gradient in gradients.items():
            copies = ranks_of_a_shard(self.parameters[name])
            (whole if copies is None else by_copies.setdefault(copies, [])).append(gradient)
        sums = torch.stack([loss.detach().float(), torch.zeros((), device=loss.device)])
        for copies, sharded in by_copies.items():
            sums[1] += _square_sum(sharded, loss.device) / copies
        if dist.is_initialized():
            dist.all_reduce(sums)
        return sums[0], (sums[1] + _square_sum(whole, loss.device)).sqrt()

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts by name, for a checkpoint; those of sharded parameters as DTensors."""
        return {
            f"{name}.{key}": sharded_like(self.parameters[name], value)
            for rule in self.rules
            for name, state in rule.state.items()
            for key, value in state.items()
        }


def _square_sum(gradients, device):
    """Sum of squares, in fp32, on their device."""
    if not gradients:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).square().sum()
