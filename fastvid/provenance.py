"""Where trained weights come from: what decides whether their answers are right, and travels with them.

A model answers rightly about features of the tower and the frame count that it was trained on, asked in the prompt of
its training. Feature headers and flags say what these were. They are kept

- in a checkpoint's state.json, as "provenance";
- in the metadata of ``mm_projector.safetensors``;
- in ``mm_projector.bin``, as a member of the zip file that torch.save writes. Its tensors are the reference's: neither
  torch.load nor the reference sees the member;
- in the config.json of an export, below "fastvid_export".

Weights of others have none. What is read here may come from anywhere: it is checked, and nothing of it is executed.
"""

import json
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from fastvid.config.pooling import OF_AN_IMAGE, RECIPE, is_known
from fastvid.files import StrPath, shown

__all__ = [
    "EXPORT_MARK",
    "KEY",
    "Provenance",
    "add_to_bin",
    "agreed",
    "agreed_frames",
    "agreed_pooling",
    "decoders_of",
    "in_fp8",
    "is_of_an_image",
    "of_features",
    "of_state",
    "of_weights",
    "same_tower",
    "what_decoders_mean",
    "what_fp8_means",
    "what_frames_mean",
    "what_pooling_means",
    "why_no_frames",
    "why_no_pooling",
]

KEY = "provenance"
EXPORT_MARK = "fastvid_export"  # the key of config.json by which an export of ours is known
_MEMBER = "fastvid/provenance.json"
_MOST_BYTES = 1 << 20  # of a member of a zip file: more is not ours
_OTHERS = "; perhaps others"
_PAIR = re.compile(r"(.+) of ([0-9]{1,9}) frames")
_LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
_TEMPLATES = {"v1": "vicuna_v1_1"}  # older checkpoints know the flag --version

T = TypeVar("T")


@dataclass(frozen=True)
class Provenance:
    """What a model was trained on and with; None where nothing tells.

    Attributes:
        tower: vision tower of the features, folder or hub id.
        tower_revision: what identifies its weights (`fastvid.video.towers.choice.revisions`).
        num_frames: most frames per video, which are the features' temporal rows unless `pooling` says otherwise.
        rows: rows of every video; None also where videos differ.
        conv_mode: template of the prompts.
        question_order: "reference" or "video_first".
        use_start_end: whether <vid_start> and <vid_end> stood around a video.
        decoder: what decoded the videos; of several all, with "; " between them.
        conversion: what made RGB of their samples ("swscale" or "dali"); of several all, likewise.
        tower_dtype: ``--tower_dtype`` of their extraction, "auto" or "fp8"; of several all, likewise. Of files that
            are all "auto" it is None, as of those that do not tell.
        lora: whether a LoRA adapter was trained together with these weights, which are nothing without it.
        pooling: what the rows of their videos are, as ``--pooling`` says it; of several all, with "; " between them.
        pairs: which pooling came with which frames, where videos differ in either: "grid:16x12x12 of 16 frames; …"; at
            its end "perhaps others" if not every file was looked at.
        second: the same of a second vision tower's features, but for what is the model's alone. `rows` are those of
            both towers.
    """

    tower: str | None = None
    tower_revision: str | None = None
    num_frames: int | None = None
    rows: int | None = None
    conv_mode: str | None = None
    question_order: str | None = None
    use_start_end: bool | None = None
    decoder: str | None = None
    conversion: str | None = None
    tower_dtype: str | None = None
    lora: bool | None = None
    pooling: str | None = None
    pairs: str | None = None
    second: "Provenance | None" = None

    @property
    def towers(self) -> tuple["Provenance", ...]:
        """What is known of each vision tower's features."""
        return (self,) if self.second is None else (self, self.second)

    @property
    def made_with(self) -> set[tuple[str, int]]:
        """{(pooling, frames)} of `pairs`; empty where nothing tells which went together."""
        found = map(_PAIR.fullmatch, (self.pairs or "").split("; "))
        return {(pair[1], int(pair[2])) for pair in found if pair is not None}

    @property
    def may_have_others(self) -> bool:
        """Whether features may have been of other pairs than `made_with`."""
        return not self.made_with or (self.pairs or "").endswith(_OTHERS)

    @classmethod
    def of_header(cls, header: dict[str, Any]) -> Self:
        """From the header of a feature file, which tells the decoder and the conversion under "video".

        A line of an extraction's manifest, where "video" is a name, tells the decoder and which conversion was asked
        for. An image's own rows and its one frame tell nothing of videos.
        """
        if not isinstance(header, dict):
            return cls()
        if is_of_an_image(header):
            header = {**header, "pooling": None, "num_frames": None}
        video = header.get("video")
        own = (
            {name: video[name] for name in ("decoder", "conversion") if name in video}
            if isinstance(video, dict)
            else {}
        )
        return cls.of({**header, **own} if own else header)

    @classmethod
    def of(cls, values: object) -> Self:
        """From what JSON held; what is of another type than it must be is left out.

        What names a number of frames and no pooling is older than ``--pooling``: it is of the recipe.
        """
        kinds = {"num_frames": int, "rows": int, "use_start_end": bool, "lora": bool}
        found = values if isinstance(values, dict) else {}
        told = {f.name: found[f.name] for f in fields(cls) if type(found.get(f.name)) is kinds.get(f.name, str)}
        second = found.get("second")
        if isinstance(second, dict):  # which has no second one in turn
            told["second"] = cls.of({name: value for name, value in second.items() if name != "second"})
        if "num_frames" in told and "pooling" not in found:
            told["pooling"] = RECIPE
        return cls(**told)

    def to_json(self) -> dict[str, Any]:
        """{name: value} of what is known."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "second"}
        told = {name: value for name, value in own.items() if value is not None}
        return told if self.second is None else {**told, "second": self.second.to_json()}


def is_of_an_image(header: dict[str, Any]) -> bool:
    """Whether a feature file's header is that of an image."""
    return header.get("pooling") == OF_AN_IMAGE


