"""Checkpoints of several ranks: any number loads what any number saved, one rank's failure reaches all."""

import re

import pytest
import torch
from checkpoint_cases import assert_same, flip_a_bit, names_in, save_step
from ranks import on_ranks
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from fastvid.checkpoints import checkpoint, shards
from fastvid.checkpoints import folders as checkpoint_folders
from fastvid.dist.sharding import LocalShard, held_part


def whole_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "even": torch.randn(8, 3, generator=generator),
        "uneven": torch.randn(5, 2, generator=generator).bfloat16(),
        "one row": torch.randn(1, 4, generator=generator),
        "replicated": torch.arange(6.0),
        "codes": torch.randint(256, (10, 256), generator=generator, dtype=torch.uint8),
        "count": torch.tensor(12, dtype=torch.int64),
    }


def spread(tensors, mesh):
    """The tensors as this rank of `mesh` holds them; a 2-D mesh replicates over its first dimension."""
    last = mesh.size(mesh.ndim - 1)
    index = mesh.get_local_rank(mesh.ndim - 1)
    held = {}
    for name, tensor in tensors.items():
        if name == "count":
            held[name] = tensor.clone()
        elif name == "codes":  # cut where DTensor would not: everything but a row per rank lies on the last
            start, stop = index, index + 1 if index < last - 1 else len(tensor)
            held[name] = LocalShard(tensor[start:stop].clone(), tuple(tensor.shape), start)
        else:
            placement = Replicate() if name == "replicated" else Shard(0)
            held[name] = distribute_tensor(tensor.clone(), mesh, [Replicate()] * (mesh.ndim - 1) + [placement])
    return held


