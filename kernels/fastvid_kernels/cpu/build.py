"""C++ for CPUs with AVX512-BF16: sources that are compiled when they are first needed."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = (
    "-O3",
    "-std=c++17",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512bf16",
    "-mfma",
    "-fopenmp",
    "-shared",
    "-fPIC",
)

log = logging.getLogger("fastvid")


def foreseen_obstacle() -> str | None:
    """What keeps sources from being compiled or run here, as far as it is known without compiling; or None."""
    try:
        if reason := _unfit():
            return reason
        _compiler()
    except (OSError, RuntimeError, ValueError) as error:
        return str(error)
    return None


def _unfit():
    """Why this machine cannot run any of them, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"it is for Linux on x86-64, not {platform.system()} on {platform.machine()}"
    return None if " avx512_bf16" in Path("/proc/cpuinfo").read_text() else "this CPU has no AVX512-BF16"


def _compiler():
    """The command of the C++ compiler, which is installed."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"no C++ compiler is installed ({compiler[0]}; CXX names another)")
    return compiler


def load(source: Path, *, instead: str) -> ctypes.CDLL | str:
    """The library that `source` compiles to, or why there is none, of which a CPU that could run it is warned.

    Args:
        source: may include every header of this folder.
        instead: what is done without the library, for the warning.
    """
    try:
        if reason := _unfit():
            return reason
        return ctypes.CDLL(str(_compiled(_compiler(), source)))
    except subprocess.CalledProcessError as error:
        said = (error.stderr.decode(errors="replace").strip() or str(error)).splitlines()
        reason = f"{error.cmd[0]} cannot compile {source.name}: {next((x for x in said if 'error' in x), said[-1])}"
    except (OSError, RuntimeError, ValueError) as error:  # no compiler, no home, a folder that cannot be written, ...
        reason = f"its library cannot be compiled or loaded: {error}"
    log.warning("%s: %s", instead, reason)
    return reason


def _compiled(compiler, source):
    """The library's file, compiled unless the same sources were before by the same command; whole or not there."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    command = "\0".join([*compiler, *FLAGS]).encode()
    texts = [path.read_bytes() for path in (*sorted(FOLDER.glob("*.h")), source)]
    key = hashlib.sha256(b"\0".join([version, command, *texts])).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "fastvid"
    target = folder / f"{source.stem}-{key}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            made = Path(made) / target.name
            subprocess.run([*compiler, *FLAGS, str(source), "-o", str(made)], capture_output=True, check=True)
            made.replace(target)
    for path in (folder, target):
        found = path.stat()
        if found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
            raise RuntimeError(
                f"{path} belongs to another user or everyone may write there; XDG_CACHE_HOME names another folder"
            )
    return target


__all__ = ["foreseen_obstacle", "load"]
