"""Frames, pixels, pooling, features and clips, by upstream's feature script."""

import hashlib
import json
import pickle
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from recordings import upstream

LENGTHS = [*range(1, 12), 17, 25, 49, 50, 51, 64, 90, 99, 100, 101, 102, 130, 150, 199, 200, 201, 250, 299, 300, 333]
LENGTHS += [390, 512, 750, 999, 1000, 1001, 1499, 1800, 2500, 4321, 9000, 20_000, 107_892]
ASKED = [(1000, 8), (1000, 16), (9, 8), (100, 32), (333, 64), (5000, 128), (2, 1)]
PICTURES = [(240, 320), (360, 640), (480, 854), (1080, 1920), (1920, 1080), (336, 336), (224, 224), (335, 337), (1, 1)]
PICTURES += [(2, 3), (93, 98), (62, 76), (700, 680)]
POOLED = {"a": (100, 576, 16, 11), "c": (37, 256, 32, 13), "d": (1, 576, 16, 14)}  # T, P, C, seed
POOL_RECIPE = (
    "rng = default_rng(seed); x = rng.standard_normal((T, P, C), float32) * 1.5; "
    "outliers = rng.permutation(C)[: max(1, C // 16)]; x[..., outliers] *= 40; "
    "x += rng.standard_normal((1, 1, C), float32); x[..., outliers[0]] += 200; float16"
)


def frames(module):
    chosen = {str(total): module.get_seq_frames(total, min(total, 100)) for total in LENGTHS}
    asked = {f"{total},{count}": module.get_seq_frames(total, count) for total, count in ASKED}
    return {"meta": {"function": "get_seq_frames"}, "frames": chosen, "extra_desired": asked}


