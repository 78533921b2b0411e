"""What is settled of each vision tower before anything is encoded."""

from types import SimpleNamespace

import pytest

from fastvid.config import ChatConfig
from fastvid.inference.towers import towers_of
from fastvid.pooling import RECIPE
from fastvid.provenance import Provenance

GRID, OTHER = "grid:2x2x2", "pllava-attn"  # the latter is another program's


def second_of(pooling, given=None):
    """The second tower of weights whose second features are of `pooling`; `given` is settled for the first."""
    model = SimpleNamespace(vision_tower=None, mm_hidden_size=8, mm_hidden_size_2=8)
    config = ChatConfig("m", num_frames=8, pooling=given)
    _, second = towers_of(config, model, Provenance(second=Provenance(pooling=pooling)), "w", given)  # pyright: ignore
    return second


def test_a_second_tower_pools_as_it_was_trained():
    assert second_of(GRID).pooling == second_of(GRID, RECIPE).pooling == GRID
    assert second_of(f"{GRID}; {RECIPE}", GRID).pooling == GRID
    assert second_of(None, GRID).pooling == GRID


@pytest.mark.parametrize(
    "pooling, why",
    [
        (f"{GRID}; {RECIPE}", "several poolings .*; name the one that videos get with --pooling"),
        (OTHER, f"the pooling '?{OTHER}'?, which is not known here; give feature files, not videos"),
    ],
)
def test_a_second_tower_of_no_one_pooling_makes_no_features(pooling, why):
    with pytest.raises(ValueError, match=why):
        _ = second_of(pooling).pooling
