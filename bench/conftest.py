"""Options of `pytest bench`, and what every row says of the run it comes from."""

import pytest
import torch

from bench.harness import environment


def pytest_addoption(parser):
    parser.addoption("--small", action="store_true", help="tiny shapes: shows that the suite works, measures nothing")
    parser.addoption("--skip-kernels", default="", metavar="A,B", help="kernels not to run, by name")


@pytest.fixture(scope="session")
def run_info(pytestconfig):
    """Device, versions, commit, date, and on a GPU the roofs measured in this run, per second."""
    from bench.measure import copy_bandwidth, matmul_rate

    small = pytestconfig.getoption("small")
    info = environment() | {"small": small}
    if torch.cuda.is_available():
        info |= {"copy_bytes_per_second": copy_bandwidth(small), "matmul_flops_per_second": matmul_rate(small)}
    return info


@pytest.hookimpl
def pytest_benchmark_update_machine_info(machine_info):
    machine_info["node"] = ""  # a host's name is nobody's business


@pytest.hookimpl
def pytest_benchmark_update_json(benchmarks, output_json):
    """Give every row its ratio to the baseline of its case: eager, or on a CPU the reference's chain."""
    baselines = {}
    for row in output_json["benchmarks"]:
        info = row["extra_info"]
        if info.get("way") == info.get("baseline"):
            baselines[info.get("kernel"), info.get("case")] = row["stats"]["median"]
    for row in output_json["benchmarks"]:
        info = row["extra_info"]
        baseline = baselines.get((info.get("kernel"), info.get("case")))
        info["times_as_fast_as_baseline"] = baseline and round(baseline / row["stats"]["median"], 3)
