"""``fastvid serve``: answers questions about videos over HTTP, as OpenAI's chat completions."""

from collections.abc import Sequence

from fastvid.config import ServeConfig
from fastvid.flags import parse
from fastvid.serving.launch import serve


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    serve(parse(ServeConfig, argv))
    return 0


if __name__ == "__main__":
    from fastvid.cli import run

    run("serve")
