"""Ranks, devices, and who holds which parameter.

Three layouts of a model over ranks:

- replicated: every rank holds everything; gradients of the trained parameters are summed in one all-reduce.
- trained parts sharded: FSDP2 shards what is trained; the frozen backbone is replicated, so that no step gathers it.
- fully sharded: FSDP2 shards every decoder layer too.
"""

import contextlib
import logging
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Attributes:
        rank, size, local_rank: as torchrun numbers them; 0, 1, 0 for a single process.
        device: where this rank computes.
        distributed: whether a process group exists.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    distributed: bool

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_on_host(self, values):
        """Sum a short list of numbers over ranks without touching the GPU (gloo); every rank gets the sums."""
        if not self.distributed:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather_objects(self, value):
        """What every rank says, in rank order, on every rank."""
        if not self.distributed:
            return [value]
        said = [None] * self.size
        dist.all_gather_object(said, value)
        return said


def start() -> World:
    """Join the process group that torchrun describes, or stand alone without one."""
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not distributed:
        return World(0, 1, local_rank, device, False)
    dist.init_process_group(backend)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, True)


def compute_repeatably(always):
    """Whether kernels that may differ from one run to the next are refused. Call before the first matrix product."""
    if always:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself with a fixed workspace only
    torch.use_deterministic_algorithms(always)


@contextlib.contextmanager
def speaking_once(world):
    """Let only rank 0 speak of what all ranks find alike (set-up); afterwards each speaks for itself."""
    logger = logging.getLogger("fastvid")
    level = logger.level
    if not world.is_main:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def finish(world):
    """Leave the process group, all ranks together: one that left while another still writes could end it as well.

    Not for a rank that fails: it must end at once, so that its launcher sees it and ends the others.
    """
    if world.distributed:
        world.gather_objects(None)
        dist.destroy_process_group()


def device_memory(world):
    """Bytes that every rank may use: the least that any of them has, so that all plan alike."""
    return min(world.gather_objects(_memory_of_this_rank(world)))


def _memory_of_this_rank(world):
    """Its GPU's free memory, or its share of the machine's."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_here


def choose_layout(shard, world, *, decoder_is_trained, fits):
    """The layout that ``--shard`` asks for.

    Args:
        shard: "auto", "full" or "none".
        decoder_is_trained: whether the decoder's own weights get gradients.
        fits: whether a rank's memory holds a replicated backbone.

    Returns:
        "replicated", "trained" (FSDP2 over what is trained) or "full".
    """
    if not world.distributed or shard == "none":
        return "replicated"
    if shard == "full" or decoder_is_trained or not fits:
        return "full"
    return "trained"


def shard(model, world, layout, *, bf16):
    """Shard `model` (on the meta device) over all ranks, in place, as `layout` says.

    Gradients are summed, not averaged: the loss is already divided by the global count of supervised tokens.
    They are reduced in fp32, whatever the precision of the parameters that compute.
    """
    if layout == "replicated":
        return
    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    # The residual stream may be fp32 beside bf16 weights, so inputs keep the precision in which they come.
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False)
    frozen = {p for p in model.parameters() if not p.requires_grad} if layout == "trained" else set()
    options = dict(mesh=mesh, mp_policy=precision, ignored_params=frozen)
    if layout == "full":
        for layer in model.decoder.layers:
            fully_shard(layer, **options)
    fully_shard(model.projector, **options, reshard_after_forward=False)
    fully_shard(model, **options, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain sum: gloo has no other


def set_gradient_sync(model, sync):
    """Whether the next backward reduces FSDP2's gradients over ranks (the step's last) or only adds them up."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


def reshard(model):
    """Let go of parameters that FSDP2 gathered for a forward pass without backward."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def local_shard(tensor):
    """The part of `tensor` that this rank holds: the same storage, as a plain tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(parameter):
    """The whole of a parameter, on the CPU; every rank calls it."""
    whole = parameter.detach()
    return (whole.full_tensor() if isinstance(whole, DTensor) else whole).cpu()


def sum_replicated_gradients(parameters, world):
    """Sum the gradients of replicated parameters over ranks, in place, in one all-reduce."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if not world.distributed or not gradients:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(
        flat.split([g.numel() for g in gradients]), gradients)])
