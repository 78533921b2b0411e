"""The step loop: what it never waits for, and how batches reach the device."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from fastvid_kernels.cpu import attention as cpu_attention
from host_reads import HostReads
from training_run import config_of, flags, losses, write_run

from fastvid import train
from fastvid.dist import parallel
from fastvid.training import recovery, staging
from fastvid.training.flops import Formula
from fastvid.training.metrics import read_metrics
from fastvid.training.staging import Staging

CPU = parallel.World(0, 1, 0, torch.device("cpu"), False)
MODES = {
    "adapter": [],
    "full fine-tune": ["--tune_mm_mlp_adapter", "False"],
    "accumulation": ["--gradient_accumulation_steps", "2"],
    "recomputation": ["--recompute", "full"],
    "shared rows": ["--share_video", "True", "--tokens_per_batch", "200", "--bf16", "True"],
    "8-bit moments": [
        "--tune_mm_mlp_adapter",
        "False",
        "--optim",
        "adamw_8bit",
        "--bf16",
        "True",
        "--master_dtype",
        "bfloat16",
    ],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def reads_of_a_run(run, tmp_path, monkeypatch, *options, around=None):
    """[(steps done, what, where)] of the host's reads in a run of 9 steps that logs every 4."""
    config = config_of(
        run, tmp_path / "out", "--logging_steps", "4", "--max_steps", "9", "--save_strategy", "no", *options
    )
    state = train.build(config, CPU)
    # Attention on a CPU reads its segments on the host, whose memory they are in; a GPU's kernels do not.
    reads = HostReads(
        monkeypatch,
        lambda: state.step,
        [
            (cpu_attention, "_check"),
            (Formula, "counts"),
            (recovery, "write_results"),
        ],
    )
    batches = state.loader.iterate

    def iterate(first, stopped):
        ahead = batches(first, stopped)
        while True:
            with reads.not_counted():
                step = next(ahead, None)
            if step is None:
                return
            yield step

    state.loader.iterate = iterate
    if around:
        around(monkeypatch, reads)
    with reads:
        assert train.loop(state) == 0
    return reads.seen


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_host_waits_for_nothing_between_log_lines(run, tmp_path, monkeypatch, mode):
    seen = reads_of_a_run(run, tmp_path, monkeypatch, *MODES[mode])
    between = [read for read in seen if read[0] not in (4, 8, 9)]
    assert between == []
    read_at = {place for place, _, _ in seen}
    assert read_at == {4, 8, 9}  # where it does wait, that is seen
    at_a_line = [what for place, what, _ in seen if place == 4]
    assert 0 < len(at_a_line) <= 12  # the latch, the loss and the norm, each as conversion and as operator


@pytest.mark.slow
@pytest.mark.parametrize(
    "read",
    [
        lambda loss: loss.item(),
        lambda loss: float(loss),
        lambda loss: bool(loss > 0),
        lambda loss: loss.tolist(),
        lambda loss: loss.cpu(),
        lambda loss: (loss > 0).nonzero(),
        lambda loss: loss[loss > 0],
        lambda loss: [0, 1][(loss > 0).long()],
        lambda loss: torch.arange(3).repeat_interleave(torch.ones(3).long()),
    ],
)
def test_a_read_in_a_step_is_seen(run, tmp_path, monkeypatch, read):
    def reading(monkeypatch, reads):
        step = train.train_step

        def train_step(state, batches, waited):
            result = step(state, batches, waited)
            read(result.loss)
            return result

        monkeypatch.setattr(train, "train_step", train_step)

    seen = reads_of_a_run(run, tmp_path, monkeypatch, around=reading)
    assert {place for place, _, _ in seen} == set(range(1, 10))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_step_synchronises_the_gpu(run, tmp_path, monkeypatch):
    step = train.train_step

    def train_step(state, batches, waited):
        if state.step > 1:  # the first ones initialise libraries
            torch.cuda.set_sync_debug_mode("error")
        try:
            return step(state, batches, waited)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train, "train_step", train_step)
    assert train.main(flags(run, tmp_path, "--bf16", "True", "--logging_steps", "4")) == 0
    assert len(losses(tmp_path)) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, expected",
    [
        (["--num_train_epochs", "1.5"], [6, 9]),
        (["--num_train_epochs", "2"], [6, 12]),
        # 6 micro-batches an epoch: the second epoch begins within step 2, the run ends in its midst.
        (["--parity", "reference", "--gradient_accumulation_steps", "4", "--num_train_epochs", "2"], [2]),
    ],
)
def test_validation_by_epoch_comes_at_epochs_and_at_the_end(run, tmp_path, options, expected):
    assert (
        train.main(
            flags(
                run,
                tmp_path,
                "--eval_data_path",
                str(run / "train.json"),
                "--eval_strategy",
                "epoch",
                "--save_strategy",
                "no",
                *options,
            )
        )
        == 0
    )
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval_loss" in line] == expected


# --- batches on their way


class FakeCuda:
    """Streams that keep a diary; stands for torch.cuda in `fastvid.training.staging`."""

    def __init__(self):
        self.diary, self.streams = [], ["main"]

    def Stream(self, device):
        return SimpleNamespace(name="side", record_event=lambda: f"event {self.diary[-1].split()[-1]}")

    @contextmanager
    def stream(self, stream):
        self.streams.append(stream.name)
        yield
        self.streams.pop()

    def current_stream(self, device):
        return SimpleNamespace(wait_event=lambda event: self.diary.append(f"{self.streams[-1]} waits {event}"))


class FakeBatch:
    def __init__(self, cuda, name, place="host"):
        self.cuda, self.name, self.place = cuda, name, place

    def to(self, device, non_blocking=False):
        assert non_blocking
        self.cuda.diary.append(f"{self.cuda.streams[-1]} copies {self.name}")
        return FakeBatch(self.cuda, self.name, "device")

    def map(self, function):
        assert self.place == "device"

        class Tensor:
            def record_stream(tensor, stream):
                self.cuda.diary.append(f"{self.name} kept for {self.cuda.streams[-1]}")

        function(Tensor())


def test_the_next_batch_is_copied_while_one_is_computed(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(staging.torch, "cuda", cuda)
    for batch in Staging(torch.device("cuda", 0)).copies(FakeBatch(cuda, name) for name in "ABC"):
        assert batch.place == "device" and cuda.streams == ["main"]
        cuda.diary.append(f"computes {batch.name}")
    assert cuda.diary == [
        "side copies A",
        "side copies B",
        "main waits event A",
        "A kept for main",
        "computes A",
        "side copies C",
        "main waits event B",
        "B kept for main",
        "computes B",
        "main waits event C",
        "C kept for main",
        "computes C",
    ]


def test_staging_on_a_cpu_hands_batches_on(run, tmp_path):
    state = train.build(config_of(run, tmp_path), CPU)
    batches, _ = state.loader.read(0)
    [copied] = Staging(CPU.device).copies(batches)
    assert torch.equal(copied.token_ids, batches[0].token_ids) and list(Staging(CPU.device).copies([])) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_copies_on_a_gpu_are_the_batches(run, tmp_path):
    state = train.build(config_of(run, tmp_path), parallel.World(0, 1, 0, torch.device("cuda", 0), False))
    batches = [batch for step in range(6) for batch in state.loader.read(step)[0]]
    sums = []
    for batch in state.staging.copies(batches):
        busy = torch.randn(2048, 2048, device="cuda")
        for _ in range(20):
            busy = busy @ busy
        sums.append(batch.features.double().sum())
    assert [total.item() for total in sums] == [batch.features.double().sum().item() for batch in batches]
