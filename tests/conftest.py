"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Recordings of the reference, its tokenizer and real clips. Large, so not part of the repository.
SHARED = Path(os.environ.get("FASTVID_REFERENCE_DATA", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared():
    """Folder of the reference's recordings."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"the reference's recordings are not at {SHARED}; set FASTVID_REFERENCE_DATA to their folder")
    return SHARED


@pytest.fixture(scope="session")
def tiny(shared, tmp_path_factory):
    """Folder with the tiny models, features, records and towers that the recordings were made on."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("tiny", shared / "golden" / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("tiny")
    module.main(str(folder))
    return folder
