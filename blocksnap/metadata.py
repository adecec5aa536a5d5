"""Read-only walks over the metadata of a thin pool: check, dump, delta, usage, devices, mappings.

They read a metadata file or device that nobody writes meanwhile: the caller holds the pool's lock, or the
pool is committed and quiescent. With `held` they read the metadata snapshot that the pool holds, and the
pool may go on. Text goes to a file descriptor, so that it never passes through Python. A
file that is no thin pool raises PoolFormatError, one that cannot be read further DamagedMetadataError; what
`check` finds is a report, not an exception. A reader that closes its end of a pipe raises BrokenPipeError.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ._native import check as _check
from ._native import encode, ffi, lib

__all__ = [
    "DELTA_DIFFERENT",
    "DELTA_KINDS",
    "DELTA_LEFT_ONLY",
    "DELTA_RANGE",
    "DELTA_RIGHT_ONLY",
    "MAPPING",
    "BlockUsage",
    "CheckReport",
    "DeviceInfo",
    "Finding",
    "Output",
    "check",
    "check_block_size",
    "delta_ranges",
    "devices",
    "dump",
    "end_of_mappings",
    "mapped_blocks",
    "mappings",
    "usage",
    "write_delta",
]

DELTA_LEFT_ONLY: int = lib.BS_DELTA_LEFT_ONLY
DELTA_RIGHT_ONLY: int = lib.BS_DELTA_RIGHT_ONLY
DELTA_DIFFERENT: int = lib.BS_DELTA_DIFFERENT
DELTA_KINDS = {
    DELTA_LEFT_ONLY: "left_only",
    DELTA_RIGHT_ONLY: "right_only",
    DELTA_DIFFERENT: "different",
}
DELTA_RANGE = np.dtype([("thin_begin", "u8"), ("length", "u8"), ("kind", "u8")])

MAPPING = np.dtype([("thin_block", "u8"), ("data_block", "u8"), ("time", "u8")])

_RANGES_A_CALL = 1 << 16
_MAPPINGS_AN_ARRAY = 1 << 16
_DEVICES_A_CALL = 1 << 10
_KEY_END = 1 << 64


class _HasDescriptor(Protocol):
    def fileno(self) -> int: ...


Output = int | _HasDescriptor
"""A file descriptor, or an open file that has one (what it buffered is flushed first)."""

Path = str | bytes | PathLike[str]


class Finding(NamedTuple):
    """One line of a check; severity is "fatal", "leak" or "warning", the text begins with its place."""

    severity: str
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a full check found.

    `fatal` findings lose or endanger data; `leaks` is the number of blocks that are lost to the pool, nothing
    else; `warnings` are harmless. The numbers of devices, mappings and blocks are recomputed, not read.
    `findings` stays empty when the lines went to a descriptor.
    """

    fatal: int
    leaks: int
    warnings: int
    needs_check: bool
    devices: int
    mappings: int
    metadata_blocks_used: int
    data_blocks_used: int
    findings: tuple[Finding, ...] = ()

    @property
    def damaged(self) -> bool:
        """Whether anything is wrong, be it only lost space."""
        return self.fatal > 0 or self.leaks > 0


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The details that the metadata hold of a thin device."""

    id: int
    creation_time: int
    snapshotted_time: int
    mapped_blocks: int
    transaction_id: int

    @classmethod
    def of(cls, struct: Any) -> "DeviceInfo":
        return cls(
            struct.id,
            struct.creation_time,
            struct.snapshotted_time,
            struct.mapped_blocks,
            struct.transaction_id,
        )


class BlockUsage(NamedTuple):
    """Data blocks of a thin device; exclusive are those that no other thin device reaches."""

    id: int
    mapped_blocks: int
    exclusive_blocks: int


def _encoded(path: Path) -> bytes:
    return encode(os.fspath(path))


def _descriptor(output: Output) -> int:
    if isinstance(output, int):
        return output
    flush = getattr(output, "flush", None)
    if flush is not None:
        flush()
    return output.fileno()


def _checked(code: int) -> int:
    """Return the code of a call that writes text, raise its error."""
    if code == -errno.EPIPE:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    return _check(code)


def _report(result: Any, findings: tuple[Finding, ...]) -> CheckReport:
    return CheckReport(
        fatal=result.fatal,
        leaks=result.leaks,
        warnings=result.warnings,
        needs_check=bool(result.needs_check),
        devices=result.devices,
        mappings=result.mappings,
        metadata_blocks_used=result.metadata_blocks_used,
        data_blocks_used=result.data_blocks_used,
        findings=findings,
    )


def check(path: Path, output: Output | None = None) -> CheckReport:
    """Prove every invariant of the metadata and recompute all counts, going on past damage.

    Each finding is a line on `output`, or an entry of the report's findings when there is none.
    """
    result = ffi.new("struct bs_check_result *")
    if output is not None:
        _checked(lib.bs_metadata_check(_encoded(path), _descriptor(output), result))
        return _report(result, ())
    with os.fdopen(os.memfd_create("findings", os.MFD_CLOEXEC), "r", errors="replace") as lines:
        _check(lib.bs_metadata_check(_encoded(path), lines.fileno(), result))
        lines.seek(0)
        return _report(result, tuple(Finding(*line.rstrip("\n").split(": ", 1)) for line in lines))


def check_block_size(size: int) -> None:
    """Raise ArgumentError for a size, in bytes, that data blocks cannot have."""
    _check(lib.bs_check_block_size(size))


def dump(path: Path, output: Output, *, held: bool = False) -> None:
    """Write what `thin_dump` prints (0.9.0, byte for byte)."""
    _checked(lib.bs_metadata_dump(_encoded(path), held, _descriptor(output)))


def write_delta(path: Path, left: int, right: int, output: Output, *, held: bool = False) -> None:
    """Write what `thin_delta --thin1 left --thin2 right` prints (0.9.0, byte for byte)."""
    _checked(lib.bs_metadata_delta(_encoded(path), held, left, right, _descriptor(output)))


def delta_ranges(path: Path, left: int, right: int, *, held: bool = False) -> NDArray[np.void]:
    """Return where two devices differ: an array (thin_begin, length, kind) in blocks, ascending.

    kind is one of the DELTA_ constants. What both devices share is neither returned nor, mostly, read.
    """
    found = [np.empty(0, DELTA_RANGE)]
    begin = 0
    while begin < _KEY_END:
        ranges = np.empty(_RANGES_A_CALL, DELTA_RANGE)
        out = ffi.from_buffer("struct bs_delta_range[]", ranges, require_writable=True)
        count = _check(
            lib.bs_metadata_delta_ranges(_encoded(path), held, left, right, begin, out, len(ranges))
        )
        found.append(ranges[:count])
        if count < len(ranges):
            break
        begin = int(ranges["thin_begin"][-1]) + int(ranges["length"][-1])
    return np.concatenate(found)


def usage(path: Path, *, held: bool = False) -> tuple[BlockUsage, ...]:
    """Return the mapped and the exclusive data blocks of every thin device by ascending id."""
    capacity = _DEVICES_A_CALL
    while True:
        out = ffi.new("struct bs_usage[]", capacity)
        count = _check(lib.bs_metadata_usage(_encoded(path), held, out, capacity))
        if count <= capacity:
            return tuple(BlockUsage(one.id, one.mapped_blocks, one.exclusive_blocks) for one in out[0:count])
        capacity = count


def mapped_blocks(path: Path, data_blocks: int, *, held: bool = False) -> NDArray[np.uint8]:
    """Return a bit for each of the data blocks, the lowest of a byte first: whether any device maps it."""
    bits = np.zeros(-(-data_blocks // 8), np.uint8)
    out = ffi.from_buffer("uint8_t[]", bits, require_writable=True)
    _check(lib.bs_metadata_mapped_blocks(_encoded(path), held, out, data_blocks))
    return bits


def devices(path: Path, *, held: bool = False) -> list[DeviceInfo]:
    """Return the details of every device by ascending id."""
    found: list[DeviceInfo] = []
    out = ffi.new("struct bs_device_info[]", _DEVICES_A_CALL)
    count = _DEVICES_A_CALL
    while count == _DEVICES_A_CALL:
        begin = found[-1].id + 1 if found else 0
        count = _check(lib.bs_metadata_devices(_encoded(path), held, begin, out, _DEVICES_A_CALL))
        found += map(DeviceInfo.of, out[0:count])
    return found


def mappings(path: Path, device_id: int, begin: int = 0, *, held: bool = False) -> Iterator[NDArray[np.void]]:
    """Yield a device's mappings from thin block begin on, ascending, in arrays of MAPPING."""
    count = _MAPPINGS_AN_ARRAY
    while count == _MAPPINGS_AN_ARRAY:
        some = _some_mappings(path, device_id, begin, _MAPPINGS_AN_ARRAY, held)
        count = len(some)
        if count:
            yield some
            begin = int(some["thin_block"][-1]) + 1


def _some_mappings(path: Path, device_id: int, begin: int, capacity: int, held: bool) -> NDArray[np.void]:
    found = np.empty(capacity, MAPPING)
    out = ffi.from_buffer("struct bs_mapping[]", found, require_writable=True)
    count = _check(lib.bs_metadata_mappings(_encoded(path), held, device_id, begin, out, capacity))
    return found[:count]


def end_of_mappings(path: Path, device_id: int) -> int:
    """Return the thin block behind the highest mapped one, 0 for an empty device (about 50 look-ups)."""
    low, high = 0, 1 << 51
    while low < high:
        middle = (low + high) // 2
        found = _some_mappings(path, device_id, middle, 1, held=False)
        if len(found):
            low = int(found["thin_block"][0]) + 1
        else:
            high = middle
    return low
