"""New metadata from what can be read of damaged ones.

The damaged ones are only read; the new ones are written by the code that writes all pools. The caller holds
the lock of the damaged pool.
"""

import os
from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple

from ._native import check as _check
from ._native import encode, ffi, lib

__all__ = ["Change", "LostBlocks", "LostDevice", "RepairReport", "RepairedDevice", "repair"]


class RepairedDevice(NamedTuple):
    """A device of the new pool; mappings_before is what its details said, None if they were lost."""

    id: int
    mappings: int
    mappings_before: int | None


class LostDevice(NamedTuple):
    """A device of which nothing is left."""

    id: int
    mappings_before: int | None
    reason: str


class LostBlocks(NamedTuple):
    """A device lost mappings between thin blocks first and last: what is not mapped there now may have been.

    Without a device id they are the ids of devices that are not known.
    """

    device_id: int | None
    first: int
    last: int
    reason: str


class Change(NamedTuple):
    """What was made up without losing data, in a device or (None) in the pool."""

    device_id: int | None
    what: str


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair saved and what it could not; block_size in bytes, data_blocks is the size of the data.

    failed_reads is how many reads of the damaged metadata failed: what they hold may be read another time.
    """

    transaction_id: int
    block_size: int
    data_blocks: int
    time: int
    mappings: int
    roots_found: bool
    failed_reads: int
    devices: tuple[RepairedDevice, ...] = ()
    lost_devices: tuple[LostDevice, ...] = ()
    lost_blocks: tuple[LostBlocks, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether nothing is lost."""
        return not self.lost_devices and not self.lost_blocks


def repair(
    path: str | PathLike[str],
    output: str | PathLike[str],
    *,
    block_size: int = 0,
    data_bytes: int = 0,
    transaction_id: int = 0,
) -> RepairReport:
    """Write to output, whose first block must be zero, all that can be read of damaged metadata.

    The damaged ones are only read. block_size, data_bytes (of the data device) and transaction_id help where
    the superblock does not tell; 0 is "not known". ArgumentError if one of them is needed, NoSpaceError if
    output is too small, NotSupportedError for features that this version does not know.
    """
    options = ffi.new("struct bs_repair_options *", (block_size, data_bytes, transaction_id))
    result = ffi.new("struct bs_repair_result *")
    with os.fdopen(os.memfd_create("repair", os.MFD_CLOEXEC), "r", errors="replace") as lines:
        _check(
            lib.bs_metadata_repair(
                encode(os.fspath(path)), encode(os.fspath(output)), options, lines.fileno(), result
            )
        )
        lines.seek(0)
        told = [line.rstrip("\n").split("\t", 4) for line in lines]
    return RepairReport(
        transaction_id=result.transaction_id,
        block_size=result.block_size,
        data_blocks=result.data_blocks,
        time=result.time,
        mappings=result.mappings,
        roots_found=bool(result.roots_found),
        failed_reads=result.failed_reads,
        devices=tuple(
            RepairedDevice(int(line[1]), int(line[2]), _number(line[3]))
            for line in told
            if line[0] == "device"
        ),
        lost_devices=tuple(
            LostDevice(int(line[1]), _number(line[3]), line[4]) for line in told if line[0] == "gone"
        ),
        lost_blocks=tuple(
            LostBlocks(_number(line[1]), int(line[2]), int(line[3]), line[4])
            for line in told
            if line[0] == "lost"
        ),
        changes=tuple(Change(_number(line[1]), line[4]) for line in told if line[0] == "changed"),
    )


def _number(field: str) -> int | None:
    return None if field == "-" else int(field)
