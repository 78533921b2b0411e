"""Attention in two parts: values and gradients of every layout that `pack` makes, repeatable, no copies of keys."""

import dataclasses
import itertools

import pytest
import torch
from attention_cases import FLOORS
from attention_parts import CPU, PLAIN
from model_cases import (
    ADAPTER,
    END,
    FULL,
    PATCH,
    START,
    assert_same_gradients,
    loss_and_gradients,
    model_config,
    random_model,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fastvid.batch import AttentionLayout, VideoTokens
from fastvid.data.conversation import EncodedSample
from fastvid.data.packing import pack
from fastvid.model import attention, decoder
from fastvid.model.attention import SDPA

TOKENS = VideoTokens(patch=PATCH, start=START, end=END, vocab_size=100)
PROMPT = (5, 6, 7, 8)
# Each sample: (text between prompt and video, video or None, text behind it, spans of answers from the end).
QUESTIONS = [
    ((), "a", 6, [(3, 0)]),
    ((), "b", 9, [(8, 6), (4, 1)]),
    ((), "a", 4, [(2, 0)]),
    ((12, 13), "a", 5, [(3, 0)]),
    ((), None, 6, [(2, 0)]),
    ((), "b", 4, [(1, 0)]),
    ((), "c", 5, [(3, 0)]),
    ((), "a", 5, []),
]
SHARED = {  # name: (samples, arguments of `pack`, rows of the prompt that the model keeps)
    "shared": (QUESTIONS, {"prefix": PROMPT}),
    "shared, no prompt": (QUESTIONS, {}),
    "shared, prompt kept": (QUESTIONS, {"prefix": PROMPT, "frozen": True}),
    "shared, frozen text kept by none": (
        [((12, 13), video, text, spans) for _, video, text, spans in QUESTIONS if video],
        {"prefix": (9, 9), "frozen": True},
    ),
    "one video": (QUESTIONS[:1] + QUESTIONS[2:3], {"prefix": PROMPT, "frozen": True}),
    "nothing behind a video": ([((), "a", 1, [(1, 0)])] * 2 + QUESTIONS[:3], {"prefix": PROMPT}),
}


def samples_of(questions, rows=7, channels=12):
    generator = torch.Generator().manual_seed(0)
    videos = {name: torch.randn(rows, channels, generator=generator) for name in "abc"}
    samples = []
    for number, (before, video, text, spans) in enumerate(questions):
        words = torch.randint(10, PATCH, (text,), generator=generator).tolist()
        ids = [*PROMPT, *before, *([START, *[PATCH] * rows, END] if video else []), *words]
        spans = [(len(ids) - start, len(ids) - end) for start, end in spans]
        names = [video] if video else []
        samples.append((EncodedSample(str(number), ids, spans, names), [videos[name] for name in names]))
    return samples


def packed(name, **more):
    questions, options = SHARED[name]
    batch = pack(samples_of(questions), TOKENS, 12, share=True, **(options | more))
    assert (batch.parts or [batch])[-1].layout.branches is not None, "nothing would be in parts"
    return batch


def layouts_of(batch):
    """[(layout, constant rows, packed rows)] of what attention with gradients is called with."""
    live = (batch.parts or [batch])[-1]
    frozen = batch.frozen_rows if batch.parts else 0
    given = batch.prefix_rows + frozen, batch.num_rows - frozen
    return [(live.layout, *given), (live.loss_layout, *given)]


def results(function, layout, constant, rows, kv_heads, dtype, channels=8, **options):
    """Output and gradients of random queries, keys and values."""
    generator = torch.Generator().manual_seed(1)
    queries = sum(layout.lengths[0])
    shapes = [(queries, 4), *[(rows, kv_heads)] * 2, (queries, 4), *[(constant, kv_heads)] * 2]
    q, k, v, grad, *kept = (torch.randn(*shape, channels, generator=generator).bfloat16().to(dtype) for shape in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = function(*leaves, layout, constant=tuple(kept) if constant else None, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("regather", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("in_parts", [PLAIN, CPU], ids=str)
def test_equals_attention_to_gathered_keys(in_parts, name, kv_heads, regather):
    for given in layouts_of(packed(name)):
        expected = results(SDPA, *given, kv_heads, torch.float32)
        found = results(in_parts, *given, kv_heads, torch.float32, regather=regather)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        again = results(in_parts, *given, kv_heads, torch.float32, regather=regather)
        assert all(torch.equal(*pair) for pair in zip(found, again)), "it does not repeat"


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", SHARED)
def test_bf16_is_as_close_to_exact_as_gathering_is(name, kv_heads):
    for given in layouts_of(packed(name)):
        exact = results(SDPA, *given, kv_heads, torch.float64)
        usual = results(SDPA, *given, kv_heads, torch.bfloat16)
        for ours, theirs, true in zip(results(CPU, *given, kv_heads, torch.bfloat16), usual, exact, strict=True):
            assert ours.dtype == torch.bfloat16
            allowed = 2 * (theirs.double() - true).abs().max() + FLOORS[ours.dtype] * true.abs().max()
            assert (ours.double() - true).abs().max() <= allowed


@pytest.mark.parametrize("frozen", [False, True])
def test_samples_apart_have_no_parts(frozen):
    batch = pack(samples_of(QUESTIONS), TOKENS, 12, prefix=PROMPT, frozen=frozen)
    for layout, *_ in layouts_of(batch):
        assert layout.branches is None
        assert PLAIN.placed(layout)[0] is layout


class Sizes(TorchDispatchMode):
    """The most elements of a tensor that any operation makes."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        outs = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
        self.most = max([self.most, *(x.untyped_storage().nbytes() // x.itemsize for x in outs)])
        return out


@pytest.mark.parametrize("regather", [True, False])
@pytest.mark.parametrize("name", ["shared", "shared, prompt kept"])
def test_no_tensor_holds_the_keys_of_every_branch(name, regather):
    questions = [((), video, 6, [(3, 0)]) for video in "aaaaaabbbbbb"]
    batch = pack(samples_of(questions, rows=60), TOKENS, 12, share=True, **SHARED[name][1])
    for layout, constant, rows in layouts_of(batch):
        gathered = len(layout.kv_rows) * 4 * 64  # of 64 channels, more than a segment has keys
        most = {}
        for each in (SDPA, CPU):
            with Sizes() as sizes:
                results(each, layout, constant, rows, 4, torch.float32, channels=64, regather=regather)
            most[each] = sizes.most
        assert most[SDPA] >= gathered
        # Each of the two videos may have its copy of the prompt.
        assert most[CPU] <= (constant + rows + 2 * len(PROMPT)) * 4 * 64 < gathered / 2


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", 1, "selective", "full"])
@pytest.mark.parametrize("trainable", [ADAPTER, FULL], ids=["adapter", "full"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_model_learns_the_same(trainable, kv_heads, recompute):
    """Of a batch in parts, of the same with gathered keys, and of its samples apart."""
    frozen = trainable is ADAPTER
    settings = {"config": model_config(num_kv_heads=kv_heads), "trainable": trainable, "recompute": recompute}

    def outcome(batch, attention):
        model = random_model(**settings, attention=attention)
        if frozen:
            model.keep_prefix(PROMPT)
        return loss_and_gradients(model, batch)

    batch = packed("shared", frozen=frozen)
    loss, found = outcome(batch, CPU)
    again_loss, again = outcome(batch, CPU)
    assert loss == again_loss and all(torch.equal(again[name], gradient) for name, gradient in found.items())
    apart = pack(samples_of(QUESTIONS), TOKENS, 12, prefix=PROMPT, frozen=frozen)
    for other, way in ((batch, SDPA), (batch, PLAIN), (apart, SDPA)):
        expected_loss, expected = outcome(other, way)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert_same_gradients(found, expected)


def with_forward(forward):
    return dataclasses.replace(CPU, parts=dataclasses.replace(CPU.parts, forward=forward))


@torch.library.custom_op("fastvid_stand_in::attention_in_parts", mutates_args=())
def operation(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return CPU.parts.forward(q, k, v, AttentionLayout(cu_q, 0, cu_k, 0), causal)


@pytest.mark.slow
def test_what_recomputation_keeps_is_not_overwritten():
    """Libraries' kernels are operations, whose outputs selective recomputation keeps."""

    def forward(q, k, v, layout, causal):
        return operation(q, k, v, layout.cu_seqlens_q, layout.cu_seqlens_k, causal)

    as_library = with_forward(forward)
    batch, found = packed("shared"), []
    for recompute in ("none", "selective", "full"):
        found.append(loss_and_gradients(random_model(recompute=recompute, attention=as_library), batch))
    for loss, gradients in found[1:]:
        assert loss == found[0][0]
        assert_same_gradients(gradients, found[0][1])


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("recompute", ["none", 1, "full", "selective"])
def test_the_librarys_output_is_copied_only_where_recomputation_keeps_it(recompute, by_kernel, monkeypatch):
    given = []

    def forward(*inputs):
        out, lse = CPU.parts.forward(*inputs)
        if inputs[-1]:  # the causal part, into which the other one is merged
            given.append((out, out.clone()))
        return out, lse

    monkeypatch.setattr(decoder, "rotates_to_keys", lambda *_: by_kernel)
    loss_and_gradients(random_model(recompute=recompute, attention=with_forward(forward)), packed("shared"))
    assert {torch.equal(out, before) for out, before in given} == {recompute == "selective"}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_kernel_places_keys_of_beginnings_once(frozen, recompute, monkeypatch):
    """Interpreted: as on a GPU."""
    batch, placed = packed("one video", frozen=frozen), []
    model = random_model(attention=CPU, recompute=recompute)
    model.keep_prefix(PROMPT)
    expected_loss, expected = loss_and_gradients(model, batch)
    kernel = attention.rope_keys

    def counted(*args, rows_M, **options):
        placed.append(rows_M)
        return kernel(*args, rows_M=rows_M, impl="triton", **options)

    monkeypatch.setattr(attention, "use_triton", lambda *_, **__: True)
    monkeypatch.setattr(attention, "rope_keys", counted)
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(found, expected)
    every = (batch.parts or [batch])[-1]
    rows = [layout.branches.causal.kv_rows for layout in (every.layout, every.loss_layout)]
    layers = len(model.decoder.layers)
    assert [id(each) for each in placed[:layers]] == [*[id(rows[0])] * (layers - 1), id(rows[1])]
    for layout, few in zip((every.layout, every.loss_layout), rows):
        assert few is None or len(few) < len(layout.kv_rows)


def test_parts_of_a_wrong_sum_show():
    """The merged output alone, or each part's own log-sum-exp, gives other gradients: tests above would fail."""
    layout, constant, rows = layouts_of(packed("shared"))[0]

    def backward(grad, q, k, v, out, lse, *others):
        return CPU.parts.backward(grad, q, k, v, out, lse + 0.1, *others)

    own = dataclasses.replace(CPU.parts, backward=backward)
    broken = dataclasses.replace(CPU, parts=own)
    expected, found = (results(each, layout, constant, rows, 4, torch.float32) for each in (SDPA, broken))
    assert torch.allclose(found[0], expected[0], atol=1e-5)
    assert not any(torch.allclose(*pair, atol=1e-3) for pair in itertools.islice(zip(found, expected), 1, None))
