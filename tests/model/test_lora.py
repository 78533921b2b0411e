"""LoRA on packed rows: against the `peft` package, and that every fast path computes what the plain one does."""

import dataclasses
import itertools

import pytest
import torch
from model_cases import (
    assert_close,
    assert_packed_equals_apart,
    assert_same_gradients,
    family_config,
    fill,
    gradients,
    llama_of,
    loss_and_gradients,
    model_config,
    pack,
    random_batch,
    random_model,
    random_sample,
)
from test_decoder import llama_loss, text_batch
from test_keys_by_kernel import interpreted  # noqa: F401

from fastvid.config.policy import LORA_TARGETS, LORA_WORDS, Lora, Trainable, lora_targets
from fastvid.model.linear import Linear
from fastvid.model.lora import LoraBranch, beside, delta, draw_dropout, shapes
from fastvid.model.quantize import QuantizedLinear

LORA = Lora(3, 5.0)
SOME = Lora(4, 2.0, targets=("q_proj", "v_proj", "up_proj"), rslora=True)
KINDS = {
    "llama mha": model_config(),
    "llama gqa": model_config(num_kv_heads=2),
    "qwen2": family_config("qwen2"),
    "qwen3": family_config("qwen3"),
}
TRAINED = Trainable(projector=True, boundary=True, lora=LORA)


def trained(lora=LORA):
    return dataclasses.replace(TRAINED, lora=lora)


def by_target(model, tensors):
    """{PEFT's name: tensor} of ours by name, written out by hand for LoRA on every target."""
    c, r = model.config.decoder, model.trainable.lora.rank
    sizes = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
    found = {}
    for i in range(c.num_layers):
        ours, theirs = f"decoder.layers.{i}.lora.", f"base_model.model.model.layers.{i}."
        for matrix, block, names, rows in (
            ("qkv", "self_attn", ("q", "k", "v"), sizes),
            ("o", "self_attn", ("o",), [c.hidden_size]),
            ("gate_up", "mlp", ("gate", "up"), [c.intermediate_size] * 2),
            ("down", "mlp", ("down",), [c.hidden_size]),
        ):
            for name, a, b in zip(
                names, tensors[f"{ours}{matrix}.a.weight"].split(r), tensors[f"{ours}{matrix}.b.weight"].split(rows)
            ):
                found[f"{theirs}{block}.{name}_proj.lora_A.default.weight"] = a
                found[f"{theirs}{block}.{name}_proj.lora_B.default.weight"] = b
    return {name: tensor.detach() for name, tensor in found.items()}


