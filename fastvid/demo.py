"""``fastvid demo``: a page of this machine to try a model: drop a clip, look at what stands for it, ask.

It is the page and the interface of ``fastvid serve --demo True``, which has more flags.
"""

import os
import sys
import webbrowser
from collections.abc import Sequence
from typing import Any

from fastvid.config import DemoConfig, ServeConfig
from fastvid.flags import parse
from fastvid.serving.launch import serve


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    config = parse(DemoConfig, argv)
    names = DemoConfig.__dataclass_fields__.keys() & ServeConfig.__dataclass_fields__.keys()
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}

    def ready(url):
        print(f"the page is at {url}", flush=True)
        # In a terminal alone Python would start a browser of text, which takes the terminal.
        if config.browser and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            try:
                webbrowser.open(url)
            except webbrowser.Error as error:
                print(f"no browser could be started ({error})", file=sys.stderr)

    serve(ServeConfig(**settings, demo=True), "demo", ready)
    return 0


if __name__ == "__main__":
    from fastvid.cli import run

    run("demo")
