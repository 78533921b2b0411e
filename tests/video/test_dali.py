"""NVIDIA DALI as a decoder, run on the CPU for the codecs that it takes there: the right frames, in DALI's colours."""

import io
import sys
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from clips import draw, number
from streams import STREAMS, draw_stream
from test_bitstream import hide
from test_nvdec import stream_of
from towers import write_tower

from fastvid import extract as extraction
from fastvid.config import ExtractConfig
from fastvid.extract import extract
from fastvid.features.file import load_features
from fastvid.video.decode import dali as module
from fastvid.video.decode.bitstream import Unsuited, read_bitstream
from fastvid.video.decode.dali import ON_CPU, DaliDecoder, SizesSeen, as_matroska
from fastvid.video.decode.nvcuvid import NoDecoder
from fastvid.video.encoder import FeatureEncoder

# What DALI's conversion is in swscale's terms: chroma between samples is interpolated.
SMOOTH = (
    av.video.reformatter.Interpolation.BILINEAR
    | av.video.reformatter.Interpolation.ACCURATE_RND
    | av.video.reformatter.Interpolation.FULL_CHR_H_INT
)
ENCODERS = {"vp9": ("libvpx-vp9", "webm"), "vp8": ("libvpx", "webm"), "mjpeg": ("mjpeg", "avi")}


def installed():
    return pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (pip install '.[gpu]')")


@pytest.fixture
def decoder():
    installed()
    made = DaliDecoder("cpu")
    yield made
    made.close()


