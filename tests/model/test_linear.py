"""Linear layers whose frozen weights are prepacked for oneDNN: values and gradients against the plain product, and
when."""

import copy
import logging
import pickle

import pytest
import torch
from fastvid_kernels.cpu import can_prepack
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from training_run import config_of, write_run

from bench.executed import executed_flops
from fastvid import train
from fastvid.dist import parallel
from fastvid.model.linear import Linear
from fastvid.model.recompute import keep_products
from fastvid.training import memory

CPU = torch.device("cpu")
WORLD = parallel.World(0, 1, 0, CPU, False)
BF16 = torch.bfloat16
DTYPES = [dtype for dtype in (BF16, torch.float32) if can_prepack(dtype, CPU)]
UNITS = {BF16: (2**-8, 1e-4), torch.float32: (2**-20, 2**-18)}  # one rounding, and what sums of fp32 add
tiles = pytest.mark.skipif(BF16 not in DTYPES, reason="oneDNN computes no bf16 on this CPU")
some_tiles = pytest.mark.skipif(not DTYPES, reason="this torch has no oneDNN")


def frozen_linear(inputs, outputs, *, prepacked, seed=0, dtype=BF16):
    linear = Linear(inputs, outputs, dtype=dtype, trained=False)
    linear.weight.copy_(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) / inputs**0.5)
    if prepacked:
        linear.prepack()
    return linear


@some_tiles
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [None, slice(16, 64)])
def test_a_bias_is_added_to_prepacked_products(outputs, dtype):
    linear, plain = (Linear(32, 64, bias=True, dtype=dtype, trained=False) for _ in range(2))
    for parameter, other in zip(linear.parameters(), plain.parameters()):
        parameter.copy_(torch.randn(parameter.shape))
        other.copy_(parameter)
    linear.prepack()
    columns = 64 if outputs is None else 48
    x_NI, grad_NO = torch.randn(7, 32, dtype=dtype), torch.randn(7, columns)
    found, expected = (
        value_and_gradient(lambda x, each=each: each(x, outputs=outputs), x_NI, grad_NO) for each in (linear, plain)
    )
    for value, wanted in zip(found, expected):
        assert (value - wanted).abs().max() <= UNITS[dtype][0] * wanted.abs().max()


def value_and_gradient(function, x_NI, grad_NO):
    x_NI = x_NI.clone().requires_grad_()
    y_NO = function(x_NI)
    y_NO.backward(grad_NO.to(y_NO.dtype))
    return y_NO.detach(), x_NI.grad


def products_of(call):
    """Names of the linear products that `call` runs."""
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.extend([function.name()] if function.name() == "mkldnn::_linear_pointwise" else [])
            return function(*args, **(kwargs or {}))

    with Names():
        call()
    return names


@some_tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [None, slice(16), slice(16, None), slice(5, 29)], ids=str)
@pytest.mark.parametrize("rows, inputs, width", [(1, 64, 48), (37, 64, 48), (130, 96, 176), (200, 33, 47), (0, 64, 48)])
def test_tiles_are_multiplied_as_the_plain_weight_is(rows, inputs, width, outputs, dtype):
    (unit, floor), generator = UNITS[dtype], torch.Generator().manual_seed(1)
    plain, prepacked = (frozen_linear(inputs, width, prepacked=prepacked, dtype=dtype) for prepacked in (False, True))
    weight = plain.weight.double()[outputs or slice(None)]
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    grad = torch.randn(rows, len(weight), generator=generator).to(dtype)
    found = value_and_gradient(lambda x: prepacked(x, outputs=outputs), x, grad)
    expected = value_and_gradient(lambda x: plain(x, outputs=outputs), x, grad)
    exact = value_and_gradient(lambda x: functional.linear(x, weight), x.double(), grad)
    for ours, theirs, true in zip(found, expected, exact):
        assert ours.dtype == dtype and ours.shape == true.shape
        torch.testing.assert_close(ours.double(), true, rtol=unit, atol=floor)
        torch.testing.assert_close(ours, theirs, rtol=2 * unit, atol=2 * floor)


