"""``fastvid embed``: videos, or their features, to the rows that a language model reads of them.

One file per video; what is there already is not made again.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvid.config import ChatConfig, EmbedConfig
from fastvid.features.names import SUFFIXES
from fastvid.files import NOTHING_MORE_FITS, remove_left_over, shown
from fastvid.flags import parse
from fastvid.inference.embed import Embedder, media_of
from fastvid.inference.source import VideoSource
from fastvid.signals import noted
from fastvid.video.encoder import make_current, open_device


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 with too many failures, 128 + signal after an interrupt."""
    from tqdm import tqdm

    config = parse(EmbedConfig, argv)
    if Path(config.output).suffix in (*SUFFIXES, ".bin", ".npz", ".pth") and not Path(config.output).is_dir():
        raise ValueError(
            f"--output {shown(config.output)} is to be a folder, which gets a .safetensors file for each video"
        )
    media, links = media_of(config.video, config.output, follow_links=config.follow_links)
    make_current(open_device(config.device))
    names = ChatConfig.__dataclass_fields__.keys() & EmbedConfig.__dataclass_fields__.keys()
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    source = VideoSource(ChatConfig(**settings))
    began, made, there, rows, failed, stopped = time.perf_counter(), 0, 0, 0, 0, 0

    def stop(number):
        nonlocal stopped
        stopped = number

    def complain(medium, error):
        told = str(error) if str(medium.path) in str(error) else f"{shown(medium.name)}: {error}"
        tqdm.write(f"fastvid embed: error: {told}", file=sys.stderr)

    try:
        embedder = Embedder(source, overwrite=config.overwrite)
        Path(config.output).mkdir(parents=True, exist_ok=True)
        remove_left_over(config.output)
        done = [embedder.is_done(medium) for medium in media]  # before anything is written: other settings are told
        hidden = len(media) < 2 or not sys.stderr.isatty()
        with noted(stop), tqdm(media, desc="embed", unit=" videos", disable=hidden, file=sys.stderr) as bar:
            for medium, known in zip(bar, done):
                if stopped:
                    break
                if known:
                    there += 1
                    continue
                try:
                    rows += len(embedder.make(medium))
                    made += 1
                except OSError as error:
                    if error.errno in NOTHING_MORE_FITS:
                        raise
                    failed += 1
                    complain(medium, error)
                except ValueError as error:
                    failed += 1
                    complain(medium, error)
    finally:
        source.close()
    seconds = max(time.perf_counter() - began, 1e-9)
    print(
        f"{made} made, {there} there already, {failed} failed of {len(media)} in {seconds:.1f} s "
        f"({made / seconds:.2f} videos/s, {rows / seconds:,.0f} rows/s)"
    )
    if links:
        print(f"{links} links were left out; --follow_links True follows them")
    if stopped:
        print("stopped; run it again to go on", file=sys.stderr)
        return 128 + stopped
    return int(failed > config.max_failures * len(media))


if __name__ == "__main__":
    from fastvid.cli import run

    run("embed")
