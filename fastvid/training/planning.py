"""What a training run's flags mean together: contradictions, and the plan of the run."""

import dataclasses
import logging
import math
import re
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
from fastvid.files import shown
from fastvid.model import quantize
from fastvid.model.attention import Attention
from fastvid.model.config import DecoderConfig, ModelConfig, Precision
from fastvid.model.decoder import RECOMPUTE_MODES
from fastvid.policy import Trainable
from fastvid.training import flops, memory, reporters
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
        tiled: whether to `tile` the frozen decoder.
        estimated: bytes of a step on one rank.
        accumulate_whole: whether ranks of FSDP2 add up whole gradients over micro-batches, which they do where those
            fit (`parallel.set_gradient_sync`).
    """

    precision: Precision
    warmup_steps: int
    decay_steps: int
    layout: str
    recompute: str | int
    tiled: bool
    estimated: int
    accumulate_whole: bool

    @property
    def short(self) -> bool:
        """Whether memory is."""
        return _short(self.recompute)


def checked(config: TrainConfig) -> TrainConfig:
    """The configuration with older names resolved.

    Raises:
        ValueError: flags that contradict each other.
    """
    if config.evaluation_strategy:
        if config.eval_strategy not in ("auto", config.evaluation_strategy):
            raise ValueError(
                f"--evaluation_strategy {config.evaluation_strategy} is the older name of --eval_strategy "
                f"{config.eval_strategy}, and differs; leave one out"
            )
        config = dataclasses.replace(config, eval_strategy=config.evaluation_strategy)
    validates = bool(config.eval_data_path or config.eval_tasks)
    if config.eval_strategy == "auto":
        config = dataclasses.replace(config, eval_strategy="epoch" if validates else "no")
    recompute(config)
    given_memory(config)
    reporters.chosen(config.report_to)
    if not config.trainable:
        raise ValueError(
            "nothing would be trained: --freeze_mm_mlp_adapter freezes the projector, and without "
            "--mm_use_vid_start_end there are no start and end embeddings to tune"
        )
    _check_parity(config)
    _check_lora(config)
    if config.trainable.boundary and config.weight_decay and config.policy.reference_order:
        raise ValueError(
            f"--weight_decay {config.weight_decay}: the reference would shrink its whole embedding table, "
            "which --parity reference does not copy; set it to 0"
        )
    if config.master_dtype == "bfloat16" and not config.bf16:
        raise ValueError("--master_dtype bfloat16 stores what is trained as --bf16 computes with it: add --bf16 True")
    if config.frozen_dtype != "auto":
        _check_frozen_dtype(config)
    if config.shard_size is not None and config.shard != "hybrid":
        raise ValueError(f"--shard_size {config.shard_size} is for --shard hybrid; add that, or leave it out")
    if config.eval_strategy != "no" and not validates:
        raise ValueError(f"--eval_strategy {config.eval_strategy} needs --eval_data_path or --eval_tasks")
    if config.min_lr_ratio and config.lr_scheduler_type not in ("cosine_with_min_lr", "warmup_stable_decay"):
        raise ValueError(
            f"--min_lr_ratio {config.min_lr_ratio} is for schedules that end there; add --lr_scheduler_type "
            "cosine_with_min_lr or warmup_stable_decay, or leave it out"
        )
    if config.lazy_preprocess is not None:
        log.info("--lazy_preprocess is not needed: samples are always tokenized when they are needed")
    if config.gradient_checkpointing:
        log.info("--gradient_checkpointing True means --recompute auto: nothing is recomputed while memory suffices")
    if config.tune_mm_mlp_adapter and not config.mm_use_vid_start_end and config.trainable == Trainable(projector=True):
        log.warning("training the projector only: without --mm_use_vid_start_end there are no other embeddings to tune")
    return config


def with_whole_steps(config: TrainConfig, total_steps: int) -> TrainConfig:
    """The configuration with shares of all steps (those below 1) as numbers of steps, but for the warm-up's."""
    names = ("logging_steps", "eval_steps", "save_steps")
    return dataclasses.replace(config, **{name: _whole(getattr(config, name), total_steps) for name in names})


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Steps of the warm-up."""
    steps = _whole(config.warmup_steps, total_steps) or math.ceil(total_steps * config.warmup_ratio)
    if steps > total_steps and config.lr_scheduler_type != "constant":
        log.warning(
            "--warmup_steps %s: the run ends after %s, before the learning rate has reached --learning_rate",
            f"{steps:,}",
            f"{total_steps:,}",
        )
    return steps


def _whole(steps, total_steps):
    return math.ceil(steps * total_steps) if steps < 1 else int(steps)


def given_memory(config: TrainConfig) -> int | None:
    """Bytes that ``--memory`` names, or None.

    Raises:
        ValueError: it names none.
    """
    if config.memory is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GiB|GB|G)", config.memory, flags=re.IGNORECASE)
    size = float(found[1]) * (10**9 if found[2].lower() == "gb" else 2**30) if found else 0
    if size < 2**20:
        raise ValueError(f"--memory {shown(config.memory)}: give a device's free memory, such as 24GiB or 80GB")
    return int(size)


def _check_parity(config):
    if config.parity != "reference":
        return
    if config.trainable.lora:
        raise ValueError("--lora_enable True: PG-Video-LLaVA has no LoRA, so leave --parity reference out")
    for name, what in (("neftune_noise_alpha", "adds no noise"), ("ema_decay", "averages no weights")):
        if (value := getattr(config, name)) is not None:
            raise ValueError(f"--{name} {value:g}: PG-Video-LLaVA {what}, so leave it or --parity reference out")


def _check_lora(config):
    if config.lora_weights is not None and not config.trainable.lora:
        raise ValueError(
            f"--lora_weights {config.lora_weights}: there are no matrices that could start from it; add --lora_enable "
            "True, or leave it out"
        )
    if config.mm_projector_lr is not None and not config.trainable.projector:
        raise ValueError(
            f"--mm_projector_lr {config.mm_projector_lr:g}: the projector is frozen; leave the flag out, or give "
            "--freeze_mm_mlp_adapter False"
        )


def _check_frozen_dtype(config):
    flag = f"--frozen_dtype {config.frozen_dtype}"
    if config.trainable.decoder:
        raise ValueError(
            f"{flag}: the decoder is trained, so nothing of it is frozen; leave the flag out, or train "
            "the adapter only (--tune_mm_mlp_adapter True), or LoRA (--lora_enable True)"
        )
    if config.parity == "reference":
        raise ValueError(
            f"{flag} rounds the decoder's weights, and --parity reference computes with them as they are; "
            "leave one of the two out"
        )
    if config.frozen_dtype == "fp8" and not config.bf16:
        raise ValueError(f"{flag}: products of FP8 units come out in bf16; add --bf16 True")
    if config.shard not in ("auto", "none"):
        raise ValueError(
            f"{flag} holds the decoder whole on every rank, and --shard {config.shard} shards it; use "
            "--shard auto or none"
        )


def recompute(config: TrainConfig) -> str | int:
    """``--recompute``: "auto", a mode, or a number of layers.

    Raises:
        ValueError: it is something else.
    """
    given = config.recompute
    if given.isdecimal():
        return int(given)
    if given not in ("auto", *RECOMPUTE_MODES):
        raise ValueError(
            f"--recompute {given}: give auto, {', '.join(RECOMPUTE_MODES)}, or how many of the first layers"
        )
    return given


def precision_of(config: TrainConfig) -> Precision:
    """What the run's model is stored and computed in."""
    return Precision(
        compute=torch.bfloat16 if config.bf16 else torch.float32,
        trained=getattr(torch, config.master_dtype),
        frozen=None if config.frozen_dtype == "auto" else config.frozen_dtype,
        fp32_residual=config.policy.fp32_residual,
    )


