"""Reading all data of a pool, to find what the devices below cannot read any more.

Which blocks are mapped is read from the metadata in a moment; then the pool is let go, and the data are read
in the order in which they lie, past the page cache, giving way to everybody else's I/O. So a pool may be in
use meanwhile, also by a process that opens it only later. Who uses the blocks that cannot be read is looked
up at the end.
"""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ._native import check, lib
from .errors import BlocksnapError, system_errors
from .pool import Pool
from .pool_client import PoolClient
from .pool_files import Progress

__all__ = ["Scrub", "Unreadable", "scrub"]

_CHUNK = 4 << 20
_SECTOR = 4096
_WINDOW = 1 << 17
"""Bytes of the bitmap that are looked at together: a million blocks."""

Opener = Callable[[], AbstractContextManager[Pool | PoolClient]]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Bytes of a thin device that cannot be read, and where they lie in the data.

    Bytes that several devices share are named for each; device is None for those that none maps any more.
    """

    device: str | None
    offset: int
    length: int
    data_offset: int


@dataclass(frozen=True, slots=True)
class Scrub:
    """What a scrub read, in bytes, and what it could not."""

    read_bytes: int
    unreadable_bytes: int
    unreadable: tuple[Unreadable, ...]


@dataclass(frozen=True, slots=True)
class _Hole:
    """A part of the data that cannot be read."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


def scrub(open_pool: Opener, data: Path, progress: Progress | None = None) -> Scrub:
    """Read every data block that a thin device maps, once.

    open_pool opens the pool or connects to the process that serves it; that happens twice, for a short time.
    """
    with open_pool() as pool:
        block_size = pool.status().block_size
        bits = pool.mapped_blocks()
    total = sum(length for _, length in _runs(bits)) * block_size
    with suppress(BlocksnapError):
        check(lib.bs_io_idle())
    with _Reader(data) as reader:
        done = 0
        for begin, length in _runs(bits):
            for offset in range(begin * block_size, (begin + length) * block_size, _CHUNK):
                done += reader.read(offset, min(_CHUNK, (begin + length) * block_size - offset))
                if progress is not None:
                    progress(done, total)
    holes = _joined(reader.holes)
    if not holes:
        return Scrub(total, 0, ())
    with open_pool() as pool:
        found = tuple(_named(pool, holes, block_size))
    unreadable = sum(hole.length for hole in holes)
    return Scrub(total - unreadable, unreadable, found)


def _runs(bits: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Yield the runs of set bits as (first, length)."""
    for first in range(0, len(bits), _WINDOW):
        window = np.unpackbits(bits[first : first + _WINDOW], bitorder="little")
        edges = np.flatnonzero(np.diff(window, prepend=np.uint8(0), append=np.uint8(0)))
        for begin, end in edges.reshape(-1, 2).tolist():
            yield first * 8 + begin, end - begin


class _Reader:
    """Reads the data and remembers what it could not read."""

    def __init__(self, data: Path) -> None:
        self.holes: list[_Hole] = []
        self._buffer = memoryview(mmap.mmap(-1, _CHUNK))
        with system_errors(str(data)):
            try:
                self._descriptor = os.open(data, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a file system without direct I/O
                    raise
                self._descriptor = os.open(data, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, length: int) -> int:
        """Read a range; what cannot be read is narrowed down to sectors. Return the length."""
        if not self._reads(offset, length):
            if length <= _SECTOR:
                self.holes.append(_Hole(offset, length))
            else:
                half = max(_SECTOR, length // 2 // _SECTOR * _SECTOR)
                self.read(offset, half)
                self.read(offset + half, length - half)
        return length

    def _reads(self, offset: int, length: int) -> bool:
        done = 0
        while done < length:
            try:
                read = os.preadv(self._descriptor, [self._buffer[done:length]], offset + done)
            except OSError:
                return False
            if read == 0:
                return False
            done += read
        return True


def _joined(holes: list[_Hole]) -> list[_Hole]:
    joined: list[_Hole] = []
    for hole in holes:
        if joined and joined[-1].end == hole.offset:
            joined[-1] = _Hole(joined[-1].offset, joined[-1].length + hole.length)
        else:
            joined.append(hole)
    return joined


def _named(pool: Pool | PoolClient, holes: list[_Hole], block_size: int) -> Iterator[Unreadable]:
    names = {device.id: device.name for device in pool.devices()}
    for hole in holes:
        unmapped = hole.offset
        for run in pool.reverse_mappings(hole.offset // block_size, -(-hole.end // block_size)):
            first, length, device_id, thin_begin = map(int, run)
            begin = max(hole.offset, first * block_size)
            end = min(hole.end, (first + length) * block_size)
            if begin > unmapped:
                yield Unreadable(None, 0, begin - unmapped, unmapped)
            unmapped = max(unmapped, end)
            offset = thin_begin * block_size + begin - first * block_size
            yield Unreadable(names.get(device_id), offset, end - begin, begin)
        if unmapped < hole.end:
            yield Unreadable(None, 0, hole.end - unmapped, unmapped)
