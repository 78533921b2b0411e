"""First stage: a model's answers to a benchmark's questions, one line for each sample in ``predictions*.jsonl``.

Ranks divide the videos among themselves and write a file each. A sample is done when its line is there, so that a
killed run goes on; one that failed (a missing or damaged video) is tried again. Nothing is ever answered with another
video's frames.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastvid.batch import by_tower
from fastvid.config import EvaluateConfig
from fastvid.config.pooling import RECIPE
from fastvid.evaluation.lines import Lines, read_lines
from fastvid.evaluation.options import LETTERS
from fastvid.evaluation.tasks import TASKS, Sample, read_samples, upstream_files
from fastvid.evaluation.videos import FrameFolder, Videos
from fastvid.features.names import SUFFIXES
from fastvid.files import NO_LINKS, StrPath, atomic_file, read_json_object, shown
from fastvid.inference.asking import Answering
from fastvid.inference.chat import MEDIA_SUFFIXES, Chat
from fastvid.inference.likelihood import option_likelihoods, with_options
from fastvid.provenance import same_tower

log = logging.getLogger("fastvid")

PREDICTIONS, SETTINGS = "predictions", "settings.json"
_PIECES, _PIECE = 256, 1 << 14  # of a file of weights, by which it is known, and their bytes
_WEIGHTS = ("*.safetensors", "*.bin")
_ADAPTER = ("adapter_model.*", "model-*.safetensors")  # in PEFT's format, or in a checkpoint


def predict(
    chat: Answering,
    config: EvaluateConfig,
    rank: int,
    world: int,
    *,
    about: dict[str, Any] | None = None,
    stopped: Callable[[], object] = lambda: False,
    training: bool = False,
) -> bool:
    """Answer this rank's share of the questions that have no answer yet.

    Args:
        chat: the model.
        config: `EvaluateConfig`.
        about: what tells of the model in the settings; None: `fingerprints` of a `Chat`.
        stopped: whether to end early; what is answered by then stays.
        training: beside a training run: no bar, and of videos the feature files alone.

    Returns:
        whether all of the share is answered.

    Raises:
        ValueError: annotations that cannot be read; an --output of other settings.
    """
    assert config.task is not None and config.annotations is not None and config.video is not None, "flags are checked"
    output = Path(config.output)
    samples, files = read_samples(config.task, config.annotations)
    suffixes, links = (SUFFIXES, None) if training else (MEDIA_SUFFIXES, config.follow_links)
    videos = Videos(config.video, (sample.video for sample in samples), suffixes, follow_links=links)
    if about is None:
        assert isinstance(chat, Chat), "whose weights are files"
        about = fingerprints(chat)
    output.mkdir(parents=True, exist_ok=True)  # not before: of a command that cannot begin nothing is left
    _same_settings(output, _settings(chat, config, files, samples, about))
    done = answered(output)
    _check_known(output, done, samples)
    share = set(sorted({sample.video for sample in samples})[rank::world])
    todo = [sample for sample in samples if sample.video in share and sample.id not in done]
    file = output / (f"{PREDICTIONS}.jsonl" if world == 1 else f"{PREDICTIONS}.{rank}.jsonl")
    with Lines(file) as lines:
        failed = _answer(chat, config, videos, todo, lines, _Towers(done.values(), training), stopped, training)
    if failed:
        told = [f"{why} ({n})" for why, n in Counter(failed.values()).most_common()]
        told[3:] = [f"and {len(told) - 3} more reasons, all in {file}"] * (len(told) > 3)
        log.warning("no answer to %d of %d samples: %s", len(failed), len(todo), "; ".join(told))
    write_upstream(config.task, samples, output)
    return not failed and not stopped()


def answered(output: StrPath) -> dict[str, dict]:
    """{id: line} of the samples that are answered."""
    found = {}
    for line in read_lines(output, PREDICTIONS, _check_line):
        if "prediction" in line:
            found.setdefault(line["id"], line)
    return found


def _check_line(line):
    """Refuse what is no line of `_line`, and none of a sample that failed (ValueError, KeyError)."""
    names = ("id", "video", "kind", "group", "answer") if "prediction" in line else ("id",)
    wrong = [name for name in names if not isinstance(line[name], str)]
    if "prediction" in line:
        texts = [[each] if isinstance(each, str) else each for each in (line["question"], line["prediction"])]
        if not all(isinstance(each, list) and all(isinstance(text, str) for text in each) for each in texts):
            wrong.append("question")
        elif len(texts[0]) != len(texts[1]) or not 1 <= len(texts[0]) <= 2:
            wrong.append("prediction")
        if line["kind"] == "choice" and not _is_choice(line["options"], line["right"], line["likelihoods"]):
            wrong.append("likelihoods")
    if wrong:
        raise ValueError(f"its {json.dumps(wrong[0])} is not what fastvid writes")


def _is_choice(options, right, likelihoods):
    return (
        isinstance(options, list)
        and all(isinstance(option, str) for option in options)
        and type(right) is int
        and 0 <= right < len(options) == len(likelihoods)
        and all(math.isfinite(value) and type(tokens) is int and tokens > 0 for value, tokens in likelihoods)
    )


def _check_known(output, done, samples):
    """Refuse answers to questions that are none of the samples', as of a file that had another name (ValueError)."""
    known = {sample.id: sample for sample in samples}
    for name, line in done.items():
        sample = known.get(name)
        if sample is None or (sample.video, sample.kind) != (line["video"], line["kind"]):
            raise ValueError(
                f"{shown(output)} holds an answer to {shown(name)}, which --annotations does not ask: their file had "
                "another name then; give it that name again, or give another --output"
            )


