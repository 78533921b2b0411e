"""Attention for AVX512-BF16: values and gradients against plain attention, how it is compiled and refused."""

from itertools import chain

import pytest
import torch
from attention_cases import GATHERED, SEGMENTS, assert_close_to_exact, bounds, inputs, plain, results
from fastvid_kernels.cpu import attention_obstacle, avx512_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastvid.batch import AttentionLayout
from fastvid.model.attention import choose_attention
from fastvid.model.recompute import keep_products

# Where it ought to compile and does not, the tests fail.
if (lacking := attention_obstacle()) and any(x in lacking for x in ("it is for", "no AVX512", "no C++ compiler")):
    pytest.skip(f"attention for AVX512-BF16: {lacking}", allow_module_level=True)

BF16 = torch.bfloat16
# One below, at, and one above: rows of a tile, a vector, a block of queries, a panel of keys, keys of which backward
# makes room.
EDGES = [edge + step for edge in (6, 16, 48, 64, 192) for step in (-1, 0, 1)]
SHAPES = {
    **SEGMENTS,
    "growing": (EDGES, EDGES),
    "shrinking": (EDGES[::-1], EDGES[::-1]),
    "wide": (EDGES, [2 * 193 - keys for keys in EDGES]),
    "queries on each edge, keys on the next": ([1, *EDGES], [*EDGES, 194]),
    "last query": ([1] * len(EDGES), EDGES),
}
SHARED = {  # constant rows, rows, and who attends to which of them
    **GATHERED,
    "leading rows, fewer and more": (
        7,
        90,
        [
            [*range(70)],
            [*range(33)],
            [*range(33), *range(70, 97)],
            [*range(12)],
            [*range(12), *range(60, 81)],
            [*range(40, 61)],
            [*range(40, 61)],
            [*range(40, 49)],
            [*range(40, 50), 9, 8],
        ],
        [50, 33, 27, 1, 21, 6, 5, 9, 2],
    ),
    "a row twice": (2, 9, [[3, 4, 3, 5], [3, 4, 3, 6, 6]], [2, 5]),
    "a segment without queries between": (0, 30, [[*range(20)], [*range(5, 25)], [*range(20), 28]], [7, 0, 1]),
}


HEADS = [(4, 4), (6, 2), (3, 1)]
CHANNELS = [16, 48, 64, 80, 128]
# Every two of them together: a third of all.
PAIRS = [(shape, *HEADS[(i + j) % 3], c) for i, shape in enumerate(SHAPES) for j, c in enumerate(CHANNELS)]


def own(q, k, v, q_bounds, k_bounds, kv_rows=None, constant=None):
    return avx512_attention(q, k, v, q_bounds, k_bounds, kv_rows, constant)


def gathered(kv_rows, constant):
    """Plain attention to the rows that are chosen."""

    def function(q, k, v, q_bounds, k_bounds):
        return plain(q, *(torch.cat([c.to(x.dtype), x])[kv_rows] for c, x in zip(constant, (k, v))), q_bounds, k_bounds)

    return function


@pytest.mark.slow
@pytest.mark.parametrize("shape, heads, kv_heads, channels", PAIRS)
def test_equals_plain_attention(shape, heads, kv_heads, channels):
    segments = SHAPES[shape]
    given = inputs(segments, heads, kv_heads, channels, BF16)
    assert_close_to_exact(
        results(own, *given, segments),
        results(plain, *given, segments),
        results(plain, *(x.double() for x in given), segments),
    )


@pytest.mark.parametrize("heads, kv_heads, channels", [(2, 2, 16), (4, 2, 48), (3, 1, 64)])
@pytest.mark.parametrize("constant_rows, rows, keys, queries", SHARED.values(), ids=SHARED)
def test_gathers_keys_and_adds_up_their_gradients(constant_rows, rows, keys, queries, heads, kv_heads, channels):
    segments = queries, list(map(len, keys))
    q, _, _, grad = inputs(segments, heads, kv_heads, channels, BF16)
    _, k, v, _ = inputs(([0], [rows]), heads, kv_heads, channels, BF16, seed=1)
    _, *constant, _ = inputs(([0], [constant_rows]), heads, kv_heads, channels, BF16, seed=2)
    kv_rows = torch.tensor(list(chain.from_iterable(keys)))

    def ours(*x):
        return own(*x, kv_rows, tuple(constant) if constant_rows else None)

    reference, given = gathered(kv_rows, constant), (q, k, v, grad)
    found = results(ours, *given, segments)
    assert_close_to_exact(
        found, results(reference, *given, segments), results(reference, *(x.double() for x in given), segments)
    )
    never = [row for row in range(rows) if row + constant_rows not in kv_rows]
    assert not found[2][never].any() and not found[3][never].any()


