"""The memory that a dry run prints, against what the run's batches really take."""

import pytest
import torch
import training_run
from model_cases import LiveBytes
from training_run import config_of, write_run

from fastvid import parallel, train
from fastvid.model import memory

WORLD = parallel.World(0, 1, 0, torch.device("cpu"), False)
SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "ROWS", 250)  # most rows are a video's, as in real data
        return write_run(tmp_path_factory.mktemp("run"), **SIZES)


@pytest.mark.parametrize("options", [
    ["--rows_per_batch", "1500"],
    ["--rows_per_batch", "1500", "--recompute", "full"],
    ["--per_device_train_batch_size", "6"],
    ["--rows_per_batch", "1500", "--share_video", "--tune_mm_mlp_adapter", "False"],
    ["--rows_per_batch", "1500", "--share_video", "--question_order", "video_first"],
], ids=" ".join)
def test_estimate_is_near_the_peak_of_the_largest_batch(run, options, monkeypatch):
    found = []
    estimate = memory.estimate
    monkeypatch.setattr(memory, "estimate", lambda *a, **k: found.append(estimate(*a, **k)) or found[-1])
    state = train.build(config_of(run, "unused", "--dataloader_num_workers", "0", "--bf16", "True", *options), WORLD)
    expected = found[-1]
    assert f"recompute {expected.recompute}" in str(expected)
    constant = sum(x.nbytes for layer in state.model._prefix or () for x in layer)
    peaks = []
    for _, batches in state.loader.iterate():
        for batch in batches:
            state.model(batch).backward()
            with LiveBytes() as live:
                state.model(batch).backward()
            peaks.append(live.peak)
    trained = sum(p.nbytes for p in state.model.parameters() if p.requires_grad)
    copies = sum(2 * p.nbytes for linear in state.model.decoder.modules() if getattr(linear, "_tiled", None) is not None
                 for p in linear.parameters())
    measured = sum(p.nbytes for p in state.model.parameters()) + constant + copies + 3 * trained + max(peaks)
    assert expected.total == pytest.approx(measured, rel=0.1)
