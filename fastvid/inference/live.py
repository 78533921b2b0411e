"""A model in training that answers questions, as `fastvid.inference.chat.Chat` would with its weights of that step.

Dimensions: R rows of a video, C channels of the vision tower.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch

from fastvid.batch import Features, of_towers
from fastvid.config import ChatConfig
from fastvid.data.tokenizer import ModelTokenizer
from fastvid.features.file import describe_features, load_features
from fastvid.features.folder import FeatureFolder
from fastvid.features.names import SUFFIXES
from fastvid.files import StrPath, shown
from fastvid.inference.asking import Answering
from fastvid.inference.towers import towers_of
from fastvid.model.config import ModelConfig
from fastvid.model.video_llava import VideoLlava
from fastvid.provenance import Provenance

_WEIGHTS = "the model in training"


class FilesOfTowers:
    """The feature files of a video, one of each vision tower: in folders that mirror each other.

    Args:
        first: folder of the first tower's.
        second: of the second one's; None of one tower.

    Raises:
        ValueError: `second` is no folder.
    """

    def __init__(self, first: StrPath, second: StrPath | None = None):
        self._first = first
        self._second = None if second is None else FeatureFolder(second, flag="--eval_video_folder_2")

    def __call__(self, video: StrPath) -> list[Path]:
        """The files, by the first tower's.

        Raises:
            ValueError: there is none of the second tower's.
        """
        if self._second is None:
            return [Path(video)]
        return [Path(video), self._second.resolve(os.path.relpath(video, self._first))]


class LiveModel(Answering):
    """Answers about feature files of the vision towers of training.

    Args:
        model: whole on this rank; nothing in it is random.
        tokenizer: its.
        trained: Provenance of the weights: prompts are as in training, and features of another tower are refused.
        config: whose sampling counts.
        files: of the videos; None: of one tower.
    """

    flag_prefix = "eval_"

    def __init__(
        self,
        model: VideoLlava,
        tokenizer: ModelTokenizer,
        trained: Provenance,
        config: ChatConfig,
        files: FilesOfTowers | None = None,
    ):
        self.model, self.tokenizer, self.trained, self.model_config = model, tokenizer, trained, model.config
        self.device = model.embed.weight.device
        self.config = replace(
            config,
            conv_mode=trained.conv_mode,
            question_order=trained.question_order,
            num_frames=trained.num_frames,
            bf16=model.precision.compute == torch.bfloat16,
        )
        self._towers = towers_of(self.config, model.config, trained, _WEIGHTS, None, None)
        self._files = files or FilesOfTowers("")

    def features(self, video: StrPath) -> Features:
        """Those that lie in a feature file, and of two towers in the other one's."""
        assert Path(video).suffix in SUFFIXES, "features are made before training"
        found = []
        for tower, file in zip(self._towers, self._files(video), strict=True):
            features_RC, header = load_features(file)
            tower.check_made_alike(file, header)
            found.append(features_RC)
        _check_rows(video, sum(map(len, found)), self.trained)
        return of_towers(*found)


def check_file(
    video: StrPath, config: ChatConfig, model: ModelConfig, trained: Provenance, files: FilesOfTowers
) -> None:
    """What `LiveModel` checks of a video's feature files, by their headers.

    Args:
        video: the first tower's.
        (others: as of `LiveModel`.)
        model: sizes.

    Raises:
        ValueError: with the remedy.
    """
    towers = towers_of(replace(config, num_frames=trained.num_frames), model, trained, _WEIGHTS, None, None)
    all_rows, taken = 0, (model.channels,) if isinstance(model.channels, int) else model.channels
    for tower, file, wanted in zip(towers, files(video), taken, strict=True):
        (rows, channels, _), header = describe_features(file)
        tower.check_made_alike(file, header)
        if channels != wanted:
            raise ValueError(
                f"{shown(file)} has {channels} channels, the projector takes {wanted}; extract it with the tower of "
                "training"
            )
        all_rows += rows
    _check_rows(video, all_rows, trained)


def _check_rows(video, rows, trained):
    if trained.rows not in (None, rows):
        raise ValueError(
            f"{shown(video)} has {rows} rows, and the features of training have {trained.rows}; extract it "
            "with the tower, the frames and the pooling of those"
        )
