"""What the check of a data set has found: counted, in words, on one screen and as JSON."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from fastvid.config.pooling import OF_AN_IMAGE
from fastvid.data.annotations import Remarks
from fastvid.files import shown
from fastvid.provenance import what_decoders_mean, what_fp8_means

SHOWN = 3  # examples of each kind of problem
# The state of a video whose features cannot be used, by the kind of problem, as the table names it.
STATES = {
    "features missing": "missing",
    "extraction failed": "failed",
    "features stale": "stale",
    "features truncated": "truncated",
    "features unreadable": "unreadable",
    "features refused": "refused",
    "features of another shape": "another shape",
    "features of another pooling": "another pooling",
    "features of another vision tower": "another tower",
    "features of another tower than --vision_tower": "another tower",
    "features of another tower than --vision_tower_2": "another tower",
}


@dataclass
class Report:
    """What was found.

    Attributes:
        files: data files; `absent` of them do not exist.
        records: records read; `text_only` of them name no video; `duplicates` of them repeat an earlier one.
        videos: records by video.
        layouts: feature files by (R, C, dtype); None if they were not looked at.
        makers: feature files by (tower, its revision, frames per video, pooling), as far as their headers tell.
        decoders: feature files by (decoder, conversion), likewise.
        in_fp8: feature files by whether their tower multiplied in FP8, likewise.
        unlike_pooling: that feature files are of another pooling, or other frames, than is given, in words; of each
            folder.
        damaged: feature files of videos that were taken although they are damaged.
        formats: feature files by ending.
        not_compared: feature files that were not compared with their video, where videos were looked at: it is not
            there, or nothing tells which it was.
        to_make: videos whose features training makes, as the videos themselves lie there; in either tower's folder.
        unnamed: videos that no record names; None if they were not looked at.
        problems: by kind, how many; and the first few, in words.
        bad_videos: of each video whose features cannot be used: (its state, why).
        bad_records: (file, record), each counted from 0, of the records that are at fault themselves.
        elsewhere: problems that no record and no video is at fault for.
        remarks: what training leaves out, changes or makes up in records that it takes.
    """

    files: int = 0
    absent: int = 0
    records: int = 0
    text_only: int = 0
    duplicates: int = 0
    videos: Counter = field(default_factory=Counter)
    layouts: Counter | None = None
    makers: Counter = field(default_factory=Counter)
    decoders: Counter = field(default_factory=Counter)
    in_fp8: Counter = field(default_factory=Counter)
    unlike_pooling: list[str] = field(default_factory=list)
    damaged: int = 0
    formats: Counter = field(default_factory=Counter)
    not_compared: int = 0
    to_make: set[str] = field(default_factory=set)
    unnamed: int | None = None
    problems: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    bad_videos: dict[str, tuple[str, str]] = field(default_factory=dict)
    bad_records: set[tuple[int, int]] = field(default_factory=set)
    elsewhere: int = 0
    remarks: Remarks = field(default_factory=Remarks)

    def add(self, kind: str, message: str, *, video: str | None = None, record: tuple[int, int] | None = None) -> None:
        """Note a problem, and what is at fault for it: a video's features or a record; None where neither is."""
        self.problems[kind] += 1
        if self.problems[kind] <= SHOWN:
            self.examples.setdefault(kind, []).append(message)
        if video is not None:
            self.bad_videos.setdefault(video, (STATES[kind], message))
        elif record is not None:
            self.bad_records.add(record)
        else:
            self.elsewhere += 1

    def add_files(self, kind: str, message: str, videos: Collection[str]) -> None:
        """Note that the features of all these videos have the same problem, which is told once."""
        self.problems[kind] += len(videos)
        self.examples.setdefault(kind, []).append(message)
        for video in videos:
            self.bad_videos.setdefault(video, (STATES[kind], message))

    @property
    def states(self) -> Counter:
        """Videos that records name, by state; those whose features can be used are "usable", "to be made" those that
        have none yet."""
        bad = Counter(state for state, _ in self.bad_videos.values())
        to_make = len(self.left_to_make)
        return Counter(
            {
                "usable": len(self.videos) - bad.total() - to_make,
                "to be made": to_make,
                **{state: bad[state] for state in dict.fromkeys(STATES.values())},
            }
        )

    @property
    def left_to_make(self) -> set[str]:
        """`to_make` without the videos that something is wrong with."""
        return self.to_make - self.bad_videos.keys()

    @property
    def exit_code(self) -> int:
        """2 where a data file is not there, 1 with any other problem, else 0."""
        return 2 if self.absent else 1 if self.problems else 0