@pytest.mark.parametrize(
    "keys", [[[0]] * 1000, [[0], [1, 0]] * 500, [[0], [1]] * 1000], ids=["kept", "moved", "in turn"]
)
def test_gradients_of_shared_keys_are_summed_in_fp32(keys):
    """Of a thousand queries that each add 1 to a key's value: bf16 alone would stop counting at 256."""
    q, grad = torch.zeros(len(keys), 1, 16, dtype=BF16), torch.ones(len(keys), 1, 16, dtype=BF16)
    k, v = (torch.zeros(2, 1, 16, dtype=BF16) for _ in range(2))
    q[:] = k[0] = 40  # the first key takes all where there is a choice
    kv_rows = torch.tensor(list(chain.from_iterable(keys)))
    found = results(lambda *x: own(*x, kv_rows), q, k, v, grad, ([1] * len(keys), list(map(len, keys))))[3]
    assert found[0].unique().tolist() == [1000]


def test_gradients_of_one_segments_keys_are_summed_in_fp32():
    q, k, v, grad = (torch.zeros(1000, 1, 16, dtype=BF16) for _ in range(4))
    k[0] = q[:] = 40
    grad += 1
    assert results(own, q, k, v, grad, ([1000], [1000]))[3][0].unique().tolist() == [1000]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("gather", [False, True])
def test_same_bits_again_and_on_any_number_of_threads(threads, gather):
    segments = SHAPES["shrinking"]
    given = inputs(segments, 8, 4, 32, BF16)
    before = [x.clone() for x in given]
    kv_rows = torch.cat([torch.arange(keys) for keys in segments[1]]) if gather else None
    found = []
    for number in (1, 2, 2):
        threads(number)
        found.append(results(lambda *x: own(*x, kv_rows), *given, segments))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
    assert all(map(torch.equal, given, before))


def test_rows_may_lie_apart_and_the_outputs_gradient_be_one_number():
    segments = SEGMENTS["rectangles"]
    *given, grad = inputs(segments, 4, 2, 32, BF16)
    grad = torch.ones((), dtype=BF16).expand(grad.shape)
    dense = [x.contiguous() for x in given]
    assert not any(x.is_contiguous() for x in given) and grad.stride() == (0, 0, 0)
    found, expected = results(own, *given, grad, segments), results(own, *dense, grad.contiguous(), segments)
    assert all(map(torch.equal, found, expected))


def test_saves_its_inputs_only():
    q, k, v, _ = inputs(([9], [20]), 2, 2, 16, BF16)
    given = q.requires_grad_(), k, v, bounds([9]), bounds([20])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        own(*given)
    assert saved == [x.data_ptr() for x in given]


def test_selective_recomputation_keeps_the_result():
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.extend([function.name()] if function.namespace == "fastvid_avx512" else [])
            return function(*args, **(kwargs or {}))

    q, k, v, _ = inputs(([9], [20]), 2, 2, 16, BF16)
    with Calls():
        checkpoint(
            lambda x: own(x * 2, k, v, bounds([9]), bounds([20])),
            q.requires_grad_(),
            use_reentrant=False,
            context_fn=keep_products,
        ).sum().backward()
    assert calls == ["fastvid_avx512::attention", "fastvid_avx512::attention_backward"]


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_a_number_shows_in_its_own_sample_alone(name, value):
    segments = [60, 29, 70], [60, 29, 70]  # the second ends within the same vector as the first one's row 30
    given = dict(zip("qkvg", inputs(segments, 4, 2, 16, BF16)))
    given[name] = given[name].clone()
    given[name][30] = value
    out, *grads = results(own, *given.values(), segments)
    assert not out[30 : 31 if name == "q" else 60].isfinite().any() and not grads[0][30].isfinite().any()
    assert out[60:].isfinite().all()
    assert all(x[60:].isfinite().all() for x in grads)


