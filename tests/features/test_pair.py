"""Features of two vision towers: a folder of each, in which a name means the same video."""

import pytest
import torch

from fastvid.batch import by_tower
from fastvid.features.file import save_features
from fastvid.features.folder import MissingFeatures
from fastvid.features.pair import FolderPair


@pytest.fixture
def pair(tmp_path):
    for i, (folder, shape) in enumerate((("one", (3, 4)), ("two", (2, 5)))):
        (tmp_path / folder).mkdir()
        features = torch.full(shape, float(i), dtype=torch.float16 if i else torch.float32)
        save_features(tmp_path / folder / "clip.safetensors", features, {"tower": folder})
    save_features(tmp_path / "one" / "left.safetensors", torch.zeros(1, 4), {})
    save_features(tmp_path / "two" / "right.safetensors", torch.zeros(1, 5), {})
    return FolderPair(tmp_path / "one", tmp_path / "two")


def test_a_name_means_a_file_in_each_folder(pair, tmp_path):
    features, header = pair.load("clip.mp4")
    assert [each.tolist() for each in by_tower(features)] == [[[0.0] * 4] * 3, [[1.0] * 5] * 2]
    assert len(features) == 5 and features.shape == (5, (4, 5)) == pair.shape("clip.mp4")
    assert [each["tower"] for each in header["towers"]] == ["one", "two"] and header == pair.header("clip.mp4")
    assert pair.resolve("clip.mp4") == tmp_path / "one" / "clip.safetensors"
    assert pair.dtype("clip.mp4") == torch.float32 and not pair.empty
    assert [folder.folder.name for folder in pair.towers] == ["one", "two"]
    assert pair.told() == f"features: of two vision towers, in {tmp_path}/one and {tmp_path}/two"


@pytest.mark.parametrize("name, folder", [("left.mp4", "two"), ("right.mp4", "one")])
def test_what_lacks_in_one_folder_is_told_with_it(pair, name, folder):
    for ask in (pair.resolve, pair.load, pair.shape, pair.header, pair.dtype):
        with pytest.raises(MissingFeatures, match=f"video '{name}' has no features in .*/{folder};"):
            ask(name)


def test_a_second_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"--video_folder_2 .*/nowhere is no folder; give the one that"):
        FolderPair(tmp_path, tmp_path / "nowhere")
    assert FolderPair(tmp_path, tmp_path).empty
