"""Ranks, devices, and who holds which parameter.

Layouts of a model over ranks:

- replicated: every rank holds everything; gradients of the trained parameters are summed in one all-reduce.
- trained parts sharded: FSDP2 shards what is trained; the frozen backbone is replicated, so that no step gathers it.
- full: FSDP2 shards every decoder layer too; their norms stay replicated where the residual stream alone is fp32.
- hybrid: as full, but over the ranks of a node alone; each node holds a copy, and gradients are summed over copies.
"""

import contextlib
import gc
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter

from fastvid.dist import host_memory
from fastvid.dist.collective import gather
from fastvid.dist.heartbeat import Heartbeat, what_follows
from fastvid.dist.reduction import ReduceScatterIn, all_reduce_in
from fastvid.dist.rendezvous import mesh_of, store_of_this_attempt

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Attributes:
        rank, size, local_rank: as torchrun numbers them; 0, 1, 0 for a single process.
        device: where this rank computes.
        distributed: whether a process group exists.
        local_size: ranks on this node.
        heartbeat: by which the ranks know of each other's death, or None.
        timeout: of a collective; None: whatever the process group has.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    distributed: bool
    local_size: int = 1
    heartbeat: Heartbeat | None = None
    timeout: timedelta | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_on_host(self, values: Sequence[float]) -> list[float]:
        """Sum a short list of numbers over ranks without touching the GPU (gloo); every rank gets the sums."""
        if not self.distributed:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather_objects(self, value: T) -> list[T]:
        """What every rank says, in rank order, on every rank."""
        return gather(value) if self.distributed else [value]


def start(seconds: int = 1200) -> World:
    """Join the process group that torchrun describes, or stand alone without one.

    Args:
        seconds: a rank that lives but does not come to a collective ends the job after this.

    Raises:
        ValueError: this is one of several processes that know nothing of each other.
    """
    timeout = timedelta(seconds=seconds)
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not distributed:
        _check_alone()
    else:
        _check_numbers()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        use_expandable_segments()
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not distributed:
        return World(0, 1, local_rank, device, False)
    gc.collect()  # process groups of an earlier job in this process: a forked child that collected one would hang in it
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = store_of_this_attempt(store, rank, size, timeout)
    heartbeat = Heartbeat(store, rank, size)
    # With its device NCCL connects here and now, and fails here if it cannot.
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    heartbeat.start()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return World(rank, size, local_rank, device, True, local_size, heartbeat, timeout)


# Variables by which launchers other than torchrun number the processes that they start, and the number of processes.
_LAUNCHERS = (
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpirun", "PMI_RANK", "PMI_SIZE"),
)


def _check_numbers():
    """Refuse variables that are no numbers of a rank, as of a script that sets them by hand."""
    size = os.environ["WORLD_SIZE"]
    if not size.isdecimal() or int(size) < 1:
        raise ValueError(f"WORLD_SIZE is {size!r}, not the number of processes; start them with torchrun")
    rank, local_rank = os.environ["RANK"], os.environ.get("LOCAL_RANK", "0")
    if not rank.isdecimal() or int(rank) >= int(size):
        raise ValueError(f"RANK is {rank!r}, not one of 0 to {int(size) - 1}; start the processes with torchrun")
    if not local_rank.isdecimal():
        raise ValueError(f"LOCAL_RANK is {local_rank!r}, which is no number; start the processes with torchrun")


def _check_alone():
    """Refuse to be one of several processes that each take themselves for the only one."""
    for launcher, rank, size in _LAUNCHERS:
        if int(os.environ.get(size, 1)) < 2 or rank not in os.environ:
            continue
        said = (
            f"{launcher} started {os.environ[size]} processes ({size}), and none knows of the others (RANK is not "
            f"set): each would train alone. Start one torchrun per node ({launcher} torchrun … -m fastvid.train, "
            "scripts/launch_train.slurm)"
        )
        if size == "SLURM_NTASKS" and os.environ[rank] == "0":  # or the batch script's own process
            logging.getLogger("fastvid").warning("if %s; if this is the only one, all is well", said)
            return
        raise ValueError(said)