@tiles
def test_rows_and_gradients_may_lie_apart():
    prepacked = frozen_linear(64, 48, prepacked=True)
    x, grad = torch.randn(64, 30).to(BF16).T, torch.ones((), dtype=BF16).expand(30, 48)
    found = value_and_gradient(prepacked, x, grad)
    expected = value_and_gradient(prepacked, x.contiguous(), grad.contiguous())
    assert all(map(torch.equal, found, expected))


def write_weight(linear, other):
    linear.load_state_dict(other.state_dict())


def give_weight(linear, other):
    linear.load_state_dict(other.state_dict(), assign=True)


def give_parameter(linear, other):
    linear.weight = other.weight


def give_data(linear, other):
    linear.weight.data = other.weight.data


@tiles
@pytest.mark.parametrize("change", [write_weight, give_weight, give_parameter, give_data])
def test_a_weight_that_changes_is_prepacked_anew(change):
    prepacked, other = frozen_linear(64, 48, prepacked=True), frozen_linear(64, 48, prepacked=False, seed=2)
    x, grad = torch.randn(9, 64).to(BF16), torch.randn(9, 48).to(BF16)
    before = value_and_gradient(prepacked, x, grad)
    change(prepacked, other)
    after, expected = value_and_gradient(prepacked, x, grad), value_and_gradient(other, x, grad)
    for old, new, wanted in zip(before, after, expected):
        assert not torch.equal(old, new)
        torch.testing.assert_close(new, wanted, rtol=2**-7, atol=1e-4)


@tiles
def test_a_weight_that_changes_before_backward_is_an_error():
    prepacked, x = frozen_linear(64, 48, prepacked=True), torch.randn(9, 64, dtype=BF16, requires_grad=True)
    y = prepacked(x)
    with torch.no_grad():
        prepacked.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified between forward and backward"):
        y.sum().backward()


@tiles
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda linear: pickle.loads(pickle.dumps(linear))], ids=["copied", "pickled"]
)
def test_a_copy_makes_its_own_tiles(duplicate):
    prepacked, x = frozen_linear(64, 48, prepacked=True), torch.randn(9, 64, dtype=BF16)
    expected = prepacked(x)
    other = duplicate(prepacked)
    assert other._prepacked.parts == {} and torch.equal(other(x), expected) and other._prepacked.parts
    with torch.no_grad():
        prepacked.weight.zero_()
    assert torch.equal(other(x), expected) and not prepacked(x).any()


@tiles
def test_tiles_are_made_once_and_nothing_is_saved():
    prepacked, saved = frozen_linear(64, 48, prepacked=True), []
    x = torch.randn(9, 64, dtype=BF16, requires_grad=True)
    assert list(prepacked.state_dict()) == ["weight"]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        for _ in range(2):
            prepacked(x).sum().backward()
            copies = {name: vars(each).copy() for name, each in prepacked._prepacked.parts.items()}
            assert list(copies) == [(0, 48)]
    assert not saved and list(prepacked.state_dict()) == ["weight"]
    again = {name: vars(each) for name, each in prepacked._prepacked.parts.items()}
    assert all(copies[name][key] is again[name][key] for name in copies for key in again[name])


@tiles
def test_rows_of_another_dtype_take_the_plain_product():
    prepacked, x = frozen_linear(64, 48, prepacked=True), torch.randn(9, 64)
    assert torch.equal(prepacked(x), functional.linear(x, prepacked.weight.float()))


@tiles
def test_selective_recomputation_keeps_the_product():
    prepacked = frozen_linear(64, 64, prepacked=True)
    x = torch.randn(9, 64, dtype=BF16, requires_grad=True)
    names = products_of(
        lambda: (
            checkpoint(lambda x: prepacked(x * 2).sin(), x, use_reentrant=False, context_fn=keep_products)
            .sum()
            .backward()
        )
    )
    assert len(names) == 2  # forward, and the gradient


@tiles
def test_executed_operations_are_counted_alike():
    plain, prepacked = (frozen_linear(64, 48, prepacked=prepacked) for prepacked in (False, True))
    x = torch.randn(9, 64, dtype=BF16, requires_grad=True)
    counts = [executed_flops(lambda: linear(x).sum().backward())[1] for linear in (plain, prepacked)]
    assert counts == [4 * 9 * 64 * 48] * 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def losses_of(state, steps=4):
    found = []
    for batches, _ in state.loader.iterate(0):
        found.append(float(train.train_step(state, batches).loss))
        if len(found) == steps:
            return found


