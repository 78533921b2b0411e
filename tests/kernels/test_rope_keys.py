"""rope_keys: values and gradients against fp64, with keys in order, gathered, shared and behind constant rows."""

import pytest
import torch
from fastvid_kernels.dispatch import watch_launches
from fastvid_kernels.launch_bytes import name_of
from fastvid_kernels.rope_keys import place_keys, rope_keys, rope_keys_reference
from fastvid_kernels.way_back import WayBack
from harness import DEVICE, DTYPES, assert_close_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import each_pair

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = ["triton", "reference"]
# rows, query heads, key heads, channels per head; the last two take several programs a row
SHAPES = [(1, 1, 1, 2), (7, 4, 4, 8), (9, 6, 2, 6), (5, 0, 2, 4), (3, 32, 2, 128), (2, 9, 17, 200)]
# constant rows, and what the keys are: none, each row once, some shared, some of nobody
WAYS = {"in order": None, "each once": (0, "once"), "shared": (0, "any"), "behind constant rows": (3, "any")}


def inputs(shape, way, dtype, seed=0):
    rows, heads, kv_heads, channels = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    qkv = normal(rows, (heads + 2 * kv_heads) * channels).requires_grad_()
    positions = torch.randint(0, 3000, (rows,), generator=generator, dtype=torch.int32).to(DEVICE)
    frequencies = 1 / 10000 ** (torch.arange(0, channels, 2, device=DEVICE) / channels)
    keys, constant, places = {}, None, rows
    if WAYS[way]:
        count, kind = WAYS[way]
        chosen = (
            torch.randperm(rows, generator=generator)
            if kind == "once"
            else torch.randint(0, rows + count, (2 * rows + 1,), generator=generator)
        )
        way_back, places = WayBack.of(chosen, count, rows).map(lambda x: x.to(DEVICE)), len(chosen)
        keys = {"rows_M": chosen.to(DEVICE), "way_back": way_back}
        constant = (normal(count, kv_heads, channels), normal(count, kv_heads, channels)) if count else None
    grads = normal(rows, heads, channels), normal(places, kv_heads, channels), normal(places, kv_heads, channels)
    return qkv, (positions, frequencies, heads, kv_heads), keys, constant, grads


def exact_keys(qkv, positions, frequencies, heads, kv_heads, **options):
    """In fp64 but for the angle, which is the product rounded to fp32."""
    angles = (positions.float()[:, None] * frequencies).double()
    return rope_keys_reference(qkv, torch.ones_like(positions), angles[:, None], heads, kv_heads, **options)


def run(function, qkv, rest, grads, **options):
    outs = function(qkv, *rest, scale=1.2, **options)
    return *(x.detach() for x in outs), *torch.autograd.grad(outs, qkv, grads)


def check(shape, way, dtype, impl, inplace=False, seed=0):
    qkv, rest, keys, constant, grads = inputs(shape, way, dtype, seed)
    found = run(
        lambda x, *args, **options: rope_keys(x.clone(), *args, **options),
        qkv,
        rest,
        grads,
        **keys,
        constant=constant,
        impl=impl,
        inplace=inplace,
    )
    rows_M = keys.get("rows_M")
    eager = run(rope_keys_reference, qkv, rest, grads, rows_M=rows_M, constant=constant)
    exact = run(
        exact_keys,
        qkv.detach().double().requires_grad_(),
        rest,
        [x.double() for x in grads],
        rows_M=rows_M,
        constant=constant and tuple(x.double() for x in constant),
    )
    for values in zip(found, exact, eager):
        assert_close_as_eager(*values)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@each_pair(shape=SHAPES, way=WAYS, dtype=DTYPES)
def test_equals_reference(impl, dtype, way, shape):
    check(shape, way, dtype, impl)


