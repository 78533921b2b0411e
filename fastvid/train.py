"""The training job: set-up, then the loop.

Launch with ``torchrun -m fastvid.train`` or plain ``python -m fastvid.train``.

    state = build(config, parallel.start())
    for batches, waited in state.loader.iterate(state.step):
        result = train_step(state, batches, waited)

Dimensions: see `fastvid.batch`.
"""

import contextlib
import dataclasses
import gc
import logging
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from fastvid import callable_command, signals
from fastvid.batch import PackedBatch
from fastvid.checkpoints.find import projector_path
from fastvid.checkpoints.saver import Saver
from fastvid.config import TrainConfig
from fastvid.data.conversation import settled_version
from fastvid.data.dataset import SampleSet
from fastvid.data.loader import Loader, TrainingOrder, evaluation_loader
from fastvid.data.order.stream import EvaluationOrder
from fastvid.data.tokenizer import ModelTokenizer, load_tokenizer
from fastvid.dist import heartbeat, host_memory, parallel
from fastvid.evaluation import beside_training
from fastvid.flags import parse
from fastvid.inference.live import LiveModel, check_file
from fastvid.model.attention import Attention
from fastvid.model.attention_check import settle_attention
from fastvid.model.config import ModelConfig
from fastvid.model.video_llava import VideoLlava
from fastvid.online.folder import training_features
from fastvid.training import checks, diagnosis, flops, overview, planning, recovery, run_lock
from fastvid.training.after_step import due, end_not_finite, log_step, stop, too_many_skipped, validation_due
from fastvid.training.average import Average
from fastvid.training.budget import planned, settled_budget
from fastvid.training.metrics import Metrics, memory_taken
from fastvid.training.optimizer import Optimizer, learning_rate
from fastvid.training.profiling import Profiler
from fastvid.training.staging import Staging
from fastvid.training.state import StepResult, TrainState
from fastvid.training.validation import evaluate
from fastvid.video.towers.choice import check_features
from fastvid.weights.adapter import adapter_folder, adapter_of
from fastvid.weights.loading import load_weights
from fastvid.weights.model_config import read_model_config

log = logging.getLogger("fastvid")

_COLLECT_EVERY = 200  # steps between collections of Python's garbage
# The largest batch need not be among them, but what every step takes is.
_STEPS_BEFORE_MEMORY_IS_TOLD = 3


class Prepared(NamedTuple):
    """What a run is made of before there is a model: see `TrainState`; `attention` is that which was settled."""

    config: TrainConfig
    tokenizer: ModelTokenizer
    model_config: ModelConfig
    loader: Loader[TrainingOrder]
    evaluation: Loader[EvaluationOrder] | None
    tasks: list[beside_training.EvalTask]
    attention: Attention
    plan: planning.Plan


