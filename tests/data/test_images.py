"""Images, videos of several lengths and text in one run: extracted, converted, packed, trained."""

import json

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
from fastvid.data.packing import pack
from fastvid.dist import parallel
from fastvid.extract import extract
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
