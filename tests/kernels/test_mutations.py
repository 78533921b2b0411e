"""Each deliberate fault of a kernel fails its test.

Its one test runs in a process forked from a server that has the kernels loaded, but not CUDA; there the module of the
kernel is replaced by one with the fault (`faulty`).
"""

import ast
import contextlib
import multiprocessing
import os
import re
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
from conftest import ROOT
from mutations import MUTATIONS

KERNELS = ROOT / "kernels" / "fastvid_kernels"
CASES = [(name, mutation) for name, mutations in MUTATIONS.items() for mutation in mutations]
# A last line that tells of no error: a test that cannot begin sees no fault.
FAILED = r"1 failed(, \d+ (warnings?|passed|deselected))* in .*"
# What a test of kernels imports.
PRELOAD = [
    "faulty",
    "torch",
    "pytest",
    "pytest_timeout",
    "xdist.plugin",
    "hypothesis",
    "numpy",
    "torch.utils.flop_counter",
]


def run_test(test, name, path, log):
    """In a process of its own: exit with pytest's code, once a kernel's module is what the file says."""
    from faulty import put_in

    put_in(name, Path(path))
    os.environ.pop("TRITON_INTERPRET", None)
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = pytest.main(
            [
                "-x",
                "-q",
                "--tb=line",
                "--disable-plugin-autoload",  # of other packages' plugins, two that the settings and marks name
                "-p",
                "pytest_timeout",
                "-p",
                "xdist.plugin",
                "-p",
                "no:cacheprovider",
                "-c",
                str(ROOT / "pyproject.toml"),
                "-o",
                f"pythonpath={ROOT} {ROOT}/kernels {ROOT}/tests/support",
                "--assert=plain",
                "-o",
                "filterwarnings=default",  # a fault shows in what a kernel computes
                test,
            ]
        )
    os._exit(code)


@pytest.fixture(scope="module")
def server():
    import torch

    # A process has one server. Other tests want one that does not interpret, so this one is theirs no longer than
    # needed.
    shared, context = forkserver._forkserver, multiprocessing.get_context("forkserver")
    shared._stop()
    others = shared._preload_modules
    context.set_forkserver_preload(PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # Python 3.11's server takes no other
        if not torch.cuda.is_available():  # decided when triton is imported, so in the server
            patch.setenv("TRITON_INTERPRET", "1")
        context.Process(target=os.getpid).start()
    yield context
    shared._stop()
    context.set_forkserver_preload(others)


def outcome(server, test, name, source, folder):
    """(pytest's code, what it printed) of a test of a kernel whose source is another."""
    (folder / f"{name}.py").write_text(source)
    path = f"{ROOT}/tests/kernels/test_{name}.py::{test}"
    process = server.Process(target=run_test, args=(path, name, folder / f"{name}.py", folder / "log"))
    process.start()
    process.join()
    return process.exitcode, (folder / "log").read_text()


def source_of(name):
    return ast.unparse(ast.parse((KERNELS / f"{name}.py").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("name, mutation", CASES, ids=[f"{name}-{mutation.test}" for name, mutation in CASES])
def test_fault_is_seen(name, mutation, server, tmp_path):
    source = source_of(name)
    assert source.count(mutation.old) == 1, f"{mutation.old!r} is to occur once in {name}.py"
    code, log = outcome(server, mutation.test, name, source.replace(mutation.old, mutation.new), tmp_path)
    assert code == pytest.ExitCode.TESTS_FAILED and re.fullmatch(FAILED, log.splitlines()[-1]), log


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_without_a_fault_it_passes(name, server, tmp_path):
    """The first of them: that every test passes is seen where they run without a server."""
    code, log = outcome(server, MUTATIONS[name][0].test, name, source_of(name), tmp_path)
    assert code == pytest.ExitCode.OK, log


@pytest.mark.slow
def test_every_kernel_has_three():
    with_kernels = {path.stem for path in KERNELS.glob("*.py") if "\n@triton.jit" in path.read_text()}
    assert set(MUTATIONS) == with_kernels
    assert all(len(set(mutations)) >= 3 for mutations in MUTATIONS.values())
