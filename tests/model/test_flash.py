"""Libraries of FlashAttention: which is chosen on which card, and what each is called with."""

import dataclasses
import importlib
import inspect
import sys
import types

import pytest
import torch
from flash_packages import DISTRIBUTIONS, PACKAGES
from model_cases import assert_close

from fastvid.batch import AttentionLayout
from fastvid.model import attention, attention_check, flash
from fastvid.model.attention import SDPA, choose_attention
from fastvid.model.attention_check import _branches, settle_attention

CPU = torch.device("cpu")


class Machine:
    """A pretended machine with one card, for which the CPU stands in."""

    def __init__(self, monkeypatch, folder):
        self.patch, self.folder = monkeypatch, folder
        monkeypatch.syspath_prepend(folder)
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
        attention_check._with_right_parts.cache_clear()

    def install(self, *names):
        """Returns what notes the calls of each."""
        found = []
        for name in names:
            calls, modules = PACKAGES[name]()
            if name in DISTRIBUTIONS:
                distribution, version = DISTRIBUTIONS[name].split("-")
                self.write(f"{DISTRIBUTIONS[name]}.dist-info/METADATA", f"Name: {distribution}\nVersion: {version}\n")
            for module, functions in modules.items():
                if isinstance(functions, str):
                    self.write(f"{module.replace('.', '/')}/__init__.py", functions)
                    continue
                parts = module.split(".")
                for i in range(1, len(parts) + 1):
                    path = ".".join(parts[:i])
                    if path not in sys.modules:
                        made = types.ModuleType(path)
                        made.__path__ = [str(self.folder.joinpath(*parts[:i]))]
                        self.patch.setitem(sys.modules, path, made)
                vars(sys.modules[module]).update(functions)
            found.append(calls)
        self.forget()
        return found

    def write(self, path, text):
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)
        importlib.invalidate_caches()

    def without_torch(self):
        self.patch.setattr(attention, "torch_library", lambda: None)

    def choose(self, implementation="auto", dtype=torch.bfloat16):
        return choose_attention(implementation, torch.device("cuda"), dtype, 64).name


@pytest.fixture
def machine(monkeypatch, tmp_path):
    made = Machine(monkeypatch, tmp_path)
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


def allow_cpus(monkeypatch):
    for module in (attention, attention_check):
        monkeypatch.setattr(module, "kernel_obstacle", lambda *_: None)


def settled(machine, monkeypatch, *names, kv_heads=2, **options):
    """What `settle_attention` takes on a machine with such packages and nothing else; what notes their calls."""
    machine.without_torch()
    calls = machine.install(*names)
    allow_cpus(monkeypatch)
    return settle_attention("auto", CPU, torch.float32, 4, kv_heads, 16, **options), *calls


@pytest.mark.parametrize("cutlass", [False, True])
def test_what_flash_attn_2_brings_of_4_is_left_alone(machine, monkeypatch, caplog, cutlass):
    """It cannot be imported, or only forward works: 2 was asked for."""
    if cutlass:
        monkeypatch.setitem(sys.modules, "cutlass", types.ModuleType("cutlass"))
    chosen, *_ = settled(machine, monkeypatch, "FlashAttention 2")
    assert chosen.name == "FlashAttention 2" and chosen.parts is not None and caplog.messages == []
    machine.install("FlashAttention 4")
    assert [each.name for each in flash.flash_libraries(CPU)] == ["FlashAttention 4", "FlashAttention 2"]


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


@pytest.mark.parametrize("implementation", ["auto", "flash"])
@pytest.mark.parametrize(
    "kind, why",
    [
        ("raises", "it raises TypeError: unexpected keyword argument 'softmax_lse'"),
        ("wrong", "its keys' gradients differ from SDPA's by"),
        ("forward", "it raises TypeError: it gives no log-sum-exp"),
    ],
)
def test_what_fails_in_parts_serves_without_and_says_so_once(machine, monkeypatch, caplog, kind, why, implementation):
    """Also where the library is named."""
    machine.without_torch()
    allow_cpus(monkeypatch)
    (calls,) = machine.install("FlashAttention 3")
    wrong(calls, monkeypatch, kind)
    for _ in range(2):
        chosen = settle_attention(implementation, CPU, torch.float32, 4, 2, 16)
        assert chosen.name == "FlashAttention 3" and chosen.parts is None
    (message,) = caplog.messages
    assert message.startswith(
        f"attention: keys of shared videos are gathered, for FlashAttention 3 fails in parts: {why}"
    )


@pytest.mark.parametrize("implementation", ["varlen", "auto"])
def test_parts_of_torchs_own_are_tried_where_it_is_named(machine, monkeypatch, caplog, implementation):
    """A CPU lacks its kernels, for one."""
    own = dataclasses.replace(flash.torch_library(), call=SDPA.call)
    monkeypatch.setattr(attention, "torch_library", lambda: own)
    allow_cpus(monkeypatch)
    chosen = settle_attention(implementation, CPU, torch.float32, 4, 2, 16)
    assert chosen.name == "torch's varlen_attn" and own.parts is not None and chosen.parts is None
    (message,) = caplog.messages
    assert message.startswith("attention: keys of shared videos are gathered, for torch's varlen_attn fails in parts: ")


def test_inference_tries_neither_parts_nor_a_backward(machine, monkeypatch, caplog):
    """Both would be compiled for nothing."""
    machine.card((9, 0))
    chosen, calls = settled(machine, monkeypatch, "FlashAttention 4", gradients=False)
    assert chosen.parts is None and caplog.messages == []
    assert [each.get("causal") for each in calls.seen] == [True]
    assert not any("backward" in each for each in calls.seen)


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
    parts, layout = flash.torch_library().parts, AttentionLayout.of_lengths([7, 3], [8, 5])
    grad, q, out = (torch.randn(10, 4, 8) for _ in range(3))
    k, v, lse = torch.randn(13, 2, 8), torch.randn(13, 2, 8), torch.zeros(4, 10)
    found, seen = [torch.zeros(1) for _ in range(3)], {}

    def note(*given):
        seen.update(zip(names, given, strict=True))
        return *found, None, None

    monkeypatch.setattr(torch.ops.aten, f"_flash_attention_{way}", note)
    expected = {"query": q, "key": k, "value": v}
    expected |= {"cum_seq_q": layout.cu_seqlens_q, "cum_seq_k": layout.cu_seqlens_k}
    if way == "forward":
        returned = parts.forward(q, k, v, layout, False)
    else:
        returned = parts.backward(grad, q, k, v, out, lse, layout, False)[:3]
        expected |= {"grad_out": grad, "out": out, "logsumexp": lse}
    assert [name for name, tensor in expected.items() if seen[name] is not tensor] == []
    assert all(ours is theirs for ours, theirs in zip(returned, found))
    assert (seen["max_q"], seen["max_k"], seen["dropout_p"], seen["is_causal"]) == (7, 8, 0.0, False)


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
