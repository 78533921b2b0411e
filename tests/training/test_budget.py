"""--tokens_per_batch auto: by the smallest card, as the run began, the same on all ranks."""

import dataclasses
import json

import pytest
import torch
from ranks import on_ranks
from training_run import config_of, flags, write_run

from fastvid import train
from fastvid.config import TrainConfig
from fastvid.data.sharing import Groups
from fastvid.dist import parallel
from fastvid.flags import parse
from fastvid.training import budget, planning

CPU = torch.device("cpu")
ALONE = parallel.World(0, 1, 0, CPU, False)
AUTO = ["--tokens_per_batch", "auto"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("budget"))


@pytest.mark.parametrize(
    "memory, tokens",
    [
        ("141GB", 16896),
        ("180GiB", 16896),
        ("80GB", 8448),
        ("79GiB", 8448),
        ("96GB", 8448),
        ("48GB", None),
        (None, None),
    ],
)
def test_the_card_decides(made, tmp_path, memory, tokens):
    told = [] if memory is None else ["--memory", memory]
    config = budget.settled_budget(config_of(made, tmp_path, *AUTO, *told), ALONE)
    assert config.tokens_per_batch == config.token_budget == tokens


def test_every_sample_fits(made, tmp_path):
    config = config_of(made, tmp_path, *AUTO, "--memory", "80GB", "--model_max_length", "20000")
    assert budget.settled_budget(config, ALONE).token_budget == 20000


def test_a_number_stays_and_other_words_are_refused(made, tmp_path):
    config = config_of(made, tmp_path, "--tokens_per_batch", "300", "--memory", "80GB")
    assert budget.settled_budget(config, ALONE) is config
    for word in ("full", "0", "1.5"):
        with pytest.raises((ValueError, SystemExit)):
            config_of(made, tmp_path, "--tokens_per_batch", word)


@pytest.mark.slow
def test_a_run_goes_on_with_the_batches_that_it_began_with(made, tmp_path, monkeypatch, caplog):
    """On a card of another size, and where it began before there was a budget."""
    monkeypatch.setattr(budget, "BUDGETS", ((2 * 2**30, 800), (2**30, 600)))
    for name, began, batch in (
        ("small", [*AUTO, "--memory", "1.5GiB"], "600 tokens each"),
        ("samples", [], "2 samples each"),
    ):
        run = [*began, "--save_steps", "1", "--lr_scheduler_type", "constant"]
        assert train.main(flags(made, tmp_path / name, *run, "--max_steps", "1")) == 0
        caplog.clear()
        with caplog.at_level("INFO", "fastvid"):
            again = [*run, *AUTO, "--memory", "9GiB", "--max_steps", "2"]
            assert train.main(flags(made, tmp_path / name, *again)) == 0
        assert f"batches are those that the run began with: {batch}" in caplog.text
        assert "resumed from" in caplog.text
    with caplog.at_level("INFO", "fastvid"):
        anew = [*AUTO, "--memory", "9GiB", "--resume", "never", "--max_steps", "1", "--save_steps", "1"]
        assert train.main(flags(made, tmp_path / "small", *anew)) == 0
    state = json.loads((tmp_path / "small" / "checkpoint-1" / "state.json").read_text())
    assert state["config"]["tokens_per_batch"] == 800


def _budget_of_rank(rank, folder, output):
    world = parallel.World(rank, 2, rank, CPU, True, 2)
    budget._card = lambda device: (79 if rank else 140) * 2**30
    return budget.settled_budget(config_of(folder, output, *AUTO), world).token_budget


@pytest.mark.slow
def test_the_smallest_card_of_all_ranks_decides(made, tmp_path):
    assert on_ranks(2, _budget_of_rank, tmp_path, made, tmp_path / "out") == [8448, 8448]


def _other_flags_of_rank(rank, folder, output):
    world = parallel.World(rank, 2, rank, CPU, True, 2)
    with pytest.raises(ValueError, match="give all ranks the same flags") as caught:
        train.prepare(config_of(folder, output, "--tokens_per_batch", str(200 + 200 * rank)), world)
    train.prepare(config_of(folder, output, "--tokens_per_batch", "400"), world)
    return str(caught.value)


