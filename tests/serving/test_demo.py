"""What the demo page is told of a video, by what its rows are."""

import numpy as np
import pytest
import torch

from fastvid.serving.demo import _shown
from fastvid.serving.features import Look
from fastvid.video.decode.info import VideoInfo

pytestmark = pytest.mark.usefixtures("forked")  # decoders


@pytest.mark.parametrize(
    "pooling, rows, bars",
    [("temporal+spatial", 4 + 9, 2), ("grid:3x2x2", 12, 3), ("slow-fast:2x3x3+4x1x1", 22, 4)],
)
def test_a_frame_has_the_norm_of_its_step_of_time(pooling, rows, bars):
    """Of a video of two frames where four are taken: the recipe's padding is left out, grids have no padding."""
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    info = VideoInfo("h264", 8, 8, 2, 1.0, 0, 2.0, "x", "swscale", 0)
    features_RC = torch.arange(1.0, rows + 1)[:, None]
    if pooling == "temporal+spatial":
        features_RC[2:4] = 0
    told = _shown(Look("key", frames, [0, 1], [0.0, 1.0], info, features_RC), 4, pooling)
    assert told["strip"].count("<rect") == bars and told["heat"] is not None
    assert [frame["norm"] for frame in told["frames"]] == [0.0, {2: 1.0, 3: 0.5, 4: pytest.approx(2 / 3)}[bars]]
