"""Extraction's parts: the vision tower, pooling, copies, and the decoders that are there.

Dimensions: T frames, P patches, C channels.
"""

import copy
import functools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from fastvid_kernels import frame_patchify, spatio_temporal_pool, yuv_patchify
from fastvid_kernels.patch_rows import row_length
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled
from transformers import CLIPVisionConfig, CLIPVisionModel

from bench.gpu.goals import FP8_COSINE
from fastvid.video.encoder import FeatureEncoder
from fastvid.video.towers.graph import GraphedStates
from fastvid.video.towers.load import load_tower, open_tower
from fastvid.video.towers.products import check_fp8


@dataclass(frozen=True)
class Tower:
    """Sizes of a CLIP vision tower: pixels of an image's and of a patch's side, channels, layers, heads."""

    size: int
    patch: int
    hidden: int
    layers: int
    heads: int


CLIP_L, TINY = Tower(336, 14, 1024, 24, 16), Tower(28, 14, 32, 3, 4)
ON_GPU = torch.cuda.is_available()
MOST_ENGINES = 7  # of hardware decoders, on an H100 or H200
PATCHES = {
    "size": 336,
    "patch": 14,
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "dtype": torch.float16,
}


def write_tower(folder, shape):
    """A CLIP vision tower of random weights as a Hugging Face folder."""
    config = CLIPVisionConfig(
        image_size=shape.size,
        patch_size=shape.patch,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        projection_dim=16,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if ON_GPU else "cpu"):
        tower = CLIPVisionModel(config)
        with torch.no_grad():  # fresh biases are zero, and gains one: left out or swapped, they would not be missed
            for parameter in tower.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    tower.cpu().save_pretrained(folder)


