"""overlayfs: a layer is a directory of what differs from its parents, copied up file by file.

    <root>/overlay/ID/diff      the upper directory (a lower one for the layer's children)
    <root>/overlay/ID/work      overlayfs' own
    <root>/overlay/ID/merged    where the layer is mounted
    <root>/overlay/ID/lower     the short names of the parents, nearest first
    <root>/overlay/ID/link      this layer's short name
    <root>/overlay/ID/parent    the parent's id
    <root>/l/NAME               a link to ../overlay/ID/diff
    <root>/l/empty              the lower directory of a layer without parents: every layer is mounted alike

The short names keep 128 lower directories within the one page that the kernel takes as mount data.
redirect_dir, metacopy and index are turned off, whatever the kernel's defaults: each upper directory stays
readable by itself, and a copy-up copies the whole file, which is what this driver is measured for.
"""

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from .. import mount
from ..archive.confined import Root, descriptor_path, walk
from ..archive.names import Parts
from ..errors import BusyError, NotSupportedError
from ..file_system import may_mount
from .base import Accounting
from .directory import DirectoryDriver, allocated_bytes, backing_filesystem
from .root import fsync_directory
from .tree_copy import copy_attributes, copy_tree

__all__ = ["OverlayDriver"]

_MAX_LOWERS = 128
_MOUNT_DATA = 4095
_FEATURES_OFF = "redirect_dir=off,metacopy=off,index=off"
_UNFIT_NAME = re.compile(r"[,:\\\udc80-\udcff]")
_UNFIT = frozenset(("overlay", "nfs", "nfs4", "cifs", "9p", "vfat", "exfat", "squashfs", "erofs", "fuse"))


