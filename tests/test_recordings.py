"""The committed recordings of the reference, and the script that makes them."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

RECORDINGS = ROOT / "tests" / "golden"


def test_recordings_are_small_and_of_one_making():
    assert sum(path.stat().st_size for path in RECORDINGS.rglob("*") if "__pycache__" not in path.parts) <= 2_000_000
    files = sorted(RECORDINGS.glob("*.json"))
    (made_with,) = {json.dumps(json.loads(path.read_text())["meta"]["versions"]) for path in files}
    versions, readme = json.loads(made_with), (RECORDINGS / "README.md").read_text()
    assert versions["upstream_changes"] == [] and versions["upstream_commit"] in readme
    assert f"Python {versions['python']}" in readme
    pinned = dict(line.split("==") for line in (RECORDINGS / "requirements.txt").read_text().splitlines()[1:])
    named = set(pinned) & set(versions)
    assert len(named) == 8 and all(versions[name].partition("+")[0] == pinned[name] for name in named)
    assert [path.name for path in RECORDINGS.iterdir() if path.name not in readme + "README.md __pycache__"] == []


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "record_upstream.py", tmp_path, tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert str(tmp_path) in done.stderr and "name a checkout of mbzuai-oryx/Video-LLaVA" in done.stderr


@pytest.mark.slow
def test_packages_that_upstream_does_not_run_with_are_told(tmp_path):
    """Its script is there, and imports something that nobody has."""
    for name in ("scripts/save_spatio_temporal_clip_features.py", "video_chatgpt/train/train.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("import no_such_package")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "record_upstream.py", tmp_path, tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert "no_such_package" in done.stderr and "install tests/golden/requirements.txt" in done.stderr


@pytest.mark.slow
def test_a_folder_without_recordings_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_face.py"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "FASTVID_REFERENCE_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4 and f"no recordings in {tmp_path}; unset it" in done.stderr
