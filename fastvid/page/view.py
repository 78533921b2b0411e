"""What a page shows of one video: frames with their times, norms of its features, and what their header says."""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from fastvid.batch import by_tower
from fastvid.config.pooling import OF_AN_IMAGE, RECIPE, Pooling
from fastvid.features.file import load_features
from fastvid.features.folder import FeatureFolder
from fastvid.features.names import SUFFIXES
from fastvid.files import StrPath, shown
from fastvid.video.decode import DecodeError
from fastvid.video.decode.worker import DecodeWorker
from fastvid.video.listing import no_video
from fastvid.video.sampling import frame_indices

NUM_FRAMES = 100  # of a video where nothing tells how many
_PICTURE = 336  # pixels of the side of a frame where there is no tower
_TIMEOUT = 600.0  # seconds for a video


@dataclass
class VideoView:
    """One video as a page shows it; None and empty lists are what is not known.

    Attributes:
        name: of the video.
        frames: [T, N, N, 3] uint8 RGB, each made square as a tower takes it, or None.
        numbers: number of each frame in its video; seconds: its time, from the first frame on.
        aspect: width ÷ height of a frame; 1 where nothing tells.
        rows: (R, C, stored dtype) of the features.
        temporal: norm of each temporal row; spatial: [H, W] norms of the spatial rows, as they lie in a frame. Of grids
            both are means: over the rows of each step of the last grid, and over the steps of the first one.
        grids: (time, height, width) of each group of rows, where the pooling has grids.
        header: what the feature file says it was made of and with.
        notes: what is not shown, and why, a sentence each.
    """

    name: str
    frames: np.ndarray | None = None
    numbers: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    aspect: float = 1.0
    rows: tuple[int, int, str] | None = None
    temporal: np.ndarray | None = None
    spatial: np.ndarray | None = None
    grids: tuple[tuple[int, int, int], ...] = ()
    header: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def view_file(
    path: StrPath,
    *,
    tower: StrPath | None = None,
    num_frames: int | None = None,
    pooling: str = RECIPE,
) -> VideoView:
    """A video, with the features that `tower` makes of it if one is given, by `pooling`; or a feature file.

    Raises:
        ValueError: no video, or a damaged file; the tower cannot be used.
        OSError: the file cannot be read.
    """
    path, view = Path(path), VideoView(Path(path).name)
    if path.suffix in SUFFIXES:
        features_RC, header = load_features(path)
        header = header or _of_manifest(path)
        show_features(view, features_RC, header, num_frames)
        view.notes.append("There are no frames: a feature file holds none.")
        return view
    if tower is None:
        _show_frames(view, path, num_frames or NUM_FRAMES, _PICTURE)
        view.notes.append("There are no features: no --vision_tower was named that makes them.")
        return view
    from fastvid.video.encoder import FeatureEncoder

    encoder = FeatureEncoder(tower, num_temporal=num_frames or NUM_FRAMES, pooling=pooling)
    info = _show_frames(view, path, encoder.num_temporal, encoder.image_size)
    assert view.frames is not None
    header = {
        "tower": str(tower),
        "tower_revision": encoder.revision,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "num_frames": encoder.num_temporal,
        "pooling": pooling,
        "total_frames": info.frames,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "video": asdict(info),
    }
    show_features(view, encoder.encode(view.frames), header, None)
    return view


