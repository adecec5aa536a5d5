"""A union file system in user space, fuse-overlayfs or unionfs-fuse: copy-up by files, without privilege.

A process serves each mount and ends with it. Layers are named to it relative to the directory of all layers:
so no path is too long for it, nor has it a character that means something to it. (fuse-overlayfs resolves the
names first: a colon in the root's path still divides them.)

<root>/program    which of the two this root belongs to: they do not read each other's whiteouts
"""

import os
from pathlib import Path
from typing import ClassVar

from ..archive.names import Parts
from ..errors import ArgumentError, NotSupportedError
from ..file_system import find_program, may_mount
from .directory import backing_filesystem
from .mount_server import MountServer
from .root import read_note, write_durable
from .union import UnionDriver

__all__ = ["UnionfsDriver"]

# The program's name, the Debian package.
_PROGRAMS = {"fuse-overlayfs": "fuse-overlayfs", "unionfs": "unionfs-fuse"}
_MARK = "user.fuseoverlayfs.origin"
_EMPTY = ".empty"  # the lowest layer of all: fuse-overlayfs wants one


class UnionfsDriver(UnionDriver):
    """Union mounts that a process of an ordinary user can serve."""

    name: ClassVar[str] = "unionfs"

    def __init__(self, root: Path, *, program: str | None = None) -> None:
        """Open the root; a new one belongs to `program`, or to the first of the two that is installed."""
        if program is not None and program not in _PROGRAMS:
            raise ArgumentError(f'"{program}" serves no union: take {" or ".join(_PROGRAMS)}')
        super().__init__(root)
        if ":" in str(self.root):
            raise ArgumentError(f"{self.root}: fuse-overlayfs takes no root with a colon in its path")
        with self._home.lock.hold():
            self._program = self._claim(program)
            self._copy_mark = _MARK if self._program == "fuse-overlayfs" else None
            (self._layers.path / _EMPTY / "diff").mkdir(parents=True, exist_ok=True)
            self._unmount_abandoned()

    def _claim(self, wanted: str | None) -> str:
        marker = self.root / "program"
        if not marker.exists():
            write_durable(marker, (wanted or _installed()[0]) + "\n")
        owner = read_note(marker)
        if wanted not in (None, owner):
            raise ArgumentError(f"the layers of {self.root} were written by {owner}: open it without program")
        if owner not in _installed():
            raise NotSupportedError(
                f"the layers of {self.root} want {owner}: apt install {_PROGRAMS.get(owner, owner)}"
            )
        return owner

    @classmethod
    def missing(cls, root: Path) -> str | None:  # noqa: ARG003 - the root's file system does not matter
        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            return "needs /dev/fuse: modprobe fuse; in a container: --device /dev/fuse"
        if not _installed():
            return "fuse-overlayfs is not installed: apt install fuse-overlayfs"
        if not may_mount() and find_program("fusermount3") is None:
            return "fusermount3 is not installed: apt install fuse3"
        return None

    def status(self) -> list[tuple[str, str]]:
        return [
            ("Root", str(self.root)),
            ("Backing Filesystem", backing_filesystem(self.root)),
            ("Layers", str(len(self.layers()))),
            ("Program", self._program),
        ]

    def _origin(self, parts: Parts, mark: bytes) -> Parts:
        """Return the name that fuse-overlayfs noted; what is no such name does not count."""
        noted = tuple(os.fsdecode(mark.removesuffix(b"\0")).split("/"))
        is_name = all(part not in ("", ".", "..") and "\0" not in part for part in noted)
        return noted if is_name else parts

    # ---- mounts ----------------------------------------------------------------------------------

    def _mount(self, id: str, mount_label: str, *, read_only: bool, lasting: bool) -> Path:
        self._server(id).is_serving()  # ends the mount of a server that was killed
        return super()._mount(id, mount_label, read_only=read_only, lasting=lasting)

    def _mount_union(self, id: str, merged: Path, mount_label: str, *, read_only: bool) -> None:  # noqa: ARG002
        options = _overlay_options if self._program == "fuse-overlayfs" else _unionfs_options
        lowers = self._layers.ancestors(id)
        arguments = options(None, [id, *lowers]) if read_only else options(id, lowers)
        command = [find_program(self._program) or self._program, "-f", *arguments, str(merged)]
        self._server(id).start(command, cwd=self._layers.path)

    def _unmount(self, id: str) -> None:
        self._server(id).unmount()

    def _server(self, id: str) -> MountServer:
        merged = self._merged(id)
        return MountServer(self._program, merged, str(merged))


def _installed() -> list[str]:
    return [program for program in _PROGRAMS if find_program(program) is not None]


def _overlay_options(upper: str | None, lowers: list[str]) -> list[str]:
    options = [f"lowerdir={':'.join(f'{lower}/diff' for lower in (*lowers, _EMPTY))}"]
    if upper is not None:
        options += [f"upperdir={upper}/diff", f"workdir={upper}/work"]
    if may_mount():
        options += ["dev", "suid"]
    return ["-o", ",".join(options)]


def _unionfs_options(upper: str | None, lowers: list[str]) -> list[str]:
    branches = [f"./{lower}/diff=RO" for lower in lowers]
    options = "use_ino,hide_meta_files" + (",allow_other,suid,dev" if may_mount() else "")
    if upper is not None:
        branches, options = [f"./{upper}/diff=RW", *branches], f"cow,{options}"
    return ["-o", options, ":".join(branches)]