def peft_model(model, lora=LORA):
    """The `peft` package's model over transformers', with the weights of ours: of bits, the numbers that they mean."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), use_rslora=lora.rslora
    )
    theirs = peft.get_peft_model(llama_of(dense(model)), settings)
    ours = by_target(model, dict(model.named_parameters()))
    assert not theirs.load_state_dict(ours, strict=False).unexpected_keys
    return theirs, ours


@pytest.mark.parametrize("kind", [*KINDS, "int8", "nf4"])
def test_equals_peft(kind):
    model = random_model(KINDS[kind], trained()) if kind in KINDS else quantized(kind)
    theirs, ours = peft_model(model)
    batch = text_batch()
    expected, _ = llama_loss(theirs, batch)
    expected.backward()
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    named = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert named.keys() == ours.keys(), "PEFT trains the same tensors"
    assert_same_gradients(by_target(model, found), named)
    merged = theirs.merge_and_unload()
    with torch.no_grad():
        assert_close(model.logits(model.hidden(batch)), llama_loss(merged, batch)[1])


def plain_gradients(model, batch):
    """Loss and gradients of the same model whose matrices are merged as autograd sees it: W + s·B·A."""
    c, lora = model.config.decoder, model.trainable.lora
    merged = random_model(model.config, dataclasses.replace(model.trainable, lora=None))
    weights = dict(merged.named_parameters())
    weights |= {name: p.detach() for name, p in model.named_parameters() if name in weights}
    tensors = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    for name, p in tensors.items():
        if name in weights:
            weights[name] = p
    for i in range(c.num_layers):
        for matrix, place in beside(c, lora).items():
            at, before = f"decoder.layers.{i}.{matrix}", 0
            a, b = (tensors[f"decoder.layers.{i}.lora.{matrix}.{x}.weight"] for x in "ab")
            weight = dense_weight(model, at)
            for j, (first, last) in enumerate(place.columns.values()):
                more = lora.scaling * b[before : before + last - first] @ a[j * lora.rank : (j + 1) * lora.rank]
                weight = torch.cat([weight[:first], weight[first:last] + more, weight[last:]])
                before += last - first
            weights[f"{at}.weight"] = weight
    loss = torch.func.functional_call(merged, weights, (batch,))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in tensors.items()}


def dense(model):
    """The same model without LoRA, and whose matrices hold what their bits stand for."""
    whole = random_model(model.config, dataclasses.replace(model.trainable, lora=None))
    for name, parameter in whole.named_parameters():
        matrix = name.removesuffix(".weight")
        of_matrix = name != matrix and isinstance(model.get_submodule(matrix), QuantizedLinear)
        parameter.data = dense_weight(model, matrix) if of_matrix else model.get_parameter(name).detach()
    return whole


def dense_weight(model, name):
    """What a matrix multiplies by: its weight, or what its bits stand for."""
    module = model.get_submodule(name)
    if isinstance(module, QuantizedLinear):
        return module.product(torch.eye(module.inputs), slice(None)).T.detach().clone()
    return module.weight.detach()


@pytest.mark.parametrize("lora", [LORA, SOME, *(Lora(2, 3.0, targets=(t,)) for t in LORA_TARGETS)], ids=str)
def test_each_target_adds_its_product_and_no_other(lora):
    model, batch = random_model(trainable=Trainable(lora=lora)), random_batch().parted()
    expected_loss, expected = plain_gradients(model, batch)
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("frozen_dtype", ["int8", "nf4"])
def test_gradients_beside_few_bits_are_those_of_the_numbers_that_the_bits_stand_for(frozen_dtype):
    model, batch = quantized(frozen_dtype), random_batch().parted()
    expected_loss, expected = plain_gradients(model, batch)
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(found, expected)


def quantized(frozen_dtype, dtype=torch.float32, lora=LORA, **options):
    config = model_config(hidden_size=32, intermediate_size=64)
    whole = random_model(config)
    model = random_model(config, trained(lora), dtype, frozen_dtype=frozen_dtype, **options)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.quantize_(whole.get_parameter(f"{name}.weight").detach().to(dtype))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["attention", "mlp"])
def test_fp8_rows_go_on_in_e4m3_where_no_low_rank_product_reads_them(targets, monkeypatch):
    """Kernels run, interpreted, and compute to the bit what products do that quantise rows."""
    model = quantized("fp8", torch.bfloat16, Lora(4, 8.0, targets=LORA_WORDS[targets]))
    norms = [(layer.input_norm, layer.post_norm) for layer in model.decoder.layers]
    expected = (targets == "mlp", targets == "attention")
    assert all((before.for_fp8, after.for_fp8) == expected for before, after in norms)
    generator = torch.Generator().manual_seed(0)
    batch = pack([random_sample(generator, text=(4, 1), video=2, answer=2)], generator=generator).parted()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    loss, found = loss_and_gradients(model, batch)
    for norm in itertools.chain(*norms):
        norm.for_fp8 = False
    again, gradients_again = loss_and_gradients(model, batch)
    assert loss == again and all(torch.equal(found[name], gradients_again[name]) for name in found)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
def test_keys_that_a_kernel_places_equal_gathered_ones(interpreted):  # noqa: F811
    model, batch = random_model(KINDS["llama gqa"], trained(SOME)), random_batch().parted()
    expected_loss, expected = loss_and_gradients(model, batch)
    calls = interpreted()
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6) and calls["forward"] == 2
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("lora", [LORA, SOME], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["llama gqa", "qwen3"])
def test_packed_equals_one_by_one(kind, lora):
    model = random_model(KINDS[kind], trained(lora))
    assert_packed_equals_apart(model, lambda batch: batch.parted())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recompute", ["selective", 1, "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_changes_no_bit(dtype, recompute, dropout):
    batch, config = random_batch().parted(), KINDS["qwen2"]
    found = []
    for mode in ("none", recompute):
        model = random_model(config, trained(dataclasses.replace(LORA, dropout=dropout)), dtype, recompute=mode)
        draw_dropout(model, (1, 2))
        found.append(loss_and_gradients(model, batch))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def frozen_matrix(place, dtype, scale=0.0):
    """Beside which LoRA's lie; of zeros, its product adds nothing."""
    matrix = Linear(place.inputs, place.outputs, dtype=dtype, trained=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        matrix.weight.copy_(scale * torch.randn(matrix.weight.shape, generator=generator, dtype=dtype))
    return matrix


def test_dropout_is_that_of_its_numbers_and_has_their_expectation():
    """What is left out changes with the numbers; forward and backward leave out the same; none without numbers."""
    place, lora = beside(model_config().decoder, LORA)["qkv"], dataclasses.replace(LORA, dropout=0.25)
    branch = fill(LoraBranch(place, lora, dtype=torch.float32, inplace=True))
    x = torch.randn(4000, place.inputs, generator=torch.Generator().manual_seed(0), requires_grad=True)
    matrix = frozen_matrix(place, torch.float32)
    plain = branch(matrix, x)
    outs = []
    for numbers in ((1, 2), (1, 2), (1, 3)):
        draw_dropout(branch, numbers)
        outs.append(branch(matrix, x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    a = torch.cat([branch.a.weight.detach()])
    kept = torch.autograd.grad(outs[0].sum(), x)[0] != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    scaled = (x.detach() * kept / 0.75) @ a.T
    rows = zip(scaled.split(LORA.rank, 1), branch.b.weight.split([32, 32, 32]))
    assert_close(outs[0], torch.cat([h @ b.T * LORA.scaling for h, b in rows], 1))
    draw_dropout(branch, None)
    assert torch.equal(branch(matrix, x), plain)


def test_gradients_under_dropout_are_those_of_the_plain_product():
    """s · (x without what is left out)·Aᵀ·Bᵀ under autograd, with what forward left out."""
    place, lora = beside(model_config().decoder, LORA)["qkv"], dataclasses.replace(LORA, dropout=0.25)
    branch = fill(LoraBranch(place, lora, dtype=torch.float64, inplace=True))
    draw_dropout(branch, (1, 2))
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (place.inputs, place.outputs))
    inputs = [x.requires_grad_(), branch.a.weight, branch.b.weight]
    y = branch(frozen_matrix(place, torch.float64), x)
    found = torch.autograd.grad(y, inputs, upstream)
    dropped = found[0] == 0
    rows = x.masked_fill(dropped, 0) @ branch.a.weight.T
    parts = zip(
        rows.split(lora.rank, 1), branch.b.weight.split([last - first for first, last in place.columns.values()])
    )
    plain = lora.scaling / 0.75 * torch.cat([h @ b.T for h, b in parts], 1)
    assert_close(y, plain)
    assert dropped.any() and all(gradient.any() for gradient in found)
    for gradient, expected in zip(found, torch.autograd.grad(plain, inputs, upstream)):
        assert_close(gradient, expected)


def test_a_new_branch_adds_nothing_and_gets_a_gradient():
    model, batch = random_model(trainable=trained()), random_batch().parted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".b.weight"):
                parameter.zero_()
    plain = random_model(trainable=dataclasses.replace(TRAINED, lora=None))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".lora." not in k})
    loss, found = loss_and_gradients(model, batch)
    assert loss == loss_and_gradients(plain, batch)[0]
    assert all(grad.abs().max() > 0 for name, grad in found.items() if name.endswith(".b.weight"))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad} == set(gradients(model))


