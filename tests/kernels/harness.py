"""What all tests of kernels share: the device, the table of tolerances, comparison with eager torch, what was
launched."""

import torch
from fastvid_kernels.dispatch import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
assert DEVICE == "cuda" or INTERPRETED, (
    "fastvid_kernels was imported before tests/conftest.py could have it interpreted"
)

# What a kernel may err where eager torch happens to be exact, as a part of the largest exact value: half a unit in the
# last place, and in fp32, where sums of different orders differ, four units.
FLOORS = {torch.float32: 2**-21, torch.float16: 2**-11, torch.bfloat16: 2**-8}
DTYPES = tuple(FLOORS)


def assert_close_as_eager(found, exact, eager):
    """`found` errs against `exact` (fp64) at most twice as much as `eager`, the same in found's dtype, plus a floor."""
    assert found.dtype == eager.dtype and found.shape == exact.shape == eager.shape
    if exact.numel() == 0:
        return
    exact = exact.double()
    error, eager_error = ((values.double() - exact).abs().max().item() for values in (found, eager))
    allowed = 2 * eager_error + FLOORS[found.dtype] * exact.abs().max().item()
    assert error <= allowed, f"largest error {error:.3g}, eager torch's {eager_error:.3g}, allowed {allowed:.3g}"


def noted_launches(monkeypatch, module):
    """List that receives every kernel that a kernel's module launches from now on."""
    noted, launch = [], module.launch

    def noting(kernel, *arguments, **options):
        noted.append(kernel)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(module, "launch", noting)
    return noted
