"""Videos as some trained weights see them: the tower and the frames of their training, and their projector.

Dimensions: R rows of a video, C channels of the vision tower, D of the language model.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastvid.batch import Features, by_tower, of_towers
from fastvid.checkpoints import checkpoint
from fastvid.checkpoints.find import projector_path
from fastvid.config import ChatConfig
from fastvid.config.pooling import RECIPE
from fastvid.data.conversation import CHAT_TEMPLATE, check_conv_mode
from fastvid.data.tokenizer import load_tokenizer
from fastvid.data.video_tokens import read_settings
from fastvid.features.file import load_features
from fastvid.features.folder import FeatureFolder
from fastvid.features.names import SUFFIXES
from fastvid.files import VIDEO_SUFFIXES, StrPath, is_url, model_folder, shown
from fastvid.inference.asking import Asking
from fastvid.inference.towers import towers_of
from fastvid.model.config import Precision
from fastvid.model.video_llava import make_projector
from fastvid.provenance import Provenance, agreed, agreed_frames, agreed_pooling, of_weights
from fastvid.video.decode import DecodeError
from fastvid.video.decode.worker import DecodeWorker
from fastvid.video.encoder import FeatureEncoder, open_device
from fastvid.video.listing import no_video
from fastvid.video.sampling import frame_indices
from fastvid.weights.model_config import read_model_config
from fastvid.weights.projector_file import read_projector
from fastvid.weights.starting import StartingWeights

Frames = np.ndarray | torch.Tensor  # [T, H, W, 3] uint8 RGB
MEDIA_SUFFIXES = (*SUFFIXES, *VIDEO_SUFFIXES)  # in the order in which one of several files is taken


class VideoSource(Asking):
    """What makes features of videos, and the rows that a language model reads of them, without that model.

    Args:
        config: as for `Chat`; what concerns answers is not looked at.

    Attributes:
        config: with what the weights tell about their training.
        device, tokenizer, model_config.
        weights: path of what was trained: the projector, or the model's folder.
        trained: `Provenance` of the weights.
        towers: the vision tower whose features the projector takes, or the two of them.

    Raises:
        ValueError: a folder, file or tensor that cannot be used, with the remedy.
    """

    def __init__(self, config: ChatConfig):
        config = replace(config, model_name_or_path=str(model_folder(config.model_name_or_path)))
        self.device = open_device(config.device)
        self._projector_path = None if config.projector is None else projector_path(config.projector, "--projector")
        self.weights = str(self._projector_path or config.model_name_or_path)
        self.trained = _trained_on(config.projector or self.weights, Path(self.weights))
        given = config.num_frames, config.pooling
        self.config = config = self._as_trained(config)
        start_end = _use_start_end(config, self.trained, self._projector_path)
        self.tokenizer = load_tokenizer(config.model_name_or_path, start_end)
        if self.config.conv_mode is None:
            own = "pg-video-llava" if self.tokenizer.template is None else CHAT_TEMPLATE
            self.config = replace(self.config, conv_mode=own)
        assert self.config.conv_mode is not None
        check_conv_mode(self.config.conv_mode, self.tokenizer)
        self._seed = _seed(self._projector_path)
        self.model_config = read_model_config(
            config.model_name_or_path, vocab_size=self.tokenizer.tokens.vocab_size, projector=self._projector_path
        )
        starting = self._starting()
        if starting.makes_projector:
            raise ValueError(f"{config.model_name_or_path} holds no projector: give the trained one with --projector")
        if starting.makes_second:
            raise ValueError(
                f"{self.weights} holds no projector of the second vision tower: give the trained ones with --projector"
            )
        self.towers = towers_of(config, self.model_config, self.trained, self.weights, *given)
        self.precision = Precision(torch.bfloat16 if config.bf16 else torch.float32)
        self._second: FeatureFolder | None = None
        self._worker = DecodeWorker()

    def _starting(self):
        return StartingWeights(
            self.model_config,
            self.config.model_name_or_path,
            tokens=self.tokenizer.tokens,
            projector=self._projector_path,
            seed=self._seed,
        )

    def _as_trained(self, config):
        """The configuration with what the weights tell about their training.

        Raises:
            ValueError: a flag says otherwise.
        """
        told = {
            name: agreed(f"--{name}", getattr(config, name), getattr(self.trained, name), otherwise, self.weights)
            for name, otherwise in (
                ("conv_mode", None),
                ("question_order", "reference"),
            )
        }
        pooling = agreed_pooling(config.pooling, self.trained.pooling, self.weights)
        frames = agreed_frames(config.num_frames, self.trained, self.weights, pooling)
        return replace(config, **told, num_frames=frames, pooling=pooling)

    @cached_property
    def projector(self) -> nn.Module:
        """From features to rows of the language model; loaded when it is first needed.

        Raises:
            ValueError: its tensors do not fit the model, or are not finite.
        """
        starting = self._starting()
        starting.check()
        dtype = self.precision.compute
        projector = make_projector(self.model_config, dtype=dtype, trained=False)
        with torch.no_grad():
            for name, parameter in projector.named_parameters():
                (piece,) = starting.pieces(f"projector.{name}")
                parameter.copy_(piece)
                if not parameter.isfinite().all():
                    starting.refuse_not_finite(f"projector.{name}")
        return projector.to(self.device)

    @torch.no_grad()
    def project(self, features_RC: Features) -> torch.Tensor:
        """[R, D] rows that the language model reads in the place of features, on the CPU, in the compute dtype.

        Raises:
            ValueError: features of other channels than the projector takes.
        """
        self.check_channels(features_RC)
        return self.projector(*(x.to(self.device, self.precision.compute) for x in by_tower(features_RC))).cpu()

    def embeddings(self, video: StrPath) -> torch.Tensor:
        """`project` of `features`."""
        return self.project(self.features(video))

    def features(self, video: StrPath) -> Features:
        """Features of a video, those of an image without temporal rows, or those that lie in a feature file.

        Of two towers a feature file's others lie in that of ``--video_2``.

        Raises:
            ValueError: no video, or features of another tower or size than the weights were trained on.
            OSError: the file cannot be read.
        """
        if is_url(video):
            raise ValueError(f"{shown(video)} is a URL: download the video and give its path")
        if Path(video).suffix in SUFFIXES:
            found = []
            for tower, file in zip(self.towers, self.feature_files(video)):
                features_RC, header = load_features(file)
                tower.check_made_alike(file, header)
                found.append(features_RC)
            self._check_rows(video, sum(map(len, found)), extracted=True)
            return of_towers(*found)
        frames, still = {}, False
        for look in looks(self.loaded_encoders(str(video))):
            num_frames, size = look
            try:
                frames[look], info = self._worker.decode(str(video), num_frames=num_frames, size=size)
            except DecodeError as error:
                raise ValueError(f"{video} {reason}" if (reason := no_video(video)) else str(error)) from error
            still = info.still
        return self.encode(frames, still=still)

    def features_of_frames(self, files: Sequence[StrPath]) -> Features:
        """Features of a video whose frames are pictures; of more than are seen, some are taken as of a video's."""
        frames = {}
        for look in looks(self.loaded_encoders(str(files[0]))):
            num_frames, size = look
            some = [files[i] for i in frame_indices(len(files), num_frames)] if len(files) > num_frames else files
            try:
                frames[look] = self._worker.pictures(some, size=size)
            except DecodeError as error:
                raise ValueError(str(error)) from error
        return self.encode(frames)

    def made_by(self, video: StrPath) -> str | None:
        """As of `Asking`; of a video, the tower that makes its features here."""
        return super().made_by(video) if Path(video).suffix in SUFFIXES else self.loaded_encoders()[0].revision

    def encode(self, frames: Mapping[tuple[int, int], Frames], *, still: bool = False) -> Features:
        """Features of one video, or of an image.

        Args:
            frames: for each of `looks` of `loaded_encoders` what `FeatureEncoder.encode` takes.
            still: they are an image.
        """
        encoders = self.loaded_encoders()
        return of_towers(*(encoder.encode(frames[look_of(encoder)], still=still) for encoder in encoders))

    def feature_files(self, video: StrPath) -> list[StrPath]:
        """The feature file of each tower, by that of the first.

        Raises:
            ValueError: there is none of the second tower's.
        """
        if len(self.towers) < 2:
            return [video]
        first, second = self.config.video, self.config.video_2
        if second is None:
            raise ValueError(
                f"{video} holds one vision tower's features, and {self.weights} was trained with two: give the other "
                "one's file, or the folder of them, with --video_2"
            )
        in_folder = first is not None and Path(first).is_dir()
        if Path(second).is_file() and not in_folder:
            return [video, second]
        self._second = self._second or FeatureFolder(second, flag="--video_2")
        return [video, self._second.resolve(os.path.relpath(video, first) if in_folder else Path(video).name)]

    @property
    def num_frames(self) -> int:
        """Most frames of a video whose features are made here (`Tower.num_frames`); of two towers, the first's."""
        return self.towers[0].num_frames

    @property
    def pooling(self) -> str:
        """What the rows of a video are whose features are made here (`Tower.pooling`); of two towers, the first's."""
        return self.towers[0].pooling

    def _check_rows(self, what, rows, *, extracted=False):
        """Refuse features of another number of rows than all that the weights were trained on.

        Of what is `extracted` chat's own flags change nothing.
        """
        trained = self.trained.rows
        if trained is not None and rows != trained:
            frames, two = trained - rows + (self.config.num_frames or 0), len(self.towers) > 1
            remedy = (
                "extract it with "
                if extracted
                else f"--num_frames {frames}, or "
                if self.trained.num_frames is None and self.config.pooling == RECIPE and frames > 0 and not two
                else "give "
            )
            raise ValueError(
                f"{what} has {rows} rows, {self.weights} was trained on features of {trained}: "
                f"{remedy}the tower, the frames and the pooling of training"
            )

    def close(self) -> None:
        """End the process that decodes."""
        self._worker.close()

    def loaded_encoders(self, video: str = "a video") -> tuple[FeatureEncoder, ...]:
        """The towers, which are loaded when they are first needed.

        Args:
            video: what is to be encoded, for messages.

        Raises:
            ValueError: there is none, or not the one of training; features of `num_frames` are not those of training.
        """
        encoders = tuple(tower.encoder(self.device, self.config.model_name_or_path) for tower in self.towers)
        told = (f"--num_frames {tower.num_frames} --pooling {tower.pooling}" for tower in self.towers)
        which = "this tower" if len(encoders) == 1 else "these towers"
        self._check_rows(
            f"{video} with {' and '.join(dict.fromkeys(told))} and {which}", sum(encoder.rows for encoder in encoders)
        )
        return encoders