def use_expandable_segments() -> None:
    """Let the GPU's memory grow in place, where the user has not set up torch's allocator otherwise.

    Each batch has another number of rows, so that freed blocks seldom fit the next one's tensors. Call before the first
    of them.
    """
    if {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
        return
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # Should torch have read its environment already.
    tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if tell is not None:
        tell(os.environ["PYTORCH_ALLOC_CONF"])


def compute_repeatably(always: bool) -> None:
    """Whether kernels that may differ from one run to the next are refused. Call before the first matrix product."""
    if always:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself with a fixed workspace only
    torch.use_deterministic_algorithms(always)
    # Else every torch.empty is a pass over its memory.
    memory: Any = torch.utils.deterministic  # a module whose class has the property
    memory.fill_uninitialized_memory = not always


@contextlib.contextmanager
def speaking_once(world: World) -> Iterator[None]:
    """Let only rank 0 speak of what all ranks find alike (set-up); afterwards each speaks for itself."""
    logger = logging.getLogger("fastvid")
    level = logger.level
    if not world.is_main:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def finish(world: World) -> None:
    """Leave the process group, all ranks together: one that left while another still writes could end it as well.

    Not for a rank that fails: it must end at once, so that its launcher sees it and ends the others.
    """
    if world.distributed:
        world.gather_objects(None)
        if world.heartbeat:
            world.heartbeat.stop()
        dist.destroy_process_group()


@contextlib.contextmanager
def naming_the_dead(world: World) -> Iterator[None]:
    """Say whose death made a collective fail, where one did.

    Raises:
        ConnectionError: names the ranks that have died.
    """
    try:
        yield
    except RuntimeError as error:
        dead = world.heartbeat.silent_ranks() if world.heartbeat else []
        if not dead:
            raise
        raise ConnectionError(f"rank {world.rank} lost {', '.join(dead)}. {what_follows()}") from error


def device_memory(world: World) -> int:
    """Bytes that every rank may use: the least that any of them has, so that all plan alike."""
    return min(world.gather_objects(_memory_of_this_rank(world)))


def _memory_of_this_rank(world):
    """Its GPU's free memory, or its share of the machine's."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    return host_memory.total() // world.local_size


def check_same(flags: Mapping[str, Any], world: World) -> None:
    """Refuse ranks that were given different flags: they would wait for each other, or train on other data than told.

    Raises:
        ValueError: on every rank; names the first flag that differs, and where.
    """
    found = world.gather_objects(dict(flags))
    for rank, others in enumerate(found):
        for name, value in found[0].items():
            if others.get(name) != value:
                raise ValueError(
                    f"--{name} is {value} on rank 0 and {others.get(name)} on rank {rank}: give all ranks the same "
                    "flags"
                )


def choose_layout(shard: str, world: World, *, decoder_is_trained: bool, fits: bool) -> str:
    """The layout that ``--shard`` asks for.

    Args:
        shard: "auto", "full", "hybrid" or "none".
        decoder_is_trained: whether the decoder's own weights get gradients.
        fits: whether a rank's memory holds a replicated backbone.

    Returns:
        "replicated", "trained" (FSDP2 over what is trained), "full" or "hybrid".
    """
    if not world.distributed or shard == "none":
        return "replicated"
    if shard == "hybrid":
        return "hybrid"
    if shard == "full" or decoder_is_trained or not fits:
        return "full"
    return "trained"


def ranks_of_a_copy(layout: str, world: World, shard_size: int | None = None) -> int:
    """How many ranks hold one copy of what `layout` shards.

    Args:
        shard_size: of "hybrid"; None: the ranks of a node.

    Raises:
        ValueError: copies of that size do not fill the ranks.
    """
    if layout != "hybrid":
        return 1 if layout == "replicated" else world.size
    size = shard_size or world.local_size
    if size < 2 or world.size % size:
        raise ValueError(
            f"--shard hybrid over copies of {size} of {world.size} ranks: give a --shard_size of 2 or "
            "more that divides the number of ranks, or --shard full"
        )
    return size


def shard(
    model: Module,
    world: World,
    layout: str,
    *,
    shard_size: int | None = None,
    adds_up_shards: bool = False,
    reduce_dtype: torch.dtype = torch.float32,
) -> None:
    """Shard `model` (on the meta device) over the ranks, in place, as `layout` says.

    Gradients are summed, not averaged: the loss is already divided by the global count of supervised tokens.
    They are kept in fp32, whatever the precision of the parameters that compute, and summed over copies in it.

    Args:
        shard_size: see `ranks_of_a_copy`.
        adds_up_shards: whether micro-batches before a step's last reduce gradients, too (`set_gradient_sync`).
        reduce_dtype: what they are sent in within a copy, and summed over its ranks.
    """
    if layout == "replicated":
        return
    size = ranks_of_a_copy(layout, world, shard_size)
    # What micro-batches reduce FSDP2 adds up in fp32 before a sum over copies, else in the weights' dtype: then bf16
    # weights have copies, be it one.
    below_fp32 = any(p.requires_grad and p.dtype != torch.float32 for p in model.parameters())
    mesh = mesh_of(world, size, copies=world.size > size or (adds_up_shards and below_fp32))
    of_model: Any = model.precision
    computes = of_model.compute
    # The residual stream may be fp32 beside bf16 weights, so inputs keep the precision in which they come; embeddings
    # and norms are then not rounded either. What multiplies is cast at use.
    precision, unrounded = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for dtype in (computes if computes != torch.float32 else None, None)
    )
    fp32_residual = computes != of_model.residual
    layers = [  # of a replicated decoder those that hold something trained: LoRA's matrices
        layer
        for layer in model.get_submodule("decoder.layers").children()
        if layout != "trained" or any(p.requires_grad for p in layer.parameters())
    ]
    ignored = {p for p in model.parameters() if not p.requires_grad} if layout == "trained" else set()
    if fp32_residual:
        # A layer's norms would need a unit of their own, which gathers at every call; and how often they are called
        # depends on the batch, so that ranks would wait for each other for ever. They are small: every rank has them.
        ignored |= {layer.get_parameter(f"{norm}.weight") for layer in layers for norm in ("input_norm", "post_norm")}
    trained = [p for p in model.parameters() if p.requires_grad]
    if any(p.dtype != torch.float32 for p in trained):  # a unit of FSDP2's has one dtype: vectors are whole
        ignored |= {p for p in trained if p.ndim == 1}
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision, "ignored_params": ignored}
    whole = {**options, "mp_policy": unrounded} if fp32_residual else options
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model.get_submodule("projector"), **options, reshard_after_forward=False)
    fully_shard(model, **whole, reshard_after_forward=False)
    # While one layer computes the next one is gathered; in backward FSDP2 does so by itself.
    units = [module for module in (model, *layers) if isinstance(module, FSDPModule)]
    for module, following in itertools.pairwise(units):
        module.set_modules_to_forward_prefetch([following])
    sends: Any = ReduceScatterIn(reduce_dtype)  # torch keeps the name of its base to itself
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a plain sum: gloo has no other
            if reduce_dtype != torch.float32:
                module.set_custom_reduce_scatter(sends)


def set_gradient_sync(model: Module, last: bool, *, accumulate_whole: bool = False) -> None:
    """What the next backward does with FSDP2's gradients.

    What is not a decoder layer is gathered once per step: it stays until the step's last backward.

    Args:
        last: whether it is the step's last. Gradients are summed over copies of the model (hybrid) then alone.
        accumulate_whole: every rank adds up the whole gradient, which takes 4 bytes per sharded parameter, and the last
            backward reduces it. Otherwise each backward does, and a rank keeps its shard.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not accumulate_whole)
        model.set_requires_all_reduce(last)
        projector = model.get_submodule("projector")
        assert isinstance(projector, FSDPModule), "its parts are sharded with the model"
        for module in (model, projector):
            module.set_reshard_after_backward(last, recurse=False)


def reshard(model: Module) -> None:
    """Let go of parameters that FSDP2 gathered for a forward pass without backward."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextlib.contextmanager
def gathered(model: Module) -> Iterator[None]:
    """Within it every rank holds the whole of what FSDP2 sharded, and its modules may be called without the others.

    All ranks enter it and leave it, after a forward pass of the whole model, which tells FSDP2 where that begins.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    layers = [unit for unit in units if unit not in (model, model.get_submodule("projector"))]
    try:
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
        for unit in units:
            unit.unshard()
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
        reshard(model)


def sum_replicated_gradients(
    parameters: Iterable[Parameter], world: World, *, reduce_dtype: torch.dtype = torch.float32
) -> None:
    """Sum the gradients of replicated parameters over ranks, in place, in one all-reduce.

    Args:
        reduce_dtype: what they are sent and summed in; float32: as they are.
    """
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if world.distributed and gradients:
        all_reduce_in(reduce_dtype, gradients)
