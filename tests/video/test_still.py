"""Images: decoding in the worker, feature files of patch rows alone, and which file is whose."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from clips import draw
from PIL import Image
from towers import write_tower

from fastvid.config import ExtractConfig
from fastvid.extract import extract
from fastvid.features.file import load_features
from fastvid.features.manifest import read_manifest
from fastvid.validation.sources import Sources
from fastvid.video.decode import DecodeError
from fastvid.video.decode.still import decode_still, is_still
from fastvid.video.decode.worker import DecodeWorker
from fastvid.video.features import VideoFeatures
from fastvid.video.listing import find_videos
from fastvid.video.sampling import nearest_indices

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def saved(path, pixels=PIXELS, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["png", "PNG", "bmp", "tif", "tiff"])
def test_what_is_stored_exactly_is_read_exactly(tmp_path, ending):
    path = saved(tmp_path / f"a.{ending}", format={"png": "PNG", "bmp": "BMP", "tif": "TIFF"}[ending.lower()[:3]])
    frames, info = decode_still(path)
    assert (frames[0] == PIXELS).all() and (info.width, info.height, info.frames, info.still) == (64, 48, 1, True)
    small, _ = decode_still(path, size=28)
    assert (small[0] == PIXELS[nearest_indices(48, 28)][:, nearest_indices(64, 28)]).all()


@pytest.mark.parametrize(("ending", "options"), [("jpg", {"quality": 95}), ("jpeg", {}), ("webp", {"lossless": True})])
def test_other_formats(tmp_path, ending, options):
    frames, info = decode_still(saved(tmp_path / f"a.{ending}", np.full((9, 7, 3), 200, np.uint8), **options))
    assert frames.shape == (1, 9, 7, 3) and abs(int(frames.mean()) - 200) < 3 and is_still(f"x.{ending.upper()}")
    assert info.codec in ("jpeg", "webp")


def test_modes_become_rgb(tmp_path):
    grey = PIXELS[..., 0]
    pictures = {
        "l": Image.fromarray(grey),
        "rgba": Image.fromarray(np.dstack([PIXELS, grey])),
        "p": Image.fromarray(grey).convert("P"),
        "deep": Image.fromarray(grey.astype(np.uint16) << 8),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
        frames, _ = decode_still(tmp_path / f"{name}.png")
        assert (frames[0] == (PIXELS if name == "rgba" else grey[..., None])).all(), name
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(DecodeError, match="of the mode F, are no picture's"):
        decode_still(tmp_path / "f.tif")


def test_an_image_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    frames, info = decode_still(saved(tmp_path / "a.png", exif=exif))
    assert (frames[0] == np.rot90(PIXELS, -1)).all() and (info.width, info.rotation) == (48, 270)


def _bomb(side):
    """A small PNG that says that it is large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")
    )


def _cut():
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()[:3000]


def _bad_exif():
    """A JPEG to be turned, whose EXIF has a width in letters."""
    entries = struct.pack(">HHIHH", 274, 3, 1, 6, 0) + struct.pack(">HHII", 256, 2, 5, 38)
    file = io.BytesIO()
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4) + b"2020\0"
    Image.fromarray(PIXELS).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no image", "is no image of a format that is read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image of a format that is read"),
        (_bomb(8_000), "its picture of 8000×8000 is over the limit of 35,389,440 pixels"),
        (_bomb(10_000), "its picture is over the limit"),
        (_bomb(20_000), "its picture is over the limit"),
        (_cut(), "is damaged"),
        (_bad_exif(), "is damaged: required argument is not an integer"),
        (b"", "is no image of a format that is read"),
    ],
)
def test_what_is_refused(tmp_path, content, reason):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DecodeError, match=reason):
        decode_still(tmp_path / "a.png")


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_what_is_no_fault_of_the_image_is_passed_on(tmp_path, monkeypatch, error):
    def fails(*_, **__):
        raise error

    path = saved(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(type(error)) as raised:
        decode_still(path)
    assert raised.value is error


@pytest.mark.slow
def test_the_worker_decodes_them(tmp_path):
    worker = DecodeWorker(60.0)
    try:
        frames, info, digest = worker.decode_and_hash(saved(tmp_path / "a.png"), size=28, num_frames=6)
        assert (frames == decode_still(tmp_path / "a.png", size=28)[0]).all() and info.still and len(digest) == 64
        (tmp_path / "b.png").write_bytes(_cut())
        with pytest.raises(DecodeError, match="is damaged"):
            worker.decode(tmp_path / "b.png")
        assert worker.decode(tmp_path / "a.png")[1].codec == "png"
    finally:
        worker.close()


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_tower(tmp_path_factory.mktemp("still") / "tower")


def job(tower, folder, **options):
    settings = {"vision_tower": str(tower), "num_frames": 6, "device": "cpu", "images": True, **options}
    return ExtractConfig(str(folder / "media"), str(folder / "features"), **settings)


@pytest.mark.slow
def test_an_image_has_the_patch_rows_of_a_video_of_one_frame(tower, tmp_path):
    media = tmp_path / "media"
    (media / "sub").mkdir(parents=True)
    # PNG frames of a lossless RGB codec: the same pixels, whichever way they come.
    draw(media / "video.mkv", codec="libx264rgb", pictures=[PIXELS], pixels="rgb24", options={"crf": "0"})
    saved(media / "sub" / "image.png")
    (media / "bad.jpg").write_bytes(b"no image")
    summary = extract(job(tower, tmp_path))
    assert (summary.extracted, summary.padded) == (2, 1) and dict(summary.failures).keys() == {"bad.jpg"}
    assert "is no image of a format" in summary.failures[0][1]
    video, _ = load_features(tmp_path / "features" / "video.safetensors")
    image, header = load_features(tmp_path / "features" / "sub" / "image.safetensors")
    assert image.shape == (4, 32) and torch.equal(image, video[6:])
    assert header["pooling"] == "spatial" and header["image"]["codec"] == "png" and "video" not in header
    assert header["source_bytes"] == (media / "sub" / "image.png").stat().st_size
    entry = read_manifest(tmp_path / "features")["sub/image.png"]
    assert entry["shape"] == [4, 32] and entry["decoder"].startswith("pillow")
    again = extract(job(tower, tmp_path))
    assert (again.extracted, again.skipped) == (0, 2)
    own = VideoFeatures(job(tower, tmp_path))
    try:
        features, _ = own(media / "sub" / "image.png")
    finally:
        own.close()
    assert torch.equal(features, image)


def test_images_are_taken_where_they_are_asked_for(tmp_path):
    for name in ("a.mp4", "a.jpg", "b.png", "b.webp"):
        (tmp_path / name).write_bytes(b"x")
    videos, others = find_videos(tmp_path, "out", ".safetensors")
    assert [video.name for video in videos] == ["a.mp4"] and others == {".jpg": 1, ".png": 1, ".webp": 1}
    videos, _ = find_videos(tmp_path, "out", ".safetensors", images=True)
    faults = {video.name: video.fault for video in videos}
    assert faults.pop("a.mp4") is None and all("rename one of them" in fault for fault in faults.values())
    assert Sources(tmp_path, tmp_path).video_of("a").name == "a.mp4"
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(ValueError, match="no file in it ends as a video does .*; --images True takes its 3 images"):
        find_videos(tmp_path, "out", ".safetensors")


def test_header_is_json(tmp_path):
    assert json.dumps(decode_still(saved(tmp_path / "a.png"))[1].__dict__)
