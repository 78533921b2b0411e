"""What --pooling says: the spec, the frames that go with it, and the rows of features that extraction makes."""

import shutil

import pooling_run
import pytest
import torch
from pooling_run import FRAMES, GRID, OTHER, ROWS, SIDE, SLOW_FAST, job
from torch.nn.functional import adaptive_avg_pool3d
from training_run import CHANNELS

from fastvid import extract
from fastvid.config import ChatConfig, ExtractConfig
from fastvid.config.pooling import RECIPE, Pooling
from fastvid.features.file import load_features, save_features
from fastvid.features.manifest import read_manifest
from fastvid.provenance import Provenance, agreed_frames, agreed_pooling
from fastvid.video.decode import decode
from fastvid.video.encoder import FeatureEncoder

made = pooling_run.made
pytestmark = pytest.mark.usefixtures("forked")  # decoders too


# --- the spec


@pytest.mark.parametrize(
    "spec, frames, patches, rows",
    [
        (RECIPE, 100, 576, 676),
        ("grid:16x12x12", 16, 576, 2304),
        ("grid:16x12x12", 100, 576, 2304),
        ("grid:32x14x14", 32, 729, 6272),
        ("slow-fast:10x24x12+50x4x4", 50, 576, 2880 + 800),
        ("slow-fast:8x12x12+32x4x4", 32, 576, 1152 + 512),
    ],
)
def test_rows_follow_from_the_spec(spec, frames, patches, rows):
    pooling = Pooling.parse(spec)
    assert str(pooling) == spec and pooling.rows(frames, patches) == rows


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "grid",
        "grid:2x2",
        "grid:0x2x2",
        "grid:2x2x2+1x1x1",
        "slow-fast:2x2x2",
        "spatial",
        "grid:2×2×2",
        "grid:2x2x2 ",
        "grid:1\u0664x2x2",  # digits, but not ours
        "grid:1\uff12x2x2",
    ],
)
def test_what_is_no_spec_is_refused_with_the_specs_that_are(spec):
    with pytest.raises(ValueError, match=r"--pooling .* is no pooling; give temporal\+spatial, grid:TxHxW") as told:
        Pooling.parse(spec)
    for example in ("grid:16x12x12", "slow-fast:10x24x12+50x4x4"):
        assert example in str(told.value)
        Pooling.parse(example)


@pytest.mark.parametrize(
    "config", [lambda spec: ExtractConfig("a", "b", pooling=spec), lambda spec: ChatConfig("a", pooling=spec)]
)
def test_every_configuration_refuses_it_when_it_is_made(config):
    config(GRID)
    with pytest.raises(ValueError, match="--pooling 'grid' is no pooling"):
        config("grid")


def test_groups_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="give slow-fast:2x4x4.6x1x1$") as told:
        Pooling.parse("slow-fast:6x1x1+2x4x4")
    Pooling.parse(str(told.value).rpartition("give ")[2])


@pytest.mark.parametrize(
    "spec, frames, remedy",
    [
        ("grid:16x2x2", 8, "give --num_frames 16 or more"),
        (SLOW_FAST, 100, f"give --num_frames {FRAMES}"),
        (SLOW_FAST, 3, f"give --num_frames {FRAMES}"),
    ],
)
def test_frames_that_do_not_go_with_it_are_refused(spec, frames, remedy):
    pooling = Pooling.parse(spec)
    with pytest.raises(ValueError, match=f"--num_frames is {frames}; {remedy}$"):
        pooling.rows(frames, SIDE**2)
    assert pooling.rows(int(remedy.split()[2]), SIDE**2) > 0


def test_a_grid_finer_than_the_patches_is_refused():
    with pytest.raises(ValueError, match="finer than the vision tower's 4 × 4 patches; give at most 4x4"):
        Pooling.parse("grid:2x5x4").rows(6, 16)
    assert Pooling.parse("grid:2x4x4").rows(6, 16) == 32


