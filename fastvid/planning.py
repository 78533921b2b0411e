"""What a training run's flags mean together: contradictions, precision, and the layout that fits into memory."""

import dataclasses
import logging

import torch

from fastvid import flops, parallel
from fastvid.metrics import check_reporters
from fastvid.model import memory, quantize
from fastvid.model.linear import can_tile

log = logging.getLogger("fastvid")

# Batches differ by a few per cent: those of these steps stand for the run's.
_STEPS_LOOKED_AT = 4
# What a step may take for the sake of speed alone: the machine's memory is not this process's alone.
_FOR_COPIES = 0.75
_LAYOUTS = {"replicated": "every rank holds the whole model", "full": "the whole model is sharded over the ranks",
            "hybrid": "the whole model is sharded over some ranks, and copied on the others",
            "trained": "trained parts are sharded over the ranks, frozen ones replicated"}


def checked(config):
    """The configuration with older names resolved.

    Raises:
        ValueError: flags that contradict each other.
    """
    if config.evaluation_strategy:
        config = dataclasses.replace(config, eval_strategy=config.evaluation_strategy)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                 "logging_steps", "save_steps", "eval_steps", "model_max_length"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} {getattr(config, name)}: give 1 or more")
    check_reporters(config.report_to)
    if config.peak_tflops is not None and config.peak_tflops <= 0:
        raise ValueError(f"--peak_tflops {config.peak_tflops:g}: give the device's TFLOP/s, such as 989 for an H200")
    if not config.trainable:
        raise ValueError("nothing would be trained: --freeze_mm_mlp_adapter freezes the projector, and without "
                         "--mm_use_vid_start_end there are no start and end embeddings to tune")
    if "boundary" in config.trainable and config.weight_decay and config.policy.reference_order:
        raise ValueError(f"--weight_decay {config.weight_decay}: the reference would shrink its whole embedding table, "
                         "which --parity reference does not copy; set it to 0")
    if config.master_dtype == "bfloat16" and not config.bf16:
        raise ValueError("--master_dtype bfloat16 stores what is trained as --bf16 computes with it: add --bf16 True")
    if config.frozen_dtype != "auto":
        _check_frozen_dtype(config)
    if config.shard_size is not None and config.shard != "hybrid":
        raise ValueError(f"--shard_size {config.shard_size} is for --shard hybrid; add that, or leave it out")
    if config.eval_strategy != "no" and not config.eval_data_path:
        raise ValueError(f"--eval_strategy {config.eval_strategy} needs --eval_data_path")
    if config.lazy_preprocess is not None:
        log.info("--lazy_preprocess is not needed: samples are always tokenized when they are needed")
    if config.gradient_checkpointing:
        log.info("--gradient_checkpointing True means --recompute auto: nothing is recomputed while memory suffices")
    if config.tune_mm_mlp_adapter and not config.mm_use_vid_start_end and config.trainable == {"projector"}:
        log.warning("training the projector only: without --mm_use_vid_start_end there are no other rows to tune")
    return config


def _check_frozen_dtype(config):
    flag = f"--frozen_dtype {config.frozen_dtype}"
    if "decoder" in config.trainable:
        raise ValueError(f"{flag}: the decoder is trained, so nothing of it is frozen; leave the flag out, or train "
                         "the adapter only (--tune_mm_mlp_adapter True)")
    if config.parity == "reference":
        raise ValueError(f"{flag} rounds the decoder's weights, and --parity reference computes with them as they are; "
                         "leave one of the two out")
    if config.frozen_dtype == "fp8" and not config.bf16:
        raise ValueError(f"{flag}: products of FP8 units come out in bf16; add --bf16 True")
    if config.shard not in ("auto", "none"):
        raise ValueError(f"{flag} holds the decoder whole on every rank, and --shard {config.shard} shards it; use "
                         "--shard auto or none")


def frozen_dtype(config):
    """How a frozen decoder's matrices are stored, as `VideoLlava` takes it."""
    return None if config.frozen_dtype == "auto" else config.frozen_dtype


def compute_dtype(config):
    """Of matrix products, and of frozen weights as they are stored."""
    return torch.bfloat16 if config.bf16 else torch.float32


def trained_dtype(config):
    """Of trained weights as they are stored."""
    return torch.bfloat16 if config.master_dtype == "bfloat16" else torch.float32


def peak_flops(config, world):
    """Operations per second of all devices together that utilisation is stated against, or None."""
    peak = config.peak_tflops and config.peak_tflops * 1e12
    if peak is None and config.bf16 and world.device.type == "cuda":
        peak = flops.peak_flops(torch.cuda.get_device_name(world.device))
    return peak and peak * world.size