def of_features(
    looked_at: Collection[tuple[int, dict[str, Any]]], *, of_more: bool = False
) -> tuple[Provenance, Counter[tuple[str | None, str]]]:
    """(Provenance, {(tower, revision): how many}) of feature files, as far as their headers tell.

    A tower is known by its revision; of several spellings of its name the first counts.

    Args:
        looked_at: (rows, header) of each file. A header may be empty.
        of_more: there are files that were not looked at.

    Returns:
        The Provenance holds what all files with a header agree about: of several towers it names none.
    """
    towers, names, products = Counter(), {}, in_fp8(header for _, header in looked_at)
    pairs = set()
    for _, header in looked_at:
        made = Provenance.of_header(header)
        if made.tower_revision is not None:
            name = names.setdefault(made.tower_revision, made.tower)
            towers[name, made.tower_revision] += 1
            if is_of_an_image(header):
                continue
            pairs.add((made.pooling, made.num_frames))
    rows, frames = {number for number, _ in looked_at}, {number for _, number in pairs}
    told = [] if any(None in pair for pair in pairs) or len(pairs) < 2 else pairs
    tower, revision = None, None
    if len(towers) == 1:
        ((tower, revision),) = towers
        if tower is not None and Path(tower).is_dir():
            tower = str(Path(tower).absolute())
    told = _joined(f"{pooling} of {number} frames" for pooling, number in told)
    decoded = decoders_of(header for _, header in looked_at)
    decoder, conversion = _joined(name for name, _ in decoded), _joined(name for _, name in decoded)
    return Provenance(
        tower,
        revision,
        frames.pop() if len(frames) == 1 else None,
        rows.pop() if len(rows) == 1 else None,
        decoder=decoder,
        conversion=conversion,
        tower_dtype=("auto; fp8" if products[False] else "fp8") if products[True] else None,
        pooling=_joined(pooling for pooling, _ in pairs),
        pairs=told + _OTHERS * of_more if told else None,
    ), towers


def _joined(names: Iterable[str | None]) -> str | None:
    return "; ".join(sorted({name for name in names if name is not None})) or None


def in_fp8(headers: Iterable[dict[str, Any]]) -> Counter[bool]:
    """{whether their tower multiplied in FP8: how many} of feature files whose headers name a tower."""
    found = map(Provenance.of_header, headers)
    return Counter(made.tower_dtype == "fp8" for made in found if made.tower_revision is not None)


