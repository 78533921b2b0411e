"""8-bit AdamW on shards: the same bits on any number of ranks, bitsandbytes' state, and bf16 weights that are
rounded."""

import logging
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import on_ranks
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from training_run import flags, losses, write_run

from fastvid import train
from fastvid.checkpoints import checkpoint
from fastvid.training import adamw8bit as optim8bit
from fastvid.training.adamw8bit import round_into, takes_8_bits
from fastvid.training.optimizer import Optimizer

CPU = torch.device("cpu")
NAMES = ("state1", "state2", "absmax1", "absmax2")


def settings(optim="adamw_8bit", **changed):
    return SimpleNamespace(
        **{
            **{
                "optim": optim,
                "weight_decay": 0.1,
                "adam_beta1": 0.9,
                "adam_beta2": 0.999,
                "adam_epsilon": 1e-8,
                "max_grad_norm": 1.0,
                "seed": 2**40 + 1,
                "gradient_accumulation_steps": 1,
            },
            **changed,
        }
    )


@pytest.mark.parametrize(
    "shape, eight_bit",
    [
        ((32003, 4096), True),
        ((2, 5120), True),
        ((16, 256), True),
        ((15, 256), False),
        ((4096,), False),
        ((64, 100), False),
        ((64, 384), False),
        ((5, 4, 256), True),
        ((8, 64, 8), True),
    ],
)
def test_who_gets_8_bits(shape, eight_bit):
    assert takes_8_bits(shape) == eight_bit


@pytest.mark.parametrize("optim, told", [("adamw_8bit", ["8-bit moments: 1 of 3 tensors"]), ("adamw", [])])
def test_how_many_get_8_bits_is_told(caplog, optim, told):
    named = [(str(i), torch.nn.Parameter(torch.ones(shape))) for i, shape in enumerate([(16, 256), (64, 100), (4096,)])]
    with caplog.at_level(logging.INFO):
        Optimizer(named, settings(optim), CPU)
    assert [message.partition(" (")[0] for message in caplog.messages] == told
    assert all("multiple of 256" in message for message in caplog.messages)


# --- sharding

# Uneven rows, fewer rows than ranks, rows that are no whole blocks, vectors.
SHAPES = {
    "uneven": (33, 256),
    "few": (3, 1536),
    "odd": (41, 101),
    "vector": (77,),
    "norm": (4096,),
    "table": (130, 512),
}


def values(name, step):
    """The same on every rank: a parameter (step -1) or its gradient."""
    generator = torch.Generator().manual_seed(1000 * list(SHAPES).index(name) + step + 1)
    return torch.randn(SHAPES[name], generator=generator) * (1 if step < 0 else 10.0 ** (step % 3 - 2))


def optimizer_on(mesh_shape, dtype, optim):
    """An optimizer whose parameters are sharded over the last dimension of a mesh; the mesh, or None: not sharded."""
    mesh = init_device_mesh("cpu", mesh_shape) if mesh_shape else None
    named = {name: torch.nn.Parameter(spread(values(name, -1).to(dtype), mesh)) for name in SHAPES}
    optimizer = Optimizer(named.items(), settings(optim), CPU)
    # Ranks sum up a norm in their own order; here the norm, and so the clip factor, is given.
    optimizer._global_loss_and_norm = lambda loss, gradients: (loss, torch.tensor(3.7))
    return optimizer, mesh


def spread(tensor, mesh):
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)] if mesh else None
    return distribute_tensor(tensor, mesh, placements) if mesh else tensor


def steps(optimizer, mesh, numbers):
    for step in numbers:
        for name, parameter in optimizer.parameters.items():
            parameter.grad = spread(values(name, step).to(parameter.dtype), mesh)
        optimizer.step(step, 1e-2 / (step + 1), torch.tensor(1.0))


def groups(optimizer):
    return {"model": optimizer.parameters, "optimizer": optimizer.state_tensors()}