def view_record(
    name: str, features: FeatureFolder | None, video: StrPath | None = None, *, num_frames: int | None = None
) -> VideoView:
    """A record's video: its features, and its frames where the video is at hand.

    What cannot be read is a note: the page says why a record cannot be trained on.

    Args:
        name: as the record names it.
        features: `FeatureFolder` of one vision tower, or None.
        video: its file, or None.
    """
    view = VideoView(name)
    if features is None:
        view.notes.append("There are no features: no --video_folder was named.")
    else:
        try:
            (features_RC,) = by_tower(features.load(name)[0])
            show_features(view, features_RC, features.header(name), num_frames)
        except (ValueError, OSError) as error:
            view.notes.append(f"There are no features: {error}.")
    if video is None:
        view.notes.append(
            "There are no frames: a feature file holds none, and the video was not named (--video, --video_dir_path)."
        )
        return view
    told = view.header.get("num_frames")
    count, size = num_frames or (told if _is_count(told) else NUM_FRAMES), view.header.get("image_size")
    try:
        _show_frames(view, video, count, size if _is_count(size, 4096) else _PICTURE)
    except (ValueError, OSError) as error:
        view.notes.append(f"There are no frames: {error}.")
        return view
    made_of = view.header.get("frame_indices")
    if isinstance(made_of, list) and made_of != view.numbers:
        view.notes.append(
            f"The features were made of other frames than these: of {len(made_of)} of "
            f"{view.header.get('total_frames', 'an unknown number')}. The video was changed since, or "
            "--num_frames differs."
        )
    return view


def _show_frames(view, path, count, size):
    worker = DecodeWorker(_TIMEOUT)
    try:
        view.frames, info = worker.decode(str(path), num_frames=count, size=size)
        view.numbers, view.aspect = frame_indices(info.frames, count), info.width / info.height
        view.seconds = worker.frame_times(path, view.numbers, info)
    except DecodeError as error:
        raise ValueError(
            f"{shown(path)} {reason}" if (reason := no_video(path) if Path(path).is_file() else None) else str(error)
        ) from error
    finally:
        worker.close()
    return info


def show_features(view: VideoView, features_RC: torch.Tensor, header: dict, num_frames: int | None) -> None:
    """Put the norms of the rows into a view, parted into temporal and spatial ones as far as anything tells how.

    Args:
        features_RC: [R, C].
        header: of their file; an empty one tells nothing.
        num_frames: temporal rows where the header does not tell.
    """
    R, C = features_RC.shape
    view.header, view.rows = header, (R, C, str(features_RC.dtype).removeprefix("torch."))
    norms = torch.linalg.vector_norm(features_RC.float(), dim=1).numpy()
    told = header.get("num_frames")
    T = told if isinstance(told, int) and _is_count(told, R) else num_frames or NUM_FRAMES
    side = math.isqrt(max(R - T, 0))
    view.grids = _grids(header, R)
    if view.grids:
        groups = np.split(norms, np.cumsum([math.prod(grid) for grid in view.grids])[:-1])
        by_grid = [group.reshape(grid) for group, grid in zip(groups, view.grids)]
        view.temporal, view.spatial = by_grid[-1].mean((1, 2)), by_grid[0].mean(0)
    elif header.get("pooling") == OF_AN_IMAGE and math.isqrt(R) ** 2 == R:
        view.spatial = norms.reshape(math.isqrt(R), -1)
    elif T >= R or side * side != R - T:
        view.temporal = norms
        view.notes.append(f"All {R} rows stand in one strip: nothing tells which of them are temporal.")
    else:
        view.temporal, view.spatial = norms[:T], norms[T:].reshape(side, side)
        if told is None:
            view.notes.append(f"The first {T} rows are taken for temporal ones: no header tells.")
    video = header.get("video", header.get("image"))
    if isinstance(video, dict) and _is_count(video.get("width")) and _is_count(video.get("height")):
        view.aspect = min(max(video["width"] / video["height"], 1 / 16), 16)


def _grids(header, rows):
    """The grids that a header names, if they have as many rows as there are."""
    with suppress(ValueError, TypeError):
        grids = Pooling.parse(header.get("pooling")).grids
        if sum(map(math.prod, grids)) == rows:
            return grids
    return ()


def _of_manifest(path):
    """What the manifest beside a pickle says of that very file."""
    return FeatureFolder(path.parent).header(path.name) if path.suffix == ".pkl" else {}


def _is_count(value, most=100_000):
    return type(value) is int and 0 < value <= most
