"""Only what the gradient needs: constant prefix, frozen rows, and a last layer of supervised rows, against all rows."""

import dataclasses

import pytest
import torch
from model_cases import (
    ADAPTER,
    FULL,
    START,
    assert_same_gradients,
    loss_and_gradients,
    model_config,
    pack,
    pack_frozen,
    random_model,
    random_sample,
)
from torch.utils.flop_counter import FlopCounterMode

PREFIX = 4


def cases(text_only=True, seed=0, shapes=({}, {"text": (4, 12), "answer": 5}, {"text": (9, 2), "answer": 1})):
    """Samples that begin alike: questions before the video, none, and text only; packed plainly and in parts."""
    generator = torch.Generator().manual_seed(seed)
    samples = [random_sample(generator, **shape) for shape in shapes]
    if text_only:
        samples.insert(1, random_sample(generator, text=(6, 5), video=0, answer=4))
    for ids, _ in samples:
        ids[:PREFIX] = [5, 6, 7, 8]
    plain = pack(samples, generator=generator)
    return plain, pack_frozen(samples, PREFIX, plain.features)


def prepared(model):
    model.keep_prefix([5, 6, 7, 8])
    return model


KINDS = {"mha": {}, "gqa": {"config": model_config(num_kv_heads=2)}, "selective": {"recompute": "selective"},
         "full": {"recompute": "full"}, "head": {"trainable": ADAPTER | {"head"}}, "one layer": {"config": model_config(num_layers=1)}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text_only", [True, False])
def test_prefix_and_frozen_rows_equal_all_rows(kind, text_only):
    plain, batch = cases(text_only)
    expected_loss, expected = loss_and_gradients(random_model(**KINDS[kind]), plain)
    model = prepared(random_model(**KINDS[kind]))
    for ours in (batch, batch.parted()):  # every packed row with a gradient, and only those that need one
        loss, found = loss_and_gradients(model, ours)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert_same_gradients(found, expected)
    again = loss_and_gradients(model, batch.parted())[1]
    assert all(torch.equal(again[name], found[name]) for name in found)