class OverlayDriver(DirectoryDriver):
    """overlayfs on the file system of the root directory."""

    name: ClassVar[str] = "overlay"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._links = self.root / "l"
        (self._links / "empty").mkdir(mode=0o755, parents=True, exist_ok=True)
        with self._home.lock.hold():
            self._sweep_links()

    @classmethod
    def missing(cls, root: Path) -> str | None:
        if not may_mount():
            return "needs root"
        if "overlay" not in Path("/proc/filesystems").read_text().split():
            return "no overlay in /proc/filesystems: modprobe overlay"
        if (kind := backing_filesystem(root)) in _UNFIT:
            return (
                f"{root} is on {kind}, which cannot hold an upper directory: take one on ext4, XFS or btrfs"
            )
        return None

    # ---- questions -------------------------------------------------------------------------------

    def status(self) -> list[tuple[str, str]]:
        return [
            ("Root", str(self.root)),
            ("Backing Filesystem", backing_filesystem(self.root)),
            ("Layers", str(len(self.layers()))),
            ("Overlay Options", _FEATURES_OFF),
        ]

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

        A file that was renamed after its copy-up counts with the size it has now. A file truncated as it was
        opened counts as copied though its contents were not: overlayfs leaves no trace of that.
        """
        self._check_known(id)
        upper = self._layers.path / id / "diff"
        lowers = self._lower_directories(id)
        sizes = ((_size_below(lowers, parts), size) for parts, size in _copied_up(upper))
        copied = sum(now if below is None else below for below, now in sizes)
        return Accounting(copy_bytes=copied, allocated_bytes=allocated_bytes(upper))

    # ---- layers ----------------------------------------------------------------------------------

    def _snapshot(self, id: str, origin: str) -> None:
        with self._new_layer(id, self.parent(origin)) as layer:
            copy_tree(self._layers.path / origin / "diff", layer / "diff", reflink=True)

    def _create(self, id: str, parent: str | None, *, writable: bool) -> None:  # noqa: ARG002
        if parent is not None:
            self._settle(parent, id)
        with self._new_layer(id, parent) as layer:
            if parent is not None:
                copy_attributes(
                    self._layers.path / parent / "diff", layer / "diff", without="trusted.overlay."
                )

    def _settle(self, parent: str, child: str) -> None:
        """See to it that nobody writes to a parent: overlayfs shows a changing lower directory anyhow."""
        merged = self._merged(parent)
        if not mount.is_mounted(merged) or os.statvfs(merged).f_flag & os.ST_RDONLY:
            return
        if holders := self._home.holders(parent):
            raise BusyError(
                f'layer "{child}": its parent "{parent}" is mounted for writing by {holders[0]}: '
                "unmount that first"
            )
        self._unmount(parent)

    @contextmanager
    def _new_layer(self, id: str, parent: str | None) -> Iterator[Path]:
        lowers = [] if parent is None else [self._link(parent), *self._lowers(parent)]
        if len(lowers) > _MAX_LOWERS:
            raise NotSupportedError(
                f'layer "{id}" would have {len(lowers)} parents, overlay takes {_MAX_LOWERS}: '
                "start from an image with fewer layers"
            )
        with self._layers.new(id, parent) as layer:
            for name in ("diff", "merged", "work"):
                (layer / name).mkdir()
                (layer / name).chmod(0o755)
            (layer / "lower").write_text(":".join(lowers))
            (layer / "link").write_text(self._new_link(id))
            yield layer

    def _new_link(self, id: str) -> str:
        while True:
            name = secrets.token_hex(3)
            try:
                (self._links / name).symlink_to(f"../overlay/{id}/diff")
            except FileExistsError:
                continue
            fsync_directory(self._links)
            return name

    def _remove(self, id: str) -> None:
        link = self._links / self._link(id)
        self._layers.remove(id)
        link.unlink(missing_ok=True)

    def _sweep_links(self) -> None:
        for link in self._links.iterdir():
            if not link.exists():
                link.unlink()

    # ---- mounts ----------------------------------------------------------------------------------

    def _mount(self, id: str, mount_label: str, *, read_only: bool, lasting: bool) -> Path:  # noqa: ARG002
        merged = self._merged(id)
        if mount.is_mounted(merged):
            return merged
        links = os.open(self._links, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # A root whose path is too long for 128 repetitions, or not fit for mount data, goes by a
            # descriptor's name.
            options = self._options(id, str(self._links), read_only=read_only)
            if len(os.fsencode(options)) > _MOUNT_DATA or _UNFIT_NAME.search(str(self._links)):
                options = self._options(id, f"/proc/{os.getpid()}/fd/{links}", read_only=read_only)
            if mount_label:
                options += f',context="{mount_label}"'
            mount.mount("overlay", merged, "overlay", read_only=read_only, options=options)
        finally:
            os.close(links)
        return merged

    def _options(self, id: str, links: str, *, read_only: bool) -> str:
        link = self._link(id)
        lowers = [*self._lowers(id), "empty"]
        if read_only:
            lowers.insert(0, link)
        options = f"lowerdir={':'.join(f'{links}/{name}' for name in lowers)}"
        if not read_only:
            options += f",upperdir={links}/{link},workdir={links}/{link}/../work"
        return f"{options},{_FEATURES_OFF}"

    def _unmount(self, id: str) -> None:
        if mount.is_mounted(self._merged(id)):
            mount.unmount(self._merged(id))

    # ---- names -----------------------------------------------------------------------------------

    def _merged(self, id: str) -> Path:
        return self._layers.path / id / "merged"

    def _link(self, id: str) -> str:
        return (self._layers.path / id / "link").read_text()

    def _lowers(self, id: str) -> list[str]:
        return [name for name in (self._layers.path / id / "lower").read_text().split(":") if name]

    def _lower_directories(self, id: str) -> list[Path]:
        return [(self._links / name).resolve() for name in self._lowers(id)]


def _copied_up(upper: Path) -> Iterator[tuple[Parts, int]]:
    """Yield the regular files that overlayfs copied up, which it marks, and their present sizes."""
    with Root.open(upper) as root:
        for visit in walk(root.descriptor):
            if stat.S_ISREG(visit.status.st_mode):
                path = descriptor_path(visit.directory, visit.name)
                if "trusted.overlay.origin" in os.listxattr(path, follow_symlinks=False):
                    yield visit.parts, visit.status.st_size


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
