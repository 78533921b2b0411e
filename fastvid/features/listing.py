"""What lies in one folder of features, by the names of its files alone."""

import os
from dataclasses import dataclass, field

from fastvid.features.names import SUFFIXES, stem
from fastvid.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, StrPath, shown


@dataclass(frozen=True)
class Listing:
    """What lies in one folder.

    Attributes:
        files: names of feature files, and whether each is a symbolic link.
        stems_by_id: the reference's short id (name up to its first dot) to the names, without ending, that share it.
        folders: names of sub-folders.
        others: of a name without ending, the files that are not read, each with the reason where its name shows none.
    """

    files: dict[str, bool] = field(default_factory=dict)
    stems_by_id: dict[str, set[str]] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    others: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add_file(self, name: str, is_link: bool = False) -> None:
        """Add a feature file."""
        self.files[name] = is_link
        whole = stem(name)
        self.stems_by_id.setdefault(whole.partition(".")[0], set()).add(whole)


def what_is(name: str) -> str:
    """Why a file is not read as features, by its name; a part of a sentence."""
    if name.endswith(".gz"):
        return "packed with gzip: unpack it with `gunzip`"
    if name.lower().endswith(VIDEO_SUFFIXES):
        return "a video"
    if name.lower().endswith(IMAGE_SUFFIXES):
        return "an image"
    before, ending = os.path.splitext(name)
    if ending == ".pth" or ending.lower() in SUFFIXES:
        return f"not read under this ending: name it {shown(before)}{'.pt' if ending == '.pth' else ending.lower()}"
    return f"not in a format that is read ({', '.join(SUFFIXES)})"


def scan(folder: StrPath) -> Listing:
    """What a folder holds.

    Raises:
        OSError: it cannot be listed.
    """
    listing = Listing()
    with os.scandir(folder) as entries:
        for entry in entries:
            is_link = entry.is_symlink()
            if os.path.isdir(entry.path) if is_link else entry.is_dir():
                listing.folders.add(entry.name)
            elif not (os.path.isfile(entry.path) if is_link else entry.is_file()):
                what = "a link that leads nowhere" if is_link else "no regular file"
                listing.others.setdefault(stem(entry.name), []).append((entry.name, what))
            elif entry.name.endswith(SUFFIXES):
                listing.add_file(entry.name, is_link)
            else:
                whole = os.path.splitext(entry.name.removesuffix(".gz"))[0]
                listing.others.setdefault(whole, []).append((entry.name, ""))
    return listing
