"""What a pool must hold, and random operations that change the pool and this model of it alike."""

import random
from collections.abc import Callable

from blocksnap.device_record import SECTOR_SIZE
from blocksnap.pool import Pool
from tests.kernel.devices import BLOCK

__all__ = ["MAX_DATA", "MIN_DATA", "PoolModel"]

_MAX_DEVICES = 4
_MAX_SIZE = 8 * BLOCK
# Every device may be written full, and what was freed since the last commit may still be there.
MIN_DATA, MAX_DATA = (_MAX_DEVICES + 1) * _MAX_SIZE, 2 * (_MAX_DEVICES + 1) * _MAX_SIZE


def blocks_within(begin: int, end: int) -> range:
    """Return the blocks that lie wholly in a range of bytes."""
    return range(-(-begin // BLOCK), end // BLOCK)


def blocks_touched(begin: int, end: int) -> range:
    return range(begin // BLOCK, -(-end // BLOCK))


class PoolModel:
    """Contents and mapped blocks of each thin device by name, and the size of the pool's data.

    The operations come from a seed. `journal` tells them, for whoever reads of a failure.
    """

    def __init__(self, seed: int) -> None:
        self.contents: dict[str, bytearray] = {}
        self.mapped: dict[str, set[int]] = {}
        self.data_bytes = MIN_DATA
        self.journal: list[str] = []
        self._random = random.Random(seed)
        self._named = 0

    def operate(self, pool: Pool) -> None:
        """Do one operation that is possible now."""
        operations: list[tuple[Callable[[Pool, str], None], int]] = [
            (self._write, 10),
            (self._discard, 3),
            (self._delete, 1),
            (self._resize, 2),
            (self._extend, 1),
        ]
        if len(self.contents) < _MAX_DEVICES:
            operations += [(self._create, 2), (self._snapshot, 4)]
        if not self.contents:
            self._create(pool, "")
            return
        (operation,) = self._random.choices(*zip(*operations, strict=True))
        operation(pool, self._random.choice(sorted(self.contents)))

    def _new_name(self) -> str:
        self._named += 1
        return f"device {self._named}"

    def _some_size(self) -> int:
        return self._random.randint(1, _MAX_SIZE // SECTOR_SIZE) * SECTOR_SIZE

    def _some_range(self, size: int) -> tuple[int, int]:
        """Return offset and length within a size: of any bytes, or of whole sectors, pages or blocks."""
        unit = self._random.choice((1, 1, SECTOR_SIZE, 4096, BLOCK))
        offset = self._random.randrange(size) // unit * unit
        length = self._random.choice((self._random.randint(1, 9000), self._random.randint(1, 4 * BLOCK)))
        return offset, min(-(-length // unit) * unit, size - offset)

    def _create(self, pool: Pool, _name: str) -> None:
        name, size = self._new_name(), self._some_size()
        self.journal.append(f"create {name!r}, {size} bytes")
        pool.create_device(name, size)
        self.contents[name], self.mapped[name] = bytearray(size), set()

    def _snapshot(self, pool: Pool, origin: str) -> None:
        name = self._new_name()
        self.journal.append(f"snapshot {name!r} of {origin!r}")
        pool.device(origin).snapshot(name)
        self.contents[name] = bytearray(self.contents[origin])
        self.mapped[name] = set(self.mapped[origin])

    def _write(self, pool: Pool, name: str) -> None:
        offset, length = self._some_range(len(self.contents[name]))
        self.journal.append(f"write {length} bytes at {offset} of {name!r}")
        written = self._random.randbytes(length)
        assert pool.device(name).write(offset, written) == length
        self.contents[name][offset : offset + length] = written
        self.mapped[name].update(blocks_touched(offset, offset + length))

    def _discard(self, pool: Pool, name: str) -> None:
        offset, length = self._some_range(len(self.contents[name]))
        self.journal.append(f"discard {length} bytes at {offset} of {name!r}")
        pool.device(name).discard(offset, length)
        self.contents[name][offset : offset + length] = bytes(length)
        end = offset + length
        if end == len(self.contents[name]) and pool.status().engine == "user":
            end = -(-end // BLOCK) * BLOCK  # the kernel keeps a last block that the device's end cuts
        self.mapped[name].difference_update(blocks_within(offset, end))

    def _delete(self, pool: Pool, name: str) -> None:
        self.journal.append(f"delete {name!r}")
        pool.device(name).delete()
        del self.contents[name], self.mapped[name]

    def _resize(self, pool: Pool, name: str) -> None:
        size = self._some_size()
        self.journal.append(f"resize {name!r} from {len(self.contents[name])} to {size} bytes")
        pool.device(name).resize(size)
        content = self.contents[name]
        content[:] = content[:size].ljust(size, b"\0")
        self.mapped[name] = {block for block in self.mapped[name] if block * BLOCK < size}

    def _extend(self, pool: Pool, _name: str) -> None:
        self.data_bytes = min(self.data_bytes + self._random.randint(1, 8) * BLOCK, MAX_DATA)
        self.journal.append(f"extend to {self.data_bytes} bytes")
        pool.extend(size=self.data_bytes)