def save_and_load_spread(rank, mesh_shape, load_from, save_to):
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicas", "shards")[-len(mesh_shape) :])
    tensors = whole_tensors()
    held = spread({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, mesh)
    path = checkpoint.newest_valid(load_from)
    checkpoint.load_into(path, "model", held)
    for name, expected in spread(tensors, mesh).items():
        expected, shard = held_part(expected)[0], held_part(held[name])[0]
        assert torch.equal(shard.local, expected.local), name
        assert (shard.offset, shard.shape) == (expected.offset, expected.shape), name
    rows = {name: len(held_part(tensor)[0].local) for name, tensor in held.items() if name != "count"}
    checkpoint.save(save_to, 1, groups={"model": held}, state={"rank": rank})
    return rows


@pytest.mark.slow
def test_any_number_of_ranks_loads_what_any_number_saved(tmp_path):
    tensors = whole_tensors()
    checkpoint.save(tmp_path / "a", 1, groups={"model": tensors}, state={})
    rows = {}
    for source, target, mesh_shape in [("a", "b", (2,)), ("b", "c", (4,)), ("c", "d", (2, 2)), ("d", "e", (1,))]:
        ranks = 4 if mesh_shape == (2, 2) else mesh_shape[0]
        rows[target] = on_ranks(ranks, save_and_load_spread, tmp_path, mesh_shape, tmp_path / source, tmp_path / target)
        path = checkpoint.newest_valid(tmp_path / target)
        assert checkpoint.read_state(path) == {"rank": 0}
        assert_same(checkpoint.read_full(path, "model"), tensors)
    assert [rank["uneven"] for rank in rows["c"]] == [2, 2, 1, 0]
    assert [rank["codes"] for rank in rows["c"]] == [1, 1, 1, 7]
    # Only the first replica writes DTensors: ranks 2 and 3 of 2 x 2 have nothing but their LocalShard to write.
    names = {name for name in names_in(tmp_path / "d" / "checkpoint-1") if name.startswith("model-")}
    assert names == {f"model-{rank:05d}-of-00004.safetensors" for rank in range(4)}
    with checkpoint.shards.safe_open(tmp_path / "d/checkpoint-1/model-00003-of-00004.safetensors", "pt") as file:
        assert list(file.keys()) == ["codes"]


def train_sharded(rank, folder):
    from torch.distributed.fsdp import fully_shard

    def build(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model, optimizer):
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def moments(model, optimizer):
        return {
            f"{name}.{key}": value
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state[parameter].items()
        }

    model, optimizer = build(0)
    step(model, optimizer)
    checkpoint.save(
        folder, 1, state={}, groups={"model": dict(model.named_parameters()), "optimizer": moments(model, optimizer)}
    )
    straight = [step(model, optimizer) for _ in range(3)]

    model, optimizer = build(1)
    step(model, optimizer)
    path = checkpoint.newest_valid(folder)
    checkpoint.load_into(path, "model", dict(model.named_parameters()))
    checkpoint.load_into(path, "optimizer", moments(model, optimizer))
    assert [step(model, optimizer) for _ in range(3)] == straight


@pytest.mark.slow
def test_sharded_training_resumes_bit_for_bit(tmp_path):
    on_ranks(2, train_sharded, tmp_path, tmp_path / "out")


def plan_of_rows(held, *pieces):
    """`shards._plan` for rows [start, stop) of ten, from files that hold the [start, stop) of `pieces`."""
    shard = LocalShard(torch.zeros(held[1] - held[0], 2), (10, 2), held[0])
    plan, complete = shards._plan(
        shard, [shards._Piece(None, (10, 2), torch.float32, start, stop - start) for start, stop in pieces]
    )
    return [(rows.start, rows.stop) for _, _, rows in plan], complete


def test_only_the_rows_needed_are_read():
    assert plan_of_rows((3, 6), (0, 4), (4, 8), (8, 10)) == ([(3, 4), (0, 2)], True)
    assert plan_of_rows((0, 10), (0, 4), (0, 4), (4, 10)) == ([(0, 4), (0, 6)], True)
    assert plan_of_rows((4, 4), (0, 10)) == ([], True)
    assert plan_of_rows((0, 10), (0, 4), (5, 10)) == ([(0, 4)], False)


def fail_on_rank_one(rank, folder, kind):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if rank == 1 and kind == "full":
        shards.save_file = full
    if rank == 1 and kind == "apart":
        folder = folder.with_name("another machine")
    if rank == 1 and kind == "apart, left over":
        folder = folder.with_name("another machine")
        (folder / ".checkpoint-2.tmp").mkdir(parents=True)
    state = {"bad": object()} if rank == 1 and kind == "defect" else {"step": 2}
    mesh = init_device_mesh("cpu", (2,))
    groups = {"model": {"weight": distribute_tensor(torch.ones(4), mesh, [Shard(0)])}}
    try:
        checkpoint.save(folder, 2, groups=groups, state=state)
    except (OSError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, reason",
    [
        ("full", "rank 1: OSError: .*No space left"),
        ("apart", "rank 1: FileNotFoundError: .*file system that all ranks share"),
        ("apart, left over", "rank 0: FileNotFoundError: .*00001-of-00002.* file system that all ranks share"),
    ],
)
def test_one_rank_s_failure_reaches_all(tmp_path, kind, reason):
    folder = tmp_path / "out"
    save_step(folder, 1)
    for message in on_ranks(2, fail_on_rank_one, tmp_path, folder, kind):
        assert re.search(reason, message), message
    assert names_in(folder) == ["checkpoint-1"]


@pytest.mark.slow
def test_a_defect_keeps_its_type_on_its_rank_and_stops_the_others(tmp_path):
    other, own = on_ranks(2, fail_on_rank_one, tmp_path, tmp_path / "out", "defect")
    assert other.startswith("OSError: checkpoint: rank 1: TypeError") and own.startswith("TypeError")


def look(rank, folder):
    reports = []
    checkpoint_folders.log.warning = lambda *told: reports.append(told[0] % told[1:])
    newest = checkpoint.newest_valid(folder)
    return newest and newest.name, reports


@pytest.mark.slow
def test_all_ranks_agree_on_the_newest_valid(tmp_path):
    folder = tmp_path / "out"
    for step in (5, 10):
        save_step(folder, step)
    flip_a_bit(folder / "checkpoint-10" / "state.json")
    (first, reports), second = on_ranks(2, look, tmp_path, folder)
    assert first == "checkpoint-5" and "state.json" in reports[0]
    assert second == ("checkpoint-5", reports)  # a run has the others silent
