"""A folder of feature files and of videos: features of the latter are made when training needs them.

A record's video is looked up among the feature files first, then among the videos, by the names that their feature
files would have if they had been extracted. Those files lie in a folder of their own, where ``fastvid extract`` with
the same settings would write the same, so that it may run before, beside or after training.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastvid.batch import Channels, Features
from fastvid.config import DataConfig, ExtractConfig
from fastvid.features.folder import FeatureFolder, MissingFeatures
from fastvid.features.listing import Listing
from fastvid.features.manifest import Manifest, read_manifest
from fastvid.features.names import medium, namesake
from fastvid.features.pair import FolderPair
from fastvid.files import StrPath, shown
from fastvid.online.board import FAILED, MADE
from fastvid.online.encoder import Encoder
from fastvid.online.start import frames_to_make, made_otherwise, not_of_second, pooling_to_make, tower_to_make
from fastvid.video.decode.still import is_still
from fastvid.video.earlier import EarlierFeatures
from fastvid.video.features import refuse_departures, settings_of
from fastvid.video.listing import Video, find_videos
from fastvid.video.towers.choice import revisions
from fastvid.video.towers.load import tower_sizes


class PlannedFolder(FeatureFolder):
    """The feature files that an extraction would write, looked up as if they were there.

    Args:
        folder: where they would lie.
        videos: `fastvid.video.listing.Video`s.
    """

    def __init__(self, folder: StrPath, videos: Iterable[Video]):
        self.folder, self._root, self._read_as = Path(folder), os.path.realpath(folder), {}
        self.videos, self._listings = {}, {"": Listing()}
        for video in videos:
            output, where = video.output.relative_to(folder), ""
            for part in output.parent.parts:
                self._listings[where].folders.add(part)
                where = os.path.join(where, part)
                self._listings.setdefault(where, Listing())
            self._listings[where].add_file(output.name)
            if video.fault is None or self.folder / output not in self.videos:  # a video beside an image of its name
                self.videos[self.folder / output] = video


class OnlineFeatures(FeatureFolder):
    """`FeatureFolder` that also finds videos, and has their features made ahead of the samples that need them.

    Args:
        config: `DataConfig`, mostly a `TrainConfig`.
        second: it is the folder of a second vision tower, ``--video_folder_2``.

    Attributes:
        cache: folder of the features that are made; None where nothing tells it.
        tower: that makes them; None before `settle`, and where all features are there as files.

    Raises:
        ValueError: ``--video_folder`` is no folder.
    """

    def __init__(self, config: DataConfig, *, second: bool = False):
        folder = config.video_folder_2 if second else config.video_folder
        assert folder is not None
        self._second, self._which = second, "_2" if second else ""  # how the second tower's flags and folder end
        super().__init__(folder, flag=f"--video_folder{self._which}")
        self.config, output = config, getattr(config, "output_dir", "")
        cache = config.clip_feat_path or (os.path.join(output, "features") if output else None)
        self.cache = cache and os.path.abspath(cache) + self._which if second else cache
        self.tower: StrPath | None = None
        self._earlier: EarlierFeatures | None = None
        self._encoder: Encoder | None = None
        self._planned, self._links = None, False
        self._videos, self._numbers = [], {}  # those that records name, and the number of each by its feature file
        self._settled, self._made, self._faults = 0, set(), {}  # how many of them; of them; why there are none
        self._users, self._stopped = 0, lambda: False

    # Which file is meant

    def resolve(self, name: str) -> Path:
        """As `FeatureFolder.resolve`; of a video without features the file that they are written to.

        Raises:
            MissingFeatures: neither features nor a video have that name.
            ValueError: the name leaves the folder, means several videos, or another video or image has the same feature
                file.
        """
        try:
            return super().resolve(name)
        except MissingFeatures as error:
            missing = error
        planned = self._plan()
        try:
            path = planned.resolve(name)
        except MissingFeatures:
            raise MissingFeatures(f"{missing}{self._about_links()}") from None
        video = planned.videos[path]
        if video.fault is not None:
            raise ValueError(f"video {name!r}: {video.fault}")
        if fault := namesake(name, path, {str(medium(video.name)): {}, "source": video.name}):
            raise ValueError(fault)
        if path not in self._numbers:
            self._numbers[path] = len(self._videos)
            self._videos.append(video)
        return path

    def video_of(self, name: str) -> Video | None:
        """The `Video` of which a record's features are made; None of one that has them in a file of the folder."""
        number = self._numbers.get(self.resolve(name))
        return None if number is None else self._videos[number]

    def _plan(self):
        if self._planned is None:
            folder = self.cache or os.path.join(self.folder, f"features{self._which}")
            try:
                videos, others = find_videos(self.folder, folder, ".safetensors", images=True)
            except ValueError as error:  # there is none, or links alone
                videos, others = [], {"links": "--follow_links" in str(error)}
            self._planned, self._links = PlannedFolder(folder, videos), bool(others.get("links"))
        return self._planned

    def _about_links(self):
        if not self._links:
            return ""
        return ". Links in that folder were not followed: `fastvid extract --follow_links True` follows them"

    # What is known before anything is decoded

    def settle(self) -> None:
        """Choose the tower of the videos that names have been resolved to, and see which have features already.

        Raises:
            ValueError: nothing tells the tower, or it cannot be used; the cache holds features of other settings.
        """
        new = self._videos[self._settled :]
        if not new:
            return
        if self._earlier is None:
            self._earlier = self._choose()
        try:
            self._earlier.refuse_other_settings(new)
        except ValueError as error:
            raise ValueError(f"{error} (of fastvid extract)") from error
        for video in new:
            _, redo, fault = self._earlier.judge(video)
            if fault is not None:
                self._faults[video.output] = fault
            elif redo == "":
                self._made.add(video.output)
        self._settled = len(self._videos)

    def _choose(self) -> EarlierFeatures:
        """Choose the tower; what earlier extractions with it have left in the cache."""
        config = self.config
        if self.cache is None:
            raise ValueError(
                f"videos in {self._named} have no features; name the folder that receives them with --clip_feat_path"
            )
        self.tower = tower_to_make(config, second=self._second)
        if self.tower is None:
            raise ValueError(
                f"videos in {self._named} have no features, and nothing tells which tower makes them: name it with "
                f"--vision_tower{self._which}"
            )
        frames, pooling = self._to_make
        self._extraction = ExtractConfig(
            str(self.folder),
            str(self.cache),
            vision_tower=str(self.tower),
            parity=config.parity,
            num_frames=frames,
            pooling=str(pooling),
        )
        refuse_departures(self._extraction)
        image_size, patch_size, channels = tower_sizes(self.tower)
        self._patches = (image_size // patch_size) ** 2
        rows = pooling.rows(frames, self._patches)
        self.made_shape = rows, channels
        settings = settings_of(self._extraction, revisions(self.tower)[0], image_size, patch_size)
        self._header = {
            "tower": os.path.abspath(self.tower) if os.path.isdir(self.tower) else str(self.tower),
            **settings,
        }
        return EarlierFeatures(self._extraction, settings, self.made_shape, Manifest(self.cache))

    @property
    def _named(self):
        return f"--video_folder{self._which} {shown(self.folder)}"

    @property
    def _to_make(self):
        """(frames, pooling) of the features that are made."""
        return frames_to_make(self.config, second=self._second), pooling_to_make(self.config, second=self._second)

    def check_channels(self, channels: Channels) -> None:
        """Refuse a tower whose features the model cannot take.

        Raises:
            ValueError: it has others than `channels`.
        """
        if self.tower is not None and self.made_shape[1] != channels:
            raise ValueError(
                f"the tower {shown(self.tower)} makes features of {self.made_shape[1]} channels, and the "
                f"model takes {channels}; give the model's own tower with --vision_tower{self._which}"
            )

    def made_otherwise(self, before: dict[str, Any]) -> list[str]:
        """As `fastvid.online.start.made_otherwise`; nothing where all features are there as files."""
        return [] if self.tower is None else made_otherwise(self.config, before, second=self._second)

    def _probe(self, name):
        if name not in self._probed and self.resolve(name) in self._numbers:
            self._probed[name] = *self._shape_of(self.resolve(name)), torch.float16
        return super()._probe(name)

    def header(self, name: str) -> dict[str, Any]:
        """As `FeatureFolder.header`; before the features are made what is known of them."""
        return super().header(name) if self.is_made(name) else dict(self._header)

    def _shape_of(self, path):
        """Of an image, the rows of its patches."""
        rows, channels = self.made_shape
        still = is_still(self._videos[self._numbers[path]].name)
        return self._patches if still else rows, channels

    # What is made

    @property
    def unmade(self) -> list[Video]:
        """The videos whose features are still to be made."""
        return [video for video in self._videos if self._waits(video.output)]

    def is_made(self, name: str) -> bool:
        """Whether a name's features are there, be they good or not."""
        path = self.resolve(name)
        return path not in self._faults and (
            path not in self._numbers or path in self._made or self._state(path) == MADE
        )

    def _state(self, path):
        """What the encoder says of a feature file."""
        return self._encoder.board.state(self._numbers[path]) if self._encoder is not None else None

    def _waits(self, path):
        return path not in self._made and path not in self._faults and not self._state(path)

    def load(self, name: str) -> tuple[Features, dict[str, Any]]:
        """As `FeatureFolder.load`.

        Raises:
            ValueError: also where features could not be made, or are not made yet (`await_made`).
        """
        if not self.is_made(name):
            raise ValueError(f"video {name!r} has no features: {self._why_not(self.resolve(name))}")
        return super().load(name)

    def _why_not(self, path):
        if self._state(path) == FAILED and path not in self._faults:
            assert self.cache is not None
            entry = read_manifest(self.cache).get(self._videos[self._numbers[path]].name, {})
            self._faults[path] = entry.get("reason") or "the manifest does not say why"
        return self._faults.get(path, "they are made when training comes to it")

    def stand_in(self, name: str) -> tuple[Features, dict[str, Any]]:
        """`load`, or zeros of the same shape for features that are not made yet: for whoever plans memory."""
        path = self.resolve(name)
        if path in self._numbers and self._waits(path):
            return torch.zeros(self._shape_of(path), dtype=torch.float16), dict(self._header)
        return self.load(name)

    def await_made(self, name: str) -> None:
        """Return once a video's features are made, or cannot be. Within `made_ahead`, also in processes forked there.

        Raises:
            Stopped, ValueError, OSError: as `Encoder.wait`; it ends the run.
        """
        path = self.resolve(name)
        if path in self._numbers and self._waits(path):
            assert self._encoder is not None, "features are made while a Loader is iterated"
            self._encoder.wait(self._numbers[path], self._stopped)

    @contextlib.contextmanager
    def made_ahead(self, names: Iterable[str], stopped: Callable[[], object] = lambda: False) -> Iterator[None]:
        """Within this context features are made, in the order in which `names` come; several may be nested.

        Args:
            names: of records' videos, as samples come to them; read as far as features are still to be made.
            stopped: asked during long waits; true ends them with `Stopped`.
        """
        self.begin(names)
        if self._encoder is None:
            yield
            return
        self._users, before, self._stopped = self._users + 1, self._stopped, stopped
        try:
            yield
        finally:
            self._users, self._stopped = self._users - 1, before
            if not self._users:
                self._end()

    def begin(self, names: Iterable[str]) -> None:
        """Start the encoder if it is needed, and have these videos done first; it ends with the last `made_ahead`."""
        order, waiting = [], {self._numbers[video.output] for video in self.unmade}
        if not waiting:
            return
        for name in names:
            number = self._numbers.get(self.resolve(name))
            if number in waiting:
                waiting.discard(number)
                order.append(number)
            if not waiting:
                break
        if self._encoder is None:
            done = [number for path, number in self._numbers.items() if not self._waits(path)]
            self._encoder = Encoder(self._extraction, self._videos, order, done)
        else:
            self._encoder.first(order)

    def _end(self):
        assert self._encoder is not None
        self._encoder.close()
        for path in self._numbers:
            if path in self._faults:
                continue
            if self._state(path) == MADE:
                self._made.add(path)
            elif self._state(path) == FAILED:
                self._why_not(path)
        self._encoder.board.close()
        self._encoder = None

    def told(self) -> str | None:
        """A line on the videos of which features are made; None where there are none."""
        if self.tower is None:
            return None
        rows, channels = self.made_shape
        made = len(self._videos) - len(self.unmade)
        others = not_of_second(self.config) if self._second else ""
        return (
            f"features: {len(self._videos):,} videos of --video_folder{self._which} have no feature file there; "
            f"{made:,} have one in {shown(self.cache)}, {len(self.unmade):,} are encoded when they are needed, by "
            f"{shown(self.tower)} ({rows} × {channels} each){others and f'; {others}'}"
        )


def training_features(config: DataConfig, names: Iterable[str] = ()) -> FeatureFolder | None:
    """The features of a run: `OnlineFeatures`; a `FolderPair` of them, of two towers; or None for text only.

    Args:
        names: of records' videos, for whoever reads nothing else of them: the folder is settled for these.

    Raises:
        ValueError: as `OnlineFeatures` and its `settle`; a folder of a second tower without one of the first, or with
            ``--parity reference``.
    """
    second = config.video_folder_2
    if second is None and config.vision_tower_2 is not None:
        raise ValueError(
            f"--vision_tower_2 {shown(config.vision_tower_2)}: it makes the features of videos in --video_folder_2; "
            "give that folder, or leave the flag out"
        )
    if second is not None and config.video_folder is None:
        raise ValueError(f"--video_folder_2 {shown(second)}: give the first tower's features with --video_folder")
    if second is not None and config.policy.one_tower:
        raise ValueError(
            f"--video_folder_2 {shown(second)}: the reference has one vision tower; leave it out, or --parity reference"
        )
    if config.video_folder is None:
        return None
    features = OnlineFeatures(config)
    if second is not None:
        features = FolderPair(features, OnlineFeatures(config, second=True))
    for name in names:
        with contextlib.suppress(ValueError, OSError):  # told where it is read
            features.resolve(name)
    features.settle()
    return features
