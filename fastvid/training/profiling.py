"""``--profile``: where the time of a few steps goes, as a table and as a trace, and what lies in the GPU's memory."""

import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from fastvid_kernels.dispatch import watch_launches
from fastvid_kernels.launch_bytes import launch_bytes, name_of
from torch.profiler import ProfilerActivity, profile

from fastvid.files import StrPath
from fastvid.training.longest import Roofs, as_json, longest, table

WARM_UP, RECORDED = 3, 3  # steps: the first ones compile, allocate and read ahead
MEMORY_EVENTS = 200_000


class Profiler:
    """Records steps `WARM_UP` + 1 to `WARM_UP` + `RECORDED` of this process's run into ``folder``.

    Args:
        folder: receives the kernels that took most time as ``longest.txt`` and ``longest.json``, ``trace.json.gz``
            (chrome://tracing, ui.perfetto.dev), and on a GPU ``memory.pickle`` (pytorch.org/memory_viz); made if
            missing.
        device: where the steps compute.
        say: called with each line for the user.
        active: otherwise nothing is recorded.
    """

    def __init__(self, folder: StrPath, device: torch.device, say: Callable[[str], object], *, active: bool):
        self.folder, self.device, self.say = Path(folder), device, say
        self.gpu = device.type == "cuda"
        self.steps, self.active = 0, active
        self._profile = None
        self._begun, self._moved, self._watching = 0.0, Counter(), ExitStack()

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
        seconds = time.perf_counter() - self._begun
        self._watching.close()
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
        self._say_longest(recording, seconds)
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
        self._watching.enter_context(watch_launches(self._launched))
        self._begun = time.perf_counter()

    def _launched(self, kernel, arguments, options):
        self._moved[name_of(kernel)] += launch_bytes(kernel, arguments, options)

    def _say_longest(self, recording, seconds):
        about = {"steps": self.steps - WARM_UP, "seconds": seconds, "gpu": self.gpu}
        roofs = Roofs.of(self.device)
        rows = longest(recording, moved=self._moved, roofs=roofs, **about)
        text = table(rows, **about)
        (self.folder / "longest.txt").write_text(f"{text}\n")
        (self.folder / "longest.json").write_text(f"{json.dumps(as_json(rows, roofs=roofs, **about), indent=1)}\n")
        self.say(text)
