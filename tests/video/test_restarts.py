"""An extraction whose process crashes: another one goes on, and what it leaves is what a run without a crash leaves."""

import os
import re
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from clips import draw
from crashes import ILLEGAL, NUMBERS, broken_context, extraction, lines
from forks import FORKS
from towers import write_tower

from fastvid.config import ExtractConfig
from fastvid.dist.processes import started
from fastvid.extract import extract
from fastvid.features.manifest import Manifest, read_manifest
from fastvid.video import restarts
from fastvid.video.decode.nvcuvid import NoDecoder, check
from fastvid.video.leases import NAME
from fastvid.video.restarts import History, is_broken, may_crash

CRASH, AGAIN = signal.SIGSEGV, "a new process tries each of them alone"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tower, videos, and their features as a run without a crash makes them."""
    folder = tmp_path_factory.mktemp("restarts")
    write_tower(folder / "tower")
    (folder / "videos").mkdir()
    for name, frames in NUMBERS.items():
        draw(folder / "videos" / f"{name}.mp4", frames)
    extract(
        ExtractConfig(
            str(folder / "videos"),
            str(folder / "clean"),
            vision_tower=str(folder / "tower"),
            num_frames=20,
            device="cpu",
            decode_workers=1,
        )
    )
    return folder


class Run:
    """The command in a process of its own, which goes wrong as a plan says (`crashes.Plan`)."""

    def __init__(self, made, folder, plan, *flags, together="", rank=None):
        self.made, self.log = made, folder / "log"
        self.features, self.said = folder / "features", [folder / f"{each}-{rank or 0}" for each in ("out", "err")]
        for each in self.said:
            each.unlink(missing_ok=True)
        argv = [
            "--video_dir_path",
            str(made / "videos"),
            "--clip_feat_path",
            str(self.features),
            "--num_frames",
            "20",
            "--vision_tower",
            str(made / "tower"),
            "--device",
            "cpu",
            "--decode_workers",
            "1",
            *flags,
        ]
        self.process = FORKS.Process(target=extraction, args=(argv, plan, together, self.log, self.said, rank))
        self.process.start()

    def end(self, code=0, left=False):
        """(what it printed, its lines on stderr about crashes), once it has ended with that exit code.

        left: whether there are leases of a process that ended unasked.
        """
        self.process.join(60)
        output, errors = (path.read_text() for path in self.said)
        assert self.process.exitcode == code, errors
        assert (self.features / NAME).exists() is left
        return output, re.findall(r"the process that extracts (?:crashed|ended|was ended) .*", errors)

    def wait_for(self, *what, times=1):
        end = time.monotonic() + 30
        while sum(line[:2] == [*what] for line in lines(self.log)) < times:
            assert time.monotonic() < end and self.process.is_alive(), self.said[1].read_text()
            time.sleep(0.01)

    def came(self, video):
        """What came to a video: each time (where, whether anything else was at hand)."""
        return [(where, others > 0) for name, where, _, others in lines(self.log) if name == video]

    def check(self, but=()):
        """The features are those of a run without a crash, and the manifest knows them."""
        there = {path.name: path.read_bytes() for path in self.features.glob("*.safetensors")}
        assert there == {
            path.name: path.read_bytes() for path in (self.made / "clean").glob("*.safetensors") if path.stem not in but
        }
        assert {name: entry["status"] for name, entry in read_manifest(self.features).items()} == {
            f"{name}.mp4": "failed" if name in but else "ok" for name in NUMBERS
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, how",
    [
        (CRASH, "SIGSEGV"),
        (signal.SIGKILL, "SIGKILL, as when memory runs out"),
        (RuntimeError(f"{ILLEGAL}\nCompile with"), ILLEGAL),
        (broken_context, "CUDA error 700: mapping a picture failed"),
    ],
)
def test_one_crash_costs_a_new_process(made, tmp_path, what, how):
    run = Run(made, tmp_path, {("c", "decoder"): [what], ("f", "decoder"): ["wait"]}, together="fc")
    output, told = run.end()
    run.check()
    assert "6 extracted, 0 there already, 0 failed of 6 videos" in output and output.count("videos/s") == 1
    rates = re.search(r"\((.*) videos/s, (.*) frames/s\)", output)
    assert float(rates[2]) / float(rates[1]) == pytest.approx(sum(NUMBERS.values()) / len(NUMBERS), rel=0.2)
    assert "started anew" in output and f"({how}" in output and "; by PyAV" not in output
    assert len(told) == 1 and f"({how}" in told[0] and "c.mp4 (decoding)" in told[0] and told[0].endswith(AGAIN)
    for video in "cf":
        assert run.came(video)[1:] == [("decoder", False), ("PyAV", False), ("tower", False)]
    assert len({pid for _, _, pid, _ in lines(run.log)}) == 2
    assert sum(map(int, re.findall(r"PyAV[^:]*(?:: it is only a stand-in)?: (\d)", output))) >= 6


@pytest.mark.slow
def test_several_suspects_are_tried_one_by_one(made, tmp_path):
    """Two at hand crash it, and again alone. PyAV decodes them; the tower of one crashes even so: it is a failure."""
    run = Run(
        made,
        tmp_path,
        {("f", "decoder"): [CRASH] * 2, ("e", "decoder"): [CRASH] * 2, ("e", "tower"): [CRASH]},
        "--max_failures",
        "0.2",
        together="fe",
    )
    output, told = run.end()
    run.check(but="e")
    reason = "crashes the process that extracts it, by PyAV as well (SIGSEGV)"
    assert read_manifest(run.features)["e.mp4"]["reason"] == reason
    assert "5 extracted, 0 there already, 1 failed of 6 videos" in output and f"e.mp4  {reason}" in output
    assert "SIGSEGV × 4" in output and "PyAV, for a crash: 1" in output
    assert re.search("by PyAV: (f.mp4, e.mp4|e.mp4, f.mp4)\n", output)
    assert sorted(line.rpartition("; ")[2] for line in told) == sorted(
        [
            AGAIN,
            "a new process has PyAV decode f.mp4 alone",
            "a new process has PyAV decode e.mp4 alone",
            "it is given up",
        ]
    )
    for video in "fe":
        assert run.came(video)[1:] == [("decoder", False), ("PyAV", False), ("tower", False)]
    again = Run(made, tmp_path, {}).end()[0]
    assert "1 extracted, 5 there already, 0 failed" in again and "started anew" not in again


@pytest.mark.slow
def test_a_video_that_crashes_pyav_too_fails_and_the_exit_code_says_so(made, tmp_path):
    run = Run(made, tmp_path, {("d", "decoder"): [CRASH] * 2, ("d", "PyAV"): [CRASH]})
    output, told = run.end(code=1)
    run.check(but="d")
    assert "5 extracted, 0 there already, 1 failed of 6" in output and "the exit code is 1" in output
    assert len(told) == 3 and told[-1].endswith("d.mp4 (decoding); it is given up")
    assert output.count("decoded by ") == 1


@pytest.mark.slow
def test_a_last_process_that_decodes_nothing_tells_what_the_others_decoded(made, tmp_path):
    """The files of all but two videos are there; of these the second one crashes every decoder."""
    Run(made, tmp_path, {("d", "decoder"): [CRASH] * 2, ("d", "PyAV"): [CRASH]}).end(code=1)
    (tmp_path / "features" / "e.safetensors").unlink()
    plan = {("d", "decoder"): [CRASH] * 9, ("d", "PyAV"): [CRASH] * 9}
    run = Run(made, tmp_path, plan, "--max_failures", "1")
    output, told = run.end()
    assert "1 extracted, 4 there already, 1 failed of 6" in output and told[-1].endswith("it is given up")
    (line,) = [line for line in output.splitlines() if line.startswith("decoded by ")]
    assert "it is only a stand-in: 1" in line and len(told) == 3
    run.check(but="d")


@pytest.mark.slow
def test_a_decoder_that_does_not_answer_costs_its_time_once(made, tmp_path):
    run = Run(made, tmp_path, {("c", "decoder"): ["hang"] * 9}, "--timeout", "0.5")
    output, told = run.end()
    run.check()
    assert [where for where, _ in run.came("c")] == ["decoder", "PyAV", "tower"]
    assert len(told) == 1 and "does not answer" in told[0] and "PyAV decode c.mp4 alone" in told[0]
    assert "6 extracted, 0 there already, 0 failed" in output


@pytest.mark.slow
@pytest.mark.parametrize("first", [False, True])
def test_a_crash_in_set_up_is_not_tried_again(made, tmp_path, first):
    """Neither at the start nor after a restart."""
    plan = {("set-up", "set-up"): [CRASH] if first else [None, CRASH], ("c", "decoder"): [CRASH]}
    run = Run(made, tmp_path, plan)
    output, told = run.end(code=-CRASH, left=not first)
    assert output == "" and len(told) == 2 - first and "it had not begun, and is not tried again" in told[-1]


@pytest.mark.slow
def test_crashes_without_end_end(made, tmp_path):
    """The machine is broken: every video crashes every process."""
    run = Run(made, tmp_path, {(name, "tower"): [CRASH] * 99 for name in NUMBERS}, "most=7")
    _, told = run.end(code=-CRASH, left=True)
    assert len(told) == 8 and "8 times without a video extracted, and is not tried again" in told[-1]


@pytest.mark.slow
def test_a_crash_after_the_end_changes_nothing(made, tmp_path):
    run = Run(made, tmp_path, {("end", "end"): [CRASH]})
    output, told = run.end()
    run.check()
    assert "6 extracted" in output and told == ["the process that extracts ended with SIGSEGV after all was done"]


@pytest.mark.slow
def test_a_signal_ends_a_process_that_was_started_anew(made, tmp_path):
    run = Run(made, tmp_path, {("c", "decoder"): [CRASH, "wait"]})
    run.wait_for("c", "decoder", times=2)
    os.kill(run.process.pid, signal.SIGTERM)
    output, _ = run.end(code=143)
    assert output.count("stopped by SIGTERM") == 1
    done = len(list(run.features.glob("*.safetensors")))
    assert f"{done} extracted, 0 there already, 0 failed of 6 videos" in output and done < 6
    again = Run(made, tmp_path, {})
    assert f"{6 - done} extracted, {done} there already" in again.end()[0]
    again.check()


@pytest.mark.slow
def test_a_signal_after_which_it_crashes_starts_no_other(made, tmp_path):
    run = Run(made, tmp_path, {("f", "decoder"): ["crash at the end"]})
    run.wait_for("f", "decoder")
    os.kill(run.process.pid, signal.SIGTERM)
    output, told = run.end(code=143, left=True)
    assert output == "" and len(told) == 1 and "(SIGSEGV)" in told[0] and "; " not in told[0]
    assert "stopped by SIGTERM; run it again" in run.said[1].read_text()


@pytest.mark.slow
def test_nothing_outlives_the_process_that_watches(made, tmp_path):
    run = Run(made, tmp_path, {("c", "decoder"): [CRASH, "wait"]})
    run.wait_for("c", "decoder", times=2)
    run.process.kill()
    run.end(code=-signal.SIGKILL, left=True)
    end = time.monotonic() + 10
    while any(started(pid) for _, _, pid, _ in lines(run.log)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(started(pid) for _, _, pid, _ in lines(run.log))
    Run(made, tmp_path, {}).end()
    run.check()


def test_a_kill_from_outside_is_no_crash_of_the_video(capsys):
    history, how = History(), restarts._OUT_OF_MEMORY
    for _ in range(3):
        history.crashed(how, ["a"])
    assert history.given_up == {"a": f"the process that extracts it alone, by PyAV, was ended from outside ({how})"}
    heard = restarts._Heard(History())
    heard.began = heard.settled = True
    heard.history.crashes[how] = restarts._MOST_KILLED - 1
    assert restarts._goes_on(heard.history, heard, how, None, 1)
    assert not restarts._goes_on(heard.history, heard, how, None, 1) and "not tried again" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_share_the_work_over_a_crash(made, tmp_path):
    """Whichever comes to the video: what they count is what there is."""
    runs = [Run(made, tmp_path, {("c", "decoder"): [CRASH], ("f", "decoder"): [CRASH]}, rank=rank) for rank in (0, 1)]
    for run in runs:
        run.process.join(60)  # leases are there until the last one ends
    outputs = [run.end()[0] for run in runs]
    runs[0].check()
    counts = [re.search(r"rank . of 2: (\d) extracted, (\d) there already, 0 failed of (\d)", each) for each in outputs]
    extracted, there, total = (sum(int(found[i]) for found in counts) for i in (1, 2, 3))
    assert extracted == 6 and total == 6 + there


def test_others_failures_since_the_start_are_not_tried_again(tmp_path):
    history, manifest = History(since=100.0), Manifest(tmp_path)
    history.settled["settled"], history.suspects["suspect"] = {}, restarts.AGAIN
    for name, status, when in (
        ("new", "failed", 101.0),
        ("old", "failed", 99.0),
        ("done", "ok", 101.0),
        ("settled", "failed", 101.0),
        ("suspect", "failed", 101.0),
    ):
        manifest.entries[name] = {"video": name, "status": status, "time": when}
    restarts._Watched(history, None).failed_since(manifest)
    assert manifest.failed_elsewhere == {"new"}


@pytest.mark.parametrize(
    "device, decoder, driver, expected",
    [
        ("cuda:1", "auto", False, True),
        ("cpu", "auto", True, False),
        ("cpu", "dali", False, True),
        (None, "pyav", True, True),
        (None, "auto", False, False),
    ],
)
def test_what_may_crash(tmp_path, monkeypatch, device, decoder, driver, expected):
    monkeypatch.setattr(restarts, "_DRIVER", ["/nowhere", str(tmp_path) if driver else "/nowhere"])
    assert may_crash(ExtractConfig("videos", "features", device=device, decoder=decoder)) is expected


@pytest.mark.parametrize(
    "error, expected",
    [
        (RuntimeError(ILLEGAL), True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), True),
        (torch.OutOfMemoryError("CUDA out of"), False),
        (RuntimeError("a CUDA error is not what this is"), False),
        (NoDecoder("making a parser failed"), False),
        (ValueError(ILLEGAL), False),
    ],
)
def test_what_breaks_a_process(error, expected):
    assert is_broken(error) is expected


@pytest.mark.parametrize("code, breaks", [(2, False), (700, True), (719, True), (701, False), (999, False)])
def test_results_of_the_driver_that_break_a_process(code, breaks):
    with pytest.raises(RuntimeError) as raised:
        check(code, "mapping a picture")
    assert is_broken(raised.value) is breaks and isinstance(raised.value, NoDecoder) is not breaks


def test_without_a_gpu_or_beside_threads_nothing_is_forked(monkeypatch):
    config, ends = ExtractConfig("videos", "features", device="cuda"), threading.Event()
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("it forks"))
    assert type(restarts.watched(replace(config, device="cpu"))) is restarts.Watch
    thread = threading.Thread(target=ends.wait)
    thread.start()
    assert type(restarts.watched(config)) is restarts.Watch
    ends.set()
    thread.join()
