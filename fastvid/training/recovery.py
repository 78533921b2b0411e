"""What a training run keeps: its checkpoints, and how it goes on from one."""

import itertools
import logging
import os
import time
import uuid
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fastvid import __version__
from fastvid.checkpoints import checkpoint
from fastvid.config import ExportConfig, TrainConfig, older_names
from fastvid.data.order.upstream import UPSTREAM_ORDER_VERSION
from fastvid.dist.sharding import full_tensor
from fastvid.model.finite import not_finite
from fastvid.training import content
from fastvid.training.state import TrainState
from fastvid.weights.adapter import CONFIG_FILE, WEIGHTS_FILE, split, write_adapter
from fastvid.weights.export import export
from fastvid.weights.trained import write_upstream_projector

log = logging.getLogger("fastvid")

# Flags that may change when a run goes on: they decide where and how, not what is computed. A different number of
# epochs or steps is allowed with a word about the schedule; ranks and batch sizes may be traded for each other. Where
# and how, such as with or without recomputation, sums may round in another order.
MAY_CHANGE = {
    "output_dir",
    "eval_data_path",
    "eval_tasks",
    "eval_video_folder",
    "eval_video_folder_2",
    "eval_max_new_tokens",
    "eval_kv_cache_gib",
    "lazy_preprocess",
    "dataloader_num_workers",
    "tf32",
    "gradient_checkpointing",
    "recompute",
    "shard",
    "shard_size",
    "ddp_timeout",
    "attn_implementation",
    "per_device_eval_batch_size",
    "evaluation_strategy",
    "eval_strategy",
    "eval_steps",
    "logging_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "resume",
    "report_to",
    "disable_tqdm",
    "peak_tflops",
    "profile",
    "dry_run",
    "full_determinism",
    "run_name",
    "project",
    "memory",
    "clip_feat_path",
    "vision_tower",
    "vision_tower_2",
    "num_frames",  # of these two what comes of them: `OnlineFeatures.made_otherwise`
    "pooling",
    "num_video_tokens",
    "on_bad_sample",
    "max_skipped",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
}
# What this run would otherwise overwrite, drop or take for its own.
RESULTS = ("mm_projector.*", "adapter_model.*", "adapter_config.json", "model")
LEFT_BY_A_RUN = (
    "checkpoint-*",
    "metrics.jsonl",
    "tensorboard",
    "reporters.json",
    "loss_curve.png",
    "profile",
    "eval_tasks",
    *RESULTS,
)


def save(state: TrainState) -> float:
    """Begin to write checkpoint-<steps done>: what was trained, the optimizer, and where the run stands.

    Returns:
        Seconds that this kept the loop: the wait for the write before, and on a CPU the copy, which a GPU only begins.
        Not the GPU's queue, which the loop has waited for already, to know that all is finite.

    Raises:
        OSError: on every rank, when the checkpoint before could not be written.
    """
    described = {
        "step": state.step,
        "total_steps": state.order.total_steps,
        "logged_step": state.logged_step,
        "loss_sum": state.loss_sum.item(),
        "config": asdict(state.config),
        "tokens": asdict(state.tokenizer.tokens),
        "samples_per_step": state.order.samples_per_step,
        "num_samples": len(state.loader.samples),
        "skipped": skipped_samples(state),
        "world_size": state.world.size,
        "fastvid": __version__,
        "torch": torch.__version__,
        "reference_order": UPSTREAM_ORDER_VERSION,
        "provenance": _provenance(state).to_json(),
        "run": state.run,
        "content": _content(state) if state.world.is_main else None,
    }
    begin = time.perf_counter()
    state.saver.save(
        state.config.output_dir,
        state.step,
        state=described,
        total_limit=state.config.save_total_limit,
        groups=_groups(state),
    )
    return time.perf_counter() - begin


def _groups(state):
    """What a checkpoint holds: "model" is what others read of it, "training" what steps go on from where that is
    something else."""
    trained = dict(state.optimizer.parameters)
    weights = {"model": trained} if state.average is None else {"model": state.average.tensors(), "training": trained}
    return {**weights, "optimizer": state.optimizer.state_tensors()}


def _provenance(state):
    """What the trained weights are told to be trained on and with."""
    return replace(state.loader.samples.look_again(), lora=True if state.config.trainable.lora else None)


def skipped_samples(state: TrainState) -> int:
    """Samples skipped since the run began, on all ranks; every rank calls it."""
    return state.skipped_before + int(state.world.sum_on_host([state.loader.skipped])[0])


