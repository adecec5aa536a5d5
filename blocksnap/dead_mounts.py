"""What a killed server of a pool leaves in the kernel: a FUSE export that nobody answers for, loop devices
over its files, file systems on those.

The kernel's own tables say what is there, so nothing has to be recorded before it is made, and nothing that a
living process or somebody else has made can be meant.
"""

import errno
import os
from pathlib import Path

from . import mount
from .errors import BlocksnapError
from .file_system import unmount_fuse

__all__ = ["dead_exports", "end_dead_export"]


def dead_exports() -> list[str]:
    """Return where FUSE exports of blocksnap are mounted whose server is gone."""
    return [entry.target for entry in mount.mount_table() if _is_export(entry) and _is_dead(entry.target)]


def end_dead_export(mountpoint: str | os.PathLike[str]) -> bool:
    """Unmount a dead export and all that stands on it; return False when there is none at the path.

    A file system that somebody still uses is taken out of sight and ends with its last user.
    """
    target = os.path.realpath(mountpoint)
    found = False
    while target in dead_exports():
        found = True
        _end_users(Path(target))
        _abort(target)
    return found


def _abort(target: str) -> None:
    if os.geteuid() == 0:
        mount.unmount(target, lazy=True, abort=True)
    else:
        unmount_fuse(target, lazy=True)


def _is_export(entry: mount.MountEntry) -> bool:
    return entry.fstype.startswith("fuse") and "blocksnap" in (*entry.fstype.split("."), entry.source)


def _is_dead(target: str) -> bool:
    try:
        os.statvfs(target)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _end_users(export: Path) -> None:
    for entry in reversed(mount.mount_table()):
        if Path(entry.source).is_relative_to(export):  # fuse2fs over a file of the export
            _abort(entry.target)
    for loop in mount.loop_devices():
        if Path(loop.backing_path).is_relative_to(export):
            for entry in reversed(mount.mount_table()):
                if entry.source == loop.path:
                    mount.unmount(entry.target, lazy=True)
            _detach(loop)


def _detach(loop: mount.LoopDevice) -> None:
    try:
        loop.detach(timeout=1.0)
    except BlocksnapError:
        return  # the kernel detaches it at its last close
