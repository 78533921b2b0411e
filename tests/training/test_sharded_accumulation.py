"""Gradients over micro-batches on ranks that shard the model: their sum, what a rank keeps, what it says meanwhile."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from model_cases import FULL, assert_close, model_config, random_batch, random_model
from ranks import on_ranks
from test_sharding import Collectives
from torch.distributed.tensor import DTensor
from training_run import config_of, write_run

from fastvid import train
from fastvid.dist import parallel
from fastvid.dist.sharding import full_tensor
from fastvid.training import planning
from fastvid.training.live_bytes import LiveBytes

CPU = torch.device("cpu")
MICRO_BATCHES = 3
# (ranks, layout, ranks that hold a copy)
LAYOUTS = [(2, "full", None), (2, "trained", None), (4, "hybrid", 2)]


def model_of(layout="replicated", world=None, shard_size=None, dtype=torch.float32, adds_up_shards=False):
    model = random_model(
        model_config(hidden_size=64, intermediate_size=128, head_dim=16), FULL, compute_dtype=dtype, trained_dtype=dtype
    )
    if world:
        parallel.shard(model, world, layout, shard_size=shard_size, adds_up_shards=adds_up_shards)
    return model


def backward(model, seed, *, last, accumulate_whole):
    parallel.set_gradient_sync(model, last, accumulate_whole=accumulate_whole)
    model(random_batch(seed)).backward()


def accumulated(rank, layout, shard_size, dtype, micro_batches):
    """For both ways: (whole gradients, bytes per parameter kept between micro-batches, collectives before the last)."""
    size = dist.get_world_size()
    world = parallel.World(rank, size, rank, CPU, True, 2)
    found = []
    for accumulate_whole in (False, True):
        model = model_of(layout, world, shard_size, dtype, adds_up_shards=not accumulate_whole)
        seeds = [rank + size * i for i in range(micro_batches)]
        for _ in range(2):  # FSDP2 sets itself up in the first step
            model.zero_grad()
            with LiveBytes() as live, Collectives() as collectives:
                for seed in seeds[:-1]:
                    backward(model, seed, last=False, accumulate_whole=accumulate_whole)
            kept = live.now / sum(p.numel() for p in model.parameters())
            backward(model, seeds[-1], last=True, accumulate_whole=accumulate_whole)
        parallel.sum_replicated_gradients(model.parameters(), world)
        gradients = {name: full_tensor(p.grad) for name, p in model.named_parameters()}
        found.append((gradients, kept, collectives.calls))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks, layout, shard_size", LAYOUTS)
def test_sums_over_micro_batches_are_one_process_s(tmp_path, ranks, layout, shard_size):
    model = model_of()
    for seed in range(ranks * MICRO_BATCHES):
        model(random_batch(seed)).backward()
    for found in on_ranks(ranks, accumulated, tmp_path, layout, shard_size, torch.float32, MICRO_BATCHES):
        for gradients, _, _ in found:
            for name, parameter in model.named_parameters():
                assert_close(gradients[name], parameter.grad)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, layout, shard_size", LAYOUTS)
def test_a_rank_keeps_its_shard_between_micro_batches(tmp_path, ranks, layout, shard_size):
    for found in on_ranks(ranks, accumulated, tmp_path, layout, shard_size, torch.float32, MICRO_BATCHES):
        (_, shard, reduced), (_, whole, accumulated_whole) = found
        # Bytes: of two ranks, one half.
        assert shard == pytest.approx(2, rel=0.02) and whole == pytest.approx(4, rel=0.02)
        # Copies of the model speak in the last micro-batch alone.
        assert "allreduce" not in reduced and reduced["reduce_scatter"] > 0
        assert not accumulated_whole.keys() & {"allreduce", "reduce_scatter"}


@pytest.mark.slow
def test_bf16_gradients_are_summed_in_fp32(tmp_path):
    """Rounded once, whichever way: 16 shares of a gradient that were rounded one after the other would lose more."""
    micro_batches = 16
    model = model_of(dtype=torch.bfloat16)
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for seed in range(2 * micro_batches):
        model.zero_grad()
        model(random_batch(seed)).backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad
    for found in on_ranks(2, accumulated, tmp_path, "full", None, torch.bfloat16, micro_batches):
        for gradients, _, _ in found:
            for name, exact in sums.items():
                assert gradients[name].dtype == (torch.bfloat16 if gradients[name].ndim > 1 else torch.float32)
                rounded = exact.to(torch.bfloat16).double()
                error, least = ((x - exact).norm() for x in (gradients[name].double(), rounded))
                assert error <= 1.01 * least, name


def sums_over_copies(rank, run, output):
    """Per way to train in bf16 weights: (all-reduces of a step, whether the mesh has copies)."""
    said, world = [], parallel.World(rank, 2, rank, CPU, True, 2)
    for accumulation, gib in ((1, 1), (2, 1), (2, 0)):  # with 1 GiB whole gradients fit
        parallel.device_memory = lambda world: gib * 2**30
        state = train.build(
            config_of(
                run,
                output,
                "--tune_mm_mlp_adapter",
                "False",
                "--shard",
                "full",
                "--bf16",
                "True",
                "--master_dtype",
                "bfloat16",
                "--gradient_accumulation_steps",
                str(accumulation),
                "--per_device_train_batch_size",
                "1",
                "--dataloader_num_workers",
                "0",
            ),
            world,
        )
        steps = state.loader.iterate(0)
        train.train_step(state, *next(steps))
        with Collectives() as collectives:
            train.train_step(state, *next(steps))
        meshes = {p.device_mesh.ndim for p in state.model.parameters() if isinstance(p, DTensor)}
        said.append((collectives.calls["allreduce"], meshes))
    return said


@pytest.mark.slow
def test_bf16_weights_have_copies_only_where_shards_of_gradients_are_added_up(tmp_path):
    """A copy alone has nobody to sum with, and yet each unit of FSDP2 would, every step."""
    for once, whole, each in on_ranks(2, sums_over_copies, tmp_path, write_run(tmp_path / "run"), tmp_path / "out"):
        assert once[1] == whole[1] == {1} and each[1] == {2}
        assert once[0] == whole[0] < each[0]


@pytest.mark.slow
@pytest.mark.parametrize("gib, whole", [(1, True), (0, False)])
def test_whole_gradients_are_added_up_where_they_fit(tmp_path, monkeypatch, caplog, gib, whole):
    run = write_run(tmp_path / "run")
    monkeypatch.setattr(parallel, "device_memory", lambda world: gib * 2**30)
    monkeypatch.setattr(parallel, "choose_layout", lambda *args, **options: "full")
    plan = planning.plan

    def planned(*args):
        plans.append(plan(*args))
        return dataclasses.replace(plans[-1], layout="replicated")

    plans = []
    monkeypatch.setattr(planning, "plan", planned)
    with caplog.at_level("INFO", "fastvid"):
        state = train.build(
            config_of(run, tmp_path, "--gradient_accumulation_steps", "2"), parallel.World(0, 1, 0, CPU, False)
        )
    assert plans[0].layout == "full" and state.plan.accumulate_whole == whole
    assert ("every micro-batch's gradient is reduced" in caplog.text) != whole
