"""A loaded model that answers questions about videos, asked as the reference's inference asks them.

Dimensions: R rows of a video, C channels of the vision tower.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastvid.checkpoints import checkpoint
from fastvid.checkpoints.find import projector_path
from fastvid.config import ChatConfig
from fastvid.data.conversation import CHAT_TEMPLATE, EncodedSample, check_conv_mode, inference_prompt
from fastvid.data.packing import pack
from fastvid.data.tokenizer import load_tokenizer
from fastvid.data.video_tokens import read_settings
from fastvid.features.file import load_features
from fastvid.features.names import SUFFIXES
from fastvid.files import VIDEO_SUFFIXES, StrPath, is_url, model_folder, shown
from fastvid.inference.batching import Batcher, Request
from fastvid.inference.generate import generate
from fastvid.model.attention_check import settle_attention
from fastvid.model.config import Precision
from fastvid.model.video_llava import VideoLlava
from fastvid.policy import Trainable
from fastvid.pooling import RECIPE
from fastvid.provenance import Provenance, agreed, agreed_pooling, of_weights, same_tower
from fastvid.video.decode import DecodeError
from fastvid.video.decode.worker import DecodeWorker
from fastvid.video.encoder import FeatureEncoder, open_device
from fastvid.video.listing import no_video
from fastvid.video.towers.choice import check_tower, choose_tower, revisions
from fastvid.weights.adapter import adapter_folder, adapter_of
from fastvid.weights.model_config import read_model_config
from fastvid.weights.projector_file import read_projector
from fastvid.weights.starting import StartingWeights, load_weights

MEDIA_SUFFIXES = (*SUFFIXES, *VIDEO_SUFFIXES)  # in the order in which one of several files is taken


class Chat:
    """A loaded model that answers questions about videos. A LoRA adapter is merged into its matrices.

    Args:
        config: or its fields by name: ``Chat(model_name_or_path=…, projector=…)``.

    Raises:
        ValueError: a folder, file or tensor that cannot be used, with the remedy.
    """

    def __init__(self, config: ChatConfig | None = None, **settings: Any):
        config = config or ChatConfig(**settings)
        config = replace(config, model_name_or_path=str(model_folder(config.model_name_or_path)))
        self.device = open_device(config.device)
        projector = None if config.projector is None else projector_path(config.projector, "--projector")
        self.weights = str(projector or config.model_name_or_path)
        self.adapter = _adapter(config, projector)
        self.trained = _trained_on(config.projector or self.weights, Path(self.weights))
        if self.trained.lora and self.adapter is None:
            raise ValueError(
                f"{self.weights} was trained together with a LoRA adapter, and would answer wrongly without it: give "
                "the adapter's folder as --adapter"
            )
        self.config = config = self._as_trained(config)
        self.tokenizer = load_tokenizer(config.model_name_or_path, _use_start_end(config, self.trained, projector))
        if config.conv_mode is None:
            own = "pg-video-llava" if self.tokenizer.template is None else CHAT_TEMPLATE
            self.config = config = replace(config, conv_mode=own)
        assert config.conv_mode is not None
        check_conv_mode(config.conv_mode, self.tokenizer)
        tokens, seed = self.tokenizer.tokens, _seed(projector)
        self.model_config = read_model_config(
            config.model_name_or_path, vocab_size=tokens.vocab_size, projector=projector
        )
        starting = StartingWeights(
            self.model_config, config.model_name_or_path, tokens=tokens, projector=projector, seed=seed
        )
        if starting.makes_projector:
            raise ValueError(f"{config.model_name_or_path} holds no projector: give the trained one with --projector")
        if config.vision_tower is not None and Path(config.vision_tower).is_dir():
            check_tower(config.vision_tower, self.trained, self.weights)
        sizes, precision = self.model_config.decoder, Precision(torch.bfloat16 if config.bf16 else torch.float32)
        attention = settle_attention(
            "auto", self.device, precision.compute, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
        )
        with torch.device("meta"):
            self.model = VideoLlava(self.model_config, trainable=Trainable(), precision=precision, attention=attention)
        self.model.to_empty(device=self.device)
        load_weights(
            self.model,
            config.model_name_or_path,
            tokens=tokens,
            projector=projector,
            seed=seed,
            adapter=self.adapter,
        )
        self._encoder: FeatureEncoder | None = None
        self._worker = DecodeWorker()

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

    def ask(self, video: StrPath, question: str, history: Sequence[tuple[str, str]] = ()) -> str:
        """The answer to a question about a video.

        Args:
            video: path of a video, or of a feature file.
            question: text.
            history: (question, answer) turns that came before.

        Raises:
            ValueError: the video cannot be decoded, its features do not fit the model, or the prompt is too long.
            OSError: the file cannot be read.
        """
        return self.ask_features(self.features(video), question, history)

    def ask_features(self, features_RC: torch.Tensor, question: str, history: Sequence[tuple[str, str]] = ()) -> str:
        """`ask` about the [R, C] features of a video."""
        ids = self.prompt(features_RC, question, history)
        batch = pack(
            [(EncodedSample("question", ids), [features_RC])], self.tokenizer.tokens, self.model_config.mm_hidden_size
        )
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        answer = generate(
            self.model,
            batch.to(self.device),
            max_new_tokens=self.config.max_new_tokens,
            stops=self.tokenizer.stops,
            temperature=self.config.temperature,
            generator=generator,
        )
        return self.tokenizer.decode(answer).strip()

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
        channels = self.model_config.mm_hidden_size
        if features_RC.dim() != 2 or features_RC.shape[1] != channels:
            raise ValueError(
                f"features are {list(features_RC.shape)}, the projector takes [rows, {channels}]: they "
                "were made with another vision tower"
            )
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

    def request(
        self,
        key: Any,
        video: str,
        features_RC: torch.Tensor,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        **sampling: Any,
    ) -> Request:
        """A question for `batcher`, whose answer is that of `ask_features`.

        Args:
            key: what its answer comes back with.
            video: name of the features; questions of the same name share what they have in common.
            history: as for `ask`.
            sampling: max_new_tokens, temperature, seed and top_p, where they are others than the configuration's.

        Raises:
            ValueError: as `prompt`.
        """
        config = self.config
        ids = self.prompt(features_RC, question, history)
        own = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "seed": config.seed}
        return Request(key, ids, features_RC, video, **own | sampling)

    def batcher(self, at_once: int = 32, cache_bytes: int | None = None, *, keep_beginnings: bool = False) -> Batcher:
        """What answers many `request`s together.

        Args:
            at_once: most answers that are continued together.
            cache_bytes: of their keys and values. Default: seven tenths of what a GPU has free; 4 GiB on a CPU.
            keep_beginnings: as for `Batcher`.
        """
        if cache_bytes is None:
            gpu = self.device.type == "cuda"
            cache_bytes = torch.cuda.mem_get_info(self.device)[0] * 7 // 10 if gpu else 4 << 30
        return Batcher(
            self.model,
            self.tokenizer.tokens,
            stops=self.tokenizer.stops,
            at_once=at_once,
            cache_bytes=cache_bytes,
            keep_beginnings=keep_beginnings,
        )

    def features(self, video: StrPath) -> torch.Tensor:
        """[R, C] features of a video, or those that lie in a feature file.

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
                frames, _ = self._worker.decode(str(video), num_frames=self.num_frames, size=encoder.image_size)
            except DecodeError as error:
                raise ValueError(f"{video} {reason}" if (reason := no_video(video)) else str(error)) from error
            features_RC = encoder.encode(frames)
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


def _adapter(config, projector):
    """The folder of the LoRA adapter that is given, or lies beside the projector; None: there is none.

    Raises:
        ValueError: it cannot be used.
    """
    if config.adapter is not None:
        return adapter_folder(config.adapter)
    return None if projector is None else adapter_of(projector)


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
