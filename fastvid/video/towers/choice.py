"""Which vision tower to use, and whether it is the one that the features of a training run were made with."""

import functools
import hashlib
import logging
import os
import re
from pathlib import Path

from fastvid.files import StrPath, shown
from fastvid.provenance import Provenance, same_tower

log = logging.getLogger("fastvid")

_COMMIT = re.compile(r"[0-9a-f]{40}")


def revisions(tower: StrPath) -> tuple[str, ...]:
    """What identifies a tower's weights, best first: "sha256:" and a digest of a folder's files, or a hub's commit.

    A folder that came from the hub is known by both: its place in the hub's cache, or what ``hf download --local-dir``
    noted beside its files, tells the commit.

    Args:
        tower: folder, or hub id of a tower that is loaded or in the cache.

    Raises:
        OSError: the tower cannot be read, or is not in the cache and the hub does not answer.
    """
    if not os.path.isdir(tower):
        from transformers.utils import cached_file

        found = cached_file(tower, "config.json")
        assert found is not None  # it raises where there is none
        folder = Path(found).parent  # in the hub's cache, snapshots/COMMIT/config.json
        return folder.name, _digest(folder)
    folder = Path(os.path.realpath(tower))
    return tuple(filter(None, (_digest(folder), _commit(folder))))


def check_tower(tower: StrPath, trained: Provenance, weights: StrPath, flag: str = "--vision_tower") -> None:
    """Refuse a tower that is not the one of the features that `weights` were trained on.

    Where that cannot be told, because one of them is known by a hub's commit alone, a line says so.

    Args:
        tower: folder or hub id.
        trained: Provenance of the weights.

    Raises:
        ValueError: it is another one.
        OSError: as `revisions`.
    """
    if trained.tower_revision is None:
        return
    same = same_tower(trained.tower_revision, revisions(tower))
    if same is None:
        log.warning(
            "%s %s cannot be compared with the tower of the features that %s was trained on, %s",
            flag,
            shown(tower),
            weights,
            _described(trained),
        )
    if same is False:
        raise ValueError(
            f"{flag} {shown(tower)} is another tower than the one of the features that {weights} was "
            f"trained on, {_described(trained)}; give that one"
        )


def check_features(tower: StrPath | None, made: Provenance, folder: StrPath | None, *, which: str = "") -> None:
    """Refuse a tower's folder that is not the one that made some features; a hub id is not looked at.

    Args:
        tower: ``--vision_tower``, or None.
        made: Provenance of the features.
        folder: where they lie, for the message; None without any.
        which: how the flags end that name both: "_2" of a second tower.

    Raises:
        ValueError: it is another one.
        OSError: as `revisions`.
    """
    if tower is None or made.tower_revision is None or not os.path.isdir(tower):
        return
    if same_tower(made.tower_revision, revisions(tower)) is False:
        raise ValueError(
            f"--vision_tower{which} {shown(tower)} is another tower than the one that made the features in "
            f"--video_folder{which} {shown(folder)}, {_described(made)}; leave the flag out, or give that one"
        )


def choose_tower(
    given: StrPath | None,
    trained: Provenance,
    weights: StrPath,
    otherwise: StrPath | None = None,
    flag: str = "--vision_tower",
) -> StrPath | None:
    """The tower to use: the given one, else that of the features that `weights` were trained on.

    A folder that is no longer where training found it is looked for beside the weights and the folders above them,
    under its name, and taken if its content is the same.

    Args:
        given: what the flag says, or None.
        trained: Provenance of the weights.
        weights: their path.
        otherwise: what to take where the weights do not tell.
        flag: that names the tower, for messages.

    Returns:
        Folder or hub id; None if nothing tells. Of a hub id the revision is not looked at: `check_tower` does that.

    Raises:
        ValueError: the given tower is another one, or the weights' is not to be found.
    """
    if given is not None:
        if os.path.isdir(given):
            check_tower(given, trained, weights, flag)
        return given
    if trained.tower_revision is None:
        return trained.tower or otherwise
    if trained.tower is not None and not is_path(trained.tower):
        return trained.tower
    name, places = Path(trained.tower or otherwise or "").name, [trained.tower, otherwise]
    places += [folder / name for folder in list(Path(weights).absolute().parents)[:3]] if name else []
    for place in filter(None, places):
        if os.path.isdir(place) and same_tower(trained.tower_revision, revisions(place)):
            return str(place)
    raise ValueError(
        f"{weights} was trained on features of {_described(trained)}, which is not to be found: "
        f"give its folder with {flag}"
    )


def _described(trained):
    return f"{shown(trained.tower or 'a tower without a name')} ({trained.tower_revision[:19]}…)"


def is_path(tower: StrPath) -> bool:
    """Whether a folder is meant, be it here or not: a hub id has one slash, within."""
    tower = os.fspath(tower)
    return os.path.isdir(tower) or tower.startswith((".", "/", "~")) or tower.count("/") != 1


def _digest(folder):
    """A folder's configuration and weights, as "sha256:" and their hash."""
    paths = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.name in ("config.json", "preprocessor_config.json") or path.suffix in (".safetensors", ".bin"))
    ]
    stats = [path.stat() for path in paths]
    return _digest_of(tuple(paths), tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats))


@functools.lru_cache(maxsize=16)
def _digest_of(paths, _state):
    """Of files that have not changed since, once: the weights are gigabytes."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return "sha256:" + digest.hexdigest()


def _commit(folder):
    """The hub's commit that a folder was downloaded at; None if nothing tells."""
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        return folder.name
    try:
        first = (folder / ".cache/huggingface/download/config.json.metadata").read_text(encoding="utf-8").split("\n")[0]
    except (OSError, ValueError):
        return None
    return first if _COMMIT.fullmatch(first) else None
