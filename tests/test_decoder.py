"""The decoder against transformers' LlamaForCausalLM, packing, shared prefixes, attention libraries, what is saved."""

import dataclasses
import itertools

import pytest
import torch
from model_cases import (
    FULL,
    LiveBytes,
    assert_close,
    assert_same_gradients,
    decoder_config,
    fill,
    loss_and_gradients,
    model_config,
    pack,
    random_batch,
    random_model,
    random_sample,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from fastvid.batch import AttentionLayout
from fastvid.model import attention
from fastvid.model.decoder import Decoder, attend, rotary_frequencies

ROPE = {
    "default": {},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                 "original_max_position_embeddings": 64}},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}
SHAPES = {"mha": {}, "gqa": {"num_kv_heads": 2}, "mqa": {"num_kv_heads": 1}, "tied": {"tie_word_embeddings": True},
          "wide heads": {"head_dim": 24, "num_heads": 2, "num_kv_heads": 2}}
CASES = {**SHAPES, **{f"rope {name}": changes for name, changes in ROPE.items()}}


def llama_of(model):
    """transformers' model with the same weights, in fp32."""
    c = model.config.decoder
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps, max_position_embeddings=c.max_position_embeddings,
        rope_parameters=dict(c.rope_parameters), tie_word_embeddings=c.tie_word_embeddings,
        attn_implementation="eager"))
    llama.load_state_dict(to_llama(model, dict(model.named_parameters())), strict=True)
    return llama


def to_llama(model, tensors):
    """Tensors by our names (weights or gradients) → by transformers' names."""
    c = model.config.decoder
    heads = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
    renamed = {"model.embed_tokens.weight": tensors["embed.weight"],
               "model.norm.weight": tensors["decoder.norm.weight"],
               "lm_head.weight": tensors["embed.weight" if c.tie_word_embeddings else "head.weight"]}
    for i in range(c.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        for name, part in zip("qkv", tensors[ours + "qkv.weight"].split(heads)):
            renamed[f"{theirs}self_attn.{name}_proj.weight"] = part
        for name, part in zip(("gate", "up"), tensors[ours + "gate_up.weight"].chunk(2)):
            renamed[f"{theirs}mlp.{name}_proj.weight"] = part
        renamed[theirs + "self_attn.o_proj.weight"] = tensors[ours + "o.weight"]
        renamed[theirs + "mlp.down_proj.weight"] = tensors[ours + "down.weight"]
        renamed[theirs + "input_layernorm.weight"] = tensors[ours + "input_norm.weight"]
        renamed[theirs + "post_attention_layernorm.weight"] = tensors[ours + "post_norm.weight"]
    return {name: tensor.detach() for name, tensor in renamed.items()}


def text_batch(seed=0):
    return random_batch(seed, [{"text": (50, 4), "video": 0, "answer": 9}, {"text": (5, 6), "video": 0, "answer": 4},
                               {"text": (1, 1), "video": 0, "answer": 1}])


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
    assert_same_gradients({name: found[name] for name, p in llama.named_parameters()},
                          {name: p.grad for name, p in llama.named_parameters()})


def test_packed_equals_one_by_one():
    model = random_model(model_config(num_kv_heads=2), FULL)
    generator = torch.Generator().manual_seed(1)
    samples = [random_sample(generator, text=(n, n + 1), video=0) for n in (3, 11, 6)]
    loss, together = loss_and_gradients(model, pack(samples))
    total, apart = loss_and_gradients(model, *(pack([sample]) for sample in samples))
    assert loss == pytest.approx(total, rel=1e-6)
    assert_same_gradients(together, apart)


def branches(lengths, prefix):
    """Layout, packed tokens and positions of one prefix and its branches, and of the samples apart."""
    starts = [prefix + sum(lengths[:i]) for i in range(len(lengths))]
    own = [list(range(start, start + n)) for start, n in zip(starts, lengths)]
    rows = [list(range(prefix))] + [list(range(prefix)) + rows for rows in own]
    queries = AttentionLayout.of_lengths([prefix, *lengths])
    keys = AttentionLayout.of_lengths([len(r) for r in rows])
    layout = dataclasses.replace(queries, cu_seqlens_k=keys.cu_seqlens_k, max_seqlen_k=keys.max_seqlen_k,
                                 kv_rows=torch.tensor([row for segment in rows for row in segment]))
    positions = list(range(prefix)) + [prefix + i for n in lengths for i in range(n)]
    return layout, torch.tensor(positions, dtype=torch.int32), own


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
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
    shared = dataclasses.replace(plain, token_ids=token_ids, positions=positions, layout=layout, loss_rows=loss_rows,
                                 targets=token_ids[loss_rows + 1])

    with torch.no_grad():
        ours = model.hidden(shared)[torch.tensor([row for rows in own for row in rows])]
        bounds = plain.layout.cu_seqlens_q.tolist()
        apart = model.hidden(plain)
        assert_close(ours, torch.cat([apart[a + prefix:b] for a, b in itertools.pairwise(bounds)]))
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


def test_gathered_keys_are_not_kept_for_backward():
    layout, _, _ = branches((3,) * 20, 50)
    q, k, v = (torch.randn(110, 4, 8, requires_grad=True) for _ in range(3))
    gathered = layout.kv_rows.numel() * 4 * 8 * 4

    def live(**options):
        with LiveBytes() as live:
            out = attend(q, k, v, layout, **options)
            return live.total(), out

    kept, expected = live(regather=False)
    lean, out = live()
    assert kept - lean == 2 * gathered
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(out, (q, k, v), grad),
                                                  torch.autograd.grad(expected, (q, k, v), grad)))


