"""Where the kernel says that the contents of files lie (FIEMAP): what is shared, and by whom, shows there."""

import errno
import fcntl
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..archive.confined import Identity, Root, Visit, identity, walk
from .tree_copy import opened_for_reading

__all__ = ["Extent", "extents", "own_bytes"]

# Documentation/filesystems/fiemap.rst and include/uapi/linux/fiemap.h of the kernel.
_FIEMAP = 0xC020660B
_HEADER = struct.Struct("=QQLLLL")
_EXTENT = struct.Struct("=QQQQQLLLL")
_AT_ONCE = 256
_LAST, _INLINE, _SHARED = 0x1, 0x200, 0x2000
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADR)


class Extent(NamedTuple):
    """Contents that lie in one piece; all three in bytes, physical on the file system's device."""

    logical: int
    physical: int
    length: int
    is_shared: bool
    is_inline: bool


def extents(descriptor: int) -> Iterator[Extent]:
    """Yield the extents of a file in their order. Raises OSError where the file system cannot tell."""
    begin = 0
    while True:
        buffer = bytearray(_HEADER.size + _AT_ONCE * _EXTENT.size)
        _HEADER.pack_into(buffer, 0, begin, (1 << 64) - 1 - begin, 0, 0, _AT_ONCE, 0)
        fcntl.ioctl(descriptor, _FIEMAP, buffer)
        found = _HEADER.unpack_from(buffer)[3]
        flags = _LAST
        for number in range(found):
            entry = _EXTENT.unpack_from(buffer, _HEADER.size + number * _EXTENT.size)
            logical, physical, length, flags = entry[0], entry[1], entry[2], entry[5]
            yield Extent(logical, physical, length, bool(flags & _SHARED), bool(flags & _INLINE))
            begin = logical + length
        if flags & _LAST:
            return


def own_bytes(path: Path) -> int:
    """Return the space that what is in a directory shares with nobody, each inode once.

    Contents that lie with the metadata do not count: their blocks cannot be told from the metadata's own.
    """
    sizes: dict[Identity, int] = {}
    with Root.open(path) as root:
        for visit in walk(root.descriptor):
            if not visit.leaving and identity(visit.status) not in sizes:
                sizes[identity(visit.status)] = _own_bytes(visit)
    return sum(sizes.values())


def _own_bytes(visit: Visit) -> int:
    allocated = visit.status.st_blocks * 512
    if not stat.S_ISREG(visit.status.st_mode) or not allocated:
        return allocated
    try:
        with opened_for_reading(visit) as descriptor:
            found = [e for e in extents(descriptor) if not (e.is_shared or e.is_inline)]
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return allocated
        raise
    return sum(extent.length for extent in found)
