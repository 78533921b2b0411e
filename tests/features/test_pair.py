"""Features of two vision towers: a folder of each, in which a name means the same video."""

import pytest
import torch

from fastvid.batch import by_tower
from fastvid.features.file import save_features
from fastvid.features.folder import FeatureFolder, MissingFeatures
from fastvid.features.pair import FolderPair


@pytest.fixture
def pair(tmp_path):
    for i, (folder, shape) in enumerate((("one", (3, 4)), ("two", (2, 5)))):
        (tmp_path / folder).mkdir()
        features = torch.full(shape, float(i), dtype=torch.float16 if i else torch.float32)
        save_features(tmp_path / folder / "clip.safetensors", features, {"tower": folder})
    save_features(tmp_path / "one" / "left.safetensors", torch.zeros(1, 4), {})
    save_features(tmp_path / "two" / "right.safetensors", torch.zeros(1, 5), {})
    return FolderPair(FeatureFolder(tmp_path / "one"), FeatureFolder(tmp_path / "two"))


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
        FeatureFolder(tmp_path / "nowhere", flag="--video_folder_2")
    assert FolderPair(FeatureFolder(tmp_path), FeatureFolder(tmp_path)).empty


def test_one_file_for_both_towers_is_refused(pair, tmp_path):
    """Of a folder that is given twice, or reached through a link."""
    (tmp_path / "linked").symlink_to(tmp_path / "one")
    for second in ("one", "linked"):
        same = FolderPair(FeatureFolder(tmp_path / "one"), FeatureFolder(tmp_path / second))
        with pytest.raises(ValueError, match="'clip.mp4': .*one/clip.safetensors would be the features of both towers"):
            same.resolve("clip.mp4")
    assert pair.resolve("clip.mp4")