def look_of(encoder: FeatureEncoder) -> tuple[int, int]:
    """(most frames, pixels of their side) that a tower sees of a video."""
    return encoder.num_temporal, encoder.image_size


def looks(encoders: Iterable[FeatureEncoder]) -> list[tuple[int, int]]:
    """`look_of` of some towers, each once: a video is decoded for each."""
    return list(dict.fromkeys(map(look_of, encoders)))


def _trained_on(given, weights):
    """The Provenance of weights, or of the checkpoint beside a projector file of an older version, which holds none."""
    trained = of_weights(weights)
    if trained == Provenance() and weights.is_file() and Path(given).is_dir():
        try:
            newest = checkpoint.newest_valid(given, alone=True)
        except ValueError:  # damaged, and not what is used
            newest = None
        return trained if newest is None else of_weights(newest)
    return trained


def _seed(projector):
    """That of the run that saved a checkpoint: of the rows that it did not train."""
    if projector is None or not projector.is_dir():
        return 42
    return checkpoint.read_state(projector).get("config", {}).get("seed", 42)


def _use_start_end(config, trained, projector):
    """Whether prompts have <vid_start> and <vid_end>: as told, else as trained, else where they have rows."""
    told = agreed(
        "--mm_use_vid_start_end",
        config.mm_use_vid_start_end,
        trained.use_start_end,
        read_settings(config.model_name_or_path).get("mm_use_vid_start_end"),
        projector,
    )
    if told is not None:
        return told
    tokens = load_tokenizer(config.model_name_or_path, None).tokens
    if tokens.start is not None or projector is None:
        return tokens.start is not None
    read_projector(projector)  # raises whatever the flag does not mend
    try:
        with_both = load_tokenizer(config.model_name_or_path, True).tokens
        return "boundary.weight" in read_projector(projector, with_both)
    except ValueError as error:
        raise ValueError(f"{error}. If it was trained without them: --mm_use_vid_start_end False") from error
