"""Comparing two directory trees in everything an image keeps."""

import os
import stat
from pathlib import Path
from typing import Any

__all__ = ["compare_trees", "describe_tree"]

_PIECE = 1 << 20
_HOST_XATTRS = ("security.selinux", "trusted.overlay.", "user.overlay.")


def compare_trees(left: Path, right: Path, *, times: bool = True) -> list[str]:
    """Return one line for each difference, the root directory included.

    Compared are names, types, contents, modes, owners, times to the nanosecond, hard links, targets of
    symlinks, device numbers and extended attributes.
    """
    ours, theirs = describe_tree(left), describe_tree(right)
    lines = [f"{name}: only in {left}" for name in sorted(ours.keys() - theirs.keys())]
    lines += [f"{name}: only in {right}" for name in sorted(theirs.keys() - ours.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        lines += _differences(name, ours[name], theirs[name], times=times)
        if (
            ours[name]["size"] == theirs[name]["size"]
            and stat.S_ISREG(ours[name]["type"])
            and not _same_content(left / name, right / name)
        ):
            lines.append(f"{name}: content differs")
    return lines


def describe_tree(root: Path) -> dict[str, dict[str, Any]]:
    """Return what is to be compared of every name below a root ("." is the root), contents apart."""
    names = ["."]
    for directory, directories, files in os.walk(root):
        names += [os.path.relpath(os.path.join(directory, name), root) for name in directories + files]
    groups: dict[tuple[int, int], list[str]] = {}
    statuses = {name: os.lstat(root / name) for name in names}
    for name in sorted(names):
        groups.setdefault((statuses[name].st_dev, statuses[name].st_ino), []).append(name)
    return {name: _describe(root / name, status, groups) for name, status in statuses.items()}


def _describe(path: Path, status: os.stat_result, groups: dict[tuple[int, int], list[str]]) -> dict[str, Any]:
    mode = status.st_mode
    directory = stat.S_ISDIR(mode)
    return {
        "type": stat.S_IFMT(mode),
        "mode": None if stat.S_ISLNK(mode) else oct(stat.S_IMODE(mode)),
        "owner": (status.st_uid, status.st_gid),
        "mtime_ns": status.st_mtime_ns,
        "size": status.st_size if stat.S_ISREG(mode) else None,
        "target": os.readlink(path) if stat.S_ISLNK(mode) else None,
        "device": status.st_rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else None,
        "links": None if directory else groups[(status.st_dev, status.st_ino)],
        "xattrs": {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
            if not name.startswith(_HOST_XATTRS)
        },
    }


def _differences(name: str, ours: dict[str, Any], theirs: dict[str, Any], *, times: bool) -> list[str]:
    keys = [key for key in ours if ours[key] != theirs[key] and (times or key != "mtime_ns")]
    return [f"{name}: {key} {ours[key]} / {theirs[key]}" for key in keys]


def _same_content(left: Path, right: Path) -> bool:
    with left.open("rb") as ours, right.open("rb") as theirs:
        while True:
            piece = ours.read(_PIECE)
            if piece != theirs.read(_PIECE):
                return False
            if not piece:
                return True
