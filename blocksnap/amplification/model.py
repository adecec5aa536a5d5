"""The copy-on-write model: what a thin pool does under a block trace, at several block sizes in one pass.

A write is cut at block boundaries. The first piece to touch a block in an epoch, the time between two
snapshots, gives it a new data block: a hole is provisioned, a block that a snapshot or the parent holds too
is copied, or overwritten if that piece covers it whole. A discard unmaps the blocks that it covers whole;
what it covers in part is zeroed like a write, but holes are left alone. That is what the user engine does,
block for block.

    with CowModel([4096, 65536], snapshot_every=SnapshotEvery(writes=100_000)) as model:
        for requests in trace:
            model.feed(requests)
        for result in model.results():
            print(result.block_size, result.write_amplification)

Devices are taken to be whole blocks of the largest size; snapshots cover all devices at once and are kept.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .._native import check, ffi, lib
from ..errors import ArgumentError
from ..traces.request import REQUEST, Requests
from ..units import Size, format_size, parse_size

__all__ = [
    "DEFAULT_MODEL_BLOCK_SIZES",
    "EPOCH",
    "METADATA_BLOCK",
    "BlockSizeResult",
    "CowModel",
    "SnapshotEvery",
    "TraceCounts",
]

DEFAULT_MODEL_BLOCK_SIZES = tuple(4096 << level for level in range(11))
"""4K to 4M."""

METADATA_BLOCK = 4096
SECOND = 10**9
COMMIT_SECONDS = 1.0

_EPOCH_FIGURES = ("blocks_allocated", "blocks_freed", "blocks_exclusive", "blocks_copied", "metadata_blocks")
EPOCH = np.dtype([(name, "u8") for name in _EPOCH_FIGURES])
"""blocks_allocated: new data blocks in the epoch; blocks_freed: those of them that a discard unmapped again
before its end; blocks_copied: those made by a copy. metadata_blocks: what the commits in it wrote, the one of
the snapshot at its end among them. blocks_exclusive: what only that snapshot holds, and its deletion would
free: blocks allocated in the epoch that lost their mapping, by a write or discard, before the next snapshot.
In the last record, the running epoch, it is what the devices alone hold. The parent stays, so that its own
blocks are exclusive to no snapshot; what it alone holds is in no record."""


@dataclass(frozen=True, slots=True)
class SnapshotEvery:
    """When a snapshot is taken: after so many writes, or written bytes, or at multiples of a time; or never.

    A time in which nothing was written or discarded makes none.
    """

    writes: int | None = None
    bytes: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.writes, self.bytes, self.seconds) if value is not None]
        if len(given) > 1:
            raise ArgumentError("a snapshot every so many writes, bytes or seconds: give one of them")
        if any(value <= 0 for value in given):
            raise ArgumentError(f"a snapshot every {self}: give a number above 0")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what "100000" (writes), "60s" or "0.5s" (seconds), "64M" or "512B" (bytes) mean."""
        stripped = text.strip()
        if stripped.isdecimal():
            return cls(writes=int(stripped))
        seconds = re.fullmatch(r"(\d+(?:\.\d+)?) ?s", stripped)
        if seconds:
            return cls(seconds=float(seconds[1]))
        try:
            return cls(bytes=parse_size(stripped))
        except ArgumentError:
            raise ArgumentError(
                f'a snapshot every "{text}": give writes ("100000"), seconds ("60s") or bytes ("64M")'
            ) from None

    def __str__(self) -> str:
        if self.writes is not None:
            return f"{self.writes} writes"
        if self.bytes is not None:
            return f"{format_size(self.bytes)} written"
        return "never" if self.seconds is None else f"{self.seconds:g} s"


@dataclass(frozen=True, slots=True)
class TraceCounts:
    """What the model was fed.

    highest_byte is where the highest request ends, memory_bytes what the model takes.
    """

    requests: int
    reads: int
    writes: int
    discards: int
    flushes: int
    read_bytes: int
    written_bytes: int
    discarded_bytes: int
    first_time: int
    last_time: int
    highest_byte: int
    snapshots: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class BlockSizeResult:
    """What the trace does at one block size.

    blocks_discarded were mapped and got unmapped; blocks_freed of them had been allocated in the same epoch.
    copied_bytes is what the user engine writes again for copies (its counter of that name: it merges the
    piece that broke sharing into the copy), copy_bytes what the kernel writes, which copies whole blocks.
    metadata_blocks is the approximation of csrc/cow_metadata.c.
    """

    block_size: int
    blocks_provisioned: int
    blocks_copied: int
    blocks_overwritten: int
    blocks_discarded: int
    blocks_freed: int
    copied_bytes: int
    zero_filled_bytes: int
    metadata_blocks: int
    commits: int
    written_bytes: int
    snapshot_every: SnapshotEvery
    snapshots: int

    @property
    def blocks_written(self) -> int:
        """Data blocks newly allocated."""
        return self.blocks_provisioned + self.blocks_copied + self.blocks_overwritten

    @property
    def copy_bytes(self) -> int:
        return self.blocks_copied * self.block_size

    @property
    def metadata_bytes(self) -> int:
        return self.metadata_blocks * METADATA_BLOCK

    @property
    def space_bytes(self) -> int:
        """Newly allocated space that devices and snapshots hold at the end."""
        return (self.blocks_written - self.blocks_freed) * self.block_size

    @property
    def write_amplification(self) -> float | None:
        """(copy_bytes + written bytes) / written bytes, metadata apart; None if nothing was written."""
        if not self.written_bytes:
            return None
        return (self.copy_bytes + self.written_bytes) / self.written_bytes

    def as_dict(self) -> dict[str, object]:
        """Return the row of `analyze --json`: contract fields first, additions behind them."""
        return {
            "block_size": self.block_size,
            "snapshot_every": str(self.snapshot_every),
            "blocks_written": self.blocks_written,
            "blocks_copied": self.blocks_copied,
            "copy_bytes": self.copy_bytes,
            "write_amplification": self.write_amplification,
            "space_bytes": self.space_bytes,
            "blocks_provisioned": self.blocks_provisioned,
            "blocks_overwritten": self.blocks_overwritten,
            "blocks_discarded": self.blocks_discarded,
            "blocks_freed": self.blocks_freed,
            "copied_bytes": self.copied_bytes,
            "zero_filled_bytes": self.zero_filled_bytes,
            "metadata_blocks": self.metadata_blocks,
            "metadata_bytes": self.metadata_bytes,
            "commits": self.commits,
            "snapshots": self.snapshots,
        }


