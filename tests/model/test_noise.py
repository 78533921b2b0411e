"""NEFTune's noise: what it is, on which rows, and that nothing else of a run changes."""

import math

import pytest
import torch
from model_cases import loss_and_gradients, model_config, random_batch, random_model
from training_run import config_of, flags, losses, write_run

from fastvid import train
from fastvid.config.policy import Trainable
from fastvid.dist import parallel
from fastvid.model.noise import Noise, with_noise

CPU = torch.device("cpu")
ALONE = parallel.World(0, 1, 0, CPU, False)
ADAPTER = Trainable(projector=True, boundary=True)


def test_the_noise_is_uniform_within_its_bound_and_leaves_videos_alone():
    x, videos = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)), torch.arange(100, 300)
    noisy = with_noise(x, Noise(5.0, (1, 2)), longest=50, video_rows=videos)
    bound, noise = 5.0 / math.sqrt(50 * 32), noisy - x
    assert not noise[100:300].any()
    text = torch.cat([noise[:100], noise[300:]]).double()
    assert 0.99 * bound < text.abs().max() <= bound * (1 + 1e-5)
    assert text.mean().abs() < 0.05 * bound and text.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert torch.equal(noisy, with_noise(x, Noise(5.0, (1, 2)), longest=50, video_rows=videos))
    assert not torch.equal(noisy, with_noise(x, Noise(5.0, (1, 3)), longest=50, video_rows=videos))


def test_gradients_are_those_at_the_noisy_embeddings():
    """With no noise to speak of they are the plain ones; with noise the loss is another."""
    batch, found = random_batch(), {}
    for alpha in (None, 1e-6, 5.0):
        model = random_model(model_config(), ADAPTER, torch.float32)
        model.noise = None if alpha is None else Noise(alpha, (0, 0, 0))
        found[alpha] = loss_and_gradients(model, batch)
    assert found[1e-6][0] == pytest.approx(found[None][0], rel=1e-5)
    for name, gradient in found[None][1].items():
        torch.testing.assert_close(found[1e-6][1][name], gradient, rtol=1e-3, atol=1e-5)
    assert abs(found[5.0][0] - found[None][0]) > 1e-4


def test_a_packed_batch_has_noise_on_its_text_within_the_longest_samples_bound():
    batch, model = random_batch(), random_model(model_config(), ADAPTER, torch.float32)
    lengths = batch.layout.lengths[0]
    assert len(lengths) > 1 and len(batch.video_rows) > 1
    with torch.no_grad():
        plain = model.splice(batch)
        model.noise = Noise(5.0, (1,))
        noise = model.splice(batch) - plain
    bound = 5.0 / math.sqrt(max(lengths) * plain.shape[1])
    text = torch.ones(len(noise), dtype=torch.bool)
    text[batch.video_rows] = False
    assert not noise[~text].any() and noise[text].ne(0).any(1).all()
    assert 0.95 * bound < noise.abs().max() <= bound * (1 + 1e-5)


def test_every_micro_batch_of_every_rank_and_step_has_noise_of_its_own(made, tmp_path):
    state = train.build(config_of(made, tmp_path, "--neftune_noise_alpha", "5"), ALONE)
    found = []
    for world in (ALONE, parallel.World(1, 2, 1, CPU, False)):
        state.world = world
        for step, micro_batch in ((0, 0), (0, 1), (1, 0)):
            state.draw(step, micro_batch)
            found.append(state.model.noise)
    # One rank's second micro-batch holds what the second of two ranks has in its first: it is the same noise.
    assert found[1] == found[3] and len({*found}) == 5


@pytest.mark.slow
def test_shared_rows_have_one_draw(made, tmp_path):
    """The loss of a step is finite, and the same again, with samples that share a video's prompt."""
    words = ["--neftune_noise_alpha", "5", "--share_video", "True", "--gradient_accumulation_steps", "2"]
    said = []
    for name in ("one", "again"):
        state = train.build(config_of(made, tmp_path / name, *words), ALONE)
        said.append(train.train_step(state, next(state.loader.iterate(0))[0]).loss.item())
    assert said[0] == said[1] and math.isfinite(said[0])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("noise"))


@pytest.mark.slow
def test_a_run_is_the_same_when_it_is_interrupted_and_another_without_noise(made, tmp_path):
    told = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--lr_scheduler_type", "constant"]
    for folder, words in (("plain", []), ("noise", ["--neftune_noise_alpha", "5"])):
        assert train.main(flags(made, tmp_path / folder, *told, *words)) == 0
    cut = [*told, "--neftune_noise_alpha", "5"]
    assert train.main(flags(made, tmp_path / "cut", *cut, "--max_steps", "2")) == 0
    assert train.main(flags(made, tmp_path / "cut", *cut)) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "noise")
    assert losses(tmp_path / "plain") != losses(tmp_path / "noise")


@pytest.mark.slow
def test_no_row_is_constant_and_validation_sees_no_noise(made, tmp_path):
    evaluated = ["--eval_data_path", str(made / "train.json")]
    found = {}
    for alpha in ([], ["--neftune_noise_alpha", "50"]):
        state = train.build(config_of(made, tmp_path, *evaluated, *alpha), ALONE)
        before = train.evaluate(state)
        batches = next(state.loader.iterate(0))[0]
        found[bool(alpha)] = before, train.train_step(state, batches).loss, batches[0].frozen_rows
        assert state.model.noise is None
        assert bool(state.loader.prefix) == (not alpha)
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
    assert found[True][1] != found[False][1] and found[False][2] and not found[True][2]


def test_parity_refuses_it_and_either_goes_without_the_other(made, tmp_path, caplog):
    noise = ["--neftune_noise_alpha", "5"]
    with pytest.raises(ValueError, match="leave it or --parity reference out"):
        train.main(flags(made, tmp_path / "out", *noise, "--parity", "reference"))
    with caplog.at_level("INFO", "fastvid"):
        for left in (noise, ["--parity", "reference"]):
            assert train.main(flags(made, tmp_path / "out", *left, "--dry_run", "True")) == 0
    assert any(line.startswith("NEFTune: alpha 5; ") for line in caplog.messages)
