"""The plan of a training run: what it decides before it begins, and the memory that it takes."""

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from fastvid_kernels.cpu import can_prepack

from fastvid.batch import PackedBatch
from fastvid.config import TrainConfig
from fastvid.data.largest import largest_steps
from fastvid.data.loader import Loader, TrainingOrder
from fastvid.dist import parallel
from fastvid.dist.parallel import World
from fastvid.model import quantize
from fastvid.model.attention import Attention
from fastvid.model.config import ModelConfig, Precision
from fastvid.training import flops, memory
from fastvid.training.checks import given_memory, recompute
from fastvid.training.layer_memory import masked_pairs

log = logging.getLogger("fastvid")

# So many steps, those with the largest micro-batches, are read, and as many of those with most keys. Where they are
# guessed from the samples' texts, another may still be larger.
_STEPS_LOOKED_AT = 4
_UNSEEN = 1.05
# Of a GPU's free memory: what the allocator cannot fill because blocks differ in size, and libraries' own buffers.
_OF_FREE_GPU = 0.92
# NCCL's buffers: its communicator is there, but takes most of them at the first collective of a kind, and sharding
# over a part of the ranks makes further communicators.
_COMMUNICATORS = 2**30
# An allowance for the process that encodes videos: its context, a large tower in 16 bits, NVDEC's and decoded pictures.
_ENCODER = 6 * 2**30
# What a step may take for the sake of speed alone: the machine's memory is not this process's alone.
_FOR_COPIES = 0.75
_LAYOUTS = {
    "replicated": "every rank holds the whole model",
    "full": "the whole model is sharded over the ranks",
    "hybrid": "the whole model is sharded over some ranks, and copied on the others",
    "trained": "trained parts are sharded over the ranks, frozen ones replicated",
}


@dataclass(frozen=True)
class Plan:
    """What a run has decided before it begins.

    Attributes:
        precision: what the model is stored and computed in.
        warmup_steps, decay_steps: of the learning rate.
        layout: over ranks, as `parallel.shard` takes it.
        recompute: as `fastvid.model.decoder.Decoder` takes it.
        prepacked: whether the frozen decoder is (`Decoder.prepack`).
        estimated: bytes of a step on one rank.
        accumulate_whole: whether ranks of FSDP2 add up whole gradients over micro-batches, which they do where those
            fit (`parallel.set_gradient_sync`).
        told: what a step takes of what, in words.
        lacks: what a run might do to take less, where a step takes more than there is.
        remarks: to be warned of.
    """

    precision: Precision
    warmup_steps: int
    decay_steps: int
    layout: str
    recompute: str | int
    prepacked: bool
    estimated: int
    accumulate_whole: bool
    told: str = ""
    lacks: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def tell(self) -> None:
        """Say what memory a step will take, and what else is to be said; warn where there is less."""
        log.info("%s", self.told)
        for remark in self.remarks:
            log.warning("%s", remark)
        if self.lacks:
            log.warning("a step takes more than there is: try %s", ", ".join(self.lacks))

    @property
    def short(self) -> bool:
        """Whether memory is."""
        return _short(self.recompute)


