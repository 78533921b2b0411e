"""adamw8bit_step: against its reference, bitsandbytes' optimizer, the mean of random rounding, and sharding."""

import importlib

import pytest
import torch
import triton.language as tl
from fastvid_kernels.adamw8bit_step import adamw8bit_step, adamw8bit_step_reference, dynamic_map
from harness import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 3, "seed": 2**40 + 7}
IMPLEMENTATIONS = ("triton", "reference")
LACKING = "bitsandbytes is not installed: pip install -e '.[gpu]'"


def inputs(count=1000, dtype=torch.bfloat16, grad_dtype=None, seed=0):
    """[param, grad, state1, state2, absmax1, absmax2] with blocks of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-count // 256)
    grad = torch.randn(count, generator=generator) * 10 ** (torch.arange(count) // 256 % 4 - 2.0)
    states = [torch.randint(0, 256, (count,), generator=generator).to(torch.uint8) for _ in range(2)]
    scales = [torch.rand(blocks, generator=generator) * size for size in (1e-2, 1e-4)]
    tensors = [torch.randn(count, generator=generator).to(dtype), grad.to(grad_dtype or dtype), *states, *scales]
    return [x.to(DEVICE) for x in tensors]


def run(function, tensors, **options):
    """Copies of param, codes and scales after a step."""
    param, grad, *states = [x.clone() for x in tensors]
    function(param, grad, *states, **OPTIONS | options)
    assert torch.equal(grad.view(torch.uint8), tensors[1].view(torch.uint8))
    return param, *states


def assert_same(found, expected):
    """The same bits interpreted, but for the root in the weights' update; on a GPU up to roundings of any product."""
    exact = DEVICE == "cpu"
    for name, ours, theirs in zip(("param", "state1", "state2", "absmax1", "absmax2"), found, expected):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if name == "param" and ours.dtype == torch.bfloat16:  # neighbours, where the random bits lie at the edge
            near = torch.isclose(ours.float(), theirs.float(), rtol=2**-7, atol=1e-6)
            assert near.all() and (ours != theirs).sum() <= 2 + 1e-3 * ours.numel()
        elif name == "param":
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
        elif exact:
            assert torch.equal(ours, theirs), name
        elif name.startswith("state"):
            difference = (ours.int() - theirs.int()).abs()
            assert (difference <= 1).all() and (difference > 0).sum() <= 2 + 1e-3 * ours.numel(), name
        else:
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 2048, 5000])
def test_equals_reference(count, dtype):
    tensors = inputs(count, dtype)
    assert_same(run(adamw8bit_step, tensors, impl="triton"), run(adamw8bit_step_reference, tensors))


