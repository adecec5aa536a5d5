"""What the kernel counts of a block device's requests (Documentation/block/stat.rst)."""

from pathlib import Path
from typing import NamedTuple, Self

from .dm_target import DeviceNumber
from .errors import system_errors

__all__ = ["BlockCounters"]

_SECTOR = 512


class BlockCounters(NamedTuple):
    """Bytes read and written since the number was taken: differences mean something, and add up."""

    read_bytes: int
    written_bytes: int

    @classmethod
    def of(cls, number: DeviceNumber) -> Self:
        """Read the counters. Raises DeviceNotFoundError for a number that no device has."""
        path = Path(f"/sys/dev/block/{number}/stat")
        with system_errors(str(path)):
            fields = path.read_text().split()
        return cls(int(fields[2]) * _SECTOR, int(fields[6]) * _SECTOR)

    def since(self, before: "BlockCounters") -> "BlockCounters":
        return BlockCounters(self.read_bytes - before.read_bytes, self.written_bytes - before.written_bytes)

    def plus(self, other: "BlockCounters") -> "BlockCounters":
        return BlockCounters(self.read_bytes + other.read_bytes, self.written_bytes + other.written_bytes)