def with_whole_steps(config: TrainConfig, total_steps: int) -> TrainConfig:
    """The configuration with shares of all steps (those below 1) as numbers of steps, but for the warm-up's."""
    names = ("logging_steps", "eval_steps", "save_steps")
    return dataclasses.replace(config, **{name: _whole(getattr(config, name), total_steps) for name in names})


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Steps of the warm-up."""
    return _whole(config.warmup_steps, total_steps) or math.ceil(total_steps * config.warmup_ratio)


def _remarks(config, world, total_steps):
    """What of the flags will not do what it says."""
    if config.shard in ("full", "hybrid") and not world.distributed:
        yield f"--shard {config.shard}: there is one process, which holds the whole model"
    if config.reduce_dtype != "float32" and not world.distributed:
        yield f"--reduce_dtype {config.reduce_dtype}: there is one process, which sends no gradients"
    if config.learning_rate == 0 and not config.mm_projector_lr:
        yield "--learning_rate 0: no step changes a weight"
    steps = warmup_steps(config, total_steps)
    if steps > total_steps and config.lr_scheduler_type != "constant":
        yield (
            f"--warmup_steps {steps:,}: the run ends after {total_steps:,}, before the learning rate has reached "
            "--learning_rate"
        )


def _whole(steps, total_steps):
    return math.ceil(steps * total_steps) if steps < 1 else int(steps)


def precision_of(config: TrainConfig) -> Precision:
    """What the run's model is stored and computed in."""
    return Precision(
        compute=torch.bfloat16 if config.bf16 else torch.float32,
        trained=getattr(torch, config.master_dtype),
        frozen=None if config.frozen_dtype == "auto" else config.frozen_dtype,
        fp32_residual=config.policy.fp32_residual,
    )


def peak_flops(config: TrainConfig, world: World) -> float | None:
    """Operations per second of all devices together that utilisation is stated against, or None."""
    peak = config.peak_tflops and config.peak_tflops * 1e12
    if peak is None and config.bf16 and world.device.type == "cuda":
        peak = flops.peak_flops(torch.cuda.get_device_name(world.device))
    return peak and peak * world.size


def token_budget(config: TrainConfig, world: World) -> int | None:
    """Tokens that a step of all ranks has room for under ``--tokens_per_batch``, or None."""
    return config.token_budget and config.token_budget * config.gradient_accumulation_steps * world.size


def plan(
    config: TrainConfig,
    precision: Precision,
    model_config: ModelConfig,
    loader: Loader[TrainingOrder],
    world: World,
    attention: Attention,
) -> Plan:
    """Choose what flags such as ``--shard`` and ``--recompute`` leave open, by the memory that a step will take.

    Args:
        precision: as `precision_of` tells it.
        loader: the run's largest micro-batches, on any rank, are planned for.
        attention: as `attention_check.settle_attention` settled it.

    Returns:
        The decoder is not prepacked where the copies would fill memory, or layers are recomputed to save it.

    Raises:
        ValueError: ``--recompute`` has more layers than the model.
    """
    if precision.frozen is not None:
        quantize.check_device(precision.frozen, world.device)
    asked, layers = recompute(config), model_config.decoder.num_layers
    if isinstance(asked, int):
        if asked > layers:
            raise ValueError(f"--recompute {asked}: the model has {layers} layers; give at most as many")
        asked = {0: "none", layers: "full"}.get(asked, asked)
    # A dry run plans for a GPU that this machine need not have.
    other = bool(config.dry_run and config.memory) and world.device.type == "cpu"
    of_gpu = other or world.device.type == "cuda"
    batch, found = _largest_batch(config, loader, world, in_parts=other or attention.parts is not None)
    features = loader.samples.features
    options: dict[str, Any] = dict(
        batch,
        trainable=config.trainable,
        compute_dtype=precision.compute,
        optimizer=config.optim,
        trained_dtype=precision.trained,
        world_size=world.size,
        fp32_residual=precision.fp32_residual,
        summed=config.gradient_accumulation_steps > 1 or world.distributed,
        frozen_dtype=precision.frozen,
        averaged=config.ema_decay is not None,
        sent_rounded=config.reduce_dtype != "float32",
        on_cpu=not of_gpu,
        one_call_per_segment=attention.name == "sdpa" and not other,
    )
    available, of_what = _available(config, world, encodes=_encoders(features))
    wanted = "none" if asked == "auto" else asked
    replicated = memory.estimate(model_config, recompute=wanted, sums_replicated=world.distributed, **options)
    layout = parallel.choose_layout(
        config.shard,
        world,
        decoder_is_trained=config.trainable.decoder,
        fits=replicated.total <= available or precision.frozen is not None,
    )
    options |= {
        "sharded": layout in ("full", "hybrid"),
        "shard_trained": layout != "replicated",
        "sums_replicated": world.distributed and layout == "replicated",
        "summed": config.gradient_accumulation_steps > 1 or (layout == "replicated" and world.distributed),
        "world_size": parallel.ranks_of_a_copy(layout, world, config.shard_size),
    }
    chosen = asked if asked != "auto" else memory.choose_recompute(available, model_config, **options)
    estimate = memory.estimate(model_config, recompute=chosen, **options)
    prepacked, said = False, ""
    if not _short(chosen) and not other and _can_tile(config, precision, layout, world):
        with_copies = memory.estimate(
            model_config, recompute=chosen, prepacked=True, asked=bool(config.eval_tasks), **options
        )
        prepacked = with_copies.total <= _FOR_COPIES * available
        estimate = with_copies if prepacked else estimate
        said = (
            f"; frozen matrices are {'' if prepacked else 'not '}also held in the layouts that this CPU multiplies"
            + ("" if prepacked else ", for which memory is short")
        )
    whole = estimate.total + memory.whole_gradient_bytes(model_config, config.trainable) <= available
    if config.gradient_accumulation_steps > 1 and layout != "replicated" and not whole:
        said += "; every micro-batch's gradient is reduced, for whole gradients do not fit"
    if config.eval_tasks:
        said += _asking(config, model_config, precision, gathered=options["sharded"])
    told = f"{estimate} of {available / 2**30:.1f} GiB{of_what}; {found}; {_LAYOUTS[layout]}{said}"
    return Plan(
        precision=precision,
        warmup_steps=warmup_steps(config, loader.order.total_steps),
        decay_steps=_whole(config.decay_steps, loader.order.total_steps),
        layout=layout,
        recompute=chosen,
        prepacked=prepacked,
        estimated=estimate.total,
        accumulate_whole=whole,
        told=told,
        lacks=() if estimate.total <= available else tuple(_smaller(config, layout)),
        remarks=tuple(_remarks(config, world, loader.order.total_steps)),
    )


