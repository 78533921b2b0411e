"""A model in training that answers questions, as `fastvid.inference.chat.Chat` would with its weights of that step.

Dimensions: R rows of a video, C channels of the vision tower.
"""

from dataclasses import replace
from pathlib import Path

import torch

from fastvid.batch import Features
from fastvid.config import ChatConfig
from fastvid.data.tokenizer import ModelTokenizer
from fastvid.features.file import describe_features, load_features
from fastvid.features.names import SUFFIXES
from fastvid.files import StrPath, shown
from fastvid.inference.asking import Answering
from fastvid.inference.towers import towers_of
from fastvid.model.config import ModelConfig
from fastvid.model.video_llava import VideoLlava
from fastvid.provenance import Provenance

_WEIGHTS = "the model in training"


class LiveModel(Answering):
    """Answers about feature files of one vision tower.

    Args:
        model: whole on this rank; nothing in it is random.
        tokenizer: its.
        trained: Provenance of the weights: prompts are as in training, and features of another tower are refused.
        config: whose sampling counts.
    """

    flag_prefix = "eval_"

    def __init__(self, model: VideoLlava, tokenizer: ModelTokenizer, trained: Provenance, config: ChatConfig):
        self.model, self.tokenizer, self.trained, self.model_config = model, tokenizer, trained, model.config
        self.device = model.embed.weight.device
        self.config = replace(
            config,
            conv_mode=trained.conv_mode,
            question_order=trained.question_order,
            num_frames=trained.num_frames,
            bf16=model.precision.compute == torch.bfloat16,
        )
        (self._tower,) = towers_of(self.config, model.config, trained, _WEIGHTS, None, None)

    def features(self, video: StrPath) -> Features:
        """Those that lie in a feature file."""
        assert Path(video).suffix in SUFFIXES, "features are made before training"
        features_RC, header = load_features(video)
        self._tower.check_made_alike(video, header)
        _check_rows(video, len(features_RC), self.trained)
        return features_RC


def check_file(video: StrPath, config: ChatConfig, model: ModelConfig, trained: Provenance) -> None:
    """What `LiveModel` checks of a feature file, by its header.

    Args:
        (others: as of `LiveModel`.)
        model: sizes.

    Raises:
        ValueError: with the remedy.
    """
    (rows, channels, _), header = describe_features(video)
    (tower,) = towers_of(replace(config, num_frames=trained.num_frames), model, trained, _WEIGHTS, None, None)
    tower.check_made_alike(video, header)
    if channels != model.channels:
        raise ValueError(
            f"{shown(video)} has {channels} channels, the projector takes {model.channels}; extract it with the tower "
            "of training"
        )
    _check_rows(video, rows, trained)


def _check_rows(video, rows, trained):
    if trained.rows not in (None, rows):
        raise ValueError(
            f"{shown(video)} has {rows} rows, and the features of training have {trained.rows}; extract it "
            "with the tower, the frames and the pooling of those"
        )
