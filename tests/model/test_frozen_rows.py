"""Only what the gradient needs: constant prefix, frozen rows, and a last layer of supervised rows, against all rows."""

import dataclasses
import itertools

import pytest
import torch
from model_cases import (
    FULL,
    PREFIX,
    START,
    assert_same_gradients,
    loss_and_gradients,
    model_config,
    pack,
    pack_frozen,
    prepared,
    random_model,
    random_sample,
    with_prefix,
)
from model_cases import KINDS as LAYERS
from torch.utils.flop_counter import FlopCounterMode

from fastvid.model import norm
from fastvid.model.attention import SDPA
from fastvid.training.live_bytes import LiveBytes

KINDS = {**LAYERS, "first layer": {"recompute": 1}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text_only", [True, False])
def test_prefix_and_frozen_rows_equal_all_rows(kind, text_only):
    plain, batch = with_prefix(text_only)
    expected_loss, expected = loss_and_gradients(random_model(**KINDS[kind]), plain)
    model = prepared(random_model(**KINDS[kind]))
    for ours in (batch, batch.parted()):  # every packed row with a gradient, and only those that need one
        loss, found = loss_and_gradients(model, ours)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert_same_gradients(found, expected)
    again = loss_and_gradients(model, batch.parted())[1]
    assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", 1, "full"])
def test_an_fp32_residual_stream_stays_fp32_in_every_part(recompute, monkeypatch):
    """Prefix, frozen and live rows, as autocast leaves them; the error is at most twice that of all rows alike.

    One sample asks about two videos. Without gradients the loss has the same bits.
    """
    generator = torch.Generator().manual_seed(0)
    samples = [
        random_sample(generator, text=text, answer=4, video=video)
        for text, video in (((9, 7), 6), ((6, 5), 0), ((5, 3), 6), ((8, 2), 6))
    ]
    (ids, rows), (more, _) = samples[2], random_sample(generator, answer=1)
    samples[2] = ids + more, rows
    for ids, _ in samples:
        ids[: len(PREFIX)] = PREFIX
    plain = pack(samples, generator=generator)
    batch = pack_frozen(samples, len(PREFIX), plain.features)
    assert len(plain.features) == 4 * 6

    config = model_config(num_kv_heads=2)
    model = random_model(config, compute_dtype=torch.bfloat16, fp32_residual=True, recompute=recompute)
    exact = random_model(config)
    exact.load_state_dict(model.state_dict())
    exact_loss, exact_gradients = loss_and_gradients(exact, plain)
    eager_loss, eager = loss_and_gradients(model, plain)
    eager = {name: gradient.clone() for name, gradient in eager.items()}
    streams, add = [], norm.add_rms_norm
    monkeypatch.setattr(norm, "add_rms_norm", lambda x, *rest, **more: streams.append(x.dtype) or add(x, *rest, **more))
    prepared(model)
    for ours in (batch, batch.parted()):
        loss, found = loss_and_gradients(model, ours)
        assert loss == pytest.approx(exact_loss, rel=max(2 * abs(eager_loss / exact_loss - 1), 1e-3))
        for name, true in exact_gradients.items():
            error, allowed = (x[name].double().sub(true).abs().max() for x in (found, eager))
            assert error <= 2 * allowed + 2**-8 * true.abs().max(), name
        with torch.no_grad():
            assert model(ours).item() == loss
    assert set(streams) == {torch.float32}


def test_only_live_rows_pass_back_and_only_supervised_rows_leave_the_last_layer():
    """Matrix products of linear layers, by formula; a batch without parts does more."""
    config = model_config(num_kv_heads=2)
    c = config.decoder
    D, A, E, F, V = c.hidden_size, 32, 32 + 2 * 16, c.intermediate_size, c.vocab_size
    model = prepared(random_model(config))
    _, batch = with_prefix(text_only=False)
    N, L, P = batch.num_rows, batch.num_supervised, len(batch.video_rows)
    live = N - batch.frozen_rows
    assert 0 < batch.frozen_rows and 0 < L < live < N
    projector = P * (12 * D + D * D) * 2 + P * D * D  # its own gradients, and the first layer's input's

    def products(batch):
        with FlopCounterMode(display=False) as counter:
            model(batch).backward()
        counts = counter.get_flop_counts()["Global"]
        return (counts[torch.ops.aten.mm] + counts[torch.ops.aten.addmm]) // 2

    layer, last_keys, last_rest = D * (E + A + 3 * F), D * (E - A), D * (2 * A + 3 * F)
    assert products(batch.parted()) == (N + live) * (layer + last_keys) + 2 * L * (last_rest + V * D) + projector
    assert products(batch) == 2 * N * 2 * layer + 2 * L * V * D + projector


@pytest.mark.slow
def test_frozen_rows_save_less_than_live_ones():
    """They lie in the tensors of which live rows are saved; their products' gradients and inputs are not."""
    config = model_config(num_kv_heads=2)
    model = prepared(random_model(config))

    def alive(question, parted):
        generator = torch.Generator().manual_seed(0)
        samples = [random_sample(generator, text=(len(PREFIX) + question, 5))]
        samples[0][0][: len(PREFIX)] = PREFIX
        features = torch.randn(6, 12)
        batch = pack_frozen(samples, len(PREFIX), features)
        batch = batch.parted() if parted else batch
        model(batch)
        with LiveBytes() as live:
            loss = model(batch)
            return live.now, loss

    frozen, live = ((alive(110, parted)[0] - alive(10, parted)[0]) / 100 for parted in (True, False))
    assert 0 < frozen < 0.9 * live


def test_parts_attend_to_their_samples():
    plain, batch = with_prefix()
    bounds = plain.layout.cu_seqlens_q.tolist()
    samples = [plain.token_ids[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    tokens = torch.cat([torch.tensor(PREFIX), batch.token_ids])
    frozen, live = batch.parted().parts

    def segments(layout):
        bounds = layout.cu_seqlens_k.tolist()
        return [tokens[layout.kv_rows[a:b]].tolist() for a, b in itertools.pairwise(bounds)]

    video = [sample for sample in samples if START in sample]
    assert segments(live.layout) == video
    assert live.layout.cu_seqlens_q.tolist() == list(
        itertools.accumulate([0] + [len(sample) - sample.index(START) for sample in video])
    )
    texts = [sample[: sample.index(START)] if START in sample else sample for sample in samples]
    assert segments(frozen.layout) == [text for text in texts if len(text) > len(PREFIX)]
    assert frozen.layout.cu_seqlens_q[-1] == batch.frozen_rows
    rows = torch.cat([frozen.loss_rows, live.loss_rows + batch.frozen_rows])
    assert torch.equal(rows, batch.loss_rows)
    assert [keys[-1] for keys in segments(live.loss_layout)] == [sample[-2] for sample in video]
    assert segments(frozen.loss_layout) == [samples[1][:-1]]


def test_where_no_row_is_shared_the_gradient_of_keys_is_a_gather():
    _, batch = with_prefix()
    layout = batch.parted().parts[1].layout
    first = len(PREFIX) + batch.frozen_rows
    assert layout.kv_rows[layout.own_keys].tolist() == list(range(first, first + len(layout.own_keys)))
    q, k, v = (torch.randn(len(layout.own_keys), 4, 8, requires_grad=True) for _ in range(3))
    constant = torch.randn(first, 4, 8), torch.randn(first, 4, 8)
    out = SDPA(q, k, v, layout, constant=constant)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(
        SDPA(q, k, v, dataclasses.replace(layout, own_keys=None), constant=constant), (q, k, v), grad
    )
    assert all(map(torch.equal, torch.autograd.grad(out, (q, k, v), grad), expected))
    twice = dataclasses.replace(layout, kv_rows=layout.kv_rows.clamp(max=first), own_keys=None)
    assert twice.with_way_back(first, len(layout.own_keys)).own_keys is None


def test_a_batch_without_live_supervised_rows_has_no_parts():
    """It then takes the plain way, whose graph reaches what is trained."""
    _, batch = with_prefix(shapes=())
    assert batch.frozen_rows == batch.num_rows and batch.parted().parts is None
    model = prepared(random_model())
    model(batch.parted()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    _, batch = with_prefix()
    first = int((batch.loss_rows < batch.frozen_rows).sum())
    lacking = dataclasses.replace(batch, loss_rows=batch.loss_rows[:first], targets=batch.targets[:first])
    assert lacking.parted().parts is None


def test_prefix_that_the_model_does_not_keep_is_refused():
    _, batch = with_prefix()
    with pytest.raises(AssertionError, match="keep_prefix was not told this prefix"):
        random_model()(batch)
    model = random_model()
    model.keep_prefix([5, 6])
    with pytest.raises(AssertionError, match="keep_prefix was not told this prefix"):
        model(batch)
    with pytest.raises(AssertionError, match="the prefix changes with what is trained"):
        random_model(trainable=FULL).keep_prefix([5, 6])