def what_fp8_means(counts: Counter[bool]) -> str | None:
    """What it means that some features of a training set are of a tower in FP8, and some are not; None where all agree.

    Args:
        counts: as `in_fp8` gives them.
    """
    if not (counts[True] and counts[False]):
        return None
    return (
        f"{counts[True]:,} features are of a tower in FP8, {counts[False]:,} are not, and differ a little; "
        "`fastvid extract --overwrite True` without --tower_dtype fp8 makes them alike"
    )


def decoders_of(headers: Iterable[dict[str, Any]]) -> Counter[tuple[str | None, str | None]]:
    """{(decoder, conversion): how many} of feature files whose headers tell one of the two; None for the other."""
    found = ((made.decoder, made.conversion) for made in map(Provenance.of_header, headers))
    return Counter(pair for pair in found if pair != (None, None))


def what_decoders_mean(counts: Counter[tuple[str | None, str | None]]) -> tuple[str | None, str | None]:
    """What several decoders or conversions of one training set mean: (a remark, a warning), at most one of them.

    PyAV and NVDEC give the same bytes, so that several decoders of one conversion are worth a remark. Another
    conversion gives other colours.

    Args:
        counts: as `decoders_of` gives them.
    """
    conversions, decoders = Counter(), Counter()
    for (decoder, conversion), count in counts.items():
        conversions[conversion] += count * (conversion is not None)
        decoders[decoder] += count * (decoder is not None)
    conversions, decoders = +conversions, +decoders
    if len(conversions) > 1:
        return None, (
            f"features of {len(conversions)} colour conversions: {_listed(conversions)}. The same picture "
            "has other features with each; `fastvid extract --overwrite True` without --decoder dali makes "
            "them alike"
        )
    if len(decoders) > 1:
        return f"features of {len(decoders)} decoders, whose bytes are the same: {_listed(decoders)}", None
    return None, None


def what_pooling_means(given: str | None, poolings: Iterable[str | None]) -> str | None:
    """What it means that features which are there are of another pooling than ``--pooling`` says; None where none are.

    Args:
        given: what the user said; None if nothing.
        poolings: of each feature file, as far as its header tells.
    """
    return _left_as_they_are("pooling", given, Counter(pooling for pooling in poolings if pooling not in (None, given)))


def what_frames_mean(given: int | None, frames: Iterable[int | None]) -> str | None:
    """The same of ``--num_frames``; `frames` are those of videos' feature files, as far as their headers tell."""
    others = Counter(f"{number} frames" for number in frames if number not in (None, given))
    return _left_as_they_are("num_frames", given, others)


def _left_as_they_are(flag, given, others):
    if given is None or not others:
        return None
    return (
        f"--{flag} {given} is for videos that have no features yet; those that are there are used as they are: "
        f"{_listed(others)}"
    )


def _listed(counts):
    return ", ".join(
        f"{count:,} of {shown(name)}" for name, count in sorted(counts.items(), key=lambda found: (-found[1], found[0]))
    )


def of_weights(path: StrPath) -> Provenance:
    """The Provenance that a projector file, a checkpoint, a model folder or an export holds; empty without one.

    A file that cannot be read has none: whoever loads its weights says what is wrong with it.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return Provenance.of(json.loads(_safetensors_metadata(path).get(KEY, "{}")))
        if path.is_file():
            return _of_bin(path)
        if (path / "state.json").is_file():
            return of_state(json.loads((path / "state.json").read_text(encoding="utf-8")))
        if (path / "config.json").is_file():
            values = json.loads((path / "config.json").read_text(encoding="utf-8"))
            return Provenance.of(values.get(EXPORT_MARK, {}).get(KEY))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError, zipfile.BadZipFile):
        pass
    return Provenance()


def of_state(state: dict[str, Any]) -> Provenance:
    """The Provenance in a checkpoint's state. An older one's flags tell the prompt, and nothing tells the features."""
    flags = state.get("config", {})
    version = flags.get("version")
    told = Provenance.of(
        {
            "question_order": flags.get("question_order"),
            "conv_mode": _TEMPLATES.get(version, version),
            "use_start_end": flags.get("mm_use_vid_start_end"),
        }
    )
    trained = Provenance.of(state.get(KEY))
    return replace(told, **{f.name: value for f in fields(trained) if (value := getattr(trained, f.name)) is not None})


def add_to_bin(path: StrPath, provenance: Provenance) -> None:
    """Put `provenance` into a file that torch.save wrote, beside the tensors, which stay where they are."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        root = archive.namelist()[0].partition("/")[0]
        # The date is ZipInfo's fixed one, so that the same weights make the same file.
        archive.writestr(zipfile.ZipInfo(f"{root}/{_MEMBER}"), json.dumps(provenance.to_json()))