def test_shapes_are_those_of_the_model():
    for config, lora in itertools.product(KINDS.values(), (LORA, SOME)):
        layer = random_model(config, trained(lora)).decoder.layers[0]
        found = {name: tuple(p.shape) for name, p in layer.named_parameters() if name.startswith("lora.")}
        assert found == shapes(config.decoder, lora)


def test_what_a_target_adds():
    a, b = torch.randn(3, 5), torch.randn(4, 3)
    assert_close(delta(a, b, LORA), 5 / 3 * b @ a)
    assert SOME.scaling == 1.0


def test_words_name_targets():
    assert lora_targets(["all"]) == LORA_TARGETS
    assert lora_targets(["v_proj,q_proj", "mlp"]) == ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    with pytest.raises(ValueError, match="'query' names no matrix"):
        lora_targets(["query"])
    with pytest.raises(ValueError, match="names nothing"):
        lora_targets([","])


def test_no_prefix_is_kept():
    model = random_model(trainable=trained())
    with pytest.raises(AssertionError, match="prefix changes"):
        model.keep_prefix([5, 6, 7, 8])


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_both_gradients_of_the_rows_are_summed(dropout):
    """That of the frozen matrix's product and that of the low-rank one."""
    place, lora = beside(model_config().decoder, LORA)["qkv"], dataclasses.replace(LORA, dropout=dropout)
    branch = fill(LoraBranch(place, lora, dtype=torch.float64, inplace=True))
    draw_dropout(branch, (1, 2))
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (place.inputs, place.outputs))
    alone, matrix = frozen_matrix(place, torch.float64), frozen_matrix(place, torch.float64, scale=1.0)
    (low_rank, both), (first, found) = zip(
        *((y := branch(each, x.requires_grad_()), torch.autograd.grad(y, x, upstream)[0]) for each in (alone, matrix))
    )
    assert_close(both - low_rank, x @ matrix.weight.T)
    assert_close(found - first, upstream @ matrix.weight)
    assert first.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, times", [("llama mha", 6), ("llama gqa", 3)])
def test_targets_of_one_width_go_together_on_a_gpu(monkeypatch, kind, times, dtype):
    """Queries, keys and values in one launch, gate and up in another: what each alone gives."""
    model, batch, launched = random_model(KINDS[kind], trained(), compute_dtype=dtype), random_batch(), []
    product = torch.Tensor.baddbmm_
    monkeypatch.setattr(
        torch.Tensor, "baddbmm_", lambda *args, **options: launched.append(1) or product(*args, **options)
    )
    apart = loss_and_gradients(model, batch)
    assert not launched
    monkeypatch.setattr("fastvid.model.lora.on_gpu", lambda tensor: True)
    together = loss_and_gradients(model, batch)
    layers = KINDS[kind].decoder.num_layers
    # In the last layer keys and values go apart from queries, which are of supervised rows alone.
    assert len(launched) == times * layers
    assert together[0] == pytest.approx(apart[0], rel=1e-6 if dtype == torch.float32 else 1e-2)
    assert_same_gradients(together[1], apart[1])
