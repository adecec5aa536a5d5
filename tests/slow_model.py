"""The copy-on-write model again, slow and obvious: one block size, one dictionary entry a block."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from blocksnap.traces.request import DISCARD, FLUSH, REQUEST, WRITE, Requests

__all__ = ["Request", "SlowModel", "requests_of"]

Request = tuple[int, int, int, int, int]
"""time, offset, length, kind, device."""

PARENT = 0
HOLE = -1
ZERO_PIECE = 64 << 10
LEAF = 252 // 3 * 2
BITMAP = 16320
FIXED_BLOCKS = 6


def requests_of(array: Requests) -> list[Request]:
    assert array.dtype == REQUEST
    return [tuple(row) for row in array.tolist()]


@dataclass
class SlowModel:
    """Each block of each device was allocated in an epoch, from 1 on, or is a hole, or the parent's."""

    block_size: int
    fresh: bool = False
    keep_parts: bool = False
    snapshot_writes: int = 0
    snapshot_bytes: int = 0
    snapshot_ns: int = 0
    commit_ns: int = 0
    device_bytes: int = 0
    epoch: int = 1
    counts: Counter[str] = field(default_factory=Counter)
    allocated: Counter[int] = field(default_factory=Counter)
    freed: Counter[int] = field(default_factory=Counter)
    exclusive: Counter[int] = field(default_factory=Counter)
    copied: Counter[int] = field(default_factory=Counter)
    metadata: Counter[int] = field(default_factory=Counter)
    blocks: dict[tuple[int, int], int] = field(default_factory=dict)
    _changed_leaves: set[tuple[int, int]] = field(default_factory=set)
    _leaf_epochs: defaultdict[tuple[int, int], set[int]] = field(default_factory=lambda: defaultdict(set))
    _new_blocks: int = 0
    _first_time: int | None = None
    _last_time: int = 0
    _writes: int = 0
    _bytes: int = 0
    _changed: bool = False

    def feed(self, requests: list[Request]) -> None:
        for time, offset, length, kind, device in requests:
            self._pass_time(time)
            if kind != FLUSH:
                self.device_bytes = max(self.device_bytes, offset + length)
            if kind == FLUSH:
                self._commit()
            elif kind == DISCARD:
                self._changed = True
                self._discard(device, offset, length)
            elif kind == WRITE:
                self._changed = True
                self._write(device, offset, length)

    def snapshot(self) -> None:
        self._commit(snapshot=True)
        self.epoch += 1
        self._writes = self._bytes = 0
        self._changed = False

    def result(self) -> dict[str, int]:
        """Return the counts by the names of BlockSizeResult; what is pending of metadata is committed."""
        self._commit()
        names = ["provisioned", "copied", "overwritten", "discarded", "freed"]
        return {
            "block_size": self.block_size,
            **{f"blocks_{name}": self.counts[name] for name in names},
            "copied_bytes": self.counts["copied_bytes"],
            "zero_filled_bytes": self.counts["zero_filled_bytes"],
            "metadata_blocks": self.counts["metadata_blocks"],
            "commits": self.counts["commits"],
        }

    def epochs(self) -> list[tuple[int, int, int, int, int]]:
        """Return the blocks allocated, freed, exclusively held, copied and of metadata of each epoch."""
        self._commit()
        exclusive = self.exclusive.copy()
        exclusive[self.epoch] = self.allocated[self.epoch] - self.freed[self.epoch]
        return [
            (self.allocated[e], self.freed[e], exclusive[e], self.copied[e], self.metadata[e])
            for e in range(1, self.epoch + 1)
        ]

    # ---- what happens to a block

    def _state(self, key: tuple[int, int]) -> int:
        return self.blocks.get(key, HOLE if self.fresh else PARENT)

    def _leave(self, key: tuple[int, int]) -> None:
        """The block's present mapping goes."""
        if self._state(key) == self.epoch - 1 >= 1:
            self.exclusive[self.epoch - 1] += 1

    def _allocate(self, key: tuple[int, int], piece: int) -> None:
        """The first piece of so many bytes meets a block that is not of this epoch."""
        if self._state(key) == HOLE:
            self.counts["provisioned"] += 1
            self.counts["zero_filled_bytes"] += self.block_size - piece
        elif piece == self.block_size:
            self.counts["overwritten"] += 1
        else:
            self.counts["copied"] += 1
            self.copied[self.epoch] += 1
            self.counts["copied_bytes"] += self.block_size - piece
        self._leave(key)
        self._changed_leaves.add((key[0], key[1] // LEAF))
        self._new_blocks += 1
        self.allocated[self.epoch] += 1
        self.blocks[key] = self.epoch

    def _unmap(self, key: tuple[int, int]) -> None:
        if self._state(key) == HOLE:
            return
        self.counts["discarded"] += 1
        if self._state(key) == self.epoch:
            self.counts["freed"] += 1
            self.freed[self.epoch] += 1
        self._leave(key)
        self._changed_leaves.add((key[0], key[1] // LEAF))
        self.blocks[key] = HOLE

    # ---- requests

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Cut a request at block boundaries: yield each block and how many bytes of it are meant."""
        end = offset + length
        while offset < end:
            block = offset // self.block_size
            piece_end = min(end, (block + 1) * self.block_size)
            yield block, piece_end - offset
            offset = piece_end

    def _write(self, device: int, offset: int, length: int) -> None:
        for block, piece in self._pieces(offset, length):
            if self._state((device, block)) != self.epoch:
                self._allocate((device, block), piece)
        self._writes += 1
        self._bytes += length
        enough_writes = self.snapshot_writes and self._writes >= self.snapshot_writes
        enough_bytes = self.snapshot_bytes and self._bytes >= self.snapshot_bytes
        if enough_writes or enough_bytes:
            self.snapshot()

    def _discard(self, device: int, offset: int, length: int) -> None:
        for block, piece in self._pieces(offset, length):
            key = device, block
            if piece == self.block_size:
                self._unmap(key)
            elif self._state(key) != HOLE and not self.keep_parts:
                self.counts["zero_filled_bytes"] += piece
                if self._state(key) != self.epoch:
                    self._allocate(key, min(piece, ZERO_PIECE))

    def _pass_time(self, time: int) -> None:
        if self._first_time is None:
            self._first_time = self._last_time = time
        begin, before, now = self._first_time, self._last_time - self._first_time, time - self._first_time
        if self.commit_ns and now // self.commit_ns > before // self.commit_ns:
            self._commit()
        if self.snapshot_ns and now // self.snapshot_ns > before // self.snapshot_ns and self._changed:
            self.snapshot()
        self._last_time = max(self._last_time, begin, time)

    # ---- metadata

    def _inner_nodes(self, nodes: set[tuple[int, int]], capacity: int) -> int:
        """Count the nodes above leaves of a tree for so many blocks."""
        count, height_capacity = 0, LEAF
        while height_capacity < capacity:
            nodes = {(device, place // LEAF) for device, place in nodes}
            count, height_capacity = count + len(nodes), height_capacity * LEAF
        return count

    def _changed_blocks(self) -> int:
        leaves = self._changed_leaves
        copies_before = 2 if self.fresh else 1
        overflow = sum(
            self.epoch not in epochs and len(epochs) >= copies_before
            for epochs in (self._leaf_epochs[leaf] for leaf in leaves)
        )
        bitmaps = len({(device, leaf * LEAF // BITMAP) for device, leaf in leaves})
        inner = self._inner_nodes(leaves, self.device_bytes // self.block_size + 1)
        count = len(leaves)
        if self.fresh:
            full = -(-(self.counts["provisioned"] - self.counts["discarded"]) // LEAF)
            count, overflow = min(count, full), min(overflow, full)
            all_leaves = {(0, leaf) for leaf in range(full)}
            inner = min(inner, self._inner_nodes(all_leaves, full * LEAF))
            bitmaps = min(bitmaps, -(-sum(self.allocated.values()) // BITMAP))
        overflow += overflow > 0  # the root
        return count + overflow + inner + bitmaps + -(-self._new_blocks // BITMAP)

    def _commit(self, snapshot: bool = False) -> None:
        if self._changed_leaves or snapshot:
            blocks = FIXED_BLOCKS + self._changed_blocks()
            self.counts["metadata_blocks"] += blocks
            self.metadata[self.epoch] += blocks
        for leaf in self._changed_leaves:
            self._leaf_epochs[leaf].add(self.epoch)
        self.counts["commits"] += snapshot or len(self._changed_leaves) > 0
        self._changed_leaves.clear()
        self._new_blocks = 0
