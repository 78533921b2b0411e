"""Videos that are named one by one: a glob pattern's matches, the lines of a list file, the members of tar shards."""

import functools
import glob
import os
import tarfile
from collections import Counter

from fastvid.files import VIDEO_SUFFIXES, StrPath, shown, wrong_content

TAR = ".tar"


def is_pattern(given: StrPath) -> bool:
    return glob.has_magic(os.fspath(given))


def matches(
    pattern: StrPath, follow_links: bool, endings: tuple[str, ...] = VIDEO_SUFFIXES
) -> tuple[dict[str, str], Counter[str]]:
    """({name: path} of videos and tar shards that a pattern names, counts of others).

    Names are relative to the last folder before the pattern's first wildcard; ``**`` stands for any folders.
    """
    parts = os.fspath(pattern).split("/")
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = "/".join(parts[:first]) or ("/" if first else ".")
    found, others, is_link = {}, Counter(), _link_test(root)
    for path in sorted(glob.iglob(os.fspath(pattern), recursive=True)):
        ending = os.path.splitext(path)[1].lower()
        if os.path.isdir(path):
            continue
        if ending not in endings and ending != TAR:
            others[ending or "no ending"] += 1
        elif not follow_links and is_link(path):
            others["links"] += 1
        else:
            found[os.path.relpath(path, root)] = path
    return found, others


def lines(file: StrPath, follow_links: bool, flag: str = "--video_dir_path") -> tuple[dict[str, str], Counter[str]]:
    """({name: path} of what a list file names, a path on each line, counts of others).

    Paths are relative to the list's folder, and lead to files in it: a list may come with a data set, and whoever
    wrote it must not choose files elsewhere. With `follow_links` the user says that it may; such files, and absolute
    paths that lead elsewhere, are named by their whole path.

    Args:
        flag: that named the list, for messages.

    Raises:
        ValueError: it is no text; a line leads out of the folder.
    """
    if fault := wrong_content(file):
        raise ValueError(f"{flag} {shown(file)} {fault}")
    with open(file, "rb") as opened:
        content = opened.read()
    if b"\0" in content:
        raise ValueError(
            f"{flag} {shown(file)} is no list of paths, one on each line; give a folder, a "
            "pattern such as 'videos/*.mp4', a list or .tar shards"
        )
    root = os.path.abspath(os.path.dirname(os.path.abspath(file)))
    found, others, is_link = {}, Counter(), _link_test(root)
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        line = os.fsdecode(line.rstrip(b"\r"))
        if not line.strip():
            continue
        path = os.path.normpath(os.path.join(root, line))
        if path.startswith(os.path.join(root, "")):
            name = os.path.relpath(path, root)
            if not follow_links and is_link(path):
                others["links"] += 1
                continue
        elif follow_links:
            name = path.lstrip("/")
        else:
            raise ValueError(
                f"{flag} {shown(file)}: line {number} leads out of the list's folder "
                f"({shown(line)}); --follow_links True takes such files"
            )
        found[name] = path
    return found, others


def members(
    path: StrPath, endings: tuple[str, ...] = VIDEO_SUFFIXES
) -> tuple[list[tuple[str, str, int, int]], Counter[str]]:
    """([(name, key, where it begins, bytes)] of the videos in a tar shard, counts of others).

    As WebDataset has it, a member's key is its name up to the first dot after the folders.

    Raises:
        ValueError: it is no tar archive, or is cut short.
    """
    found, others = [], Counter()
    if fault := wrong_content(path):
        raise ValueError(f"{shown(path)} {fault}")
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folders, base = os.path.split(member.name)
                ending = os.path.splitext(base)[1].lower()
                if member.isdir() or base.startswith("."):
                    continue
                if not member.isreg() or member.issparse():
                    others["no plain file"] += 1
                elif ending not in endings:
                    others[ending or "no ending"] += 1
                else:
                    key = os.path.join(folders, base.partition(".")[0])
                    found.append((member.name, key, member.offset_data, member.size))
            archive.fileobj.seek(archive.offset)  # where the archive says that it ends: tarfile takes any end for one
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("it has no end")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{shown(path)} is no whole tar archive ({error}); download or write it again") from error
    return found, others


def _link_test(root):
    """A function that says whether a file below `root` is a link, or lies in a folder that is reached through one."""
    real_root = os.path.realpath(root)

    @functools.cache
    def through_link(folder):
        inner = os.path.relpath(folder, root)
        return os.path.realpath(folder) != os.path.normpath(os.path.join(real_root, inner))

    return lambda path: os.path.islink(path) or through_link(os.path.dirname(path) or ".")
