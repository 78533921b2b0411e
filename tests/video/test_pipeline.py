"""Which decoder gets which video: a GPU's, over its stand-in, where it takes it and is idle; PyAV otherwise."""

import hashlib
import queue
import threading
import time
from dataclasses import replace

import pytest
import torch
from clips import draw
from test_bitstream import planes_of
from test_nvdec import packet, stream_of
from towers import write_tower

from fastvid.config import ExtractConfig
from fastvid.extract import extract
from fastvid.video import pipeline as module
from fastvid.video.decode import DecodeError
from fastvid.video.decode.bitstream import Unsuited
from fastvid.video.decode.nvcuvid import NoDecoder
from fastvid.video.decode.nvdec import NvDecoder
from fastvid.video.decode.worker import DecodeWorker
from fastvid.video.encoder import FeatureEncoder
from fastvid.video.pipeline import Pipeline

FRAMES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    write_tower(folder / "tower")
    (folder / "videos").mkdir()
    draw(folder / "videos" / "a.mp4", 20, options={"bf": "2"})
    return folder


@pytest.fixture(scope="module")
def video(folder):
    return folder / "videos" / "a.mp4"


@pytest.fixture(scope="module")
def encoder(folder):
    return FeatureEncoder(folder / "tower", device="cpu", num_temporal=FRAMES)


@pytest.fixture
def made(encoder, fake_nvcuvid, monkeypatch):
    """Makes a pipeline of one worker and one stand-in of a hardware decoder, or of another decoder that is given."""
    there = []

    def pipeline(decoder=None, **options):
        held = decoder or NvDecoder("cpu", fake_nvcuvid)
        monkeypatch.setattr(module, "_hardware_decoders", lambda *_: [(held, None)])
        there.append(Pipeline(encoder, workers=1, **options))
        return there[-1]

    yield pipeline
    for each in there:
        found = each._idle.qsize(), each._idle_hardware.qsize(), each._idle_readers.qsize()
        assert found == (1, 1, len(each._readers)) and not each._begun, "something is not put back"
        each.close()


@pytest.fixture
def as_stand_in(monkeypatch):
    """Lets the worker's bit streams be the stand-in's: FFmpeg's planes of the very frames. Sets packets' marks."""
    read, marks = DecodeWorker.read_bitstream, {}

    def read_bitstream(self, path, **options):
        stream, digest = read(self, path, **options)
        planes, numbers = planes_of(stream), stream.numbers.tolist()
        packets = [packet(planes[number], **marks) for number in numbers]
        own = stream_of(packets, numbers, stream.wanted, size=stream.stored_size)
        return replace(own, factors=stream.factors, info=stream.info), digest

    monkeypatch.setattr(DecodeWorker, "read_bitstream", read_bitstream)
    return marks


def by_pyav(encoder, video):
    pipeline = Pipeline(encoder, decoder="pyav", workers=1)
    try:
        prepared = pipeline.prepare(video)
        return pipeline.encode(prepared), prepared
    finally:
        pipeline.close()


@pytest.mark.slow
def test_features_by_hardware_are_pyavs(made, as_stand_in, encoder, video):
    pipeline = made()
    prepared = pipeline.prepare(video)
    features, expected = by_pyav(encoder, video)
    assert prepared.frames is None and prepared.info.decoder.startswith("nvdec")
    assert torch.equal(pipeline.encode(prepared), features)
    assert replace(prepared.info, decoder=expected.info.decoder) == expected.info
    assert prepared.sha256 == expected.sha256
    assert pipeline.at_a_time == 2


@pytest.mark.slow
def test_what_decodes_with_errors_is_pyavs(made, as_stand_in, encoder, video):
    pipeline = made()
    as_stand_in["status"] = 8
    prepared = pipeline.prepare(video)
    assert prepared.info.decoder.startswith("pyav")
    assert torch.equal(pipeline.encode(prepared), by_pyav(encoder, video)[0])
    as_stand_in.clear()
    assert pipeline.prepare(video).info.decoder.startswith("nvdec"), "the decoder is not used any more"


@pytest.mark.slow
def test_what_decoded_how_many_is_told(made, as_stand_in, video):
    pipeline = made()
    assert pipeline.told() == []
    pipeline.prepare(video)
    pipeline.prepare(video)
    as_stand_in["status"] = 8
    pipeline.prepare(video)
    held = pipeline._idle_hardware.get()
    pipeline.prepare(video)
    pipeline._idle_hardware.put(held)
    (line,) = pipeline.told()
    for said in ("nvdec: 2", "PyAV: a picture decodes with errors: 1", "PyAV, as the GPU's decoder was busy: 1"):
        assert said in line


@pytest.mark.slow
def test_a_file_is_hashed_once(made, as_stand_in, video, monkeypatch):
    asked, decode = [], DecodeWorker.decode_and_hash
    monkeypatch.setattr(
        DecodeWorker,
        "decode_and_hash",
        lambda self, path, **options: asked.append(options["digest"]) or decode(self, path, **options),
    )
    as_stand_in["status"] = 8
    assert made().prepare(video).sha256 == hashlib.sha256(video.read_bytes()).hexdigest()
    assert asked == [False]


