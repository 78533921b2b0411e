"""What a run consists of, in a few lines before its first step, and what a dry run tells beyond them."""

import math

import torch

from fastvid import __version__
from fastvid.config import TrainConfig
from fastvid.data.loader import Loader, TrainingOrder
from fastvid.data.tokenizer import ModelTokenizer
from fastvid.dist.parallel import World
from fastvid.model.attention import Attention
from fastvid.model.config import ModelConfig
from fastvid.training import flops, planning
from fastvid.training.memory import parameter_counts
from fastvid.weights.starting import StartingWeights

_NAMES = {
    "boundary": "start and end embeddings",
    "embed": "embedding table",
    "lora": "LoRA",
}  # of other parts: as they are


def overview(
    config: TrainConfig, model_config: ModelConfig, loader: Loader[TrainingOrder], world: World, attention: Attention
) -> list[str]:
    """The samples and steps of a run, videos that it encodes, what it trains, and what computes that.

    Args:
        attention: as `settle_attention` settled it.
    """
    videos = loader.samples.features.told() if loader.samples.features is not None else None
    return [
        _samples(config, loader, world),
        f"prompts: {config.version}",
        *filter(None, [videos]),
        _parameters(config, model_config),
        *filter(None, [_lora(config), _noise(config), _average(config)]),
        _computing(config, world, attention),
    ]


def dry_run_lines(
    config: TrainConfig, model_config: ModelConfig, tokenizer: ModelTokenizer, total_steps: int
) -> list[str]:
    """What a dry run tells beyond `overview`: the formula of operations, and whether the weights fit the model.

    Raises:
        ValueError: weights are there, and do not fit it.
    """
    lines = [f"operations of a step: {flops.Formula(model_config, config.trainable)}"]
    if StartingWeights.exist(config.model_name_or_path):
        starting = StartingWeights(
            model_config,
            config.model_name_or_path,
            tokens=tokenizer.tokens,
            projector=config.pretrain_mm_mlp_adapter,
            seed=config.seed,
            lora=config.trainable.lora,
            adapter=config.lora_weights,
        )
        starting.check()
        lines.append(f"weights: those of {config.model_name_or_path} fit the model")
    else:
        lines.append(f"weights: {config.model_name_or_path} holds none yet; training needs them")
    return [*lines, f"dry run: steps that would follow: {total_steps:,}"]


def _samples(config, loader, world):
    order, files = loader.order, len(config.data_path)
    per_epoch = getattr(order, "samples_per_epoch", len(loader.samples))
    steps = order.total_steps
    epochs = order.epoch_after(steps)
    size = f"{config.token_budget:,} tokens" if config.token_budget else f"{config.batch_size:,} samples"
    batches = " x ".join(
        [
            size,
            *(
                f"{number} {word}"
                for number, word in ((config.gradient_accumulation_steps, "micro-batches"), (world.size, "ranks"))
                if number > 1
            ),
        ]
    )
    return (
        f"data: {len(loader.samples):,} samples in {files} file{'s' * (files > 1)}, {per_epoch:,} an epoch; "
        f"{math.ceil(steps / epochs):,} steps an epoch, {batches} each; {epochs:.4g} epochs, {steps:,} steps"
    )


def _parameters(config, model_config):
    counts = parameter_counts(model_config, config.trainable)
    trained = {part: counts[part] for part in config.trainable if part in counts}  # a tied head is no part
    # The two rows that are trained apart are rows of the table.
    total = sum(count for part, count in counts.items() if part != "boundary")
    number = sum(trained.values())
    return (
        f"trained: {', '.join(f'{_NAMES.get(part, part)} {count:,}' for part, count in trained.items())}; "
        f"{number:,} of {total:,} parameters ({number / total:.2%})"
    )


def _lora(config):
    lora = config.trainable.lora
    if lora is None:
        return None
    told = f", from {config.lora_weights}" if config.lora_weights else ""
    return (
        f"LoRA: r {lora.rank}, alpha {lora.alpha:g}{' / √r' * lora.rslora}, dropout {lora.dropout:g}, on "
        f"{', '.join(lora.targets)}{told}; every token has a gradient, so no system prompt is kept and none is "
        "frozen"
    )


def _noise(config):
    if config.neftune_noise_alpha is None:
        return None
    return (
        f"NEFTune: alpha {config.neftune_noise_alpha:g}; no token of text is constant, so no system prompt is kept and "
        "none is frozen"
    )


def _average(config):
    if config.ema_decay is None:
        return None
    return f"average: decay {config.ema_decay:g}, of what is trained; validation and results take it"


def _computing(config, world, attention):
    if world.device.type == "cuda":
        where, kernels = torch.cuda.get_device_name(world.device), "Triton kernels"
    else:
        from fastvid_kernels.cpu import rows_obstacle

        where = "CPU"
        kernels = "AVX512 kernels" if config.bf16 and not rows_obstacle() else "torch's operations"
    peak = planning.peak_flops(config, world)
    dtype = "bf16" if config.bf16 else "fp32 with TF32 products" if config.tf32 else "fp32"
    return (
        f"computing: {dtype} on {where}, {kernels}, attention {attention}; fastvid {__version__}, "
        f"torch {torch.__version__}" + (f"; peak {peak / 1e12:,.6g} TFLOP/s" if peak else "")
    )
