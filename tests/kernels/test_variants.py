"""Another number of rows never makes Triton compile a kernel anew, which would stop all ranks amid training."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Kernels with several forms: what is known when a model is built tells them apart, or, of pooling, the run of frames.
FORMS = {
    "_rope_qk_kernel": 2,  # there and back
    "_add_rms_norm_fwd_kernel": 2,  # to 16 bits, and to e4m3
    "_add_rms_norm_bwd_kernel": 2,  # likewise
    "_collect_kernel": 2,  # of one part of attention, or two
    "_collect_fp8_kernel": 2,
    "_spatio_temporal_pool_fwd_kernel": 4,
    "_spatio_temporal_pool_finish_kernel": 2,  # with counts or without, and
    "_spatio_temporal_pool_bwd_kernel": 2,
}  # frames in one run or in several


@pytest.mark.slow
def test_row_counts_and_offsets_make_no_variants():
    worker = Path(__file__).parent / "variants_worker.py"
    result = subprocess.run([sys.executable, worker], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    differing = {
        name: {
            argument: sorted({variant[argument] for variant in variants})
            for argument in variants[0]
            if len({variant[argument] for variant in variants}) > 1
        }
        for name, forms in found.items()
        for variants in forms
        if len(variants) > 1
    }
    assert differing == {}
    assert {name: len(forms) for name, forms in found.items()} == dict.fromkeys(found, 1) | FORMS
    sources = [path.read_text() for path in (Path(__file__).parents[2] / "kernels" / "fastvid_kernels").glob("*.py")]
    assert set(found) == {
        name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(\s*\w+_ptr", source, re.M)
    }
