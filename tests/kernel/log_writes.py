"""The log of the kernel's target log-writes, and the states in which a power cut can leave the logged disk.

The log (drivers/md/dm-log-writes.c): a superblock, then entries of one sector each, which what was written
follows. A write is logged once it is complete, those without FUA with the next flush. So the log is in order
of completion, but for a FUA write or a mark, which stand before what was complete earlier and not flushed.
"""

import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import NamedTuple

__all__ = ["Cut", "DiskLog", "Entry", "Flag", "Region", "nr_entries", "read_entries"]

_SUPERBLOCK = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
_MAGIC, _VERSION = 0x6A736677736872, 1
_TORN = 512


class Flag(IntFlag):
    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


class Cut(IntEnum):
    """What becomes of writes that were not flushed: all were made, or some, or parts of some."""

    PREFIX = 0
    SUBSET = 1
    TORN = 2


class Entry(NamedTuple):
    """A write, a discard, a flush (which may carry a write), or a mark with its text."""

    flags: Flag
    offset: int
    length: int
    content: bytes


class Region(NamedTuple):
    """A part of a disk."""

    begin: int
    end: int


def _superblock(log: bytes) -> tuple[int, int]:
    magic, version, count, sector = _SUPERBLOCK.unpack_from(log)
    if (magic, version) != (_MAGIC, _VERSION):
        raise ValueError(f"no log of writes: magic {magic:#x}, version {version}")
    return count, sector


def nr_entries(log: bytes) -> int:
    return _superblock(log)[0]


def read_entries(path: Path) -> list[Entry]:
    """Read the log device's content."""
    log = path.read_bytes()
    count, sector = _superblock(log)
    entries: list[Entry] = []
    at = sector
    for _ in range(count):
        first, sectors, bits, length = _ENTRY.unpack_from(log, at)
        flags = Flag(bits)
        text = log[at + _ENTRY.size : at + _ENTRY.size + length]
        at += sector
        if flags & (Flag.MARK | Flag.DISCARD):
            entries.append(Entry(flags, first * sector, sectors * sector, text))
            continue
        entries.append(Entry(flags, first * sector, sectors * sector, log[at : at + sectors * sector]))
        at += sectors * sector
    return entries


def _apply(disk: bytearray, entry: Entry) -> None:
    if entry.flags & Flag.MARK:
        return
    disk[entry.offset : entry.offset + entry.length] = entry.content or bytes(entry.length)


def _tear(disk: bytearray, entry: Entry, rng: random.Random) -> None:
    """Write some sectors of what was written."""
    content = entry.content or bytes(entry.length)
    for at in range(0, entry.length, _TORN):
        if rng.random() < 0.5:
            disk[entry.offset + at : entry.offset + at + _TORN] = content[at : at + _TORN]


@dataclass(slots=True)
class DiskLog:
    """A disk as it was, and what was done to it since. What lies in `whole`, a file system, is never torn."""

    start: bytes
    entries: Sequence[Entry]
    whole: Region
    flushes: bool = True
    """Whether a flush does anything outside of `whole`: a test of the test."""
    _durable: bytearray | None = field(default=None, init=False)
    _applied: int = field(default=0, init=False)

    def marks(self, position: int) -> Iterator[bytes]:
        """Yield the marks before a cut."""
        return (entry.content for entry in self.entries[:position] if entry.flags & Flag.MARK)

    def state(self, position: int, cut: Cut, seed: int) -> bytearray:
        """Return the disk as a cut before the entry at a position can leave it.

        All before the last flush is there, and each FUA write; of the others what the cut and the seed say.
        Ask for ascending positions: others take longer.
        """
        rng = random.Random(seed)
        flushed = self._last_flush(position)
        begin = flushed if self.flushes else 0
        disk = bytearray(self._at(begin))
        for at, entry in enumerate(self.entries[begin:position], begin):
            whole = self.whole.begin <= entry.offset < self.whole.end
            certain = bool(entry.flags & Flag.FUA) or (whole and at < flushed)
            if certain or cut is Cut.PREFIX or rng.random() < 0.5:
                if cut is Cut.TORN and not (certain or whole or entry.flags & Flag.MARK):
                    _tear(disk, entry, rng)
                else:
                    _apply(disk, entry)
        return disk

    def _last_flush(self, position: int) -> int:
        for at in range(position - 1, -1, -1):
            if self.entries[at].flags & Flag.FLUSH:
                return at
        return 0

    def _at(self, position: int) -> bytearray:
        """Return the disk with all before a position."""
        if self._durable is None or self._applied > position:
            self._durable, self._applied = bytearray(self.start), 0
        for entry in self.entries[self._applied : position]:
            _apply(self._durable, entry)
        self._applied = position
        return self._durable
