"""What a model card says of the features that the weights read."""

import pytest

from fastvid.provenance import Provenance
from fastvid.weights.card import model_card


@pytest.mark.parametrize(
    "pooling, told, sentence",
    [
        (None, "| features | 8 frames a video, 24 rows a video |", "and a\nlanguage model.\n"),
        (
            "temporal+spatial",
            "| features | 8 frames a video, 24 rows a video, pooling temporal+spatial |",
            "language model. A video is a mean of each frame's patches and a mean over time at each patch.\n",
        ),
        (
            "grid:2x2x2; temporal+spatial",
            "| features | 8 frames a video, 24 rows a video, pooling grid:2x2x2; temporal+spatial |",
            "with `--pooling grid:2x2x2` or `--pooling temporal+spatial`.\n",
        ),
        (
            "odd|one",
            "| features | 8 frames a video, 24 rows a video, pooling odd\\|one |",
            "of `fastvid extract` with `--pooling odd\\|one`.\n",
        ),
    ],
)
def test_a_card_tells_the_pooling(pooling, told, sentence):
    card = model_card("m", "me/base", None, {}, Provenance(num_frames=8, rows=24, pooling=pooling))
    assert told in card and sentence in card
    assert ("a mean over time" in card) == (pooling == "temporal+spatial")


def test_a_card_tells_the_poolings_of_both_towers():
    second = Provenance(pooling="grid:2x2x2")
    card = model_card("m", "me/base", None, {}, Provenance(pooling="temporal+spatial", second=second))
    assert "| features | pooling temporal+spatial; grid:2x2x2 |" in card and "a mean over time" not in card
    same = model_card("m", "me/base", None, {}, Provenance(pooling="grid:2x2x2", second=second))
    assert "| features | pooling grid:2x2x2 |" in same


@pytest.mark.parametrize("enabled", [True, False])
def test_a_card_tells_of_lora_where_it_was_trained(enabled):
    config = {"lora_enable": enabled, "lora_r": 128, "lora_alpha": 256.0, "seed": 3}
    card = model_card("m", "me/base", None, {"config": config}, Provenance())
    assert ("| `--lora_r` | 128 |" in card) == ("| `--lora_alpha`" in card) == enabled and "| `--seed` | 3 |" in card


def test_a_card_warns_of_a_second_first_token():
    assert "give `add_special_tokens=False` there" in model_card("m", "me/base", None, {}, Provenance())
