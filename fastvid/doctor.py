"""``fastvid doctor``: what this machine has, and what each absence costs. Its exit code is always 0.

Packages that are slow to import, or that act when imported, are looked up in the environment's metadata instead.
"""

import importlib.util
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from fastvid import __version__
from fastvid.config import DoctorConfig, parse

DECODERS = {"h264": "H.264", "hevc": "HEVC", "vp9": "VP9", "av1": "AV1", "mpeg4": "MPEG-4", "mjpeg": "MJPEG"}
FLASH_ATTENTION = {"2": ("flash_attn", "flash-attn"), "3": ("flash_attn_interface", "flash-attn-3"),
                   "4": ("flash_attn.cute", "flash-attn-4")}


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
    """Look at this machine; touches the GPU driver, but no GPU memory."""
    gpus = _gpus()
    return [*_machine(config), *gpus, *_kernels(), *_attention(), *_video(), *_extras(gpus)]


def _machine(config):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("machine", "python", True, f"{platform.python_version()}, fastvid {__version__}")
    yield Finding("machine", "cpu", True, f"{len(os.sched_getaffinity(0))} cores, {_gib(memory)} memory")
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
        remedy = "install torch's CUDA build" if build is None else "torch sees no device: check the driver (nvidia-smi)"
        return [*found, Finding("gpu", "cuda", False, f"CUDA {build}" if build else "a build of torch for the CPU",
                                f"training and extraction run on the CPU; {remedy}")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        detail = f"{device.name}, {_gib(device.total_memory)}, compute capability {device.major}.{device.minor}"
        found.append(Finding("gpu", f"cuda:{index}", True, detail))
    capability = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    found.append(Finding("gpu", "bf16", capability >= (8, 0), "",
                         "" if capability >= (8, 0) else "bf16 is emulated; it wants compute capability 8.0"))
    found.append(Finding("gpu", "fp8", capability >= (8, 9), "",
                         "" if capability >= (8, 9) else "no fp8 matrix products; they want compute capability 8.9"))
    return found


def _kernels():
    yield _package("kernels", "triton", "triton", "kernels run as plain torch operations; pip install triton (Linux)")


def _attention():
    found = [_package("attention", f"flash-attn {generation}", module, "", distribution)
             for generation, (module, distribution) in FLASH_ATTENTION.items()]
    found.append(Finding("attention", "torch varlen", _has_module("torch.nn.attention.varlen")))
    found.append(Finding("attention", "torch sdpa", True))
    if not any(finding.found for finding in found[:-1]):
        found[-1] = Finding("attention", "torch sdpa", True, "", "one call per sample: slower on a GPU")
    return found


def _video():
    home = "fastvid extract and fastvid chat cannot read videos; pip install av"
    finding = _package("video", "PyAV", "av", home)
    yield finding
    if finding.found:
        import av

        versions = ".".join(map(str, av.library_versions["libavcodec"]))
        yield Finding("video", "FFmpeg", True, f"libavcodec {versions}")
        missing = [label for name, label in DECODERS.items() if name not in av.codecs_available]
        present = [label for label in DECODERS.values() if label not in missing]
        yield Finding("video", "decoders", not missing, ", ".join(present),
                      f"cannot decode {', '.join(missing)}" if missing else "")
    yield _package("video", "DALI", "nvidia.dali", "videos are decoded on the CPU; pip install 'fastvid[gpu]'",
                   "nvidia-dali-cuda130", "nvidia-dali-cuda120")


def _extras(gpus):
    yield _package("optional", "bitsandbytes", "bitsandbytes", "no 8-bit optimizer: AdamW keeps 8 bytes per trained "
                   "parameter instead of 2; pip install 'fastvid[gpu]'")
    yield _package("optional", "liger-kernel", "liger_kernel", "the library's fused kernels are not there to choose "
                   "from; pip install 'fastvid[gpu]'", "liger-kernel")
    yield _package("optional", "tensorboard", "tensorboard", "metrics go to metrics.jsonl only; pip install tensorboard")
    yield _package("optional", "matplotlib", "matplotlib", "no loss curve at a run's end; pip install matplotlib")


def _package(group, name, module, cost, *distributions):
    """A package, found by its module and named by the version of the distribution that brings it."""
    if not _has_module(module):
        return Finding(group, name, False, "", cost)
    for distribution in distributions or (module,):
        try:
            return Finding(group, name, True, metadata.version(distribution))
        except metadata.PackageNotFoundError:
            continue
    return Finding(group, name, True)


def _has_module(name):
    """Whether a module could be imported; imports at most the packages above it, which are small."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


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


def main(argv=None) -> int:
    config = parse(DoctorConfig, argv)
    findings = examine(config)
    print(json.dumps([asdict(finding) for finding in findings], indent=1) if config.json else _table(findings))
    return 0


if __name__ == "__main__":
    from fastvid.cli import run

    run("doctor")