class CowModel:
    """A model under way; feed it a trace in order, piece by piece. One thread at a time.

    block_sizes are powers of two from 512 bytes to 1 GiB. `fresh` devices begin as holes; otherwise every
    block is shared with a parent. With `keep_parts`, discards leave alone what they cover of a block in part,
    as the kernel's dm-thin does. Metadata are committed at flushes, at snapshots and every commit_seconds of
    the trace's time (0: only there). device_size, where it is known, tells how high the mapping tree is.
    """

    def __init__(
        self,
        block_sizes: Sequence[Size] = DEFAULT_MODEL_BLOCK_SIZES,
        *,
        fresh: bool = False,
        snapshot_every: SnapshotEvery | None = None,
        keep_parts: bool = False,
        commit_seconds: float = COMMIT_SECONDS,
        device_size: Size = 0,
    ) -> None:
        self._snapshot_every = snapshot_every or SnapshotEvery()
        self._sizes = tuple(sorted({parse_size(size, "block size") for size in block_sizes}))
        flags = (lib.BS_COW_FRESH if fresh else 0) | (lib.BS_COW_KEEP_PARTS if keep_parts else 0)
        options = {
            "snapshot_writes": self._snapshot_every.writes or 0,
            "snapshot_bytes": self._snapshot_every.bytes or 0,
            "snapshot_ns": max(1, round(self._snapshot_every.seconds * SECOND))
            if self._snapshot_every.seconds
            else 0,
            "commit_ns": round(commit_seconds * SECOND),
            "device_bytes": parse_size(device_size, "device size"),
            "flags": flags,
        }
        pointer = ffi.new("struct bs_cow_model **")
        sizes = ffi.new("uint64_t[]", self._sizes)
        check(
            lib.bs_cow_model_create(sizes, len(sizes), ffi.new("struct bs_cow_options *", options), pointer)
        )
        self._pointer: Any = pointer[0]

    @property
    def block_sizes(self) -> tuple[int, ...]:
        return self._sizes

    def feed(self, requests: Requests) -> None:
        """Go on with the next requests, an array of REQUEST.

        ArgumentError names the first that cannot be (bytes beyond 2^63, a write of more than 4 GiB); those
        before it have been taken.
        """
        if requests.dtype != REQUEST:
            raise ArgumentError(f"requests are an array of REQUEST, not of {requests.dtype}")
        array = np.ascontiguousarray(requests)
        if array.size:
            source = ffi.from_buffer("struct bs_request[]", array)
            check(lib.bs_cow_model_feed(self._open(), source, len(source)))

    def snapshot(self) -> None:
        """Take a snapshot of all devices now."""
        check(lib.bs_cow_model_snapshot(self._open()))

    def trace(self) -> TraceCounts:
        """Return what the model has been fed so far."""
        counts = ffi.new("struct bs_cow_trace *")
        lib.bs_cow_model_trace(self._open(), counts)
        return TraceCounts(**_values(counts, TraceCounts))

    def results(self) -> list[BlockSizeResult]:
        """Return what has happened so far, by ascending block size. What is pending of metadata counts."""
        trace = self.trace()
        found = ffi.new("struct bs_cow_result[]", len(self._sizes))
        check(lib.bs_cow_model_results(self._open(), found, len(found)))
        return [
            BlockSizeResult(
                **_values(one, BlockSizeResult),
                written_bytes=trace.written_bytes,
                snapshot_every=self._snapshot_every,
                snapshots=trace.snapshots,
            )
            for one in found
        ]

    def epochs(self, block_size: int) -> NDArray[np.void]:
        """Return the records of the epochs at a block size, an array of EPOCH; the last is the running epoch.

        There are at most 65,536: each stands for `epochs_a_record` epochs, of which it is the sum.
        """
        if block_size not in self._sizes:
            raise ArgumentError(f"the model has no block size {block_size}")
        records = np.empty(self.trace().snapshots // self.epochs_a_record + 1, EPOCH)
        target = ffi.from_buffer("struct bs_cow_epoch[]", records, require_writable=True)
        check(lib.bs_cow_model_epochs(self._open(), self._sizes.index(block_size), 0, target, len(target)))
        return records

    @property
    def epochs_a_record(self) -> int:
        return int(lib.bs_cow_model_epochs_a_record(self._open()))

    def close(self) -> None:
        """Free the memory."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            lib.bs_cow_model_destroy(pointer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_pointer", None) is not None:
            self.close()

    def _open(self) -> Any:
        if self._pointer is None:
            raise ArgumentError("the model is closed")
        return self._pointer


def _values(struct: Any, kind: type[Any]) -> dict[str, int]:
    """Return the fields of a dataclass that the C struct has too."""
    return {each.name: getattr(struct, each.name) for each in fields(kind) if hasattr(struct, each.name)}
