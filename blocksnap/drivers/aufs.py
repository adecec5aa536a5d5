"""aufs, for the kernels that were built with it: branches, the uppermost of them writable.

A whiteout is a file `.wh.NAME` in a branch, an opaque directory holds `.wh..wh..opq`: branches are layers as
images have them. The kernel takes one page of mount data: branches that do not fit are appended one by one.
"""

import re
from pathlib import Path
from typing import ClassVar

from .. import mount
from ..errors import ArgumentError
from ..file_system import may_mount
from .directory import backing_filesystem
from .union import UnionDriver

__all__ = ["AufsDriver"]

_MOUNT_DATA = 4095
_OPTIONS = "dirperm1"
_UNFIT_NAME = re.compile(r"[,:=\udc80-\udcff]")


class AufsDriver(UnionDriver):
    """aufs on the file system of the root directory."""

    name: ClassVar[str] = "aufs"
    directories: ClassVar[tuple[str, ...]] = ("diff", "merged")
    _copy_mark = None

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        if _UNFIT_NAME.search(str(self.root)):
            raise ArgumentError(
                f"{self.root}: aufs takes no root with , : or = in its path, nor bytes beyond UTF-8"
            )

    @classmethod
    def missing(cls, root: Path) -> str | None:  # noqa: ARG003 - what it stands on does not matter
        if not may_mount():
            return "needs root"
        if "aufs" not in Path("/proc/filesystems").read_text().split():
            return (
                "this kernel has no aufs, which was never in the mainline: take overlay, its successor there"
            )
        return None

    def status(self) -> list[tuple[str, str]]:
        return [
            ("Root", str(self.root)),
            ("Backing Filesystem", backing_filesystem(self.root)),
            ("Layers", str(len(self.layers()))),
        ]

    def metadata(self, id: str) -> dict[str, str]:
        """Return LowerDir (nearest first, if any), UpperDir and MergedDir."""
        return {name: value for name, value in super().metadata(id).items() if name != "WorkDir"}

    def _mount_union(self, id: str, merged: Path, mount_label: str, *, read_only: bool) -> None:
        own = self._layers.path / id / "diff"
        first, rest = mount_options(own, self._lower_directories(id), mount_label, read_only=read_only)
        mount.mount("none", merged, "aufs", read_only=read_only, options=first)
        try:
            for options in rest:
                mount.mount("none", merged, "aufs", read_only=read_only, remount=True, options=options)
        except BaseException:
            mount.unmount(merged)
            raise


def mount_options(
    own: Path, lowers: list[Path], mount_label: str, *, read_only: bool
) -> tuple[str, list[str]]:
    """Return the options of the mount, and those of a remount for each branch that is too much for it."""
    options = f"{_OPTIONS},br:{own}={'ro+wh' if read_only else 'rw'}"
    label = f',context="{mount_label}"' if mount_label else ""
    fitting = 0
    for lower in lowers:
        more = f":{lower}=ro+wh"
        if len(options) + len(more) + len(label) > _MOUNT_DATA:
            break
        options += more
        fitting += 1
    return options + label, [f"append:{lower}=ro+wh" for lower in lowers[fitting:]]
