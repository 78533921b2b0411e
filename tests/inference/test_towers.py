"""What is settled of each vision tower before anything is encoded."""

from types import SimpleNamespace

import pytest

from fastvid.config import ChatConfig
from fastvid.config.pooling import RECIPE
from fastvid.inference.towers import towers_of
from fastvid.provenance import Provenance, agreed_frames, of_features

GRID, OTHER = "grid:2x2x2", "pllava-attn"  # the latter is another program's


def second_of(pooling, given=None):
    """The second tower of weights whose second features are of `pooling`; `given` is settled for the first."""
    model = SimpleNamespace(vision_tower=None, mm_hidden_size=8, mm_hidden_size_2=8)
    config = ChatConfig("m", num_frames=8, pooling=given)
    _, second = towers_of(config, model, Provenance(second=Provenance(pooling=pooling)), "w", None, given)  # pyright: ignore
    return second


def test_a_second_tower_pools_as_it_was_trained():
    assert second_of(GRID).pooling == second_of(GRID, RECIPE).pooling == GRID
    assert second_of(f"{GRID}; {RECIPE}", GRID).pooling == GRID
    assert second_of(None, GRID).pooling == GRID


@pytest.mark.parametrize(
    "pooling, why",
    [
        (f"{GRID}; {RECIPE}", "several poolings .*; name the one that videos get with --pooling"),
        (OTHER, f"the pooling '?{OTHER}'?, which is not known here; give feature files, not videos"),
    ],
)
def test_a_second_tower_of_no_one_pooling_makes_no_features(pooling, why):
    with pytest.raises(ValueError, match=why):
        _ = second_of(pooling).pooling


def only(trained, *given):
    """The tower of weights that were trained so, where the user gives these frames and this pooling."""
    model = SimpleNamespace(vision_tower=None, mm_hidden_size=8, mm_hidden_size_2=None)
    (tower,) = towers_of(ChatConfig("m", num_frames=8), model, trained, "w", *given)  # pyright: ignore[reportArgumentType]
    return tower


def header(frames, pooling=RECIPE):
    return {"tower": "t", "tower_revision": "sha256:t", "num_frames": frames, "pooling": pooling}


def test_a_file_of_a_pair_that_was_not_trained_on_is_refused():
    pairs = f"{GRID} of 4 frames; {RECIPE} of 100 frames"
    tower = only(Provenance(pooling=f"{GRID}; {RECIPE}", pairs=pairs), None, None)
    for made in (header(100, GRID), header(4)):
        with pytest.raises(
            ValueError, match=r"f was made with --pooling \S+ --num_frames .*; extract it with one of these"
        ):
            tower.check_made_alike("f", made)
    for made in (header(4, GRID), header(100), {}, {"num_frames": 1, "pooling": "spatial", "image": {}}):
        tower.check_made_alike("f", made)
    # Older weights do not tell which went together.
    only(Provenance(pooling=f"{GRID}; {RECIPE}"), None, None).check_made_alike("f", header(4))


def test_a_pair_that_no_sample_held_is_taken_with_a_warning(caplog):
    """Training looks at some headers, so that its weights may know more than they tell."""
    trained, _ = of_features([(1, header(4, GRID)), (1, header(100))], of_more=True)
    assert trained.pairs == f"{GRID} of 4 frames; {RECIPE} of 100 frames; perhaps others"
    tower = only(Provenance.of(trained.to_json()), None, None)
    for _ in range(2):
        tower.check_made_alike("f", header(100, GRID))
        tower.check_made_alike("f", header(4, GRID))
    assert [record.message.endswith("perhaps others") for record in caplog.records] == [True]
    assert agreed_frames(8, trained, "w", GRID) == 8
    with pytest.raises(ValueError, match="was trained with .* 100 frames, and would answer wrongly"):
        agreed_frames(8, of_features([(1, header(4, GRID)), (1, header(100))])[0], "w", GRID)


def test_frames_given_for_videos_do_not_refuse_files_that_were_trained_on():
    model = SimpleNamespace(vision_tower=None, mm_hidden_size=8, mm_hidden_size_2=8)
    trained = Provenance(
        num_frames=16,
        pooling=RECIPE,
        second=Provenance(pooling=RECIPE, pairs=f"{RECIPE} of 16 frames; {RECIPE} of 32 frames"),
    )
    config = ChatConfig("m", num_frames=16, pooling=RECIPE)
    _, second = towers_of(config, model, trained, "w", 16, None)  # pyright: ignore[reportArgumentType]
    second.check_made_alike("f", header(32))
    with pytest.raises(ValueError, match="extract it with one of these"):
        second.check_made_alike("f", header(64))


def test_a_file_of_other_frames_than_the_given_ones_is_refused():
    """By weights that tell nothing, as a file of another pooling is. Without the flag it is taken."""
    with pytest.raises(
        ValueError, match="made with --num_frames 100, not with the --num_frames 8 .*, or leave --num_f"
    ):
        only(Provenance(), 8, None).check_made_alike("f", header(100))
    for tower, made in ((only(Provenance(), 8, None), header(8)), (only(Provenance(), None, None), header(100))):
        tower.check_made_alike("f", made)
    only(Provenance(), 8, None).check_made_alike("f", {})  # nothing tells
    only(Provenance(), 8, None).check_made_alike("f", {"num_frames": 100, "pooling": "spatial", "image": {}})


def test_frames_of_a_second_tower_are_those_of_its_pooling():
    model = SimpleNamespace(vision_tower=None, mm_hidden_size=8, mm_hidden_size_2=8)
    pairs = f"{GRID} of 4 frames; {RECIPE} of 100 frames; {RECIPE} of 8 frames"
    trained = Provenance(second=Provenance(pooling=f"{GRID}; {RECIPE}", pairs=pairs))
    for pooling, frames, expected in ((GRID, 8, 4), (RECIPE, 8, 8), (RECIPE, 100, 100)):
        config = ChatConfig("m", num_frames=frames, pooling=pooling)
        _, second = towers_of(config, model, trained, "w", None, None)  # pyright: ignore[reportArgumentType]
        assert second.num_frames == expected
    config = ChatConfig("m", num_frames=6, pooling=RECIPE)
    _, second = towers_of(config, model, trained, "w", None, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tells no one number of frames"):
        _ = second.num_frames