def preprocess(module, tower):
    """Where each pixel is taken from, and what the processor makes of each of its values."""
    nearest = {}
    for size in (336, 224):
        for height, width in PICTURES:
            y, x = np.mgrid[:height, :width]
            low = _loaded(module, np.stack([y % 256, x % 256, y // 256 * 16 + x // 256], -1), size).astype(int)
            rows, columns = low[..., 0] + low[..., 2] // 16 * 256, low[..., 1] + low[..., 2] % 16 * 256
            assert (rows == rows[:, :1]).all() and (columns == columns[:1]).all()
            nearest[f"{height}x{width}->{size}"] = {"row": rows[:, 0].tolist(), "col": columns[0].tolist()}
    digests, integer = {}, {}
    for size in (336, 224):
        digest, differs = hashlib.sha256(), []
        for length in range(1, 4097):
            y = np.arange(length)[:, None]
            picture = _loaded(module, np.stack([y % 256, y // 256, 0 * y], -1), size).astype("<i8")
            source = picture[:, 0, 0] + 256 * picture[:, 0, 1]
            digest.update(source.tobytes())
            if (source != np.arange(size) * length // size).any():
                differs.append(length)
        digests[str(size)], integer[str(size)] = digest.hexdigest(), differs
    values = np.arange(256, dtype=np.uint8).repeat(336 * 336 // 256 + 1)[: 336 * 336].reshape(336, 336, 1)
    exact = _pixels(tower, values.repeat(3, -1))
    table = np.stack([exact[:, values[..., 0] == v][:, 0] for v in range(256)], 1)
    meta = {
        "function": "load_video with frames in memory; CLIPImageProcessor.preprocess as main calls it, then .half()",
        "digest": "sha256 over the little-endian int64 maps of every length from 1 to 4096",
        "sha256": digests,
        "sizes_1_4096_where_integer_formula_i*L//n_differs": integer,
    }
    return {
        "meta": meta,
        "nearest": nearest,
        "lut_f32_hex": [[f"{int(v):08x}" for v in row] for row in table.view(np.uint32)],
        "lut_f16": table.astype(np.float16).tolist(),
    }


def _loaded(module, picture, size):
    """[size, size, 3] uint8 of one picture, by upstream's load_video."""
    reader = upstream.Reader({"one": picture.astype(np.uint8)[None]})
    with mock.patch.object(module, "VideoReader", reader):
        (image,) = module.load_video("one", shape=(size, size))
    return np.asarray(image)


def _pixels(tower, picture):
    """[3, N, N] float32, by the processor that main uses."""
    from PIL import Image
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(tower)
    return processor.preprocess([Image.fromarray(picture)], return_tensors="pt")["pixel_values"][0].numpy()


def pool(module):
    """fp16 means by numpy, as the feature script takes them, and by torch, as inference does."""
    import torch
    from video_chatgpt.inference import get_spatio_temporal_features_torch

    arrays, cases = {}, {}
    for case, (T, P, C, seed) in POOLED.items():
        drawn = np.random.default_rng(seed)
        x = drawn.standard_normal((T, P, C), dtype=np.float32) * np.float32(1.5)
        outliers = drawn.permutation(C)[: max(1, C // 16)]
        x[..., outliers] *= 40
        x += drawn.standard_normal((1, 1, C), dtype=np.float32)
        x[..., outliers[0]] += 200
        x = x.astype(np.float16)
        arrays[f"{case}_out"] = module.get_spatio_temporal_features(x)
        arrays[f"{case}_torch"] = get_spatio_temporal_features_torch(torch.from_numpy(x)).numpy()
        digest = hashlib.sha256(x.tobytes()).hexdigest()
        cases[case] = {"shape": [T, P, C], "seed": seed, "input_sha256": digest}
    meta = {"function": "get_spatio_temporal_features; get_spatio_temporal_features_torch", "recipe": POOL_RECIPE}
    return arrays, {"meta": meta, "cases": cases}


def features(module, towers, videos):
    """{"SIZE/NAME.pkl": [100 + P, C] fp16} of the whole feature script; `videos`: a folder, or frames in memory."""
    found = {}
    for size, version in (("336", "1.5"), ("224", "1.1")):
        with tempfile.TemporaryDirectory() as work:
            folder, reader = videos, None
            if isinstance(videos, dict):
                folder, reader = Path(work, "videos"), upstream.Reader(videos)
                folder.mkdir()
                for name in videos:
                    (folder / name).touch()
            argv = ["script", "--llava", version, "--video_dir_path", str(folder), "--clip_feat_path", f"{work}/out"]
            with upstream.feature_script(module, towers[size], reader), mock.patch.object(sys, "argv", argv):
                module.main()
            for path in sorted(Path(work, "out").iterdir()):
                found[f"{size}/{path.name}"] = pickle.loads(path.read_bytes())
            if len(list(Path(work, "out").iterdir())) != len(list(Path(folder).iterdir())):
                raise SystemExit(f"upstream's feature script did not process every video of {folder}")
    return found


def clips(module, folder):
    """Of each clip: frames that decord counts, which are taken, and digests of their pixels, stored and resized."""
    import decord

    seen = {}
    for path in sorted(folder.iterdir()):
        reader, taken = decord.VideoReader(str(path), ctx=decord.cpu(0)), []

        class Watched:
            def __init__(self, path, ctx):
                pass

            def __len__(self):
                return len(reader)

            def get_batch(self, indices):
                # One by one and in order: decord errs when it skips in MPEG-4.
                whole = [reader[i].asnumpy() for i in range(len(reader))]
                taken[:] = [indices, np.stack([whole[i] for i in indices])]
                return mock.Mock(asnumpy=lambda: taken[1])

        resized = {}
        for size in (336, 224):
            with mock.patch.object(module, "VideoReader", Watched):
                pictures = module.load_video(str(path), shape=(size, size))
            resized[str(size)] = hashlib.sha256(np.stack([np.asarray(p) for p in pictures]).tobytes()).hexdigest()
        seen[path.name] = {
            "frames": len(reader),
            "shape": list(taken[1].shape[1:]),
            "indices": taken[0],
            "sha256": hashlib.sha256(taken[1].tobytes()).hexdigest(),
            "resized_sha256": resized,
        }
    return {"meta": {"function": "load_video over decord"}, "clips": seen}


def write(path, recorded):
    """One JSON file, a line for each second key."""
    lines = []
    for name, value in recorded.items():
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
            lines.append(f" {json.dumps(name)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
