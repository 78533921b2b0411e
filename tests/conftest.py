"""Fixtures shared by all tests."""

import gc
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import forks
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Recordings of the reference: tests/golden/README.md.
GOLDEN = Path(os.environ.get("FASTVID_REFERENCE_DATA", ROOT / "tests" / "golden"))


def pytest_configure():
    """Without a GPU, have the kernels interpreted, so that ``impl="triton"`` works; "auto" stays with plain torch.

    Triton decides when it and the kernels are first imported: here, before any test is. The variable must be gone
    again for the processes that tests start and for "auto", which reads it at each call.
    """
    if not (GOLDEN / "tiny.py").is_file():
        raise pytest.UsageError(f"FASTVID_REFERENCE_DATA: no recordings in {GOLDEN}; unset it to read tests/golden")
    if torch.cuda.is_available() or "fastvid_kernels" in sys.modules:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        package = importlib.import_module("fastvid_kernels")
        for module in pkgutil.iter_modules(package.__path__, "fastvid_kernels."):
            importlib.import_module(module.name)
        importlib.import_module("triton.experimental.gluon")  # by the first launch otherwise, and that is too late
    importlib.import_module("interpreter").repair()


def pytest_collection_modifyitems(config, items):
    """Under ``-n`` a file's tests stay together, for their fixtures; files of many slow tests come first."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -slow[item.path])
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.module.__name__))


def pytest_collection_finish():
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """Collect a test's own garbage, and leave what stays out of later collections."""
    result = yield
    gc.collect()
    gc.freeze()
    return result


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch):
    """Training runs without two thirds of what a small one takes; modules about these override this fixture.

    What a run leaves out of its collections it takes back at its end, and the next one would look at all that tests
    import. The picture that it leaves is an empty one.
    """
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(gc, "unfreeze", lambda: None)
    if (plots := sys.modules.get("fastvid.training.plots")) is not None:
        monkeypatch.setattr(plots, "draw_loss_curve", _empty_curve)


def _empty_curve(lines, png_path, name=None):
    if drawn := any("loss" in line or "eval_loss" in line for line in lines):
        from fastvid.files import atomic_path

        with atomic_path(png_path) as temporary:
            Path(temporary).write_bytes(b"")
    return drawn


@pytest.fixture
def forked(monkeypatch):
    """Programs in Python that are started, by the product as well, have imported what they need (`forks`)."""
    monkeypatch.setattr(subprocess, "Popen", forks.Popen)


@pytest.fixture(scope="module")
def poisoned():
    """Memory that torch hands out uninitialised holds NaN (integers: their largest value)."""
    torch.set_deterministic_debug_mode("warn")
    assert torch.empty(9).isnan().all()
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(scope="session")
def fake_nvcuvid(tmp_path_factory):
    """A stand-in for the driver's library of NVDEC, which decodes on the host. Built once."""
    from fastvid.video.decode import nvcuvid

    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        pytest.skip("no C compiler: apt-get install gcc")
    built = tmp_path_factory.mktemp("nvcuvid") / "fake.so"
    source = ROOT / "tests" / "support" / "fake_nvcuvid.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", source, "-o", built], check=True)
    return nvcuvid.library(str(built))


@pytest.fixture(scope="session")
def golden():
    """Folder of the reference's recordings."""
    return GOLDEN


@pytest.fixture(scope="session")
def recipe(golden):
    """The recordings' tiny.py: what they were made on, drawn from seeds."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("tiny", golden / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny(recipe, tmp_path_factory):
    """Folder with the tiny models, features, records and towers that the recordings were made on."""
    folder = tmp_path_factory.mktemp("tiny")
    recipe.main(str(folder))
    return folder


@pytest.fixture(scope="session")
def serving_folder(tmp_path_factory):
    """model/, and below videos/ clips of 4, 9 and 30 frames."""
    from chat_models import model_maker
    from clips import draw

    root = tmp_path_factory.mktemp("serving")
    model_maker(root)("model")
    (root / "videos").mkdir()
    for frames in (4, 9, 30):
        draw(root / "videos" / f"{frames}.mp4", frames)
    return root


@pytest.fixture(scope="session")
def serving_chat(serving_folder):
    """`Chat` of that model, for servers."""
    from fastvid.inference.chat import Chat

    settings = {"max_new_tokens": 12, "device": "cpu", "num_frames": 12, "question_order": "video_first"}
    chat = Chat(model_name_or_path=str(serving_folder / "model"), **settings)
    yield chat
    chat.close()


@pytest.fixture(scope="module")
def server(serving_chat, serving_folder):
    """A server of usual settings that allows files (`serving_run.Served`)."""
    from serving_run import served

    with served(serving_chat, serving_folder / "model", allowed_folder=str(serving_folder / "videos")) as running:
        yield running
