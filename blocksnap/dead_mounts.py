"""What a killed server of a pool leaves in the kernel: a FUSE export that nobody answers for, loop devices
over its files, file systems on those; mapped devices over the files of a pool.

The kernel's own tables say what is there, so nothing has to be recorded before it is made, and nothing that a
living process or somebody else has made can be meant.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

from . import mount
from .device_mapper import Control, Device
from .errors import ArgumentError, BlocksnapError, BusyError
from .file_system import may_mount, unmount_fuse

__all__ = ["dead_exports", "end_dead_export", "remove_mapped", "silent_exports"]

_PATIENCE_SECONDS = 3.0


def dead_exports() -> list[str]:
    """Return where FUSE exports of blocksnap are mounted whose server is gone."""
    return [target for target in _exports() if _is_dead(target)]


def silent_exports() -> list[str]:
    """Return where FUSE exports of blocksnap are mounted whose server does not answer, though it is there."""
    return [target for target in _exports() if mount.probe(target, _PATIENCE_SECONDS) == errno.ETIMEDOUT]


def end_dead_export(mountpoint: str | os.PathLike[str]) -> None:
    """Unmount a dead export and all that stands on it, if there is one at the path.

    A file system that somebody still uses is taken out of sight and ends with its last user.
    """
    path = Path(mountpoint).absolute()
    export = path.parent.resolve() / path.name  # resolving the mount point itself would ask its server
    while str(export) in _exports() and _is_dead(export):
        if may_mount():
            # Requests fail first: what is taken away next may wait for one that was never answered.
            with suppress(BusyError):
                mount.unmount(export, abort=True)
            for loop in mount.loop_devices(below=export):
                _end_loop(loop)
        for entry in reversed(mount.mount_table()):
            if Path(entry.source).is_relative_to(export):  # fuse2fs over a file of the export
                _unmount_fuse(entry.target)
        if mount.is_mounted(export):
            _unmount_fuse(export)


def _exports() -> list[str]:
    return [
        entry.target
        for entry in mount.mount_table()
        if entry.fstype.startswith("fuse") and "blocksnap" in (*entry.fstype.split("."), entry.source)
    ]


def _is_dead(target: str | os.PathLike[str]) -> bool:
    return mount.probe(target, _PATIENCE_SECONDS) in (errno.ENOTCONN, errno.ECONNABORTED)


def _unmount_fuse(target: str | os.PathLike[str]) -> None:
    if may_mount():
        mount.unmount(target, lazy=True, abort=True)
    else:
        unmount_fuse(target, lazy=True)


def _end_loop(loop: mount.LoopDevice) -> None:
    for entry in reversed(mount.mount_table()):
        if loop.path == entry.source or entry.device == f"7:{loop.number}":
            with suppress(ArgumentError):
                mount.thaw(entry.target)
            mount.unmount(entry.target, lazy=True)
    with suppress(BlocksnapError):  # the kernel detaches it at its last close
        loop.detach(timeout=1.0)


def remove_mapped(loop: mount.LoopDevice) -> None:
    """Take our mapped devices over a loop device out of the kernel, upper ones first, but what is in use."""
    upper = _standing_on(f"loop{loop.number}")
    if not upper:
        return
    with Control.open() as control:
        ours = {f"dm-{entry.number.minor}": entry for entry in control.devices() if entry.ours}
        for entry in (ours[name] for name in upper if name in ours):
            with suppress(BlocksnapError):
                Device(control, entry.name, entry.uuid, entry.number).remove(timeout=1.0)


def _standing_on(name: str) -> list[str]:
    """Return the block devices that are made on one, those on top first."""
    holders = Path(f"/sys/block/{name}/holders")
    found: dict[str, None] = {}
    for holder in sorted(os.listdir(holders)) if holders.is_dir() else ():
        found |= dict.fromkeys([*_standing_on(holder), holder])
    return list(found)
