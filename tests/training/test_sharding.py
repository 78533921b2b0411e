"""Layouts of a model over 1, 2 and 4 ranks: the same training, what the ranks say to each other, and in what order."""

import pytest
import torch
import torch.distributed as dist
from model_cases import (
    ADAPTER,
    FULL,
    loss_and_gradients,
    model_config,
    pack,
    random_batch,
    random_model,
    random_sample,
)
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from training_run import config_of, write_run

from fastvid import train
from fastvid.checkpoints import checkpoint
from fastvid.config import TrainConfig
from fastvid.dist import parallel
from fastvid.dist.sharding import full_tensor
from fastvid.training.optimizer import Optimizer

CPU = torch.device("cpu")
SAMPLES = 4
ALONE = parallel.World(0, 1, 0, CPU, False)


def world_of(rank, local_size=2):
    size = dist.get_world_size()
    return parallel.World(rank, size, rank % local_size, CPU, size > 1, local_size)


# --- training


class Trainer:
    """Steps of a model whose matrices have rows of whole blocks, over a fixed set of samples, each rank its share."""

    def __init__(self, world, layout, *, dtype=torch.float32, optim="adamw_8bit", shard_size=None, layers=3):
        model = random_model(
            model_config(mm_hidden_size=256, hidden_size=256, intermediate_size=256, num_layers=layers, head_dim=64),
            FULL,
            compute_dtype=dtype,
            trained_dtype=dtype,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter *= 0.25  # of a width of 256: differences do not grow from layer to layer
        parallel.shard(model, world, layout, shard_size=shard_size)
        self.model, self.world = model, world
        config = TrainConfig(model_name_or_path="", data_path=[], output_dir="", optim=optim, weight_decay=0.1)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.optimizer = Optimizer(named, config, CPU)
        generator = torch.Generator().manual_seed(0)
        samples = [random_sample(generator, text=(5 + i, 4)) for i in range(SAMPLES)]
        features = torch.randn(SAMPLES, 6, 256, generator=generator)
        self.batches = []
        for i in range(world.rank, SAMPLES, world.size):
            batch = pack(samples[i : i + 1], channels=256)
            batch.features.copy_(features[i])
            self.batches.append(batch)

    def step(self, step):
        """(loss, gradient norm) of an update."""
        total = torch.zeros(())
        for i, batch in enumerate(self.batches):
            parallel.set_gradient_sync(self.model, i == len(self.batches) - 1)
            loss = self.model(batch) / (3 * SAMPLES)
            loss.backward()
            total += loss.detach()
        parallel.sum_replicated_gradients(self.optimizer.parameters.values(), self.world)
        loss, norm = self.optimizer.step(step, 1e-4, total)
        return loss.item(), norm.item()

    def groups(self):
        return {"model": self.optimizer.parameters, "optimizer": self.optimizer.state_tensors()}


# (ranks, layout, ranks that hold a copy)
STAGES = [(2, "full", None), (4, "hybrid", 2), (4, "full", None), (2, "trained", None), (1, "replicated", None)]


def two_steps(rank, layout, shard_size, begin, load_from, save_to):
    trainer = Trainer(world_of(rank), layout, shard_size=shard_size)
    if begin:
        for group, tensors in trainer.groups().items():
            checkpoint.load_into(checkpoint.newest_valid(load_from), group, tensors)
    losses = [trainer.step(step) for step in range(begin, begin + 2)]
    checkpoint.save(save_to, 1, groups=trainer.groups(), state={})
    return losses


@pytest.mark.slow
def test_8_bit_training_over_changing_ranks_and_layouts_is_one_run(tmp_path):
    straight = Trainer(ALONE, "replicated")
    source = None
    for stage, (ranks, layout, shard_size) in enumerate(STAGES):
        target = tmp_path / str(stage)
        found = on_ranks(ranks, two_steps, tmp_path, layout, shard_size, 2 * stage, source, target)
        expected = [straight.step(step) for step in range(2 * stage, 2 * stage + 2)]
        for results in found:
            for (loss, norm), (expected_loss, expected_norm) in zip(results, expected):
                assert loss == pytest.approx(expected_loss, rel=1e-5), (layout, stage)
                assert norm == pytest.approx(expected_norm, rel=1e-3), (layout, stage)
        source = target
    assert expected[-1][0] < 0.9 * Trainer(ALONE, "replicated").step(0)[0]
    # Of two copies the first is written: by the two ranks that hold it.
    writers = {path.name[-23:-21] for path in (tmp_path / "1" / "checkpoint-1").glob("optimizer-*")}
    assert len(writers) == 2
    hybrid, full = (
        sum(path.stat().st_size for path in (tmp_path / stage / "checkpoint-1").glob("*.safetensors"))
        for stage in ("1", "2")
    )
    assert hybrid == pytest.approx(full, rel=0.01)


def bf16_steps(rank):
    trainer = Trainer(world_of(rank), "full", dtype=torch.bfloat16)
    steps = [trainer.step(step) for step in range(4)]
    for parameter in trainer.optimizer.parameters.values():
        assert parameter.dtype == (torch.bfloat16 if parameter.ndim > 1 else torch.float32)
    return steps


@pytest.mark.slow
def test_bf16_weights_are_trained_sharded_as_whole(tmp_path):
    """To what bf16 gradients are worth: sharded ones are summed in fp32."""
    straight = Trainer(ALONE, "replicated", dtype=torch.bfloat16)
    expected = [straight.step(step) for step in range(4)]
    for found in on_ranks(2, bf16_steps, tmp_path):
        for ours, theirs in zip(found, expected):
            assert ours == pytest.approx(theirs, rel=0.03)
    assert expected[-1][0] < 0.9 * expected[0][0]


# (layout, what is trained, recomputation)
PRECISE = [
    ("trained", ADAPTER, "none"),
    ("full", ADAPTER, "none"),
    ("full", FULL, "none"),
    ("full", FULL, "full"),
    ("trained", ADAPTER, 1),
    ("full", ADAPTER, 1),
    ("full", FULL, 1),
]


def precise(trainable, recompute):
    return random_model(
        model_config(num_kv_heads=2), trainable, torch.bfloat16, fp32_residual=True, recompute=recompute
    )


def precise_gradients(rank):
    found = []
    for layout, trainable, recompute in PRECISE:
        model = precise(trainable, recompute)
        parallel.shard(model, world_of(rank), layout)
        loss, gradients = loss_and_gradients(model, random_batch())
        parallel.sum_replicated_gradients([p for p in model.parameters() if p.requires_grad], world_of(rank))
        found.append((loss, {name: full_tensor(gradient) for name, gradient in gradients.items()}))
    return found


@pytest.mark.slow
def test_an_fp32_residual_stream_has_the_same_bits_sharded(tmp_path):
    """Embeddings and norms are rounded nowhere, as autocast leaves them; both ranks have the same samples."""
    for found in on_ranks(2, precise_gradients, tmp_path):
        for (loss, gradients), (layout, *options) in zip(found, PRECISE):
            expected_loss, expected = loss_and_gradients(precise(*options), random_batch())
            assert loss == expected_loss, (layout, options)
            assert gradients.keys() == expected.keys()
            assert all(torch.equal(gradients[name], 2 * expected[name]) for name in expected), (layout, options)


def test_copies_must_fill_the_ranks():
    world = parallel.World(0, 6, 0, CPU, True, 4)
    assert parallel.choose_layout("hybrid", world, decoder_is_trained=False, fits=True) == "hybrid"
    assert parallel.choose_layout("hybrid", ALONE, decoder_is_trained=True, fits=True) == "replicated"
    assert parallel.ranks_of_a_copy("hybrid", world, 3) == 3
    assert parallel.ranks_of_a_copy("hybrid", parallel.World(0, 8, 0, CPU, True, 4)) == 4
    assert [parallel.ranks_of_a_copy(layout, world) for layout in ("replicated", "trained", "full")] == [1, 6, 6]
    for shard_size in (None, 1):
        with pytest.raises(
            ValueError, match=f"copies of {shard_size or 4} of 6 ranks: give a --shard_size of 2 or more"
        ):
            parallel.ranks_of_a_copy("hybrid", world, shard_size)


# --- what is said


class Collectives(TorchDispatchMode):
    """Bytes that this rank sends in each kind of collective, by the ring algorithms, and how many there are."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls, self.order = {}, {}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function._overloadpacket.__name__
            kind = next(
                (kind for kind in ("allgather", "reduce_scatter", "allreduce", "barrier") if kind in name), None
            )
            assert kind, f"{name} is not counted"
            size = max(sum(t.nbytes for t in _tensors(argument)) for argument in args)
            share = (dist.get_world_size() - 1) / dist.get_world_size()
            self.bytes[kind] = self.bytes.get(kind, 0) + size * share * (2 if kind == "allreduce" else 1)
            self.calls[kind] = self.calls.get(kind, 0) + 1
            self.order.append(kind)
        return function(*args, **(kwargs or {}))


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, (list, tuple)) else []


def counted_steps(rank, run, output, modes):
    said = []
    for options in modes:
        state = train.build(config_of(run, output, *options), world_of(rank))
        steps = state.loader.iterate(0)
        train.train_step(state, *next(steps))  # FSDP2 sets itself up in the first
        with Collectives() as collectives:
            train.train_step(state, *next(steps))
        trained = [p for p in state.model.parameters() if p.requires_grad]
        said.append((collectives.bytes, collectives.calls, sum(4 * p.numel() for p in trained)))
    return said


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_adapter_training_says_little(tmp_path, ranks):
    """At most twice the bytes of what is trained, nothing of what is frozen, however many micro-batches a step has."""
    run = write_run(tmp_path / "run")
    modes = [
        [
            "--per_device_train_batch_size",
            "1",
            "--gradient_accumulation_steps",
            accumulation,
            "--shard",
            shard,
            "--dataloader_num_workers",
            "0",
        ]
        for shard in ("auto", "none")
        for accumulation in ("1", "3")
    ]
    for found in on_ranks(ranks, counted_steps, tmp_path, run, tmp_path / "out", modes):
        for options, (sent, calls, trained) in zip(modes, found):
            if ranks == 1:
                assert not sent.keys() - {"allreduce"} and sum(sent.values()) == 0
                continue
            assert sum(sent.values()) <= 2 * trained, (options, sent, trained)
            assert sent.get("allgather", 0) <= trained, (options, sent, trained)
            if "auto" in options:  # projector and boundary rows, each gathered and reduced once
                assert calls["allgather"] == calls["reduce_scatter"] == 2
            else:
                assert not calls.keys() - {"allreduce"}


def order_of_a_step(rank):
    trainer = Trainer(world_of(rank), "full", optim="adamw", layers=4)
    trainer.batches = trainer.batches[:1]
    trainer.step(0)
    collectives = Collectives()
    events = collectives.order
    for i, layer in enumerate(trainer.model.decoder.layers):
        layer.qkv.register_forward_pre_hook(lambda module, args, i=i: events.append(f"layer {i}"))
        layer.qkv.register_forward_hook(
            lambda module, args, out, i=i: out.register_hook(lambda gradient: events.append(f"back {i}")) and None
        )
    with collectives:
        trainer.step(1)
    return events


@pytest.mark.slow
def test_the_next_layer_is_gathered_while_one_computes(tmp_path):
    events = on_ranks(2, order_of_a_step, tmp_path)[0]
    gathered = [
        events[: events.index(name)].count("allgather")
        for name in ("layer 0", "layer 1", "layer 2", "layer 3", "back 3", "back 2", "back 1", "back 0")
    ]
    first = gathered[0]
    # The root, the projector, layers 0 and 1 before layer 0 computes; in backward the last layer and the one before.
    assert gathered == [first, first + 1, first + 2, first + 2, first + 4, first + 5, first + 6, first + 6]
    assert first == 4
