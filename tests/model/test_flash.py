"""Libraries of FlashAttention: which is chosen on which card, and what each is called with.

Stand-ins have the signatures of real packages: of torch 2.10 to 2.13, flash-attn 2.8.3, FlashAttention 3 (`hopper/` of
its repository, before and after its functions became operations), flash-attn-4 4.0.0b36. They compute on the CPU.
"""

import functools
import inspect
import sys
import types

import pytest
import torch
from attention_parts import cpu_backward, cpu_forward
from model_cases import assert_close

from fastvid.batch import AttentionLayout
from fastvid.model import attention, attention_check, flash
from fastvid.model.attention import SDPA, choose_attention
from fastvid.model.attention_check import _branches, settle_attention

CPU = torch.device("cpu")


class Calls:
    """Computes what a stand-in was asked for, and notes how."""

    def __init__(self):
        self.seen = []

    def forward(self, q, k, v, cu_q, cu_k, causal, **noted):
        self.seen.append(noted | {"causal": causal})
        layout = AttentionLayout(cu_q, 0, cu_k, 0)
        if torch.is_grad_enabled():  # it would bring its own backward
            assert causal
            return SDPA.call(q, k, v, layout), None
        return cpu_forward(q, k, v, layout, causal)

    def backward(self, grads, dout, q, k, v, out, lse, cu_q, cu_k, causal, **noted):
        self.seen.append(noted | {"backward": causal})
        assert lse.is_contiguous() and lse.shape == (q.shape[1], q.shape[0]) and lse.dtype == torch.float32
        for into, grad in zip(grads, cpu_backward(dout, q, k, v, out, lse, AttentionLayout(cu_q, 0, cu_k, 0), causal)):
            assert into.is_contiguous()
            into.copy_(grad)


def flash_attn_2(calls):
    """2.8.3: the backward is an operation, which takes no defaults and writes to dq, dk, dv."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        longest = max_seqlen_q, max_seqlen_k
        out, lse = calls.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, longest=longest, repeatable=deterministic)
        return (out, lse, None) if return_attn_probs else out

    def _flash_attn_varlen_backward(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        dq: torch.Tensor | None,
        dk: torch.Tensor | None,
        dv: torch.Tensor | None,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: torch.Tensor | None,
        deterministic: bool,
        rng_state: torch.Tensor | None = None,
        zero_tensors: bool = False,
    ) -> torch.Tensor:
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        calls.backward(
            (dq, dk, dv),
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            cu_seqlens_q,
            cu_seqlens_k,
            causal,
            scale=softmax_scale,
            repeatable=deterministic,
        )
        return softmax_lse.clone()

    backward = torch.library.custom_op(
        "fastvid_stand_in::flash_attn_2_backward", _flash_attn_varlen_backward, mutates_args=("dq", "dk", "dv")
    )
    return {
        "flash_attn": {"flash_attn_varlen_func": flash_attn_varlen_func},
        "flash_attn.flash_attn_interface": {"_flash_attn_varlen_backward": backward},
    }


def flash_attn_3(calls):
    """Of 2026."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        out, lse = calls.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, repeatable=deterministic)
        return (out, lse) if return_attn_probs else out

    def _flash_attn_backward(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        sequed_q: torch.Tensor | None = None,
        sequed_k: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        dq: torch.Tensor | None = None,
        dk: torch.Tensor | None = None,
        dv: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        is_causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        deterministic: bool = False,
        sm_margin: int = 0,
    ) -> torch.Tensor:
        calls.backward(
            (dq, dk, dv), dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, is_causal, scale=softmax_scale
        )
        return softmax_lse.clone()

    backward = torch.library.custom_op(
        "fastvid_stand_in::flash_attn_3_backward", _flash_attn_backward, mutates_args=("dq", "dk", "dv")
    )
    return {
        "flash_attn_interface": {
            "flash_attn_varlen_func": flash_attn_varlen_func,
            "_flash_attn_backward": backward,
        }
    }


