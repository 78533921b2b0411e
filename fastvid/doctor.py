"""``fastvid doctor``: what this machine has, and what each absence costs. Its exit code is always 0.

Packages that are slow to import, or that act when imported, are looked up in the environment's metadata instead.
"""

import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from fastvid import __version__
from fastvid.config import DoctorConfig
from fastvid.dist import host_memory
from fastvid.flags import parse

DECODERS = {"h264": "H.264", "hevc": "HEVC", "vp9": "VP9", "av1": "AV1", "mpeg4": "MPEG-4", "mjpeg": "MJPEG"}
FLASH_ATTENTION = {"flash-attn 2": "flash-attn", "flash-attn 3": "flash-attn-3", "flash-attn 4": "flash-attn-4"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        group, name: what was looked for.
        found: whether this machine has it.
        detail: version or size.
        cost: what its absence costs, and how to get it; empty if it is there.
    """

    group: str
    name: str
    found: bool
    detail: str = ""
    cost: str = ""


def examine(config: DoctorConfig) -> list[Finding]:
    """Look at this machine."""
    return [*_machine(config), *_gpus(), *_kernels(), *_attention(), *_video(), *_optional()]


def _machine(config):
    yield Finding("machine", "python", True, f"{platform.python_version()}, fastvid {__version__}")
    yield Finding("machine", "cpu", True, f"{len(os.sched_getaffinity(0))} cores, {_gib(host_memory.total())} memory")
    for path in config.path:
        if Path(path).exists():
            free = shutil.disk_usage(path).free
            yield Finding("machine", "disk", True, f"{_gib(free)} free at {Path(path).resolve()}")
        else:
            yield Finding("machine", "disk", False, f"{path} does not exist", "name a folder that does: --path")


def _gpus():
    """torch and the devices that it sees."""
    import torch

    build = torch.version.cuda or torch.version.hip
    found = [Finding("gpu", "torch", True, torch.__version__)]
    if not torch.cuda.is_available():
        detail, remedy = (
            (f"CUDA {build}", "check the driver (nvidia-smi)")
            if build
            else ("torch is a build for the CPU", "with a GPU, install torch's CUDA build")
        )
        return [*found, Finding("gpu", "cuda", False, detail, f"everything runs on the CPU; {remedy}")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        detail = f"{device.name}, {_gib(device.total_memory)}, compute capability {device.major}.{device.minor}"
        found.append(Finding("gpu", f"cuda:{index}", True, detail))
    capability = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    for name, least in (("bf16", (8, 0)), ("fp8", (8, 9))):
        has = capability >= least
        cost = f"{name} matrix products want compute capability {least[0]}.{least[1]}"
        found.append(Finding("gpu", name, has, "", "" if has else cost))
    return found


def _kernels():
    yield _package("kernels", "triton", ["triton"], "nothing that computes can be imported; pip install triton")
    if importlib.util.find_spec("triton") is None:
        return
    from fastvid_kernels.cpu import rows_obstacle

    reason = rows_obstacle()
    yield Finding(
        "kernels",
        "avx512",
        not reason,
        "" if reason else "norms, rotations and SwiGLU in bf16 on this CPU",
        f"torch's operations serve bf16 on the CPU instead: {reason}" if reason else "",
    )


def _attention():
    import torch

    gpu = torch.cuda.is_available()
    for name, distribution in FLASH_ATTENTION.items():
        yield _package("attention", name, [distribution], "torch varlen serves instead" if gpu else "wants a GPU")
    varlen = gpu and importlib.util.find_spec("torch.nn.attention.varlen") is not None
    yield Finding("attention", "torch varlen", varlen, "", "" if varlen else "wants a GPU; torch sdpa serves instead")
    yield Finding("attention", "torch sdpa", True, "one call per sample")
    if importlib.util.find_spec("triton") is None:
        return
    from fastvid_kernels.cpu import attention_obstacle

    reason = attention_obstacle()
    yield Finding(
        "attention",
        "avx512",
        not reason,
        "" if reason else "bf16 on this CPU",
        f"torch sdpa serves bf16 on the CPU instead: {reason}" if reason else "",
    )


def _video():
    pyav = _package("video", "PyAV", ["av"], "videos cannot be read; pip install av")
    yield pyav
    if pyav.found:
        import av

        yield Finding("video", "FFmpeg", True, "libavcodec " + ".".join(map(str, av.library_versions["libavcodec"])))
        missing = [label for codec, label in DECODERS.items() if codec not in av.codecs_available]
        yield Finding(
            "video",
            "decoders",
            not missing,
            ", ".join(label for label in DECODERS.values() if label not in missing),
            f"videos in {', '.join(missing)} are refused" if missing else "",
        )
    yield _package(
        "video",
        "DALI",
        ["nvidia-dali-cuda130", "nvidia-dali-cuda120"],
        "no --decoder dali; pip install -c constraints.txt '.[gpu]'",
    )


def _optional():
    yield _package(
        "optional",
        "bitsandbytes",
        ["bitsandbytes"],
        "no --frozen_dtype nf4 and no --optim paged_adamw_8bit; pip install -c constraints.txt '.[gpu]'",
    )
    yield _package(
        "optional",
        "liger-kernel",
        ["liger-kernel"],
        "nothing yet: the benchmarks compare with its kernels; pip install -c constraints.txt '.[gpu]'",
    )
    yield _package(
        "optional", "tensorboard", ["tensorboard"], "metrics go to metrics.jsonl alone; pip install tensorboard"
    )
    for name in ("trackio", "wandb", "mlflow"):
        yield _package("optional", name, [name], f"no --report_to {name}; pip install {name}")
    yield _package("optional", "matplotlib", ["matplotlib"], "no picture of the loss curve; pip install matplotlib")


def _package(group, name, distributions, cost):
    """A package, by the first of its distributions that is installed."""
    for distribution in distributions:
        try:
            return Finding(group, name, True, metadata.version(distribution))
        except metadata.PackageNotFoundError:
            continue
    return Finding(group, name, False, "", cost)


def _gib(size):
    return f"{size / 2**30:.0f} GiB"


def _table(findings):
    width = max(len(finding.name) for finding in findings)
    lines, group = [], None
    for finding in findings:
        if finding.group != group:
            group = finding.group
            lines += ["", group]
        words = " — ".join(filter(None, (finding.detail, finding.cost)))
        lines.append(f"  {'+' if finding.found else '-'} {finding.name:<{width}}  {words}".rstrip())
    return "\n".join(lines[1:])


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(DoctorConfig, argv)
    findings = examine(config)
    print(json.dumps([asdict(finding) for finding in findings], indent=1) if config.json else _table(findings))
    return 0


if __name__ == "__main__":
    from fastvid.cli import run

    run("doctor")
