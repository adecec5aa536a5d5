"""Subvolumes of btrfs by its ioctls: made, snapshotted, limited, destroyed. Needs no program, but root.

Numbers and structs: include/uapi/linux/btrfs.h of the kernel.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..archive.confined import Root, walk

__all__ = [
    "create_subvolume",
    "destroy_subvolume",
    "limit_subvolume",
    "snapshot_subvolume",
    "subvolume_id",
]

_SUBVOL_CREATE = 0x5000940E
_SNAP_DESTROY = 0x5000940F
_SNAP_CREATE_V2 = 0x50009417
_INO_LOOKUP = 0xD0009412
_SUBVOL_SETFLAGS = 0x4008941A
_QUOTA_CTL = 0xC0109428
_QGROUP_CREATE = 0x4010942A
_QGROUP_LIMIT = 0x8030942B
_QUOTA_RESCAN_WAIT = 0x942E
_QUOTA_ENABLE = 1
_LIMIT_REFERENCED = 1
_ARGUMENTS = 4096
_NAME_AT, _NAME_AT_V2 = 8, 56
_ROOT_INODE = 256


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _arguments(name: str, *, name_at: int, source: int = 0) -> bytearray:
    arguments = bytearray(_ARGUMENTS)
    struct.pack_into("=q", arguments, 0, source)
    encoded = os.fsencode(name)
    arguments[name_at : name_at + len(encoded)] = encoded
    return arguments


def create_subvolume(path: Path) -> None:
    """Make an empty subvolume."""
    with _directory(path.parent) as parent:
        fcntl.ioctl(parent, _SUBVOL_CREATE, _arguments(path.name, name_at=_NAME_AT))


def snapshot_subvolume(source: Path, path: Path) -> None:
    """Make a writable snapshot, durable when this returns, of a subvolume that may be in use.

    Where a subvolume lies in the source the snapshot has an empty directory.
    """
    with _directory(source) as origin, _directory(path.parent) as parent:
        arguments = _arguments(path.name, name_at=_NAME_AT_V2, source=origin)
        fcntl.ioctl(parent, _SNAP_CREATE_V2, arguments)


def destroy_subvolume(path: Path) -> None:
    """Destroy a subvolume and those in it; one that is not there is no error."""
    with suppress(FileNotFoundError):
        group = subvolume_id(path)
        with _directory(path.parent) as parent:
            try:
                _destroy(parent, path.name)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
                _destroy_inner(path)
                _destroy(parent, path.name)
            # What was counted for it goes too, if there are quotas and the kernel has not done so itself.
            with suppress(OSError):
                fcntl.ioctl(parent, _QGROUP_CREATE, struct.pack("=QQ", 0, group))


def _destroy(parent: int, name: str) -> None:
    fcntl.ioctl(parent, _SNAP_DESTROY, _arguments(name, name_at=_NAME_AT))


def _destroy_inner(path: Path) -> None:
    """Destroy what subvolumes a container has made in its own, the deepest first."""
    with Root.open(path) as root:
        for visit in walk(root.descriptor):
            if not visit.is_directory or visit.status.st_ino != _ROOT_INODE:
                continue
            if visit.leaving:
                _destroy(visit.directory, visit.name)
            else:
                below = os.open(visit.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=visit.directory)
                try:
                    fcntl.ioctl(below, _SUBVOL_SETFLAGS, struct.pack("=Q", 0))  # not read-only any more
                finally:
                    os.close(below)


def subvolume_id(path: Path) -> int:
    """Return the number of a subvolume's tree."""
    arguments = bytearray(_ARGUMENTS)
    struct.pack_into("=QQ", arguments, 0, 0, _ROOT_INODE)
    with _directory(path) as descriptor:
        fcntl.ioctl(descriptor, _INO_LOOKUP, arguments)
    number: int = struct.unpack_from("=Q", arguments)[0]
    return number


def limit_subvolume(path: Path, size: int) -> None:
    """Let a subvolume refer to no more than `size` bytes, shared ones included; turns quotas on for that."""
    with _directory(path) as descriptor:
        fcntl.ioctl(descriptor, _QUOTA_CTL, bytearray(struct.pack("=QQ", _QUOTA_ENABLE, 0)))
        fcntl.ioctl(descriptor, _QUOTA_RESCAN_WAIT)
        of_this_one = 0
        limit = struct.pack("=QQQQQQ", of_this_one, _LIMIT_REFERENCED, size, 0, 0, 0)
        fcntl.ioctl(descriptor, _QGROUP_LIMIT, limit)
