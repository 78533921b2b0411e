"""First stage: a model's answers to a benchmark's questions, one line for each sample in ``predictions*.jsonl``.

Ranks divide the videos among themselves and write a file each. A sample is done when its line is there, so that a
killed run goes on; one that failed (a missing or damaged video) is tried again. Nothing is ever answered with another
video's frames.
"""

import fcntl
import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fastvid.batch import by_tower
from fastvid.config import EvaluateConfig
from fastvid.evaluation.lines import Lines, read_lines
from fastvid.evaluation.tasks import LETTERS, Sample, read_samples, upstream_files
from fastvid.features.names import stem
from fastvid.files import StrPath, atomic_file, read_json_object, shown
from fastvid.inference.chat import MEDIA_SUFFIXES, Chat
from fastvid.inference.likelihood import answer_likelihoods
from fastvid.inference.questions import MediaNames, inside, list_media
from fastvid.pooling import RECIPE

log = logging.getLogger("fastvid")

PREDICTIONS, SETTINGS = "predictions", "settings.json"
_ENDS = 1 << 20  # bytes of a file's beginning and end by which it is known
_WEIGHTS = ("*.safetensors", "*.bin")
_ADAPTER = ("adapter_model.*", "model-*.safetensors")  # in PEFT's format, or in a checkpoint


class Videos:
    """Where the videos of a benchmark lie.

    Args:
        folder: with videos or feature files below it.
        asked: names of all videos of the benchmark: two of them are never one file.
    """

    def __init__(self, folder: StrPath, asked: Iterable[str] = ()):
        self.folder = Path(folder)
        self.files = list_media(folder, MEDIA_SUFFIXES)
        self._names = MediaNames(self.files, MEDIA_SUFFIXES)
        self._by_last = {}
        for name in self.files:
            self._by_last.setdefault(_last(name), []).append(stem(name))
        self._asked = {}
        for name in {stem(video) for video in asked}:
            self._asked.setdefault(_last(name), []).append(name)

    def find(self, sample: Sample) -> Path:
        """The file that a sample is about.

        A benchmark that keeps its videos in folders may name them without these, and the other way round. What is in
        another folder is another video.

        Raises:
            ValueError: there is none, there are several, or it lies elsewhere.
        """
        video, part, told = sample.video, "", ""
        if sample.part is not None:
            first, last = sample.part
            part = f"_{first:g}_{last:g}"
            video = stem(video) + part
            told = f" (seconds {first:g} to {last:g} of {shown(sample.video)}; cut that file)"
        found = self._names.find(video)
        if found is None:
            stems = {name for name in self._by_last.get(_last(video), ()) if _same_end(name, stem(video))}
            if len(stems) > 1:
                raise ValueError(
                    f"{shown(video)} is the name of {len(stems)} videos below {self.folder}; move the others"
                )
            names = self._asked.get(_last(sample.video), ()) if stems else ()
            several = [name for name in names if _same_end(name + part, *stems)]
            if len(several) > 1:
                raise ValueError(
                    f"{' and '.join(map(shown, sorted(several)))} are several videos, of which {self.folder} has one "
                    "without its folder; move it to a folder of that name"
                )
            found = self._names.find(stems.pop()) if stems else None
        if found is None:
            raise ValueError(f"{shown(video)} is none of the files of {self.folder}{told}")
        path = self.files[found]
        if not inside(path, self.folder):
            raise ValueError(f"{path} is a link that leads out of {self.folder}; refused")
        return path


def _last(name):
    """A video's name without folders and ending."""
    return stem(name.rpartition("/")[2])


def _same_end(one, other):
    """Whether one path is the end of the other."""
    return f"/{one}".endswith(f"/{other}") or f"/{other}".endswith(f"/{one}")


def predict(chat: Chat, config: EvaluateConfig, rank: int, world: int) -> bool:
    """Answer this rank's share of the questions that have no answer yet.

    Args:
        chat: `fastvid.inference.chat.Chat`.
        config: `EvaluateConfig`.

    Returns:
        whether all of the share is answered.

    Raises:
        ValueError: annotations that cannot be read; an --output of other settings.
    """
    assert config.task is not None and config.annotations is not None and config.video is not None, "flags are checked"
    output = Path(config.output)
    samples, files = read_samples(config.task, config.annotations)
    _same_settings(output, _settings(chat, config, files, samples))
    videos, done = Videos(config.video, (sample.video for sample in samples)), answered(output)
    names = sorted({sample.video for sample in samples})
    share = set(names[rank::world])
    todo = [sample for sample in samples if sample.video in share and sample.id not in done]
    file = output / (f"{PREDICTIONS}.jsonl" if world == 1 else f"{PREDICTIONS}.{rank}.jsonl")
    with Lines(file) as lines:
        failed = _answer(chat, config, videos, todo, lines)
    if failed:
        worst = Counter(failed.values()).most_common(3)
        log.warning("%d samples have no answer: %s", len(failed), "; ".join(f"{why} ({n})" for why, n in worst))
    write_upstream(config.task, samples, output)
    return not failed


