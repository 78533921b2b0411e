"""Questions to a model about a video's features: prompts, and requests of many at once.

Dimensions: R rows of a video (temporal + spatial), C channels of the vision tower.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastvid.batch import Features, by_tower
from fastvid.config import ChatConfig
from fastvid.data.conversation import inference_prompt
from fastvid.data.tokenizer import ModelTokenizer
from fastvid.features.file import feature_header
from fastvid.features.names import SUFFIXES
from fastvid.files import StrPath
from fastvid.inference.batching import Batcher
from fastvid.inference.requests import Request
from fastvid.model.config import ModelConfig
from fastvid.model.video_llava import VideoLlava
from fastvid.provenance import Provenance


class Asking:
    """What makes prompts, of weights that were trained on features of one vision tower, or of two.

    Attributes:
        config: with what the weights tell about their training.
        device, tokenizer, model_config.
    """

    config: ChatConfig
    device: torch.device
    tokenizer: ModelTokenizer
    model_config: ModelConfig

    def prompt(
        self,
        features_RC: Features,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        answer: str | None = None,
    ) -> list[int]:
        """Token ids of a question about the features of a video, and of its answer if one is given.

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

    def check_channels(self, features_RC: Features) -> None:
        """Refuse what is no features that the projector takes (ValueError)."""
        found, channels = [list(each.shape) for each in by_tower(features_RC)], self.model_config.channels
        taken = [channels] if isinstance(channels, int) else channels
        if len(found) != len(taken) or any(len(x) != 2 or x[1] != each for x, each in zip(found, taken)):
            raise ValueError(
                f"features are {' and '.join(map(str, found))}, the projector takes "
                f"{' and '.join(f'[rows, {each}]' for each in taken)}: they were made with another vision tower"
            )

    def features(self, video: StrPath) -> Features:
        """Features of a video, or those that lie in a feature file.

        Raises:
            ValueError: they do not fit the weights, or cannot be had.
            OSError: the file cannot be read.
        """
        raise NotImplementedError

    def features_of_frames(self, files: Sequence[StrPath]) -> Features:
        """Features of a video whose frames are pictures.

        Raises:
            ValueError: as `features`.
        """
        raise NotImplementedError

    def made_by(self, video: StrPath) -> str | None:
        """What identifies the vision tower that `features` of a video are of, as its header tells; of two, the first.

        None: nothing tells.
        """
        return Provenance.of_header(feature_header(video)).tower_revision if Path(video).suffix in SUFFIXES else None


class Answering(Asking):
    """The same with the model, which answers many requests at once.

    Attributes:
        model: not sharded.
        flag_prefix: of the names of flags in messages, such as ``max_new_tokens``.
    """

    model: VideoLlava
    flag_prefix = ""

    def request(
        self,
        key: Any,
        video: str,
        features_RC: Features,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        **sampling: Any,
    ) -> Request:
        """A question for `batcher`, whose answer is that of `fastvid.inference.chat.Chat.ask_features`.

        Args:
            key: what its answer comes back with.
            video: name of the features; questions of the same name share what they have in common.
            history: (question, answer) turns that came before.
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
            flag_prefix=self.flag_prefix,
        )
