"""Videos that are folders of frames, as some of MVBench's are; and links to videos."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fastvid.config import EvaluateConfig
from fastvid.evaluation.predict import answered, predict
from fastvid.evaluation.tasks import Sample
from fastvid.evaluation.videos import FrameFolder, Videos
from fastvid.video.sampling import frame_indices, nearest_indices


@pytest.fixture
def frames(tmp_path):
    """tvqa/frames_fps3/show/ with 30 pictures, whose names do not sort by their letters."""
    folder = tmp_path / "videos" / "tvqa" / "frames_fps3" / "show"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(1, 31):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / ".DS_Store").write_bytes(b"x")
    return folder


def sample(**changes):
    return replace(Sample("1", "show", ("what?",), "a", "match"), **changes)


def numbers(found):
    return [int(file.stem) for file in found.files]


def test_frames_are_in_the_order_of_time_and_parts_are_mvbenchs(frames, tmp_path):
    videos = Videos(tmp_path / "videos", ["show"])
    whole = videos.find(sample())
    assert isinstance(whole, FrameFolder) and numbers(whole) == list(range(1, 31))
    # MVBench's get_index: from max(1, round(start * fps)) to min(round(end * fps), the last).
    assert numbers(videos.find(sample(part=(2.1, 4)))) == list(range(6, 13))
    assert numbers(videos.find(sample(part=(0, 1)))) == [1, 2, 3]
    assert numbers(videos.find(sample(part=(9, 20)))) == list(range(27, 31))
    with pytest.raises(ValueError, match="no frame of seconds 11 to 12: 30 frames at 3 a second"):
        videos.find(sample(part=(11, 12)))


def test_the_rate_is_told_by_a_folder(frames, tmp_path):
    """Without it no part can be cut; a folder of such a name mends that, as the message tells."""
    frames.parent.rename(frames.parent.with_name("pictures"))
    with pytest.raises(ValueError, match="nothing tells how many a second.*such as frames_fps3"):
        Videos(tmp_path / "videos").find(sample(part=(0, 1)))
    assert len(numbers(Videos(tmp_path / "videos").find(sample()))) == 30
    frames.parent.with_name("pictures").rename(frames.parent.with_name("frames_fps3"))
    assert numbers(Videos(tmp_path / "videos").find(sample(part=(0, 1)))) == [1, 2, 3]


def test_the_rate_is_not_that_of_the_video_or_of_folders_above(frames, tmp_path):
    """Two rates are refused; once one folder has another name, the other's counts."""
    shown = frames.rename(frames.with_name("show_fps30"))
    found = Videos(tmp_path / "videos").find(sample(video="show_fps30", part=(0, 1)))
    assert isinstance(found, FrameFolder) and numbers(found) == [1, 2, 3]
    above = tmp_path / "fps24"
    above.mkdir()
    (tmp_path / "videos").rename(above / "videos")
    assert numbers(Videos(above / "videos").find(sample(video="show_fps30", part=(0, 1)))) == [1, 2, 3]
    tvqa = above / "videos" / "tvqa"
    tvqa.rename(tvqa.with_name("tvqa_fps1"))
    with pytest.raises(ValueError, match=r"several rates \(1 and 3 frames a second\); rename those"):
        Videos(above / "videos").find(sample(video="show_fps30", part=(0, 1)))
    tvqa.with_name("tvqa_fps1").rename(tvqa)
    assert numbers(Videos(above / "videos").find(sample(video="show_fps30", part=(0, 1)))) == [1, 2, 3]
    for name in ("", "tvqa/frames_fps3"):  # --video itself is such a folder, or one above it
        found = Videos(above / "videos" / name).find(sample(video="show_fps30", part=(0, 1)))
        assert numbers(found) == [1, 2, 3]
    assert not shown.exists()


def test_a_file_of_that_name_or_part_comes_first(frames, tmp_path):
    (frames.parent / "show.mp4").write_bytes(b"")
    assert Videos(tmp_path / "videos").find(sample()) == frames.parent / "show.mp4"
    (frames.parent / "show_0_1.mp4").write_bytes(b"")
    assert Videos(tmp_path / "videos").find(sample(part=(0, 1))) == frames.parent / "show_0_1.mp4"


def test_a_video_of_frames_is_one_of_those_frames(frames, tmp_path, serving_chat):
    """Its answer is that of the features of its frames, of which as many are seen as of a video."""
    records = [
        {"video": "show", "question": "what?", "candidates": ["a", "b"], "answer": "a", "start": 2, "end": 4},
        {"video": "show", "question": "what?", "candidates": ["a", "b"], "answer": "b"},
    ]
    (tmp_path / "episodic.json").write_text(json.dumps(records))
    config = EvaluateConfig(
        output=str(tmp_path / "out"),
        task="mc",
        annotations=str(tmp_path / "episodic.json"),
        video=str(tmp_path / "videos"),
        kv_cache_gib=0.1,
    )
    (tmp_path / "out").mkdir()
    assert predict(serving_chat, config, 0, 1)
    found, seen = answered(tmp_path / "out"), serving_chat.num_frames
    for name, first, last in (("episodic/0", 6, 12), ("episodic/1", 1, 30)):
        pixels = np.stack([np.asarray(Image.open(frames / f"{number}.png")) for number in range(first, last + 1)])
        (encoder,) = serving_chat.loaded_encoders()
        if len(pixels) > seen:
            pixels = pixels[frame_indices(len(pixels), seen)]
        rows, columns = (nearest_indices(size, encoder.image_size) for size in pixels.shape[1:3])
        features = encoder.encode(pixels[:, rows][:, :, columns])
        text = "what?\n(A) a\n(B) b\nAnswer with the letter of the right option."
        assert found[name]["prediction"] == serving_chat.ask_features(features, text)


def test_a_picture_that_is_damaged_costs_its_sample(frames, tmp_path, serving_chat):
    for file in sorted(frames.glob("2*.png")):
        file.write_bytes(b"no picture")
    (tmp_path / "short.json").write_text(json.dumps([{"video": "show", "question": "what?", "answer": "a"}]))
    output = tmp_path / "out"
    output.mkdir()
    config = EvaluateConfig(
        output=str(output),
        task="match",
        annotations=str(tmp_path / "short.json"),
        video=str(tmp_path / "videos"),
        kv_cache_gib=0.1,
    )
    assert not predict(serving_chat, config, 0, 1)
    assert "show/2" in json.loads((output / "predictions.jsonl").read_text())["error"]


def test_links_that_lead_out_are_followed_if_told(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "elsewhere.mp4").touch()
    (tmp_path / "videos" / "clip.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    for follow, remedy in ((None, "refused"), (False, "--follow_links True follows it")):
        with pytest.raises(ValueError, match=f"is a link that leads out of .*; {remedy}"):
            Videos(tmp_path / "videos", follow_links=follow).find(sample(video="clip"))
    assert Videos(tmp_path / "videos", follow_links=True).find(sample(video="clip")).name == "clip.mp4"