@pytest.mark.slow
@given(
    st.integers(1, 3000),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(1, 10**6),
    st.integers(0, 99),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_shape_and_step(count, dtype, grad_dtype, step, seed):
    tensors = inputs(count, dtype, grad_dtype, seed)
    options = {"step": step, "seed": seed, "clip": torch.tensor(0.3, device=DEVICE), "first": 8 * seed}
    assert_same(
        run(adamw8bit_step, tensors, impl="triton", **options), run(adamw8bit_step_reference, tensors, **options)
    )


@pytest.mark.slow
def test_maps_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason=LACKING)
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed))


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed, impl):
    """At every value of the map, two thousandths of a bin beside each middle between values, and at random.

    Without momentum the moments are the gradient and its square; a 1 in each block makes them its fractions.
    """
    table = dynamic_map(signed)
    middle, width = (table[1:] + table[:-1]) / 2, table[1:] - table[:-1]
    random = 10 ** (-8 * torch.rand(2**12, generator=torch.Generator().manual_seed(0)))
    x = torch.cat([table, middle - width * 2e-3, middle + width * 2e-3, random, torch.zeros(9)])
    x = torch.cat([x, -x]) if signed else x
    x = torch.nn.functional.pad(x, (0, -len(x) % 255)).view(-1, 255)
    x = torch.nn.functional.pad(x, (1, 0), value=1.0).flatten()
    tensors = [torch.zeros_like(x), x if signed else x.sqrt()] + [torch.zeros(len(x), dtype=torch.uint8)] * 2
    tensors = [t.to(DEVICE) for t in tensors + [torch.zeros(len(x) // 256)] * 2]
    found = run(adamw8bit_step, tensors, impl=impl, beta1=0.0, beta2=0.0)
    assert (found[3 if signed else 4] == 1).all()
    wrong = found[1 if signed else 2].cpu() != torch.bucketize(x, middle)
    assert wrong.sum() <= 2, x[wrong]  # a random number may lie in the middle, up to rounding


module = importlib.import_module("fastvid_kernels.adamw8bit_step")
_code, _highest_byte = module._code, module._highest_byte


def _codes_kernel(x_ptr, book_ptr, out_ptr, SIGNED: tl.constexpr):
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(out_ptr + i, _highest_byte(_code(tl.load(x_ptr + i), book_ptr, SIGNED)))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_beside_every_threshold_and_at_the_ends_of_bins(signed):
    """In a bin sums rise with the numbers. So what is right at its ends and beside its threshold is right between."""
    table = dynamic_map(signed)
    thresholds = (table[1:] + table[:-1]) / 2

    def bins(bits):
        return module._bins(bits.view(torch.float32), signed)

    members = torch.arange(0x34000000, 0x3F800002, 2**13, dtype=torch.int32)  # from 2^-23 to 1, of every bin some
    assert bins(members).diff().max() == 1 and bins(members).max() < (256 if signed else 512)
    changes = bins(members).diff() != 0
    low, high = members[:-1][changes], members[1:][changes]
    while (low + 1 < high).any():
        middle = (low + high) // 2
        below = bins(middle) == bins(low)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    ends = torch.cat([low, thresholds[thresholds > 0].view(torch.int32)])
    ends = (ends[:, None] + torch.arange(-3, 4)).flatten().int().view(torch.float32)
    random = 10 ** (-8 * torch.rand(2**13, generator=torch.Generator().manual_seed(0)))
    x = torch.cat([ends, random, table.abs(), torch.tensor([0.0, 1e-40, 1e-20, 1e-8, 2**-23, 1.0, 1 + 2**-23])])
    x = torch.cat([x, -x]) if signed else x
    x = torch.nn.functional.pad(x, (0, -len(x) % 1024)).to(DEVICE)
    found = torch.empty(len(x), dtype=torch.uint8, device=DEVICE)
    kernel = type(_code)(_codes_kernel)  # interpreted as the kernels are, or compiled
    module.launch(kernel, (len(x) // 1024,), x, module._codebook(x.device), found, SIGNED=signed)
    assert torch.equal(found.int().cpu(), torch.bucketize(x.cpu(), thresholds).int())


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_on_the_state_of_bitsandbytes(impl, dtype):
    """Six steps, each from the state that the other left: the same parameters and scales, codes at least as near.

    bitsandbytes on the CPU does not always find the nearest code.
    """
    AdamW8bit = pytest.importorskip("bitsandbytes.optim", reason=LACKING).AdamW8bit
    param, grad = (x.cpu() for x in inputs(4096 + 100, torch.float32)[:2])
    theirs = torch.nn.Parameter(param.clone())
    keys = ("lr", "eps", "weight_decay")
    optimizer = AdamW8bit([theirs], betas=(0.9, 0.999), **{key: OPTIONS[key] for key in keys})
    names = ("state1", "state2", "absmax1", "absmax2")
    theirs.grad = grad
    optimizer.step()
    state = optimizer.state[theirs]
    for step in range(2, 8):
        theirs.grad = grad.roll(step) / step
        before = [x.detach().clone().to(DEVICE) for x in (theirs, theirs.grad, *(state[name] for name in names))]
        found = run(adamw8bit_step, [before[0].to(dtype), *before[1:]], impl=impl, step=step)
        optimizer.step()
        unit = 2**-7 if dtype == torch.bfloat16 else 2e-6  # of the weights, rounded before the step and after it
        allowed = unit * (before[0].cpu().abs() + theirs.detach().abs()) + 1e-6
        assert ((found[0].cpu().float() - theirs.detach()).abs() <= allowed).all()
        ours = dict(zip(names, (x.cpu() for x in found[1:])))
        old = dict(zip(names, (x.cpu() for x in before[2:])))
        for kind, beta, power in (("1", 0.9, 1), ("2", 0.999, 2)):
            table = dynamic_map(kind == "1")

            def moment(state):
                scales = state["absmax" + kind].repeat_interleave(256)[: grad.numel()]
                return table[state["state" + kind].long()] * scales

            exact = moment(old) * beta + theirs.grad**power * (1 - beta)
            errors = [(moment(x) - exact).abs() for x in (ours, state)]
            assert (errors[0] <= errors[1] + 1e-5 * exact.abs() + 1e-12).all()
            torch.testing.assert_close(ours["absmax" + kind], state["absmax" + kind], rtol=2e-6, atol=0)
        for name in names:
            state[name].copy_(ours[name])
    assert state["step"] == 7


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_first_step_from_zeros(impl):
    """State of zeros is no momentum, and blocks without gradient stay at zero and finite."""
    param, grad, *states = inputs(700, torch.float32)
    grad[256:512] = 0
    found = run(adamw8bit_step, [param, grad, *map(torch.zeros_like, states)], impl=impl, step=1, weight_decay=0.0)
    moved = param - OPTIONS["lr"] * grad.sign()
    torch.testing.assert_close(found[0], moved, rtol=1e-5, atol=2e-4)
    assert torch.equal(found[0][256:512], param[256:512])
    assert found[3][1] == found[4][1] == 0 and (found[1][256:512] == 127).all() and not found[2][256:512].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_skip_leaves_everything(impl):
    tensors = inputs()
    tensors[1][3] = torch.nan
    kept = run(adamw8bit_step, tensors, impl=impl, skip=torch.ones((), device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(kept, (tensors[0], *tensors[2:])))
    tensors[1][3] = 0
    off = run(adamw8bit_step, tensors, impl=impl, skip=torch.zeros((), device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(off, run(adamw8bit_step, tensors, impl=impl)))
    assert not torch.equal(off[0], tensors[0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nan_stays_in_its_block(impl):
    """Where no flag masks the update: the weights show it, and nothing outside the code book is read."""
    tensors = inputs(768, torch.float32)
    usual = run(adamw8bit_step, tensors, impl=impl)
    for bad in (slice(256, 264), slice(300, 301), slice(256, 512)):  # one thread's elements, one element, a block
        tensors[1][:] = inputs(768, torch.float32)[1]
        tensors[1][bad] = torch.nan
        found = run(adamw8bit_step, tensors, impl=impl)
        assert found[0].isnan().nonzero().flatten().tolist() == list(range(768))[bad]
        for other in (slice(0, 256), slice(512, 768)):
            assert all(torch.equal(a[other], b[other]) for a, b in zip(found[:3], usual[:3]))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_bits_again_and_nothing_behind_the_end(impl, dtype):
    """What lies behind the tensors, NaN and the largest code, is neither read nor written."""
    tensors = inputs(1000, dtype)
    first, second = (run(adamw8bit_step, tensors, impl=impl) for _ in range(2))
    assert all(map(torch.equal, first, second))
    longer = [
        torch.nn.functional.pad(x, (0, 1000), value=255 if x.dtype == torch.uint8 else torch.nan) for x in tensors
    ]
    found = [x[: len(old)] for x, old in zip(longer, tensors)]
    adamw8bit_step(*found, **OPTIONS, impl=impl)
    assert all(map(torch.equal, (found[0], *found[2:]), first)) and torch.equal(found[1], tensors[1])
    assert all(((x[-1000:] == 255) if x.dtype == torch.uint8 else x[-1000:].isnan()).all() for x in longer)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sharding_changes_nothing(impl):
    tensors, start = inputs(6000), 2**33  # beyond 32 bits
    whole = run(adamw8bit_step, tensors, impl=impl, first=start)
    parts = []
    for begin, end in ((0, 2560), (2560, 6000)):
        blocks = slice(begin // 256, -(-end // 256))
        shard = [x[begin:end] for x in tensors[:4]] + [x[blocks] for x in tensors[4:]]
        parts.append(run(adamw8bit_step, shard, impl=impl, first=start + begin))
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts)))


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_random_bits_depend_on_seed_step_and_index(impl):
    tensors = inputs(4096)

    def rounded(**options):
        return run(adamw8bit_step, tensors, impl=impl, weight_decay=0.0, **options)[0]

    usual = rounded()
    assert torch.equal(usual, rounded())
    for options in ({"seed": 1}, {"seed": OPTIONS["seed"] + 2**32}, {"first": 8}, {"first": 2**35}):
        assert 0.1 < (usual != rounded(**options)).float().mean()


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rounding_is_right_in_the_mean(impl):
    """Three tenths of a bf16 unit are added to each of many equal weights: that is their mean rise."""
    count = 2**16
    param = torch.ones(count, dtype=torch.bfloat16, device=DEVICE)
    grad = torch.full((count,), -1.0, device=DEVICE)
    states = [torch.zeros(count, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    scales = [torch.zeros(count // 256, device=DEVICE) for _ in range(2)]
    lr = 0.3 * 2**-7
    adamw8bit_step(param, grad, *states, *scales, **OPTIONS | {"lr": lr, "step": 1, "weight_decay": 0.0}, impl=impl)
    assert set(param.unique().tolist()) == {1.0, 1 + 2**-7}
    deviation = (0.3 * 0.7 / count) ** 0.5 * 2**-7
    assert abs(param.double().mean().item() - 1 - lr) < 4 * deviation
    pairs = (param > 1).double().view(-1, 8)
    assert (torch.corrcoef(pairs.T) - torch.eye(8, device=DEVICE)).abs().max() < 0.06


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_clip_scales_the_gradient(impl):
    tensors = inputs(600, torch.float32)
    scaled = [tensors[0], tensors[1] * 0.25, *tensors[2:]]
    found = run(adamw8bit_step, tensors, impl=impl, clip=torch.tensor(0.25, device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(found, run(adamw8bit_step, scaled, impl=impl)))


def test_any_shape_of_parameter():
    tensors = inputs(768)
    shaped = [x.view(3, 256) for x in tensors[:4]] + tensors[4:]
    found, expected = run(adamw8bit_step, shaped, impl="triton"), run(adamw8bit_step, tensors, impl="triton")
    assert found[0].shape == (3, 256) and all(torch.equal(a.flatten(), b) for a, b in zip(found, expected))


def narrower(x):
    return x.to(torch.float16)


@pytest.mark.parametrize(
    "index, change, message",
    [
        (0, narrower, "param must be torch.float32 or torch.bfloat16, found torch.float16"),
        (1, lambda x: x.double(), "grad must be .* found torch.float64"),
        (2, lambda x: x[:-1], "state1 must have 600 elements for a param of 600, found 599"),
        (3, lambda x: x.int(), "state2 must be torch.uint8, found torch.int32"),
        (4, lambda x: x[:2], "absmax1 must have 3 elements for a param of 600, found 2"),
        (5, narrower, "absmax2 must be torch.float32, found torch.float16"),
        (1, lambda x: x.repeat(2)[::2], r"grad must be contiguous, found strides \(2,\)"),
    ],
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_unfit_tensors_are_refused(index, change, message, impl):
    tensors = inputs(600)
    tensors[index] = change(tensors[index])
    before = [x.clone() for x in tensors]
    with pytest.raises(ValueError, match=f"^adamw8bit_step: {message}"):
        adamw8bit_step(*tensors, **OPTIONS, impl=impl)
    assert all(torch.equal(*pair) for pair in zip(tensors, before))


def test_a_shard_begins_on_a_group_of_random_bits():
    with pytest.raises(ValueError, match="first must be a multiple of 8, found 12"):
        adamw8bit_step(*inputs(), **OPTIONS, first=12)
