"""--profile: which steps are recorded, and what is left for whom."""

import gzip
import json

import pytest
import torch
from fastvid_kernels import dispatch
from fastvid_kernels.swiglu import swiglu
from training_run import flags, losses, write_run

from fastvid import train
from fastvid.training import longest, profiling


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_a_profiled_run_leaves_a_trace_and_says_what_took_time(run, tmp_path, capsys):
    assert train.main(flags(run, tmp_path, "--profile", "--max_steps", "8", "--save_strategy", "no")) == 0
    said = capsys.readouterr().err
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert "aten::mm" in names and "[memory]" in names
    # Three steps of the eight, whatever a step's number of calls is.
    assert names.count("aten::_fused_adamw_") == profiling.RECORDED * (names.count("aten::_fused_adamw_") // 3) > 0
    table = said[said.index("profile of 3 steps") :].splitlines()
    assert "operators by CPU time" in table[0] and len(table) > 2 + longest.SHOWN
    assert (tmp_path / "profile" / "longest.txt").read_text().splitlines() == table[: 2 + longest.SHOWN]
    made = json.loads((tmp_path / "profile" / "longest.json").read_text())
    assert made["of"] == "operators" and len(made["longest"]) == longest.SHOWN
    times = [row["milliseconds"] for row in made["longest"]]
    assert times == sorted(times, reverse=True) and made["seconds_a_step"] > 0
    assert all(row["of_roof"] is None for row in made["longest"])  # of a CPU no roof is known
    assert str(tmp_path / "profile" / "trace.json.gz") in said and "no memory snapshot" in said
    names = {path.name for path in (tmp_path / "profile").iterdir()}
    assert names == {"trace.json.gz", "longest.txt", "longest.json"}
    assert len(losses(tmp_path)) == 8 and list(losses(tmp_path).values()) == list(plain(run, tmp_path).values())


def plain(run, tmp_path):
    assert train.main(flags(run, tmp_path / "plain", "--max_steps", "8", "--save_strategy", "no")) == 0
    assert not (tmp_path / "plain" / "profile").exists()
    return losses(tmp_path / "plain")


def recorded(tmp_path, steps, active=True):
    """What a profiler says of a run of `steps` steps that each multiply once."""
    said = []
    profiler = profiling.Profiler(tmp_path / "profile", torch.device("cpu"), said.append, active=active)
    a = torch.ones(4, 4)
    for _ in range(steps):
        a @ a
        profiler.step()
    profiler.close()
    profiler.close()
    return said


@pytest.mark.parametrize("steps, kept", [(4, 1), (5, 2), (6, 3), (9, 3)])
def test_the_steps_after_the_warm_up_are_recorded(tmp_path, steps, kept):
    said = recorded(tmp_path, steps)
    assert f"profile of {kept} steps" in said[0] and len(said) == 3
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    assert [event.get("name") for event in trace["traceEvents"]].count("aten::mm") == kept
    [line] = [line for line in said[0].splitlines() if line.endswith("aten::mm")]
    assert line.split()[2:4] == ["1.0", "1.28e-10"]  # calls a step; TFLOP of two square matrices of four rows


def test_launches_of_kernels_are_watched_while_steps_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    profiler = profiling.Profiler(tmp_path / "profile", torch.device("cpu"), print, active=True)
    for _ in range(profiling.WARM_UP + profiling.RECORDED + 2):
        swiglu(torch.ones(3, 16), impl="triton")
        profiler.step()
    assert dict(profiler._moved) == {"_swiglu_fwd_kernel": profiling.RECORDED * 4 * (3 * 16 + 3 * 8)}
    assert not dispatch._WATCHERS


@pytest.mark.parametrize("steps", [0, 2, 3])
def test_a_run_shorter_than_the_warm_up_says_so(tmp_path, steps):
    assert recorded(tmp_path, steps) == ["--profile: nothing was recorded: the run ended within its 3 steps of warm-up"]
    assert not (tmp_path / "profile").exists()


def test_without_the_flag_nothing_happens(tmp_path):
    said = []
    profiler = profiling.Profiler(tmp_path / "profile", torch.device("cpu"), said.append, active=False)
    for _ in range(profiling.WARM_UP + 1):
        profiler.step()
        assert not torch.autograd._profiler_enabled()
    profiler.close()
    assert not said and not (tmp_path / "profile").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_leaves_its_memory_too(tmp_path):
    said = []
    profiler = profiling.Profiler(tmp_path / "profile", torch.device("cuda"), said.append, active=True)
    for _ in range(6):
        torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
        profiler.step()
    assert "kernels by GPU time" in said[0]
    names = {path.name for path in (tmp_path / "profile").iterdir()}
    assert names == {"trace.json.gz", "memory.pickle", "longest.txt", "longest.json"}
    assert any(row["flops"] for row in json.loads((tmp_path / "profile" / "longest.json").read_text())["longest"])
