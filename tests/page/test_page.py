"""The page of `fastvid inspect --html`: what it shows, what it says it cannot show, and that it holds all of itself."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from clips import draw, number
from PIL import Image
from towers import write_tower
from training_run import CHANNELS, write_run

from fastvid import extract
from fastvid.config import InspectConfig
from fastvid.features.file import load_features, save_features
from fastvid.features.folder import FeatureFolder
from fastvid.flags import parse
from fastvid.inspection import main
from fastvid.page import pictures
from fastvid.page.document import document
from fastvid.page.view import VideoView, view_file, view_record
from fastvid.video.decode import decode
from fastvid.video.decode.pyav import frame_times
from fastvid.video.encoder import default_dtype

FRAMES = 6
DTYPE = str(default_dtype(torch.device("cpu"))).removeprefix("torch.")  # of the tower on this machine
TURNS = [{"from": "human", "value": "what does the cat see\n<video>"}, {"from": "gpt", "value": "a red house"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """videos/, feats/ of a tower of 4 × 4 patches, model/, train.json."""
    folder = write_run(tmp_path_factory.mktemp("page"))
    shutil.rmtree(folder / "feats")
    (folder / "videos").mkdir()
    draw(folder / "videos" / "long.mp4", 40, size=(128, 64))
    draw(folder / "videos" / "short.mp4", 4)
    write_tower(folder / "tower", image_size=56, hidden_size=CHANNELS, heads=2)
    assert (
        extract.main(
            [
                "--video_dir_path",
                str(folder / "videos"),
                "--clip_feat_path",
                str(folder / "feats"),
                "--vision_tower",
                str(folder / "tower"),
                "--num_frames",
                str(FRAMES),
                "--device",
                "cpu",
                "--decode_workers",
                "1",
            ]
        )
        == 0
    )
    records = [{"id": name, "video": f"{name}.mp4", "conversations": TURNS} for name in ("long", "short")]
    (folder / "train.json").write_text(json.dumps(records))
    return folder


class Page(HTMLParser):
    """A page as a browser reads it: texts, pictures, and whatever could fetch or run something."""

    def __init__(self, content):
        super().__init__()
        self.pictures, self.texts, self.tags, self.faults, self.open, self.kinds = [], [], [], [], [], {}
        self.feed(content)
        self.text = "".join(self.texts)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append((tag, attributes.get("class")))
        if tag == "img":
            self.pictures.append(attributes["src"])
        if tag in ("script", "link", "iframe", "object", "a", "form", "base", "embed"):
            self.faults.append(tag)
        self.faults += [
            f"{name}={value}"
            for name, value in attributes.items()
            if name.startswith("on")
            or (name in ("src", "href", "action", "style", "srcset") and not (value or "").startswith("data:image/"))
        ]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "style":
            assert "url(" not in data and "@import" not in data
            return
        self.texts.append(data)
        self.kinds.setdefault(self.open[-1][1] if self.open else None, []).append(data)

    def picture(self, at):
        return Image.open(io.BytesIO(base64.b64decode(self.pictures[at].partition(",")[2])))


def page(path):
    found = Page(path.read_text(encoding="utf-8"))
    assert found.faults == []
    return found


def record_flags(made, target, *more):
    return [
        "--model_name_or_path",
        str(made / "model"),
        "--data_path",
        str(made / "train.json"),
        "--video_folder",
        str(made / "feats"),
        "--mm_use_vid_start_end",
        "--html",
        str(target),
        *more,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["--video_dir_path", "--video"])
def test_a_records_page(made, tmp_path, capsys, source):
    place = made / "videos" / ("long.mp4" if source == "--video" else "")
    assert main(record_flags(made, tmp_path / "p.html", "--index", "0", source, str(place))) == 0
    assert "── long: " in capsys.readouterr().out  # beside the text
    found = page(tmp_path / "p.html")
    assert "".join(found.kinds["supervised"]).removeprefix("green") == " a red house</s>"
    assert f"<vid_patch>×{FRAMES + 16}" in "".join(found.kinds["placeholder"])
    # Heat map, the frame in the middle, the scale, then the frames, in the shape of the video's.
    assert len(found.pictures) == 3 + FRAMES
    assert [number(np.asarray(found.picture(at))) for at in range(3, 3 + FRAMES)] == [3, 9, 16, 23, 29, 35]
    assert load_features(made / "feats" / "long.safetensors")[1]["frame_indices"] == [3, 9, 16, 23, 29, 35]
    assert {found.picture(at).size for at in (0, 1)} == {(420, 210)} and found.picture(3).size == (176, 88)
    for text in (
        "0.12 s, frame 3",
        "1.40 s, frame 35",
        "row 5, frame 35 at 1.40 s: ",
        "4 × 4 patches",
        str(made / "tower"),
        "sha256:",
        f"{FRAMES}, chosen from 40",
        f"{FRAMES + 16} × {CHANNELS}",
        f"float16 in the file, {DTYPE} in the tower",
        "pyav 18",
        "swscale",
    ):
        assert text in found.text
    assert found.tags.count("rect") == FRAMES and "other frames" not in found.text


def test_a_record_without_its_video(made, tmp_path, capsys):
    assert main(record_flags(made, tmp_path / "p.html", "--index", "1")) == 0
    found = page(tmp_path / "p.html")
    assert "There are no frames: a feature file holds none" in found.text and len(found.pictures) == 2
    assert f"{FRAMES - 4} rows are zero, the padding" in found.text
    assert (tmp_path / "p.html").read_text().count(pictures.PADDING) == FRAMES - 4


@pytest.mark.slow
def test_a_record_of_several_videos(made, tmp_path, capsys):
    turns = [{"from": "human", "value": "<video>\n<video>\nwhat does the cat see"}, TURNS[1]]
    record = {"id": "two", "videos": ["long.mp4", "short.mp4"], "conversations": turns}
    (tmp_path / "two.json").write_text(json.dumps([record]))
    flags = record_flags(made, tmp_path / "p.html", "--index", "0")
    flags[3] = str(tmp_path / "two.json")
    with pytest.raises(ValueError, match="record two has 2 videos; give their folder with --video_dir_path instead"):
        main([*flags, "--video", str(made / "videos" / "long.mp4")])
    assert main([*flags, "--video_dir_path", str(made / "videos")]) == 0
    found = page(tmp_path / "p.html")
    assert len(found.pictures) == 2 * 3 + FRAMES + 4 and found.tags.count("h2") == 3


@pytest.mark.slow
def test_a_record_whose_features_are_missing(made, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert (
        main(
            record_flags(
                made,
                tmp_path / "p.html",
                "--index",
                "0",
                "--video_folder",
                str(tmp_path / "none"),
                "--num_video_tokens",
                "3",
                "--video_dir_path",
                str(made / "videos"),
            )
        )
        == 0
    )
    found = page(tmp_path / "p.html")
    assert "long.mp4' has no features" in found.kinds["warning"][0] and "There are no features: " in found.text
    assert len(found.pictures) == 40  # all its frames: nothing tells how many


@pytest.mark.slow
def test_a_video_that_was_changed_since(made, tmp_path):
    draw(tmp_path / "new.mp4", 30)
    view = view_record("long.mp4", FeatureFolder(made / "feats"), tmp_path / "new.mp4")
    assert any("made of other frames than these: of 6 of 40" in note for note in view.notes)
    (tmp_path / "no.mp4").write_bytes(b"<html>")
    view = view_record("long.mp4", FeatureFolder(made / "feats"), tmp_path / "no.mp4")
    assert view.frames is None and any("is a web page" in note for note in view.notes)


@pytest.mark.slow
def test_a_videos_page(made, tmp_path, capsys):
    flags = ["--video", str(made / "videos" / "long.mp4"), "--html", str(tmp_path / "p.html"), "--num_frames", "6"]
    assert main(flags) == 0
    found = page(tmp_path / "p.html")
    assert len(found.pictures) == FRAMES and "There are no features: no --vision_tower" in found.text
    assert main([*flags, "--vision_tower", str(made / "tower")]) == 0
    found = page(tmp_path / "p.html")
    assert len(found.pictures) == 3 + FRAMES and "swscale" in found.text
    stored, _ = load_features(made / "feats" / "long.safetensors")
    view = view_file(made / "videos" / "long.mp4", tower=str(made / "tower"), num_frames=6)
    norms = torch.linalg.vector_norm(stored.float(), dim=1)
    assert np.array_equal(np.r_[view.temporal, view.spatial.ravel()], norms.numpy())


@pytest.mark.parametrize(
    "rows, num_frames, parts",
    [
        (100 + 576, None, (100, (24, 24))),
        (8 + 16, 8, (8, (4, 4))),
        (8 + 15, 8, (23, None)),
        (5, None, (5, None)),
    ],
)
def test_a_feature_files_page(tmp_path, rows, num_frames, parts):
    """Without a header the rows are parted as the reference's are, or as told, or not at all."""
    save_features(tmp_path / "a.pkl", torch.rand(rows, 4), {})
    view = view_file(tmp_path / "a.pkl", num_frames=num_frames)
    assert (len(view.temporal), None if view.spatial is None else view.spatial.shape) == parts
    assert any("a feature file holds none" in note for note in view.notes)
    found = Page(document([view], title="x").decode())
    assert found.text.count("not told") >= 5 and found.faults == []
    assert ("in one strip" in found.text) == (parts[1] is None)


