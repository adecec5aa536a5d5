"""Directories during an extraction: opened or made on demand, their times and modes set when all is done.

Adding to a directory changes its time, and an ordinary user cannot add to one whose final mode forbids it.
So each directory is remembered by its inode when it is first touched, with the time and mode it shall end
with.
"""

import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import UnsafeLayerError
from .confined import Identity, Root, descriptor_path, identity, named, open_entry
from .metadata import set_owner
from .names import Parts, shown

__all__ = ["Directories", "Parent"]

MAX_LINKS = 40
IMPLICIT_MODE = 0o755


@dataclass(slots=True)
class _Final:
    parts: Parts
    mtime_ns: int
    mode: int | None = None


@dataclass(slots=True)
class Parent:
    """An open directory; the descriptor is for paths only (O_PATH)."""

    descriptor: int
    identity: Identity
    parts: Parts

    def lstat(self, name: str) -> os.stat_result | None:
        """Return the status of a name itself, None when there is none."""
        try:
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None


class Directories:
    """All directories of a root that an extraction has touched."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._final: dict[Identity, _Final] = {}
        self._privileged = os.geteuid() == 0

    @contextmanager
    def existing(self, parts: Parts) -> Iterator[Parent | None]:
        """Open a directory that a change is made in; None when there is none."""
        try:
            descriptor = self._open(parts)
        except (FileNotFoundError, NotADirectoryError):
            yield None
            return
        try:
            yield self._remembered(descriptor, parts)
        finally:
            os.close(descriptor)

    @contextmanager
    def made(self, parts: Parts) -> Iterator[Parent]:
        """Open a directory, making what is missing on the way to it: mode 0755, owner root."""
        try:
            descriptor = self._open(parts)
        except (FileNotFoundError, NotADirectoryError):
            descriptor = self._make(parts)
        try:
            yield self._remembered(descriptor, parts)
        finally:
            os.close(descriptor)

    def promise(self, parent: Parent, mtime_ns: int, mode: int) -> None:
        """Let an open directory end with this time and mode."""
        self._final[parent.identity] = _Final(parent.parts, mtime_ns, mode)

    def remember(self, parts: Parts, where: Identity, status: os.stat_result) -> None:
        """Let a directory end with the time that it has now."""
        self._final.setdefault(where, _Final(parts, status.st_mtime_ns))

    def finish(self) -> None:
        """Set all times, then all modes from the leaves up."""
        finals = sorted(self._final.items(), key=lambda item: -len(item[1].parts))
        for where, final in finals:
            with named(f"layer directory {shown('/'.join(final.parts))}"):
                self._finish_one(where, final)

    def _finish_one(self, where: Identity, final: _Final) -> None:
        try:
            descriptor = self._open(final.parts)
        except (FileNotFoundError, NotADirectoryError):
            return  # replaced or removed later in the layer
        try:
            if identity(os.fstat(descriptor)) == where:
                path = descriptor_path(descriptor)
                os.utime(path, ns=(final.mtime_ns, final.mtime_ns))
                if final.mode is not None:
                    os.chmod(path, final.mode)
        finally:
            os.close(descriptor)

    def _remembered(self, descriptor: int, parts: Parts) -> Parent:
        status = os.fstat(descriptor)
        where = identity(status)
        if where not in self._final:
            self._final[where] = final = _Final(parts, status.st_mtime_ns)
            if self._unusable(status):
                final.mode = stat.S_IMODE(status.st_mode)
                os.chmod(descriptor_path(descriptor), final.mode | 0o700)
            self._remember_above(descriptor, where)
        return Parent(descriptor, where, parts)

    def _remember_above(self, descriptor: int, where: Identity) -> None:
        """Remember every directory above one, however it was reached.

        fuse-overlayfs changes the times of all of them when it copies up what is in the lowest.
        """
        root = identity(os.fstat(self._root.descriptor))
        above = os.dup(descriptor)
        try:
            while where != root:
                below, above = above, os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=above)
                os.close(below)
                status = os.fstat(above)
                where = identity(status)
                if where in self._final:
                    break
                self.remember(self._parts_of(above), where, status)
        finally:
            os.close(above)

    def _parts_of(self, descriptor: int) -> Parts:
        places = [Path(os.readlink(descriptor_path(each))) for each in (self._root.descriptor, descriptor)]
        return places[1].relative_to(places[0]).parts

    def _unusable(self, status: os.stat_result) -> bool:
        return not self._privileged and status.st_mode & 0o700 != 0o700

    def _open(self, parts: Parts) -> int:
        try:
            return self._root.open_directory(parts)
        except PermissionError:
            if self._privileged:
                raise
        for depth in range(len(parts)):  # an ordinary user's own directories may be closed to them
            descriptor = self._root.open_directory(parts[:depth])
            try:
                self._remembered(descriptor, parts[:depth])
            finally:
                os.close(descriptor)
        return self._root.open_directory(parts)

    def _make(self, parts: Parts) -> int:
        """Make what is missing; a symlink to nowhere is followed inside the root and its target made."""
        todo, links = deque(parts), 0
        place: Parts = ()
        while todo:
            component = todo.popleft()
            if component == "..":
                place = place[:-1]
                continue
            target = self._make_one(place, component)
            if target is None:
                place = (*place, component)
                continue
            links += 1
            if links > MAX_LINKS:
                raise UnsafeLayerError("too many symlinks lead to it")
            todo.extendleft(part for part in reversed(target.split("/")) if part not in ("", "."))
            place = () if target.startswith("/") else place
        return self._open(place)

    def _make_one(self, place: Parts, component: str) -> str | None:
        """Make one directory unless it is there; return the target when there is a symlink."""
        with self.existing(place) as parent:
            if parent is None:
                raise UnsafeLayerError("what should hold it is not a directory")
            status = parent.lstat(component)
            if status is None:
                self._make_implicit(parent, component)
            elif stat.S_ISLNK(status.st_mode):
                return os.readlink(component, dir_fd=parent.descriptor)
            elif not stat.S_ISDIR(status.st_mode):
                raise UnsafeLayerError("what should hold it is not a directory")
        return None

    def _make_implicit(self, parent: Parent, name: str) -> None:
        os.mkdir(name, 0o700, dir_fd=parent.descriptor)
        set_owner(parent.descriptor, name, 0, 0)
        with open_entry(parent.descriptor, name, os.O_PATH | os.O_DIRECTORY) as descriptor:
            status = os.fstat(descriptor)
            made = Parent(descriptor, identity(status), (*parent.parts, name))
            self.promise(made, status.st_mtime_ns, IMPLICIT_MODE)
