"""The kernels as compiled for sm_80, sm_90 and sm_100 at production shapes, which needs no GPU.

After a change that is meant, ``python tests/kernels/compile_worker.py tests/kernels/compiled.json [NAME…]`` renews the
committed table; read the difference.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from production import PRODUCTION, WIDE, WIDE_STORES

FOLDER = Path(__file__).parent
COMMITTED = json.loads((FOLDER / "compiled.json").read_text())


@pytest.mark.parametrize("name", sorted(PRODUCTION))
def test_compiled(name, tmp_path):
    result = subprocess.run([sys.executable, FOLDER / "compile_worker.py", tmp_path / "compiled.json", name],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    calls = json.loads((tmp_path / "compiled.json").read_text())["kernels"][name]
    for description, kernels in calls.items():
        for label, by_architecture in kernels.items():
            kernel, odd = label.partition("#")[0], description.startswith("odd")
            for architecture, found in by_architecture.items():
                where = f"{description}, {label}, {architecture}"
                assert found["stack"] == found["local"] == 0, f"{where}: registers spill"
                assert odd or kernel not in WIDE or found["wide_loads"], f"{where}: narrow loads"
                assert odd or kernel not in WIDE_STORES or found["wide_stores"], f"{where}: narrow stores"
    if triton.__version__ == COMMITTED["triton"]:  # another compiler allots other registers
        assert calls == COMMITTED["kernels"][name]


def test_every_kernel_is_compiled():
    folder = FOLDER.parents[1] / "kernels" / "fastvid_kernels"
    assert set(PRODUCTION) == {path.stem for path in folder.glob("*.py") if "\n@triton.jit" in path.read_text()}
    assert set(COMMITTED["kernels"]) == set(PRODUCTION)