@pytest.mark.parametrize("channels", [16, 48])
@pytest.mark.parametrize("size", [1.0, 3 * 2.0**40, 5 * 2.0**39])
def test_scores_far_apart_leave_all_to_the_greatest(size, channels):
    q, k, v, _ = inputs(([2], [20]), 1, 1, channels, BF16)
    k = k.clone()
    k[:] = -size * 2**6
    k[7] = q[:] = size * 2**6
    assert torch.equal(own(q, k, v, bounds([2]), bounds([20])), v[7].expand(2, 1, channels))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": (slice(19),)}, "do not fit each other"),
        ({"v": (slice(None), slice(1))}, "do not fit each other"),
        ({"q": (slice(None), slice(None), slice(8))}, "do not fit each other"),
        ({"q_bounds": [0, 3]}, "segments of"),
        ({"q_bounds": [0, 9, 4, 9]}, "segments of"),
        ({"k_bounds": [0, 5]}, "segments of"),
        ({"kv_rows": [*range(24), 25]}, "within the 25 rows"),
        ({"kv_rows": [-1, *range(24)]}, "within the 25 rows"),
        ({"kv_rows": None}, "need kv_rows"),
    ],
)
def test_what_would_be_read_out_of_bounds_is_refused(change, message):
    q, k, v, _ = inputs(([9], [20]), 2, 2, 16, BF16)
    given = {
        "q": q,
        "k": k,
        "v": v,
        "q_bounds": [0, 9],
        "k_bounds": [0, 25],
        "kv_rows": list(range(25)),
        "constant": (k[:5], v[:5]),
    }
    for name, part in change.items():
        given[name] = given[name][part] if isinstance(part, tuple) else part
    if given["kv_rows"] is None:
        given["k_bounds"] = [0, 20]
    given |= {name: torch.tensor(given[name], dtype=torch.int32) for name in ("q_bounds", "k_bounds")}
    given["kv_rows"] = None if given["kv_rows"] is None else torch.tensor(given["kv_rows"])
    with pytest.raises(ValueError, match=message):
        own(*given.values())


def test_choice():
    cpu = torch.device("cpu")
    assert [
        choose_attention("auto", cpu, *given).name
        for given in ((BF16, 16), (BF16, 128), (BF16, 8), (BF16, 24), (torch.float32, 16))
    ] == ["avx512", "avx512", "sdpa", "sdpa", "sdpa"]
    for device, dtype, channels, reason in (
        (cpu, BF16, 8, "heads of 8 channels are no multiple of 16"),
        (cpu, torch.float32, 16, "it is for bfloat16, not torch.float32"),
        (torch.device("cuda"), BF16, 16, "it is for the CPU, not cuda"),
    ):
        with pytest.raises(ValueError, match=f"'avx512' is impossible: {reason}; choose"):
            choose_attention("avx512", device, dtype, channels)


def test_models_take_it_with_constant_rows():
    constant_rows, rows, keys, queries = GATHERED["across the border"]
    q, k, v = (torch.randn(n, 2, 16).to(BF16) for n in (sum(queries), rows, rows))
    constant = tuple(torch.randn(constant_rows, 2, 16).to(BF16) for _ in range(2))
    given = bounds(queries), bounds(map(len, keys)), torch.tensor(list(chain.from_iterable(keys)))
    layout = AttentionLayout(given[0], max(queries), given[1], max(map(len, keys)), given[2])
    chosen = choose_attention("auto", q.device, BF16, 16)
    assert torch.equal(chosen(q, k, v, layout, constant=constant), own(q, k, v, *given, constant))


def test_rows_whose_heads_lie_apart_are_copied():
    rows = [torch.randn(2, 9, 16).bfloat16().transpose(0, 1), *(torch.randn(9, 1, 16).bfloat16().expand(9, 2, 16),) * 2]
    lengths = bounds([9])
    expected = avx512_attention(*(x.contiguous() for x in rows), lengths, lengths)
    assert torch.equal(avx512_attention(*rows, lengths, lengths), expected)
