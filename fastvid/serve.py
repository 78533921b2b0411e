"""``fastvid serve``: answers questions about videos over HTTP, as OpenAI's chat completions."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvid.config import ChatConfig, ServeConfig
from fastvid.flags import parse
from fastvid.inference.chat import Chat
from fastvid.video.encoder import make_current, open_device

log = logging.getLogger("fastvid")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    config = parse(ServeConfig, argv)
    try:
        from fastvid.serving.server import Server, address, bind, of_this_machine
        from fastvid.serving.service import Service
    except ModuleNotFoundError as error:
        raise ValueError(f"fastvid serve needs {error.name}: pip install 'fastvid[serve]'") from error
    if config.allowed_folder is not None and not Path(config.allowed_folder).is_dir():
        raise ValueError(f"--allowed_folder {config.allowed_folder} is no folder; make it, or name another")
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    listener = bind(config)  # before the model, which takes minutes
    with listener:
        make_current(open_device(config.device))
        names = ChatConfig.__dataclass_fields__.keys() & ServeConfig.__dataclass_fields__.keys()
        settings: dict[str, Any] = {name: getattr(config, name) for name in names}
        chat = Chat(ChatConfig(**settings))
        try:
            service = Service(chat, config)
            if service.api_key is None and not of_this_machine(listener):
                log.warning("everybody who reaches %s may ask: give an --api_key", address(listener))
            print(f"{service.name} at {address(listener)}", file=sys.stderr, flush=True)
            Server(service, listener).serve_until_told()
        finally:
            chat.close()
    return 0


if __name__ == "__main__":
    from fastvid.cli import run

    run("serve")
