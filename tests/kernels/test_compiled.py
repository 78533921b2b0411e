"""The kernels as compiled for sm_80, sm_90 and sm_100 at production shapes, which needs no GPU.

Compilers allot registers differently, so there is a table for each of Triton's versions in use. After a change that is
meant, renew both, and read the difference::

    python tests/kernels/compile_worker.py tests/kernels/compiled.json [NAME…]
    pip install --target /tmp/triton-3.6.0 --no-deps triton==3.6.0
    PYTHONPATH=/tmp/triton-3.6.0 python tests/kernels/compile_worker.py tests/kernels/compiled.json [NAME…]
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


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PRODUCTION))
def test_compiled(name, tmp_path):
    result = subprocess.run(
        [sys.executable, FOLDER / "compile_worker.py", tmp_path / "compiled.json", name], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    calls = json.loads((tmp_path / "compiled.json").read_text())[triton.__version__][name]
    for description, kernels in calls.items():
        for label, by_architecture in kernels.items():
            kernel, odd = label.partition("#")[0], description.startswith("odd")
            for architecture, found in by_architecture.items():
                where = f"{description}, {label}, {architecture}"
                assert found["stack"] == found["local"] == 0, f"{where}: registers spill"
                assert odd or kernel not in WIDE or found["wide_loads"], f"{where}: narrow loads"
                assert odd or kernel not in WIDE_STORES or found["wide_stores"], f"{where}: narrow stores"
    if triton.__version__ not in COMMITTED:
        pytest.skip(f"compiled.json has no table of Triton {triton.__version__}, only of {', '.join(COMMITTED)}")
    assert calls == COMMITTED[triton.__version__][name]


def test_every_kernel_is_compiled():
    folder = FOLDER.parents[1] / "kernels" / "fastvid_kernels"
    assert set(PRODUCTION) == {path.stem for path in folder.glob("*.py") if "\n@triton.jit" in path.read_text()}
    assert COMMITTED.keys() >= {"3.6.0", "3.7.1"}
    assert all(set(table) == set(PRODUCTION) for table in COMMITTED.values())
