"""Batches of a run: reading ahead; what is refused and skipped."""

import dataclasses
import json

import pytest
import torch
from training_run import CHANNELS, ROWS, config_of, write_run

from fastvid import train
from fastvid.data.loader import Loader
from fastvid.data.packing import pack
from fastvid.dist import parallel

WORLD = parallel.World(0, 1, 0, torch.device("cpu"), False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def test_pack_of_nothing_is_one_unsupervised_row(run):
    state = train.build(config_of(run, "unused"), WORLD)
    batch = pack([], state.tokenizer.tokens, CHANNELS)
    assert batch.num_rows == 1 and batch.num_supervised == 0 and batch.features.shape == (0, CHANNELS)
    state.model(batch).backward()
    assert all((p.grad == 0).all() for p in state.optimizer.parameters.values())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_reading_ahead_changes_nothing(run, workers):
    state = train.build(config_of(run, "unused", "--dataloader_num_workers", "0"), WORLD)
    plain = list(state.loader.iterate(3))
    ahead = list(Loader(state.loader.samples, state.order, workers=workers, packing=state.loader.packing).iterate(3))
    assert len(ahead) == state.order.total_steps - 3
    for (ours, _), (expected, _) in zip(ahead, plain, strict=True):
        assert [b.sample_ids for b in ours] == [b.sample_ids for b in expected]
        assert all(
            torch.equal(a.token_ids, b.token_ids) and torch.equal(a.features, b.features)
            for a, b in zip(ours, expected, strict=True)
        )


@pytest.mark.slow
def test_an_abandoned_loader_stops_reading(run):
    state = train.build(config_of(run, "unused"), WORLD)
    steps = state.loader.iterate()
    next(steps)
    steps.close()
    with pytest.raises(StopIteration):
        next(steps)


def test_features_of_another_tower_are_refused(run, tmp_path):
    config = json.loads((run / "model" / "config.json").read_text())
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (run / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "mm_hidden_size": CHANNELS + 1}))
    with pytest.raises(
        ValueError,
        match=rf"clip0\.safetensors: features are \[{ROWS}, {CHANNELS}\], expected "
        rf"\[any number, {CHANNELS + 1}\]",
    ):
        train.build(config_of(run, "unused", "--model_name_or_path", str(folder)), WORLD)
    with pytest.raises(ValueError, match=rf"clip0\.safetensors: .* expected \[9, {CHANNELS}\].*--num_video_tokens"):
        train.build(config_of(run, "unused", "--num_video_tokens", "9"), WORLD)


@pytest.mark.slow
def test_text_only_records_train(run, tmp_path):
    records = [
        {
            "id": f"t{i}",
            "conversations": [{"from": "human", "value": "what is red"}, {"from": "gpt", "value": "the house"}],
        }
        for i in range(4)
    ]
    data = tmp_path / "text.json"
    data.write_text(json.dumps(records))
    both = config_of(run, "unused", "--data_path", str(data))
    assert train.build(both, WORLD).loader.samples.counts == [12, 4]
    state = train.build(dataclasses.replace(both, data_path=[str(data)]), WORLD)
    batches, odd = state.loader.read(0)
    assert not odd and batches[0].features.shape == (0, CHANNELS)
    assert train.train_step(state, batches).loss.isfinite()
