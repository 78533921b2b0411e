"""Images, videos of several lengths and text in one run: extracted, converted, packed, trained."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from clips import draw
from model_cases import assert_same_gradients, loss_and_gradients
from PIL import Image
from towers import write_tower
from training_run import CHANNELS, config_of, flags, losses, start, write_run

from fastvid import convert, train, validate
from fastvid.config import ExtractConfig, ValidateConfig
from fastvid.data.conversation import system_prefix
from fastvid.data.dataset import SampleSkipped
from fastvid.data.packing import pack
from fastvid.dist import parallel
from fastvid.extract import extract
from fastvid.features.names import medium
from fastvid.online.folder import OnlineFeatures
from fastvid.training.metrics import read_metrics

WORLD = parallel.World(0, 1, 0, torch.device("cpu"), False)
FRAMES, PATCHES = 6, 4


def said(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


RECORDS = [
    {"id": "i", "image": "pictures/a.png", "conversations": said("<image>\nwhat is red?", "the house")},
    {"id": "v", "video": "long.mp4", "conversations": said("<video>\nwhat does the cat see?", "a red house")},
    {"id": "t", "conversations": said("why is it running so fast?", "today")},
    {"id": "s", "video": "short.mp4", "conversations": said("see\n<video>", "the cat")},
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": "short.mp4"},
                    {"type": "image_url", "image_url": {"url": "b.jpg"}},
                    {"type": "text", "text": "is it near?"},
                ],
            },
            {"role": "assistant", "content": "near the house"},
        ]
    },
    {"images": ["b.jpg", "pictures/a.png"], "conversations": said("<image> and <image>", "red and near")},
    {"id": "u", "conversations": said("what?", "so")},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose features are made of images and videos by a tower."""
    folder = write_run(tmp_path_factory.mktemp("images"))
    for path in (folder / "feats").iterdir():
        path.unlink()
    write_tower(folder / "tower", hidden_size=CHANNELS, heads=2)
    (folder / "media" / "pictures").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for name in ("pictures/a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / "media" / name)
    draw(folder / "media" / "long.mp4", 12), draw(folder / "media" / "short.mp4", 3)
    settings = {"vision_tower": str(folder / "tower"), "num_frames": FRAMES, "device": "cpu", "images": True}
    assert extract(ExtractConfig(str(folder / "media"), str(folder / "feats"), **settings)).extracted == 4
    (folder / "given.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    places = ["--input_json_file", str(folder / "given.jsonl"), "--output_json_file", str(folder / "train.json")]
    assert convert.main([*places, "--clip_feature_path", str(folder / "feats")]) == 0
    return folder


def build(run, *more):
    return train.build(config_of(run, "unused", "--dataloader_num_workers", "0", *more), WORLD)


@pytest.mark.slow
def test_validation_finds_nothing_wrong(run):
    report = validate.validate(
        ValidateConfig(
            [str(run / "train.json")],
            video_folder=str(run / "feats"),
            video_dir_path=str(run / "media"),
            mm_use_vid_start_end=True,
        )
    )
    assert not report.problems and report.text_only == 2 and len(report.videos) == 4


@pytest.fixture
def namesakes(run, tmp_path):
    """Function that extracts a video and images beside it, two of its name, and gives (folder, samples) of records."""
    draw(tmp_path / "a.mp4", 3)
    for name in ("a.jpg", "b.png", "e.png"):
        shutil.copy(run / "media" / "b.jpg", tmp_path / name)
    settings = {"vision_tower": str(run / "tower"), "num_frames": FRAMES, "device": "cpu", "images": True}

    def made(*names):
        extract(ExtractConfig(str(tmp_path), str(tmp_path / "feats"), **settings))
        records = [{medium(name): name, "conversations": said(f"<{medium(name)}>\nwhat?", "so")} for name in names]
        (tmp_path / "train.json").write_text(json.dumps(records))
        config = config_of(run, "unused", "--dataloader_num_workers", "0", "--on_bad_sample", "skip")
        places = {"data_path": [str(tmp_path / "train.json")], "video_folder": str(tmp_path / "feats")}
        return tmp_path, train.build(dataclasses.replace(config, **places), WORLD).loader.samples

    return made


def validated(folder, **more):
    places = {"video_folder": str(folder / "feats"), "video_dir_path": str(folder), **more}
    return validate.validate(ValidateConfig([str(folder / "train.json")], **places))


@pytest.mark.slow
@pytest.mark.parametrize("good, bad", [("a.mp4", "a.jpg"), ("b.png", "b.mkv")])
def test_features_are_not_of_a_namesake_of_the_other_kind(namesakes, good, bad):
    folder, samples = namesakes(good, bad)
    fault = rf"feats/{good[0]}\.safetensors is of the {medium(good)} {good}, not of the {medium(bad)} {bad}, .*; rename"
    with pytest.raises(SampleSkipped, match=fault):
        samples.read(1)
    with pytest.raises(ValueError, match=fault):
        samples.features.load(bad)
    assert re.search(fault, samples.encode(1).refused), "by the header alone, too"
    assert samples.read(0)[0].videos == [good]
    for quick in (False, True):
        report = validated(folder, quick=quick)
        assert report.problems == {"features refused": 1} and report.states["usable"] == 1
        assert re.search(fault, report.bad_videos[bad][1])
    online = OnlineFeatures(dataclasses.replace(samples.config, video_folder=str(folder), clip_feat_path="x"))
    with pytest.raises(ValueError, match=f"x/{fault[6:]}"):
        online.resolve(bad)
    assert online.resolve(good) == online.resolve(good[0]), "a name without an ending may be of either"
    for old, new in (("a.jpg", "c.jpg"), ("b.png", "d.png")):  # as told
        (folder / old).rename(folder / new)
    folder, samples = namesakes(*{"a.jpg": ("a.mp4", "c.jpg"), "b.mkv": ("d.png",)}[bad])
    assert [samples.read(index)[0].refused for index in range(len(samples))] == [None] * len(samples)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names, unnamed", [(["a.mp4"], 0), (["a.mp4", "b.png"], 1), (["a.mp4", "missing.png"], 2), (["b"], 2)], ids=str
)
def test_pictures_beside_videos_are_no_videos_without_records(namesakes, names, unnamed):
    """They are, once there are records of images."""
    folder, _ = namesakes(*names) if names != ["b"] else namesakes("b.png")
    if names == ["b"]:
        (folder / "train.json").write_text((folder / "train.json").read_text().replace("b.png", "b"))
    assert validated(folder).unnamed == unnamed


@pytest.mark.slow
@pytest.mark.parametrize("frozen, share", [(False, False), (False, True), (True, True)])
def test_packed_together_they_give_the_loss_and_gradients_of_the_samples_apart(run, frozen, share):
    state = build(run)
    samples = [state.loader.samples.read(index) for index in range(len(RECORDS))]
    V, I = FRAMES + PATCHES, PATCHES  # noqa: E741
    tokens = state.tokenizer.tokens
    apart = [pack([one], tokens, CHANNELS) for one in samples]
    assert [len(batch.video_rows) for batch in apart] == [I, V, 0, V, V + I, 2 * I, 0]
    prefix = system_prefix(state.tokenizer) if frozen or share else ()
    packed = pack(samples, tokens, CHANNELS, prefix=prefix, frozen=frozen, share=share)
    loss, found = loss_and_gradients(state.model, packed)
    found = {name: gradient.clone() for name, gradient in found.items()}
    expected_loss, expected = loss_and_gradients(state.model, *apart)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(found, expected, 1e-5)
    assert all(gradient.any() for gradient in expected.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_text_alone_has_a_gradient_of_zero(run, frozen):
    state = build(run)
    text = [state.loader.samples.read(index) for index in (2, 6)]
    prefix = system_prefix(state.tokenizer) if frozen else ()
    batch = pack(text, state.tokenizer.tokens, CHANNELS, prefix=prefix, frozen=frozen)
    loss, found = loss_and_gradients(state.model, batch)
    assert loss > 0 and found and not any(gradient.any() for gradient in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--tokens_per_batch", "300", "--share_video"]], ids=["samples", "rows, shared"])
def test_a_mixed_run_trains(run, tmp_path, more):
    assert train.main(flags(run, tmp_path, "--num_train_epochs", "2", *more)) == 0
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert len(losses(tmp_path)) > 1 and all(line.get("skipped_samples", 0) == 0 for line in lines)


@pytest.mark.slow
def test_two_ranks_train_as_one_does(run, tmp_path):
    """One sample a rank and step: some steps have text alone, on one rank or on both."""
    one = ["--per_device_train_batch_size", "2", "--dataloader_num_workers", "0", "--num_train_epochs", "2"]
    assert train.main(flags(run, tmp_path / "one", *one)) == 0
    two = [*flags(run, tmp_path / "two", *one), "--per_device_train_batch_size", "1"]
    done = start(["-m", "fastvid.train"], two, ranks=2)
    assert done.returncode == 0, done.stderr
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert found.keys() == expected.keys()
    assert all(found[step] == pytest.approx(expected[step], rel=1e-5) for step in expected)


@pytest.mark.slow
def test_text_alone_trains_in_two_ranks(run, tmp_path):
    (tmp_path / "text.json").write_text(json.dumps([RECORDS[2], RECORDS[6]] * 2))
    more = ["--data_path", str(tmp_path / "text.json"), "--num_train_epochs", "1", "--per_device_train_batch_size", "1"]
    given = [word for word in flags(run, tmp_path / "out") if word != str(run / "train.json")]
    given.remove("--data_path")
    done = start(["-m", "fastvid.train"], [*given, *more], ranks=2)
    assert done.returncode == 0, done.stderr
    assert all(line["grad_norm"] == 0 for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in line)


@pytest.mark.slow
def test_images_are_encoded_beside_training(run, tmp_path):
    more = ["--video_folder", str(run / "media"), "--vision_tower", str(run / "tower"), "--num_frames", str(FRAMES)]
    assert train.main(flags(run, tmp_path / "online", "--num_train_epochs", "1", *more)) == 0
    assert train.main(flags(run, tmp_path / "stored", "--num_train_epochs", "1")) == 0
    assert losses(tmp_path / "online") == losses(tmp_path / "stored")
