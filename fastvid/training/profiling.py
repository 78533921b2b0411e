"""``--profile``: where the time of a few steps goes, as a trace for a browser, and what lies in the GPU's memory."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastvid.files import StrPath

WARM_UP, RECORDED = 3, 3  # steps: the first ones compile, allocate and read ahead
MEMORY_EVENTS = 200_000
SHOWN = 12


class Profiler:
    """Records steps `WARM_UP` + 1 to `WARM_UP` + `RECORDED` of this process's run into ``folder``.

    Args:
        folder: receives ``trace.json.gz`` (chrome://tracing, ui.perfetto.dev) and on a GPU ``memory.pickle``
            (pytorch.org/memory_viz); made if missing.
        device: where the steps compute.
        say: called with each line for the user.
        active: otherwise nothing is recorded.
    """

    def __init__(self, folder: StrPath, device: torch.device, say: Callable[[str], object], *, active: bool):
        self.folder, self.device, self.say = Path(folder), device, say
        self.gpu = device.type == "cuda"
        self.steps, self.active = 0, active
        self._profile = None

    def step(self) -> None:
        """A step is done. Waits for the device where the recording begins and ends."""
        self.steps += 1
        if self.active and self.steps == WARM_UP:
            self._begin()
        elif self.active and self.steps == WARM_UP + RECORDED:
            self.close()

    def close(self) -> None:
        """Write what is recorded; a run that ends sooner than the recording leaves what there is."""
        if not self.active:
            return
        self.active = False
        if self.gpu:
            torch.cuda.synchronize(self.device)
        if self._profile is not None:
            self._profile.stop()
        if self.steps <= WARM_UP:
            self.say(f"--profile: nothing was recorded: the run ended within its {WARM_UP} steps of warm-up")
            return
        recording, self._profile = self._profile, None
        assert recording is not None, "it began after the warm-up"
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json.gz"
        recording.export_chrome_trace(str(trace))
        self.say(_summary(recording, self.steps - WARM_UP, self.gpu))
        self.say(f"profile: {trace} (open it in ui.perfetto.dev or chrome://tracing)")
        if self.gpu:
            snapshot = self.folder / "memory.pickle"
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
            self.say(f"profile: {snapshot} (open it in pytorch.org/memory_viz)")
        else:
            self.say(
                "profile: no memory snapshot: torch takes one of a GPU only; the trace tells what each operator "
                "allocates"
            )

    def _begin(self):
        activities = [ProfilerActivity.CPU]
        if self.gpu:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self.device)  # so that the steps before are not among those recorded
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profile = profile(activities=activities, profile_memory=True, record_shapes=True, acc_events=True)
        self._profile.start()


def _summary(recording, steps, gpu):
    """The operators that take most time themselves, a line each."""

    def microseconds(event):
        return event.self_device_time_total if gpu else event.self_cpu_time_total

    events = sorted(recording.key_averages(), key=microseconds, reverse=True)
    total = sum(map(microseconds, events)) or 1
    lines = [
        f"profile of {steps} steps: operators by {'GPU' if gpu else 'CPU'} time of their own",
        f"{'ms a step':>10} {'share':>6} {'calls':>7}  operator",
    ]
    for event in events[:SHOWN]:
        lines.append(
            f"{microseconds(event) / steps / 1e3:10.2f} {microseconds(event) / total:6.1%} "
            f"{event.count / steps:7.1f}  {event.key[:88]}"
        )
    return "\n".join(lines)
