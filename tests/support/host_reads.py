"""Counts where the host reads a tensor's values: on a GPU it would wait there for all the work before."""

import contextlib
import threading
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode

CONVERSIONS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
# Operators whose result, or the shape of it, depends on values.
READS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}


class HostReads(TorchDispatchMode):
    """While entered, `seen` receives (`where()`, what, the line of ours that did it) of every read of this thread.

    Args:
        monkeypatch: pytest's.
        where: gives the place in the run, such as its step.
        on_host: (object, name) of functions that read what lies on the host by contract; theirs do not count.
    """

    def __init__(self, monkeypatch, where, on_host=()):
        super().__init__()
        self.where, self.seen, self.suspended, self.thread = where, [], 0, None
        for name in CONVERSIONS:
            monkeypatch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name), name))
        for owner, name in on_host:
            entry = owner[name] if isinstance(owner, dict) else getattr(owner, name)
            set_entry = monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr
            set_entry(owner, name, self._suspending(entry))

    def __enter__(self):
        self.thread = threading.get_ident()
        return super().__enter__()

    def __exit__(self, *error):
        self.thread = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in READS or by_mask or repeats:
            self._note(name)
        return function(*args, **(kwargs or {}))

    def _counted(self, function, name):
        def counted(*args, **kwargs):
            self._note(name)
            return function(*args, **kwargs)

        return counted

    def _suspending(self, function):
        def suspending(*args, **kwargs):
            with self.not_counted():
                return function(*args, **kwargs)

        return suspending

    @contextlib.contextmanager
    def not_counted(self):
        self.suspended += 1
        try:
            yield
        finally:
            self.suspended -= 1

    def _note(self, what):
        if self.thread == threading.get_ident() and not self.suspended:
            ours = [f for f in traceback.extract_stack() if "fastvid" in f.filename and "tests" not in f.filename]
            self.seen.append((self.where(), what, f"{ours[-1].filename}:{ours[-1].lineno}" if ours else ""))
