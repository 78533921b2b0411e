"""What backward computes again instead of keeping it."""

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

RECOMPUTE_MODES = ("none", "selective", "full")


def recomputed_layers(recompute: str | int, num_layers: int) -> int:
    """How many layers, the first ones, keep nothing but their input ("selective" keeps part of every layer: 0).

    Raises:
        ValueError: `recompute` is neither a mode nor a number of so many layers.
    """
    modes = {"none": 0, "selective": 0, "full": num_layers}
    whole = modes.get(recompute) if isinstance(recompute, str) else recompute
    if not isinstance(whole, int) or not 0 <= whole <= num_layers:
        raise ValueError(
            f"recompute {recompute!r}: choose one of {', '.join(RECOMPUTE_MODES)}, or how many of the "
            f"first layers, 0 to {num_layers}"
        )
    return whole


_PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "mkldnn::_linear_pointwise")


def keep_products() -> tuple[Any, Any]:
    """Contexts of `checkpoint` under which all but matrix products and attention is computed again."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(context, operation, *args, **options):
    name = operation.name()
    kept = name in _PRODUCTS or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
