"""Which file, or which frames, a benchmark's sample is about."""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fastvid.evaluation.tasks import Sample
from fastvid.features.names import stem
from fastvid.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, StrPath, shown
from fastvid.inference.chat import MEDIA_SUFFIXES
from fastvid.inference.questions import MediaNames, inside, list_media

_RATE = re.compile(r"fps[_-]?(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class FrameFolder:
    """A video whose frames are pictures in a folder.

    Attributes:
        folder: of them.
        files: pictures, in the order of time.
        part: (first, last) second of the video that they are of; None: all of it.
        below: names of the folders that it lies in, from the one that all videos are in on.
    """

    folder: Path
    files: tuple[Path, ...]
    part: tuple[float, float] | None = None
    below: tuple[str, ...] = ()

    def __str__(self) -> str:
        return str(self.folder) if self.part is None else f"{self.folder} ({self.part[0]:g} to {self.part[1]:g} s)"

    def between(self, first: float, last: float) -> "FrameFolder":
        """The frames of some seconds, counted as MVBench counts them: frame number seconds · rate, from 1 on.

        The rate is told by a folder that they lie in, and not by the video's own name.

        Raises:
            ValueError: nothing tells the rate, folders tell several, or there are no such frames.
        """
        rates = sorted({float(found) for name in self.below for found in _RATE.findall(name)} - {0.0})
        if len(rates) > 1:
            several = " and ".join(f"{rate:g}" for rate in rates)
            raise ValueError(
                f"{shown(self.folder)} lies in folders that tell several rates ({several} frames a second); rename "
                "those that do not mean this one"
            )
        if not rates:
            raise ValueError(
                f"{shown(self.folder)} holds frames, and nothing tells how many a second: put it into a folder whose "
                "name does, such as frames_fps3"
            )
        rate = rates[0]
        start, stop = max(1, round(first * rate)), round(last * rate)
        files = self.files[start - 1 : max(stop, 0)]
        if not files:
            raise ValueError(
                f"{shown(self.folder)} holds no frame of seconds {first:g} to {last:g}: {len(self.files)} frames at "
                f"{rate:g} a second"
            )
        return FrameFolder(self.folder, files, (first, last), self.below)


def _frame_folders(folder):
    """{name relative to a folder: folder} of those below it that hold pictures and nothing else that is a video's."""
    found = {}
    for place, _, names in os.walk(folder):
        shown_names = [name for name in names if name[0] != "."]
        if Path(place) != Path(folder) and shown_names and all(map(_is_picture, shown_names)):
            found[Path(place).relative_to(folder).as_posix()] = Path(place)
    return found


def _is_picture(name):
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _frames_in(folder):
    names = sorted((name for name in os.listdir(folder) if name[0] != "." and _is_picture(name)), key=_by_number)
    return tuple(folder / name for name in names)


def _by_number(name):
    """A key by which "frame2.jpg" is sorted before "frame10.jpg"."""
    return [int(piece) if at % 2 else piece for at, piece in enumerate(re.split(r"([0-9]{1,18})", name))]


class Videos:
    """Where the videos of a benchmark lie.

    Args:
        folder: with videos or feature files below it, or folders of frames, as MVBench has some of its videos.
        asked: names of all videos of the benchmark: two of them are never one file.
        suffixes: endings of what counts, in the order in which one of several files is taken.
        follow_links: whether links that lead out of the folder count; None: not, and no flag changes that.
    """

    def __init__(
        self,
        folder: StrPath,
        asked: Iterable[str] = (),
        suffixes: Sequence[str] = MEDIA_SUFFIXES,
        *,
        follow_links: bool | None = None,
    ):
        self.folder, self._links = Path(folder), follow_links
        folders = _frame_folders(folder) if VIDEO_SUFFIXES[0] in suffixes else {}
        try:
            self.files = list_media(folder, suffixes)
        except ValueError:
            if not folders:
                raise
            self.files = {}
        known = {stem(name) for name in self.files}
        self.files |= {name: path for name, path in folders.items() if name not in known}
        self._names = MediaNames(self.files, suffixes)
        self._by_last = {}
        for name in self.files:
            self._by_last.setdefault(_last(name), []).append(stem(name))
        self._asked = {}
        for name in {stem(video) for video in asked}:
            self._asked.setdefault(_last(name), []).append(name)

    def find(self, sample: Sample) -> "Path | FrameFolder":
        """The file that a sample is about, or the frames.

        A benchmark that keeps its videos in folders may name them without these, and the other way round. What is in
        another folder is another video.

        Raises:
            ValueError: there is none, there are several, or it lies elsewhere.
        """
        if sample.part is None:
            return self._opened(sample, sample.video, "", "")
        first, last = sample.part
        part = f"_{first:g}_{last:g}"
        told = f" (seconds {first:g} to {last:g} of {shown(sample.video)}; cut that file)"
        try:
            return self._opened(sample, stem(sample.video) + part, part, told)
        except ValueError:
            whole = None
            with suppress(ValueError):
                whole = self.find(replace(sample, part=None))
            if not isinstance(whole, FrameFolder):
                raise
            return whole.between(first, last)

    def _opened(self, sample, video, part, told):
        found = self._names.find(video)
        if found is None:
            stems = {name for name in self._by_last.get(_last(video), ()) if _same_end(name, stem(video))}
            if len(stems) > 1:
                raise ValueError(
                    f"{shown(video)} is the name of {len(stems)} videos below {self.folder}; move the others"
                )
            names = self._asked.get(_last(sample.video), ()) if stems else ()
            several = [name for name in names if _same_end(name + part, *stems)]
            if len(several) > 1:
                raise ValueError(
                    f"{' and '.join(map(shown, sorted(several)))} are several videos, of which {self.folder} has one "
                    "without its folder; move it to a folder of that name"
                )
            found = self._names.find(stems.pop()) if stems else None
        if found is None:
            raise ValueError(f"{shown(video)} is none of the files of {self.folder}{told}")
        path = self.files[found]
        if not self._links and not inside(path, self.folder):
            remedy = "refused" if self._links is None else "--follow_links True follows it"
            raise ValueError(f"{path} is a link that leads out of {self.folder}; {remedy}")
        if not path.is_dir():
            return path
        below = path.relative_to(self.folder).parent.parts
        return FrameFolder(path, _frames_in(path), below=(self.folder.resolve().name, *below))


def _last(name):
    """A video's name without folders and ending."""
    return stem(name.rpartition("/")[2])


def _same_end(one, other):
    """Whether one path is the end of the other."""
    return f"/{one}".endswith(f"/{other}") or f"/{other}".endswith(f"/{one}")
