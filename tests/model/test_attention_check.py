"""`settle_attention`: which library a model's attention is left to, of such as are right, wrong, broken or absent."""

import pytest
import torch
from training_run import config_of, write_run

from fastvid import train
from fastvid.dist import parallel
from fastvid.model import attention, attention_check
from fastvid.model.attention import SDPA, Attention
from fastvid.model.attention_check import settle_attention

CPU = torch.device("cpu")


def right(q, k, v, layout):
    return SDPA.call(q, k, v, layout)


def first_rows_aligned(q, k, v, layout):
    """As is_causal aligns them: right only where there are as many keys as queries."""
    outs = []
    for q_part, k_part, v_part in zip(
        q.split(layout.lengths[0]), k.split(layout.lengths[1]), v.split(layout.lengths[1])
    ):
        parts = (x.transpose(0, 1)[None] for x in (q_part, k_part, v_part))
        out = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def heads_confused(q, k, v, layout):
    return right(q, k.flip(1), v, layout)


def not_a_number(q, k, v, layout):
    return right(q, k, v, layout) * torch.nan


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k):
        return k.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.1


def keys_gradient_wrong(q, k, v, layout):
    return right(q, WrongGradient.apply(k), v, layout)


def raising(q, k, v, layout):
    raise RuntimeError("CUDA error: no kernel image is available\nmore of it")


def without_gradient(q, k, v, layout):
    return right(q, k, v, layout).detach()


def forget():
    attention_check._first_that_is_right.cache_clear()
    attention_check._with_right_parts.cache_clear()


@pytest.fixture
def settle(monkeypatch):
    """Chooses among pretended libraries of a GPU, for which the CPU stands in."""

    def settle(*calls, dtype=torch.float32, heads=(4, 2), **options):
        forget()
        monkeypatch.setattr(attention_check, "kernel_obstacle", lambda *_: None)
        monkeypatch.setattr(
            attention_check, "gpu_libraries", lambda device: [Attention(call.__name__, call) for call in calls]
        )
        return settle_attention("auto", CPU, dtype, *heads, 16, **options)

    yield settle
    forget()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_library_that_is_right_is_taken(settle, dtype, heads, caplog):
    assert settle(right, raising, dtype=dtype, heads=heads).call is right
    assert caplog.messages == []


@pytest.mark.parametrize(
    "wrong, why",
    [
        (first_rows_aligned, "its values differ from SDPA's by"),
        (heads_confused, "its values differ from SDPA's by"),
        (not_a_number, "its values differ from SDPA's by nan"),
        (keys_gradient_wrong, "its keys' gradients differ from SDPA's by 0.1 of the largest"),
        (raising, "it raises RuntimeError: CUDA error: no kernel image is available"),
        (without_gradient, "it raises RuntimeError:"),
    ],
)
def test_one_that_is_wrong_leaves_it_to_the_next(settle, wrong, why, caplog):
    assert settle(wrong, right).call is right
    (message,) = caplog.messages
    assert message.startswith(f"attention: {wrong.__name__} is not used: {why}") and "\n" not in message


def test_sdpa_serves_where_no_library_does(settle, caplog):
    assert settle(raising, first_rows_aligned) == settle() == SDPA
    assert len(caplog.messages) == 2


def test_libraries_are_tried_once_per_process(settle, caplog):
    tried = []

    def counted(*tensors):
        tried.append(tensors)
        return right(*tensors)

    assert settle(raising, counted).call is counted and len(tried) == len(caplog.messages) == 1
    assert (
        settle_attention("auto", CPU, torch.float32, 4, 2, 16).call is counted
        and len(tried) == len(caplog.messages) == 1
    )


def test_what_was_right_is_tried_again_where_it_must_repeat(settle, monkeypatch, caplog):
    """A library may have no backward that does."""

    def unrepeatable(*tensors):
        if torch.are_deterministic_algorithms_enabled():
            raise NotImplementedError("deterministic")
        return right(*tensors)

    assert settle(unrepeatable, right).call is unrepeatable and caplog.messages == []
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert settle_attention("auto", CPU, torch.float32, 4, 2, 16).call is right
    assert caplog.messages == ["attention: unrepeatable is not used: it raises NotImplementedError: deterministic"]


@pytest.mark.parametrize("unfit", [without_gradient, keys_gradient_wrong])
def test_gradients_are_tried_where_they_are_asked_for(settle, unfit, caplog):
    assert settle(unfit, right, gradients=False).call is unfit and caplog.messages == []
    assert settle_attention("auto", CPU, torch.float32, 4, 2, 16).call is right
    assert settle(first_rows_aligned, right, gradients=False).call is right


def test_what_is_named_is_not_tried(settle):
    settle(raising)
    assert settle_attention("sdpa", CPU, torch.float32, 4, 2, 16) is SDPA
    with pytest.raises(ValueError, match="flash.*needs a CUDA device, not cpu"):
        settle_attention("flash", CPU, torch.float32, 4, 2, 16)


def test_on_a_cpu_nothing_is_tried():
    assert settle_attention("auto", CPU, torch.float32, 4, 2, 16) is SDPA
    assert settle_attention("auto", CPU, torch.bfloat16, 4, 2, 16).name in ("avx512", "sdpa")


@pytest.mark.slow
def test_it_is_settled_when_the_model_is_built(tmp_path, monkeypatch):
    """And not at each layer of each step: a step asks nothing."""
    asked, called = [], []
    noting = Attention("noting", lambda *given: called.append(len(given)) or right(*given))
    monkeypatch.setattr(train, "settle_attention", lambda *given: asked.append(given) or noting)
    run = write_run(tmp_path / "run")
    state = train.build(config_of(run, "unused"), parallel.World(0, 1, 0, CPU, False))
    sizes = state.model.config.decoder
    assert asked == [("auto", CPU, torch.float32, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim)]
    assert {layer.attention for layer in state.model.decoder.layers} == {noting}
    monkeypatch.setattr(attention, "_FIND", None)
    called.clear()
    batches, _ = next(state.loader.iterate(0))
    train.train_step(state, batches)
    assert set(called) == {4} and len(called) >= sizes.num_layers