@pytest.mark.parametrize("regather", [True, False])
def test_constant_keys_come_before_the_packed_rows(regather):
    layout, _, _ = branches((3,) * 4, 5)
    q, k, v = (torch.randn(17, 4, 8) for _ in range(3))
    layout = dataclasses.replace(layout, cu_seqlens_q=layout.cu_seqlens_q[1:] - 5, cu_seqlens_k=layout.cu_seqlens_k[1:] - 5,
                                 kv_rows=layout.kv_rows[5:])
    whole = [x.clone().requires_grad_() for x in (q[5:], k, v)]
    own = [x[5:].clone().requires_grad_() for x in (q, k, v)]
    expected = attend(*whole, layout)
    found = attend(*own, layout, constant=(k[:5], v[:5]), regather=regather)
    assert torch.equal(found, expected)
    grad = torch.randn_like(found)
    for ours, theirs in zip(torch.autograd.grad(found, own, grad), torch.autograd.grad(expected, whole, grad)):
        assert torch.equal(ours, theirs[-12:])


def test_shared_gradients_are_summed_in_fp32():
    """A thousand branches that each add 1: bf16 alone would stop counting at 256."""
    lengths = (1,) * 1000
    layout, _, _ = branches(lengths, 1)
    source = torch.zeros(1001, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    rows = attention._GatherRows.apply(source, attention._Gathered(None, source, layout.kv_rows), None, True)
    rows.sum().backward()
    assert source.grad[0].unique().item() == 1000  # 1001, rounded once


def test_attend_aligns_the_last_rows():
    """Two queries over five keys are the last two of five queries, four the last four; one query sees all."""
    q, k, v = (torch.randn(5, 2, 8) for _ in range(3))
    whole = attend(q, k, v, AttentionLayout.of_lengths([5]))
    keys = AttentionLayout.of_lengths([5])
    for n in (1, 2, 4):
        queries = AttentionLayout.of_lengths([n])
        layout = dataclasses.replace(queries, cu_seqlens_k=keys.cu_seqlens_k, max_seqlen_k=5)
        assert_close(attend(q[-n:], k, v, layout), whole[-n:])


def test_gradients_of_segments_are_put_together_once():
    """A slice's gradient would be a tensor of all rows, for each segment."""
    q, k, v = (torch.randn(320, 2, 8, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, AttentionLayout.of_lengths([16] * 20), "sdpa")
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(x.nbytes for x in [result] if isinstance(x, torch.Tensor) and x.nbytes >= q.nbytes)
            return result

    with Sizes():
        out.sum().backward()
    assert len(made) <= 10


def test_attend_without_rows():
    q, k = torch.randn(0, 2, 8, requires_grad=True), torch.randn(0, 2, 8)
    assert attend(q, k, k, AttentionLayout.of_lengths([])).shape == (0, 2, 8)


@pytest.mark.parametrize("implementation", ["flash", "varlen"])
def test_impossible_attention_is_refused(implementation):
    q = torch.randn(5, 2, 8)
    with pytest.raises(ValueError, match=f"{implementation}.*needs a CUDA device, not cpu.*choose auto or sdpa"):
        attend(q, q, q, AttentionLayout.of_lengths([5]), implementation)


def test_unknown_attention_is_refused():
    q = torch.randn(5, 2, 8)
    with pytest.raises(ValueError, match="'sdqa': choose one of auto, flash, varlen, avx512, blocked, sdpa"):
        attend(q, q, q, AttentionLayout.of_lengths([5]), "sdqa")


def plain_attention(q, k, v, layout):
    """Segment by segment, with the whole matrix of scores."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    outs = []
    for (q0, q1), (k0, k1) in zip(*(itertools.pairwise(x.tolist()) for x in (layout.cu_seqlens_q, layout.cu_seqlens_k))):
        rows = torch.arange(k0, k1) if layout.kv_rows is None else layout.kv_rows[k0:k1]
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], k[rows]) * q.shape[-1] ** -0.5
        hidden = torch.ones(q1 - q0, k1 - k0, device=q.device).tril(k1 - k0 - q1 + q0) == 0
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v[rows]))
    return torch.cat(outs)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_all_attention_that_this_machine_has_agrees(implementation, kv_heads, shared):
    """The error against fp32 is at most twice that of plain attention in the same dtype."""
    for_cpu = implementation in ("avx512", "blocked")
    device = torch.device("cuda" if torch.cuda.is_available() and not for_cpu else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" or for_cpu else torch.float32
    try:
        attention.choose_implementation(implementation, device, dtype, 32)
    except ValueError as error:
        pytest.skip(str(error))
    layout = branches((6, 1, 290), 70)[0] if shared else AttentionLayout.of_lengths([70, 1, 296])
    layout = layout.map(lambda x: x.to(device))
    exact = [torch.randn(367, n, 32, device=device) for n in (4, kv_heads, kv_heads)]
    exact = [x.to(dtype).double().requires_grad_() for x in exact]
    grad = torch.randn(367, 4, 32, device=device).to(dtype)

    def results(function, inputs):
        out = function(*inputs, layout)
        return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    expected = results(plain_attention, exact)
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    found = results(lambda *tensors: attend(*tensors, implementation), inputs)
    for ours, plain, true in zip(found, results(plain_attention, inputs), expected):
        allowed = 2 * (plain.double() - true).abs().max() + 1e-6 * true.abs().max()
        assert (ours.double() - true).abs().max() <= allowed


class Machine:
    """A pretended CUDA machine: which attention libraries it has, and what they were called with."""

    def __init__(self, monkeypatch, *, flash=None, varlen=None, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old")
        monkeypatch.setattr(attention, "_flash_function", lambda: flash)
        monkeypatch.setattr(attention, "_varlen_function", lambda: varlen)

    def choose(self, implementation="auto", dtype=torch.bfloat16):
        return attention.choose_implementation(implementation, torch.device("cuda"), dtype, 64)


def test_choice_on_cuda(monkeypatch):
    def function():
        pass

    machine = Machine(monkeypatch, flash=function, varlen=function)
    assert machine.choose() == "flash" and machine.choose("varlen") == "varlen"
    assert machine.choose(dtype=torch.float32) == "sdpa"
    with pytest.raises(ValueError, match="float16 and bfloat16 only, not torch.float32"):
        machine.choose("flash", torch.float32)
    assert Machine(monkeypatch, varlen=function).choose() == "varlen"
    with pytest.raises(ValueError, match="no flash-attn package is installed"):
        machine.choose("flash")
    assert Machine(monkeypatch, flash=function, capability=(7, 5)).choose() == "sdpa"
    with pytest.raises(ValueError, match="Old is older than compute capability 8.0"):
        machine.choose("flash")


class Library:
    """Stand-ins with the signatures that attention libraries have had; they compute by SDPA and note their options."""

    def __init__(self):
        self.seen = {}

    def compute(self, q, k, v, cu_q, cu_k, **options):
        self.seen = options
        return attention._sdpa(q, k, v, AttentionLayout(cu_q, 0, cu_k, 0))

    def torch_2_10(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        return self.compute(query, key, value, cu_seq_q, cu_seq_k, is_causal=is_causal, heads=key.shape[1])

    def torch_window(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return self.compute(query, key, value, cu_seq_q, cu_seq_k, window_size=window_size, heads=key.shape[1])

    def torch_2_13(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1),
                   enable_gqa=False):
        return self.compute(query, key, value, cu_seq_q, cu_seq_k, window_size=window_size, gqa=enable_gqa,
                            heads=key.shape[1])

    def flash_attn_2(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                     softmax_scale=None, causal=False, deterministic=False):
        return self.compute(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, longest=(max_seqlen_q, max_seqlen_k),
                            repeatable=deterministic)

    def flash_attn_4(self, q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False):
        return self.compute(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal), None


SIGNATURES = {
    "torch_2_10": ("_varlen", {"is_causal": True, "heads": 4}),
    "torch_window": ("_varlen", {"window_size": (-1, 0), "heads": 4}),
    "torch_2_13": ("_varlen", {"window_size": (-1, 0), "gqa": True, "heads": 2}),
    "flash_attn_2": ("_flash", {"causal": True, "longest": (7, 7), "repeatable": False}),
    "flash_attn_4": ("_flash", {"causal": True}),
}


@pytest.mark.parametrize("signature", SIGNATURES)
def test_library_signatures(signature, monkeypatch):
    call, expected = SIGNATURES[signature]
    library = Library()
    monkeypatch.setattr(attention, f"{call}_function", lambda: getattr(library, signature))
    q, k, v = torch.randn(10, 4, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)
    layout = AttentionLayout.of_lengths([7, 3])
    assert_close(getattr(attention, call)(q, k, v, layout), attention._sdpa(q, k, v, layout))
    assert library.seen == expected


def test_flash_backward_adds_in_order_where_that_is_asked_for(monkeypatch):
    library = Library()
    monkeypatch.setattr(attention, "_flash_function", lambda: library.flash_attn_2)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    q = torch.randn(10, 4, 8)
    attention._flash(q, q, q, AttentionLayout.of_lengths([7, 3]))
    assert library.seen["repeatable"] is True


def test_torch_varlen_signature_is_known():
    """Of the installed torch: everything that `attend` passes exists."""
    known = attention._arguments(attention._varlen_function())
    assert {"window_size", "is_causal"} & known
    assert attention._arguments(attention._varlen_function()) >= {"cu_seq_q", "cu_seq_k", "max_q", "max_k"}


def test_frozen_decoder_saves_no_input_of_a_linear():
    """By the layer: two residual sums, queries, keys, values, attention's output, the gate-up product, and per row
    two fp32 numbers of the norms and one per head of attention."""
    config = decoder_config(num_kv_heads=2)
    decoder = fill(Decoder(config, trained=False, compute_dtype=torch.bfloat16, attn_implementation="sdpa"))
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


def test_rope_kinds_that_depend_on_the_length_are_refused():
    for kind in ("dynamic", "longrope", "mystery"):
        with pytest.raises(ValueError, match=f"rope_type '{kind}' is not supported.*default, linear, llama3 and yarn"):
            rotary_frequencies(decoder_config(rope_parameters={"rope_type": kind, "factor": 2.0}))


def test_frequencies_survive_the_meta_device():
    with torch.device("meta"):
        decoder = Decoder(decoder_config(**ROPE["yarn"]), trained=False, compute_dtype=torch.float32)
    fill(decoder.to_empty(device="cpu"))
    plain = fill(Decoder(decoder_config(**ROPE["yarn"]), trained=False, compute_dtype=torch.float32))
    x, positions = torch.randn(6, 32), torch.arange(6)
    layout = AttentionLayout.of_lengths([6])
    assert torch.equal(decoder(x, positions, layout), plain(x, positions, layout))


def test_unknown_recompute_is_refused():
    with pytest.raises(ValueError, match="recompute 'some': choose one of none, selective, full"):
        Decoder(decoder_config(), trained=False, compute_dtype=torch.float32, recompute="some")
