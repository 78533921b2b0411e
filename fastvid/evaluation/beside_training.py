"""Benchmarks of a model in training: which there are, and the figures of one step.

Every step's predictions lie in a folder of their own below ``output_dir/eval_tasks``, as `fastvid evaluate` writes
them.
"""

import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastvid.config import ChatConfig, EvaluateConfig, TrainConfig
from fastvid.data.packing import pack
from fastvid.dist import parallel
from fastvid.dist.parallel import World
from fastvid.evaluation import predict, scores
from fastvid.evaluation.tasks import TASKS, read_samples
from fastvid.evaluation.videos import Videos
from fastvid.features.names import SUFFIXES
from fastvid.files import StrPath, shown
from fastvid.inference.live import FilesOfTowers, LiveModel

log = logging.getLogger("fastvid")

FOLDER = "eval_tasks"
_STEP = "step-"


@dataclass(frozen=True)
class EvalTask:
    """A benchmark that is asked at validations.

    Attributes:
        name: of its figures and its folder: the task and its annotations' name, without ending.
        task: of `TASKS`.
        annotations: file or folder.
        videos: folder of the feature files.
        features: of the videos that have some, one each.
    """

    name: str
    task: Any
    annotations: str
    videos: str
    features: tuple[Path, ...] = ()


def eval_tasks(config: TrainConfig) -> list[EvalTask]:
    """The benchmarks of ``--eval_tasks``, which can be asked: their files are read, and their features looked for.

    Raises:
        ValueError: with the remedy.
    """
    found = {}
    for given in config.eval_tasks:
        task, equals, annotations = given.partition("=")
        if task not in TASKS or not equals or not annotations:
            raise ValueError(
                f"--eval_tasks {shown(given)}: give TASK=ANNOTATIONS, such as mc=data/MVBench; tasks: "
                f"{', '.join(TASKS)}"
            )
        name = f"{task}_{Path(annotations).stem or Path(annotations).resolve().name}"
        if name in found:
            raise ValueError(
                f"--eval_tasks {shown(given)}: {shown(found[name].annotations)} would have the same name, "
                f"{shown(name)}; rename one of the two files"
            )
        found[name] = EvalTask(name, task, annotations, _folder(config))
    if not found:
        return []
    files, skip = files_of(config), config.on_bad_sample == "skip"
    return [replace(each, features=_features_of(each, files, skip=skip)) for each in found.values()]


def files_of(config: TrainConfig) -> FilesOfTowers:
    """Where the features of the benchmarks' videos lie.

    Raises:
        ValueError: with the remedy.
    """
    second = config.eval_video_folder_2 or config.video_folder_2
    if config.video_folder_2 is None and second is not None:
        raise ValueError(f"--eval_video_folder_2 {shown(second)}: the run has one vision tower; leave the flag out")
    return FilesOfTowers(_folder(config), second)


def _folder(config):
    folder = config.eval_video_folder or config.video_folder
    if folder is None:
        raise ValueError("--eval_tasks needs the features of its videos: name their folder with --eval_video_folder")
    return folder


def _features_of(task, files, *, skip):
    """The feature files of a benchmark's videos, one each; refuses one without them.

    Args:
        skip: some of them may be missing.
    """
    samples, _ = read_samples(task.task, task.annotations)
    flag, missing, there = _flag(task), {}, {}
    try:
        videos = Videos(task.videos, (sample.video for sample in samples), SUFFIXES)
    except ValueError as error:
        raise ValueError(
            f"{flag}: {error}; extract its videos, and name the folder of their features with --eval_video_folder"
        ) from error
    for sample in samples:
        try:
            found = videos.find(sample)
            files(found)
            there[sample.video] = found
        except ValueError as error:
            missing.setdefault(sample.video, error)
    if missing and (not skip or len(missing) == len({sample.video for sample in samples})):
        raise ValueError(
            f"{flag}: {len(missing)} videos have no features ({next(iter(missing.values()))}); extract them, and name "
            "their folder with --eval_video_folder, or give --on_bad_sample skip to do without some"
        )
    return tuple(there.values())


def _flag(task):
    return f"--eval_tasks {task.task}={shown(task.annotations)}"


def chat_config(config: TrainConfig) -> ChatConfig:
    """How the benchmarks are answered."""
    return ChatConfig(config.model_name_or_path, max_new_tokens=config.eval_max_new_tokens)


