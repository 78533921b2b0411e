"""What the features that training makes are like: as told, else as the weights tell that training starts from."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from fastvid.config import DataConfig
from fastvid.files import StrPath
from fastvid.pooling import Pooling
from fastvid.provenance import Provenance, agreed_frames, agreed_pooling, of_weights, why_no_frames, why_no_pooling


def start_of(config: DataConfig) -> StrPath | None:
    """Path of the weights that training starts from; None where nothing tells."""
    return getattr(config, "pretrain_mm_mlp_adapter", None) or config.model_name_or_path


def frames_to_make(config: DataConfig) -> int:
    """Most frames of videos whose features training makes: as told, else as of the weights it starts from, else 100.

    Raises:
        ValueError: those were trained with several.
    """
    start = start_of(config)
    frames = config.num_frames or agreed_frames(None, _trained(start), start or "")
    if frames is None:
        raise ValueError(f"{why_no_frames(start or '')}; give one with --num_frames")
    return frames


def pooling_to_make(config: DataConfig) -> Pooling:
    """The pooling of features that training makes: as told, else that of the weights it starts from, else the recipe's.

    Raises:
        ValueError: those were trained with several, or with one that is not known here.
    """
    start = start_of(config)
    trained = _trained(start).pooling
    pooling = config.pooling or agreed_pooling(None, trained, start or "")
    if pooling is None:
        raise ValueError(f"{why_no_pooling(trained, start or '')}; name one with --pooling")
    return Pooling.parse(pooling)


def _trained(start):
    return Provenance() if start is None else of_weights(start)


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
