"""Training: the reference's recorded runs, ranks and sharding, interruption, non-finite steps."""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from forks import FORKS, Streams
from ranks import leave
from safetensors.torch import load_file
from training_run import SAMPLES, config_of, flags, losses, overflowing, start, write_run

from fastvid import train
from fastvid.checkpoints import checkpoint
from fastvid.dist import parallel
from fastvid.features.file import load_features, save_features
from fastvid.training import planning
from fastvid.training.metrics import read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def straight(run):
    """Output folder of an uninterrupted run that saved after every step."""
    output = run / "straight"
    assert train.main(flags(run, output, "--save_steps", "1")) == 0
    return output


# --- against the reference's recordings


@pytest.mark.slow
def test_reference_command_line_reaches_the_recorded_run(golden, tiny, tmp_path):
    recorded = json.loads((golden / "model.json").read_text())["train"]["runs"]["336_main_r0"]
    output = tmp_path / "out"
    argv = [word.replace("WORK", str(tiny)) for word in recorded["argv"]]
    argv[argv.index("--output_dir") + 1] = str(output)
    argv[argv.index("--save_strategy") + 1] = "steps"
    assert train.main([*argv, "--parity", "reference", "--save_steps", "1"]) == 0

    lines = read_metrics(output / "metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(recorded["losses"], abs=1e-5)
    assert [line["learning_rate"] for line in lines] == pytest.approx(recorded["lr"], abs=1e-15)
    assert [line["grad_norm"] for line in lines] == pytest.approx(recorded["total_norm"], rel=1e-5)
    tensors = load_file(golden / "model.safetensors")
    for step in range(1, 6):
        trained = checkpoint.read_full(output / f"checkpoint-{step}", "model")
        prefix = f"336/train_main/after_step{step}/"
        names = [name for name in tensors if name.startswith(prefix)]
        assert len(names) == len(trained)
        for name in names:
            short = name.removeprefix(prefix).removeprefix("model.mm_projector.")
            ours = "boundary.weight" if "embed" in short else f"projector.{short}"
            assert (trained[ours] - tensors[name]).abs().max() <= 1e-7, (step, name)
    keys = json.loads((golden / "checkpoint.json").read_text())["runs"]["336_main_r0"]["bins"]
    state = torch.load(output / "mm_projector.bin", weights_only=True)
    assert [[name, list(t.shape), str(t.dtype)] for name, t in state.items()] == keys["mm_projector.bin"]


# --- ranks


def in_ranks(rank, size, port, streams, cases, results):
    streams.use()
    torch.set_num_threads(1)
    codes = []
    for attempt, argv in enumerate(cases):  # as torchrun's ranks, which begin anew in the store of their launcher
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
        }
        codes.append(train.main(argv))
    if rank == 0:
        results.put(codes)
    leave()


def spawn(cases, size=2):
    """Run several command lines one after the other on `size` ranks; their exit codes."""
    results = FORKS.SimpleQueue()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.start_processes(
        in_ranks, (size, store.port, Streams(), cases, results), nprocs=size, start_method=FORKS.get_start_method()
    )
    return results.get()


MODES = {
    "adapter": [],
    "full fine-tune": ["--tune_mm_mlp_adapter", "False"],
    "accumulation": ["--gradient_accumulation_steps", "2"],
}
SHARDED = {"adapter": ("none", "full"), "full fine-tune": ("none", "auto", "full"), "accumulation": ("auto", "full")}


@pytest.mark.slow
def test_ranks_and_sharding_do_not_change_the_losses(run, tmp_path):
    halved = [
        "--per_device_train_batch_size",
        "1",
        "--max_steps",
        "5",
        "--eval_data_path",
        str(run / "train.json"),
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
        "--per_device_eval_batch_size",
        "3",
    ]
    cases, one = {}, {}
    for mode, options in MODES.items():
        one[mode] = tmp_path / mode / "1"
        assert train.main(flags(run, one[mode], *halved, "--per_device_train_batch_size", "2", *options)) == 0
        for shard in SHARDED[mode]:
            output = tmp_path / mode / shard
            cases[mode, shard] = output, flags(run, output, *halved, *options, "--shard", shard)
    assert set(spawn([argv for _, argv in cases.values()])) == {0}
    for (mode, shard), (output, _) in cases.items():
        expected, found = (read_metrics(path / "metrics.jsonl") for path in (one[mode], output))
        assert len(expected) == len(found) == 7
        for a, b in zip(expected, found):
            for name in {"loss", "grad_norm", "eval_loss"} & a.keys():
                assert a[name] == pytest.approx(b[name], rel=1e-5), (mode, shard, a["step"], name)
        saved = [checkpoint.read_full(path / "checkpoint-5", "model") for path in (one[mode], output)]
        for name, tensor in saved[0].items():
            torch.testing.assert_close(saved[1][name], tensor, rtol=1e-3, atol=1e-5, msg=f"{mode} {shard} {name}")


