"""The model card (README.md) of an export: what it is made of, how it was trained, and how it is loaded."""

import json
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from fastvid import __version__
from fastvid.config.pooling import RECIPE
from fastvid.files import StrPath, read_json_object
from fastvid.provenance import Provenance

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # the folder in which the hub's client keeps a model
# Flags of training that decide what was learnt, in the words of the command line.
_RECIPE = (
    "version",
    "question_order",
    "mm_use_vid_start_end",
    "learning_rate",
    "mm_projector_lr",
    "ema_decay",
    "neftune_noise_alpha",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "num_train_epochs",
    "model_max_length",
    "tune_mm_mlp_adapter",
    "freeze_backbone",
    "freeze_mm_mlp_adapter",
    "lora_enable",
    "lora_r",
    "lora_alpha",
    "frozen_dtype",
    "optim",
    "bf16",
    "seed",
    "parity",
)


_LIBRARIES = {"projector": "fastvid", "peft": "peft"}  # transformers is that of the others


def model_card(
    title: str,
    base: StrPath,
    tower: StrPath | None,
    state: dict[str, Any],
    trained_on: Provenance,
    *,
    kind: str = "llava",
    rows: int | None = None,
) -> str:
    """The text of a card. Paths of this machine are not told, but for their last names.

    Args:
        title: of the model.
        base: folder that the training started from.
        tower: folder or hub id; None: unknown.
        state: of the checkpoint.
        trained_on: what its weights remember.
        kind: the export's format.
        rows: of a picture; None: unknown.
    """
    flags = state.get("config", {})
    told = {name: flags[name] for name in _RECIPE if flags.get(name) not in (None, False)}
    if not flags.get("lora_enable"):  # which have defaults
        told = {name: value for name, value in told.items() if not name.startswith("lora_")}
    second = trained_on.second
    named = (base, tower, second and second.tower)
    known = [found for each in named if each is not None and (found := _hub_id(each)) is not None]
    data = [f"`{Path(path).name}`" for path in flags.get("data_path") or []]
    samples = f", {state['num_samples']:,} samples" if isinstance(state.get("num_samples"), int) else ""
    frames = "" if trained_on.num_frames is None else f"{trained_on.num_frames} frames a video, "
    video = "" if trained_on.rows is None else f"{trained_on.rows} rows a video, "
    of_towers = (each.pooling for each in trained_on.towers if each.pooling is not None)
    poolings = list(dict.fromkeys(spec for each in of_towers for spec in each.split("; ")))
    pooling = f"pooling {_cell('; '.join(poolings))}, " if poolings else ""
    picture = "" if rows is None else f"{rows} rows a picture"
    use = _text(f"model_card_{kind}.md").strip()
    return Template(_text("model_card.md")).substitute(
        title=title,
        version=__version__,
        base=_named(base),
        base_models="base_model:\n" + "".join(f"- {each}\n" for each in known) if known else "",
        library=_LIBRARIES.get(kind, "transformers"),
        use=use.replace("${base}", _named(base)),
        pooled=_pooled(poolings),
        tower=_tower(tower, trained_on) + (f"; beside it {_tower(second.tower, second)}" if second else ""),
        features=f"{frames}{video}{pooling}{picture}".removesuffix(", ") or "not told",
        data=", ".join(data) + samples if data else "not told",
        step=f"{state.get('step', '?')} of {state.get('total_steps', '?')}",
        recipe="\n".join(f"| `--{name}` | {_cell(value)} |" for name, value in told.items()),
    )


def _text(name):
    return resources.files("fastvid.weights").joinpath(name).read_text(encoding="utf-8")


def _pooled(poolings):
    """A sentence on the rows of a video; none where nothing tells."""
    if not poolings:
        return ""
    if poolings == [RECIPE]:
        return " A video is a mean of each frame's patches and a mean over time at each patch."
    specs = " or ".join(f"`--pooling {_cell(spec)}`" for spec in poolings)
    return f" The rows of a video are those of `fastvid extract` with {specs}."


def _cell(value):
    return str(value if isinstance(value, str) else json.dumps(value)).replace("|", "\\|").replace("\n", " ")


def _named(model):
    return _cell(_hub_id(model) or Path(model).absolute().name)


def _tower(tower, trained_on):
    revision = f", {trained_on.tower_revision}" if trained_on.tower_revision else ""
    return ("not told" if tower is None else _named(tower)) + revision


def _hub_id(model):
    """The hub's name of a model, where its own name, the hub's cache or its config.json tells; None otherwise."""
    path = Path(model)
    if not path.is_dir():
        return str(model) if _HUB_ID.fullmatch(str(model)) else None
    for part in reversed(path.absolute().parts):
        if found := _CACHED.fullmatch(part):
            return f"{found[1]}/{found[2]}"
    name = read_json_object(path / "config.json").get("_name_or_path")
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).is_dir() else None
