"""What the features that training makes are like: as told, else as the weights tell that training starts from."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from fastvid.config import DataConfig
from fastvid.config.pooling import Pooling
from fastvid.data.video_tokens import read_settings
from fastvid.files import StrPath
from fastvid.provenance import Provenance, agreed_frames, agreed_pooling, of_weights, why_no_frames, why_no_pooling
from fastvid.video.towers.choice import choose_tower


def start_of(config: DataConfig) -> StrPath | None:
    """Path of the weights that training starts from; None where nothing tells."""
    return getattr(config, "pretrain_mm_mlp_adapter", None) or config.model_name_or_path


def tower_to_make(config: DataConfig, *, second: bool = False) -> StrPath | None:
    """The tower of features that training makes: as told, else that of the weights it starts from, else the model's.

    Args:
        second: a second vision tower, which no setting of a model names.

    Returns:
        None if nothing tells.

    Raises:
        ValueError: the weights' tower is not to be found.
    """
    given, start = config.vision_tower_2 if second else config.vision_tower, start_of(config)
    if given or start is None:
        return given
    if second:
        return choose_tower(None, _trained(start, second), start, flag="--vision_tower_2")
    own = read_settings(config.model_name_or_path).get("mm_vision_tower")
    return choose_tower(None, _trained(start, second), start, otherwise=own)


def frames_to_make(config: DataConfig, *, second: bool = False) -> int:
    """Most frames of videos whose features training makes: as told, else as of the weights it starts from, else 100.

    Args:
        second: of a second vision tower. Where the weights tell one number of that one, it comes before what is told:
            the flag is the first tower's, too. Where they tell several, one of these must be told.

    Raises:
        ValueError: those were trained with several; the second tower with others than the one that is told.
    """
    start = start_of(config)
    trained, pooling = _trained(start, second), config.pooling
    if second and trained.pooling is not None and "; " not in trained.pooling:
        pooling = trained.pooling
    if second and trained.num_frames is not None:
        return trained.num_frames
    frames = (not second and config.num_frames) or agreed_frames(config.num_frames, trained, start or "", pooling)
    if frames is None:
        raise ValueError(f"{why_no_frames(start or '')}; give one with --num_frames")
    return frames


def pooling_to_make(config: DataConfig, *, second: bool = False) -> Pooling:
    """The pooling of features that training makes: as told, else that of the weights it starts from, else the recipe's.

    Args:
        second: as for `frames_to_make`.

    Raises:
        ValueError: those were trained with several, or with one that is not known here; the second tower with others
            than the one that is told.
    """
    start = start_of(config)
    trained = _trained(start, second).pooling
    given = None if second and trained is not None and "; " not in trained else config.pooling
    pooling = given if given and not second else agreed_pooling(given, trained, start or "")
    if pooling is None:
        raise ValueError(f"{why_no_pooling(trained, start or '')}; name one with --pooling")
    return Pooling.parse(pooling)


def not_of_second(config: DataConfig) -> str:
    """What is told with ``--num_frames`` and ``--pooling`` and is not of the second tower; "" where all of it is.

    Raises:
        ValueError: as `frames_to_make` and `pooling_to_make`.
    """
    frames, pooling = frames_to_make(config, second=True), pooling_to_make(config, second=True)
    told = [f"--num_frames {config.num_frames}"] if config.num_frames not in (None, frames) else []
    if config.pooling is not None and Pooling.parse(config.pooling) != pooling:
        told.append(f"--pooling {config.pooling}")
    if not told:
        return ""
    return (
        f"{' and '.join(told)} of the first tower alone: the second's weights were trained with {frames} of {pooling}"
    )


def _trained(start, second):
    trained = Provenance() if start is None else of_weights(start)
    return (trained.second or Provenance()) if second else trained


def made_otherwise(config: DataConfig, before: dict[str, Any], *, second: bool = False) -> list[str]:
    """What comes of ``--num_frames`` and ``--pooling`` that did not come of an earlier run's, a line each.

    Args:
        before: that run's flags. It started from the same weights.
        second: as for `frames_to_make`.
    """
    earlier, found = replace(config, **{name: before[name] for name in ("num_frames", "pooling")}), []
    for name, to_make in (("num_frames", frames_to_make), ("pooling", pooling_to_make)):
        with suppress(ValueError):  # the earlier run could make none, so that it made no features
            was, now = to_make(earlier, second=second), to_make(config, second=second)
            found += [f"--{name} was {was}, is {now}"] * (was != now)
    return found
