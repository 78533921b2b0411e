"""The page of features that are grids: a strip over time and a heat map over the frame, which are means."""

import re

import pytest
import torch
from clips import draw
from test_page import Page
from towers import write_tower

from fastvid import inspection
from fastvid.features.file import save_features
from fastvid.page.document import document
from fastvid.page.view import view_file

FRAMES, GRID, SLOW_FAST = 6, "grid:3x2x2", "slow-fast:2x3x3+6x1x1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A video of eleven frames, and a tower of 4 × 4 patches."""
    folder = tmp_path_factory.mktemp("grids")
    write_tower(folder / "tower", image_size=56)
    draw(folder / "a.mp4", 11)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("spec", [GRID, SLOW_FAST])
def test_the_page_shows_a_strip_and_a_heat_map_of_a_grid(made, tmp_path, spec):
    words = [
        "--video",
        str(made / "a.mp4"),
        "--html",
        str(tmp_path / "a.html"),
        "--vision_tower",
        str(made / "tower"),
    ]
    assert inspection.main([*words, "--num_frames", str(FRAMES), "--pooling", spec]) == 0
    page = Page((tmp_path / "a.html").read_text())
    steps, cells = (3, "2 × 2") if spec == GRID else (FRAMES, "1 × 1")
    assert f"{steps} steps of time, each the mean of {cells} rows" in page.text and spec in page.text
    mapped = (
        "2 × 2 cells, means over all steps of time"
        if spec == GRID
        else "3 × 3 cells, means over the 2 frames of the slow group"
    )
    assert mapped in page.text
    assert ("step 1, frame" in page.text) == (spec == SLOW_FAST)


def test_a_strip_and_a_heat_map_are_means_over_the_grid(tmp_path):
    norms = torch.arange(12, dtype=torch.float32)
    save_features(tmp_path / "a.safetensors", norms[:, None], {"pooling": GRID, "num_frames": FRAMES})
    view = view_file(tmp_path / "a.safetensors")
    grid = norms.reshape(3, 2, 2)
    assert view.temporal.tolist() == grid.mean((1, 2)).tolist() and view.spatial.tolist() == grid.mean(0).tolist()
    slow, fast = torch.arange(18.0), torch.arange(6.0)
    save_features(tmp_path / "b.safetensors", torch.cat([slow, fast])[:, None], {"pooling": SLOW_FAST})
    view = view_file(tmp_path / "b.safetensors")
    assert view.temporal.tolist() == fast.tolist() and view.spatial.tolist() == slow.reshape(2, 3, 3).mean(0).tolist()
    document([view], title="b")


@pytest.mark.parametrize(
    "header, told",
    [
        ({"num_frames": 8}, "temporal+spatial"),  # older than the flag
        ({"num_frames": 8, "pooling": GRID}, GRID),
        ({"num_frames": 8, "pooling": "spatial"}, "spatial"),
        ({"tower": "t"}, "not told"),
        ({}, "not told"),
    ],
)
def test_the_table_tells_the_pooling(tmp_path, header, told):
    save_features(tmp_path / "a.safetensors", torch.ones(12, 3), header)
    page = Page(document([view_file(tmp_path / "a.safetensors")], title="a").decode())
    assert re.search(r"pooling\s*(\S+( told)?)\s*rows × channels", page.text)[1] == told


@pytest.mark.parametrize("pooling", ["grid:5x5x5", "what", 7, None, ["grid:3x2x2"]])
def test_a_header_that_lies_about_its_pooling_is_no_grid(tmp_path, pooling):
    save_features(tmp_path / "a.safetensors", torch.ones(12, 3), {"pooling": pooling, "num_frames": 8})
    view = view_file(tmp_path / "a.safetensors")
    assert view.grids == () and len(view.temporal) == 8
    document([view], title="a")