def check_window(config: TrainConfig, sizes: DecoderConfig) -> None:
    """Refuse samples longer than the model's sliding window: within it, a row attends to all before it.

    Args:
        config: `TrainConfig`.
        sizes: `DecoderConfig`.
    """
    window = sizes.sliding_window
    if window is not None and config.model_max_length > window:
        raise ValueError(
            f"--model_max_length {config.model_max_length}: tokens of {config.model_name_or_path} attend to {window} "
            f"tokens at most (sliding_window), and longer samples are not computed; give --model_max_length {window}"
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
    """Choose what flags such as ``--shard`` and ``--recompute`` leave open; say what memory a step will take.

    Args:
        precision: as `precision_of` tells it.
        loader: the run's largest micro-batches, on any rank, are planned for.
        attention: as `attention_check.settle_attention` settled it.

    Returns:
        The decoder is not tiled where the copies would fill memory, or layers are recomputed to save it.

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
        on_cpu=not of_gpu,
        one_call_per_segment=attention.name == "sdpa" and not other,
    )
    available, of_what = _available(config, world, encodes=_encoders(features))
    wanted = "none" if asked == "auto" else asked
    replicated = memory.estimate(model_config, recompute=wanted, sums_replicated=world.distributed, **options)
    if config.shard in ("full", "hybrid") and not world.distributed:
        log.warning("--shard %s: there is one process, which holds the whole model", config.shard)
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
    tiled, said = False, ""
    if not _short(chosen) and not other and _can_tile(config, precision, layout, world):
        with_copies = memory.estimate(model_config, recompute=chosen, tiled=True, **options)
        tiled = with_copies.total <= _FOR_COPIES * available
        estimate = with_copies if tiled else estimate
        said = f"; frozen matrices are {'' if tiled else 'not '}also held in the layouts that this CPU multiplies" + (
            "" if tiled else ", for which memory is short"
        )
    whole = estimate.total + memory.whole_gradient_bytes(model_config, config.trainable) <= available
    if config.gradient_accumulation_steps > 1 and layout != "replicated" and not whole:
        said += "; every micro-batch's gradient is reduced, for whole gradients do not fit"
    log.info("%s of %.1f GiB%s; %s; %s%s", estimate, available / 2**30, of_what, found, _LAYOUTS[layout], said)
    if estimate.total > available:
        log.warning("a step takes more than there is: try %s", ", ".join(_smaller(config, layout)))
    return Plan(
        precision=precision,
        warmup_steps=warmup_steps(config, loader.order.total_steps),
        decay_steps=_whole(config.decay_steps, loader.order.total_steps),
        layout=layout,
        recompute=chosen,
        tiled=tiled,
        estimated=estimate.total,
        accumulate_whole=whole,
    )


def _short(recompute):
    """Whether whole layers are recomputed, which only a lack of memory is worth."""
    return recompute not in ("none", "selective")


def _smaller(config, layout):
    """What a run might do to take less memory, of what it does not do yet."""
    trained = config.trainable.decoder
    yield "smaller batches"
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
    most = max(largest["rows"], config.per_device_train_batch_size * config.model_max_length)
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