@pytest.mark.slow
def test_ranks_with_other_flags_are_refused(made, tmp_path):
    said = "--tokens_per_batch is 200 on rank 0 and 400 on rank 1: give all ranks the same flags"
    assert on_ranks(2, _other_flags_of_rank, tmp_path, made, tmp_path / "out") == [said, said]


def _estimates(monkeypatch, gibibytes):
    """Have a step of so many samples a micro-batch take so many GiB."""

    def planned(config, precision, model_config, loader, world, attention):
        plan = whole(config, precision, model_config, loader, world, attention)
        lacks = gibibytes * config.batch_size > 9
        return dataclasses.replace(plan, lacks=tuple(planning._smaller(config, plan.layout)) if lacks else ())

    whole = planning.plan
    monkeypatch.setattr(planning, "plan", planned)


def _unsaid(made, output, *more):
    """Flags that say nothing of batches."""
    given = flags(made, output, *more)
    for name in ("--per_device_train_batch_size", "--gradient_accumulation_steps"):
        while name in given:
            del given[given.index(name) : given.index(name) + 2]
    return parse(TrainConfig, given)


@pytest.mark.slow
@pytest.mark.parametrize("gibibytes, samples", [(1, 8), (2, 4), (4, 2), (9, 1), (10, 1)])
def test_micro_batches_shrink_until_they_fit(made, tmp_path, monkeypatch, caplog, gibibytes, samples):
    _estimates(monkeypatch, gibibytes)
    with caplog.at_level("INFO", "fastvid"):
        found = train.prepare(_unsaid(made, tmp_path), ALONE)
    assert found.config.per_device_train_batch_size == samples
    assert found.config.gradient_accumulation_steps == found.loader.order.accumulation == 8 // samples
    of = f"{samples} sample{'s' * (samples > 1)} ({8 // samples} per step in place of 1)"
    assert (f"; micro-batches of {of}: 8 do not fit" in caplog.text) == (samples < 8)
    assert ("try a --model_max_length below 512" in caplog.text) == (gibibytes == 10)
    assert "smaller batches" not in caplog.text  # there are none of fewer samples


@pytest.mark.slow
def test_remarks_are_told_once_whatever_is_tried(made, tmp_path, monkeypatch, caplog):
    _estimates(monkeypatch, 9)
    calls, whole = [], Groups.of_records
    monkeypatch.setattr(Groups, "of_records", lambda *args: calls.append(1) or whole(*args))
    late = ["--warmup_steps", "1000", "--lr_scheduler_type", "cosine", "--shard", "full", "--share_video", "True"]
    assert train.prepare(_unsaid(made, tmp_path, *late), ALONE).config.batch_size == 1
    assert caplog.text.count("--warmup_steps 1,000: the run ends after") == 1
    assert caplog.text.count("--shard full: there is one process") == 1
    assert len(calls) == 1


@pytest.mark.parametrize("more", [["--per_device_train_batch_size", "2"], ["--tokens_per_batch", "512"]])
def test_batches_that_can_be_smaller_are_named(made, tmp_path, monkeypatch, caplog, more):
    monkeypatch.setattr(parallel, "device_memory", lambda world: 1000)
    train.prepare(config_of(made, tmp_path, *more), ALONE)
    assert "try smaller batches" in caplog.text


def test_a_single_sample_may_be_shorter(made, tmp_path, monkeypatch, caplog):
    """There is no smaller batch; as the message tells, a shorter one fits."""
    one = ["--per_device_train_batch_size", "1"]
    monkeypatch.setattr(planning, "_can_tile", lambda *_: False)
    monkeypatch.setattr(planning.memory, "choose_recompute", lambda *_, **__: "none")
    taken = train.prepare(config_of(made, tmp_path, *one), ALONE).plan.estimated
    monkeypatch.setattr(parallel, "device_memory", lambda world: taken - 1)
    told = [
        train.prepare(config_of(made, tmp_path, *one, "--model_max_length", length), ALONE).plan.lacks
        for length in ("512", "250")
    ]
    assert told[0][0] == "a --model_max_length below 512" and told[1] == ()


