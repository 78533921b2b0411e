"""A vision tower that a model was trained with: what is checked of its features, and the encoder that makes them."""

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastvid.config import ChatConfig
from fastvid.config.pooling import is_known
from fastvid.files import StrPath, shown
from fastvid.model.config import ModelConfig
from fastvid.provenance import Provenance, same_tower, why_no_frames, why_no_pooling
from fastvid.video.encoder import FeatureEncoder
from fastvid.video.towers.choice import check_tower, choose_tower, revisions

log = logging.getLogger("fastvid")


class Tower:
    """One of the vision towers that a model's features are of: the only one, or one of two.

    Args:
        flag: that names it, without dashes.
        given: what the user says there, or None.
        trained: Provenance of its features.
        weights: path of the weights, for messages.
        otherwise: the model's own setting of it, or None.
        channels: that the projector takes.
        num_frames: most frames of a video; None where the weights tell no one number.
        pooling: what a video's rows are, as ``--pooling`` says it; None where the weights tell none to make.
        given_frames, given_pooling: what the user says with ``--num_frames`` and ``--pooling``, or None.

    Raises:
        ValueError: the folder that the user names is that of another tower.
    """

    def __init__(
        self,
        flag: str,
        given: str | None,
        trained: Provenance,
        weights: str,
        *,
        otherwise: str | None,
        channels: int,
        num_frames: int | None,
        pooling: str | None,
        given_frames: int | None,
        given_pooling: str | None,
    ):
        self.flag, self.given, self.trained, self.weights = f"--{flag}", given, trained, weights
        self._otherwise, self._channels = otherwise, channels
        self._num_frames, self._pooling = num_frames, pooling
        self._given_frames, self._given_pooling = given_frames, given_pooling
        self._encoder: FeatureEncoder | None = None
        self._warned: set[tuple[str | None, int | None]] = set()
        if given is not None and Path(given).is_dir():
            check_tower(given, trained, weights, self.flag)

    @property
    def num_frames(self) -> int:
        """Most frames of a video whose features are made here.

        Raises:
            ValueError: the weights tell no one number, and the user gives none.
        """
        if self._num_frames is None:
            raise ValueError(f"{why_no_frames(self.weights)}; give the one that videos get with --num_frames")
        return self._num_frames

    @property
    def pooling(self) -> str:
        """What the rows of a video are whose features are made here.

        Raises:
            ValueError: the weights were trained with several poolings, or with one that is not known here, and the
                user names none.
        """
        if self._pooling is None:
            known = any(map(is_known, (self.trained.pooling or "").split("; ")))
            raise ValueError(
                f"{why_no_pooling(self.trained.pooling, self.weights)}; "
                + ("name the one that videos get with --pooling" if known else "give feature files, not videos")
            )
        return self._pooling

    def encoder(self, device: torch.device, model: str) -> FeatureEncoder:
        """The tower, which is loaded when it is first needed.

        Args:
            model: path of the model folder, for messages.

        Raises:
            ValueError: there is none, or not the one of training.
        """
        if self._encoder is None:
            tower = choose_tower(self.given, self.trained, self.weights, self._otherwise, self.flag)
            if tower is None:
                raise ValueError(f"{model} names no vision tower: give {self.flag}")
            encoder = FeatureEncoder(tower, device=device, num_temporal=self.num_frames, pooling=self.pooling)
            if encoder.hidden_size != self._channels:
                raise ValueError(
                    f"{self.flag} {tower} has {encoder.hidden_size} channels, the projector takes "
                    f"{self._channels}: give the tower that made the features"
                )
            check_tower(tower, self.trained, self.weights, self.flag)
            self._encoder = encoder
        return self._encoder

    def check_made_alike(self, file: StrPath, header: dict[str, Any]) -> None:
        """Refuse a feature file whose header contradicts the weights.

        Raises:
            ValueError: naming what differs.
        """
        made, trained = Provenance.of_header(header), self.trained
        if made.tower_revision and same_tower(trained.tower_revision, (made.tower_revision,)) is False:
            raise ValueError(
                f"{file} was made by another tower ({made.tower}) than the features that {self.weights} "
                f"was trained on ({trained.tower}); extract it with that one"
            )
        if (
            trained.tower_revision is None
            and made.tower_revision
            and self._given_revisions
            and (same_tower(made.tower_revision, self._given_revisions) is False)
        ):
            raise ValueError(
                f"{file} was made by another tower ({made.tower}) than {self.flag} "
                f"{self.given}; extract it with that one, or leave {self.flag} out"
            )
        if None not in (made.num_frames, trained.num_frames) and made.num_frames != trained.num_frames:
            raise ValueError(
                f"{file} was made with --num_frames {made.num_frames}, {self.weights} was trained with "
                f"{trained.num_frames}; extract it with that"
            )
        if made.pooling and trained.pooling and made.pooling not in trained.pooling.split("; "):
            raise ValueError(
                f"{file} was made with --pooling {made.pooling}, {self.weights} was trained with {trained.pooling}; "
                "extract it with that pooling"
            )
        pair = made.pooling, made.num_frames
        if trained.made_with and None not in pair and pair not in trained.made_with:
            said = (
                f"{file} was made with --pooling {made.pooling} --num_frames {made.num_frames}, {self.weights} was "
                f"trained with {trained.pairs}"
            )
            if not trained.may_have_others:
                raise ValueError(f"{said}; extract it with one of these")
            if pair not in self._warned:
                log.warning("%s", said)
            self._warned.add(pair)
        frames = None if pair in trained.made_with else self._given_frames  # those are right, whatever videos get
        if trained.num_frames is None and made.num_frames and frames and made.num_frames != frames:
            raise ValueError(
                f"{file} was made with --num_frames {made.num_frames}, not with the --num_frames {frames} that is "
                "given; extract it with that, or leave --num_frames out"
            )
        given = self._given_pooling
        if trained.pooling is None and made.pooling and given and made.pooling != given:
            raise ValueError(
                f"{file} was made with --pooling {made.pooling}, not with the --pooling {given} that is given; extract "
                "it with that, or leave --pooling out"
            )

    @property
    def revision(self) -> str | None:
        """What identifies it, where the weights or the folder that the user names tell."""
        return self.trained.tower_revision or next(iter(self._given_revisions), None)

    @cached_property
    def _given_revisions(self):
        """What identifies the folder that the user names; nothing where that is none."""
        return revisions(self.given) if self.given and Path(self.given).is_dir() else ()


