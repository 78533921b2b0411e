"""The table of the GPU check: which tasks each stage has, in the order in which they matter, and how long they may
take."""

import ctypes
import functools

from bench.gpu.check import Task
from bench.report import KERNELS
from bench.train_presets import PRESETS, ROWS

STAGES = ("probe", "correct", "train", "kernels", "libraries", "sweep", "extract", "tests", "sanitizer", "quality")
FASTEST_FIRST = (
    "exact",
    "exact_8448",
    "exact_16896",
    "whole",
    "shared",
    "fp8",
    "fp8_16896",
    "shared_fp8",
    "full",
    "smallest",
    "smallest_nf4",
    "unpadded",
    "strong_video_first",
    "strong",
    "tuned",
    "reference",
    "compiled",
)


def has_gpu():
    """Whether CUDA's driver finds a device, asked without opening one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def tasks_of(stages, *, small):
    """The tasks of `stages`, in order; what training and its quality need is prepared while nothing is timed."""
    made = {
        "probe": _probe,
        "correct": _correct,
        "train": _train,
        "kernels": _kernels,
        "libraries": _libraries,
        "sweep": _sweep,
        "extract": _extract,
        "tests": _tests,
        "sanitizer": _sanitizer,
        "quality": _quality,
    }
    tasks = [task for stage in stages for task in made[stage](small)]
    for stage, name in (("quality", "clips"), ("train", "data")):
        if stage in stages and "correct" in stages[: stages.index(stage)]:
            prepared = next(task for task in tasks if (task.stage, task.name) == (stage, name))
            tasks.remove(prepared)
            tasks.insert(next(i for i, task in enumerate(tasks) if task.stage == "correct"), prepared)
    return tasks


def _task(
    stage, name, call, seconds, arguments, *, module=None, process=None, background=False, untimed=False, after=()
):
    if arguments["small"] and not background:  # imports take longer than tiny sizes: who has the same ones shares them
        process, untimed = module or stage, False
    return Task(
        stage, name, f"bench.gpu.{module or stage}", call, seconds, arguments, process, background, untimed, after
    )


def _probe(small):
    yield _task("probe", "card", "card", 60, {"small": small}, process="probe")
    yield _task("probe", "decoder", "decoder", 15, {"small": small})
    yield _task("probe", "copies", "copies", 15, {"small": small}, process="roofs")
    yield _task("probe", "products", "products", 40, {"small": small}, process="roofs")


def _correct(small):
    task = functools.partial(_task, "correct", untimed=True)
    for kernel in KERNELS:
        yield task(kernel, "kernel", 60, {"small": small, "name": kernel})
    for implementation in ("flash", "varlen", "sdpa"):
        yield task(
            f"attention {implementation}",
            "attention",
            30,
            {"small": small, "implementation": implementation},
            process=f"attention {implementation}",
        )
        yield task(
            f"attention {implementation}, grouped heads",
            "attention",
            30,
            {"small": small, "implementation": implementation, "grouped": True},
            process=f"attention {implementation}",
        )
    yield task("8-bit AdamW", "adamw_8bit", 40, {"small": small})
    yield task("FP8 product", "fp8_product", 40, {"small": small})
    yield task("reference's steps", "reference_steps", 60, {"small": small}, module="correct_steps")
    yield task("one sharded rank", "one_rank_sharded", 60, {"small": small}, module="correct_steps")
    yield task("two sharded ranks", "two_sharded_ranks", 150, {"small": small}, module="correct_steps")
    yield task("extraction", "extraction", 40, {"small": small}, module="correct_steps")
    yield task("loss curve", "loss_curve", 60, {"small": small}, module="correct_steps")


def preset_of(small):
    """What the training stage runs, of `bench.train_presets`."""
    return "tiny-gpu" if small else "gpu-7b"


def _train(small):
    preset = preset_of(small)
    yield _task("train", "data", "data", 90, {"small": small, "preset": preset}, background=True)
    profiled = {"exact", "fp8", "shared_fp8", "full"}
    rows = [name for name in FASTEST_FIRST if name in PRESETS[preset].rows["bf16"]]
    for name in rows:
        row = ROWS[name]
        process = " ".join((row.kind, *row.model_flags, *(["full"] if row.full else [])))
        limit, seconds = (
            (150, 20.0 if name == "exact" else 4.0)
            if row.kind == "compiled" or name == "exact"
            else (60, 0.0)
            if row.for_memory
            else (75, 4.0)
        )
        yield _task(
            "train",
            name,
            "row",
            limit,
            {"small": small, "preset": preset, "name": name, "seconds": seconds},
            process=process,
            after=("data",),
        )
        if name in profiled:
            yield _task(
                "train",
                f"{name} profile",
                "profile",
                40,
                {"small": small, "name": name},
                process=process,
                after=("data",),
            )


def _kernels(small):
    for kernel in KERNELS:
        yield _task("kernels", kernel, "rows", 60, {"small": small, "kernel": kernel})
    yield _task("kernels", "attention", "attention", 100, {"small": small})


def _libraries(small):
    """The same jobs by torch.compile and by the libraries that are installed."""
    for kernel in KERNELS:
        yield _task(
            "libraries", kernel, "rows", 100, {"small": small, "kernel": kernel, "others": True}, module="kernels"
        )


def _sweep(small):
    names = tuple(f"compile {kernel}" for kernel in KERNELS)
    for kernel, name in zip(KERNELS, names):
        yield _task("sweep", name, "compile_all", 90, {"small": small, "kernel": kernel}, background=True)
    for kernel in KERNELS:
        yield _task("sweep", kernel, "measure", 60, {"small": small, "kernel": kernel}, after=names)


def _extract(small):
    yield _task("extract", "tower", "tower", 60, {"small": small})
    yield _task("extract", "decoders", "decoders", 80, {"small": small})
    yield _task("extract", "pipeline", "pipeline", 80, {"small": small})


def _tests(small):
    for kernel in KERNELS if not small else KERNELS[:1]:
        yield _task(
            "tests",
            kernel,
            "unit_tests",
            100,
            {"small": small, "kernel": kernel, "seconds": 95},
            module="outside",
            background=True,
        )


def _sanitizer(small):
    for tool in ("memcheck", "racecheck"):
        yield _task("sanitizer", tool, "sanitizer", 90, {"small": small, "tool": tool, "seconds": 85}, module="outside")


def _quality(small):
    yield _task("quality", "clips", "clips", 90, {"small": small}, background=True)
    for name, call, limit in (("FP8 curve", "fp8_curve", 90), ("answers", "answers", 120)):
        yield _task("quality", name, call, limit, {"small": small}, process="quality", after=("clips",))
