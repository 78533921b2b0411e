"""Each deliberate fault of a kernel fails its test.

A fault goes into a copy of the kernels; its one test runs in a process forked from a server that has torch and Triton
loaded, but neither the kernels nor CUDA.
"""

import ast
import contextlib
import multiprocessing
import os
import shutil
from multiprocessing import forkserver

import pytest
from conftest import ROOT
from mutations import MUTATIONS

KERNELS = ROOT / "kernels" / "fastvid_kernels"
CASES = [(name, mutation) for name, mutations in MUTATIONS.items() for mutation in mutations]
# What a test of kernels imports beside the kernels.
PRELOAD = [
    "torch",
    "pytest",
    "pytest_timeout",
    "xdist.plugin",
    "hypothesis",
    "numpy",
    "triton",
    "triton.runtime.interpreter",
    "triton.experimental.gluon",
    "torch.utils.flop_counter",
]


def run_test(test, kernels, log):
    """In a process of its own: exit with pytest's code."""
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
                f"pythonpath={ROOT} {kernels} {ROOT}/tests/support",
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
        if not torch.cuda.is_available():  # decided when triton is imported, so in the server
            patch.setenv("TRITON_INTERPRET", "1")
        context.Process(target=os.getpid).start()
    yield context
    shared._stop()
    context.set_forkserver_preload(others)


@pytest.mark.slow
@pytest.mark.parametrize("name, mutation", CASES, ids=[f"{name}-{mutation.test}" for name, mutation in CASES])
def test_fault_is_seen(name, mutation, server, tmp_path):
    kernels = tmp_path / "kernels"
    shutil.copytree(KERNELS, kernels / "fastvid_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    path = kernels / "fastvid_kernels" / f"{name}.py"
    source = ast.unparse(ast.parse(path.read_text()))
    assert source.count(mutation.old) == 1, f"{mutation.old!r} is to occur once in {name}.py"
    path.write_text(source.replace(mutation.old, mutation.new))
    log = tmp_path / "log"
    process = server.Process(
        target=run_test, args=(f"{ROOT}/tests/kernels/test_{name}.py::{mutation.test}", kernels, log)
    )
    process.start()
    process.join()
    assert process.exitcode == pytest.ExitCode.TESTS_FAILED, log.read_text()


@pytest.mark.slow
def test_every_kernel_has_three():
    with_kernels = {path.stem for path in KERNELS.glob("*.py") if "\n@triton.jit" in path.read_text()}
    assert set(MUTATIONS) == with_kernels
    assert all(len(set(mutations)) >= 3 for mutations in MUTATIONS.values())