@pytest.mark.parametrize(
    "more",
    [
        ["--per_device_train_batch_size", "8"],
        ["--tokens_per_batch", "800"],
        ["--parity", "reference"],
        ["--neftune_noise_alpha", "5"],
        ["--lora_enable", "True", "--lora_r", "2", "--lora_dropout", "0.1"],
    ],
)
def test_what_is_said_or_depends_on_it_stays(made, tmp_path, monkeypatch, more):
    _estimates(monkeypatch, 10)
    given = [*flags(made, tmp_path)]
    at = given.index("--per_device_train_batch_size")
    found = train.prepare(parse(TrainConfig, [*given[:at], *given[at + 2 :], *more]), ALONE)
    assert (found.config.batch_size, found.config.gradient_accumulation_steps) == (8, 1)


@pytest.mark.slow
def test_a_step_of_smaller_micro_batches_is_the_same(made, tmp_path, monkeypatch):
    gradients = []
    for gibibytes in (1, 4):
        with monkeypatch.context() as patch:
            _estimates(patch, gibibytes)
            state = train.build(_unsaid(made, tmp_path), ALONE)
        batches, _ = state.loader.read(0)
        seen, step = {}, state.optimizer.step

        def noting(*args, step=step, seen=seen, state=state, **options):
            assert not seen
            for name, parameter in state.optimizer.parameters.items():
                assert parameter.grad is not None
                seen[name] = parameter.grad.clone()
            return step(*args, **options)

        monkeypatch.setattr(state.optimizer, "step", noting)
        result = train.train_step(state, batches)
        assert result is not None and seen
        samples = sorted(i for batch in batches for i in batch.sample_ids)
        gradients.append((samples, result.loss, result.gradient_norm, seen))
        assert len(batches) == gibibytes
    assert gradients[0][0] == gradients[1][0]
    torch.testing.assert_close(gradients[0][1:], gradients[1][1:])


def _micro_batches_of_rank(rank, folder, output):
    world = parallel.World(rank, 2, rank, CPU, True, 2)
    found = []
    for least in (1 << 34, 1_000_000):
        parallel._memory_of_this_rank = lambda world, least=least: least if rank else 1 << 34
        config = train.prepare(_unsaid(folder, output), world).config
        found.append((config.batch_size, config.gradient_accumulation_steps))
    return found


@pytest.mark.slow
def test_ranks_of_different_memory_have_the_same_micro_batches(made, tmp_path):
    one, two = on_ranks(2, _micro_batches_of_rank, tmp_path, made, tmp_path / "out")
    assert one == two and one[0] == (8, 1)
    assert one[1][0] < 8 and one[1][0] * one[1][1] == 8


@pytest.mark.slow
def test_a_run_keeps_its_micro_batches(made, tmp_path, monkeypatch):
    """Where memory is no longer short; but not where it is told other ones, and smaller ones where it has become so."""
    with monkeypatch.context() as patch:
        _estimates(patch, 4)
        words = "--save_steps", "1", "--lr_scheduler_type", "constant", "--max_steps"
        assert train.train(_unsaid(made, tmp_path, *words, "1")) == 0
    for more, samples in (([], 2), (["--per_device_train_batch_size", "8"], 8)):
        given = _unsaid(made, tmp_path, *words, "2")
        given = dataclasses.replace(given, per_device_train_batch_size=int(more[1]) if more else None)
        assert train.prepare(given, ALONE).config.batch_size == samples
    with monkeypatch.context() as patch:
        _estimates(patch, 9)
        found = train.prepare(_unsaid(made, tmp_path, *words, "2"), ALONE)
    assert (found.config.batch_size, found.config.gradient_accumulation_steps) == (1, 8) and not found.plan.lacks
    assert train.prepare(_unsaid(made, tmp_path, *words, "1"), ALONE).config.batch_size == 8  # it has ended
    assert train.train(_unsaid(made, tmp_path, *words, "2")) == 0
    state = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())
    assert state["config"]["per_device_train_batch_size"] == 2 and state["config"]["gradient_accumulation_steps"] == 4
