"""What a run says and keeps when weights, not samples, are not finite."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_run import flags, losses, write_run

from fastvid import train
from fastvid.checkpoints import checkpoint
from fastvid.model.finite import not_finite


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def break_after(monkeypatch, step, tensor):
    """Have the update of a step leave a NaN behind, in a weight or a moment, whatever its loss."""
    made = train.train_step

    def train_step(state, batches, waited):
        result = made(state, batches, waited)
        if state.step == step:
            {**state.optimizer.parameters, **state.optimizer.state_tensors()}[tensor].data.view(-1)[0] = math.nan
        return result

    monkeypatch.setattr(train, "train_step", train_step)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", ["projector.0.weight", "projector.2.bias.exp_avg_sq"])
def test_broken_weights_and_moments_are_named_and_not_saved(run, tmp_path, monkeypatch, capfd, tensor):
    break_after(monkeypatch, 8, tensor)
    assert train.main(flags(run, tmp_path)) == 1
    said = capfd.readouterr().err
    assert f"{tensor} not finite since the update of step 8" in said and "--learning_rate 0.01" in said
    assert "samples clip" not in said
    assert checkpoint.newest_valid(tmp_path).name == "checkpoint-4"


@pytest.mark.slow
def test_the_step_after_tells_where_nothing_was_to_be_saved(run, tmp_path, monkeypatch, capfd):
    break_after(monkeypatch, 5, "projector.0.weight")
    assert train.main(flags(run, tmp_path)) == 1
    said = capfd.readouterr().err
    assert "step 6 is not finite; projector.0.weight not finite since the update of step 5" in said
    assert checkpoint.newest_valid(tmp_path).name == "checkpoint-4" and max(losses(tmp_path)) == 5


@pytest.mark.slow
def test_no_result_is_written_of_broken_weights(run, tmp_path, monkeypatch):
    break_after(monkeypatch, 2, "projector.0.weight")
    assert train.main(flags(run, tmp_path, "--max_steps", "2", "--save_strategy", "no")) == 1
    assert not (tmp_path / "mm_projector.bin").exists()


@pytest.mark.parametrize(
    "name, options",
    [
        ("model.layers.1.mlp.up_proj.weight", []),
        ("model.mm_projector.0.bias", []),
        ("model.layers.0.self_attn.q_proj.weight", ["--frozen_dtype", "int8"]),
    ],
)
def test_a_model_folder_that_is_not_finite_is_refused(run, tmp_path, name, options):
    shutil.copytree(run / "model", tmp_path / "model")
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1)[:2] = torch.tensor([math.nan, math.inf])
            save_file(tensors, path, {"format": "pt"})
            count = tensors[name].numel()
    with pytest.raises(ValueError, match=f"model/.*safetensors: 2 of {count:,} values of {name} are not finite"):
        train.main(flags(run, tmp_path / "out", "--model_name_or_path", str(tmp_path / "model"), *options))


@pytest.mark.slow
def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(run, tmp_path, monkeypatch):
    """As an older version may have left it."""
    argv = flags(run, tmp_path, "--max_steps", "8")
    with monkeypatch.context() as patch:
        break_after(patch, 8, "projector.0.weight")
        patch.setattr(train.diagnosis, "broken_by_an_update", lambda state: None)
        assert train.main(argv) == 0
    with pytest.raises(ValueError, match="checkpoint-8: projector.0.weight is not finite.*Move this folder away"):
        train.main(argv)
    shutil.copytree(tmp_path, tmp_path / "copy")
    shutil.move(tmp_path / "checkpoint-8", tmp_path / "away")  # the remedy
    assert train.main(argv) == 0
    assert train.main([*argv, "--output_dir", str(tmp_path / "copy"), "--resume", "never"]) == 0  # the other one


def test_sums_that_overflow_are_finite_values():
    assert not_finite(
        {"a": torch.full((4,), 3e38), "b": torch.tensor([1.0, math.inf]), "c": torch.arange(3), "d": torch.empty(0)}
    ) == ["b"]
