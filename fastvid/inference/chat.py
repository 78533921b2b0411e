"""A loaded model that answers questions about videos, asked as the reference's inference asks them.

Dimensions: R rows of a video (temporal + spatial), C channels of the vision tower.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastvid.batch import Features
from fastvid.config import ChatConfig
from fastvid.config.policy import Trainable
from fastvid.data.conversation import EncodedSample
from fastvid.data.packing import pack
from fastvid.files import StrPath
from fastvid.inference.asking import Answering
from fastvid.inference.generate import generate
from fastvid.inference.source import MEDIA_SUFFIXES, VideoSource
from fastvid.model.attention_check import settle_attention
from fastvid.model.video_llava import VideoLlava
from fastvid.weights.adapter import adapter_folder, adapter_of
from fastvid.weights.loading import load_weights

__all__ = ["MEDIA_SUFFIXES", "Chat"]


class Chat(VideoSource, Answering):
    """A loaded model that answers questions about videos. A LoRA adapter is merged into its matrices.

    Args:
        config: or its fields by name: ``Chat(model_name_or_path=…, projector=…)``.

    Raises:
        ValueError: a folder, file or tensor that cannot be used, with the remedy.
    """

    def __init__(self, config: ChatConfig | None = None, **settings: Any):
        super().__init__(config or ChatConfig(**settings))
        self.adapter = _adapter(self.config, self._projector_path)
        if self.trained.lora and self.adapter is None:
            raise ValueError(
                f"{self.weights} was trained together with a LoRA adapter, and would answer wrongly without it: give "
                "the adapter's folder as --adapter"
            )
        sizes = self.model_config.decoder
        heads = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
        attention = settle_attention("auto", self.device, self.precision.compute, *heads, gradients=False)
        with torch.device("meta"):
            self.model = VideoLlava(
                self.model_config, trainable=Trainable(), precision=self.precision, attention=attention
            )
        self.model.to_empty(device=self.device)
        load_weights(
            self.model,
            self.config.model_name_or_path,
            tokens=self.tokenizer.tokens,
            projector=self._projector_path,
            seed=self._seed,
            adapter=self.adapter,
        )

    @property
    def projector(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The model's own."""
        return self.model.projector

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

    def ask_features(self, features_RC: Features, question: str, history: Sequence[tuple[str, str]] = ()) -> str:
        """`ask` about the features of a video."""
        ids = self.prompt(features_RC, question, history)
        batch = pack(
            [(EncodedSample("question", ids), [features_RC])], self.tokenizer.tokens, self.model_config.channels
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


def _adapter(config, projector):
    """The folder of the LoRA adapter that is given, or lies beside the projector; None: there is none.

    Raises:
        ValueError: it cannot be used.
    """
    if config.adapter is not None:
        return adapter_folder(config.adapter)
    return None if projector is None else adapter_of(projector)