def towers_of(
    config: ChatConfig,
    model: ModelConfig,
    trained: Provenance,
    weights: str,
    given_frames: int | None,
    given_pooling: str | None,
) -> tuple[Tower, ...]:
    """The vision towers whose features a model takes.

    Args:
        config: with what was settled with the weights.
        model: sizes.
        trained: Provenance of the weights.
        weights: their path, for messages.
        given_frames, given_pooling: what the user says with ``--num_frames`` and ``--pooling``, or None.

    Raises:
        ValueError: a flag is of a second tower where there is one, or names another tower's folder.
    """
    first = Tower(
        "vision_tower",
        config.vision_tower,
        trained,
        weights,
        otherwise=model.vision_tower,
        channels=model.mm_hidden_size,
        num_frames=config.num_frames,
        pooling=config.pooling,
        given_frames=given_frames,
        given_pooling=given_pooling,
    )
    if model.mm_hidden_size_2 is None:
        for flag, given in (("video_2", config.video_2), ("vision_tower_2", config.vision_tower_2)):
            if given is not None:
                raise ValueError(f"--{flag} {shown(given)}: {weights} was trained with one vision tower; leave it out")
        return (first,)
    second = trained.second or Provenance()
    poolings = second.pooling.split("; ") if second.pooling else [config.pooling]
    pooling = poolings[0] if len(poolings) == 1 else config.pooling if config.pooling in poolings else None
    of_training = {frames for each, frames in second.made_with if each == pooling} or {second.num_frames}
    frames = sorted(number for number in of_training if number is not None)
    asked = config.num_frames if not frames or config.num_frames in frames else None
    return first, Tower(
        "vision_tower_2",
        config.vision_tower_2,
        second,
        weights,
        otherwise=None,
        channels=model.mm_hidden_size_2,
        num_frames=frames[0] if len(frames) == 1 else asked,
        pooling=pooling if pooling is not None and is_known(pooling) else None,
        given_frames=given_frames,
        given_pooling=given_pooling,
    )
