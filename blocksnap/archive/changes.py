"""What differs between two trees, told as Docker tells it, and how large that is."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from .confined import Identity, Root, Visit, all_names, identity, named, walk
from .metadata import read_xattrs
from .names import Parts
from .pruned import PrunedNames, Unchanged

__all__ = ["Change", "ChangeKind", "Found", "changes", "diff_size", "find_changes"]

ChangeKind = Literal["A", "C", "D"]


class Change(NamedTuple):
    """One path, absolute inside the tree, and whether it was added (A), changed (C) or deleted (D)."""

    path: str
    kind: ChangeKind


@dataclass(slots=True)
class Found:
    """A change with what packing needs: the new status, None for a deletion."""

    parts: Parts
    kind: ChangeKind
    status: os.stat_result | None


@dataclass(slots=True)
class _Node:
    parts: Parts
    status: os.stat_result
    target: str
    xattrs: dict[str, bytes]

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)


def changes(old_root: Path | None, new_root: Path, *, unchanged: Unchanged | None = None) -> list[Change]:
    """Return what changed, sorted by the components of the paths; without an old root all is added.

    Docker's rules: only the inode's metadata is compared (mode, owner, device number, extended attributes;
    of what is no directory also size and time to the nanosecond), a directory with changes in it is changed
    itself, what is below a deleted directory is not listed, and the root never is. `unchanged` saves looking
    at what is known to be the same (pruned.py).
    """
    found = find_changes(old_root, new_root, unchanged=unchanged)
    return [Change("/" + "/".join(one.parts), one.kind) for one in found]


def diff_size(old_root: Path | None, new_root: Path, *, unchanged: Unchanged | None = None) -> int:
    """Return the bytes in regular files that were added or changed, hard links counted once."""
    sizes: dict[Identity, int] = {}
    for found in find_changes(old_root, new_root, unchanged=unchanged):
        if found.status is not None and stat.S_ISREG(found.status.st_mode):
            sizes[identity(found.status)] = found.status.st_size
    return sum(sizes.values())


def find_changes(
    old_root: Path | None,
    new_root: Path,
    *,
    unchanged_links: dict[Identity, list[Parts]] | None = None,
    unchanged: Unchanged | None = None,
) -> Iterator[Found]:
    """Yield the changes in the order of path components, so that directories come before their content.

    unchanged_links is filled with the unchanged names of files that have several; of those whose inode is
    unchanged too there may be none.
    """
    with named(str(new_root)), Root.open(new_root) as new:
        if old_root is None:
            yield from (Found(node.parts, "A", node.status) for node in _nodes(new, new, None))
            return
        with Root.open(old_root) as old:
            links = {} if unchanged_links is None else unchanged_links
            yield from _compare(_nodes(old, new, unchanged), _nodes(new, old, unchanged), links)


def _nodes(root: Root, other: Root, unchanged: Unchanged | None) -> Iterator[_Node]:
    names = all_names if unchanged is None else PrunedNames(other, unchanged)
    for visit in walk(root.descriptor, names=names):
        if not visit.leaving:
            yield _node(visit)


def _node(visit: Visit) -> _Node:
    target = ""
    if stat.S_ISLNK(visit.status.st_mode):
        target = os.readlink(visit.name, dir_fd=visit.directory)
    return _Node(visit.parts, visit.status, target, read_xattrs(visit.directory, visit.name))


def _compare(
    old: Iterator[_Node], new: Iterator[_Node], links: dict[Identity, list[Parts]]
) -> Iterator[Found]:
    untold: list[Found] = []  # unchanged directories above the current path: told once something in them is
    gone: Parts | None = None  # a directory that is one no more; the old tree below it is not looked at
    for before, after in _merged(old, new):
        parts = _either(before, after).parts
        if after is None and gone is not None and parts[: len(gone)] == gone:
            continue
        untold = [above for above in untold if above.parts == parts[: len(above.parts)]]
        kind = _kind(before, after)
        if kind is not None:
            yield from untold
            untold.clear()
            yield Found(parts, kind, after.status if after else None)
        elif after is not None and after.is_directory:
            untold.append(Found(parts, "C", after.status))
        elif after is not None and after.status.st_nlink > 1:
            links.setdefault(identity(after.status), []).append(parts)
        if before is not None and before.is_directory and not (after is not None and after.is_directory):
            gone = parts


def _merged(old: Iterator[_Node], new: Iterator[_Node]) -> Iterator[tuple[_Node | None, _Node | None]]:
    """Pair two walks by path: both run in the order of path components, so neither tree is held in memory."""
    before, after = next(old, None), next(new, None)
    while before is not None or after is not None:
        if after is None or (before is not None and before.parts < after.parts):
            yield before, None
            before = next(old, None)
        elif before is None or after.parts < before.parts:
            yield None, after
            after = next(new, None)
        else:
            yield before, after
            before, after = next(old, None), next(new, None)


def _either(before: _Node | None, after: _Node | None) -> _Node:
    node = after or before
    assert node is not None
    return node


def _kind(before: _Node | None, after: _Node | None) -> ChangeKind | None:
    if before is None:
        return "A"
    if after is None:
        return "D"
    return "C" if _fingerprint(before) != _fingerprint(after) else None


def _fingerprint(node: _Node) -> tuple[object, ...]:
    """Return what is compared. Inode numbers and ctime are not in it: they change when a tree is copied."""
    status = node.status
    always = (status.st_mode, status.st_uid, status.st_gid, status.st_rdev, node.xattrs)
    if node.is_directory:  # size and time of a directory change with its content, which is told anyway
        return always
    return (*always, status.st_size, status.st_mtime_ns, node.target)
