"""Seconds from video files to feature files, against the reference's way; and whether memory stays flat.

    python bench/extract.py [--clips 4] [--rounds 3] [--json FILE]
    python bench/extract.py --flat 2000

``fastvid`` is the command `fastvid extract` as it is typed, in fp32 and, on CPUs that multiply it, in bf16, its
default there; process start and loading of the tower left out. ``reference``
is PG-Video-LLaVA's feature script on this machine, in fp32: frames by decord's ``get_batch``, its float resize, PIL
images, CLIP's image processor, transformers' CLIPVisionModel with all hidden states, two numpy means, a pickle. Every
row is a process of its own, which may use all cores; rows take turns. The tower has the sizes of CLIP ViT-B/32 and
random weights. The clips are copies of the one that ``decode.py`` draws: 60 seconds of 720p H.264.

The features are compared first. "ratios": ``extract_vs_reference``, videos per second of fastvid in the default dtype
over the reference's; ``extract_vs_reference_fp32``. "matrix_share" is the tower's rate, of a pass of frames, over the
best that large products of 2,048 and 4,096 rows and columns reach.

``--flat N`` extracts N small clips and tells the largest growth of the process's memory after the first tenth.
"""

import argparse
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, environment

from fastvid.dist import host_memory
from fastvid.video.encoder import default_dtype

FRAMES, SIZE, PATCH, HIDDEN, LAYERS = 100, 224, 32, 768, 12
DEFAULT = default_dtype(torch.device("cpu"))
WAYS = {
    **({"fastvid, bf16": "bfloat16"} if DEFAULT is torch.bfloat16 else {}),
    "fastvid, fp32": "float32",
    "reference": None,
}


def write_tower(folder, *, size=SIZE, patch=PATCH, hidden=HIDDEN, layers=LAYERS):
    """A CLIP vision tower of random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    CLIPVisionModel(
        CLIPVisionConfig(
            image_size=size,
            patch_size=patch,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64 or 1,
            projection_dim=16,
        )
    ).save_pretrained(folder)


def reference(videos, features, tower):
    """PG-Video-LLaVA's save_spatio_temporal_clip_features.py, its CUDA calls left out."""
    import decord
    from decode import reference as preprocess
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    model = CLIPVisionModel.from_pretrained(tower).eval()
    decord.logging.set_level(decord.logging.ERROR)
    begin = time.perf_counter()
    for path in sorted(Path(videos).iterdir()):
        pixels = preprocess(path, processor, size=SIZE)
        states = torch.zeros(len(pixels), (SIZE // PATCH) ** 2, HIDDEN)
        with torch.no_grad():
            for start in range(0, len(pixels), 32):
                found = model(pixels[start : start + 32], output_hidden_states=True).hidden_states[-2][:, 1:]
                states[start : start + 32] = found
        states = states.numpy().astype("float16")
        temporal, spatial = np.mean(states, axis=1), np.mean(states, axis=0)
        temporal = np.pad(temporal, ((0, FRAMES - len(temporal)), (0, 0)))
        with open(Path(features) / f"{path.stem}.pkl", "wb") as file:
            pickle.dump(np.concatenate([temporal, spatial], axis=0), file)
    return time.perf_counter() - begin


def fastvid(videos, features, tower, dtype):
    from fastvid.config import ExtractConfig
    from fastvid.extract import extract

    summary = extract(
        ExtractConfig(str(videos), str(features), vision_tower=str(tower), num_frames=FRAMES, dtype=dtype, format="pkl")
    )
    if summary.extracted != summary.total:
        raise SystemExit(str(summary))
    return summary.seconds


def one(way, videos, features, tower):
    """Run a way in this process, and print what it took as JSON."""
    import resource

    dtype = WAYS[way]
    seconds = fastvid(videos, features, tower, dtype) if dtype else reference(videos, features, tower)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "threads": torch.get_num_threads()}))


def tower_share(dtype):
    """FLOP/s of the tower over those of a large product, in one dtype."""
    from fastvid.video.encoder import FeatureEncoder

    host_memory.keep_freed(True)  # as `fastvid extract` does on a CPU
    with tempfile.TemporaryDirectory() as folder:
        write_tower(folder)
        encoder = FeatureEncoder(folder, device="cpu", dtype=dtype)
    tower, images = encoder.tower, encoder.batch_size
    rows = torch.randn(images, tower.num_patches, 3 * PATCH**2).to(dtype)
    tokens = tower.num_patches + 1
    layer = 24 * tokens * HIDDEN**2 + 4 * tokens**2 * HIDDEN
    flops = images * ((LAYERS - 1) * layer + 2 * tokens * 3 * PATCH**2 * HIDDEN)
    done = flops / _median(lambda: tower.states(rows))
    return done / max(_product_rate(side, dtype) for side in (2048, 4096))