def check_features(tasks: Iterable[EvalTask], check: Callable[[Path], None], *, skip: bool) -> None:
    """Refuse a benchmark whose features are not as those of training: the header of one file is read.

    Args:
        check: raises ValueError for a file that does not fit (`fastvid.inference.live.check_file`).
        skip: some files may be others: headers are read until one fits.

    Raises:
        ValueError: with the remedy.
    """
    for task in tasks:
        refused = None
        for path in task.features if skip else task.features[:1]:
            try:
                check(path)
            except (ValueError, OSError) as error:
                refused = refused or error
            else:
                refused = None
                break
        if refused is not None:
            raise ValueError(
                f"{_flag(task)}: {refused}, and name the folder of its features with --eval_video_folder"
            ) from refused


@torch.no_grad()
def ask(
    tasks: Iterable[EvalTask],
    chat: LiveModel,
    config: TrainConfig,
    world: World,
    step: int,
    *,
    run: str | None,
    stopped: Callable[[], object],
) -> dict[str, float] | None:
    """Have a model in training answer the questions of some benchmarks, whose videos the ranks share; all ranks call
    it.

    Args:
        chat: the model; what FSDP2 sharded of it is gathered meanwhile.
        step: optimizer steps done.
        run: by which the run is known.
        stopped: whether this rank is to end early.

    Returns:
        `figures` of all benchmarks on rank 0, nothing on the others; None where a rank is to stop.
    """
    found, model = {}, chat.model
    parallel.reshard(model)
    model(pack([], chat.tokenizer.tokens, model.config.channels).to(world.device))  # where FSDP2 begins to count calls
    with parallel.gathered(model):
        for task in tasks:
            output = step_folder(config.output_dir, task, step)
            asked = EvaluateConfig(
                output=str(output),
                task=task.task,
                annotations=task.annotations,
                video=task.videos,
                max_new_tokens=chat.config.max_new_tokens,
                kv_cache_gib=config.eval_kv_cache_gib,
            )
            about = {"run": run, "step": step}
            if config.frozen_dtype != "auto":
                about["frozen_dtype"] = config.frozen_dtype
            if world.is_main:
                output.mkdir(parents=True, exist_ok=True)
                _drop_others(output, predict.other_settings(chat, asked, about))
            world.gather_objects(None)
            predict.predict(chat, asked, world.rank, world.size, about=about, stopped=stopped, training=True)
            if world.sum_on_host([bool(stopped())])[0]:
                return None
            if world.is_main:
                found |= figures(task, config.output_dir, step)
    return found


def figures(task: EvalTask, output_dir: StrPath, step: int) -> dict[str, float]:
    """{"eval_TASK_NAME/figure": mean} of what is answered, and writes ``scores.json``; of a benchmark that needs a
    judge only how many samples are answered."""
    output = step_folder(output_dir, task, step)
    settings, lines = predict.read_settings(output), list(predict.answered(output).values())
    told = {f"eval_{task.name}/answered": float(len(lines))}
    values = scores.values_without_judge(task.task, lines)
    if not lines:
        log.error(
            "--eval_tasks: none of the %d samples of %s has an answer at step %d; %s tells why of each",
            settings["samples"],
            task.name,
            step,
            output,
        )
    if not lines or values is None:
        return told
    more = {"answered": len(lines), "missing": settings["samples"] - len(lines)}
    written = scores.write_scores(output, settings, values, more)
    return told | {f"eval_{task.name}/{name}": each["mean"] for name, each in written["scores"].items()}


def step_folder(output_dir: StrPath, task: EvalTask, step: int) -> Path:
    """Where a benchmark's predictions of one step lie."""
    return Path(output_dir) / FOLDER / task.name / f"{_STEP}{step}"


def _drop_others(output, differing):
    """Remove a step's predictions of other settings, which a run that goes on may have."""
    if differing:
        log.warning("%s: its predictions are of other settings (%s), and are made anew", output, "; ".join(differing))
        shutil.rmtree(output)
        output.mkdir()


def drop_later(output_dir: StrPath, tasks: Iterable[EvalTask], step: int) -> None:
    """Remove predictions of later steps, which a run that goes on from `step` makes anew: by other weights, maybe."""
    for task in tasks:
        for folder in (Path(output_dir) / FOLDER / task.name).glob(f"{_STEP}*"):
            if folder.name.removeprefix(_STEP).isdecimal() and int(folder.name.removeprefix(_STEP)) > step:
                shutil.rmtree(folder)