def _asking(config, model_config, precision, *, gathered):
    """What benchmarks take at validations, when a step's activations are gone, in words."""
    model = sum(memory.parameter_counts(model_config, config.trainable).values()) * precision.compute.itemsize
    whole = f"{model / 2**30:.1f} GiB for the gathered model and " if gathered else ""
    return (
        f"; not counted: benchmarks take {whole}up to {config.eval_kv_cache_gib:g} GiB for keys and values "
        "(--eval_kv_cache_gib)"
    )


def _short(recompute):
    """Whether whole layers are recomputed, which only a lack of memory is worth."""
    return recompute not in ("none", "selective")


def _smaller(config, layout):
    """What a run might do to take less memory, of what it does not do yet."""
    trained = config.trainable.decoder
    if config.token_budget is not None or config.batch_size > 1:
        yield "smaller batches"
    else:
        yield f"a --model_max_length below {config.model_max_length}"
    if not config.bf16:
        yield "--bf16 True"
    if trained and not (config.optim.endswith("8bit") and config.master_dtype == "bfloat16"):
        yield "--optim adamw_8bit --master_dtype bfloat16"
    if config.frozen_dtype == "auto" and layout != "full":
        yield "--shard full on more ranks"
    if not trained and config.frozen_dtype != "nf4":
        yield "--frozen_dtype nf4"


def _encoders(features):
    """Processes beside this one that make features, of a tower each."""
    return 0 if features is None else sum(bool(each.unmade) for each in features.towers)


