"""Feature files that lie in an extraction's folder already: what they were made with, and whether that is this job's.

Features take hours: those of other settings are not replaced unless the user says so. Nor may a file of one format or
tower pass for one of another.
"""

from pathlib import Path

from fastvid.data.features import SUFFIXES, feature_header
from fastvid.video.manifest import read_files, read_manifest


def settings_of(config, encoder) -> dict:
    """What two extractions must have in common for their features to go together."""
    return {"tower_revision": encoder.revision, "image_size": encoder.image_size, "patch_size": encoder.patch_size,
            "num_frames": config.num_frames}


def difference(made, settings) -> str | None:
    """How settings noted in a header or manifest differ from a job's, in words; None if they do not."""
    for name, value in settings.items():
        if made.get(name) != value:
            return f"{name} {made.get(name, 'unknown')}, not {value}"
    return None


def made_by_manifest(video, path, folder, files, entries) -> dict:
    """The manifest's entry about a feature file without a header; {} if it does not speak of that very file.

    Args:
        video: `fastvid.video.listing.Video`.
        path: its feature file.
        folder: where the features and the manifest lie.
        files, entries: as `Manifest` has them. An entry of an older version names no file; it counts where only one
            file can be meant.
    """
    entry = files.get(path.relative_to(folder).as_posix())
    if entry is not None:
        return entry
    entry = entries.get(video.name, {})
    return {} if "file" in entry or any(other.exists() for other in _other_formats(path)) else entry


def refuse_other_settings(config, videos, settings):
    """Refuse a job whose folder holds features of its videos that were made with other settings.

    ``--overwrite`` lets it replace its own format's; those of another format would stay, and training may read them.

    Raises:
        ValueError: says how many there are, of what, and what to do.
    """
    folder = Path(config.clip_feat_path)
    files, entries = read_files(folder), read_manifest(folder)
    mine, others = [], []
    for video in videos:
        for path, found in [(video.output, mine), *((other, others) for other in _other_formats(video.output))]:
            if not path.exists():
                continue
            try:
                made = feature_header(path) or made_by_manifest(video, path, folder, files, entries)
            except (ValueError, OSError):  # damaged: made again
                continue
            if why := difference(made, settings):
                found.append(f"{path} was made with {why}")
    if others:
        raise ValueError(f"{folder} holds {len(others)} feature files of another format and other settings, which "
                         f"training might read instead ({others[0]}); choose another --clip_feat_path, or remove them")
    if mine and not config.overwrite:
        raise ValueError(f"{folder} holds {len(mine)} feature files of other settings ({mine[0]}); choose another "
                         "--clip_feat_path, or replace them with --overwrite True")


def _other_formats(path):
    """What the same video's features are called in the other formats."""
    stem = path.name.removesuffix(path.suffix)
    return [path.with_name(stem + suffix) for suffix in SUFFIXES if suffix != path.suffix]
