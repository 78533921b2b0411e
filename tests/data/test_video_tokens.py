"""How many rows a video takes: the flag, else the features, else the tower."""

import json

import pytest
import torch

from fastvid.data.video_tokens import video_token_count
from fastvid.features.file import save_features
from fastvid.features.folder import FeatureFolder

RECORDS = [
    {"id": name, "video": f"{name}.pkl", "conversations": [{"from": "human", "value": "<video>"}]} for name in "abc"
]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()

    def write(**config):
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture
def features(tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"torn")
    save_features(folder / "c.safetensors", torch.zeros(7, 2), {})
    return FeatureFolder(folder)


def test_the_flag_comes_first_then_the_first_readable_feature_then_the_tower(model, features):
    folder = model(mm_vision_tower="openai/clip-vit-large-patch14")
    assert video_token_count(folder, None, 12, features, RECORDS) == 12
    assert video_token_count(folder, None, None, features, RECORDS) == 7
    assert video_token_count(folder, None, None, features, RECORDS[:2]) == 356
    assert video_token_count(folder, None, None, None, RECORDS) == 356


@pytest.mark.parametrize(
    ("tower", "rows"),
    [
        ("openai/clip-vit-large-patch14-336", 676),
        ("openai/clip-vit-large-patch14", 356),
        ("/models/openai/clip-vit-large-patch14-336/", 676),
        ("openai/clip-vit-base-patch32", 149),
    ],
)
def test_well_known_names(model, tower, rows):
    assert video_token_count(model(mm_vision_tower=tower), None, None, None, RECORDS) == rows
    assert video_token_count(model(), tower, None, None, RECORDS) == rows


def test_a_towers_folder_and_the_flag_before_the_models_setting(model, tmp_path):
    for name, config in (
        ("plain", {"image_size": 64, "patch_size": 16}),
        ("whole", {"vision_config": {"image_size": 32, "patch_size": 16}}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    folder = model(mm_vision_tower=str(tmp_path / "plain"), vision_config={"image_size": 16, "patch_size": 16})
    assert video_token_count(folder, None, None, None, RECORDS) == 116
    assert video_token_count(folder, str(tmp_path / "whole"), None, None, RECORDS) == 104
    assert (
        video_token_count(model(vision_config={"image_size": 336, "patch_size": 14}), None, None, None, RECORDS) == 676
    )  # llava-hf


def test_the_recordings_models_say_it(tiny):
    assert video_token_count(tiny / "model336", None, None, None, RECORDS) == 676
    assert video_token_count(tiny / "model224", None, None, None, RECORDS) == 356
    assert (
        video_token_count(
            tiny / "model224",
            None,
            None,
            FeatureFolder(tiny / "data336" / "feats"),
            [{**RECORDS[0], "video": "vid3.pkl"}],
        )
        == 676
    )


@pytest.mark.parametrize("config", [{}, {"mm_vision_tower": "somebody/unknown"}, {"vision_config": {}}])
def test_an_untold_count_is_an_error_with_the_remedies(model, config):
    with pytest.raises(ValueError, match="--num_video_tokens"):
        video_token_count(model(**config), None, None, None, RECORDS)


def test_an_unknown_tower_that_is_given_is_not_replaced_by_the_models(model):
    folder = model(vision_config={"image_size": 336, "patch_size": 14})
    with pytest.raises(ValueError, match="vision tower somebody/unknown"):
        video_token_count(folder, "somebody/unknown", None, None, RECORDS)


def test_text_alone_needs_no_tower(model):
    text = {"id": "t", "conversations": [{"from": "human", "value": "a"}]}
    assert video_token_count(model(), None, None, None, [text, {"id": "broken"}, 3]) == 0