def _product_rate(side, dtype):
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    return 2 * side**3 / _median(lambda: a @ b)


def _median(call, rounds=9):
    call()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def compare(folder, names):
    """Raise SystemExit if fastvid's features are not the reference's."""
    for name in names:
        of = {way: np.load(folder / way / f"{name}.pkl", allow_pickle=True).astype(np.float64) for way in WAYS}
        true = of.pop("reference")
        for way, found in of.items():
            limit = 1 - 1e-6 if WAYS[way] == "float32" else 0.9995
            cosine = (found * true).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(true, axis=1)
            if not cosine.min() >= limit:
                raise SystemExit(f"{name}: features at a cosine of {cosine.min():.6f} of the reference's")


def flat(count):
    """Extract `count` small clips; the process's memory after each hundredth of them."""
    import decode

    from fastvid.config import ExtractConfig
    from fastvid.extract import extract
    from fastvid.video.extraction import Extraction

    held = []
    counted = Extraction._count

    def noted(self, *arguments):
        counted(self, *arguments)
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    Extraction._count = noted
    with tempfile.TemporaryDirectory() as made:
        made = Path(made)
        write_tower(made / "tower", size=28, patch=14, hidden=64, layers=3)
        decode.draw(made / "clip.mp4", 1)
        (made / "videos").mkdir()
        for number in range(count):
            os.link(made / "clip.mp4", made / "videos" / f"{number:06}.mp4")
        summary = extract(
            ExtractConfig(str(made / "videos"), str(made / "features"), vision_tower=str(made / "tower"), num_frames=8)
        )
    warm = held[len(held) // 10 :]
    row = {
        "row": "memory",
        "clips": summary.extracted,
        "after a tenth": warm[0],
        "at the end": warm[-1],
        "most": max(warm),
        "growth": max(warm) / warm[0] - 1,
    }
    print(
        f"{summary.extracted} clips in {summary.seconds:.0f} s: {warm[0] / 2**20:.0f} MiB after a tenth of them, "
        f"at most {max(warm) / 2**20:.0f} later ({100 * row['growth']:+.2f} %)"
    )
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=60, help="of the drawn clip")
    parser.add_argument("--flat", type=int, help="clips of the memory test, which is then all that is done")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(*arguments.one)
        return
    if arguments.flat:
        rows, ratios = [flat(arguments.flat)], {}
    else:
        rows, ratios = timed(arguments)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"environment": environment(), "rows": rows, "ratios": ratios}, indent=1) + "\n"
        )


def timed(arguments):
    """(rows, ratios) of the ways, in turns."""
    import decode

    found = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_tower(folder / "tower")
        decode.draw(folder / "clip.mp4", arguments.seconds)
        (folder / "videos").mkdir()
        names = [f"{number:03}" for number in range(arguments.clips)]
        for name in names:
            shutil.copy(folder / "clip.mp4", folder / "videos" / f"{name}.mp4")
        for number in range(arguments.rounds):
            for way in WAYS:
                shutil.rmtree(folder / way, ignore_errors=True)
                (folder / way).mkdir()
                said = subprocess.run(
                    [sys.executable, __file__, "--one", way, folder / "videos", folder / way, folder / "tower"],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=ROOT / "bench",
                ).stdout
                found[way].append(json.loads(said.splitlines()[-1]))
            if number == 0:
                compare(folder, names)
    rows = []
    for way, runs in found.items():
        times = [run["seconds"] for run in runs]
        row = {
            "row": way,
            "clips": arguments.clips,
            "seconds": statistics.median(times),
            "seconds_min": min(times),
            "seconds_max": max(times),
            "peak_bytes": max(run["peak_bytes"] for run in runs),
            "videos_per_second": arguments.clips / statistics.median(times),
        }
        if WAYS[way]:
            row["matrix_share"] = tower_share(getattr(torch, WAYS[way]))
        rows.append(row)
        print(
            f"{way:<14} {row['seconds'] / arguments.clips:6.2f} s a video ({min(times) / arguments.clips:.2f}–"
            f"{max(times) / arguments.clips:.2f}), {row['peak_bytes'] / 2**20:.0f} MiB"
            + (f", tower at {100 * row['matrix_share']:.0f} % of a product's rate" if WAYS[way] else "")
        )
    rate = {row["row"]: row["videos_per_second"] for row in rows}
    default = next(way for way, dtype in WAYS.items() if dtype == str(DEFAULT).removeprefix("torch."))
    ratios = {
        "extract_vs_reference": rate[default] / rate["reference"],
        "extract_vs_reference_fp32": rate["fastvid, fp32"] / rate["reference"],
    }
    for name, ratio in ratios.items():
        print(f"{name} {ratio:.2f}")
    return rows, ratios


if __name__ == "__main__":
    main()