@pytest.mark.slow
@given(
    rows=st.integers(1, 4),
    heads=st.integers(0, 20),
    kv_heads=st.integers(1, 20),
    half=st.integers(1, 70),
    way=st.sampled_from(sorted(WAYS)),
    dtype=st.sampled_from(DTYPES),
    inplace=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape(rows, heads, kv_heads, half, way, dtype, inplace, seed):
    check((rows, heads, kv_heads, 2 * half), way, dtype, "triton", inplace, seed)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_in_place_writes_no_key_that_is_placed_again(way):
    qkv, rest, keys, constant, _ = inputs((7, 4, 2, 8), way, torch.float32)
    given_rows, copy = qkv.detach().clone(), qkv.detach().clone()
    q, k, v = rope_keys(copy, *rest, **keys, constant=constant, inplace=True, impl="triton")
    assert q.data_ptr() == copy.data_ptr()
    if keys:
        assert torch.equal(copy[:, 32:], given_rows[:, 32:])
        positions, frequencies, heads, kv_heads = rest
        again = place_keys(copy, positions, frequencies, heads, kv_heads, 1.0, keys["rows_M"], constant)
        assert torch.equal(again, torch.stack([k, v]))


@pytest.mark.parametrize("way", ["in order", "shared"])
def test_a_copy_is_of_queries_alone_where_keys_have_places(way):
    qkv, rest, keys, _, _ = inputs((7, 4, 2, 8), way, torch.float32)
    q, _, _ = rope_keys(qkv, *rest, **keys, impl="triton")
    assert q.untyped_storage().nbytes() == 4 * 7 * (32 if keys else 64)


@pytest.mark.parametrize("heads", [4, 0])
def test_queries_and_keys_take_one_launch(heads):
    qkv, rest, keys, constant, _ = inputs((7, heads, 2, 8), "behind constant rows", torch.float32)
    launched = []
    with watch_launches(lambda kernel, *_: launched.append(name_of(kernel))):
        rope_keys(qkv, *rest, **keys, constant=constant, impl="triton")
    assert launched == ["_place_keys_kernel"]


def test_autograd_sees_what_is_overwritten():
    qkv, rest, _, _, _ = inputs((7, 4, 2, 8), "in order", torch.float32)
    rows = qkv * 2
    squares = rows * rows  # saves them
    q, _, _ = rope_keys(rows, *rest, inplace=True, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares.sum() + q.sum()).backward()


def test_way_back_of_a_row_that_nobody_attends_to():
    rows_M = torch.tensor([4, 0, 2, 4, 1])
    way_back = WayBack.of(rows_M, 2, 3)
    assert way_back.starts_N1.tolist() == [0, 1, 1, 3] and way_back.places.tolist() == [2, 0, 3]
    qkv = torch.randn(3, 6, device=DEVICE, requires_grad=True)
    constant = torch.ones(2, 1, 2, device=DEVICE), torch.ones(2, 1, 2, device=DEVICE)
    _, k, v = rope_keys(
        qkv,
        torch.arange(3, device=DEVICE),
        torch.ones(1, device=DEVICE),
        1,
        1,
        constant=constant,
        rows_M=rows_M.to(DEVICE),
        way_back=way_back.map(lambda x: x.to(DEVICE)),
        impl="triton",
    )
    assert torch.equal(k[1], constant[0][0]) and torch.equal(v[4], constant[1][1])
    (grad,) = torch.autograd.grad(v.sum(), qkv)
    assert grad[:, 4:].tolist() == [[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]


CHANGES = {
    "rows": lambda options: {"qkv": options["qkv"][:, 1:]},
    "positions": lambda options: {"positions": options["positions"][1:]},
    "way back": lambda options: {"way_back": WayBack.of(options["rows_M"], 3, 5)},
    "no way back": lambda options: {"way_back": None},
    "constant rows that are missing": lambda options: {"constant": None},
    "constant rows too many": lambda options: {"constant": tuple(torch.cat([x, x]) for x in options["constant"])},
    "constant heads": lambda options: {"constant": tuple(torch.cat([x, x], 1) for x in options["constant"])},
    "constant dtype": lambda options: {"constant": tuple(x.double() for x in options["constant"])},
    "constant rows of nobody": lambda options: {"rows_M": None, "way_back": None},
    "strides": lambda options: {"qkv": options["qkv"].detach().T.contiguous().T, "inplace": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_refused(change):
    qkv, (positions, frequencies, *heads), keys, constant, _ = inputs(
        (4, 2, 1, 4), "behind constant rows", torch.float32
    )
    options = {"qkv": qkv, "positions": positions, "constant": constant, **keys}
    options |= CHANGES[change](options)
    qkv, positions = options.pop("qkv"), options.pop("positions")
    with pytest.raises(ValueError, match="rope_keys"):
        rope_keys(qkv, positions, frequencies, *heads, **options)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("heads", [4, 0])
def test_rows_behind_others_have_the_bits_of_rows_alone(impl, inplace, heads):
    """In one pass over all of them. Keys of the first two rows are constant ones for the others."""
    (every, (positions, frequencies, *_), _, constant, _) = inputs(
        (7, heads, 2, 8), "behind constant rows", torch.bfloat16
    )
    every, rest = every.detach(), (frequencies, heads, 2)
    before, own = torch.tensor([0, 1, 3, 0, 2, 4]), torch.tensor([1, 2, 3, 5, 6, 7, 3, 4, 8, 9, 5, 1])
    way_back = WayBack.of(own, 5, 5).map(lambda x: x.to(DEVICE))
    before, own = before.to(DEVICE), own.to(DEVICE)
    options = {"scale": 1.2, "impl": impl}

    first = rope_keys(every[:2].clone(), positions[:2], *rest, **options)
    known = tuple(torch.cat(pair) for pair in zip(constant, first[1:]))
    live = every[2:].clone().requires_grad_()
    alone = rope_keys(
        live.clone(), positions[2:], *rest, rows_M=own, way_back=way_back, constant=known, inplace=inplace, **options
    )
    twin, all_rows = every[2:].clone().requires_grad_(), every.clone()
    found = rope_keys(
        twin,
        positions,
        *rest,
        rows_M=torch.cat([before, own]),
        way_back=way_back,
        constant=constant,
        every=(all_rows, len(own)),
        inplace=inplace,
        **options,
    )
    assert all(map(torch.equal, found[:3], alone))
    assert torch.equal(found[3][:2], first[0]) and not any(x.requires_grad for x in found[3:])
    assert all(torch.equal(x[: len(before)], y[before]) for x, y in zip(found[4:], known))
    grads = [torch.randn(x.shape).to(x) for x in alone]
    assert torch.equal(
        *(torch.autograd.grad(outs, x, grads, allow_unused=True)[0] for outs, x in ((found[:3], twin), (alone, live)))
    )
