"""Layers that are directories, HOME/ID/ with a file `parent`; a crash leaves all of one or nothing.

A layer is put together as `.new-ID` and renamed; it is renamed to `.old-ID` before it is taken apart. Ids
have no dot in front, so whatever starts with one is a leftover, swept when the driver opens (under the root's
lock).
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..mount import mount_table
from .root import fsync_directory, write_durable

__all__ = ["LayerDirectory", "allocated_bytes", "backing_filesystem", "remove_tree"]


class LayerDirectory:
    """The directory of a driver's layers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def sweep(self) -> None:
        """Remove what a crash left of layers half made or half removed."""
        for entry in os.scandir(self.path):
            if entry.name.startswith((".new-", ".old-")):
                remove_tree(Path(entry.path))

    def exists(self, id: str) -> bool:
        return (self.path / id / "parent").exists()

    def ids(self) -> list[str]:
        names = (entry.name for entry in os.scandir(self.path) if not entry.name.startswith("."))
        return sorted(name for name in names if self.exists(name))

    def parent(self, id: str) -> str | None:
        return (self.path / id / "parent").read_text().strip() or None

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
            remove_tree(staging)
            raise
        fsync_directory(self.path)

    def remove(self, id: str) -> None:
        doomed = self.path / f".old-{id}"
        (self.path / id).rename(doomed)
        fsync_directory(self.path)
        remove_tree(doomed)


def _fsync_file(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def remove_tree(path: Path) -> None:
    """Remove a directory tree, its unwritable directories too; one that is not there is no error."""

    def open_up(
        function: Callable[..., object], failed: str, reason: tuple[object, BaseException, object]
    ) -> None:
        error = reason[1]
        if isinstance(error, FileNotFoundError):
            return
        if not isinstance(error, PermissionError):
            raise error
        for directory in (Path(failed).parent, Path(failed)):
            if stat.S_ISDIR(directory.lstat().st_mode):
                directory.chmod(0o700)
        if function is os.unlink or function is os.rmdir:
            function(failed)
        else:
            shutil.rmtree(failed)

    shutil.rmtree(path, onerror=open_up)


def allocated_bytes(path: Path) -> int:
    """Return the space that a tree takes, each inode once."""
    total, seen = 0, set()
    stack = [path]
    while stack:
        directory = stack.pop()
        for entry in os.scandir(directory):
            info = entry.stat(follow_symlinks=False)
            if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
                if (info.st_dev, info.st_ino) in seen:
                    continue
                seen.add((info.st_dev, info.st_ino))
            total += info.st_blocks * 512
            if stat.S_ISDIR(info.st_mode):
                stack.append(Path(entry.path))
    return total


def backing_filesystem(path: Path) -> str:
    """Return the type of the file system that holds a path, or would if the path were made."""
    real = path.resolve()
    for place in (real, *real.parents):
        for entry in reversed(mount_table()):
            if entry.target == str(place):
                return entry.fstype
    return "unknown"
