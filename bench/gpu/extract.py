"""Extraction's parts: the CLIP tower, pooling, copies, and the decoders that are there.

Dimensions: T frames, P patches, C channels.
"""

import copy
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from fastvid_kernels import frame_patchify, spatio_temporal_pool
from transformers import CLIPVisionConfig, CLIPVisionModel

from fastvid.video.encoder import FeatureEncoder
from fastvid.video.towers.clip import load_tower


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
    config = CLIPVisionConfig(image_size=shape.size, patch_size=shape.patch, hidden_size=shape.hidden,
                              intermediate_size=4 * shape.hidden, num_hidden_layers=shape.layers,
                              num_attention_heads=shape.heads, projection_dim=16)
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
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (frames, shape.size, shape.size, 3), generator=generator, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as made:
        write_tower(made, shape)
        for dtype in (torch.float16, torch.bfloat16) if ON_GPU else (torch.float32,):
            encoder = FeatureEncoder(made, dtype=dtype, num_temporal=frames)
            batch, name = encoder.batch_size, f"{dtype}".removeprefix("torch.")
            rows = frame_patchify(pixels[:batch].to(encoder.device), size=shape.size, patch=shape.patch,
                                  mean=encoder.tower.mean, std=encoder.tower.std, dtype=dtype)
            images = _pictures(rows, shape)
            model, flops = load_tower(made, dtype).to(encoder.device), batch * _tower_flops(shape)
            yield {"row": f"tower's error beside transformers', {name}", **_errors(encoder.tower, model, rows, images)}
            for who, call in (("tower", lambda: encoder.tower.states(rows)),
                              ("transformers' layers", lambda: _their_states(model, images))):
                seconds = _timed(call, small)
                yield {"row": f"{who}, {name}", "images_per_second": batch / seconds, "batch": batch,
                       "flops_per_second": flops / seconds}
            seconds = _timed(lambda: encoder.encode(pixels), small)
            yield {"row": f"video of {frames} frames to features, {name}", "seconds": seconds,
                   "videos_per_second": 1 / seconds}
            states = torch.randn(frames, encoder.num_patches, shape.hidden, device=encoder.device).half()
            seconds = _timed(lambda: spatio_temporal_pool(states, num_temporal=frames), small)
            yield {"row": "pooling", "seconds": seconds, "bytes_per_second": states.nbytes / seconds}
            seconds = _timed(lambda: pixels.to(encoder.device), small)
            yield {"row": "frames to the device", "seconds": seconds, "bytes_per_second": pixels.nbytes / seconds}


@torch.no_grad()
def _their_states(model, images):
    """The tower's states by transformers' layers, without the one that is not needed."""
    states = model.pre_layrnorm(model.embeddings(images))
    for layer in model.encoder.layers[:-1]:
        states = layer(states, None)
    return states[:, 1:]


def _errors(tower, model, rows, images, some=4):
    """How far the states of some images, by us and by transformers, are from transformers' in fp32."""
    exact = _their_states(copy.deepcopy(model).float(), images[:some].float())
    ours, theirs = ((states.float() - exact).norm().item() / exact.norm().item()
                    for states in (tower.states(rows[:some]), _their_states(model, images[:some])))
    return {"relative_error": ours, "theirs": theirs, "status": "ok" if ours <= 1.5 * theirs + 1e-6 else "failed"}


def _pictures(rows, shape):
    """[B, 3, size, size] that patch rows were cut from."""
    grid, patch = shape.size // shape.patch, shape.patch
    pixels = rows[..., :3 * patch**2].reshape(-1, grid, grid, patch, patch, 3)
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
            container.mux(stream.encode(av.VideoFrame.from_ndarray(
                np.ascontiguousarray(base[dy:dy + height, dx:dx + width]), format="rgb24")))
        container.mux(stream.encode())


def decoders(small):
    """Frames per second of each decoder that is there, on a clip of H.264."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        yield {"row": "decoders", "status": "ok", "absent": f"no PyAV ({error}), which writes the clips"}
        return
    from fastvid.video.decode import decode

    sizes = ((80, 48, 30),) if small else ((1280, 720, 500), (1920, 1080, 500))
    with tempfile.TemporaryDirectory(dir=os.environ.get("FASTVID_CHECK_SCRATCH")) as made:
        for width, height, frames in sizes:
            path = Path(made) / f"{height}.mp4"
            write_clip(path, width=width, height=height, frames=frames)
            begin = time.perf_counter()
            decode(path, size=336)
            seconds = time.perf_counter() - begin
            yield {"row": f"PyAV, {height}p, one clip at a time", "frames_per_second": frames / seconds,
                   "cores": os.cpu_count()}
