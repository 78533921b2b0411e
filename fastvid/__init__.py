"""fastvid: fast training of video-chat models of the Video-ChatGPT / PG-Video-LLaVA family.

From Python: `fastvid.Chat`, `fastvid.extract` and `fastvid.train`, with the settings `ChatConfig`, `ExtractConfig` and
`TrainConfig`. Each is imported when it is first used: PyTorch takes seconds.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` brings, for editors and type checkers
    from fastvid.config import ChatConfig, ExtractConfig, TrainConfig
    from fastvid.extract import extract
    from fastvid.inference.chat import Chat
    from fastvid.train import train

__version__ = "0.1.0"
__all__ = ["Chat", "ChatConfig", "ExtractConfig", "TrainConfig", "extract", "train"]

_HOMES = {
    "Chat": "fastvid.inference.chat",
    "ChatConfig": "fastvid.config",
    "ExtractConfig": "fastvid.config",
    "TrainConfig": "fastvid.config",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in __all__:
        return importlib.import_module(f"fastvid.{name}")
    raise AttributeError(f"module 'fastvid' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Command(types.ModuleType):
    """The module of a command, which can be called as the function that it is named after."""

    def __call__(self, *args, **kwargs):
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def callable_command(name: str) -> None:
    """Have a command's module stand for its function: ``fastvid.train(config)`` beside ``fastvid.train.build``.

    Importing ``fastvid.train`` makes ``train`` of this package the module, whatever was there before.
    """
    if name != "__main__":
        sys.modules[name].__class__ = _Command
