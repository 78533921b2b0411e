"""Layers whose keys a kernel rotates into their places equal those that gather rotated keys."""

import dataclasses

import pytest
import torch
from attention_parts import CPU
from model_cases import (
    ADAPTER,
    END,
    FEW,
    FULL,
    KINDS,
    PATCH,
    START,
    assert_same_gradients,
    loss_and_gradients,
    prepared,
    random_batch,
    random_model,
    with_prefix,
)

from fastvid.batch import VideoTokens
from fastvid.data.conversation import EncodedSample
from fastvid.data.packing import pack
from fastvid.model import attention


@pytest.fixture
def interpreted(monkeypatch):
    """From now on these kernels run, interpreted: how often keys were put into their places, forward and backward.

    Other kernels do not: an interpreter is slow.
    """
    calls = {"forward": 0, "backward": 0}
    rope_keys, place_keys = attention.rope_keys, attention.place_keys

    def counted(name, function, **own):
        def call(*args, **options):
            calls[name] += 1
            return function(*args, **options, **own)

        return call

    def begin():
        monkeypatch.setattr(attention, "use_triton", lambda *_, **__: True)
        monkeypatch.setattr(attention, "rope_keys", counted("forward", rope_keys, impl="triton"))
        monkeypatch.setattr(attention, "place_keys", counted("backward", place_keys))
        return calls

    return begin


@pytest.mark.slow
@pytest.mark.parametrize("kind, most_kept", [*((kind, 100) for kind in KINDS), ("mha", 0), ("selective", 0)])
def test_equals_gathering_with_prefix_and_frozen_rows(kind, most_kept, interpreted, monkeypatch):
    """Whether copies of keys wait for backward or are made again."""
    _, batch = with_prefix(shapes=FEW)
    batch = batch.parted()
    model = prepared(random_model(**KINDS[kind]))
    monkeypatch.setattr(attention, "MOST_KEPT", most_kept)
    expected_loss, expected = loss_and_gradients(model, batch)
    calls = interpreted()
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(found, expected)
    layers, again = len(model.decoder.layers), kind in ("selective", "full")
    assert calls == {"forward": layers * (2 if again else 1), "backward": 0 if again or most_kept else layers}
    if kind == "mha":  # once: an interpreter is slow
        for name, gradient in loss_and_gradients(model, batch)[1].items():
            assert torch.equal(gradient, found[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, text_only", [*((kind, True) for kind in KINDS if kind != "head"), ("mha", False), ("full", False)]
)
def test_attention_with_log_sum_exps_takes_frozen_rows_along(kind, text_only, interpreted):
    """In one call forward, and without them backward. The last layer has those that are supervised; without any it
    calls the library as if no row were frozen."""
    _, batch = with_prefix(text_only, shapes=FEW)
    batch = batch.parted()
    model, queries = prepared(random_model(**KINDS[kind])), {"forward": [], "backward": []}
    expected_loss, expected = loss_and_gradients(model, batch)

    def counted(way, place):
        function = getattr(CPU.parts, way)
        return lambda *given: queries[way].append(len(given[place])) or function(*given)

    parts = dataclasses.replace(CPU.parts, forward=counted("forward", 0), backward=counted("backward", 1))
    for layer in model.decoder.layers:
        layer.attention = dataclasses.replace(CPU, parts=parts)
    interpreted()
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(found, expected)
    again = 2 if kind in ("selective", "full") else 1
    supervised = [batch.num_supervised, len(batch.parts[1].loss_rows)] if text_only else []
    layers, live = len(model.decoder.layers) - 1, batch.num_rows - batch.frozen_rows
    assert sorted(queries["forward"]) == sorted(([batch.num_rows] * layers + supervised[:1]) * again)
    assert queries["backward"] == supervised[1:] + [live] * layers


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [ADAPTER, FULL], ids=["adapter", "full"])
def test_equals_gathering_of_own_rows(trainable, interpreted):
    batch = random_batch(shapes=FEW).parted()
    model = random_model(trainable=trainable)
    expected_loss, expected = loss_and_gradients(model, batch)
    calls = interpreted()
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(found, expected)
    assert calls["forward"] == len(model.decoder.layers)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", 1, "selective", "full"])
def test_equals_gathering_of_frozen_rows_without_a_kept_prefix(recompute, interpreted):
    """Their keys alone stand before the others', and lie in rows of their own product."""
    generator, samples = torch.Generator().manual_seed(0), []
    for name, length in (("a", 5), ("b", 3)):
        words = torch.randint(3, PATCH, (length + 4,), generator=generator).tolist()
        ids = [9, 10 + length, 11, START, *[PATCH] * 6, END, *words]
        features = torch.randn(6, 12, generator=generator)
        samples.append((EncodedSample(name, ids, [(len(ids) - 4, len(ids))], [name]), [features]))
    tokens = VideoTokens(patch=PATCH, start=START, end=END, vocab_size=100)
    batch = pack(samples, tokens, 12, prefix=(5, 6), frozen=True)
    assert batch.prefix_rows == 0 and batch.frozen_rows == 6
    model = random_model(recompute=recompute)
    expected_loss, expected = loss_and_gradients(model, batch)
    interpreted()
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_equals_gathering_of_shared_videos(frozen, interpreted):
    """Two videos, several questions about each: rows of a video are keys of all its branches."""
    generator, samples = torch.Generator().manual_seed(0), []
    videos = {name: torch.randn(3, 12, generator=generator) for name in "ab"}
    for name, length in (("a", 2), ("b", 1), ("a", 3), ("b", 2)):
        words = torch.randint(3, PATCH, (length + 4,), generator=generator).tolist()
        ids = [5, 6, 7, 8, START, *[PATCH] * 3, END, *words]
        samples.append((EncodedSample(name, ids, [(len(ids) - 4, len(ids))], [name]), [videos[name]]))
    tokens = VideoTokens(patch=PATCH, start=START, end=END, vocab_size=100)
    batch = pack(samples, tokens, 12, prefix=(5, 6, 7, 8), frozen=frozen, share=True)
    assert (batch.parts or [batch])[-1].layout.way_back is not None and batch.prefix_rows == (4 if frozen else 0)
    model = random_model()
    model.keep_prefix([5, 6, 7, 8])
    expected_loss, expected = loss_and_gradients(model, batch)
    interpreted()
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(found, expected)
