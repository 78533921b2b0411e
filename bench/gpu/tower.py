"""The vision tower of extraction, pooling, and copies of frames to the device.

Dimensions: T frames, P patches, C channels.
"""

import copy
import functools
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch
from fastvid_kernels import frame_patchify, spatio_temporal_pool
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