def two_steps(rank, mesh_shape, dtype, optim, begin, load_from, save_to):
    optimizer, mesh = optimizer_on(mesh_shape, dtype, optim)
    if begin:
        for group, tensors in groups(optimizer).items():
            checkpoint.load_into(checkpoint.newest_valid(load_from), group, tensors)
    steps(optimizer, mesh, range(begin, begin + 2))
    checkpoint.save(save_to, 1, groups=groups(optimizer), state={})


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, optim",
    [(torch.float32, "adamw_8bit"), (torch.bfloat16, "adamw_8bit"), (torch.bfloat16, "adamw")],
    ids=["fp32-8bit", "bf16-8bit", "bf16-32bit"],
)
def test_any_sharding_gives_the_same_bits_and_goes_on_from_any_other(tmp_path, dtype, optim):
    """Two steps on one rank, two more on two ranks, then on four, on 2 × 2, on one: as ten steps on one."""
    straight, _ = optimizer_on(None, dtype, optim)
    source = None
    for stage, mesh_shape in enumerate([None, (2,), (4,), (2, 2), None]):
        target = tmp_path / str(stage)
        arguments = (mesh_shape, dtype, optim, 2 * stage, source, target)
        if mesh_shape:
            on_ranks(int(np.prod(mesh_shape)), two_steps, tmp_path, *arguments)
        else:
            two_steps(0, *arguments)
        steps(straight, None, range(2 * stage, 2 * stage + 2))
        for group, expected in groups(straight).items():
            found = checkpoint.read_full(checkpoint.newest_valid(target), group)
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (stage, name)
        source = target
    if optim == "adamw_8bit":
        state = straight.state_tensors()
        assert {name.split(".")[0] for name in state if "absmax" in name} == {"uneven", "few", "table"}
        assert state["table.absmax1"].shape == (130, 2) and state["table.state2"].dtype == torch.uint8


# --- the format


