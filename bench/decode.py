"""Seconds from a video file to the vision tower's input, against the reference's way and a bare loop over the file.

    python bench/decode.py [--video FILE] [--rounds 5] [--json FILE]

Of one clip (default: 60 seconds of 720p H.264, drawn and encoded first: x264's preset medium, crf 23), 100 frames at
336 pixels:

- ``fastvid``: frames by `fastvid.video.decode.decode`, patch rows by `fastvid_kernels.frame_patchify`, with memory kept
  from video to video (`fastvid.dist.host_memory`), as `fastvid extract` has it on a CPU.
- ``reference``: PG-Video-LLaVA's way, frames by decord's ``get_batch``, then its float resize, PIL images and CLIP's
  image processor.
- ``pyav``: a loop that decodes the whole file with PyAV, converts nothing and keeps nothing.

Each way has a process of its own, in which it first runs once. Rounds take turns; the pixels are compared first.
``--json`` writes the rows and "ratios": ``preprocess_vs_reference``,
the reference's seconds over ours, and ``overhead_vs_pyav``, ours over the bare loop's.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
from fastvid_kernels import frame_patchify
from fastvid_kernels.patch_rows import row_length
from harness import environment
from PIL import Image
from transformers import CLIPImageProcessorPil

from fastvid.dist import host_memory
from fastvid.video.decode import decode
from fastvid.video.sampling import frame_indices

SIZE, PATCH, FRAMES = 336, 14, 100
SECONDS, RATE, WIDTH, HEIGHT = 60, 30, 1280, 720


def draw(path, seconds=SECONDS):
    """A texture that pans, with rectangles that move across it and grain: pictures that are predicted from others."""
    rng = np.random.default_rng(0)
    texture = rng.integers(64, 192, (HEIGHT // 16 + 8, WIDTH // 16 + 40, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    grain = rng.integers(0, 6, (8, HEIGHT, WIDTH, 1), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "medium", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(seconds * RATE):
            scene, at = divmod(i, 150)  # a cut every five seconds
            down, right = (scene * 24 + at // 3) % 120, (scene * 80 + at) % 600
            picture = texture[down : down + HEIGHT, right : right + WIDTH] + grain[i % 8]
            for k in range(4):
                x, y = (37 * k + (3 + k) * i) % (WIDTH - 100), (151 * k + 2 * at) % (HEIGHT - 100)
                picture[y : y + 100, x : x + 100] = 255 * np.array([k & 1, k >> 1, scene & 1], np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def ours(path, mean, std):
    frames, _ = decode(path, num_frames=FRAMES, size=SIZE)
    return frame_patchify(torch.from_numpy(frames), size=SIZE, patch=PATCH, mean=mean, std=std, dtype=torch.float32)


def reference(path, processor, size=SIZE):
    """[T, 3, size, size] float32, as PG-Video-LLaVA's save_spatio_temporal_clip_features.py makes it."""
    import decord

    reader = decord.VideoReader(str(path))
    frames = torch.from_numpy(reader.get_batch(frame_indices(len(reader), FRAMES)).asnumpy())
    small = torch.nn.functional.interpolate(frames.permute(0, 3, 1, 2).float(), size=(size, size))
    pictures = [Image.fromarray(picture) for picture in small.permute(0, 2, 3, 1).to(torch.uint8).numpy()]
    return processor.preprocess(pictures, return_tensors="pt")["pixel_values"]


def bare(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        return sum(1 for _ in container.decode(stream))


def patch_rows(pixels_T3SS):
    grid = SIZE // PATCH
    rows = pixels_T3SS.view(-1, 3, grid, PATCH, grid, PATCH).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return torch.nn.functional.pad(rows, (0, row_length(PATCH) - rows.shape[2]))


WAYS = {"fastvid": ours, "reference": reference, "pyav": bare}


def serve(name, path):
    """Go the way `name` whenever a line comes on stdin, and print the seconds. The first time is not told."""
    if name == "fastvid":
        host_memory.keep_freed(True)
    arguments = [path, *_about(name)]
    with torch.no_grad():
        WAYS[name](*arguments)
        print("ready", flush=True)
        for _ in sys.stdin:
            begin = time.perf_counter()
            WAYS[name](*arguments)
            print(time.perf_counter() - begin, flush=True)


def _about(name):
    """What a way needs beside the path."""
    if name == "pyav":
        return []
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return [processor] if name == "reference" else [processor.image_mean, processor.image_std]


@contextlib.contextmanager
def process(name, path):
    """A process of `serve`."""
    with subprocess.Popen(
        [sys.executable, __file__, "--serve", name, "--video", path],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as served:
        if served.stdout.readline() != "ready\n":
            raise SystemExit(f"the process of {name} ended")
        yield served


def ask(served):
    """Seconds of one more time."""
    served.stdin.write("\n")
    served.stdin.flush()
    return float(served.stdout.readline())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--video", type=Path, help="default: drawn")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of the drawn clip")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.video)
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = arguments.video or Path(folder) / "clip.mp4"
        if arguments.video is None:
            draw(path, arguments.seconds)
        with torch.no_grad():
            found, expected = ours(path, *_about("fastvid")), patch_rows(reference(path, *_about("reference")))
            if not torch.allclose(found, expected, atol=1e-6, rtol=0):
                raise SystemExit("the pixels are not the reference's")
        del found, expected
        served = {name: stack.enter_context(process(name, path)) for name in WAYS}
        seconds = {name: [] for name in WAYS}
        for _ in range(arguments.rounds):
            for name in WAYS:
                seconds[name].append(ask(served[name]))
        size = path.stat().st_size
    rows = [
        {"row": name, "seconds": statistics.median(found), "seconds_min": min(found), "seconds_max": max(found)}
        for name, found in seconds.items()
    ]
    median = {row["row"]: row["seconds"] for row in rows}
    ratios = {
        "preprocess_vs_reference": median["reference"] / median["fastvid"],
        "overhead_vs_pyav": median["fastvid"] / median["pyav"],
    }
    print(f"{path.name}, {size / 1e6:.1f} MB, {FRAMES} frames at {SIZE} pixels; {arguments.rounds} rounds")
    for row in rows:
        print(f"{row['row']:<10} {row['seconds']:6.2f} s ({row['seconds_min']:.2f}–{row['seconds_max']:.2f})")
    for name, ratio in ratios.items():
        print(f"{name} {ratio:.2f}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"environment": environment(), "rows": rows, "ratios": ratios}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
