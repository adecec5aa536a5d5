"""What a pool that the kernel runs has read and written: by the kernel's own counters, put together.

A thin device counts what is asked of it, the pool's device all that goes on to the data device. What the pool
wrote beyond the thin devices' writes are copies and zeros of whole blocks, and what it read beyond their
reads are the blocks that it copied. Only reads of holes blur that: the pool has no part in them, so that they
hide copies. They are few, and copies are told in whole blocks: what hides less than one hides none.
"""

import threading
from contextlib import suppress
from dataclasses import dataclass

from .block_counters import BlockCounters
from .dm_target import DeviceNumber
from .errors import DeviceNotFoundError
from .user_pool import PoolCounters

__all__ = ["KernelCounters"]

_NOTHING = BlockCounters(0, 0)


@dataclass(slots=True)
class _Requests:
    """Bytes and requests of the handles of this process; sector_* with the edges that fill sectors."""

    read: int = 0
    written: int = 0
    sector_read: int = 0
    sector_written: int = 0
    discarded: int = 0
    flushes: int = 0
    commits: int = 0


class KernelCounters:
    """The counters of one pool since it was opened. Calls may come from any thread."""

    def __init__(self, pool: DeviceNumber, metadata: DeviceNumber, block_size: int) -> None:
        self._block_size = block_size
        self._metadata = metadata
        self._metadata_before = BlockCounters.of(metadata)
        self._pool = pool
        self._lock = threading.Lock()
        self._requests = _Requests()
        # The latest sample of each device, and the sums of the thin ones.
        self._samples = {pool: BlockCounters.of(pool)}
        self._thin = _NOTHING
        # What the pool read and wrote of its own accord, and is not told as copied or zeroed yet.
        self._read = self._written = 0
        self._copied = self._zeroed = 0

    def add(self, **amounts: int) -> None:
        """Count requests of a handle."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._requests, name, getattr(self._requests, name) + amount)

    def watch(self, thin: DeviceNumber) -> None:
        """Count what goes through a thin device from now on."""
        with self._lock:
            self._samples[thin] = BlockCounters.of(thin)

    def forget(self, thin: DeviceNumber) -> None:
        """Keep what went through a thin device, which is about to leave the kernel."""
        with self._lock:
            self._sample()
            self._samples.pop(thin, None)

    def counters(self) -> PoolCounters:
        with self._lock:
            self._sample()
            asked = self._requests
            return PoolCounters(
                application_bytes=self._thin.written_bytes - asked.sector_written + asked.written,
                application_read_bytes=self._thin.read_bytes - asked.sector_read + asked.read,
                zero_filled_bytes=self._zeroed,
                copied_bytes=self._copied,
                read_for_copy_bytes=self._copied,
                metadata_bytes=BlockCounters.of(self._metadata).since(self._metadata_before).written_bytes,
                padding_bytes=asked.sector_written - asked.written,
                discarded_bytes=asked.discarded,
                blocks_provisioned=None,
                blocks_copied=self._copied // self._block_size,
                blocks_overwritten=None,
                commits=asked.commits,
                flushes=asked.flushes,
            )

    def _sample(self) -> None:
        """Take over what was counted since the last time."""
        own = self._difference(self._pool)
        for thin in [number for number in self._samples if number != self._pool]:
            through = self._difference(thin)
            self._thin = self._thin.plus(through)
            own = own.since(through)
        self._read += own.read_bytes
        self._written += own.written_bytes
        blocks = -(-max(self._read, 0) // self._block_size)
        copied = max(0, min(blocks * self._block_size, self._written))
        self._copied += copied
        self._zeroed += max(0, self._written - copied)
        self._read = max(0, self._read - copied)
        self._written = min(0, self._written)

    def _difference(self, number: DeviceNumber) -> BlockCounters:
        with suppress(DeviceNotFoundError):  # taken away by others
            before, now = self._samples[number], BlockCounters.of(number)
            self._samples[number] = now
            return now.since(before)
        return _NOTHING
