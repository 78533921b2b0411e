"""What features are made like that training needs: as told, or as the weights tell that it starts from."""

import json

import pytest

from fastvid.config import DataConfig
from fastvid.config.pooling import RECIPE
from fastvid.online.folder import OnlineFeatures
from fastvid.online.start import frames_to_make, not_of_second, pooling_to_make
from fastvid.provenance import EXPORT_MARK, Provenance

GRID = "grid:2x2x2"


def starting_from(folder, second, **flags):
    """A run from weights whose second tower's features were made so."""
    trained = Provenance(num_frames=100, pooling=RECIPE, second=second)
    (folder / "config.json").write_text(json.dumps({EXPORT_MARK: {"provenance": trained.to_json()}}))
    return DataConfig(str(folder), ["train.json"], **flags)


def test_one_pair_of_the_second_tower_comes_before_the_flags(tmp_path):
    config = starting_from(tmp_path, Provenance(num_frames=16, pooling=GRID), num_frames=8, pooling=RECIPE)
    assert (frames_to_make(config, second=True), str(pooling_to_make(config, second=True))) == (16, GRID)
    assert (frames_to_make(config), str(pooling_to_make(config))) == (8, RECIPE)
    told = f"--num_frames 8 and --pooling {RECIPE} of the first tower alone: the second's weights were trained with "
    assert not_of_second(config) == f"{told}16 of {GRID}"
    for flags in ({}, {"num_frames": 16}, {"pooling": GRID}):
        assert not_of_second(starting_from(tmp_path, Provenance(num_frames=16, pooling=GRID), **flags)) == ""


def test_of_several_the_flags_choose_and_others_are_refused(tmp_path):
    several = Provenance(pooling=f"{GRID}; {RECIPE}", pairs=f"{GRID} of 16 frames; {RECIPE} of 100 frames")
    config = starting_from(tmp_path, several, num_frames=16, pooling=GRID)
    assert (frames_to_make(config, second=True), str(pooling_to_make(config, second=True))) == (16, GRID)
    config = starting_from(tmp_path, several, pooling=RECIPE)
    assert frames_to_make(config, second=True) == 100
    with pytest.raises(ValueError, match=f"--pooling grid:4x2x2: .* trained with {GRID} and .*; give {GRID} or"):
        pooling_to_make(starting_from(tmp_path, several, pooling="grid:4x2x2"), second=True)
    with pytest.raises(ValueError, match="--num_frames 8: .* trained with .*; give 16"):
        frames_to_make(starting_from(tmp_path, several, num_frames=8, pooling=GRID), second=True)
    with pytest.raises(ValueError, match="name one with --pooling"):
        pooling_to_make(starting_from(tmp_path, several), second=True)


def test_of_nothing_told_the_flags_are_taken(tmp_path):
    config = starting_from(tmp_path, Provenance(), num_frames=8, pooling=GRID)
    assert (frames_to_make(config, second=True), str(pooling_to_make(config, second=True))) == (8, GRID)


@pytest.mark.parametrize("given", [".", "..", "feats/"])
def test_features_of_the_second_tower_lie_beside_those_of_the_first(tmp_path, monkeypatch, given):
    here = tmp_path / "a" / "b"
    (here / "feats").mkdir(parents=True)
    monkeypatch.chdir(here)
    config = DataConfig("m", ["t.json"], video_folder=".", video_folder_2="feats", clip_feat_path=given)
    first = (here / given).resolve()
    assert OnlineFeatures(config, second=True).cache == str(first.with_name(f"{first.name}_2"))
