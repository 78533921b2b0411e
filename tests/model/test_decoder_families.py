"""Families beyond LLaMA against transformers' own models, and that no fast path leaves out what they have besides."""

import pytest
import torch
from model_cases import (
    ADAPTER,
    FAMILIES,
    FEW,
    FULL,
    assert_close,
    assert_packed_equals_apart,
    assert_same_gradients,
    family_config,
    llama_of,
    loss_and_gradients,
    prepared,
    random_batch,
    random_model,
    to_llama,
    with_prefix,
)
from test_decoder import llama_loss, text_batch
from test_keys_by_kernel import interpreted  # noqa: F401

from fastvid.model.quantize import FORMATS
from fastvid.training.live_bytes import LiveBytes

HEADS = {"mha": {"num_kv_heads": 4}, "gqa": {"num_kv_heads": 2}, "mqa": {"num_kv_heads": 1}}


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family, heads, tied):
    model = random_model(family_config(family, **HEADS[heads], tie_word_embeddings=tied), FULL)
    theirs, batch = llama_of(model), text_batch()
    expected, expected_logits = llama_loss(theirs, batch)
    expected.backward()
    with torch.no_grad():
        assert_close(model.logits(model.hidden(batch)), expected_logits)
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    found, named = to_llama(model, found), dict(theirs.named_parameters())
    assert_same_gradients({name: found[name] for name in named}, {name: p.grad for name, p in named.items()})


@pytest.mark.parametrize("trainable", [ADAPTER, FULL], ids=["adapter", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_by_one(family, trainable):
    model = random_model(family_config(family), trainable)
    assert_packed_equals_apart(model)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", 1, "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_prefix_frozen_and_supervised_rows_equal_all_rows(family, recompute):
    plain, batch = with_prefix()
    options = {"config": family_config(family), "recompute": recompute}
    expected_loss, expected = loss_and_gradients(random_model(**options), plain)
    model = prepared(random_model(**options))
    for ours in (batch, batch.parted()):
        loss, found = loss_and_gradients(model, ours)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert_same_gradients(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", 1, "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_changes_no_bit(family, dtype, recompute):
    batch, config = random_batch().parted(), family_config(family)
    plain = loss_and_gradients(random_model(config, FULL, dtype), batch)
    found = loss_and_gradients(random_model(config, FULL, dtype, recompute=recompute), batch)
    assert found[0] == plain[0]
    assert all(torch.equal(found[1][name], plain[1][name]) for name in plain[1])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_of_keys_serve_the_families_that_they_know(family, interpreted):  # noqa: F811
    """A bias lies in the product that the kernel rotates, and layers without positions are turned by nothing; norms of
    heads come between, so that those layers go the other way."""
    _, batch = with_prefix(shapes=FEW)
    batch = batch.parted()
    model = prepared(random_model(family_config(family)))
    expected_loss, expected = loss_and_gradients(model, batch)
    calls = interpreted()
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(found, expected)
    assert calls["forward"] == (0 if family == "qwen3" else len(model.decoder.layers))


def test_a_layer_without_positions_rotates_by_nothing():
    """Its keys are their product's, to the bit."""
    model = random_model(family_config("smollm3"))
    cached = []
    model.decoder.layers[1].qkv.register_forward_hook(lambda _, args, out: cached.append(out.clone()))
    model.keep_prefix([5, 6, 7, 8])
    keys = cached[0].unflatten(-1, (8, 8))[:, 4:6]
    assert torch.equal(model._prefix[1][0], keys) and not torch.equal(model._prefix[0][0], keys)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen_dtype", ["int8", "nf4"])
def test_frozen_matrices_in_few_bits_keep_biases_and_norms(family, frozen_dtype):
    """Against the same model whose matrices hold what the bits say."""
    config, batch = family_config(family), random_batch()
    few, plain = random_model(config, frozen_dtype=frozen_dtype), random_model(config)
    for name, linear in few.decoder.named_modules():
        if type(linear) is FORMATS[frozen_dtype]:
            whole = plain.decoder.get_submodule(name).weight
            linear.quantize_(whole)
            whole.data.copy_(linear.dequantized(torch.float32))
    plain.load_state_dict(dict(few.named_parameters()), strict=False)
    loss, found = loss_and_gradients(few, batch)
    expected_loss, expected = loss_and_gradients(plain, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("frozen_dtype", FORMATS)
def test_a_bias_is_added_to_a_product_in_few_bits(frozen_dtype):
    linear = FORMATS[frozen_dtype](64, 32, bias_dtype=torch.float32)
    bare = FORMATS[frozen_dtype](64, 32)
    weight, bias, x = torch.randn(32, 64), torch.randn(32), torch.randn(5, 64, requires_grad=True)
    linear.bias.data.copy_(bias)
    for each in (linear, bare):
        each.quantize_(weight)
    for outputs in (None, slice(8, 24)):
        y, expected = linear(x, outputs=outputs), bare(x, outputs=outputs)
        torch.testing.assert_close(y, expected + bias[outputs or slice(None)])
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected + bias[outputs or slice(None)])]
        torch.testing.assert_close(*grads)


def test_norms_of_heads_keep_one_copy_of_their_rows():
    """Beside LLaMA's a layer saves, for each head's row, what its norm was given and one number."""
    batch, sizes = random_batch(), {"num_kv_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
    taken = []
    for config in (family_config("qwen3", **sizes), family_config("mistral", **sizes)):
        model = random_model(config)
        with LiveBytes() as live:
            loss = model(batch)
            taken.append(live.now)
        del loss
    more = batch.num_rows * (4 + 2) * (16 + 1) * 4 * model.config.decoder.num_layers
    assert taken[0] - taken[1] == more