def flash_attn_3_before(calls):
    """Of 2025: always returns the log-sum-exp too; its backward is a plain function that wants a window."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        deterministic=False,
    ):
        return calls.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q,
        cu_seqlens_k,
        sequed_q,
        sequed_k,
        max_seqlen_q,
        max_seqlen_k,
        dq,
        dk,
        dv,
        softmax_scale,
        causal,
        window_size=(-1, -1),
        softcap=0.0,
        deterministic=False,
        sm_margin=0,
    ):
        calls.backward((dq, dk, dv), dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, causal)
        return dq, dk, dv, softmax_lse

    return {
        "flash_attn_interface": {
            "flash_attn_varlen_func": flash_attn_varlen_func,
            "_flash_attn_backward": _flash_attn_backward,
        }
    }


def flash_attn_4(calls):
    """4.0.0b36, of which `flash_attn` is no module but a folder that another package may share."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        gather_kv_indices=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        return_lse=False,
    ):
        out, lse = calls.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, repeatable=deterministic)
        return out, lse if return_lse else None

    def _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=None,
        causal=False,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        m_block_size=64,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        deterministic=False,
        dq=None,
        dk=None,
        dv=None,
        dlse=None,
        learnable_sink=None,
    ):
        assert (window_size_left, window_size_right, dlse) == (None, None, None)
        calls.backward((dq, dk, dv), dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, scale=softmax_scale)
        return dq, dk, dv

    return {
        "flash_attn.cute": {"flash_attn_varlen_func": flash_attn_varlen_func},
        "flash_attn.cute.interface": {"_flash_attn_bwd": _flash_attn_bwd},
    }


PACKAGES = {
    "FlashAttention 2": flash_attn_2,
    "FlashAttention 3": flash_attn_3,
    "FlashAttention 3, 2025": flash_attn_3_before,
    "FlashAttention 4": flash_attn_4,
}