def resume(state: TrainState) -> None:
    """Go on from the newest valid checkpoint of the output folder, if there is one.

    Raises:
        ValueError: that checkpoint belongs to a run that computes something else; there are checkpoints, and none of
            them is valid.
    """
    _on_main(state, lambda: _content(state))
    if state.config.resume == "never":
        _on_main(state, lambda: _set_aside(state.config, LEFT_BY_A_RUN))
    folder = None if state.config.resume == "never" else _newest(state)
    saved = {} if folder is None else checkpoint.read_state(folder)
    if folder is not None and not _goes_on(folder, saved, state):
        _on_main(state, lambda: _set_aside(state.config, LEFT_BY_A_RUN))
        folder = None
    if folder is None:
        state.run = state.world.gather_objects(uuid.uuid4().hex)[0]
        _on_main(state, lambda: _set_aside_results(state.config))
        return
    tensors = {**state.optimizer.parameters, **state.optimizer.state_tensors()}
    for group, targets in _groups(state).items():
        checkpoint.load_into(folder, group, targets)
    if broken := [name for names in state.world.gather_objects(not_finite(tensors)) for name in names]:
        raise ValueError(
            f"{folder}: {broken[0]} is not finite (NaN or infinity), and no step can go on from it. Move "
            "this folder away to go on from the checkpoint before it, or start over with --resume never"
        )
    state.step, state.logged_step = saved["step"], saved["logged_step"]
    state.loss_sum.fill_(saved["loss_sum"])
    state.skipped_before = saved.get("skipped", 0)
    state.run = saved.get("run") or state.world.gather_objects(uuid.uuid4().hex)[0]
    log.warning("resumed from %s", folder)


def _newest(state):
    """The checkpoint to go on from, or None. What a save left that died is cleared away before."""
    output = Path(state.config.output_dir)
    _on_main(state, lambda: checkpoint.tidy(output))
    try:
        return checkpoint.newest_valid(output)
    except ValueError as damaged:
        raise ValueError(
            f"{damaged}. Restore one of them from a copy, or start over with --resume never, which moves them aside"
        ) from damaged


def _content(state):
    """`content.content_of` of this run; computed once, but for features that are not made yet."""
    samples = state.loader.samples
    state.content = content.content_of(state) if state.content is None else content.completed(state.content, samples)
    return state.content


def _on_main(state, function):
    """What `function` returns on rank 0, or raises there of a user's mistakes, on every rank."""
    value = error = None
    if state.world.is_main:
        try:
            value = function()
        except (ValueError, OSError) as caught:
            error = caught
    value, error = state.world.gather_objects((value, error))[0]
    if error is not None:
        raise error
    return value


def _set_aside_results(config):
    """Move away the results of another run, or of another program, that this one would write over at its end."""
    if any(path for pattern in RESULTS for path in Path(config.output_dir).glob(pattern)):
        _set_aside(config, [pattern for pattern in LEFT_BY_A_RUN if pattern != "checkpoint-*"])


def _set_aside(config, patterns):
    """Move what is left of an earlier run out of this run's way: into previous-1/, previous-2/, …"""
    output = Path(config.output_dir)
    found = sorted({path for pattern in patterns for path in output.glob(pattern)})
    _check_not_in_use(found, config)
    if not found:
        return
    number = next(n for n in itertools.count(1) if not os.path.lexists(output / f"previous-{n}"))
    aside = output / f"previous-{number}"
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    log.warning(
        "%smoved %s of an earlier run to %s",
        "--resume never: " * (config.resume == "never"),
        ", ".join(path.name for path in found),
        aside,
    )


def _check_not_in_use(found, config):
    """Refuse to move what this run reads."""
    given = {
        "model_name_or_path": [config.model_name_or_path],
        "data_path": config.data_path,
        "eval_data_path": config.eval_data_path,
        "eval_tasks": [given.partition("=")[2] for given in config.eval_tasks],
        "eval_video_folder": [config.eval_video_folder],
        "eval_video_folder_2": [config.eval_video_folder_2],
        "video_folder": [config.video_folder],
        "video_folder_2": [config.video_folder_2],
        "pretrain_mm_mlp_adapter": [config.pretrain_mm_mlp_adapter],
        "lora_weights": [config.lora_weights],
    }
    for flag, paths in given.items():
        for path in filter(None, paths):
            if any(Path(path).resolve().is_relative_to(old.resolve()) for old in found):
                raise ValueError(
                    f"--{flag} {path} lies in --output_dir {config.output_dir}, among what an earlier run "
                    "left and this one would move aside or write over: choose another --output_dir"
                )


def saves_at_end(state: TrainState) -> bool:
    """Whether the run's end is saved whatever its step: the weights of a full fine-tune have no other home."""
    return state.config.save_strategy != "no" or state.config.trainable.own_weights