def row_budget(config, world):
    """Rows that a step of all ranks has room for under ``--rows_per_batch``, or None."""
    return config.rows_per_batch and config.rows_per_batch * config.gradient_accumulation_steps * world.size


def plan_memory(config, model_config, loader, world):
    """Choose what ``--shard`` and ``--recompute`` leave open, and how to multiply; say what a step will take.

    Args:
        config: `TrainConfig`.
        model_config: `fastvid.model.video_llava.ModelConfig`.
        loader: `fastvid.data.batching.Loader`; the largest batch of the first steps, on any rank, stands for all.
        world: `parallel.World`.

    Returns:
        (layout over ranks as `parallel.shard` takes it, recompute mode, whether to `tile` the frozen decoder: not where
        the copies would fill memory, or ``--recompute full`` asks to save it; whether ranks of FSDP2 add up whole
        gradients over micro-batches, as `parallel.set_gradient_sync` takes it: where they fit)
    """
    if frozen_dtype(config) is not None:
        quantize.check_device(config.frozen_dtype, world.device)
    options = dict(
        _largest_batch(loader, world), trainable=config.trainable, compute_dtype=compute_dtype(config),
        optimizer=config.optim, trained_dtype=trained_dtype(config), world_size=world.size,
        fp32_residual=config.policy.fp32_residual,
        summed=config.gradient_accumulation_steps > 1 or world.distributed,
        frozen_dtype=frozen_dtype(config), one_call_per_segment=world.device.type == "cpu")
    available = parallel.device_memory(world)
    wanted = "none" if config.recompute == "auto" else config.recompute
    replicated = memory.estimate(model_config, recompute=wanted, **options)
    if config.shard in ("full", "hybrid") and not world.distributed:
        log.warning("--shard %s: there is one process, which holds the whole model", config.shard)
    layout = parallel.choose_layout(config.shard, world, decoder_is_trained="decoder" in config.trainable,
                                    fits=replicated.total <= available or frozen_dtype(config) is not None)
    options |= dict(sharded=layout in ("full", "hybrid"), shard_trained=layout != "replicated",
                    summed=config.gradient_accumulation_steps > 1 or layout == "replicated" and world.distributed,
                    world_size=parallel.ranks_of_a_copy(layout, world, config.shard_size))
    recompute = wanted if config.recompute != "auto" else memory.choose_recompute(available, model_config, **options)
    estimate = memory.estimate(model_config, recompute=recompute, **options)
    tiled, said = False, ""
    if recompute != "full" and _can_tile(config, layout, world):
        with_copies = memory.estimate(model_config, recompute=recompute, tiled=True, **options)
        tiled = with_copies.total <= _FOR_COPIES * available
        estimate = with_copies if tiled else estimate
        said = (f"; frozen matrices are {'' if tiled else 'not '}also held in the layouts that this CPU multiplies"
                + ("" if tiled else ", for which memory is short"))
    accumulate_whole = estimate.total + memory.whole_gradient_bytes(model_config, config.trainable) <= available
    if config.gradient_accumulation_steps > 1 and layout != "replicated" and not accumulate_whole:
        said += "; every micro-batch's gradient is reduced, for whole gradients do not fit"
    log.info("%s of %.1f GiB; %s%s", estimate, available / 2**30, _LAYOUTS[layout], said)
    return layout, recompute, tiled, accumulate_whole


def _can_tile(config, layout, world):
    """Whether the decoder is made of whole, frozen matrices whose products may take tiles."""
    return ("decoder" not in config.trainable and frozen_dtype(config) is None and layout in ("replicated", "trained")
            and not config.policy.plain_products and can_tile(compute_dtype(config), world.device))


def _largest_batch(loader, world):
    """Rows of the largest micro-batch of the first steps, as `memory.estimate` takes them.

    Raises:
        ValueError: none of the samples looked at can be trained on.
    """
    loader.samples.check_some()
    largest = {"rows": 1, "supervised_rows": 0, "video_rows": 0, "constant_rows": 0, "key_rows": 0}
    for step in range(min(_STEPS_LOOKED_AT, loader.order.total_steps)):
        for batch in loader.read(step)[0]:
            rows = {"rows": batch.num_rows - batch.frozen_rows, "supervised_rows": batch.num_supervised,
                    "video_rows": len(batch.video_rows), "constant_rows": batch.prefix_rows + batch.frozen_rows,
                    "key_rows": 0 if batch.layout.kv_rows is None else len(batch.layout.kv_rows)}
            largest = max(largest, rows, key=lambda found: found["rows"])
    return max(world.gather_objects(largest), key=lambda found: found["rows"])
