"""Extraction's parts: clips, the decoders that are there, whole videos from files to features; and the tower.

Dimensions: T frames, P patches, K values of a patch.
"""

import json
import os
import shutil
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from fastvid_kernels import frame_patchify, yuv_patchify
from fastvid_kernels.patch_rows import row_length
from safetensors import safe_open
from safetensors.torch import load_file

from bench.gpu.tower import CLIP_L, ON_GPU, TINY, tower, write_tower

__all__ = ["decoders", "pipeline", "tower"]  # the tasks of the stage

MOST_ENGINES = 7  # of hardware decoders, on an H100 or H200


PATCHES = {
    "size": 336,
    "patch": 14,
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "dtype": torch.float16,
}


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
