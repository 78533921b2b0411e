"""Kernels into whose modules a fault can be put, once everything is imported: processes forked from here save that."""

import importlib
import pkgutil
import sys

import fastvid_kernels
import interpreter
import triton.experimental.gluon  # noqa: F401
from fastvid_kernels.dispatch import INTERPRETED

for found in pkgutil.iter_modules(fastvid_kernels.__path__, "fastvid_kernels."):
    importlib.import_module(found.name)
if INTERPRETED:
    interpreter.repair()


def put_in(name, path):
    """Have ``fastvid_kernels.<name>`` be what a file says, for all modules of the kernels that import from it too.

    They get its functions and classes. Constants they import none of; one such as 64 is the same object everywhere.
    """
    module = sys.modules[f"fastvid_kernels.{name}"]
    before = dict(vars(module))
    exec(compile(path.read_text(), str(path), "exec"), vars(module))
    changed = {key: old for key, old in before.items() if callable(old) and old is not vars(module)[key]}
    after = {id(old): vars(module)[key] for key, old in changed.items()}
    for other in [each for key, each in sys.modules.items() if key.partition(".")[0] == "fastvid_kernels"]:
        for key, value in list(vars(other).items()):
            if other is not module and id(value) in after:
                setattr(other, key, after[id(value)])
