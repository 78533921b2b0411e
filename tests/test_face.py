"""What `import fastvid` and `python -m fastvid` offer."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

import fastvid


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_nothing_heavy_is_imported_before_it_is_used():
    result = python(
        "-c",
        """
import sys, fastvid
assert {"Chat", "train", "extract", "TrainConfig"} <= set(dir(fastvid))
fastvid.TrainConfig, fastvid.ExtractConfig, fastvid.ChatConfig
assert not {"torch", "numpy", "transformers"} & set(sys.modules)
""",
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", ["fastvid", "fastvid.train, fastvid.extract"])
def test_a_command_is_its_function_whoever_imported_it_first(first):
    """Its config is refused before anything is done: there are no videos, and no data."""
    result = python(
        "-c",
        f"""
import {first}
import fastvid
for command, config in (fastvid.extract, fastvid.ExtractConfig("/none", "/none")), (
        fastvid.train, fastvid.TrainConfig("/none", ["/none.json"], output_dir="/tmp")):
    for _ in range(2):
        try:
            command(config)
        except (ValueError, OSError) as error:
            print(error)
assert fastvid.train.build and fastvid.extract.extract
""",
    )
    assert result.returncode == 0 and result.stdout.count("/none") >= 4, result.stderr


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        fastvid.trian  # noqa: B018 - looking is what raises
    assert fastvid.Chat.__name__ == "Chat"


def test_the_package_runs_as_the_command():
    assert python("-m", "fastvid", "--version").stdout == f"fastvid {fastvid.__version__}\n"
    assert "fastvid <command> [flags]" in python("-m", "fastvid", "--help").stdout


def test_a_version_is_told_in_three_places_alike():
    """What CONTRIBUTING's "Release" sets: the package's, the citation's, and the newest heading with a day."""
    cited = re.search(r"version = \{(.*?)\}", (ROOT / "README.md").read_text())
    released = re.search(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited and released
    assert cited[1] == released[1] == fastvid.__version__