def test_which_pooling_new_features_get():
    assert agreed_pooling(None, None, "w") == RECIPE and agreed_pooling(GRID, None, "w") == GRID
    assert agreed_pooling(None, GRID, "w") == agreed_pooling(GRID, GRID, "w") == GRID
    both = f"{GRID}; {RECIPE}"
    assert agreed_pooling(None, both, "w") is None and agreed_pooling(GRID, both, "w") == GRID
    with pytest.raises(ValueError, match=r"--pooling slow-fast.*: w was trained with .*; leave --pooling out$"):
        agreed_pooling(SLOW_FAST, GRID, "w")
    with pytest.raises(
        ValueError, match=r": w was trained with grid:3x2x2 and temporal.spatial, .*; give .* or .*$"
    ) as told:
        agreed_pooling(SLOW_FAST, both, "w")
    for remedy in str(told.value).rpartition("give ")[2].split(" or "):
        assert agreed_pooling(remedy, both, "w") == remedy


def test_a_pooling_that_is_not_known_is_none_to_make():
    """Another program's, or a later version's. It is no flag that somebody gave."""
    assert agreed_pooling(None, OTHER, "w") is None
    with pytest.raises(ValueError, match=f"w was trained with {OTHER}, and would answer wrongly; leave --pooling out$"):
        agreed_pooling(GRID, OTHER, "w")
    with pytest.raises(ValueError, match=f"; give {GRID}$"):
        agreed_pooling(RECIPE, f"{GRID}; {OTHER}", "w")
    with pytest.raises(ValueError, match="; leave --pooling out$"):
        agreed_pooling(RECIPE, f"{OTHER}; {OTHER}-2", "w")


def test_which_frames_new_features_get():
    assert agreed_frames(None, Provenance(), "w") == 100 and agreed_frames(8, Provenance(), "w") == 8
    assert agreed_frames(None, Provenance(num_frames=8, pooling=GRID), "w") == 8
    several = Provenance(pooling=f"{GRID}; {RECIPE}")
    assert agreed_frames(None, several, "w") is None and agreed_frames(8, several, "w") == 8
    with pytest.raises(ValueError, match="leave --num_frames out"):
        agreed_frames(9, Provenance(num_frames=8), "w")


def test_frames_follow_from_the_pooling_that_they_came_with():
    pairs = f"{GRID} of 6 frames; {RECIPE} of 100 frames; {RECIPE} of 50 frames"
    several = Provenance(pooling=f"{GRID}; {RECIPE}", pairs=pairs)
    assert several.made_with == {(GRID, 6), (RECIPE, 100), (RECIPE, 50)}
    assert agreed_frames(None, several, "w", GRID) == agreed_frames(6, several, "w", GRID) == 6
    assert agreed_frames(None, several, "w", RECIPE) is None and agreed_frames(50, several, "w", RECIPE) == 50
    assert agreed_frames(None, several, "w") is None
    for given, pooling in ((100, GRID), (6, RECIPE), (7, None)):
        with pytest.raises(
            ValueError, match=f"--num_frames {given}: w was trained with .* of 6 frames;.*; give"
        ) as told:
            agreed_frames(given, several, "w", pooling)
        for remedy in str(told.value).rpartition("give ")[2].split(" or "):
            assert agreed_frames(int(remedy), several, "w", pooling) == int(remedy)
    assert Provenance(pairs="what is this").made_with == set()