def parts_of(linear):
    return linear._prepacked.parts.values() if linear._prepacked else ()


def check_copies(decoder, allowed):
    """After steps: one copy for each direction, of all rows; the last layer's queries apart from its keys and
    values."""
    linears = [linear for layer in decoder.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    held = [
        [prepacked for each in parts_of(linear) for prepacked in (each._forward, each._backward)] for linear in linears
    ]
    assert [len(copies) for copies in held] == [
        (4 if linear is decoder.layers[-1].qkv else 2) * allowed for linear in linears
    ]
    assert sum(prepacked.numel() for copies in held for prepacked in copies if prepacked is not None) == allowed * sum(
        2 * linear.weight.numel() for linear in linears
    )


@pytest.mark.slow
@tiles
@pytest.mark.parametrize(
    "more",
    [[], ["--bf16", "False"], ["--recompute", "selective"], ["--share_video", "--question_order", "video_first"]],
    ids=" ".join,
)
def test_training_with_tiles_follows_training_without(run, monkeypatch, more):
    found = []
    for allowed in (True, False):
        with monkeypatch.context() as patch:
            if not allowed:
                patch.setattr("fastvid.training.planning.can_prepack", lambda *_: False)
            state = train.build(
                config_of(run, "unused", "--bf16", "True", "--dataloader_num_workers", "0", *more), WORLD
            )
        names = products_of(lambda: found.append(losses_of(state)))
        assert bool(names) == allowed
        check_copies(state.model.decoder, allowed)
    assert found[0] == pytest.approx(found[1], rel=2e-3)
    assert len(set(found[0])) == 4


@tiles
@pytest.mark.parametrize(
    "flags, prepacked",
    [
        (["--bf16", "True"], True),
        (["--bf16", "True", "--recompute", "selective"], True),
        (["--bf16", "True", "--recompute", "full"], False),
        ([], True),
        (["--parity", "reference"], False),
        (["--bf16", "True", "--frozen_dtype", "int8"], False),
        (["--bf16", "True", "--tune_mm_mlp_adapter", "False"], False),
    ],
)
def test_what_is_prepacked(run, flags, prepacked, caplog):
    with caplog.at_level(logging.INFO, "fastvid"):
        state = train.build(config_of(run, "unused", *flags), WORLD)
    linears = [module for module in state.model.modules() if isinstance(module, Linear)]
    assert {linear._prepacked is not None for linear in linears if not linear.weight.requires_grad} <= {prepacked}
    assert not any(linear._prepacked is not None for linear in linears if linear.weight.requires_grad)
    assert ("also held in the layouts that this CPU multiplies" in caplog.text) == prepacked


@tiles
def test_copies_are_planned_and_left_out_where_memory_is_short(run, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fastvid")
    config, found, estimate = config_of(run, "unused", "--bf16", "True", "--recompute", "none"), [], memory.estimate
    monkeypatch.setattr(memory, "estimate", lambda *a, **k: found.append(estimate(*a, **k)) or found[-1])
    state = train.build(config, WORLD)
    plain, with_copies = found[-2:]
    weights = [
        linear.weight.nbytes
        for layer in state.model.decoder.layers
        for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)
    ]
    assert with_copies.weights - plain.weights == 2 * sum(weights)
    for memory_of_all, prepacked in (
        (with_copies.total - 1, False),
        (with_copies.total / 0.75 - 1, False),
        (with_copies.total / 0.75 + 1, True),
    ):
        caplog.clear()
        monkeypatch.setattr(parallel, "device_memory", lambda world: memory_of_all)
        assert (train.build(config, WORLD).model.decoder.layers[0].qkv._prepacked is not None) == prepacked
        assert (
            "not also held in the layouts that this CPU multiplies, for which memory is short" in caplog.text
        ) != prepacked


def test_elsewhere_products_are_plain():
    assert not can_prepack(torch.float64, CPU)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not can_prepack(torch.float32, CPU)
    assert not any(can_prepack(dtype, torch.device("cuda")) for dtype in (BF16, torch.float32))