class Machine:
    """A pretended machine with one card, for which the CPU stands in."""

    def __init__(self, monkeypatch):
        self.patch = monkeypatch
        self.card((9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old")
        for module in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
            monkeypatch.delitem(sys.modules, module)
        self.forget()

    def card(self, capability):
        self.patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def forget(self):
        flash._library.cache_clear()
        flash.torch_library.cache_clear()
        attention_check._first_that_is_right.cache_clear()

    def install(self, *names):
        """Returns what notes the calls of each."""
        found = []
        for name in names:
            calls = Calls()
            for module, functions in PACKAGES[name](calls).items():
                parts = module.split(".")
                for i in range(1, len(parts) + 1):
                    path = ".".join(parts[:i])
                    if path not in sys.modules:
                        made = types.ModuleType(path)
                        made.__path__ = []
                        self.patch.setitem(sys.modules, path, made)
                vars(sys.modules[module]).update(functions)
            found.append(calls)
        self.forget()
        return found

    def without_torch(self):
        self.patch.setattr(attention, "torch_library", lambda: None)

    def choose(self, implementation="auto", dtype=torch.bfloat16):
        return choose_attention(implementation, torch.device("cuda"), dtype, 64).name


@pytest.fixture
def machine(monkeypatch):
    made = Machine(monkeypatch)
    yield made
    made.forget()


@pytest.mark.parametrize(
    "capability, best",
    [
        ((8, 0), "FlashAttention 2"),
        ((8, 9), "FlashAttention 2"),
        ((9, 0), "FlashAttention 3"),
        ((10, 0), "FlashAttention 4"),
        ((12, 0), "FlashAttention 4"),
    ],
)
def test_the_newest_that_fits_the_card_is_chosen(machine, capability, best):
    machine.install("FlashAttention 2", "FlashAttention 3", "FlashAttention 4")
    machine.card(capability)
    assert machine.choose() == machine.choose("flash") == best
    assert machine.choose("varlen") == "torch's varlen_attn"
    names = [each.name for each in attention.gpu_libraries(torch.device("cuda"))]
    assert names[0] == best and names[-2:] == ["FlashAttention 2", "torch's varlen_attn"]


def test_choice_on_cuda(machine):
    assert machine.choose() == machine.choose("varlen") == "torch's varlen_attn"
    with pytest.raises(ValueError, match="'flash' is impossible: no flash-attn package for Old is installed"):
        machine.choose("flash")
    assert machine.choose(dtype=torch.float32) == "sdpa"
    machine.without_torch()
    assert machine.choose() == "sdpa"
    with pytest.raises(ValueError, match="has no varlen_attn; choose auto or sdpa"):
        machine.choose("varlen")
    machine.install("FlashAttention 3")
    assert machine.choose() == "FlashAttention 3"
    machine.card((8, 0))
    assert machine.choose() == "sdpa", "no kernels for this card"
    machine.install("FlashAttention 2")
    with pytest.raises(ValueError, match="float16 and bfloat16 only, not torch.float32"):
        machine.choose("flash", torch.float32)
    machine.card((7, 5))
    assert machine.choose() == "sdpa"
    with pytest.raises(ValueError, match="Old is older than compute capability 8.0"):
        machine.choose("flash")


def test_a_folder_that_another_package_shares_is_no_flash_attn(machine):
    """flash-attn-4 alone makes an importable `flash_attn`, without functions."""
    machine.install("FlashAttention 4")
    machine.card((8, 0))
    assert machine.choose() == "torch's varlen_attn"


def settled(machine, monkeypatch, *names, kv_heads=2):
    """What `settle_attention` takes on a machine with such packages and nothing else; what notes their calls."""
    machine.without_torch()
    calls = machine.install(*names)
    monkeypatch.setattr(attention_check, "kernel_obstacle", lambda *_: None)
    return settle_attention("auto", CPU, torch.float32, 4, kv_heads, 16), *calls


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("name", PACKAGES)
def test_each_package_is_called_as_it_wants(machine, monkeypatch, caplog, name, kv_heads):
    """And equals gathered keys, in both parts, forward and backward."""
    machine.card((8, 0) if name == "FlashAttention 2" else (9, 0))
    chosen, calls = settled(machine, monkeypatch, name, kv_heads=kv_heads)
    assert chosen.name == name.split(",")[0] and caplog.messages == []
    layout = _branches()
    rows = [torch.randn(322, heads, 16) for heads in (4, kv_heads, kv_heads)]

    def outcome(attend):
        leaves = [x.clone().requires_grad_() for x in rows]
        out = attend(*leaves, layout)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    calls.seen.clear()
    for ours, theirs in zip(outcome(chosen), outcome(SDPA)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert [each.get("causal", each.get("backward")) for each in calls.seen] == [True, False] * 2
    assert all(each.get("scale", 0.25) == 0.25 for each in calls.seen)


@pytest.mark.parametrize("name", ["FlashAttention 2", "FlashAttention 3", "FlashAttention 4"])
def test_backward_adds_in_order_where_that_is_asked_for(machine, monkeypatch, name):
    machine.card((8, 0) if name == "FlashAttention 2" else (9, 0))
    chosen, calls = settled(machine, monkeypatch, name)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    calls.seen.clear()
    q = torch.randn(10, 4, 8)
    chosen(q, q, q, AttentionLayout.of_lengths([7, 3]))
    assert [each["repeatable"] for each in calls.seen] == [True]
    assert calls.seen[0].get("longest", (7, 7)) == (7, 7)


def test_without_a_backward_that_takes_log_sum_exps_keys_are_gathered(machine, monkeypatch, caplog):
    machine.install("FlashAttention 4")
    del sys.modules["flash_attn.cute.interface"]._flash_attn_bwd
    chosen, *_ = settled(machine, monkeypatch)
    assert chosen.name == "FlashAttention 4" and chosen.parts is None and caplog.messages == []


def wrong(calls, monkeypatch, kind):
    compute = calls.backward

    def without_lse(*given, **noted):
        raise TypeError("unexpected keyword argument 'softmax_lse'\nmore")

    def gradients_of_two(grads, *given, **noted):
        compute(grads, *given, **noted)
        grads[1].mul_(2)

    if kind == "forward":
        forward = calls.forward
        monkeypatch.setattr(calls, "forward", lambda *given, **noted: (forward(*given, **noted)[0], None))
    else:
        monkeypatch.setattr(calls, "backward", {"raises": without_lse, "wrong": gradients_of_two}[kind])


@pytest.mark.parametrize(
    "kind, why",
    [
        ("raises", "it raises TypeError: unexpected keyword argument 'softmax_lse'"),
        ("wrong", "its keys' gradients differ from SDPA's by"),
        ("forward", "it raises TypeError: it gives no log-sum-exp"),
    ],
)
def test_what_fails_in_parts_serves_without_and_says_so_once(machine, monkeypatch, caplog, kind, why):
    machine.without_torch()
    monkeypatch.setattr(attention_check, "kernel_obstacle", lambda *_: None)
    (calls,) = machine.install("FlashAttention 3")
    wrong(calls, monkeypatch, kind)
    for _ in range(2):
        chosen = settle_attention("auto", CPU, torch.float32, 4, 2, 16)
        assert chosen.name == "FlashAttention 3" and chosen.parts is None
    (message,) = caplog.messages
    assert message.startswith(
        f"attention: keys of shared videos are gathered, for FlashAttention 3 fails in parts: {why}"
    )


class Torch:
    """`varlen_attn` of several versions of torch."""

    def __init__(self):
        self.seen = {}

    def compute(self, q, k, v, cu_q, cu_k, **options):
        self.seen = options
        return SDPA.call(q, k, v, AttentionLayout(cu_q, 0, cu_k, 0))

    def torch_2_10(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        return self.compute(query, key, value, cu_seq_q, cu_seq_k, is_causal=is_causal, heads=key.shape[1])

    def torch_window(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return self.compute(query, key, value, cu_seq_q, cu_seq_k, window_size=window_size, heads=key.shape[1])

    def torch_2_13(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False
    ):
        return self.compute(
            query, key, value, cu_seq_q, cu_seq_k, window_size=window_size, gqa=enable_gqa, heads=key.shape[1]
        )


@pytest.mark.parametrize(
    "version, expected",
    [
        ("torch_2_10", {"is_causal": True, "heads": 2}),
        ("torch_window", {"window_size": (-1, 0), "heads": 2}),
        ("torch_2_13", {"window_size": (-1, 0), "gqa": True, "heads": 2}),
    ],
)
def test_versions_of_torch(version, expected):
    library = Torch()
    q, k, v = torch.randn(10, 4, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)
    layout = AttentionLayout.of_lengths([7, 3])
    assert_close(flash._varlen(q, k, v, layout, function=getattr(library, version)), SDPA.call(q, k, v, layout))
    assert library.seen == expected


def test_torch_varlen_signature_is_known():
    """Of the installed torch: everything that is passed exists."""
    library = flash.torch_library()
    known = inspect.signature(library.call.keywords["function"]).parameters
    assert {"window_size", "is_causal"} & known.keys()
    assert known.keys() >= {"cu_seq_q", "cu_seq_k", "max_q", "max_k"}


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_torch_operations_with_log_sum_exps_are_called_by_their_schema(way, monkeypatch):
    """The installed torch takes the arguments in their order; it has no such kernel for CPUs."""
    operation = getattr(torch.ops.aten, f"_flash_attention_{way}")
    names = [argument.name for argument in operation.default._schema.arguments if not argument.kwarg_only]
    layout, q, k = AttentionLayout.of_lengths([7, 3]), torch.randn(10, 4, 8), torch.randn(10, 2, 8)
    seen = {}

    def note(*given):
        seen.update(zip(names, given, strict=True))
        return q, torch.zeros(4, 10), None, None, None

    monkeypatch.setattr(torch.ops.aten, f"_flash_attention_{way}", note)
    parts = flash.torch_library().parts
    call = functools.partial(parts.forward, q) if way == "forward" else functools.partial(parts.backward, q, q)
    call(k, k, *([q, torch.zeros(4, 10)] if way == "backward" else []), layout, False)
    assert seen["query"] is q and seen["key"] is seen["value"] is k and seen["is_causal"] is False
    assert seen["cum_seq_q"] is layout.cu_seqlens_q and seen["max_k"] == 7 and seen["dropout_p"] == 0.0


@pytest.mark.parametrize(
    "source, said",
    [
        ("raise RuntimeError('cutlass does not fit\\nmore')", "RuntimeError: cutlass does not fit"),
        ("raise ImportError('undefined symbol')", "ImportError: undefined symbol"),
        ("import package_that_is_not_here", "ModuleNotFoundError: No module named 'package_that_is_not_here'"),
        ("other = 1", None),
    ],
)
def test_a_module_that_is_broken_is_noted(tmp_path, monkeypatch, caplog, source, said):
    (tmp_path / "broken_attention.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert flash.find("broken_attention", "function") is None
    sys.modules.pop("broken_attention", None)
    assert caplog.messages == (
        [f"attention: broken_attention is installed but cannot be imported: {said}"] if said else []
    )


@pytest.mark.parametrize("module", ["no_such_attention", "no_such_attention.cute", "torch.no_such_attention"])
def test_a_module_that_is_absent_is_not_noted(caplog, module):
    assert flash.find(module, "function") is None and caplog.messages == []
