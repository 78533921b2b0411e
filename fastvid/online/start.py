"""What the features that training makes are like: as told, else as the weights tell that training starts from."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from fastvid.config import DataConfig, ExtractConfig
from fastvid.files import StrPath, shown
from fastvid.pooling import RECIPE, Pooling
from fastvid.provenance import of_weights


def start_of(config: DataConfig) -> StrPath | None:
    """Path of the weights that training starts from; None where nothing tells."""
    return getattr(config, "pretrain_mm_mlp_adapter", None) or config.model_name_or_path


def frames_to_make(config: DataConfig) -> int:
    """Most frames of videos whose features training makes: as told, else as of the weights it starts from, else 100."""
    start = start_of(config)
    return config.num_frames or (start and of_weights(start).num_frames) or ExtractConfig.num_frames


def pooling_to_make(config: DataConfig) -> Pooling:
    """The pooling of features that training makes: as told, else that of the weights it starts from, else the recipe's.

    Raises:
        ValueError: those were trained with several, or with one that is not known here.
    """
    start = start_of(config)
    pooling = config.pooling or (start and of_weights(start).pooling) or RECIPE
    if "; " in pooling:
        raise ValueError(
            f"{shown(start)} was trained with features of several poolings ({pooling}); name one with --pooling"
        )
    return Pooling.parse(pooling)


def made_otherwise(config: DataConfig, before: dict[str, Any]) -> list[str]:
    """What comes of ``--num_frames`` and ``--pooling`` that did not come of an earlier run's, a line each.

    Args:
        before: that run's flags. It started from the same weights.
    """
    earlier, found = replace(config, **{name: before[name] for name in ("num_frames", "pooling")}), []
    for name, to_make in (("num_frames", frames_to_make), ("pooling", pooling_to_make)):
        with suppress(ValueError):  # the earlier run could make none, so that it made no features
            was, now = to_make(earlier), to_make(config)
            found += [f"--{name} was {was}, is {now}"] * (was != now)
    return found
