"""The kernels as compiled for sm_80, sm_90 and sm_100 at production shapes, which needs no GPU.

Nothing spills, tiles fit shared memory, and loads and stores are wide. Compilers allot registers differently, so a
change is tried with other versions of Triton too; what they print tells the registers::

    pip install --target /tmp/triton-3.6.0 --no-deps triton==3.6.0
    PYTHONPATH=/tmp/triton-3.6.0:kernels python tests/kernels/compile_worker.py [NAME…]
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from production import PRODUCTION, WIDE, WIDE_STORES

FOLDER = Path(__file__).parent
SHARED = {"sm_80": 163 * 2**10, "sm_90": 227 * 2**10, "sm_100": 227 * 2**10}  # bytes that a block may have


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PRODUCTION))
def test_compiled(name, forked, request, tmp_path):
    command = [sys.executable, FOLDER / "compile_worker.py", name]
    # Kernels that are as they were need not be compiled again, unless pytest keeps nothing (-p no:cacheprovider).
    cache = getattr(request.config, "cache", None)
    kept = os.environ | {"TRITON_CACHE_DIR": str(tmp_path if cache is None else cache.mkdir("triton"))}
    result = subprocess.run(command, capture_output=True, text=True, env=kept)
    assert result.returncode == 0, result.stderr
    calls = json.loads(result.stdout)[name]
    assert calls and all(calls.values())
    for description, kernels in calls.items():
        for label, by_architecture in kernels.items():
            kernel, odd = label.partition("#")[0], description.startswith("odd")
            assert by_architecture.keys() == SHARED.keys()
            for architecture, found in by_architecture.items():
                where = f"{description}, {label}, {architecture}"
                assert found["stack"] == found["local"] == 0, f"{where}: registers spill"
                assert found["shared"] <= SHARED[architecture], f"{where}: more shared memory than there is"
                assert odd or kernel not in WIDE or found["wide_loads"], f"{where}: narrow loads"
                assert odd or kernel not in WIDE_STORES or found["wide_stores"], f"{where}: narrow stores"


def test_every_kernel_is_compiled():
    folder = FOLDER.parents[1] / "kernels" / "fastvid_kernels"
    assert set(PRODUCTION) == {path.stem for path in folder.glob("*.py") if "\n@triton.jit" in path.read_text()}