def test_a_header_may_hold_anything(tmp_path):
    """It is shown and never believed: no text of it becomes markup, no number of it a size."""
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>\x00\x1b[31m\ud800'
    header = {
        "tower": evil,
        "tower_revision": evil,
        "num_frames": -3,
        "total_frames": evil,
        "dtype": [evil],
        "image_size": 10**9,
        "source": evil,
        "frame_indices": evil,
        "conversion": {evil: evil},
        "video": {"width": 10**5, "height": 1, "decoder": evil, "fps": evil, "damaged": evil},
    }
    save_features(tmp_path / "a.safetensors", torch.rand(12, 4), header)
    view = view_file(tmp_path / "a.safetensors")
    assert 1 / 16 <= view.aspect <= 16
    line = {"warning": evil}
    found = Page(
        document(
            [view], title=evil, prompt=(evil, [(evil, "supervised"), (evil, "")]), warning=line["warning"]
        ).decode()
    )
    assert found.faults == [] and "script" not in found.tags and "<script>alert(1)" in found.text
    assert "\x00" not in found.text and "\x1b" not in found.text and "␛[31m" in found.text


def test_the_browser_is_told_to_fetch_nothing():
    text = document([VideoView("x")], title="x").decode()
    assert "default-src 'none'; img-src data:" in text and "http" not in text.replace("http-equiv", "")


def test_times_of_frames_are_those_of_the_packets(tmp_path):
    times = [600, 630, 700, 1200, 1230]
    path = draw(tmp_path / "uneven.mkv", 5, codec="mjpeg", pixels="yuvj420p", times=times)
    assert frame_times(path, [0, 2, 4], decode(path)[1]) == pytest.approx([0, 100 / 600, 630 / 600], abs=0.002)
    path = draw(tmp_path / "reordered.mp4", 12, options={"bf": "3"})
    assert frame_times(path, range(12), decode(path)[1]) == pytest.approx([i / 25 for i in range(12)])
    path = draw(tmp_path / "other.avi", 5, codec="mpeg4")  # of which packets do not tell
    info = decode(path)[1]
    assert frame_times(path, [0, 4], replace(info, frames=9)) == [0, 0.16]
    assert frame_times(path, [1], replace(info, frames=9, fps=0)) == []


def test_long_videos_stay_small():
    view = VideoView(
        "x",
        frames=np.zeros((300, 8, 8, 3), np.uint8),
        numbers=list(range(300)),
        temporal=np.arange(5000.0),
        rows=(5000, 4, "float16"),
    )
    text = document([view], title="x").decode()
    assert text.count("<img") == 100 and text.count("<rect") == 500 and "row 4999: 4999" in text
    assert "time unknown, frame 297" in text


def test_the_heat_map_shows_least_and_largest():
    uri = pictures.heat_map_uri(np.array([[0.0, 1], [2, 3]]), 2)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert picture.shape == (210, 420, 3)
    assert picture[0, 0].tolist() == [38, 24, 74] and picture[-1, -1].tolist() == [253, 231, 37]
    light = picture[[0, 0, -1, -1], [0, -1, 0, -1]].sum(1)
    assert (np.diff(light) > 0).all()
    pictures.heat_map_uri(np.ones((3, 3)), 0.01)  # all alike, and a sliver


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake, said, mended",
    [
        (
            "--index 0",
            "give --model_name_or_path and --data_path; or --video and --html for a page of one video",
            [
                "--video {made}/videos/long.mp4 --html {out}/a.html",
                "--model_name_or_path {made}/model --data_path {made}/train.json --video_folder {made}/feats",
            ],
        ),
        (
            "--data_path {made}/train.json",
            "give --model_name_or_path, whose tokenizer makes the tokens",
            ["--data_path {made}/train.json --model_name_or_path {made}/model --video_folder {made}/feats"],
        ),
        ("--video {made}/videos/long.mp4", "add --html FILE", ["--video {made}/videos/long.mp4 --html {out}/b.html"]),
        (
            "--model_name_or_path {made}/model --data_path {made}/train.json --html {out}/c.html",
            "add --index N",
            [
                "--model_name_or_path {made}/model --data_path {made}/train.json --html {out}/c.html --index 1 "
                "--video_folder {made}/feats"
            ],
        ),
        (
            "--video {made}/videos/long.mp4 --html {made}/videos/long.mp4",
            "give a name that ends in .html",
            ["--video {made}/videos/long.mp4 --html {out}/d.HTML"],
        ),
    ],
)
def test_mistakes_are_mended_as_told(made, tmp_path, capsys, mistake, said, mended):
    def words(text):
        return text.format(made=made, out=tmp_path).split()

    before = (made / "videos" / "long.mp4").read_bytes()
    with pytest.raises(SystemExit) as ended:
        parse(InspectConfig, words(mistake))
    assert ended.value.code == 2 and said in capsys.readouterr().err
    for flags in mended:
        assert main(words(flags)) == 0
    assert (made / "videos" / "long.mp4").read_bytes() == before


@pytest.mark.slow
def test_what_is_no_video_is_a_mistake(made, tmp_path):
    (tmp_path / "no.mp4").write_bytes(b"<html>")
    for path in ("no.mp4", "nowhere.mp4", "nowhere.pkl"):
        with pytest.raises((ValueError, OSError), match=re.escape(path)):
            main(["--video", str(tmp_path / path), "--html", str(tmp_path / "p.html")])
    assert not (tmp_path / "p.html").exists()
