"""Walking two trees only where they may differ, when it is known of which inodes they have the same.

The trees are a directory's and its later snapshot's, or two such snapshots': an inode that is unchanged is
the same in both, with its attributes, its contents and, of a directory, its names. So in a directory that is
unchanged and lies at the same path in both, only directories and changed inodes are looked at. In a changed
one everything is; one that does not lie at that path in the other tree is taken whole.
"""

import os
import stat
from collections.abc import Callable

from .confined import Root
from .names import Parts

__all__ = ["PrunedNames", "Unchanged"]

Unchanged = Callable[[int], bool]
"""Tells by its number whether an inode is certainly the same in both trees."""


class PrunedNames:
    """Lists, for a walk through one tree, what is to be visited of each directory, in the walk's order."""

    def __init__(self, other: Root, unchanged: Unchanged) -> None:
        self._other = other
        self._unchanged = unchanged
        self._in_place: list[bool] = []
        self._same: list[bool] = []

    def __call__(self, descriptor: int, parts: Parts, status: os.stat_result) -> list[str]:
        del self._in_place[len(parts) :], self._same[len(parts) :]
        in_place = self._lies_in_place(parts, status.st_ino)
        same = in_place and self._unchanged(status.st_ino)
        self._in_place.append(in_place)
        self._same.append(same)
        if not same:
            return sorted(os.listdir(descriptor))
        with os.scandir(descriptor) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.is_dir(follow_symlinks=False) or not self._unchanged(entry.inode())
            )

    def _lies_in_place(self, parts: Parts, inode: int) -> bool:
        """Say whether the other tree has the same directory at this path."""
        if not parts or self._same[-1]:
            return True
        return self._in_place[-1] and self._inode_in_other(parts) == inode

    def _inode_in_other(self, parts: Parts) -> int | None:
        try:
            directory = self._other.open_directory(parts[:-1])
        except OSError:
            return None
        try:
            status = os.stat(parts[-1], dir_fd=directory, follow_symlinks=False)
        except OSError:
            return None
        finally:
            os.close(directory)
        return status.st_ino if stat.S_ISDIR(status.st_mode) else None
