"""overlayfs: a layer is a directory of what differs from its parents, copied up file by file.

    <root>/overlay/ID/lower     the short names of the parents, nearest first (for the rest see union.py)
    <root>/overlay/ID/link      this layer's short name
    <root>/l/NAME               a link to ../overlay/ID/diff
    <root>/l/empty              the lower directory of a layer without parents: every layer is mounted alike

The short names keep 128 lower directories within the one page that the kernel takes as mount data.
redirect_dir, metacopy and index are turned off, whatever the kernel's defaults: each upper directory stays
readable by itself, and a copy-up copies the whole file, which is what this driver is measured for.
"""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from .. import mount
from ..errors import NotSupportedError
from ..file_system import may_mount
from .directory import backing_filesystem
from .root import fsync_directory, never_written, read_note
from .union import UnionDriver

__all__ = ["OverlayDriver"]

_MAX_LOWERS = 128
_MOUNT_DATA = 4095
_FEATURES_OFF = "redirect_dir=off,metacopy=off,index=off"
_SHORT_NAME = re.compile("[0-9a-f]{6}")
_UNFIT_NAME = re.compile(r"[,:\\\udc80-\udcff]")
_UNFIT = frozenset(("overlay", "nfs", "nfs4", "cifs", "9p", "vfat", "exfat", "squashfs", "erofs", "fuse"))


class OverlayDriver(UnionDriver):
    """overlayfs on the file system of the root directory."""

    name: ClassVar[str] = "overlay"
    _copy_mark = "trusted.overlay.origin"

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

    # ---- layers ----------------------------------------------------------------------------------

    @contextmanager
    def _new_layer(self, id: str, parent: str | None) -> Iterator[Path]:
        lowers = [] if parent is None else [self._link(parent), *self._lowers(parent)]
        if len(lowers) > _MAX_LOWERS:
            raise NotSupportedError(
                f'layer "{id}" would have {len(lowers)} parents, overlay takes {_MAX_LOWERS}: '
                "start from an image with fewer layers"
            )
        with super()._new_layer(id, parent) as layer:
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

    def _mount_union(self, id: str, merged: Path, mount_label: str, *, read_only: bool) -> None:
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

    def _options(self, id: str, links: str, *, read_only: bool) -> str:
        link = self._link(id)
        lowers = [*self._lowers(id), "empty"]
        if read_only:
            lowers.insert(0, link)
        options = f"lowerdir={':'.join(f'{links}/{name}' for name in lowers)}"
        if not read_only:
            options += f",upperdir={links}/{link},workdir={links}/{link}/../work"
        return f"{options},{_FEATURES_OFF}"

    # ---- names -----------------------------------------------------------------------------------

    def _link(self, id: str) -> str:
        return self._names(id, "link")[0]

    def _lowers(self, id: str) -> list[str]:
        return self._names(id, "lower")

    def _names(self, id: str, note: str) -> list[str]:
        """Return the short names in a note: they become parts of paths and of the options of a mount."""
        path = self._layers.path / id / note
        text = read_note(path)
        names = [] if note == "lower" and not text else text.split(":")
        if not all(_SHORT_NAME.fullmatch(name) for name in names) or (note == "link" and len(names) > 1):
            raise never_written(path, text)
        return names