def write_upstream(task: str, samples: Iterable[Sample], output: StrPath) -> None:
    """Write the files of upstream's inference scripts, of what is answered so far."""
    with open(Path(output) / SETTINGS, "r+b") as lock:  # NFS locks only what may be written
        fcntl.flock(lock, fcntl.LOCK_EX)  # of ranks that end together the last to read is the last to write
        answers = {
            name: line["prediction"] if isinstance(line["prediction"], list) else [line["prediction"]]
            for name, line in answered(output).items()
        }
        for name, records in upstream_files(task, samples, answers).items():
            folder = Path(output) / "upstream"
            folder.mkdir(exist_ok=True)
            with atomic_file(folder / name) as file:
                file.write(json.dumps(records, default=str).encode("ascii"))


class _Towers:
    """Which vision tower the features of a folder's predictions are of: there is one, as far as files tell."""

    def __init__(self, lines, training):
        self._otherwise = "" if training else ", or give another --output"
        self._known = next((line["tower"] for line in lines if line.get("tower")), None)

    def check(self, path, made):
        """Refuse features of another tower than those of before (ValueError); `made` identifies it, or is None."""
        if made is not None and self._known is not None and same_tower(self._known, (made,)) is False:
            raise ValueError(
                f"{path} was made by another tower ({made}) than the features of the predictions that are there "
                f"({self._known}); extract it with that one{self._otherwise}"
            )
        self._known = self._known or made


def _answer(chat, config, videos, todo, lines, towers, stopped, training):
    """Answer samples, video by video; returns {id: why not} of those that cannot be."""
    from tqdm import tqdm

    failed, parts, extra, rest = {}, {}, {}, Counter()
    by_path = {}

    def fail(sample, error):
        if sample.id in failed:  # its other question
            return
        failed[sample.id] = str(error)
        lines.append({"id": sample.id, "video": sample.video, "error": str(error)})
        progress.update()

    def finish(sample):
        answers = [parts.pop((sample.id, number)) for number in range(len(sample.texts))]
        lines.append(_line(sample, answers, *extra.pop(sample.id)))
        progress.update()

    def requests():
        for path, group in by_path.items():
            if stopped():
                return
            try:
                if isinstance(path, FrameFolder):
                    features_RC, made = chat.features_of_frames(path.files), None
                else:
                    features_RC, made = chat.features(str(path)), chat.made_by(path)
                towers.check(path, made)
                content = b"".join(each.cpu().contiguous().view(-1).numpy().tobytes() for each in by_tower(features_RC))
                digest = hashlib.sha256(content).hexdigest()[:16]
            except (ValueError, OSError) as error:
                for sample in group:
                    fail(sample, error)
                continue
            asked, choices = {}, {}
            for sample in group:
                try:
                    own = [
                        chat.request((sample.id, number), str(path), features_RC, _asked(sample, text))
                        for number, text in enumerate(sample.texts)
                    ]
                    for each in own:
                        batch.check(each)
                    if sample.options:
                        choices[sample.id] = with_options(chat, str(path), features_RC, sample.texts[0], sample.options)
                except ValueError as error:
                    fail(sample, error)
                    continue
                asked[sample.id] = own
            scores = dict(zip(choices, option_likelihoods(chat, features_RC, list(choices.values()))))
            for sample in group:
                values = scores.get(sample.id, ())
                if not all(math.isfinite(value) for value, _ in values):
                    fail(sample, "the likelihoods of its options are not finite: the model cannot be used so")
                elif (own := asked.get(sample.id)) is not None:
                    extra[sample.id], rest[sample.id] = (digest, made, values), len(own)
                    yield from own

    with tqdm(
        total=len(todo),
        desc="predict",
        unit=" samples",
        file=sys.stderr,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        disable=training or not todo,
    ) as progress:
        for sample in todo:
            try:
                by_path.setdefault(videos.find(sample), []).append(sample)
            except ValueError as error:
                fail(sample, error)
        batch = chat.batcher(config.at_once, config.kv_cache_gib and int(config.kv_cache_gib * 2**30))
        known = {sample.id: sample for sample in todo}
        for (name, number), ids in batch.run(requests(), lambda key, why: fail(known[key[0]], why)):
            parts[name, number] = chat.tokenizer.decode(ids).strip()
            rest[name] -= 1
            if not rest[name]:
                finish(known[name])
            if stopped():
                break
    return failed


