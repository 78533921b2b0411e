"""Attention for AVX512-BF16 is compiled when it is first needed: where it cannot be, another serves and the reason is
told."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from fastvid_kernels.cpu import attention as cpu_attention
from fastvid_kernels.cpu import attention_obstacle, avx512_attention, build

from fastvid.batch import AttentionLayout
from fastvid.model.attention import SDPA, choose_attention

pytestmark = pytest.mark.skipif(
    any(x in (attention_obstacle() or "") for x in ("it is for", "no AVX512", "no C++ compiler")),
    reason=f"attention for AVX512-BF16: {attention_obstacle()}",
)


@pytest.fixture
def anew():
    """The library is looked for again, now and after the test."""
    cpu_attention._library.cache_clear()
    yield
    cpu_attention._library.cache_clear()


def compiler(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def no_compiler(patch, tmp_path):
    patch.setattr(shutil, "which", lambda name: None)
    return "its library cannot be compiled or loaded: no C\\+\\+ compiler is installed"


def failing_compiler(patch, tmp_path):
    path = compiler(tmp_path / "failing", '[ "$1" = --version ] || { echo out of luck >&2; exit 1; }')
    patch.setenv("CXX", str(path))
    return f"{path} cannot compile attention.cpp: .*out of luck"


def broken_compiler(patch, tmp_path):
    path = compiler(tmp_path / "broken", "exit 1")
    patch.setenv("CXX", str(path))
    return f"{path} cannot compile attention.cpp"


def other_cpu(patch, tmp_path):
    read = Path.read_text
    patch.setattr(
        Path,
        "read_text",
        lambda self, *args, **options: (
            "flags : avx512f avx512bw" if str(self) == "/proc/cpuinfo" else read(self, *args, **options)
        ),
    )
    return "this CPU has no AVX512-BF16"


def no_folder(patch, tmp_path):
    (tmp_path / "file").write_text("")
    patch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    return f"its library cannot be compiled or loaded: .*{tmp_path / 'file'}"


def no_home(patch, tmp_path):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    patch.delenv("XDG_CACHE_HOME")
    patch.setattr(Path, "home", unknown)
    return "its library cannot be compiled or loaded: Could not determine home directory"


def unreadable_command(patch, tmp_path):
    patch.setenv("CXX", "g++ 'open")
    return "its library cannot be compiled or loaded: No closing quotation"


def folder_of_everyone(patch, tmp_path):
    (tmp_path / "cache" / "fastvid").mkdir(parents=True)
    (tmp_path / "cache" / "fastvid").chmod(0o777)
    return f"its library cannot be compiled or loaded: {tmp_path}/cache/fastvid belongs to another user or everyone may"


@pytest.mark.parametrize(
    "lack",
    [
        no_compiler,
        failing_compiler,
        broken_compiler,
        other_cpu,
        no_folder,
        no_home,
        unreadable_command,
        pytest.param(folder_of_everyone, marks=pytest.mark.slow),  # compiles, before it looks
    ],
)
def test_where_it_cannot_run_another_is_taken_and_the_reason_told(lack, anew, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reason = lack(monkeypatch, tmp_path)
    q, layout = torch.randn(5, 2, 16).bfloat16(), AttentionLayout.of_lengths([5])
    with pytest.raises(ValueError, match=f"'avx512' is impossible: {reason}.*; choose auto or sdpa"):
        choose_attention("avx512", q.device, q.dtype, 16)
    assert choose_attention("auto", q.device, q.dtype, 16) is SDPA
    with pytest.raises(RuntimeError, match=reason):
        avx512_attention(q, q, q, layout.cu_seqlens_q, layout.cu_seqlens_k)
    assert lack is folder_of_everyone or not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
def test_another_process_finds_it_compiled(anew, monkeypatch, tmp_path):
    log = tmp_path / "log"
    real = os.environ.get("CXX", "g++")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "noting", f'echo "$1" >> {log}\nexec {real} "$@"')))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert attention_obstacle() is None
    assert log.read_text().split() == ["--version", build.FLAGS[0]]
    log.unlink()
    question = "from fastvid_kernels.cpu import attention_obstacle as obstacle; raise SystemExit(obstacle())"
    subprocess.run([sys.executable, "-c", question], cwd=ROOT, check=True)
    assert log.read_text().split() == ["--version"]
    [made] = (tmp_path / "cache" / "fastvid").iterdir()
    assert made.suffix == ".so"
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -DOTHER")  # another command, another file
    cpu_attention._library.cache_clear()
    assert attention_obstacle() is None
    assert len(list((tmp_path / "cache" / "fastvid").iterdir())) == 2