def tower(small):
    """Images per second of the tower to its last layer but one; then of whole videos, from pixels to features."""
    shape, frames = (TINY, 5) if small else (CLIP_L, 100)
    dtypes = (torch.float16, torch.bfloat16) if ON_GPU else (torch.float32,)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (frames, shape.size, shape.size, 3), generator=generator, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as made:
        write_tower(made, shape)
        for dtype in dtypes:
            encoder = FeatureEncoder(made, dtype=dtype, num_temporal=frames)
            batch, name = encoder.batch_size, f"{dtype}".removeprefix("torch.")
            rows = frame_patchify(
                pixels[:batch].to(encoder.device),
                size=shape.size,
                patch=shape.patch,
                mean=encoder.tower.mean,
                std=encoder.tower.std,
                dtype=dtype,
            )
            images = _pictures(rows, shape)
            model, flops = load_tower(made, dtype).to(encoder.device), batch * _tower_flops(shape)
            yield {"row": f"tower's error beside transformers', {name}", **_errors(encoder.tower, model, rows, images)}
            ways = {"tower": lambda: encoder.tower.states(rows)}
            if dtype is torch.float16:
                more = torch.cat([rows] * (frames // batch))
                ways |= {
                    "transformers' layers": lambda: _their_states(model, images),
                    f"tower, {len(more)} images a pass": lambda: encoder.tower.states(more),
                    **{
                        f"tower, {kind.name.lower()}": functools.partial(_attending, kind, encoder.tower, rows)
                        for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
                    },
                }
            for who, call in ways.items():
                seconds, count = _timed(call, small), frames if "a pass" in who else batch
                yield {
                    "row": f"{who}, {name}",
                    "images_per_second": count / seconds,
                    "batch": count,
                    "flops_per_second": flops * count / batch / seconds,
                }
            if dtype is not dtypes[0]:
                continue
            yield from _ways_of_passes(encoder.tower, made, rows, flops, name, small)
            yield {"row": f"tower's kernels, {name}", **_kernels(ways["tower"])}
            seconds = _timed(lambda: encoder.encode(pixels), small)
            yield {
                "row": f"video of {frames} frames to features, {name}",
                "seconds": seconds,
                "videos_per_second": 1 / seconds,
            }
            states = torch.randn(frames, encoder.num_patches, shape.hidden, device=encoder.device).half()
            seconds = _timed(lambda: spatio_temporal_pool(states, num_temporal=frames), small)
            yield {"row": "pooling", "seconds": seconds, "bytes_per_second": states.nbytes / seconds}
            seconds = _timed(lambda: pixels.to(encoder.device), small)
            yield {"row": "frames to the device", "seconds": seconds, "bytes_per_second": pixels.nbytes / seconds}


def _ways_of_passes(plain, folder, rows, flops, name, small):
    """Images per second of passes as CUDA graphs, whose bits are those of plain calls; in FP8, and how near that is.

    FP8 is timed as it is used: as a graph. Without a GPU there is no graph, and the rows compare plain calls.
    """
    batch, exact = len(rows), plain.states(rows).clone()
    graphed = GraphedStates(plain, batch, rows.device)
    same = all(torch.equal(graphed(rows), exact) for _ in range(3))
    seconds = _timed(lambda: graphed(rows), small)
    yield {
        "row": f"tower, CUDA graph, {name}",
        "images_per_second": batch / seconds,
        "batch": batch,
        "flops_per_second": flops / seconds,
        "captured": graphed.captured,
        "same_bits": same,
        "status": "ok" if same and graphed.captured == ON_GPU else "failed",
    }
    try:
        check_fp8(rows.device)
    except ValueError as error:
        yield {"row": f"tower, FP8, {name}", "status": "ok", "absent": str(error)}
        return
    coarse = GraphedStates(open_tower(folder, rows.device, plain.dtype, fp8=True), batch, rows.device)
    cosine = torch.nn.functional.cosine_similarity(coarse(rows).float(), exact.float(), dim=-1)
    seconds = _timed(lambda: coarse(rows), small)
    yield {
        "row": f"tower, FP8, {name}",
        "images_per_second": batch / seconds,
        "batch": batch,
        "flops_per_second": flops / seconds,
        "captured": coarse.captured,
        "mean_cosine": cosine.mean().item(),
        "least_cosine": cosine.min().item(),
        "status": "ok" if cosine.mean() >= FP8_COSINE else "failed",
    }


@torch.no_grad()
def _their_states(model, images):
    """The tower's states by transformers' layers, without the one that is not needed."""
    states = model.pre_layrnorm(model.embeddings(images))
    for layer in model.encoder.layers[:-1]:
        states = layer(states, None)
    return states[:, 1:]


@torch.no_grad()
def _attending(kind, tower, rows):
    """The tower's states with one of torch's kinds of attention."""
    with sdpa_kernel(kind):
        return tower.states(rows)


def _kernels(call):
    """Where the device's time goes in a call: milliseconds and launches by kernel."""
    with profiled(activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]) as record:
        call()
        _synchronize()
    events = sorted(
        (
            (event.key[:80], (event.device_time_total if ON_GPU else event.cpu_time_total) / 1e3, event.count)
            for event in record.key_averages()
        ),
        key=lambda event: -event[1],
    )
    return {
        "device_ms": sum(spent for _, spent, _ in events),
        "kernels": [[key, round(spent, 3), count] for key, spent, count in events[:14]],
    }


def _errors(tower, model, rows, images, some=4):
    """How far the states of some images, by us and by transformers, are from transformers' in fp32."""
    exact = _their_states(copy.deepcopy(model).float(), images[:some].float())
    ours, theirs = (
        (states.float() - exact).norm().item() / exact.norm().item()
        for states in (tower.states(rows[:some]), _their_states(model, images[:some]))
    )
    return {"relative_error": ours, "theirs": theirs, "status": "ok" if ours <= 1.5 * theirs + 1e-6 else "failed"}


def _pictures(rows, shape):
    """[B, 3, size, size] that patch rows were cut from."""
    grid, patch = shape.size // shape.patch, shape.patch
    pixels = rows[..., : 3 * patch**2].reshape(-1, grid, grid, patch, patch, 3)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, shape.size, shape.size)


def _tower_flops(shape):
    """Of one image: products and attention of all layers but the last, and the patch embedding."""
    rows = (shape.size // shape.patch) ** 2 + 1
    layer = 2 * rows * 12 * shape.hidden**2 + 4 * rows**2 * shape.hidden
    return (shape.layers - 1) * layer + 2 * rows * 3 * shape.patch**2 * shape.hidden


def _timed(call, small, seconds=1.5):
    """Median seconds of a call, the device's work included."""
    times, begin = [], time.perf_counter()
    for _ in range(1 if small else 3):
        call()
    while len(times) < (1 if small else 5) or (not small and time.perf_counter() - begin < seconds):
        _synchronize()
        start = time.perf_counter()
        call()
        _synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _synchronize():
    if ON_GPU:
        torch.cuda.synchronize()


def write_clip(path, *, width, height, frames, codec="libx264"):
    """A clip of moving noise, 25 frames a second."""
    import av
    import numpy as np

    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (height // 8 + 32, width // 8 + 32, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "23"} if codec == "libx264" else {}
        for i in range(frames):
            dx, dy = 3 * i % 256, 2 * i % 256
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        np.ascontiguousarray(base[dy : dy + height, dx : dx + width]), format="rgb24"
                    )
                )
            )
        container.mux(stream.encode())