@pytest.mark.slow
@pytest.mark.parametrize("spec", [GRID, SLOW_FAST])
def test_features_are_means_of_the_towers_states(made, tmp_path, spec):
    """Of a video of more frames than are taken, and of one of fewer: both have the same rows."""
    assert extract.main([*_words(made, tmp_path), "--pooling", spec]) == 0
    whole = FeatureEncoder(made / "tower", device="cpu", num_temporal=FRAMES, pooling=f"grid:{FRAMES}x{SIDE}x{SIDE}")
    for name in "ab":
        found, header = load_features(tmp_path / f"{name}.safetensors")
        frames, _ = decode(made / "grids" / f"{name}.mp4", num_frames=FRAMES, size=whole.image_size)
        states_TPC = torch.stack([whole.encode(frame[None])[: SIDE**2] for frame in frames]).double()
        states_CTHW = states_TPC.unflatten(1, (SIDE, SIDE)).movedim(-1, 0)[None]
        if spec == GRID:
            expected = adaptive_avg_pool3d(states_CTHW, (3, 2, 2))[0].flatten(1).T
        else:
            T = len(frames)
            slow, fast = ([states_CTHW[:, :, i * T // n] for i in range(n)] for n in (2, FRAMES))
            expected = torch.cat(
                [
                    adaptive_avg_pool3d(torch.stack(group, 2), (len(group), side, side))[0].flatten(1).T
                    for group, side in ((slow, 3), (fast, 1))
                ]
            )
        assert found.shape == (ROWS[spec], CHANNELS) and found.dtype == torch.float16
        torch.testing.assert_close(found.double(), expected, rtol=2**-10, atol=2**-14)
        assert header["pooling"] == spec and header["num_frames"] == FRAMES
    assert read_manifest(tmp_path)["a.mp4"]["pooling"] == spec


def _words(made, output, group="grids"):
    return (
        f"--video_dir_path {made / group} --clip_feat_path {output} --vision_tower {made / 'tower'} "
        f"--num_frames {FRAMES} --device cpu --decode_workers 1"
    ).split()


@pytest.mark.slow
def test_a_job_refuses_features_of_its_videos_of_another_pooling(made, tmp_path):
    assert extract.extract(job(made, made / "grids", tmp_path)).extracted == 2
    with pytest.raises(ValueError, match=r"pooling temporal.spatial, not grid:3x2x2.*--overwrite True"):
        extract.extract(job(made, made / "grids", tmp_path, pooling=GRID))
    assert extract.extract(job(made, made / "grids", tmp_path, pooling=GRID, overwrite=True)).extracted == 2
    assert extract.extract(job(made, made / "grids", tmp_path, pooling=GRID)).skipped == 2
    assert load_features(tmp_path / "a.safetensors")[0].shape == (ROWS[GRID], CHANNELS)


@pytest.mark.slow
def test_files_that_name_no_pooling_are_of_the_recipe(made, tmp_path):
    """As earlier versions wrote them: they are taken for what they are, and not made again."""
    assert extract.extract(job(made, made / "grids", tmp_path)).extracted == 2
    for path in tmp_path.glob("*.safetensors"):
        features, header = load_features(path)
        del header["pooling"]
        save_features(path, features, header)
    (tmp_path / "manifest.jsonl").unlink()
    assert extract.extract(job(made, made / "grids", tmp_path)).skipped == 2
    with pytest.raises(ValueError, match=r"pooling temporal.spatial, not grid:3x2x2"):
        extract.extract(job(made, made / "grids", tmp_path, pooling=GRID))


@pytest.mark.slow
def test_images_keep_the_rows_of_their_patches(made, tmp_path):
    jobs = [job(made, made / "images", tmp_path, images=True, pooling=spec) for spec in (GRID, RECIPE, SLOW_FAST)]
    assert [extract.extract(each).skipped for each in jobs] == [0, 1, 1]
    features, header = load_features(tmp_path / "e.safetensors")
    assert features.shape == (SIDE**2, CHANNELS) and header["pooling"] == "spatial"
    recipe = FeatureEncoder(made / "tower", device="cpu", num_temporal=FRAMES)
    (tmp_path / "v").mkdir()
    assert extract.extract(job(made, made / "images", tmp_path / "v", images=True)).extracted == 1
    assert torch.equal(features, load_features(tmp_path / "v" / "e.safetensors")[0])
    assert recipe.rows == ROWS[RECIPE]


@pytest.mark.slow
def test_a_short_video_is_padded_by_the_recipe_alone(made, tmp_path):
    assert extract.extract(job(made, made / "grids", tmp_path / "a")).padded == 1
    assert extract.extract(job(made, made / "grids", tmp_path / "b", pooling=GRID)).padded == 0


def test_the_reference_knows_the_recipe_alone(made, tmp_path, capsys):
    words = [*_words(made, tmp_path), "--parity", "reference"]
    with pytest.raises(ValueError, match=r"--pooling grid:3x2x2 .* --parity reference takes; give temporal.spatial"):
        extract.main([*words, "--pooling", GRID])
    assert extract.main([*words, "--pooling", RECIPE]) == 0
    shutil.rmtree(tmp_path)
    assert extract.main([*words[:-2], "--pooling", GRID]) == 0