@pytest.mark.slow
def test_mean_of_means_weighs_micro_batches_alike(run, tmp_path):
    state = train.build(
        config_of(run, tmp_path, "--parity", "reference", "--gradient_accumulation_steps", "2"),
        parallel.World(0, 1, 0, torch.device("cpu"), False),
    )
    batches, _ = state.loader.read(0)
    means = [state.model(batch).item() / batch.num_supervised for batch in batches]
    sums = [state.model(batch).item() for batch in batches]
    reference = train.train_step(state, batches).loss.item()
    assert reference == pytest.approx(sum(means) / 2, rel=1e-6)
    state = train.build(config_of(run, tmp_path), parallel.World(0, 1, 0, torch.device("cpu"), False))
    ours = train.train_step(state, batches).loss.item()
    assert ours == pytest.approx(sum(sums) / sum(batch.num_supervised for batch in batches), rel=1e-6)
    assert abs(ours - reference) > 1e-4


# --- interruption

KILL_IN_STEP = """
import os, signal, sys, time
from fastvid import train
step = train.train_step
def train_step(state, batches, waited):
    if state.step == 6:
        while not os.path.exists(os.path.join(state.config.output_dir, "checkpoint-4")):
            time.sleep(0.01)  # it is written beside the steps, which may be faster
        os.kill(os.getpid(), signal.SIGKILL)
    return step(state, batches, waited)
train.train_step = train_step
train.main(sys.argv[1:])
"""
KILL_IN_SAVE = """
import os, signal, sys
from fastvid import train
rename = os.rename
def kill(source, target, **options):
    if "checkpoint-8" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target, **options)
os.rename = os.replace = kill
train.main(sys.argv[1:])
"""
KILL_WHILE_SAVING = """
import os, signal, sys, threading
from fastvid import train
from fastvid.checkpoints import shards
step, write = train.train_step, shards.write
def train_step(state, batches, waited):
    if state.step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(state, batches, waited)
def slow(path, held, mark):
    if "checkpoint-8" in str(path):
        threading.Event().wait()
    write(path, held, mark)
train.train_step, shards.write = train_step, slow
train.main(sys.argv[1:])
"""
TERMINATE = """
import os, signal, sys
from fastvid import train
step = train.train_step
def train_step(state, batches, waited):
    if state.step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(state, batches, waited)
train.train_step = train_step
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, code, resumed_from",
    [
        (KILL_IN_STEP, -signal.SIGKILL, 4),
        (KILL_IN_SAVE, -signal.SIGKILL, 4),
        (KILL_WHILE_SAVING, -signal.SIGKILL, 4),
        (TERMINATE, 128 + signal.SIGTERM, 6),
    ],
    ids=["kill -9 in a step", "kill -9 in a save", "kill -9 two steps into a slow save", "SIGTERM"],
)
def test_interrupted_and_resumed_equals_straight(run, straight, tmp_path, caplog, program, code, resumed_from):
    argv = flags(run, tmp_path)
    finished = start(program, argv)
    assert finished.returncode == code, finished.stderr
    assert max(losses(tmp_path)) < SAMPLES * 3 / 2
    if program is KILL_WHILE_SAVING:
        assert max(losses(tmp_path)) == 10  # steps went on beside the write
    assert train.main(argv) == 0
    assert f"checkpoint-{resumed_from}" in caplog.text
    assert losses(tmp_path) == losses(straight)
    for group in ("model", "optimizer"):
        ours, theirs = (checkpoint.read_full(path / "checkpoint-18", group) for path in (tmp_path, straight))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    projectors = [load_file(path / "mm_projector.safetensors") for path in (tmp_path, straight)]
    assert all(torch.equal(projectors[0][name], projectors[1][name]) for name in projectors[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, code",
    [(KILL_IN_STEP.replace("state.step == 6", "state.step == 5"), -signal.SIGKILL), (TERMINATE, 128 + signal.SIGTERM)],
    ids=["kill -9", "SIGTERM"],
)
def test_a_log_window_survives_a_resume(run, straight, tmp_path, program, code):
    argv = flags(run, tmp_path, "--logging_steps", "9", "--save_steps", "4")
    finished = start(program, argv)
    assert finished.returncode == code, finished.stderr
    assert train.main(argv) == 0
    every = losses(straight)
    assert losses(tmp_path) == {last: sum(every[i] for i in range(last - 8, last + 1)) / 9 for last in (9, 18)}


@pytest.mark.slow
def test_another_run_is_not_resumed(run, straight, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint-18 belongs to another run: --learning_rate was 0.01, is 0.02"):
        train.main(flags(run, straight, "--learning_rate", "2e-2"))
    with pytest.raises(ValueError, match="samples_per_step was 2, is 4"):
        train.main(flags(run, straight, "--gradient_accumulation_steps", "2"))


@pytest.mark.slow
def test_another_name_of_the_same_optimizer_is_resumed(run, tmp_path, caplog):
    argv = flags(run, tmp_path, "--max_steps", "4")
    assert train.main([*argv, "--optim", "adamw_torch"]) == 0
    assert train.main([*argv, "--optim", "adamw"]) == 0
    assert "resumed from" in caplog.text


def test_going_on_with_other_ranks_names_what_to_give(run, straight, monkeypatch):
    read = checkpoint.read_state
    monkeypatch.setattr(
        checkpoint, "read_state", lambda folder: read(folder) | {"world_size": 2, "samples_per_step": 4}
    )
    with pytest.raises(
        ValueError, match="samples_per_step was 4, is 2; ranks were 2, are 1: give --per_device_train_batch"
    ):
        train.main(flags(run, straight))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(run, straight, tmp_path, caplog):
    argv = flags(run, tmp_path, "--max_steps", "8")
    assert train.main(argv) == 0
    weights = tmp_path / "checkpoint-8" / "model-00000-of-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert train.main(argv) == 0
    assert "checkpoint-8 is passed over: the sha256 of model-00000" in caplog.text
    assert sorted(losses(tmp_path)) == list(range(1, 9))


# --- non-finite steps


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_non_finite_step_changes_nothing_and_is_named(run, straight, tmp_path, capfd, ranks):
    state = train.build(config_of(run, tmp_path), parallel.World(0, 1, 0, torch.device("cpu"), False))
    step, poisoned = next(
        (step, int(i))
        for step in range(2, 18)
        for i in state.order.micro_batches(step)[0]
        if all(i not in state.order.micro_batches(before)[0] for before in range(step))
    )
    feats = tmp_path / "feats"
    feats.mkdir()
    for i in range(SAMPLES):
        features, header = load_features(run / "feats" / f"clip{i}.safetensors")
        if i == poisoned:
            features = features.float()
            features[3] = overflowing(run)
        save_features(feats / f"clip{i}.safetensors", features, header)
    output = tmp_path / "out"
    argv = flags(
        run,
        output,
        "--video_folder",
        str(feats),
        "--logging_steps",
        "4",
        "--save_steps",
        "100",
        "--per_device_train_batch_size",
        str(2 // ranks),
    )
    code = train.main(argv) if ranks == 1 else spawn([argv])[0]
    assert code == 1
    said = capfd.readouterr().err
    assert f"step {step + 1} is not finite" in said and f"clip{poisoned}" in said
    place = state.order.micro_batches(step)[0].index(poisoned)
    assert f"rank {place if ranks == 2 else 0}:" in said and f"rank {1 - place if ranks == 2 else 1}:" not in said
    for group in ("model", "optimizer"):
        kept, before = (checkpoint.read_full(path / f"checkpoint-{step}", group) for path in (output, straight))
        for name in before:
            assert kept[name].isfinite().all()
            torch.testing.assert_close(kept[name], before[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_defect_ends_the_processes_that_read_ahead(run, tmp_path, monkeypatch):
    def defect(state, batches, waited):
        assert multiprocessing.active_children()
        raise RuntimeError("defect")

    monkeypatch.setattr(train, "train_step", defect)
    with pytest.raises(RuntimeError, match="defect") as raised:
        train.main(flags(run, tmp_path, "--dataloader_num_workers", "2"))
    assert raised.tb and not multiprocessing.active_children()  # while the traceback is held


@pytest.mark.slow
def test_rates_of_a_run(straight, run, tmp_path, caplog):
    first = read_metrics(straight / "metrics.jsonl")[0]
    assert first["padding_share"] == 0 and first["shared_token_share"] >= 0 and 0 <= first["data_wait_share"] < 1
    assert first["tflops_per_second"] > 0 and "mfu" not in first
    assert train.main(flags(run, tmp_path, "--max_steps", "1", "--peak_tflops", "0.5")) == 0
    assert "peak 0.5 TFLOP/s" in caplog.text
    [line] = read_metrics(tmp_path / "metrics.jsonl")
    assert line["mfu"] == pytest.approx(line["tflops_per_second"] / 0.5) and "budget_fill" not in line

    options = "--tokens_per_batch", "150", "--gradient_accumulation_steps", "2", "--share_video", "True"
    assert train.main(flags(run, tmp_path / "packed", *options, "--num_train_epochs", "1")) == 0
    config = config_of(run, tmp_path, *options)
    assert planning.token_budget(config, parallel.World(0, 3, 0, torch.device("cpu"), False)) == 150 * 2 * 3
    for line in read_metrics(tmp_path / "packed" / "metrics.jsonl"):
        assert 0 < line["budget_fill"] <= 1 and line["padding_share"] <= 1


def test_files_of_a_run(straight):
    assert {path.name for path in straight.iterdir()} >= {
        "metrics.jsonl",
        "loss_curve.png",
        "mm_projector.bin",
        "mm_projector.safetensors",
        "checkpoint-18",
    }