def answered(output: StrPath) -> dict[str, dict]:
    """{id: line} of the samples that are answered."""
    found = {}
    for line in read_lines(output, PREDICTIONS):
        if "prediction" in line:
            found.setdefault(line["id"], line)
    return found


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


def _answer(chat, config, videos, todo, lines):
    """Answer samples, video by video; returns {id: why not} of those that cannot be."""
    from tqdm import tqdm

    failed, parts, extra, rest = {}, {}, {}, Counter()
    by_path = {}

    def fail(sample, error):
        failed[sample.id] = str(error)
        lines.append({"id": sample.id, "video": sample.video, "error": str(error)})
        progress.update()

    def finish(sample):
        answers = [parts.pop((sample.id, number)) for number in range(len(sample.texts))]
        lines.append(_line(sample, answers, *extra.pop(sample.id)))
        progress.update()

    def requests():
        for path, group in by_path.items():
            try:
                features_RC = chat.features(str(path))
                content = b"".join(each.cpu().contiguous().view(-1).numpy().tobytes() for each in by_tower(features_RC))
                digest = hashlib.sha256(content).hexdigest()[:16]
            except (ValueError, OSError) as error:
                for sample in group:
                    fail(sample, error)
                continue
            for sample in group:
                try:
                    own = [
                        chat.request((sample, number), str(path), features_RC, _asked(sample, text))
                        for number, text in enumerate(sample.texts)
                    ]
                    for each in own:
                        batch.check(each)
                    scores = _likelihoods(chat, str(path), features_RC, sample)
                except ValueError as error:
                    fail(sample, error)
                    continue
                extra[sample.id], rest[sample.id] = (digest, scores), len(own)
                yield from own

    terminal = sys.stderr.isatty()
    with tqdm(
        total=len(todo), desc="predict", unit=" samples", file=sys.stderr, mininterval=0.1 if terminal else 30
    ) as progress:
        for sample in todo:
            try:
                by_path.setdefault(videos.find(sample), []).append(sample)
            except ValueError as error:
                fail(sample, error)
        batch = chat.batcher(config.at_once, config.kv_cache_gib and int(config.kv_cache_gib * 2**30))
        for (sample, number), ids in batch.run(requests()):
            parts[sample.id, number] = chat.tokenizer.decode(ids).strip()
            rest[sample.id] -= 1
            if not rest[sample.id]:
                finish(sample)
    return failed


def _asked(sample, text):
    """The question as it is put; of a multiple choice with its options and their letters."""
    if not sample.options:
        return text
    options = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, sample.options))
    return f"{text}\n{options}\nAnswer with the letter of the right option."


def _likelihoods(chat, video, features_RC, sample):
    if not sample.options:
        return None
    (scores,) = answer_likelihoods(chat, video, features_RC, [(sample.texts[0], sample.options)])
    return [[round(value, 6), tokens] for value, tokens in scores]


def _line(sample, answers, digest, scores):
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
    }
    if sample.options:
        line |= {"options": list(sample.options), "right": sample.right, "likelihoods": scores}
    return line


def _settings(chat, config, files, samples):
    """What decides the predictions, and what they are of."""
    told, model = chat.config, Path(chat.config.model_name_or_path)
    weights = [path for pattern in _WEIGHTS for path in sorted(model.glob(pattern))]
    own = Path(chat.weights)
    own = [own] if own.is_file() else [path for pattern in _WEIGHTS for path in sorted(own.rglob(pattern))]
    adapter = [path for pattern in _ADAPTER for path in sorted(chat.adapter.glob(pattern))] if chat.adapter else []
    return {
        "task": config.task,
        "annotations": hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16],
        "samples": len(samples),
        "videos": len({sample.video for sample in samples}),
        "model": _fingerprint(weights),
        "weights": _fingerprint(own),
        **({"adapter": _fingerprint(adapter)} if adapter else {}),
        **{
            name: getattr(told, name)
            for name in ("conv_mode", "question_order", "num_frames", "temperature", "max_new_tokens", "seed", "bf16")
        },
        **({} if told.pooling in (None, RECIPE) else {"pooling": told.pooling}),
        "use_start_end": chat.tokenizer.tokens.start is not None,
    }


def _fingerprint(paths):
    """Of weights, wherever they lie: names, sizes, and the first and the last MiB of each file."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read())
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
    return found


def _same_settings(output, settings):
    """Keep the settings of a new folder; refuse to go on with others.

    Raises:
        ValueError: naming what differs.
    """
    path = output / SETTINGS
    known = read_json_object(path)
    if not known:
        with atomic_file(path) as file:
            file.write(json.dumps(settings, indent=1).encode() + b"\n")
        return
    differing = [
        f"{name} {known.get(name)} there, {settings.get(name)} now"
        for name in {**known, **settings}
        if known.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(
            f"{shown(output)} holds predictions of other settings ({'; '.join(differing)}); give another --output"
        )
