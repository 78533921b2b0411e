"""The average of what is trained: what it is, who takes it, and that a run goes on with it."""

import pytest
import torch
from model_cases import assert_close
from ranks import on_ranks
from safetensors.torch import load_file
from training_run import config_of, flags, losses, write_run

from fastvid import export, train
from fastvid.checkpoints import checkpoint
from fastvid.dist import parallel
from fastvid.dist.sharding import full_tensor
from fastvid.training.average import Average

CPU = torch.device("cpu")
ALONE = parallel.World(0, 1, 0, CPU, False)
DECAY, STEPS = 0.6, 5
AVERAGED = ["--ema_decay", str(DECAY), "--lr_scheduler_type", "constant", "--learning_rate", "0.01"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("average"))


def averaged(history):
    """What the last of a run's weights are averaged to, written out: [{name: tensor} before and after each step]."""
    value = {name: tensor.double() for name, tensor in history[0].items()}
    for step, weights in enumerate(history[1:]):
        kept = min(DECAY, (1 + step) / (10 + step))
        value = {name: kept * value[name] + (1 - kept) * weights[name].double() for name in value}
    return value


def steps_of(state, count=STEPS):
    """The weights before and after each step."""
    history = [{name: full_tensor(p).clone() for name, p in state.optimizer.parameters.items()}]
    for batches, _ in state.loader.iterate(state.step):
        train.train_step(state, batches)
        history.append({name: full_tensor(p).clone() for name, p in state.optimizer.parameters.items()})
        if len(history) > count:
            return history
    raise AssertionError("the run is shorter")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [[], ["--tune_mm_mlp_adapter", "False", "--bf16", "True", "--master_dtype", "bfloat16"]]
)
def test_it_is_the_average_of_the_steps_weights_and_validation_takes_it(made, tmp_path, words):
    words = [*AVERAGED, *words, "--eval_data_path", str(made / "train.json")]
    state = train.build(config_of(made, tmp_path, *words), ALONE)
    history = steps_of(state)
    for name, expected in averaged(history).items():
        assert state.average.values[name].dtype == torch.float32
        assert_close(state.average.values[name], expected)
    found = train.evaluate(state)
    for name, p in state.optimizer.parameters.items():
        assert torch.equal(p, history[-1][name]), "validation leaves the weights as they were"
    last, state.average = state.average, None
    plain = train.evaluate(state)
    for name, p in state.optimizer.parameters.items():
        p.data.copy_(last.values[name])
    assert train.evaluate(state) == found != plain


@pytest.mark.slow
def test_the_weights_are_there_again_after_a_validation_that_fails_or_is_stopped(made, tmp_path, monkeypatch):
    state = train.build(config_of(made, tmp_path, *AVERAGED, "--eval_data_path", str(made / "train.json")), ALONE)
    weights = steps_of(state, 2)[-1]

    def fails(batch):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(state.model, "forward", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            train.evaluate(state)
    state.stop_signal = 15
    assert train.evaluate(state) is None
    assert all(torch.equal(p, weights[name]) for name, p in state.optimizer.parameters.items())


def test_a_step_that_is_not_finite_is_left_out():
    weight = torch.nn.Parameter(torch.ones(3))
    average = Average({"w": weight}, 0.5)
    weight.data.fill_(3.0)
    average.update(20, torch.tensor(20))
    assert torch.equal(average.values["w"], torch.ones(3))
    average.update(20, torch.tensor(-1))
    assert torch.equal(average.values["w"], torch.full((3,), 2.0))


@pytest.mark.slow
def test_results_exports_and_a_resumed_run_take_it(made, tmp_path):
    out, told = tmp_path / "out", [*AVERAGED, "--logging_steps", "1", "--save_steps", "2", "--max_steps"]
    assert train.main(flags(made, tmp_path / "whole", *told, "4")) == 0
    assert train.main(flags(made, out, *told, "2")) == 0
    assert train.main(flags(made, out, *told, "4")) == 0
    assert losses(out) == losses(tmp_path / "whole")
    state = train.build(config_of(made, tmp_path / "x", *AVERAGED), ALONE)
    history = steps_of(state, 4)
    kept = {group: checkpoint.read_full(out / "checkpoint-4", group) for group in ("model", "training")}
    for name, expected in averaged(history).items():
        assert torch.equal(kept["training"][name], history[-1][name])
        assert_close(kept["model"][name], expected)
    projector = load_file(out / "mm_projector.safetensors")
    for name, tensor in kept["model"].items():
        if name.startswith("projector."):
            assert torch.equal(projector[f"model.mm_{name}"], tensor)
    exported = tmp_path / "exported.safetensors"
    assert export.main(["--checkpoint", str(out / "checkpoint-4"), "--output", str(exported)]) == 0
    found = load_file(exported)
    assert found.keys() == projector.keys() and all(torch.equal(found[name], projector[name]) for name in found)


@pytest.mark.slow
def test_a_run_without_it_does_not_go_on_with_it(made, tmp_path):
    assert train.main(flags(made, tmp_path, "--max_steps", "2", "--save_steps", "1")) == 0
    with pytest.raises(ValueError, match="--ema_decay was None, is 0.6"):
        train.main(flags(made, tmp_path, "--max_steps", "4", "--ema_decay", "0.6"))


def _of_rank(rank, folder, output, layout):
    world = parallel.World(rank, 2, rank, CPU, True, 2)
    words = [*AVERAGED, "--tune_mm_mlp_adapter", "False", "--shard", layout, "--per_device_train_batch_size", "1"]
    state = train.build(config_of(folder, output, *words, "--eval_data_path", str(folder / "train.json")), world)
    steps_of(state, 3)
    loss = train.evaluate(state)
    return loss, {name: full_tensor(tensor) for name, tensor in state.average.tensors().items()}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["none", "full"])
def test_ranks_average_what_one_process_does(made, tmp_path, layout):
    words = [*AVERAGED, "--tune_mm_mlp_adapter", "False", "--eval_data_path", str(made / "train.json")]
    alone = train.build(config_of(made, tmp_path / "alone", *words), ALONE)
    steps_of(alone, 3)
    loss = train.evaluate(alone)
    for found, tensors in on_ranks(2, _of_rank, tmp_path, made, tmp_path / "ranks", layout):
        assert found == pytest.approx(loss, rel=1e-4)
        for name, value in alone.average.values.items():
            assert_close(tensors[name], value, 1e-3)


def test_parity_refuses_it_and_either_goes_without_the_other(made, tmp_path, caplog):
    with pytest.raises(ValueError, match="averages no weights, so leave it or --parity reference out"):
        train.main(flags(made, tmp_path / "out", *AVERAGED, "--parity", "reference"))
    with caplog.at_level("INFO", "fastvid"):
        assert train.main(flags(made, tmp_path / "out", *AVERAGED, "--dry_run", "True")) == 0
    assert any(line.startswith("average: decay 0.6, ") for line in caplog.messages)