def as_json(report: Report) -> dict[str, Any]:
    """The whole report as JSON can hold it: every video whose features cannot be used, not the first few."""
    looked_at = report.layouts is not None
    remark, warning = what_decoders_mean(report.decoders)
    return {
        "files": report.files,
        "records": report.records,
        "text_only": report.text_only,
        "repeated": report.duplicates,
        "videos": len(report.videos),
        "states": dict(report.states) if looked_at else None,
        "videos_without_records": report.unnamed,
        "features_not_compared": report.not_compared,
        "features_of_damaged_videos": report.damaged,
        "layouts": [
            {"rows": R, "channels": C, "dtype": str(dtype).removeprefix("torch."), "files": count}
            for (R, C, dtype), count in (report.layouts or Counter()).most_common()
        ],
        "formats": dict(report.formats),
        "made_by": [
            {"tower": tower, "tower_revision": revision, "num_frames": frames, "pooling": pooling, "files": count}
            for (tower, revision, frames, pooling), count in report.makers.most_common()
        ],
        "decoded_by": [
            {"decoder": decoder, "conversion": conversion, "files": count}
            for (decoder, conversion), count in report.decoders.most_common()
        ],
        "remarks": [
            {"remark": text, "records": count, "first": report.remarks.first[text]}
            for text, count in report.remarks.counts.most_common()
        ]
        + [
            {"remark": text}
            for text in (remark, warning, what_fp8_means(report.in_fp8), *report.unlike_pooling)
            if text
        ],
        "problems": [
            {"kind": kind, "count": count, "examples": report.examples[kind]} for kind, count in report.problems.items()
        ],
        "bad_videos": [
            {"video": video, "state": state, "records": report.videos[video], "reason": reason}
            for video, (state, reason) in report.bad_videos.items()
        ],
    }


def summary(report: Report) -> str:
    """The report on one screen."""
    lines = [
        f"records     {report.records:>9,} in {report.files} file{'s' * (report.files != 1)}",
        f"  text only {report.text_only:>9,}",
        f"  repeated  {report.duplicates:>9,}",
        f"videos      {len(report.videos):>9,}",
    ]
    if report.layouts is None:
        lines.append("features    not looked at: no --video_folder")
    elif report.videos:
        lines += [f"  {state:<13}{count:>6,}" for state, count in report.states.items() if count or state == "usable"]
    if report.unnamed is not None:
        lines.append(f"  in no record {report.unnamed:>6,}")
        if report.not_compared:
            lines.append(
                f"  not compared {report.not_compared:>6,} feature files: their video is not there, or "
                "nothing tells which it was"
            )
    for (R, C, dtype), count in (report.layouts or Counter()).most_common(SHOWN):
        rounded = ", rounded to float32" * (str(dtype) == "torch.float64")
        lines.append(f"features    {count:>9,} of {R} × {C} {str(dtype).removeprefix('torch.')}{rounded}")
    if len(report.formats) > 1:
        counts = ", ".join(f"{count:,} {ending}" for ending, count in report.formats.most_common())
        lines.append(f"formats     {counts}")
    for (tower, revision, frames, pooling), count in report.makers.most_common(SHOWN):
        lines.append(f"made by     {count:>9,} {tower} ({revision[:19]}…), {_made_as(frames, pooling)}")
    if (others := len(report.layouts or ()) - SHOWN) > 0:
        rows = [R for R, _, _ in report.layouts or ()]
        lines.append(f"            … and {others:,} more shapes; {min(rows):,} to {max(rows):,} rows in all")
    for (decoder, conversion), count in report.decoders.most_common(SHOWN):
        lines.append(
            f"decoded by  {count:>9,} {shown(decoder or 'unknown')}, colours by {shown(conversion or 'unknown')}"
        )
    lines += [f"remark      {line}" for line in report.remarks.lines()]
    if to_make := len(report.left_to_make):
        lines.append(f"remark      {to_make:,} videos have no features yet; training makes them")
    if report.damaged:
        lines.append(
            f"remark      {report.damaged:,} feature files are of damaged videos, taken as they are (--allow_damaged)"
        )
    remark, warning = what_decoders_mean(report.decoders)
    lines += [f"remark      {remark}"] * bool(remark)
    lines += [
        f"warning     {text}" for text in (warning, what_fp8_means(report.in_fp8), *report.unlike_pooling) if text
    ]
    for kind, count in report.problems.items():
        lines.append(f"{kind}: {count:,}")
        lines += [f"    {example}" for example in report.examples[kind]]
        if count > len(report.examples[kind]) >= SHOWN:
            lines.append(f"    … and {count - SHOWN:,} more")
    total = sum(report.problems.values())
    return "\n".join([*lines, f"{total:,} problem{'s' * (total != 1)}" if total else "nothing wrong"])


def _made_as(frames, pooling):
    """What the rows of features are, in words."""
    if pooling == OF_AN_IMAGE:
        return "an image's patches"
    told = "frames not told" if frames is None else f"{frames} frames"
    return f"{told}, {'pooling not told' if pooling is None else shown(pooling)}"