@pytest.mark.slow
def test_reasons_are_counted_without_their_numbers_but_with_their_codecs(made, video):
    def refuses(stream, encoder):
        raise Unsuited("DALI does not decode h264 of 64×48 here")

    pipeline = made(Decoder(refuses))
    pipeline.prepare(video)
    assert pipeline.told() == ["decoded by PyAV: DALI does not decode h264 of n×n here: 1"]


@pytest.mark.slow
def test_a_video_that_hangs_is_told(made, video):
    seen = []

    def hangs(stream, encoder):
        time.sleep(0.3)
        seen.append(pipeline.overdue())
        raise Unsuited("at last")

    pipeline = made(Decoder(hangs))
    pipeline.timeout = -1.0  # of the decoder in this process: less than the clip lasts
    seen.append(pipeline.overdue())
    for name in (None, "shard/a.mp4"):  # the latter is its name, and its path that of a copy
        pipeline.prepare(video, name=name)
    assert seen == [[], [str(video)], ["shard/a.mp4"]] and pipeline.overdue() == []


def test_what_is_at_hand_has_a_limit(made):
    assert made().ahead == made().at_a_time == 2
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert [module.ahead(8, size, cpu) for size in (1, 2**40)] == [8, 8]
    assert [module.ahead(8, size, gpu) for size in (1, 2**30, 2**40)] == [16, 4, 2]


@pytest.mark.slow
def test_what_is_unsuited_is_pyavs(made, tmp_path):
    video = draw(tmp_path / "a.mkv", size=(64, 49), codec="libvpx-vp9")
    assert made().prepare(video).info.decoder.startswith("pyav")


@pytest.mark.slow
def test_pyav_decodes_while_the_hardware_is_busy(made, as_stand_in, video):
    pipeline = made()
    held = pipeline._idle_hardware.get()
    assert pipeline.prepare(video).info.decoder.startswith("pyav")
    pipeline._idle_hardware.put(held)
    assert pipeline.prepare(video).info.decoder.startswith("nvdec")


class Decoder:
    """A decoder whose `patch_rows` does what is given."""

    def __init__(self, does, conversion="swscale"):
        self.name, self.conversion, self.does = "mine", conversion, does

    def patch_rows(self, stream, encoder):
        return self.does(stream, encoder)

    def close(self):
        pass


def raising(error):
    def does(*_, **options):
        raise error

    return does


@pytest.mark.slow
@pytest.mark.parametrize("error", [Unsuited("no"), NoDecoder("none"), torch.OutOfMemoryError("full")])
def test_pyav_decodes_what_a_decoder_cannot(made, video, error):
    assert made(Decoder(raising(error))).prepare(video).info.decoder.startswith("pyav")


def test_other_errors_come_through(made, video):
    with pytest.raises(ZeroDivisionError):
        made(Decoder(raising(ZeroDivisionError()))).prepare(video)


@pytest.mark.slow
def test_a_decoder_of_other_colours_is_waited_for(made, video, encoder):
    """Else it would be chance which colours a video gets."""
    pipeline = made(Decoder(lambda stream, encoder: encoder.empty_patch_rows(len(stream.wanted)).zero_(), "theirs"))
    held, results = pipeline._idle_hardware.get(), queue.SimpleQueue()
    threads = [threading.Thread(target=lambda: results.put(pipeline.prepare(video).info)) for _ in range(2)]
    for thread in threads:
        thread.start()
    with pytest.raises(queue.Empty):
        results.get(timeout=1)
    pipeline._idle_hardware.put(held)
    found = [results.get(timeout=60) for _ in threads]
    for thread in threads:
        thread.join()
    assert {(info.decoder, info.conversion) for info in found} == {("mine", "theirs")}


def test_what_cannot_be_read_is_refused(made, video, monkeypatch):
    monkeypatch.setattr(DecodeWorker, "read_bitstream", raising(DecodeError(video, "does not decode to its end")))
    with pytest.raises(DecodeError, match="to its end"):
        made().prepare(video)
    assert made(allow_damaged=True).prepare(video).info.decoder.startswith("pyav")


@pytest.mark.slow
def test_a_hardware_decoder_wants_a_gpu(folder, tmp_path):
    def job(decoder):
        return extract(
            ExtractConfig(
                str(folder / "videos"),
                str(tmp_path / "feats"),
                device="cpu",
                decode_workers=1,
                vision_tower=str(folder / "tower"),
                num_frames=FRAMES,
                decoder=decoder,
            )
        )

    with pytest.raises(ValueError, match="--decoder nvdec needs a CUDA device, not cpu; auto and pyav decode anywh"):
        job("nvdec")
    assert job("auto").extracted == 1
    assert job("pyav").skipped == 1
