"""Which inodes two thin devices have the same, told by the blocks that differ between the devices.

A file system keeps its inodes at places that follow from their numbers. An inode in a block that both devices
share is the same in both; and nothing changes of a file or a directory without a trace in its inode.
"""

import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..archive import Unchanged

__all__ = ["changed_ranges", "unchanged_inodes"]

Read = Callable[[int, int], bytes]
"""Reads a device: offset and length in bytes."""

_EXT4_SUPERBLOCK, _EXT4_MAGIC = 1024, 0xEF53
_EXT4_META_BG, _EXT4_64BIT = 0x10, 0x80
_EXT4_DESCRIPTOR = 32
_XFS_MAGIC = b"XFSB"


class _Inodes(NamedTuple):
    """Where the inodes of a file system are; `size` bytes at place(number)."""

    size: int
    place: Callable[[int], int]


def changed_ranges(delta: NDArray[np.void], block_size: int) -> list[range]:
    """Return the ranges of bytes that a delta of two devices names, in their order."""
    order = delta[np.argsort(delta["thin_begin"])]
    begins = (order["thin_begin"].astype(np.int64) * block_size).tolist()
    lengths = (order["length"].astype(np.int64) * block_size).tolist()
    return [range(begin, begin + length) for begin, length in zip(begins, lengths, strict=True)]


def unchanged_inodes(old: Read, new: Read, changed: Sequence[range]) -> Unchanged | None:
    """Return the test for inodes that are the same on both; None for file systems that it cannot tell of.

    All that was written must be in place, not in a journal only.
    """
    before, inodes = _inodes(old), _inodes(new)
    if before is None or inodes is None or before[0] != inodes[0]:
        return None
    size, place = inodes[1]
    begins = [one.start for one in changed]
    ends = [one.stop for one in changed]

    def is_unchanged(number: int) -> bool:
        offset = place(number)
        at = bisect_right(begins, offset + size - 1) - 1
        return at < 0 or ends[at] <= offset

    return is_unchanged


def _inodes(read: Read) -> tuple[object, _Inodes] | None:
    """Return what must be alike on both devices, and where the inodes are."""
    head = read(0, 4096)
    if head[:4] == _XFS_MAGIC:
        return _xfs(head)
    if struct.unpack_from("<H", head, _EXT4_SUPERBLOCK + 0x38)[0] == _EXT4_MAGIC:
        return _ext4(head[_EXT4_SUPERBLOCK:], read)
    return None


def _ext4(superblock: bytes, read: Read) -> tuple[object, _Inodes] | None:
    """See Documentation/filesystems/ext4 of the kernel: super.rst, group_descr.rst."""
    inode_count, block_count = struct.unpack_from("<II", superblock, 0)
    first_block, log_size = struct.unpack_from("<II", superblock, 0x14)
    per_group: int = struct.unpack_from("<I", superblock, 0x28)[0]
    inode_size: int = struct.unpack_from("<H", superblock, 0x58)[0]
    incompatible = struct.unpack_from("<I", superblock, 0x60)[0]
    wide = bool(incompatible & _EXT4_64BIT)
    step = struct.unpack_from("<H", superblock, 0xFE)[0] if wide else _EXT4_DESCRIPTOR
    if incompatible & _EXT4_META_BG or not per_group or not step or log_size > 6:
        return None
    block = 1024 << log_size
    groups = -(-inode_count // per_group)
    descriptors = read((first_block + 1) * block, groups * step)
    tables = [_inode_table(descriptors, group * step, wide=wide) * block for group in range(groups)]

    def place(number: int) -> int:
        group, index = divmod(number - 1, per_group)
        table: int = tables[group]
        return table + index * inode_size

    return (block_count, inode_count, tables), _Inodes(inode_size, place)


def _inode_table(descriptors: bytes, at: int, *, wide: bool) -> int:
    low: int = struct.unpack_from("<I", descriptors, at + 0x8)[0]
    high: int = struct.unpack_from("<I", descriptors, at + 0x28)[0] if wide else 0
    return high << 32 | low


def _xfs(superblock: bytes) -> tuple[object, _Inodes]:
    """An inode's number is its group, block and index put together; see fs/xfs/libxfs/xfs_format.h."""
    uuid = superblock[32:48]
    block: int = struct.unpack_from(">I", superblock, 4)[0]
    group_blocks: int = struct.unpack_from(">I", superblock, 84)[0]
    inode_size: int = struct.unpack_from(">H", superblock, 104)[0]
    log_per_block, log_group_blocks = superblock[123], superblock[124]

    def place(number: int) -> int:
        index = number & (1 << log_per_block) - 1
        in_group = number >> log_per_block & (1 << log_group_blocks) - 1
        group = number >> log_per_block + log_group_blocks
        return (group * group_blocks + in_group) * block + index * inode_size

    return (uuid, block, group_blocks, inode_size), _Inodes(inode_size, place)