def prepare(config: TrainConfig, world: parallel.World) -> Prepared:
    """Check the flags, read the data, and plan; say what the run consists of.

    Args:
        world: `parallel.start()`.

    Raises:
        ValueError: a flag, file or sample that cannot be used, with the remedy.
    """
    parallel.check_same(dataclasses.asdict(config), world)
    config = settled_budget(checks.checked(config), world)
    if config.pretrain_mm_mlp_adapter is not None:
        found = projector_path(config.pretrain_mm_mlp_adapter, "--pretrain_mm_mlp_adapter")
        if found != Path(config.pretrain_mm_mlp_adapter):
            config = dataclasses.replace(config, pretrain_mm_mlp_adapter=str(found))
        if config.lora_weights is None and (left := adapter_of(found)):
            log.warning("%s also holds a LoRA adapter, which is left out: --lora_weights %s takes it", left, left)
    if config.lora_weights is not None:
        config = dataclasses.replace(config, lora_weights=str(adapter_folder(config.lora_weights)))
    tasks = beside_training.eval_tasks(config)
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    parallel.compute_repeatably(config.full_determinism)

    tokenizer = load_tokenizer(config.model_name_or_path, config.mm_use_vid_start_end)
    config = dataclasses.replace(config, version=settled_version(config.version, tokenizer, config.policy))
    samples = SampleSet(config.data_path, tokenizer, training_features(config), config, world)
    model_config = read_model_config(
        config.model_name_or_path,
        projector_type=config.mm_projector_type,
        vocab_size=tokenizer.tokens.vocab_size,
        projector=config.pretrain_mm_mlp_adapter,
        mm_hidden_size=samples.channels or None,
    )
    checks.check_window(config, model_config.decoder)
    samples.fit(model_config.channels)
    check_features(config.vision_tower, samples.provenance, config.video_folder)
    if samples.provenance.second is not None:
        check_features(config.vision_tower_2, samples.provenance.second, config.video_folder_2, which="_2")
    sizes, precision = model_config.decoder, planning.precision_of(config)
    attention = settle_attention(
        config.attn_implementation, world.device, precision.compute, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    )
    if tasks:
        known = {"model": model_config, "trained": samples.look_again()}
        files = beside_training.files_of(config)
        fits = partial(check_file, config=beside_training.chat_config(config), files=files, **known)
        beside_training.check_features(tasks, fits, skip=config.on_bad_sample == "skip")
    config, loader, plan = planned(config, precision, model_config, samples, world, attention)
    config = planning.with_whole_steps(config, loader.order.total_steps)
    evaluation = evaluation_loader(config, loader, world) if config.eval_data_path else None
    for line in overview.overview(config, model_config, loader, world, attention):
        log.info("%s", line)
    plan.tell()
    return Prepared(config, tokenizer, model_config, loader, evaluation, tasks, attention, plan)


def build(config: TrainConfig, world: parallel.World) -> TrainState:
    """Set up a run: data, model, optimizer, loader; weights loaded and sharded, nothing resumed yet.

    Args:
        world: `parallel.start()`.

    Raises:
        ValueError: a flag, file, tensor or sample that cannot be used, with the remedy.
    """
    config, tokenizer, model_config, loader, evaluation, tasks, attention, plan = prepare(config, world)
    loader.begin()
    if world.device.type == "cpu":
        host_memory.keep_freed(not plan.short)
    with torch.device("meta"):
        model = VideoLlava(
            model_config,
            trainable=config.trainable,
            precision=plan.precision,
            recompute=plan.recompute,
            attention=attention,
        )
    parallel.shard(
        model,
        world,
        plan.layout,
        shard_size=config.shard_size,
        adds_up_shards=config.gradient_accumulation_steps > 1 and not plan.accumulate_whole,
        reduce_dtype=getattr(torch, config.reduce_dtype),
    )
    model.to_empty(device=world.device)
    load_weights(
        model,
        config.model_name_or_path,
        tokens=tokenizer.tokens,
        projector=config.pretrain_mm_mlp_adapter,
        seed=config.seed,
        adapter=config.lora_weights,
    )
    if loader.prefix:
        model.keep_prefix(loader.prefix)
    if plan.prepacked:  # after the prefix, which takes other parts of the matrices than steps do, as benchmarks do
        model.decoder.prepack()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return TrainState(
        config=config,
        world=world,
        tokenizer=tokenizer,
        model=model,
        optimizer=Optimizer(trained.items(), config, world.device),
        loader=loader,
        evaluation=evaluation,
        formula=flops.Formula(model_config, config.trainable),
        loss_sum=torch.zeros((), dtype=torch.float64, device=world.device),
        saver=Saver(),
        staging=Staging(world.device),
        plan=plan,
        average=None if config.ema_decay is None else Average(trained, config.ema_decay),
        tasks=tasks,
    )


