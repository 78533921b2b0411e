"""What a training run keeps: its checkpoints, how it goes on from one, and what a non-finite step was made of."""

import contextlib
import itertools
import logging
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fastvid import __version__, checkpoint, parallel
from fastvid.config import ExportConfig, TrainConfig
from fastvid.data.batching import pack
from fastvid.data.order import REFERENCE_ORDER_VERSION
from fastvid.export import export
from fastvid.model.weights import write_reference_projector

log = logging.getLogger("fastvid")

# Flags that may change when a run goes on: they decide where and how, not what is computed. A different number of
# epochs or steps is allowed with a word about the schedule; ranks and batch sizes may be traded for each other. Where
# and how, such as with or without recomputation, sums may round in another order.
MAY_CHANGE = {
    "output_dir", "eval_data_path", "lazy_preprocess", "dataloader_num_workers", "tf32", "gradient_checkpointing",
    "recompute", "shard", "shard_size", "ddp_timeout", "attn_implementation", "per_device_eval_batch_size",
    "evaluation_strategy", "eval_strategy", "eval_steps", "logging_steps", "save_strategy", "save_steps",
    "save_total_limit", "resume", "report_to", "disable_tqdm", "peak_tflops", "profile", "dry_run", "full_determinism",
    "run_name", "project", "memory",
    "vision_tower", "num_video_tokens", "on_bad_sample", "max_skipped", "per_device_train_batch_size",
    "gradient_accumulation_steps", "num_train_epochs", "max_steps",
}
# What this run would otherwise overwrite, drop or take for its own.
LEFT_BY_A_RUN = ("checkpoint-*", "metrics.jsonl", "tensorboard", "reporters.json", "loss_curve.png", "profile",
                 "mm_projector.*", "model")


@contextlib.contextmanager
def stop_signals(state):
    """Note SIGTERM and SIGINT in `state.stop_signal`, so that the step in hand ends and is saved.

    A second SIGINT interrupts at once.
    """
    def note(number, frame):
        if number == signal.SIGINT and state.stop_signal:
            raise KeyboardInterrupt
        state.stop_signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save(state):
    """Begin to write checkpoint-<steps done>: what was trained, the optimizer, and where the run stands.

    Returns:
        Seconds that this kept the loop: the wait for the write before, and on a CPU the copy, which a GPU only begins.
        Not the GPU's queue, which the loop has waited for already, to know that all is finite.

    Raises:
        OSError: on every rank, when the checkpoint before could not be written.
    """
    described = {
        "step": state.step, "logged_step": state.logged_step, "loss_sum": state.loss_sum.item(),
        "config": asdict(state.config), "tokens": asdict(state.tokenizer.tokens),
        "samples_per_step": state.order.samples_per_step, "num_samples": len(state.loader.samples),
        "skipped": skipped_samples(state), "world_size": state.world.size, "fastvid": __version__,
        "torch": torch.__version__, "reference_order": REFERENCE_ORDER_VERSION,
        "provenance": state.loader.samples.provenance.to_json(),
    }
    begin = time.perf_counter()
    state.saver.save(
        state.config.output_dir, state.step, state=described, total_limit=state.config.save_total_limit,
        groups={"model": dict(state.optimizer.parameters), "optimizer": state.optimizer.state_tensors()})
    return time.perf_counter() - begin


def skipped_samples(state):
    """Samples skipped since the run began, on all ranks; every rank calls it."""
    return state.skipped_before + int(state.world.sum_on_host([state.loader.skipped])[0])


def resume(state):
    """Go on from the newest valid checkpoint of the output folder, if there is one.

    Raises:
        ValueError: that checkpoint belongs to a run that computes something else.
    """
    if state.config.resume == "never":
        _set_aside(state)
        return
    folder = checkpoint.newest_valid(state.config.output_dir)
    if folder is None:
        return
    saved = checkpoint.read_state(folder)
    _check_same_run(folder, saved, state)
    checkpoint.load_into(folder, "model", dict(state.optimizer.parameters))
    checkpoint.load_into(folder, "optimizer", state.optimizer.state_tensors())
    state.step, state.logged_step = saved["step"], saved["logged_step"]
    state.loss_sum.fill_(saved["loss_sum"])
    state.skipped_before = saved.get("skipped", 0)
    log.warning("resumed from %s", folder)


def _set_aside(state):
    """Move what an earlier run left out of this run's way: into previous-1/, previous-2/, …"""
    output = Path(state.config.output_dir)
    found = sorted(path for pattern in LEFT_BY_A_RUN for path in output.glob(pattern))
    if found and state.world.is_main:
        number = next(n for n in itertools.count(1) if not (output / f"previous-{n}").exists())
        aside = output / f"previous-{number}"
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)
        log.warning("--resume never: moved %s of an earlier run to %s", ", ".join(path.name for path in found), aside)
    state.world.gather_objects(None)  # nobody saves before they are out of the way


