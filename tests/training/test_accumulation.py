"""Steps of several micro-batches: gradients are summed in fp32, and weights are cast once."""

import dataclasses

import pytest
import torch
from model_cases import ADAPTER, FULL, assert_close, model_config, random_batch, random_model
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from training_run import config_of, write_run

from fastvid import train
from fastvid.config import TrainConfig
from fastvid.dist import parallel
from fastvid.training import memory
from fastvid.training.optimizer import Optimizer

CPU = torch.device("cpu")
ALONE = parallel.World(0, 1, 0, CPU, False)
BF16 = ("--bf16", "True", "--master_dtype", "bfloat16")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


# --- sums


def bf16_model(trainable=FULL):
    return random_model(model_config(), trainable, torch.bfloat16, trained_dtype=torch.bfloat16)


def optimizer_of(model, **settings):
    config = TrainConfig(model_name_or_path="", data_path=[], output_dir="", **settings)
    return Optimizer([(name, p) for name, p in model.named_parameters() if p.requires_grad], config, CPU)


def add_in_fp64(sums, gradients):
    for name, gradient in gradients.items():
        sums[name] = sums.get(name, 0) + gradient.double()


@pytest.mark.slow
def test_gradients_of_64_micro_batches_are_summed_as_in_fp32():
    alone, model, expected = bf16_model(), bf16_model(), {}
    optimizer = optimizer_of(model, gradient_accumulation_steps=64)
    for seed in range(64):
        alone.zero_grad()
        alone(random_batch(seed)).backward()
        add_in_fp64(expected, {name: p.grad for name, p in alone.named_parameters()})
        model(random_batch(seed)).backward()
    assert optimizer.parameters.keys() == expected.keys()
    for name, gradient in ((name, p.grad) for name, p in optimizer.parameters.items()):
        assert gradient.dtype == torch.float32
        assert_close(gradient, expected[name], 3e-6)


@pytest.mark.parametrize("micro_batches, dtype", [(1, torch.bfloat16), (2, torch.float32)])
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_only_sums_are_fp32(run, tmp_path, monkeypatch, micro_batches, dtype, optim):
    """A single backward's gradients are updated with as they come."""
    config = config_of(run, tmp_path, *BF16, "--optim", optim, "--gradient_accumulation_steps", str(micro_batches))
    state, seen = train.build(config, ALONE), {}
    for rule in state.optimizer.rules:
        monkeypatch.setattr(rule, "step", lambda gradients, **options: seen.update(gradients))
    train.train_step(state, state.loader.read(0)[0])
    assert seen.keys() == state.optimizer.parameters.keys()
    assert {gradient.dtype for gradient in seen.values() if gradient.ndim > 1} == {dtype}


@pytest.mark.parametrize("micro_batches, size", [(1, 2), (2, 4)])
def test_the_plan_counts_gradients_at_their_size(run, tmp_path, monkeypatch, micro_batches, size):
    found, estimate = [], memory.estimate
    monkeypatch.setattr(memory, "estimate", lambda *a, **k: found.append(estimate(*a, **k)) or found[-1])
    state = train.build(config_of(run, tmp_path, *BF16, "--gradient_accumulation_steps", str(micro_batches)), ALONE)
    assert found[-1].gradients == size * sum(p.numel() for p in state.optimizer.parameters.values())


def sums_of_a_rank(rank):
    """{name: (gradient of three backwards summed over ranks, what this rank's added to it in fp64)}."""
    model, world = bf16_model(dataclasses.replace(ADAPTER, head=True)), parallel.World(rank, 2, rank, CPU, True, 2)
    optimizer, expected = optimizer_of(model), {}
    for i in range(3):
        before = {name: p.grad.double() for name, p in optimizer.parameters.items() if p.grad is not None}
        model(random_batch(2 * i + rank)).backward()
        add_in_fp64(expected, {name: p.grad.double() - before.get(name, 0) for name, p in optimizer.parameters.items()})
    parallel.sum_replicated_gradients(optimizer.parameters.values(), world)
    return {name: (p.grad, expected[name]) for name, p in optimizer.parameters.items()}


@pytest.mark.slow
def test_ranks_sum_in_fp32(tmp_path):
    first, second = on_ranks(2, sums_of_a_rank, tmp_path)
    for name, (gradient, expected) in first.items():
        assert gradient.dtype == torch.float32
        assert_close(gradient, expected + second[name][1], 3e-6)


# --- casts


class Casts(TorchDispatchMode):
    """Counts matrices that are cast to bf16, by shape."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16 and result.ndim == 2:
            shape = tuple(result.shape)
            self.seen[shape] = self.seen.get(shape, 0) + 1
        return result


def two_steps(run, folder, *options):
    config = config_of(run, folder, "--bf16", "True", "--tune_mm_mlp_adapter", "False", *options)
    state = train.build(config, ALONE)
    with Casts() as casts:
        losses = [train.train_step(state, state.loader.read(step)[0]).loss for step in range(2)]
    matrices = {
        tuple(p.shape): p
        for name, p in state.model.named_parameters()
        if p.ndim == 2 and ("decoder" in name or "projector" in name)
    }
    return losses, state, {shape: count for shape, count in casts.seen.items() if shape in matrices}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_step_casts_each_matrix_once(run, tmp_path, monkeypatch, recompute):
    """Where nothing is recomputed; the bits are those of a cast in every micro-batch."""
    accumulate = ("--recompute", recompute, "--gradient_accumulation_steps", "3")
    losses, state, casts = two_steps(run, tmp_path, *accumulate)
    *_, once = two_steps(run, tmp_path, "--recompute", recompute, "--gradient_accumulation_steps", "1")
    assert once and casts == {shape: count * (1 if recompute == "none" else 3) for shape, count in once.items()}
    monkeypatch.setattr(type(state.model), "keep_casts", lambda model, keep: None)
    expected, other, more = two_steps(run, tmp_path, *accumulate)
    assert more == {shape: 3 * count for shape, count in once.items()}
    assert losses == expected
    for name, parameter in state.optimizer.parameters.items():
        assert torch.equal(parameter, other.optimizer.parameters[name])


@pytest.mark.slow
def test_nothing_is_kept_after_a_step(run, tmp_path):
    _, state, _ = two_steps(run, tmp_path, "--recompute", "none", "--gradient_accumulation_steps", "2")
    linear = state.model.decoder.layers[0].o
    assert linear._kept is None
    x = torch.randn(3, linear.weight.shape[1]).bfloat16()
    linear.keep_casts(True)
    with torch.no_grad():
        linear(x)
    assert linear._kept == {}  # without a graph it would serve no backward
    first = linear(x)
    assert first.grad_fn is not None and len(linear._kept) == 1