def _of_bin(path):
    if not zipfile.is_zipfile(path):
        return Provenance()
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith(f"/{_MEMBER}") and member.file_size <= _MOST_BYTES:
                return Provenance.of(json.loads(archive.read(member)))
    return Provenance()


def _safetensors_metadata(path):
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(min(length, _LONGEST_HEADER)))["__metadata__"]


def same_tower(recorded: str | None, found: Sequence[str]) -> bool | None:
    """Whether the tower that `recorded` identifies is the one that has the revisions `found`.

    None where nothing tells: a hub's commit and a digest of files cannot be compared. Only the first of `found`, by
    which the tower is mostly known, can tell another one: a hub's copy may lack files that a download has.
    """
    if recorded is None or recorded in found:
        return None if recorded is None else True
    return False if found[0].startswith("sha256:") == recorded.startswith("sha256:") else None


def agreed_pooling(given: str | None, trained: str | None, weights: StrPath) -> str | None:
    """`agreed` of ``--pooling``; None where the user says none, and `why_no_pooling` what the weights say.

    Raises:
        ValueError: the user and the weights contradict each other.
    """
    of_training = trained.split("; ") if trained is not None else []
    if len(of_training) > 1:
        if given is not None and given not in of_training:
            known = " or ".join(filter(is_known, of_training))
            raise ValueError(
                f"--pooling {given}: {weights} was trained with {' and '.join(of_training)}, and would answer wrongly; "
                + (f"give {known}" if known else "leave --pooling out")
            )
        return given
    pooling = agreed("--pooling", given, trained, RECIPE, weights)
    return pooling if is_known(pooling) else None


def why_no_pooling(trained: str | None, weights: StrPath) -> str:
    """Why `agreed_pooling` is None, in words."""
    if "; " in (trained or ""):
        return f"{shown(weights)} was trained with features of several poolings ({trained})"
    return f"{shown(weights)} was trained with features of the pooling {shown(trained)}, which is not known here"


def agreed_frames(given: int | None, trained: Provenance, weights: StrPath, pooling: str | None = None) -> int | None:
    """`agreed` of ``--num_frames``; None where the user says none, and the weights' features had several.

    Args:
        pooling: that goes with it, if that is known: the weights may tell the frames that came with it.

    Raises:
        ValueError: the user and the weights contradict each other.
    """
    with_it = sorted({frames for each, frames in trained.made_with if pooling in (None, each)})
    if with_it:
        if given is not None and given not in with_it and not trained.may_have_others:
            raise ValueError(
                f"--num_frames {given}: {weights} was trained with {trained.pairs}, and would answer wrongly; give "
                + " or ".join(map(str, with_it))
            )
        return given or (with_it[0] if len(with_it) == 1 else None)
    if given is None and trained.num_frames is None and trained.pooling is not None:
        return None
    return agreed("--num_frames", given, trained.num_frames, 100, weights)


def why_no_frames(weights: StrPath) -> str:
    """Why `agreed_frames` is None, in words."""
    return f"{shown(weights)} tells no one number of frames that the videos of its training had"


def agreed(flag: str, given: T | None, trained: T | None, otherwise: T, weights: StrPath) -> T:
    """The value of a flag: as given, else as trained where the weights tell, else `otherwise`.

    Args:
        flag: its name, with dashes.
        given: what the user said; None if nothing.
        trained: what the weights say; None if nothing.
        weights: path of the weights, for the message.

    Raises:
        ValueError: the user and the weights contradict each other.
    """
    if given is not None and trained is not None and given != trained:
        raise ValueError(
            f"{flag} {given}: {weights} was trained with {trained}, and would answer wrongly; leave {flag} out"
        )
    return next((value for value in (given, trained) if value is not None), otherwise)