def write_results(state: TrainState) -> list[Path]:
    """Write what training leaves for others, on rank 0: a projector file as the reference's, and with LoRA the adapter
    for PEFT; or a model folder.

    Returns:
        The paths.
    """
    config, output = state.config, Path(state.config.output_dir)
    lora = config.trainable.lora
    if config.trainable.own_weights:
        state.saver.wait()  # the export reads the last checkpoint
        if state.world.is_main:
            export(
                ExportConfig(
                    checkpoint=str(output / f"checkpoint-{state.step}"),
                    output=str(output / "model"),
                    format="llama",
                    dtype="bfloat16" if config.bf16 else "float32",
                ),
                verify=False,
            )
        return [output / "model"]
    tensors = state.optimizer.parameters if state.average is None else state.average.tensors()
    trained = {name: full_tensor(tensor) for name, tensor in tensors.items()}
    paths = [output / "mm_projector.bin", output / "mm_projector.safetensors"]
    for path in paths if state.world.is_main else ():
        write_upstream_projector(
            path,
            trained,
            config.model_name_or_path,
            state.tokenizer.tokens,
            projector=config.pretrain_mm_mlp_adapter,
            projector_type=config.mm_projector_type,
            seed=config.seed,
            provenance=_provenance(state),
        )
    if lora is None:
        return paths
    if state.world.is_main:
        matrices = split(lora, trained, state.model.config.decoder)
        write_adapter(output, lora, matrices, config.model_name_or_path, _provenance(state))
    return [*paths, output / CONFIG_FILE, output / WEIGHTS_FILE]


def _goes_on(folder, saved, state):
    """Whether this run goes on from a checkpoint: True; or False where that is the end of a run on other files.

    Raises:
        ValueError: it belongs to another run, which has not come to its end or computes something else.
    """
    given = asdict(state.config)
    # A version that lacked a flag did what is now the flag's default.
    older = older_names(TrainConfig)
    before = asdict(TrainConfig(model_name_or_path="", data_path=[], output_dir=""))
    before |= {older.get(name, name): value for name, value in saved["config"].items()}
    for settings in (given, before):
        settings["optim"] = settings["optim"].removesuffix("_torch")  # the reference's name of the same
    flags = [
        f"--{name} was {before[name]!r}, is {value!r}"
        for name, value in given.items()
        if name not in MAY_CHANGE and name not in content.FLAGS and before[name] != value
    ]
    features = state.loader.samples.features
    flags += [] if features is None else features.made_otherwise(before)
    samples_per_step = saved["samples_per_step"]
    if isinstance(samples_per_step, str):  # earlier versions said rows
        samples_per_step = samples_per_step.replace(" rows (", " tokens (")
    if samples_per_step != state.order.samples_per_step:
        flags.append(f"samples_per_step was {samples_per_step}, is {state.order.samples_per_step}")
        if saved["world_size"] != state.world.size:
            flags.append(
                f"ranks were {saved['world_size']}, are {state.world.size}: give "
                "--per_device_train_batch_size or --gradient_accumulation_steps that make as many samples a "
                "step"
            )
    if state.config.policy.upstream_order and saved["world_size"] != state.world.size:
        flags.append(f"ranks were {saved['world_size']}, are {state.world.size} (--parity reference)")
    files = [f"{what} is not the same" for what in _changed_content(folder, saved, before, given, state)]
    if saved["num_samples"] != len(state.loader.samples):
        files.append(f"num_samples was {saved['num_samples']}, is {len(state.loader.samples)}")
    another_length = any(before[name] != given[name] for name in ("num_train_epochs", "max_steps"))
    if files and not flags and not another_length and saved["step"] == saved.get("total_steps"):
        log.warning("%s is the end of a finished run on other files: %s", folder, "; ".join(files))
        return False
    if flags or files:
        raise ValueError(
            f"{folder} belongs to another run: {'; '.join(flags + files)}. Go on with the same flags and "
            "files, choose another --output_dir, or start over in this one with --resume never"
        )
    if state.config.policy.upstream_order:
        _check_upstream_order(folder, saved, before, state.order)
    if another_length:
        log.warning("the number of steps differs from %s's: the learning rate follows the new schedule", folder)
    return True


def _changed_content(folder, saved, before, given, state):
    """What the run is made of now and was not made of before, in words; the same on every rank."""
    if saved.get("content") is None:
        if moved := [f"--{name}" for name in content.FLAGS if before[name] != given[name]]:
            log.warning(
                "%s was written by a version that did not note what files hold: whether %s still means the "
                "same is not checked",
                folder,
                ", ".join(moved),
            )
        return []
    return _on_main(state, lambda: content.changes(saved["content"], _content(state), state.config))


def _check_upstream_order(folder, saved, settings, order):
    accumulation = settings["gradient_accumulation_steps"]
    order = replace(order, batch_size=settings["per_device_train_batch_size"], accumulation=accumulation)
    if not order.goes_on_from(saved.get("reference_order", 1), saved["step"]):
        raise ValueError(
            f"{folder} was written when --parity reference with --gradient_accumulation_steps {accumulation} had "
            "another order of samples, in which each epoch was cut into steps by itself: going on from it would repeat "
            "some and leave out others. Start over with --resume never, choose another --output_dir, or go on with the "
            "version of fastvid that wrote it"
        )
