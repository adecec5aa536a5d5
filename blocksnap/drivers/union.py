"""What drivers of union file systems have alike: a layer is a directory of what differs from its parents.

<root>/NAME/ID/diff      the upper directory (a lower one for the layer's children)
<root>/NAME/ID/work      what the file system wants for itself
<root>/NAME/ID/merged    where the layer is mounted
<root>/NAME/ID/parent    the parent's id
"""

import os
import stat
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from .. import mount
from ..archive.confined import Root, descriptor_path, identity, walk
from ..archive.names import Parts
from .base import Accounting
from .directory import DirectoryDriver
from .extents import own_bytes
from .tree_copy import clones_files, copy_attributes, copy_tree

__all__ = ["UnionDriver"]

_OWN_XATTRS = ("trusted.overlay.", "user.overlay.", "user.fuseoverlayfs.")


class UnionDriver(DirectoryDriver):
    """A driver that mounts an upper directory over lower ones; files are copied up when they change."""

    _copy_mark: str | None
    """The extended attribute of files that were copied up; None where nothing tells them from new ones."""

    directories: ClassVar[tuple[str, ...]] = ("diff", "merged", "work")

    # ---- questions -------------------------------------------------------------------------------

    def metadata(self, id: str) -> dict[str, str]:
        """Return Docker's keys: LowerDir (nearest first, if any), UpperDir, WorkDir, MergedDir."""
        self._check_known(id)
        layer = self._layers.path / id
        parents = ":".join(map(str, self._lower_directories(id)))
        lowers = {"LowerDir": parents} if parents else {}
        return lowers | {
            "UpperDir": str(layer / "diff"),
            "WorkDir": str(layer / "work"),
            "MergedDir": str(layer / "merged"),
        }

    def accounting(self, id: str) -> Accounting:
        """Count the files that were copied up, each with the size that it has in the parent.

        A file that was renamed after its copy-up counts with the size it has now, where its mark does not
        tell its former name. A file truncated as it was opened counts as copied though its contents were
        not: that leaves no trace. Where files can share blocks a copy-up copies nothing.
        """
        self._check_known(id)
        upper = self._layers.path / id / "diff"
        if self._copy_mark is None:
            copied = None
        else:
            copied = 0 if clones_files(upper.parent) else self._copied_bytes(id, upper, self._copy_mark)
        return Accounting(copy_bytes=copied, allocated_bytes=own_bytes(upper))

    def _copied_bytes(self, id: str, upper: Path, mark: str) -> int:
        lowers = self._lower_directories(id)
        found = _marked_files(upper, mark)
        sizes = ((_size_below(lowers, self._origin(parts, value)), size) for parts, value, size in found)
        return sum(now if below is None else below for below, now in sizes)

    def _origin(self, parts: Parts, mark: bytes) -> Parts:  # noqa: ARG002 - for drivers whose marks tell more
        """Return the name that a file had when it was copied up, as far as that can be told."""
        return parts

    # ---- layers ----------------------------------------------------------------------------------

    def _snapshot(self, id: str, origin: str) -> None:
        with self._new_layer(id, self.parent(origin)) as layer:
            copy_tree(self._layers.path / origin / "diff", layer / "diff", reflink=True)

    def _create(self, id: str, parent: str | None, *, writable: bool) -> None:  # noqa: ARG002
        if parent is not None:
            self._settle_parent(parent, id, self._merged(parent))
        with self._new_layer(id, parent) as layer:
            if parent is not None:
                upper = self._layers.path / parent / "diff"
                copy_attributes(upper, layer / "diff", without=_OWN_XATTRS)

    @contextmanager
    def _new_layer(self, id: str, parent: str | None) -> Iterator[Path]:
        with self._layers.new(id, parent) as layer:
            for name in self.directories:
                (layer / name).mkdir()
                (layer / name).chmod(0o755)
            yield layer

    def _remove(self, id: str) -> None:
        self._layers.remove(id)

    # ---- mounts ----------------------------------------------------------------------------------

    def _mount(self, id: str, mount_label: str, *, read_only: bool, lasting: bool) -> Path:  # noqa: ARG002
        merged = self._merged(id)
        if not mount.is_mounted(merged):
            self._mount_union(id, merged, mount_label, read_only=read_only)
        return merged

    @abstractmethod
    def _mount_union(self, id: str, merged: Path, mount_label: str, *, read_only: bool) -> None:
        """Mount a layer over its parents; read-only, the layer itself is but the nearest of them."""

    def _unmount(self, id: str) -> None:
        if mount.is_mounted(self._merged(id)):
            mount.unmount(self._merged(id))

    # ---- names -----------------------------------------------------------------------------------

    def _merged(self, id: str) -> Path:
        return self._layers.path / id / "merged"

    def _lower_directories(self, id: str) -> list[Path]:
        return [self._layers.path / parent / "diff" for parent in self._layers.ancestors(id)]


def _marked_files(upper: Path, mark: str) -> Iterator[tuple[Parts, bytes, int]]:
    """Yield the regular files with a mark, its value and their present sizes, each inode once."""
    seen = set()
    with Root.open(upper) as root:
        for visit in walk(root.descriptor):
            if not stat.S_ISREG(visit.status.st_mode) or identity(visit.status) in seen:
                continue
            path = descriptor_path(visit.directory, visit.name)
            if mark in os.listxattr(path, follow_symlinks=False):
                seen.add(identity(visit.status))
                value = os.getxattr(path, mark, follow_symlinks=False)
                yield visit.parts, value, visit.status.st_size


def _size_below(lowers: list[Path], parts: Parts) -> int | None:
    """Return the size that a regular file has in the nearest lower directory, None when it is in none."""
    for lower in lowers:
        with Root.open(lower) as root, suppress(OSError):
            directory = root.open_directory(parts[:-1])
            try:
                info = os.stat(parts[-1], dir_fd=directory, follow_symlinks=False)
            finally:
                os.close(directory)
            if stat.S_ISREG(info.st_mode):
                return info.st_size
    return None
