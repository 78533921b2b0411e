"""Videos as some trained weights see them: the tower and the frames of their training, and their projector.

Dimensions: R rows of a video, C channels of the vision tower, D of the language model.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from fastvid.checkpoints import checkpoint
from fastvid.checkpoints.find import projector_path
from fastvid.config import ChatConfig
from fastvid.data.conversation import CHAT_TEMPLATE, check_conv_mode, inference_prompt
from fastvid.data.tokenizer import load_tokenizer
from fastvid.data.video_tokens import read_settings
from fastvid.features.file import load_features
from fastvid.features.names import SUFFIXES
from fastvid.files import VIDEO_SUFFIXES, StrPath, is_url, model_folder, shown
from fastvid.model.config import Precision
from fastvid.model.video_llava import make_projector
from fastvid.pooling import RECIPE
from fastvid.provenance import Provenance, agreed, agreed_pooling, of_weights, same_tower
from fastvid.video.decode import DecodeError
from fastvid.video.decode.worker import DecodeWorker
from fastvid.video.encoder import FeatureEncoder, open_device
from fastvid.video.listing import no_video
from fastvid.video.towers.choice import check_tower, choose_tower, revisions
from fastvid.weights.model_config import read_model_config
from fastvid.weights.projector_file import read_projector
from fastvid.weights.starting import StartingWeights

MEDIA_SUFFIXES = (*SUFFIXES, *VIDEO_SUFFIXES)  # in the order in which one of several files is taken


class VideoSource:
    """What makes features of videos, and the rows that a language model reads of them, without that model.

    Args:
        config: as for `Chat`; what concerns answers is not looked at.

    Attributes:
        config: with what the weights tell about their training.
        device, tokenizer, model_config.
        weights: path of what was trained: the projector, or the model's folder.
        trained: `Provenance` of the weights.

    Raises:
        ValueError: a folder, file or tensor that cannot be used, with the remedy.
    """

    def __init__(self, config: ChatConfig):
        config = replace(config, model_name_or_path=str(model_folder(config.model_name_or_path)))
        self.device = open_device(config.device)
        self._projector_path = None if config.projector is None else projector_path(config.projector, "--projector")
        self.weights = str(self._projector_path or config.model_name_or_path)
        self.trained = _trained_on(config.projector or self.weights, Path(self.weights))
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
        if config.vision_tower is not None and Path(config.vision_tower).is_dir():
            check_tower(config.vision_tower, self.trained, self.weights)
        self.precision = Precision(torch.bfloat16 if config.bf16 else torch.float32)
        self._encoder: FeatureEncoder | None = None
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
                ("num_frames", 100),
            )
        }
        return replace(config, **told, pooling=agreed_pooling(config.pooling, self.trained.pooling, self.weights))

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
    def project(self, features_RC: torch.Tensor) -> torch.Tensor:
        """[R, D] rows that the language model reads in the place of features, on the CPU, in the compute dtype.

        Raises:
            ValueError: features of other channels than the projector takes.
        """
        self.check_channels(features_RC)
        return self.projector(features_RC.to(self.device, self.precision.compute)).cpu()

    def embeddings(self, video: StrPath) -> torch.Tensor:
        """`project` of `features`."""
        return self.project(self.features(video))

    def prompt(
        self,
        features_RC: torch.Tensor,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        answer: str | None = None,
    ) -> list[int]:
        """Token ids of a question about the [R, C] features of a video, and of its answer if one is given.

        Raises:
            ValueError: features that do not fit the model, or a text that cannot be asked.
        """
        self.check_channels(features_RC)
        config = self.config
        assert config.conv_mode is not None and config.question_order is not None, "settled with the weights"
        return inference_prompt(
            question,
            self.tokenizer,
            video_tokens=len(features_RC),
            use_start_end=self.tokenizer.tokens.start is not None,
            conv_mode=config.conv_mode,
            history=history,
            question_order=config.question_order,
            answer=answer,
        )

    def check_channels(self, features_RC: torch.Tensor) -> None:
        """Refuse what is no [R, C] features that the projector takes (ValueError)."""
        channels = self.model_config.mm_hidden_size
        if features_RC.dim() != 2 or features_RC.shape[1] != channels:
            raise ValueError(
                f"features are {list(features_RC.shape)}, the projector takes [rows, {channels}]: they "
                "were made with another vision tower"
            )

    def features(self, video: StrPath) -> torch.Tensor:
        """[R, C] features of a video, those of an image without temporal rows, or those that lie in a feature file.

        Raises:
            ValueError: no video, or features of another tower or size than the weights were trained on.
            OSError: the file cannot be read.
        """
        if is_url(video):
            raise ValueError(f"{shown(video)} is a URL: download the video and give its path")
        if Path(video).suffix in SUFFIXES:
            features_RC, header = load_features(video)
            self._check_made_alike(video, header)
            self._check_rows(video, len(features_RC), extracted=True)
        else:
            encoder = self.loaded_encoder(str(video))
            try:
                frames, info = self._worker.decode(str(video), num_frames=self.num_frames, size=encoder.image_size)
            except DecodeError as error:
                raise ValueError(f"{video} {reason}" if (reason := no_video(video)) else str(error)) from error
            features_RC = encoder.encode(frames, still=info.still)
        return features_RC

    @property
    def num_frames(self) -> int:
        """Most frames of a video, as settled with the weights."""
        assert self.config.num_frames is not None
        return self.config.num_frames

    @property
    def pooling(self) -> str:
        """What the rows of a video are whose features are made here, as ``--pooling`` says it.

        Raises:
            ValueError: the weights were trained with several poolings, and the user names none.
        """
        if self.config.pooling is None:
            raise ValueError(
                f"{self.weights} was trained with features of several poolings ({self.trained.pooling}); name the one "
                "that videos get with --pooling"
            )
        return self.config.pooling

    def _check_rows(self, what, rows, *, extracted=False):
        """Refuse features of another number of rows than all that the weights were trained on.

        Of what is `extracted` chat's own flags change nothing.
        """
        trained = self.trained.rows
        if trained is not None and rows != trained:
            frames = trained - rows + self.num_frames
            remedy = (
                "extract it with "
                if extracted
                else f"--num_frames {frames}, or "
                if self.trained.num_frames is None and self.config.pooling == RECIPE and frames > 0
                else "give "
            )
            raise ValueError(
                f"{what} has {rows} rows, {self.weights} was trained on features of {trained}: "
                f"{remedy}the tower, the frames and the pooling of training"
            )

    def _check_made_alike(self, file, header):
        """Refuse a feature file whose header contradicts the weights."""
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
                f"{file} was made by another tower ({made.tower}) than --vision_tower "
                f"{self.config.vision_tower}; extract it with that one, or leave --vision_tower out"
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

    @cached_property
    def _given_revisions(self):
        """What identifies the folder that --vision_tower names; nothing where it names none."""
        tower = self.config.vision_tower
        return revisions(tower) if tower and Path(tower).is_dir() else ()

    def close(self) -> None:
        """End the process that decodes."""
        self._worker.close()

    def loaded_encoder(self, video: str = "a video") -> FeatureEncoder:
        """The tower, which is loaded when it is first needed.

        Args:
            video: what is to be encoded, for messages.

        Raises:
            ValueError: there is none, or not the one of training; features of `num_frames` are not those of training.
        """
        if self._encoder is None:
            tower = choose_tower(self.config.vision_tower, self.trained, self.weights, self.model_config.vision_tower)
            if tower is None:
                raise ValueError(f"{self.config.model_name_or_path} names no vision tower: give --vision_tower")
            encoder = FeatureEncoder(tower, device=self.device, num_temporal=self.num_frames, pooling=self.pooling)
            if encoder.hidden_size != self.model_config.mm_hidden_size:
                raise ValueError(
                    f"--vision_tower {tower} has {encoder.hidden_size} channels, the projector takes "
                    f"{self.model_config.mm_hidden_size}: give the tower that made the features"
                )
            check_tower(tower, self.trained, self.weights)
            self._encoder = encoder
        self._check_rows(
            f"{video} with --num_frames {self.num_frames} --pooling {self.pooling} and this tower", self._encoder.rows
        )
        return self._encoder


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
