"""``fastvid evaluate``: a model's answers to a benchmark's questions, and what a judge thinks of them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvid.config import ChatConfig, EvaluateConfig
from fastvid.evaluation import grading, judge, predict, scores
from fastvid.files import atomic_file
from fastvid.flags import parse
from fastvid.inference.chat import Chat
from fastvid.video.dealing import place
from fastvid.video.encoder import make_current, open_device
from fastvid.video.features import default_device

_MOST_UNREADABLE = 0.01  # of a judge's replies, with exit code 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 if something has no answer, no judgement, or cannot be read.

    Of several ranks it is 0 even so: torchrun ends all of them once one returns anything else.
    """
    config = parse(EvaluateConfig, argv)
    rank, world = place()
    _check(config, world)
    complete = True
    if config.model_name_or_path is not None:
        complete = _predict(config, rank, world)
    if world > 1 and (rank or _unanswered(config)):
        return 0
    return 0 if _score(config) and complete else 1


def _check(config, world):
    """Refuse flags that do not go together.

    Raises:
        ValueError: with the remedy.
    """
    first = {name: getattr(config, name) for name in ("model_name_or_path", "annotations", "video", "task")}
    missing = [f"--{name}" for name, value in first.items() if value is None]
    if config.model_name_or_path is not None and missing:
        raise ValueError(f"give {' and '.join(missing)}: predictions need all of --{', --'.join(first)}")
    if (config.judge is None) != (config.judge_model is None):
        raise ValueError("give --judge and --judge_model together")
    if config.judge is not None:
        judge.check_address(config.judge)
    if config.judge is not None and world > 1:
        raise ValueError("--judge needs one process: predict with all ranks first, then judge without torchrun")


def _predict(config, rank, world):
    """First stage; returns whether this rank's share is answered."""
    names = ChatConfig.__dataclass_fields__.keys() & EvaluateConfig.__dataclass_fields__.keys()
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    settings["device"] = config.device or default_device()
    make_current(open_device(settings["device"]))
    Path(config.output).mkdir(parents=True, exist_ok=True)
    chat = Chat(ChatConfig(**settings))
    try:
        return predict.predict(chat, config, rank, world)
    finally:
        chat.close()


def _unanswered(config):
    """Whether other ranks, or samples that failed, are left; says so."""
    samples = predict.read_settings(config.output)["samples"]
    missing = samples - len(predict.answered(config.output))
    if missing:
        print(
            f"{missing:,} of {samples:,} samples have no prediction yet; once all ranks have ended, `fastvid evaluate "
            f"--output {config.output}` tells what is left, and scores the rest"
        )
    return missing > 0


def _score(config):
    """Second stage, as far as it is due; returns whether all is judged, and can be read."""
    settings = predict.read_settings(config.output)
    if config.task not in (None, settings["task"]):
        raise ValueError(
            f"--output {config.output} holds predictions of {settings['task']}, not of --task {config.task}"
        )
    lines = list(predict.answered(config.output).values())
    missing = settings["samples"] - len(lines)
    if missing:
        print(f"{missing:,} of {settings['samples']:,} samples have no prediction")
    judged = settings["task"] not in ("mc", "match")
    if not lines or (judged and config.judge is None):
        if config.compare is not None:
            print(scores.compare(config.output, config.compare))
        elif lines:
            print(f"{len(lines):,} predictions are in {config.output}; --judge and --judge_model have them judged")
        return not missing
    more, good = {"answered": len(lines), "missing": missing}, True
    if judged:
        figures, told, good = _judged(config, lines)
        more |= told
    else:
        figures = scores.values_without_judge(settings["task"], lines)
        if settings["task"] == "mc":
            more["no_letter"] = sum(scores.read_letter(line["prediction"], line["options"]) is None for line in lines)
    if not figures:
        print("nothing that was judged can be read: there are no scores")
        return False
    result = scores.write_scores(config.output, settings, figures, more)
    print(scores.table(result))
    for name, value in result.get("upstream", {}).items():
        print(f"by upstream's arithmetic: {name} {json.dumps(value)}")
    if config.compare is not None:
        print(f"\n{scores.compare(config.output, config.compare)}")
    return good and not missing


def _judged(config, lines):
    """(figures, what is told of them, whether all is judged and can be read) of predictions."""
    asked = grading.asks(lines, config.judge_model)
    key = judge.key_of(config.judge_key_variable)
    who = judge.Judge(
        config.judge,
        config.judge_model,
        key=key,
        timeout=config.judge_timeout,
        retries=config.judge_retries,
        max_tokens=config.judge_max_tokens,
    )
    silent = judge.judge_all(who, asked, config.output, at_once=config.judge_at_once)
    judgements = judge.read_judgements(config.output)
    figures, unreadable, unanswered = scores.judged_values(lines, asked, judgements)
    if unanswered.total():
        reason = next(iter(silent.values()), "another run stopped")
        print(f"{unanswered.total():,} of {len(asked):,} are not judged; the next run asks again. The first: {reason}")
    replies = len(asked) - unanswered.total()
    too_many = unreadable.total() > _MOST_UNREADABLE * replies
    if unreadable.total():
        print(
            f"{unreadable.total():,} of {replies:,} replies cannot be read and count in no score"
            + ": too many, take another judge" * too_many
        )
    known = scores.replies_by_key(judgements)
    if cut := sum("cut" in known.get(ask.key, ()) for ask in asked):
        print(
            f"{cut:,} of these replies were cut off: raise --judge_max_tokens {config.judge_max_tokens}, and they are "
            "asked for again"
        )
    told = {
        "judge": config.judge_model,
        "judge_url": config.judge,
        "judge_temperature": 0,
        "prompts": grading.prompts_digest(),
        "unreadable": dict(unreadable),
        "cut_off": cut,
        "unanswered": dict(unanswered),
    }
    if config.parity == "reference":
        combined = scores.upstream_entries(lines, asked, judgements)
        told["upstream"] = {aspect: scores.upstream_figures(each) for aspect, each in combined.items()}
        folder = Path(config.output) / "upstream"
        os.makedirs(folder, exist_ok=True)
        for aspect, each in combined.items():
            with atomic_file(folder / f"{aspect}_judged.json") as file:
                file.write(json.dumps(each).encode())
    return figures, told, not too_many and not unanswered.total()


if __name__ == "__main__":
    from fastvid.cli import run

    run("evaluate")
