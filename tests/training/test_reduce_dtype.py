"""What ranks send gradients in: bfloat16 rounds a rank's sum once, and float32 nothing."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_sharded_accumulation import MICRO_BATCHES, backward, model_of
from test_sharding import Collectives, counted_steps
from training_run import flags, write_run

from fastvid import train
from fastvid.dist import parallel
from fastvid.dist.sharding import full_tensor

CPU = torch.device("cpu")
DTYPES = {"as before": {}, "float32": {"reduce_dtype": torch.float32}, "bfloat16": {"reduce_dtype": torch.bfloat16}}


def own_gradients(rank):
    """{name: of each micro-batch} of a rank by itself, in the order in which it adds them up."""
    found = []
    for i in range(MICRO_BATCHES):
        model = model_of()
        backward(model, rank + 2 * i, last=True, accumulate_whole=False)
        found.append({name: p.grad for name, p in model.named_parameters()})
    return {name: [each[name] for each in found] for name in found[0]}


def summed(rank, layout, shard_size, accumulate_whole):
    """{dtype: (whole gradients, bytes that this rank sent by kind)}."""
    size, found = dist.get_world_size(), {}
    world = parallel.World(rank, size, rank, CPU, True, 2)
    for name, options in DTYPES.items():
        model = model_of()
        parallel.shard(model, world, layout, shard_size=shard_size, adds_up_shards=not accumulate_whole, **options)
        with Collectives() as collectives:
            for i in range(MICRO_BATCHES):
                last = i == MICRO_BATCHES - 1
                backward(model, rank + 2 * i, last=last, accumulate_whole=accumulate_whole)
            parallel.sum_replicated_gradients(model.parameters(), world, **options)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        gradients = {name: full_tensor(p.grad) for name, p in model.named_parameters()}
        found[name] = gradients, collectives.bytes
    return found


def rounded(tensor):
    return tensor.bfloat16().float()


@pytest.mark.slow
@pytest.mark.parametrize("accumulate_whole", [True, False])
@pytest.mark.parametrize("layout", ["full", "trained", "replicated"])
def test_what_two_ranks_send_is_rounded_once(tmp_path, layout, accumulate_whole):
    """Micro-batches are added up in fp32, before what is sent or after it."""
    ranks = [own_gradients(rank) for rank in range(2)]
    kind = "allreduce" if layout == "replicated" else "reduce_scatter"
    whole = accumulate_whole or layout == "replicated"
    for found in on_ranks(2, summed, tmp_path, layout, None, accumulate_whole):
        (before, sent_before), (exact, _), (gradients, sent) = found.values()
        for name, gradient in gradients.items():
            assert torch.equal(exact[name], before[name])
            shares = [[sum(rank[name])] if whole else rank[name] for rank in ranks]
            expected = sum(rounded(sum(map(rounded, pair))) for pair in zip(*shares))
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9, msg=name)
            torch.testing.assert_close(gradient, exact[name], rtol=2**-6, atol=2**-7 * exact[name].abs().max().item())
        assert not torch.equal(gradients["embed.weight"], exact["embed.weight"])
        assert sent[kind] == sent_before[kind] / 2 > 0


@pytest.mark.slow
def test_copies_of_a_hybrid_model_sum_in_fp32(tmp_path):
    for found in on_ranks(4, summed, tmp_path, "hybrid", 2, True):
        (_, before), (exact, _), (gradients, sent) = found.values()
        assert sent["reduce_scatter"] == before["reduce_scatter"] / 2
        assert sent["allreduce"] == before["allreduce"] > 0
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, exact[name], rtol=2**-6, atol=2**-7 * exact[name].abs().max().item())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_the_flag_decides_what_a_step_sends(run, tmp_path):
    modes = [
        ["--shard", shard, "--reduce_dtype", dtype, "--dataloader_num_workers", "0"]
        for shard in ("auto", "none")
        for dtype in ("float32", "bfloat16")
    ]
    for found in on_ranks(2, counted_steps, tmp_path, run, tmp_path / "out", modes):
        (sharded, _, trained), (halved, *_), (replicated, *_), (rounded, *_) = found
        assert halved["reduce_scatter"] == sharded["reduce_scatter"] / 2
        assert replicated["allreduce"] - rounded["allreduce"] == trained / 2
        assert trained <= replicated["allreduce"] <= trained + 1000


@pytest.mark.slow
def test_a_resumed_run_keeps_it_and_one_process_sends_nothing(run, tmp_path, caplog):
    argv = flags(run, tmp_path, "--max_steps", "1", "--dataloader_num_workers", "0")
    assert train.main(argv) == 0
    assert "--reduce_dtype" not in caplog.text
    with pytest.raises(ValueError, match="--reduce_dtype was 'float32', is 'bfloat16'"):
        train.main([*argv, "--reduce_dtype", "bfloat16"])
    assert "--reduce_dtype bfloat16: there is one process, which sends no gradients" in caplog.text