def test_state_is_that_of_bitsandbytes():
    """The second of three steps is bitsandbytes', from our state; the third ours again, from its."""
    from bitsandbytes.optim import AdamW8bit

    torch.manual_seed(0)
    ours, straight = (torch.nn.Parameter(p) for p in [torch.randn(20, 512)] * 2)
    gradients = [torch.randn(20, 512) for _ in range(3)]
    optimizers = [Optimizer([("weight", p)], settings(max_grad_norm=0.0), CPU) for p in (ours, straight)]
    for step in range(3):
        straight.grad = gradients[step].clone()
        optimizers[1].step(step, 1e-2, torch.tensor(1.0))
    ours.grad = gradients[0].clone()
    optimizers[0].step(0, 1e-2, torch.tensor(1.0))
    state = optimizers[0].state_tensors()

    theirs = torch.nn.Parameter(ours.detach().clone())
    other = AdamW8bit([theirs], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    theirs.grad = torch.zeros_like(theirs)
    other.step()  # makes the state
    assert {name for name in other.state[theirs] if name in NAMES} == set(NAMES)
    with torch.no_grad():
        theirs.copy_(ours)
    for name in NAMES:
        assert other.state[theirs][name].dtype == state[f"weight.{name}"].dtype
        other.state[theirs][name].copy_(state[f"weight.{name}"].view(other.state[theirs][name].shape))
    theirs.grad = gradients[1].clone()
    other.step()
    assert other.state[theirs]["step"] == 2
    with torch.no_grad():
        ours.copy_(theirs)
    for name in NAMES:
        state[f"weight.{name}"].copy_(other.state[theirs][name].view(state[f"weight.{name}"].shape))
    ours.grad = gradients[2].clone()
    optimizers[0].step(2, 1e-2, torch.tensor(1.0))
    # bitsandbytes on a CPU does not always take the nearest code: a few hundredths of a step of 1e-2.
    assert (ours - straight).abs().max() < 1e-3
    for name in ("absmax1", "absmax2"):
        torch.testing.assert_close(
            state[f"weight.{name}"], optimizers[1].state_tensors()[f"weight.{name}"], rtol=1e-2, atol=0
        )


@pytest.mark.slow
def test_follows_adamw_with_32_bits():
    """A quadratic, its minimum found by both."""
    torch.manual_seed(0)
    target = torch.randn(24, 256)
    ends = {}
    for optim, dtype in (("adamw", torch.float32), ("adamw_8bit", torch.float32), ("adamw_8bit", torch.bfloat16)):
        weight = torch.nn.Parameter(torch.zeros(24, 256, dtype=dtype))
        optimizer = Optimizer([("weight", weight)], settings(optim, weight_decay=0.0, max_grad_norm=0.0), CPU)
        for step in range(200):
            weight.grad = weight.detach() - target.to(dtype)
            optimizer.step(step, 0.1 * (1 - step / 200), torch.tensor(1.0))
        ends[optim, dtype] = (weight.detach() - target).square().mean().item()
    assert ends["adamw", torch.float32] < 1e-3
    assert ends["adamw_8bit", torch.float32] < 2e-3 and ends["adamw_8bit", torch.bfloat16] < 2e-3


# --- bf16 weights


@pytest.mark.slow
@pytest.mark.parametrize("optim, shape", [("adamw", (64, 100)), ("adamw_8bit", (64, 256)), ("adamw_8bit", (6400,))])
def test_bf16_weights_move_by_less_than_their_unit(optim, shape):
    """A hundred updates of 1e-4 each on weights of 1, whose units are 2^-8 and 2^-7: rounded to the nearest, all
    lost."""
    weight = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    optimizer = Optimizer([("weight", weight)], settings(optim, weight_decay=0.0, max_grad_norm=0.0), CPU)
    for step in range(100):
        weight.grad = torch.full(shape, 0.5, dtype=torch.bfloat16)
        optimizer.step(step, 1e-4, torch.tensor(1.0))
    assert weight.double().mean().item() == pytest.approx(1 - 100 * 1e-4, abs=3e-4)


def test_rounding_is_right_in_the_mean_and_keeps_what_is_exact():
    values = torch.full((2**15,), 1 + 0.3 * 2**-7)
    rounded = torch.empty(2**15, dtype=torch.bfloat16)
    round_into(rounded, values, first=0, seed=7, step=1)
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert (rounded > 1).double().mean().item() == pytest.approx(0.3, abs=0.015)
    exact = torch.randn(999).bfloat16()
    again = torch.empty_like(exact)
    round_into(again, exact.float(), first=5, seed=7, step=1)
    assert torch.equal(again, exact)


@pytest.mark.parametrize("begin, end", [(0, 13), (13, 14), (8, 1000), (999, 1000)])
def test_rounding_does_not_depend_on_where_a_tensor_is_cut(begin, end):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole, part = torch.empty(1000, dtype=torch.bfloat16), torch.empty(end - begin, dtype=torch.bfloat16)
    round_into(whole, values, first=40, seed=7, step=3)
    round_into(part, values[begin:end], first=40 + begin, seed=7, step=3)
    assert torch.equal(part, whole[begin:end])


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", [("adamw", torch.bfloat16), ("adamw_8bit", torch.float32)])
def test_bits_do_not_depend_on_how_much_is_worked_on_at_a_time(monkeypatch, name, dtype):
    found = []
    for chunk in (256, optim8bit.CPU_CHUNK, 2**24):
        monkeypatch.setattr("fastvid.training.optimizer.CPU_CHUNK", chunk)
        optimizer, _ = optimizer_on(None, dtype, name)
        steps(optimizer, None, range(2))
        found.append({**optimizer.parameters, **optimizer.state_tensors()})
    assert all(torch.equal(tensor, other[key]) for other in found[1:] for key, tensor in found[0].items())


def test_tensors_are_rounded_by_bits_of_their_own():
    ends = {}
    for name, seed in (("a", 1), ("b", 1), ("a", 2)):
        weight = torch.nn.Parameter(torch.ones(16, 256, dtype=torch.bfloat16))
        optimizer = Optimizer([(name, weight)], settings(seed=seed), CPU)
        weight.grad = torch.ones_like(weight)
        optimizer.step(0, 2e-3, torch.tensor(1.0))
        ends[name, seed] = weight.detach() < 1
    assert all(0.3 < end.float().mean() < 0.7 for end in ends.values())
    assert (ends["a", 1] != ends["b", 1]).float().mean() > 0.3 and (ends["a", 1] != ends["a", 2]).float().mean() > 0.3


# --- a run


@pytest.mark.slow
def test_a_resumed_run_of_8_bit_moments_and_bf16_weights_equals_a_straight_one(tmp_path):
    """Full fine-tuning; its end is exported, in bf16."""
    run = write_run(tmp_path / "run", hidden_size=256, intermediate_size=256)
    more = [
        "--tune_mm_mlp_adapter",
        "False",
        "--bf16",
        "True",
        "--master_dtype",
        "bfloat16",
        "--optim",
        "adamw_8bit",
        "--learning_rate",
        "1e-3",
        "--save_steps",
        "2",
        "--max_steps",
        "4",
        "--dataloader_num_workers",
        "0",
    ]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train.main(flags(run, straight, *more)) == 0
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    assert train.main(flags(run, resumed, *more)) == 0
    assert losses(resumed) == {step: losses(straight)[step] for step in (3, 4)}
    for group in ("model", "optimizer"):
        ours, theirs = (checkpoint.read_full(folder / "checkpoint-4", group) for folder in (resumed, straight))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        if group == "model":
            assert all(tensor.dtype == (torch.bfloat16, torch.float32)[tensor.ndim == 1] for tensor in ours.values())
            assert not torch.equal(
                ours["decoder.layers.0.qkv.weight"],
                checkpoint.read_full(straight / "checkpoint-2", group)["decoder.layers.0.qkv.weight"],
            )
    assert ours["decoder.layers.1.down.weight.state1"].dtype == torch.uint8
    assert "decoder.norm.weight.exp_avg" in ours
    with pytest.raises(ValueError, match="add --bf16 True"):
        train.main(flags(run, tmp_path / "x", *more, "--bf16", "False"))
    with safe_open(straight / "model" / "model.safetensors", "pt") as exported:
        assert {exported.get_slice(name).get_dtype() for name in exported.keys()} == {"BF16"}

    older, saved = tmp_path / "older", straight / "checkpoint-2"  # as written when norms were in bf16
    groups = {group: checkpoint.read_full(saved, group) for group in ("model", "optimizer")}
    groups["model"] = {name: tensor.bfloat16() for name, tensor in groups["model"].items()}
    checkpoint.save(older, 2, groups=groups, state=checkpoint.read_state(saved))
    assert train.main(flags(run, older, *more)) == 0
    ours, theirs = (checkpoint.read_full(folder / "checkpoint-4", "model") for folder in (older, straight))
    torch.testing.assert_close(ours["decoder.norm.weight"], theirs["decoder.norm.weight"], rtol=2**-7, atol=0)


# --- paged


def test_on_a_cpu_nothing_is_paged(caplog):
    caplog.set_level(logging.INFO, "fastvid")
    ends = []
    for optim in ("adamw_8bit", "paged_adamw_8bit"):
        weight = torch.nn.Parameter(torch.ones(16, 256))
        optimizer = Optimizer([("weight", weight)], settings(optim), CPU)
        weight.grad = torch.arange(4096.0).view(16, 256)
        optimizer.step(0, 1e-2, torch.tensor(1.0))
        ends.append(weight.detach())
    assert torch.equal(*ends) and "moments are paged on a GPU" in caplog.text


def test_paging_without_bitsandbytes_is_refused(monkeypatch):
    monkeypatch.setattr(optim8bit, "_on_gpu", lambda pieces: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes, or choose --optim adamw_8bit"):
        Optimizer([("weight", torch.nn.Parameter(torch.ones(16, 256)))], settings("paged_adamw_8bit"), CPU)


def test_managed_memory_is_described_as_it_lies():
    """numpy reads the same description of memory on the host."""
    for memory in (torch.arange(12, dtype=torch.uint8).view(3, 4), torch.randn(2, 5)):
        described = type("Described", (), {})()
        described.__array_interface__ = {**optim8bit._Managed(memory).__cuda_array_interface__, "version": 3}
        seen = np.asarray(described)
        assert np.array_equal(seen, memory.numpy())
        seen[1, 2] = 7
        assert memory[1, 2] == 7
