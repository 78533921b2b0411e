"""What a training run's flags mean together: older names, contradictions, values that no run can have."""

import dataclasses
import logging
import re

from fastvid.config import TrainConfig
from fastvid.config.policy import Trainable
from fastvid.files import shown
from fastvid.model.config import DecoderConfig
from fastvid.model.recompute import RECOMPUTE_MODES
from fastvid.training import reporters

log = logging.getLogger("fastvid")


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
    if config.trainable.boundary and config.weight_decay and config.policy.upstream_order:
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


def _check_parity(config):
    if config.parity != "reference":
        return
    if config.trainable.lora:
        raise ValueError("--lora_enable True: PG-Video-LLaVA has no LoRA, so leave --parity reference out")
    if config.reduce_dtype != "float32":
        raise ValueError(
            f"--reduce_dtype {config.reduce_dtype} rounds gradients that ranks send, and --parity reference sums them "
            "as they are; leave one of the two out"
        )
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