def train_step(state: TrainState, batches: list[PackedBatch] | None, waited: float = 0.0) -> StepResult | None:
    """One optimizer step.

    Args:
        batches: this rank's micro-batches; None where it was stopped while it waited for them.
        waited: seconds that it waited for them.

    Returns:
        No number in it has waited for the device. None, and no rank makes the step, where a rank has no
        batches, or has seen that a checkpoint could not be written.
    """
    config, world = state.config, state.world
    mine = flops.total(map(state.formula.counts, batches or ()))
    halted = batches is None or state.saver.failed
    *counts, drawn, skipped, waited, halted, stop = world.sum_on_host(
        [*mine, state.loader.drawn, state.loader.skipped, waited, halted, state.stop_signal]
    )
    if batches is None or halted:
        return None
    counts = flops.StepCounts(*map(int, counts))
    loss = torch.zeros((), device=world.device)
    state.model.keep_casts(len(batches) > 1)
    for i, batch in enumerate(state.staging.copies(batches)):
        if config.policy.mean_of_means:
            scale = 1 / (max(1, batch.num_supervised) * config.gradient_accumulation_steps * world.size)
        else:
            scale = 1 / max(1, counts.supervised)
        parallel.set_gradient_sync(state.model, i == len(batches) - 1, accumulate_whole=state.plan.accumulate_whole)
        state.draw(state.step, i)
        share = state.model(batch) * scale
        share.backward()
        loss += share.detach()
    state.model.keep_casts(False)
    state.end_draws()
    parallel.sum_replicated_gradients(
        state.optimizer.parameters.values(), world, reduce_dtype=getattr(torch, config.reduce_dtype)
    )
    rate = partial(
        learning_rate,
        state.step,
        total_steps=state.order.total_steps,
        warmup_steps=state.plan.warmup_steps,
        schedule=config.lr_scheduler_type,
        decay_steps=state.plan.decay_steps,
        min_ratio=config.min_lr_ratio,
    )
    lr = rate(peak=config.learning_rate)
    projector_lr = None if config.mm_projector_lr is None else rate(peak=config.mm_projector_lr)
    state.saver.hold()
    loss, norm = state.optimizer.step(state.step, lr, loss, projector_lr=projector_lr)
    if state.average is not None:
        state.average.update(state.step, state.optimizer.failed_step)
    # Once the latch is closed losses no longer count: the sum stays that of the steps that were applied.
    state.loss_sum += loss.masked_fill(state.optimizer.failed_step >= 0, 0.0)
    state.step += 1
    stop_signal = max(world.gather_objects(state.stop_signal)) if stop else 0
    return StepResult(loss, norm, lr, counts, waited / world.size, stop_signal, int(drawn), int(skipped))


