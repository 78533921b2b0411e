"""From the flags of a command to a server that runs until it is told to end."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvid.config import ChatConfig, ServeConfig
from fastvid.inference.chat import Chat
from fastvid.inference.source import VideoSource
from fastvid.video.encoder import make_current, open_device

log = logging.getLogger("fastvid")


def serve(config: ServeConfig, command: str = "serve", ready: Callable[[str], object] | None = None) -> None:
    """Load the model and serve it until a signal.

    Args:
        command: in whose name messages are.
        ready: told the server's URL once it answers.

    Raises:
        ValueError: flags, weights or an address that cannot be used.
    """
    try:
        from fastvid.serving.server import Server, address, bind, of_this_machine
        from fastvid.serving.service import Service
    except ModuleNotFoundError as error:
        raise ValueError(f"fastvid {command} needs {error.name}: pip install 'fastvid[serve]'") from error
    if config.allowed_folder is not None and not Path(config.allowed_folder).is_dir():
        raise ValueError(f"--allowed_folder {config.allowed_folder} is no folder; make it, or name another")
    _check_upstream(config)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    listener = bind(config)  # before the model, which takes minutes
    with listener:
        make_current(open_device(config.device))
        names = ChatConfig.__dataclass_fields__.keys() & ServeConfig.__dataclass_fields__.keys()
        settings: dict[str, Any] = {name: getattr(config, name) for name in names}
        source = (Chat if config.upstream is None else VideoSource)(ChatConfig(**settings))
        try:
            service = Service(source, config)
            if service.api_key is None and not of_this_machine(listener):
                log.warning("everybody who reaches %s may ask: give an --api_key", address(listener))
            print(f"{service.name} at {address(listener)}", file=sys.stderr, flush=True)
            Server(service, listener, ready).serve_until_told()
        finally:
            source.close()


def _check_upstream(config):
    """Refuse flags of a language model that another server has."""
    given = [name for name in ("adapter", "kv_cache_gib", "conv_mode", "question_order") if getattr(config, name)]
    if config.upstream is not None and given:
        raise ValueError(
            f"--{given[0]} concerns the language model, which --upstream has: leave it out here, and serve there the "
            "folder that `fastvid export --format llava` writes"
        )