@pytest.fixture(scope="module")
def pictures():
    texture = np.random.default_rng(0).integers(0, 256, (24, 120, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    return [texture[:96, 3 * i % 300 :][:, :128].copy() for i in range(60)]


def clip(path, codec, **options):
    """A clip that DALI decodes on a CPU."""
    encoder, ending = ENCODERS[codec]
    return draw(
        path.with_suffix(f".{ending}"), codec=encoder, pixels="yuvj420p" if codec == "mjpeg" else "yuv420p", **options
    )


def in_dalis_colours(path):
    """Every frame of a video by PyAV, as DALI converts it."""
    with av.open(str(path)) as container:
        return [
            frame.reformat(format="rgb24", interpolation=SMOOTH).to_ndarray() for frame in container.decode(video=0)
        ]


def test_the_codecs_are_those_that_are_tried():
    assert {*ON_CPU} == {*ENCODERS}


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [[0, 3, 4, 50], [59], [40, 2, 2, 40, 7], list(range(60))])
@pytest.mark.parametrize("codec", ON_CPU)
def test_frames_are_those_wanted_to_the_byte(decoder, tmp_path, pictures, codec, wanted):
    path = clip(tmp_path / "a", codec, pictures=pictures, size=(128, 96), options={"g": "20"})
    frames, expected = decoder.decode(read_bitstream(path, indices=wanted)), in_dalis_colours(path)
    assert (frames.dtype, len(frames)) == (torch.uint8, len(wanted))
    for frame, index in zip(frames, wanted):
        assert np.array_equal(frame.numpy(), expected[index]), f"frame {index} differs"


def test_a_decoder_serves_many_videos(decoder, tmp_path):
    for size in ((64, 48), (96, 64), (64, 48)):
        frames = decoder.decode(read_bitstream(clip(tmp_path / "a", "vp9", size=size), indices=[9, 1, 4]))
        assert frames.shape[1:] == (size[1], size[0], 3)
        assert [number(frame.numpy()) for frame in frames] == [9, 1, 4]


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (0, 1, 1, 0)])
def test_frames_are_upright(decoder, tmp_path, matrix):
    a, b, c, d = (value << 16 for value in matrix)
    path = draw(
        tmp_path / "a.mp4",
        codec="libvpx-vp9",
        turn=lambda stream: stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30)),
    )
    stream = read_bitstream(path, indices=[5])
    stored = in_dalis_colours(path)[5]
    stored = stored.transpose(1, 0, 2) if stream.turn.transpose else stored
    expected = stored[:: -1 if stream.turn.mirror_rows else 1, :: -1 if stream.turn.mirror_columns else 1]
    assert expected.shape == (stream.info.height, stream.info.width, 3)
    assert np.array_equal(decoder.decode(stream)[0].numpy(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMS)
def test_remuxed_packets_decode_to_the_same_frames(tmp_path, pictures, name):
    """Of the codecs that only a GPU decodes as well: FFmpeg reads the file that DALI would get."""
    path = draw_stream(tmp_path / name, pictures)
    try:
        stream = read_bitstream(path, num_frames=7)
    except Unsuited:
        return
    with av.open(str(path)) as container:
        whole = [frame.to_ndarray() for frame in container.decode(video=0)]
    with av.open(io.BytesIO(as_matroska(stream))) as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == stream.codec
        if stream.codec in ("h264", "hevc"):  # DALI takes units of Matroska files to have their lengths before them
            assert container.streams.video[0].codec_context.extradata[0] == 1
        found = list(container.decode(video=0))
    assert [frame.pts for frame in found] == [40 * i for i in range(len(stream.numbers))]
    for frame, index in zip(found, np.sort(stream.numbers), strict=True):
        assert np.array_equal(frame.to_ndarray(), whole[index])


def test_what_the_cpu_backend_does_not_take(decoder, tmp_path):
    with pytest.raises(Unsuited, match="DALI does not decode h264 of 64×48 here"):
        decoder.decode(read_bitstream(draw(tmp_path / "a.mp4")))


@pytest.mark.slow
def test_packets_that_are_not_shown(decoder, tmp_path, pictures):
    times = sorted([*(24 * i for i in range(59)), 24 * 20 + 12])
    path = hide(clip(tmp_path / "a", "vp8", times=times, pictures=pictures, size=(128, 96)), 21)
    with pytest.raises(Unsuited, match="packets are not shown"):
        decoder.decode(read_bitstream(path))


def test_an_error_costs_one_pipeline(decoder, tmp_path):
    good = read_bitstream(clip(tmp_path / "a", "vp8", frames=30), indices=[0, 29])
    bad = replace(good, data=good.data[: good.ends[0]] + bytes(len(good.data) - good.ends[0]))
    decoder.decode(good)
    used = decoder._pipeline
    with pytest.raises(Unsuited, match="^DALI fails: .*Failed to send packet to decoder: Invalid data"):
        decoder.decode(bad)
    assert decoder._pipeline is None
    assert [number(frame.numpy()) for frame in decoder.decode(good)] == [0, 29]
    assert decoder._pipeline not in (None, used)


def test_packets_that_cannot_be_written(decoder, tmp_path):
    stream = read_bitstream(clip(tmp_path / "a", "vp9", frames=30), indices=[0, 29])
    bad = replace(stream, data=stream.data[: stream.ends[0]] + bytes(len(stream.data) - stream.ends[0]))
    with pytest.raises(Unsuited, match="cannot be written to a file"):
        decoder.decode(bad)
    bare = read_bitstream(draw(tmp_path / "a.mp4", 5, options={"bf": "0"}))
    with pytest.raises(Unsuited, match="no parameter sets"):
        as_matroska(
            replace(bare, data=bare.data[bare.ends[0] :], ends=bare.ends[1:] - bare.ends[0], numbers=bare.numbers[1:])
        )


def test_frames_that_are_not_there_are_noticed(decoder, tmp_path, monkeypatch):
    """DALI's default would be black ones."""
    stream = read_bitstream(clip(tmp_path / "a", "vp9", frames=30), indices=[0, 29])
    short = replace(stream, data=stream.data[: stream.ends[-2]], ends=stream.ends[:-1], numbers=stream.numbers[:-1])
    monkeypatch.setattr(module, "as_matroska", lambda _: as_matroska(short))
    with pytest.raises(Unsuited, match="DALI fails: Unexpected out-of-bounds frame index"):
        decoder.decode(stream)


def test_pictures_of_another_size_are_noticed(decoder, tmp_path, monkeypatch):
    stream = read_bitstream(clip(tmp_path / "a", "vp9"))
    untrue = replace(stream, info=replace(stream.info, width=66))
    monkeypatch.setattr(module, "as_matroska", lambda _: as_matroska(stream))
    with pytest.raises(Unsuited, match=r"DALI gives \[9, 48, 64, 3\] values for 9 frames of 66×48"):
        decoder.decode(untrue)


def sized(width, height, coded=None):
    """A bit stream of so large pictures."""
    return replace(stream_of([b"x"], [0], [0], size=(width, height)), coded_size=coded)


def test_sizes_that_the_cache_confuses():
    seen = SizesSeen()
    seen.enter(sized(1280, 534, (1280, 544)))
    seen.enter(sized(1280, 534, (1280, 544)))  # looks for 1280×544, of which none is stored
    seen.enter(sized(1280, 544, (1280, 544)))
    seen.enter(sized(1280, 544, (1280, 544)))  # its own, rightly
    with pytest.raises(Unsuited, match="a decoder for pictures of 1280×544"):
        seen.enter(sized(1280, 534, (1280, 544)))
    with pytest.raises(Unsuited, match="1280×544"):
        seen.enter(sized(1280, 540))  # where FFmpeg does not tell
    seen.enter(sized(1920, 800, (1920, 1088)))
    seen.enter(sized(1920, 1088, (1920, 1088)))
    with pytest.raises(Unsuited, match="1920×1088"):
        seen.enter(sized(1920, 800, (1920, 1088)))
    with pytest.raises(Unsuited):
        seen.enter(sized(1920, 1080, (1920, 1088)))


def test_a_refused_size_is_not_noted():
    seen = SizesSeen()
    seen.enter(sized(64, 64))
    with pytest.raises(Unsuited):
        seen.enter(sized(64, 50))
    seen.enter(sized(64, 128))
    assert seen._shown == {(64, 64), (64, 128)}


def test_a_gpus_decoder_asks_before_it_decodes(decoder, monkeypatch):
    monkeypatch.setattr(module, "_seen", SizesSeen())
    monkeypatch.setattr(module.nvcuvid, "takes", lambda *_: True)
    monkeypatch.setattr(module, "as_matroska", lambda _: b"")
    monkeypatch.setattr(decoder, "_run", lambda *_: torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    decoder._on_gpu = True
    assert decoder.decode(sized(64, 64)).shape == (1, 64, 64, 3)
    with pytest.raises(Unsuited, match="a decoder for pictures of 64×64"):
        decoder.decode(sized(64, 62))


def test_the_coded_size_is_the_streams(tmp_path):
    path = draw(tmp_path / "a.mp4", size=(66, 50))
    assert read_bitstream(path).coded_size == (80, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tower, and videos of which DALI takes three on a CPU."""
    folder = tmp_path_factory.mktemp("dali")
    write_tower(folder / "tower")
    (folder / "videos").mkdir()
    for codec in ON_CPU:
        clip(folder / "videos" / codec, codec, frames=12)
    draw(folder / "videos" / "h264.mp4", 12)
    return folder


def job(folder, output, decoder, **options):
    return ExtractConfig(
        str(folder / "videos"),
        str(output),
        vision_tower=str(folder / "tower"),
        num_frames=6,
        device="cpu",
        decoder=decoder,
        decode_workers=2,
        **options,
    )


@pytest.mark.slow
def test_extraction(folder, tmp_path):
    import_name = f"dali {installed().__version__}"
    words = [
        "--video_dir_path",
        str(folder / "videos"),
        "--clip_feat_path",
        str(tmp_path / "feats"),
        "--vision_tower",
        str(folder / "tower"),
        "--num_frames",
        "6",
        "--device",
        "cpu",
        "--decoder",
        "dali",
    ]
    assert extraction.main(words) == 0
    encoder = FeatureEncoder(folder / "tower", device="cpu", num_temporal=6)
    for codec in ON_CPU:
        features, header = load_features(tmp_path / "feats" / f"{codec}.safetensors")
        assert (header["video"]["decoder"], header["video"]["conversion"]) == (import_name, "dali")
        assert header["conversion"] == "dali"
        (path,) = (folder / "videos").glob(f"{codec}.*")
        frames = in_dalis_colours(path)
        assert torch.equal(features, encoder.encode(np.stack([frames[i] for i in header["frame_indices"]])))
    _, header = load_features(tmp_path / "feats" / "h264.safetensors")
    assert header["video"]["decoder"].startswith("pyav")
    assert (header["video"]["conversion"], header["conversion"]) == ("swscale", "dali")
    assert extract(job(folder, tmp_path / "feats", "dali")).skipped == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, after, told",
    [("dali", "auto", "conversion dali, not swscale"), ("pyav", "dali", "conversion swscale, not dali")],
)
def test_features_of_other_colours_are_not_mixed_in(folder, tmp_path, before, after, told):
    installed()
    assert extract(job(folder, tmp_path, before)).extracted == 4
    with pytest.raises(ValueError, match=f"4 feature files of other settings.*{told}.*--overwrite True"):
        extract(job(folder, tmp_path, after))
    assert extract(job(folder, tmp_path, after, overwrite=True)).extracted == 4


@pytest.mark.slow
def test_without_dali(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(NoDecoder, match="DALI cannot be loaded"):
        DaliDecoder("cpu")
    with pytest.raises(ValueError, match=r"--decoder dali: DALI cannot be loaded .*pip install -c constraints.txt"):
        extract(job(folder, tmp_path, "dali"))
    assert extract(job(folder, tmp_path, "auto")).extracted == 4, "auto wants none"