def loop(state: TrainState) -> int:
    """The steps of a run, with logging, validation and saving.

    Returns:
        Exit code: 0 at the run's end, 1 after a non-finite step, 128 + its number after a signal.
    """
    config, order = state.config, state.order
    metrics = Metrics(
        config.output_dir,
        total_steps=order.total_steps,
        start_step=state.step,
        report_to=config.report_to,
        run_name=config.run_name,
        project=config.project,
        flags=dataclasses.asdict(config),
        progress=not config.disable_tqdm,
        rank=state.world.rank,
        peak_flops=planning.peak_flops(config, state.world),
        token_budget=planning.token_budget(config, state.world),
    )
    profiler = Profiler(
        metrics.path.with_name("profile"),
        state.world.device,
        metrics.message,
        active=config.profile and state.world.is_main,
    )
    with (
        contextlib.closing(metrics),
        contextlib.closing(profiler),
        logging_redirect_tqdm(),
        signals.noted(partial(_note_stop, state)),
        parallel.naming_the_dead(state.world),
        state.saver,
        host_memory.collecting_when_told(),
        contextlib.closing(state.loader.iterate(state.step, lambda: state.stop_signal)) as steps,
    ):
        first_step = state.step
        if state.world.is_main:
            beside_training.drop_later(config.output_dir, state.tasks, first_step)
        # What a signal ended before its validation was done goes on with that.
        left_out = first_step > 0 and validation_due(state) and metrics.evaluated_step < first_step
        if state.world.gather_objects(left_out)[0] and not _validate(state, metrics):
            return stop(state, metrics)
        for batches, waited in steps:
            result = train_step(state, batches, waited)
            if result is None:
                state.saver.wait()  # raises what could not be written, if that is why
                return stop(state, metrics)
            metrics.count(result.counts)
            metrics.wait(result.waited)
            profiler.step()
            if state.step % _COLLECT_EVERY == 0:
                gc.collect()
            if state.step - first_step == _STEPS_BEFORE_MEMORY_IS_TOLD:
                metrics.message(memory_taken(state.plan.estimated))
            stops, ends = result.stop_signal > 0, state.step == order.total_steps
            too_many = too_many_skipped(state, result)
            saves = (
                due(state, config.save_strategy, config.save_steps)
                or stops
                or too_many
                or (ends and recovery.saves_at_end(state))
            )
            # Not where a signal stops: the window since the last line is saved, and goes on with the run.
            logs = state.step % config.logging_steps == 0 or ends
            if (logs or saves) and (failed := int(state.optimizer.failed_step)) >= 0:
                return end_not_finite(state, failed, metrics)
            if (saves or ends) and (broken := diagnosis.broken_by_an_update(state)):
                metrics.message(f"training ends after step {state.step}: {broken}")
                return 1
            if logs:
                log_step(state, result, metrics)
            if not stops and validation_due(state) and not _validate(state, metrics):
                return stop(state, metrics)
            if stops:
                return stop(state, metrics)
            if saves:
                metrics.stall(recovery.save(state))
            if too_many:
                raise ValueError(too_many)
            if metrics.unheard:
                state.stop_signal = state.stop_signal or signal.SIGPIPE
        for path in recovery.write_results(state):
            metrics.message(f"wrote {path}")
        remarks, skipped = state.loader.account(state.world)
        for remark in remarks:
            metrics.message(remark)
        metrics.message(f"{metrics.summary()}, {skipped}")
    return 0


def train(config: TrainConfig) -> int:
    """Run a training job, or its part of one under torchrun; one that was begun in `config.output_dir` goes on.

    With `config.dry_run` nothing is trained: the plan is told.

    Returns:
        0; `loop`'s other codes where the job ended early.

    Raises:
        ValueError: a flag, record, feature, weight or checkpoint that cannot be used, with the remedy.
        OSError: a file cannot be read or written.
    """
    heartbeat.show_stacks()
    world = parallel.start(config.ddp_timeout)
    if config.dry_run:
        with parallel.speaking_once(world):
            config, tokenizer, model_config, loader, *_ = prepare(config, world)
            for line in overview.dry_run_lines(config, model_config, tokenizer, loader.order.total_steps):
                log.info("%s", line)
        parallel.finish(world)
        return 0
    with run_lock.held(config.output_dir, world):
        with parallel.speaking_once(world):
            state = build(config, world)
            recovery.resume(state)
        code = loop(state)
        parallel.finish(world)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``train``."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    return train(parse(TrainConfig, argv))


def _note_stop(state, number):
    state.stop_signal = number


def _validate(state, metrics):
    """Log the loss over the validation set, and the benchmarks' figures; whether no signal ended that."""
    told = {"epoch": state.order.epoch_after(state.step)}
    with metrics.paused():
        if state.evaluation is not None:
            if (eval_loss := evaluate(state)) is None:
                return False
            told["eval_loss"] = eval_loss
        if state.tasks:
            if (figures := _ask_tasks(state)) is None:
                return False
            told |= figures
    metrics.log(state.step, told)
    return True


def _ask_tasks(state):
    """The benchmarks' figures on rank 0; None where a signal ended that."""
    config, trained = state.config, state.loader.samples.look_again()
    files = beside_training.files_of(config)
    chat = LiveModel(state.model, state.tokenizer, trained, beside_training.chat_config(config), files)
    with state.averaged():
        return beside_training.ask(
            state.tasks, chat, config, state.world, state.step, run=state.run, stopped=lambda: state.stop_signal
        )


callable_command(__name__)

if __name__ == "__main__":
    from fastvid.cli import run

    run("train")
