"""Layers that are directories, HOME/ID/ with a file `parent`; a crash leaves all of one or nothing.

A layer is put together as `.new-ID` and renamed; it is renamed to `.old-ID` before it is taken apart. Ids
have no dot in front, so whatever starts with one is a leftover, swept when the driver opens (under the root's
lock).
"""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..archive.confined import Root, identity, walk
from ..errors import BusyError
from ..mount import is_mounted, mount_table
from .base import Driver, check_id, is_id
from .root import fsync_directory, never_written, read_note, write_durable

__all__ = ["DirectoryDriver", "LayerDirectory", "allocated_bytes", "backing_filesystem", "remove_tree"]


class LayerDirectory:
    """The directory of a driver's layers."""

    def __init__(self, path: Path, take_apart: Callable[[Path], None]) -> None:
        self.path = path
        self._take_apart = take_apart
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def sweep(self) -> None:
        """Remove what a crash left of layers half made or half removed."""
        for entry in os.scandir(self.path):
            if entry.name.startswith((".new-", ".old-")):
                self._take_apart(Path(entry.path))

    def exists(self, id: str) -> bool:
        return (self.path / id / "parent").exists()

    def ids(self) -> list[str]:
        names = (entry.name for entry in os.scandir(self.path) if not entry.name.startswith("."))
        return sorted(name for name in names if self.exists(name))

    def parent(self, id: str) -> str | None:
        note = self.path / id / "parent"
        parent = read_note(note)
        if parent == id or (parent and not is_id(parent)):
            raise never_written(note, parent)
        return parent or None

    def ancestors(self, id: str) -> list[str]:
        """Return the ids of a layer's parents, nearest first."""
        found: list[str] = []
        while (parent := self.parent(found[-1] if found else id)) is not None:
            if parent in found:
                raise never_written(self.path / found[-1] / "parent", parent)
            found.append(parent)
        return found

    @contextmanager
    def new(self, id: str, parent: str | None) -> Iterator[Path]:
        """Give the directory to put a layer together in; the layer exists once the `with` ends well."""
        staging = self.path / f".new-{id}"
        try:
            staging.mkdir(mode=0o700)
            yield staging
            for entry in os.scandir(staging):
                if entry.is_file(follow_symlinks=False):
                    _fsync_file(entry.path)
            write_durable(staging / "parent", (parent or "") + "\n")
            staging.rename(self.path / id)
        except BaseException:
            self._take_apart(staging)
            raise
        fsync_directory(self.path)

    def remove(self, id: str) -> None:
        doomed = self.path / f".old-{id}"
        (self.path / id).rename(doomed)
        fsync_directory(self.path)
        self._take_apart(doomed)


class DirectoryDriver(Driver):
    """A driver whose layers are directories below <root>/<its name>."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._layers = LayerDirectory(self.root / self.name, self._take_apart)
        with self._home.lock.hold():
            self._layers.sweep()

    def exists(self, id: str) -> bool:
        return self._layers.exists(check_id(id))

    def layers(self) -> list[str]:
        return self._layers.ids()

    def parent(self, id: str) -> str | None:
        self._check_known(id)
        return self._layers.parent(id)

    def snapshot(self, id: str, origin: str) -> None:
        """Copy a layer as it is now."""
        with self._home.lock.hold():
            self._check_new(id)
            self._check_known(origin)
            self._check_not_held(origin, "snapshot")
            self._unmount(origin)
            self._snapshot(id, origin)

    def _settle_parent(self, parent: str, child: str, mounted: Path) -> None:
        """See to it that nobody writes to a parent, for drivers under whose layers nothing may change."""
        if not is_mounted(mounted) or os.statvfs(mounted).f_flag & os.ST_RDONLY:
            return
        if holders := self._home.holders(parent):
            raise BusyError(
                f'layer "{child}": its parent "{parent}" is mounted for writing by {holders[0]}: '
                "unmount that first"
            )
        self._unmount(parent)

    def _unmount_abandoned(self) -> None:
        """Unmount the layers whose holders died without a put, but what somebody still uses."""
        for id in self.layers():
            if not self._home.holders(id):
                with suppress(BusyError):
                    self._unmount(id)

    def _take_apart(self, layer: Path) -> None:
        """Remove a layer's directory, or what there is of one; it need not be there."""
        remove_tree(layer)

    @abstractmethod
    def _snapshot(self, id: str, origin: str) -> None:
        """Copy a layer that nobody holds and that was unmounted to a new one with the same parent."""


def _fsync_file(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def remove_tree(path: Path) -> None:
    """Remove a directory tree, its unwritable directories too; one that is not there is no error."""
    try:
        path.chmod(0o700)
    except FileNotFoundError:
        return
    with Root.open(path) as root:
        for visit in walk(root.descriptor, loosen=True):
            if visit.leaving:
                os.rmdir(visit.name, dir_fd=visit.directory)
            elif not visit.is_directory:
                os.unlink(visit.name, dir_fd=visit.directory)
    path.rmdir()


def allocated_bytes(path: Path) -> int:
    """Return the space that what is in a directory takes, each inode once."""
    with Root.open(path) as root:
        return sum({identity(v.status): v.status.st_blocks * 512 for v in walk(root.descriptor)}.values())


def backing_filesystem(path: Path) -> str:
    """Return the type of the file system that holds a path, or would if the path were made."""
    real = path.resolve()
    for place in (real, *real.parents):
        for entry in reversed(mount_table()):
            if entry.target == str(place):
                return entry.fstype
    return "unknown"