def saves_at_end(state):
    """Whether the run's end is saved whatever its step: the weights of a full fine-tune have no other home."""
    return state.config.save_strategy != "no" or not _is_adapter(state)


def write_results(state):
    """Write what training leaves for others, on rank 0: a projector file as the reference's, or a model folder.

    Returns:
        The paths.
    """
    config, output = state.config, Path(state.config.output_dir)
    if not _is_adapter(state):
        state.saver.wait()  # the export reads the last checkpoint
        if state.world.is_main:
            export(ExportConfig(checkpoint=str(output / f"checkpoint-{state.step}"), output=str(output / "model"),
                                format="llama", dtype="bfloat16" if config.bf16 else "float32"))
        return [output / "model"]
    trained = {name: parallel.full_tensor(p) for name, p in state.optimizer.parameters.items()}
    paths = [output / "mm_projector.bin", output / "mm_projector.safetensors"]
    for path in paths if state.world.is_main else ():
        write_reference_projector(
            path, trained, config.model_name_or_path, state.tokenizer.tokens, projector=config.pretrain_mm_mlp_adapter,
            projector_type=config.mm_projector_type, seed=config.seed, provenance=state.loader.samples.provenance)
    return paths


def _is_adapter(state):
    return state.config.trainable <= {"projector", "boundary"}


def _check_same_run(folder, saved, state):
    given = asdict(state.config)
    # A version that lacked a flag did what is now the flag's default.
    before = asdict(TrainConfig(model_name_or_path="", data_path=[], output_dir="")) | saved["config"]
    for settings in (given, before):
        settings["optim"] = settings["optim"].removesuffix("_torch")  # the reference's name of the same
    changed = [f"--{name} was {before[name]!r}, is {value!r}" for name, value in given.items()
               if name not in MAY_CHANGE and before[name] != value]
    for name, value in (("samples_per_step", state.order.samples_per_step), ("num_samples", len(state.loader.samples))):
        if saved[name] != value:
            changed.append(f"{name} was {saved[name]}, is {value}")
    if saved["samples_per_step"] != state.order.samples_per_step and saved["world_size"] != state.world.size:
        changed.append(f"ranks were {saved['world_size']}, are {state.world.size}: give --per_device_train_batch_size "
                       "or --gradient_accumulation_steps that make as many samples a step")
    if state.config.policy.reference_order and saved["world_size"] != state.world.size:
        changed.append(f"ranks were {saved['world_size']}, are {state.world.size} (--parity reference)")
    if changed:
        raise ValueError(f"{folder} belongs to another run: {'; '.join(changed)}. Go on with the same flags, choose "
                         "another --output_dir, or start over in this one with --resume never")
    if state.config.policy.reference_order:
        _check_reference_order(folder, saved, before, state.order)
    if any(before[name] != given[name] for name in ("num_train_epochs", "max_steps")):
        log.warning("the number of steps differs from %s's: the learning rate follows the new schedule", folder)


def _check_reference_order(folder, saved, settings, order):
    accumulation = settings["gradient_accumulation_steps"]
    order = replace(order, batch_size=settings["per_device_train_batch_size"], accumulation=accumulation)
    if not order.goes_on_from(saved.get("reference_order", 1), saved["step"]):
        raise ValueError(
            f"{folder} was written when --parity reference with --gradient_accumulation_steps {accumulation} had "
            "another order of samples, in which each epoch was cut into steps by itself: going on from it would repeat "
            "some and leave out others. Start over with --resume never, choose another --output_dir, or go on with the "
            "version of fastvid that wrote it")


def explain_not_finite(state, failed):
    """Name the rank and the samples that made step `failed` non-finite.

    Computes the step's micro-batches again, one at a time over all ranks, with the parameters as they were before it.

    Returns:
        One line, the same on every rank.
    """
    batches, _ = state.loader.read(failed)
    nothing = pack([], state.tokenizer.tokens, state.loader.samples.channels)
    found = []
    for rank in range(state.world.size):
        for batch in batches:
            mine = batch if rank == state.world.rank else nothing
            loss = state.model(mine.to(state.world.device)) / max(1, batch.num_supervised)
            loss.backward()
            finite = bool(torch.isfinite(loss.detach()))
            gradients = all(torch.isfinite(parallel.local_shard(p.grad)).all().item()
                            for p in state.optimizer.parameters.values() if p.grad is not None)
            for parameter in state.optimizer.parameters.values():
                parameter.grad = None
            found.append((finite, gradients, batch.sample_ids))
    said = state.world.gather_objects(found)
    lines = []
    for i in range(len(found)):
        rank = i // len(batches)
        finite, _, sample_ids = said[rank][i]
        if not (finite and all(seen[i][1] for seen in said)):
            what = "gradient" if finite else "loss"
            lines.append(f"rank {rank}: non-finite {what}, samples {', '.join(sample_ids)}")
    return "; ".join(lines) or "no micro-batch is non-finite on its own: the sum over ranks and micro-batches is"