def _asked(sample, text):
    """The question as it is put; of a multiple choice with its options and their letters."""
    if not sample.options:
        return text
    options = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, sample.options))
    return f"{text}\n{options}\nAnswer with the letter of the right option."


def _line(sample, answers, digest, made, scores):
    one = len(sample.texts) == 1
    line = {
        "id": sample.id,
        "video": sample.video,
        "kind": sample.kind,
        "group": sample.group,
        "question": sample.texts[0] if one else list(sample.texts),
        "answer": sample.answer,
        "prediction": answers[0] if one else answers,
        "features": digest,
        **({} if made is None else {"tower": made}),
    }
    if sample.options:
        scores = [[round(value, 6), tokens] for value, tokens in scores]
        line |= {"options": list(sample.options), "right": sample.right, "likelihoods": scores}
    return line


def fingerprints(chat: Chat) -> dict[str, Any]:
    """What identifies a model's weights, and the vision tower that they were trained with."""
    model = Path(chat.config.model_name_or_path)
    weights = [path for pattern in _WEIGHTS for path in sorted(model.glob(pattern))]
    own = Path(chat.weights)
    own = [own] if own.is_file() else [path for pattern in _WEIGHTS for path in sorted(own.rglob(pattern))]
    adapter = [path for pattern in _ADAPTER for path in sorted(chat.adapter.glob(pattern))] if chat.adapter else []
    towers = [tower.revision for tower in chat.towers]
    return {
        "model": _fingerprint(weights),
        "weights": _fingerprint(own),
        **({"adapter": _fingerprint(adapter)} if adapter else {}),
        **({"tower": towers} if any(towers) else {}),
    }


def _settings(chat, config, files, samples, about):
    """What decides the predictions, and what they are of."""
    told = chat.config
    return {
        "task": config.task,
        "annotations": annotations_digest(files),
        "samples": len(samples),
        "videos": len({sample.video for sample in samples}),
        **about,
        **{
            name: getattr(told, name)
            for name in ("conv_mode", "question_order", "num_frames", "temperature", "max_new_tokens", "seed", "bf16")
        },
        **({} if told.pooling in (None, RECIPE) else {"pooling": told.pooling}),
        "use_start_end": chat.tokenizer.tokens.start is not None,
    }


def annotations_digest(files: Iterable[Path]) -> str:
    """What identifies the content of the files that `read_samples` read."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _fingerprint(paths):
    """Of weights, wherever they lie: names, sizes, and pieces of each file from its beginning to its end.

    Not the ends alone, for there lie tensors that few trainings change.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            for number in range(_PIECES):
                file.seek(max(0, size - _PIECE) * number // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]


def read_settings(output: StrPath) -> dict:
    """What the predictions in a folder are of.

    Raises:
        ValueError: there are none.
    """
    found = read_json_object(Path(output) / SETTINGS)
    if not found:
        raise ValueError(
            f"--output {shown(output)} holds no predictions: give --model_name_or_path, --annotations and --video first"
        )
    if found.get("task") not in TASKS or type(found.get("samples")) is not int:
        raise ValueError(f"{shown(Path(output) / SETTINGS)} is none that fastvid wrote; give another --output")
    return found


def other_settings(chat: Answering, config: EvaluateConfig, about: dict[str, Any]) -> list[str]:
    """How the settings of predictions that are there differ from those of a run, in words; nothing where they do not.

    Args:
        (others: as of `predict`.)
    """
    assert config.task is not None and config.annotations is not None, "flags are checked"
    samples, files = read_samples(config.task, config.annotations)
    known = read_json_object(Path(config.output) / SETTINGS)
    return _differing(known, _settings(chat, config, files, samples, about)) if known else []


def _differing(known, settings):
    return [
        f"{name} {known.get(name)} there, {settings.get(name)} now"
        for name in {**known, **settings}
        if known.get(name) != settings.get(name)
    ]


def _same_settings(output, settings):
    """Keep the settings of a new folder; refuse to go on with others.

    Raises:
        ValueError: naming what differs.
    """
    path = output / SETTINGS
    if not read_json_object(path):
        own = output / f".{SETTINGS}.{secrets.token_hex(8)}"
        with atomic_file(own) as file:
            file.write(json.dumps(settings, indent=1).encode() + b"\n")
        try:
            # Of two runs that begin together the settings of one stay, and the other reads them.
            os.link(own, path)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            os.rename(own, path)
            return
        own.unlink()
    known = read_json_object(path)
    if differing := _differing(known, settings):
        raise ValueError(
            f"{shown(output)} holds predictions of other settings ({'; '.join(differing)}); give another --output"
        )