def decoders(small):
    """Frames per second of PyAV, and of the GPU's decoder by so many videos at a time; whether its bytes are PyAV's."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        yield {"row": "decoders", "status": "ok", "absent": f"no PyAV ({error}), which writes the clips"}
        return
    from fastvid.video.decode import decode

    sizes = ((80, 48, 30),) if small else ((1280, 720, 900), (1920, 1080, 600))
    with tempfile.TemporaryDirectory(dir=os.environ.get("FASTVID_CHECK_SCRATCH")) as made:
        clips = []
        for width, height, frames in sizes:
            path = Path(made) / f"{height}.mp4"
            write_clip(path, width=width, height=height, frames=frames)
            clips.append(path)
            for threads in (1, 0):
                begin = time.perf_counter()
                decode(path, size=336, threads=threads)
                seconds = time.perf_counter() - begin
                yield {
                    "row": f"PyAV, {height}p, one clip at a time, {threads or 'all'} threads",
                    "frames_per_second": frames / seconds,
                    "cores": os.cpu_count(),
                }
        yield from _hardware(clips, small)


def _hardware(clips, small):
    from fastvid.video.decode.bitstream import read_bitstream
    from fastvid.video.decode.nvcuvid import NoDecoder
    from fastvid.video.decode.nvdec import NvDecoder

    if not ON_GPU:
        yield {"row": "NVDEC", "status": "ok", "absent": "no GPU"}
        return
    try:
        hardware = [NvDecoder("cuda") for _ in range(2 * MOST_ENGINES)]
    except NoDecoder as error:
        yield {"row": "NVDEC", "status": "ok", "absent": str(error)}
        return
    data = os.environ.get("FASTVID_REFERENCE_DATA")
    others = sorted(Path(data, "videos").glob("*.m*")) if data else []
    for path in (*clips, *others):
        yield _same_bytes(path, hardware[0])
    for path in clips:
        begin = time.perf_counter()
        stream = read_bitstream(path)
        yield {
            "row": f"reading {path.stem}p's container",
            "seconds": time.perf_counter() - begin,
            "packets": len(stream.ends),
            "frames": stream.info.frames,
        }
        for count in (1, MOST_ENGINES, 2 * MOST_ENGINES):
            seconds = _side_by_side(hardware[:count], stream)
            yield {
                "row": f"NVDEC, {path.stem}p, {count} videos at a time",
                "decoded_frames_per_second": count * len(stream.ends) / seconds,
                "video_frames_per_second": count * stream.info.frames / seconds,
                "videos_per_second": count / seconds,
            }
    for decoder in hardware:
        decoder.close()
    yield from _dali(clips)


def _dali(clips):
    """Frames per second of DALI's decoder, by so many videos at a time, and how far its RGB is from PyAV's."""
    from fastvid.video.decode import decode
    from fastvid.video.decode.bitstream import read_bitstream
    from fastvid.video.decode.dali import DaliDecoder
    from fastvid.video.decode.nvcuvid import NoDecoder

    try:
        decoders = [DaliDecoder("cuda") for _ in range(2 * MOST_ENGINES)]
    except NoDecoder as error:
        yield {"row": "DALI", "status": "ok", "absent": str(error)}
        return
    for path in clips:
        stream = read_bitstream(path)
        ours = decoders[0].decode(stream)
        true = torch.from_numpy(decode(path)[0]).to(ours.device)
        apart = (ours.int() - true.int()).abs().float()
        yield {
            "row": f"DALI beside PyAV, {path.stem}p",
            "frames": len(ours),
            "mean_difference": apart.mean().item(),
            "largest_difference": apart.max().item(),
        }
        del ours, true, apart
        for count in (1, MOST_ENGINES, 2 * MOST_ENGINES):
            seconds = _side_by_side(decoders[:count], stream, DaliDecoder.decode)
            yield {
                "row": f"DALI, {path.stem}p, {count} videos at a time",
                "decoded_frames_per_second": count * len(stream.ends) / seconds,
                "video_frames_per_second": count * stream.info.frames / seconds,
                "videos_per_second": count / seconds,
            }


def _same_bytes(path, decoder):
    """Whether the patch rows of a video's frames are those of PyAV's frames."""
    from fastvid.video.decode import decode
    from fastvid.video.decode.bitstream import Unsuited, read_bitstream

    row = {"row": f"NVDEC beside PyAV, {path.stem}"}
    try:
        stream = read_bitstream(path)
        ours = torch.empty(len(stream.wanted), 576, row_length(14), dtype=torch.float16, device="cuda")
        decoder.decode(stream, lambda pictures: _put(ours, pictures, stream.factors))
    except Unsuited as error:
        return row | {"unsuited": str(error)}
    frames, _ = decode(path, size=336)
    true = frame_patchify(torch.from_numpy(frames).cuda(), **PATCHES)
    different = int((ours != true).sum())
    return row | {
        "codec": stream.codec,
        "frames": len(true),
        "differing_values": different,
        "status": "failed" if different else "ok",
    }


def _put(rows_TPK, pictures, factors):
    made_FPK = yuv_patchify([planes for _, planes in pictures], [factors] * len(pictures), **PATCHES)
    for (places, _), made_PK in zip(pictures, made_FPK):
        for place in places:
            rows_TPK[place].copy_(made_PK)


def _to_patches(decoder, stream):
    rows_TPK = torch.empty(len(stream.wanted), 576, row_length(14), dtype=torch.float16, device="cuda")
    decoder.decode(stream, lambda pictures: _put(rows_TPK, pictures, stream.factors))


def _side_by_side(decoders, stream, call=_to_patches, times=2):
    """Seconds in which every decoder decodes a video, as many times, each in a thread."""

    def run(decoder):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(times):
                call(decoder, stream)
            torch.cuda.current_stream().synchronize()

    with ThreadPoolExecutor(len(decoders)) as pool:
        list(pool.map(run, decoders))  # decoders are made, kernels loaded
        begin = time.perf_counter()
        list(pool.map(run, decoders))
        return (time.perf_counter() - begin) / times


def pipeline(small):
    """`fastvid extract` on a folder of clips, by each decoder: videos per second from file to feature file."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        yield {"row": "pipeline", "status": "ok", "absent": f"no PyAV ({error}), which writes the clips"}
        return
    from fastvid.config import ExtractConfig
    from fastvid.extract import extract

    width, height, frames = (80, 48, 30) if small else (1280, 720, 900)
    runs = {"auto": 2 if small else 140, "pyav": 2 if small else 48}
    with tempfile.TemporaryDirectory(dir=os.environ.get("FASTVID_CHECK_SCRATCH")) as made:
        made = Path(made)
        write_tower(made / "tower", TINY if small else CLIP_L)
        write_clip(made / "clip.mp4", width=width, height=height, frames=frames)
        for name, count in {"warm": 2 if small else 20, **runs}.items():
            (made / f"videos-{name}").mkdir()
            for number in range(count):
                shutil.copy(made / "clip.mp4", made / f"videos-{name}" / f"{number:03}.mp4")
        first = None
        for decoder in ("warm", *runs) if ON_GPU else ("pyav",):
            folder = made / f"features-{decoder}"
            summary = extract(
                ExtractConfig(
                    video_dir_path=str(made / f"videos-{decoder}"),
                    clip_feat_path=str(folder),
                    vision_tower=str(made / "tower"),
                    num_frames=5 if small else 100,
                    decoder="auto" if decoder == "warm" else decoder,
                )
            )
            files = sorted(folder.glob("*.safetensors"))
            first = first or load_file(files[0])
            same = all(torch.equal(first["features"], load_file(path)["features"]) for path in files)
            good = summary.extracted == summary.total and same
            yield {
                "row": f"extract, {height}p, " + ("beginning" if decoder == "warm" else f"--decoder {decoder}"),
                "seconds": summary.seconds,
                "videos_per_second": summary.extracted / summary.seconds,
                "video_frames_per_second": summary.extracted * frames / summary.seconds,
                "decoders": dict(Counter(map(_decoder_of, files))),
                "same_features": same,
                "status": "ok" if good else "failed",
                **({} if good else {"error": str(summary)[:400]}),
            }


def _decoder_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["header"])["video"]["decoder"].split(",")[0].split(" ")[0]
