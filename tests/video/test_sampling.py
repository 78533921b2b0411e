"""Frame choice and nearest resize, against direct evaluations and the reference's recordings."""

import hashlib
import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastvid.video.sampling import frame_indices, nearest_indices


def _direct(total, num_frames):
    n = min(total, num_frames)
    segment = float(total - 1) / n
    borders = [round(segment * i) for i in range(n + 1)]  # half to even, on the float64 product
    return [(a + b) // 2 for a, b in itertools.pairwise(borders)]


@pytest.mark.slow
def test_every_length_up_to_20000_equals_a_direct_evaluation():
    for total in range(1, 20_001):
        assert frame_indices(total) == _direct(total, 100), total


@pytest.mark.slow
def test_exact_rational_arithmetic_would_differ():
    def exact(total):
        n = min(total, 100)
        borders = [round(Fraction(total - 1, n) * i) for i in range(n + 1)]
        return [(a + b) // 2 for a, b in itertools.pairwise(borders)]

    assert [total for total in range(1, 1001) if frame_indices(total) != exact(total)]


def test_other_numbers_of_frames():
    for num_frames in (1, 2, 7, 32, 64, 128):
        for total in (*range(1, 300), 9_999):
            chosen = frame_indices(total, num_frames)
            assert chosen == _direct(total, num_frames)
            assert len(chosen) == min(total, num_frames)
            assert all(isinstance(i, int) for i in chosen) and 0 <= chosen[0] and chosen[-1] < total


def test_short_videos():
    assert frame_indices(1) == [0]
    assert frame_indices(2) == [0, 0]
    assert frame_indices(3) == [0, 1, 1]


@pytest.mark.parametrize("total, num_frames", [(0, 100), (-1, 100), (5, 0)])
def test_nothing_to_choose(total, num_frames):
    with pytest.raises(ValueError, match="at least 1"):
        frame_indices(total, num_frames)


def test_frames_of_the_recordings(golden):
    recorded = json.loads((golden / "frames.json").read_text())
    for total, expected in recorded["frames"].items():
        assert frame_indices(int(total)) == expected
    for key, expected in recorded["extra_desired"].items():
        assert frame_indices(*map(int, key.split(","))) == expected


@pytest.mark.parametrize("size", [336, 224])
def test_nearest_maps_of_the_recordings(golden, size):
    meta = json.loads((golden / "preprocess.json").read_text())["meta"]
    digest, integer_differs = hashlib.sha256(), []
    for length in range(1, 4097):
        source = nearest_indices(length, size)
        digest.update(source.astype("<i8").tobytes())
        if (source != np.arange(size) * length // size).any():
            integer_differs.append(length)
    assert digest.hexdigest() == meta["sha256"][str(size)]
    assert integer_differs == meta["sizes_1_4096_where_integer_formula_i*L//n_differs"][str(size)]


@pytest.mark.parametrize("size", [1, 32, 224, 336])
def test_nearest_equals_torch(size):
    for length in (1, 2, 31, 93, 98, 240, 336, 481, 702, 1080, 2160):
        positions = torch.arange(length, dtype=torch.float32)[None, None]
        expected = torch.nn.functional.interpolate(positions, size=size).long()[0, 0]
        source = nearest_indices(length, size)
        assert source.dtype == np.int64
        assert source.tolist() == expected.tolist()
