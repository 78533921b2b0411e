"""``fastvid evaluate``: a model's answers to a benchmark's questions, and what a judge thinks of them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvid.config import ChatConfig, EvaluateConfig
from fastvid.evaluation import grading, judge, predict, scores
from fastvid.evaluation.tasks import GROUPS, read_samples
from fastvid.files import atomic_file, read_json_object, shown
from fastvid.flags import parse
from fastvid.inference.chat import Chat
from fastvid.video.dealing import place
from fastvid.video.encoder import make_current, open_device
from fastvid.video.features import default_device

_MOST_UNREADABLE = 0.01  # of a judge's replies, with exit code 0
_SHOWN = 200  # letters of a reply that cannot be read
_OF_RULES = ("mc", "match")  # tasks that need no judge
_LONGEST = {"mc": 128, "match": 128}  # tokens of an answer; a letter and a few words want less


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 if something has no answer, no judgement, or cannot be read.

    Of several ranks it is 0 even so: torchrun ends all of them once one returns anything else.
    """
    config = parse(EvaluateConfig, argv)
    rank, world = place()
    _check(config, world)
    if config.compare is not None:
        _check_compare(config)
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
    for name in ("video", "video_2"):
        if config.model_name_or_path is not None and (given := getattr(config, name)) and not Path(given).exists():
            raise ValueError(f"--{name} {shown(given)} does not exist; give the folder of the benchmark's videos")
    if (config.judge is None) != (config.judge_model is None):
        raise ValueError("give --judge and --judge_model together")
    if config.judge is not None:
        judge.check_address(config.judge)
    if config.judge is not None and world > 1:
        raise ValueError("--judge needs one process: predict with all ranks first, then judge without torchrun")


def _check_compare(config):
    """Refuse a comparison that cannot be made, before anything is asked.

    Raises:
        ValueError: with the remedy.
    """
    if config.model_name_or_path is None:
        about = predict.read_settings(config.output)
    else:
        samples, files = read_samples(config.task, config.annotations)
        about = {"task": config.task, "annotations": predict.annotations_digest(files), "samples": len(samples)}
    known = {name: about[name] for name in ("task", "annotations", "samples") if name in about}
    if config.judge is not None and about["task"] not in _OF_RULES:
        known |= {"judge": config.judge_model, "prompts": grading.prompts_digest()}
    elif about["task"] not in _OF_RULES:
        scores.read_scores(config.output)
    scores.check_comparable(known, config.output, config.compare)


def _predict(config, rank, world):
    """First stage; returns whether this rank's share is answered."""
    names = ChatConfig.__dataclass_fields__.keys() & EvaluateConfig.__dataclass_fields__.keys()
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    settings["device"] = config.device or default_device()
    settings["max_new_tokens"] = config.max_new_tokens or _LONGEST.get(config.task, ChatConfig.max_new_tokens)
    make_current(open_device(settings["device"]))
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
    alone = sum(line["kind"] == "generic" and not line["group"] for line in lines)
    if settings["task"] == "vcg_diverse" and alone:
        print(f"{alone:,} samples count in no group: their type is none of {', '.join((*GROUPS, 'temporal'))}")
    judged = settings["task"] not in _OF_RULES
    there = read_json_object(Path(config.output) / scores.SCORES)
    if not lines or (judged and config.judge is None):
        if config.compare is not None:
            print(scores.compare(config.output, config.compare))
        elif lines and there.get("answered") == len(lines):
            _show(there)
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
    if there.get("judge") not in (None, more.get("judge")):
        print(
            f"these scores take the place of those by the judge {shown(there['judge'])}, whose replies stay: named "
            "again, it is not asked again"
        )
    _show(scores.write_scores(config.output, settings, figures, more))
    if config.compare is not None:
        print(f"\n{scores.compare(config.output, config.compare)}")
    return good and not missing


def _show(result):
    """Print scores, and whose they are."""
    if "judge" in result:
        print(f"scores by the judge {shown(result['judge'])} at {' and '.join(scores.addresses(result['judge_url']))}")
    print(scores.table(result))
    for name, value in result.get("upstream", {}).items():
        print(f"by upstream's arithmetic: {name} {json.dumps(value)}")


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
        print(
            f"{unanswered.total():,} of {len(asked):,} are not judged; the next run asks again. The first at "
            f"{who.address}: {reason}"
        )
    replies = len(asked) - unanswered.total()
    too_many = unreadable.total() > _MOST_UNREADABLE * replies
    if unreadable.total():
        print(
            f"{unreadable.total():,} of {replies:,} replies cannot be read and count in no score"
            + ": too many, take another judge" * too_many
        )
    known = scores.replies_by_key(judgements)
    replied = [known[ask.key] for ask in asked if ask.key in known]
    if unreadable.total():
        one = next(each for each in replied if "score" not in each)
        text = one["reply"][:_SHOWN] + "…" * (len(one["reply"]) > _SHOWN)
        print(f"one of them: {one['fault']}: {text!r}; all are in {Path(config.output) / judge.JUDGEMENTS}.jsonl")
    if cut := sum("cut" in known.get(ask.key, ()) for ask in asked):
        print(
            f"{cut:,} of these replies were cut off: raise --judge_max_tokens {config.judge_max_tokens}, and they are "
            "asked for again"
        )
    urls = sorted({each.get("url", who.address) for each in replied}) or [who.address]
    if len(urls) > 1:
        print(
            f"WARNING: the replies of {shown(config.judge_model)} come from {' and '.join(urls)}, and count as one "
            "judge's: by the name alone judges are told apart"
        )
    told = {
        "judge": config.judge_model,
        "judge_url": urls[0] if len(urls) == 1 else urls,
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
