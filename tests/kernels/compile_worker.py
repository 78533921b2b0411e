"""Compiles kernels for GPUs that are not there: ``compile_worker.py [NAME…]`` prints what they take, as JSON.

Runs without Triton's interpreter. Every launch becomes a compilation for each architecture; of the machine code it
tells what decides speed: registers, shared memory, stack and local memory (both 0 unless registers spill), and whether
loads and stores move 16 bytes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))

import triton  # noqa: E402
from fastvid_kernels import dispatch  # noqa: E402
from production import PRODUCTION  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

ARCHITECTURES = (80, 90, 100)
WIDE_LOAD = r"ld\.global\S*\.v(4\.[bf]32|2\.[bf]64|8)|cp\.async\S* .*, 0x10|cp\.async\.bulk\S*shared\S*\.global"
WIDE_STORE = r"st\.global\S*\.v(4\.[bf]32|2\.[bf]64|8)|cp\.async\.bulk\S*global\S*\.shared"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class AbsentGPU:
    """Driver of a GPU that can be compiled for; the device's number is its architecture, so each has its own cache."""

    architecture = ARCHITECTURES[0]

    def get_current_device(self):
        return self.architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_stream(self, device):
        return 0


def resources(kernel):
    """What a compiled kernel takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        dump = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    ptx = kernel.asm["ptx"]
    return {
        "registers": usage["REG"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "wide_loads": bool(re.search(WIDE_LOAD, ptx)),
        "wide_stores": bool(re.search(WIDE_STORE, ptx)),
    }


def compile_calls(calls):
    """{call: {kernel: {architecture: resources}}}; a kernel launched in several forms gets #2, #3, …"""
    gpu, run = AbsentGPU(), JITFunction.run
    driver.set_active(gpu)
    dispatch.INTERPRETED = True  # kernels take CPU tensors, as under the interpreter
    table = {}
    for description, call in calls.items():
        table[description] = {}
        for gpu.architecture in ARCHITECTURES:
            compiled = []

            def compile_only(self, *args, grid, warmup, **kwargs):
                compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

            JITFunction.run = compile_only
            try:
                call()
            finally:
                JITFunction.run = run
            names = []
            for name, kernel in dict.fromkeys(compiled):
                names.append(name)
                label = name if names.count(name) == 1 else f"{name}#{names.count(name)}"
                table[description].setdefault(label, {})[f"sm_{gpu.architecture}"] = resources(kernel)
    return table


def main(*names):
    with tempfile.TemporaryDirectory() as cache:
        if "TRITON_CACHE_DIR" not in os.environ:
            knobs.cache.dir = cache
        found = {name: compile_calls(PRODUCTION[name]()) for name in names or PRODUCTION}
    print(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
