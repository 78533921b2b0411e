"""Passes that several videos share: each video's features are those that it has alone."""

import gc
import weakref

import numpy as np
import pytest
import torch
from towers import write_siglip, write_tower

from fastvid.video import passes as module
from fastvid.video.encoder import FeatureEncoder
from fastvid.video.passes import Passes

LENGTHS = [3, 9, 2, 8, 1, 1, 5, 12, 4, 7]  # of videos; passes have four frames


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers") / request.param
    (write_tower if request.param == "clip" else write_siglip)(folder)
    return folder


@pytest.fixture
def encoder(folder):
    return FeatureEncoder(folder, device="cpu", dtype=torch.float32, batch_size=4, num_temporal=12)


def videos(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (count, 20, 30, 3), dtype=np.uint8) for count in lengths]


def counted(passes):
    """A list that gets the number of frames of every pass of the tower."""
    counts, states = [], passes._states
    passes._states = lambda patches_BPK: counts.append(len(patches_BPK)) or states(patches_BPK)
    return counts


def together(passes, clips):
    """{number of the clip: features} and in what order they came."""
    done = [one for number, clip in enumerate(clips) for one in passes.add(number, clip)] + passes.flush()
    assert not passes.waits
    return {one.key: one.result() for one in done}, [one.key for one in done]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_those_of_each_video_alone(folder, dtype):
    encoder = FeatureEncoder(folder, device="cpu", dtype=dtype, batch_size=4, num_temporal=12)
    clips, passes = videos(), Passes(encoder)
    counts = counted(passes)
    found, order = together(passes, clips)
    assert order != sorted(order) and set(order) == set(range(len(clips)))
    for number, clip in enumerate(clips):
        assert torch.equal(found[number], encoder.encode(clip)), number
    # Whole passes, and two more that tell whether they may be shared.
    assert len(counts) == sum(LENGTHS) // 4 + 2 and not passes.notes


def test_patch_rows_in_place_of_frames(encoder):
    clips, passes = videos([3, 6, 2]), Passes(encoder)
    done = []
    for number, clip in enumerate(clips):
        done += passes.add(number, patches_TPK=encoder.frame_rows(torch.from_numpy(clip)))
    for one in done + passes.flush():
        assert torch.equal(one.result(), encoder.encode(clips[one.key]))


def test_what_fills_no_pass_waits(encoder):
    passes = Passes(encoder)
    short, long = videos([3, 8])
    assert passes.add("short", short) == [] and passes.waits
    assert [one.key for one in passes.add("long", long)] == ["long"] and passes.waits
    assert [one.key for one in passes.flush()] == ["short"] and passes.flush() == []


@pytest.mark.slow
def test_a_tower_to_which_the_place_in_a_pass_matters_shares_none(encoder, monkeypatch):
    states = encoder.tower.states

    def by_place(patches_BPK):
        return states(patches_BPK) + 0.25 * torch.arange(len(patches_BPK))[:, None, None]

    monkeypatch.setattr(encoder.tower, "states", by_place)
    clips, passes = videos(), Passes(encoder)
    found, _ = together(passes, clips)
    for number, clip in enumerate(clips):
        assert torch.equal(found[number], encoder.encode(clip)), number
    assert len(passes.notes) == 1 and "do not share passes" in passes.notes[0]
    assert passes.add("next", clips[0])  # and no video waits for another any more


@pytest.mark.parametrize("times", [1, 2])
def test_no_memory_costs_the_videos_of_one_pass(encoder, monkeypatch, times):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    clips, passes = videos([3, 2, 8, 3]), Passes(encoder)
    states, left = passes._states, [times]

    def short_of_memory(patches_BPK):
        if len(done) >= 1 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("no memory")
        return states(patches_BPK)

    done = passes.add(0, clips[0]) + passes.add(1, clips[1])  # one pass, in which the first ends
    assert [one.key for one in done] == [0]
    passes._states = short_of_memory
    done += passes.add(2, clips[2])
    passes._states = states
    done += passes.add(3, clips[3]) + passes.flush()
    assert len(emptied) == 1 and {one.key for one in done} == {0, 1, 2, 3}
    for one in done:
        if one.key == 2 and times == 2:
            with pytest.raises(torch.OutOfMemoryError):
                one.result()
        else:
            assert torch.equal(one.result(), encoder.encode(clips[one.key]))


def test_a_tower_that_differs_from_some_place_on_shares_none(encoder, monkeypatch):
    """As where the last rows of a matrix are multiplied by other instructions."""
    states = encoder.tower.states

    def by_place(patches_BPK):
        found = states(patches_BPK).clone()
        found[3:] += 0.25
        return found

    monkeypatch.setattr(encoder.tower, "states", by_place)
    clips, passes = videos([1, 1, 3, 3, 2, 1]), Passes(encoder)
    few = passes.add(0, clips[0]) + passes.add(1, clips[1]) + passes.flush()  # the first pass that is shared is short
    found = {one.key: one.result() for one in few} | {
        number + 2: features for number, features in together(passes, clips[2:])[0].items()
    }
    for number, clip in enumerate(clips):
        assert torch.equal(found[number], encoder.encode(clip)), number
    assert passes.notes


@pytest.mark.parametrize("times", [1, 2])
def test_no_memory_for_pooling_costs_its_video(encoder, monkeypatch, times):
    pool, left = module.spatio_temporal_pool, [times]

    def short_of_memory(*arguments, **options):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("no memory")
        return pool(*arguments, **options)

    expected = encoder.encode(videos([4])[0])
    monkeypatch.setattr(module, "spatio_temporal_pool", short_of_memory)
    done = Passes(encoder).add(0, videos([4])[0]) + Passes(encoder).add(1, videos([4])[0])
    failed = [one for one in done if one._error is not None]
    assert len(failed) == times and all(torch.equal(one.result(), expected) for one in done if one not in failed)


def test_what_failed_keeps_no_states(encoder, monkeypatch):
    """They are large: without memory for one video there would be none for the next."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    passes, kept = Passes(encoder), []

    def fails(patches_BPK):
        kept.append(weakref.ref(patches_BPK))
        raise torch.OutOfMemoryError("no memory")

    passes._states = fails
    gc.disable()
    try:
        done = passes.add(0, videos([8])[0])
        assert len(kept) == 2 and not any(patches() is not None for patches in kept)
    finally:
        gc.enable()
    assert done[0]._error.__traceback__ is None


def test_a_video_of_no_frames_or_too_many_is_refused(encoder):
    for count in (0, 13):
        with pytest.raises(ValueError, match=f"1 to 12 frames, found {count}"):
            Passes(encoder).add(0, np.zeros((count, 4, 4, 3), np.uint8))
