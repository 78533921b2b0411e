"""The decoder against transformers' LlamaForCausalLM, packing, shared prefixes, recomputation, what is saved."""

import dataclasses
import itertools

import pytest
import torch
from attention_cases import branches
from model_cases import (
    ADAPTER,
    FULL,
    assert_close,
    assert_same_gradients,
    decoder_config,
    fill,
    llama_of,
    loss_and_gradients,
    model_config,
    pack,
    random_batch,
    random_model,
    random_sample,
    to_llama,
)

from fastvid.batch import AttentionLayout
from fastvid.model.config import Precision, rotary_frequencies
from fastvid.model.decoder import Decoder

ROPE = {
    "default": {},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}
SHAPES = {
    "mha": {},
    "gqa": {"num_kv_heads": 2},
    "mqa": {"num_kv_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "tied gqa": {"num_kv_heads": 2, "tie_word_embeddings": True},
    "wide heads": {"head_dim": 24, "num_heads": 2, "num_kv_heads": 2},
}
CASES = {**SHAPES, **{f"rope {name}": changes for name, changes in ROPE.items()}}


def text_batch(seed=0):
    return random_batch(
        seed,
        [
            {"text": (50, 4), "video": 0, "answer": 9},
            {"text": (5, 6), "video": 0, "answer": 4},
            {"text": (1, 1), "video": 0, "answer": 1},
        ],
    )


def llama_loss(llama, batch):
    """Sum over supervised rows, sample by sample; and the logits of all rows."""
    bounds = batch.layout.cu_seqlens_q.tolist()
    logits = torch.cat([llama(input_ids=batch.token_ids[None, a:b]).logits[0] for a, b in itertools.pairwise(bounds)])
    return torch.nn.functional.cross_entropy(logits[batch.loss_rows], batch.targets, reduction="sum"), logits


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers_llama(case):
    model = random_model(model_config(**CASES[case]), FULL)
    llama, batch = llama_of(model), text_batch()
    expected, expected_logits = llama_loss(llama, batch)
    expected.backward()

    with torch.no_grad():
        assert_close(model.logits(model.hidden(batch)), expected_logits)
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    found = to_llama(model, found)
    assert_same_gradients(
        {name: found[name] for name, p in llama.named_parameters()},
        {name: p.grad for name, p in llama.named_parameters()},
    )


def test_packed_equals_one_by_one():
    model = random_model(model_config(num_kv_heads=2), FULL)
    generator = torch.Generator().manual_seed(1)
    samples = [random_sample(generator, text=(n, n + 1), video=0) for n in (3, 11, 6)]
    loss, together = loss_and_gradients(model, pack(samples))
    total, apart = loss_and_gradients(model, *(pack([sample]) for sample in samples))
    assert loss == pytest.approx(total, rel=1e-6)
    assert_same_gradients(together, apart)


@pytest.mark.parametrize("recompute", ["none", "selective", 1, "full"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_shared_prefix_equals_samples_apart(recompute, kv_heads):
    config = model_config(num_kv_heads=kv_heads)
    model = random_model(config, FULL, recompute=recompute)
    generator = torch.Generator().manual_seed(2)
    prefix, lengths = 17, (6, 1, 9)
    layout, positions, own = branches(lengths, prefix)
    head, tails = (torch.randint(0, 90, (n,), generator=generator) for n in (prefix, sum(lengths)))
    tails = tails.split(lengths)
    plain = pack([(head.tolist() + tail.tolist(), range(prefix, prefix + len(tail) - 1)) for tail in tails])
    token_ids = torch.cat([head, *tails])
    loss_rows = torch.tensor([row for rows in own for row in rows[:-1]])
    shared = dataclasses.replace(
        plain,
        token_ids=token_ids,
        positions=positions,
        layout=layout,
        loss_rows=loss_rows,
        targets=token_ids[loss_rows + 1],
    )

    with torch.no_grad():
        ours = model.hidden(shared)[torch.tensor([row for rows in own for row in rows])]
        bounds = plain.layout.cu_seqlens_q.tolist()
        apart = model.hidden(plain)
        assert_close(ours, torch.cat([apart[a + prefix : b] for a, b in itertools.pairwise(bounds)]))
    expected_loss, expected = loss_and_gradients(random_model(config, FULL), plain)
    loss, found = loss_and_gradients(model, shared)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(found, expected)
    again = loss_and_gradients(model, shared)[1]
    assert all(torch.equal(again[name], found[name]) for name in found)


def saved_storages(function):
    """What autograd saves while `function` runs, by storage: {address: bytes}; and the result."""
    storages = {}

    def pack_hook(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        result = function()
    return storages, result


def test_frozen_decoder_saves_no_input_of_a_linear():
    """By the layer: two residual sums, queries, keys, values, attention's output, the gate-up product, and per row
    two fp32 numbers of the norms and one per head of attention."""
    config = decoder_config(num_kv_heads=2)
    decoder = fill(Decoder(config, trained=False, precision=Precision(torch.bfloat16)))
    x = torch.randn(40, 32, dtype=torch.bfloat16, requires_grad=True)
    layout, positions = AttentionLayout.of_lengths([40]), torch.arange(40, dtype=torch.int32)
    inputs = []
    for layer in decoder.layers:
        for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
            linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    storages, _ = saved_storages(lambda: decoder(x, positions, layout))
    attended = inputs[1::4]
    assert len(inputs) == 8
    for tensor in inputs:
        assert tensor.untyped_storage().data_ptr() not in storages or any(tensor is a for a in attended)

    fixed = {t.untyped_storage().data_ptr() for t in [*decoder.parameters(), x, positions, decoder._rope[0]]}
    rows = sum(size for address, size in storages.items() if address not in fixed) / 40
    D, E, A, F = 32, (4 + 2 * 2) * 8, 4 * 8, 48
    layers = 2 * (2 * (2 * D + E + A + 2 * F) + 4 * (2 + 4))
    assert rows == layers - 2 * D + 2 * D + 4  # the first sum is the input; the final norm saves its own


def test_bf16_is_near_fp32():
    batch = text_batch()
    exact = random_model(trainable=FULL)
    loss, expected = loss_and_gradients(exact, batch)
    for options in ({}, {"fp32_residual": True}):
        model = random_model(trainable=FULL, compute_dtype=torch.bfloat16, **options)
        found_loss, found = loss_and_gradients(model, batch)
        assert found_loss == pytest.approx(loss, rel=0.02)
        assert_same_gradients(found, expected, 0.15)
        assert model.hidden(batch).dtype == torch.bfloat16
        assert model.splice(batch).dtype == (torch.float32 if options else torch.bfloat16)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_changes_no_bit(recompute, dtype):
    batch = random_batch()
    plain = loss_and_gradients(random_model(trainable=FULL, compute_dtype=dtype), batch)
    found = loss_and_gradients(random_model(trainable=FULL, compute_dtype=dtype, recompute=recompute), batch)
    assert found[0] == plain[0]
    assert all(torch.equal(found[1][name], plain[1][name]) for name in plain[1])


@pytest.mark.slow
@pytest.mark.parametrize("layers", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [ADAPTER, FULL], ids=["adapter", "full"])
def test_recomputing_some_layers_changes_no_bit(layers, dtype, trainable):
    batch, config = random_batch().parted(), model_config(num_layers=4)
    plain = loss_and_gradients(random_model(config, trainable, dtype), batch)
    model = random_model(config, trainable, dtype, recompute=layers)
    calls = []
    for number, layer in enumerate(model.decoder.layers):
        layer.post_norm.register_forward_hook(lambda *_, number=number: calls.append(number))
    found = loss_and_gradients(model, batch)
    assert found[0] == plain[0]
    assert all(torch.equal(found[1][name], plain[1][name]) for name in plain[1])
    assert calls == [*range(4), *reversed(range(layers))]  # again in backward: the first layers alone


def test_rope_kinds_that_depend_on_the_length_are_refused():
    for kind in ("dynamic", "longrope", "mystery"):
        with pytest.raises(ValueError, match=f"rope_type '{kind}' is not supported.*default, linear, llama3 and yarn"):
            rotary_frequencies(decoder_config(rope_parameters={"rope_type": kind, "factor": 2.0}))


def test_frequencies_survive_the_meta_device():
    with torch.device("meta"):
        decoder = Decoder(decoder_config(**ROPE["yarn"]), trained=False, precision=Precision())
    fill(decoder.to_empty(device="cpu"))
    plain = fill(Decoder(decoder_config(**ROPE["yarn"]), trained=False, precision=Precision()))
    x, positions = torch.randn(6, 32), torch.arange(6)
    layout = AttentionLayout.of_lengths([6])
    assert torch.equal(decoder(x, positions, layout), plain(x, positions, layout))


def test_unknown_recompute_is_refused():
    for given in ("some", 3, -1):
        with pytest.raises(ValueError, match=f"recompute {given!r}: choose one of none, selective, full, or .* 0 to 2"):
            Decoder(decoder_config(), trained=False, precision=Precision(), recompute=given)