def _available(config, world, encodes=0):
    """(Bytes that a rank may plan with, what they are of more in words).

    Args:
        encodes: processes beside this one that make features on the same device.
    """
    given = given_memory(config)
    free = given or parallel.device_memory(world)
    if world.device.type != "cuda" and not given:
        return free, ""
    kept = [
        (size, what)
        for size, what, needed in (
            (_COMMUNICATORS, "NCCL", world.distributed),
            (
                encodes * _ENCODER,
                "the tower that encodes videos" if encodes < 2 else "the towers that encode videos",
                encodes,
            ),
        )
        if needed
    ]
    return (
        int(_OF_FREE_GPU * free) - sum(size for size, _ in kept),
        f" ({_OF_FREE_GPU:.0%} of {free / 2**30:.1f} GiB {'that --memory names' if given else 'free'}"
        + "".join(f", less {size / 2**30:g} GiB for {what}" for size, what in kept)
        + ")",
    )


def _can_tile(config, precision, layout, world):
    """Whether the decoder is made of whole, frozen matrices that this CPU may hold prepacked."""
    return (
        not config.trainable.decoder
        and precision.frozen is None
        and layout in ("replicated", "trained")
        and not config.policy.plain_products
        and can_prepack(precision.compute, world.device)
    )


def _largest_batch(config, loader, world, in_parts):
    """(Rows of the run's largest micro-batches, as `memory.estimate` takes them; how they were found, in words).

    Raises:
        ValueError: none of the samples looked at can be trained on.
    """
    loader.samples.check_some()
    steps, known = largest_steps(loader, _STEPS_LOOKED_AT)
    found = [rows_of(batch, in_parts) for step in steps for batch in loader.read(step, values=False)[0]]
    found += world.gather_objects(_most(found))
    largest = _most(found)
    if known:  # some batch of so many rows may have none that needs no gradient
        largest["rows"] = max(largest["rows"], *world.gather_objects(int(known)))
    if known or len(steps) == loader.order.total_steps:
        return largest, f"the largest micro-batch has {largest['rows']:,} tokens"
    # No batch has more than its samples at their longest.
    most = max(largest["rows"], config.batch_size * config.model_max_length)
    share = min(_UNSEEN, most / largest["rows"])
    largest = {name: math.ceil(number * share) for name, number in largest.items()}
    return largest, (
        f"the largest micro-batch has about {largest['rows']:,} tokens, guessed from the length of the "
        f"texts ({_UNSEEN - 1:.0%} above those read)"
    )


def _most(found):
    """The most of each number in any of the batches."""
    return {name: max(rows[name] for rows in found) for name in found[0]}


def rows_of(batch: PackedBatch, in_parts: bool = False) -> dict[str, int]:
    """What `memory.estimate` asks about a batch on the host: fields of `layer_memory.BatchRows`.

    Args:
        in_parts: attention computes branches in parts, and so gathers no keys of what they go on from.
    """
    live = batch if batch.parts is None else batch.parts[1]
    layout, last = live.layout, live.loss_layout
    assert last is not None and last.kv_rows is not None, "a batch that `pack` made"
    return {
        "rows": batch.num_rows - batch.frozen_rows,
        "supervised_rows": batch.num_supervised,
        "video_rows": len(batch.video_rows),
        "second_rows": batch.second_rows,
        "prefix_rows": batch.prefix_rows,
        "frozen_rows": batch.frozen_rows,
        **_keys(layout, in_parts, ""),
        **_keys(last, in_parts, "last_"),
        "segments": len(layout.cu_seqlens_q) - 1,
        "masked_pairs": masked_pairs(layout),
        "last_masked_pairs": masked_pairs(last),
        "frozen_keys": sum(batch.parts[0].layout.lengths[1]) if batch.parts else 0,
    }


def _keys(layout, in_parts, which):
    branches = layout.branches if in_parts else None
    rows = layout.kv_rows if branches is None else branches.causal.kv_rows
    return {
        f"{which}key_rows": 0 if rows is None else len(rows),
        f"{which}branch_rows": 0 if branches is None else sum(branches.full.lengths[0]),
        f"{which}beginning_rows": 0 if branches is None else branches.sizes[1],
    }
