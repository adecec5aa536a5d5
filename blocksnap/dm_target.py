"""Targets of device-mapper: the lines of a table and of a status as values.

Lengths, offsets and block sizes are bytes; the kernel's sectors stay inside. Sources: the kernel's
admin-guide/device-mapper, thin-provisioning.rst and snapshot.rst.
"""

import os
import re
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, NamedTuple, Self

from .errors import ArgumentError, NotSupportedError

__all__ = [
    "SECTOR",
    "DeviceNumber",
    "FailedStatus",
    "LinearTarget",
    "OtherStatus",
    "OtherTarget",
    "PoolMode",
    "SnapshotOriginTarget",
    "SnapshotStatus",
    "SnapshotTarget",
    "Status",
    "Target",
    "ThinPoolStatus",
    "ThinPoolTarget",
    "ThinStatus",
    "ThinTarget",
    "parse_status",
    "parse_target",
]

SECTOR = 512
_KERNEL_BLOCK, _KERNEL_BLOCK_MAX = 64 << 10, 1 << 30
_LARGEST_DEVICE_ID = (1 << 24) - 1


class DeviceNumber(NamedTuple):
    """A block device by its numbers: what a table names, independent of the names that udev makes."""

    major: int
    minor: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Self:
        """Return the number of a block device's node. Raises ArgumentError for anything else."""
        try:
            status = os.stat(path)
        except OSError as error:
            raise ArgumentError(f"{os.fspath(path)}: {error.strerror}") from None
        if not stat.S_ISBLK(status.st_mode):
            raise ArgumentError(f"{os.fspath(path)} is no block device: attach a loop device to a file first")
        return cls(os.major(status.st_rdev), os.minor(status.st_rdev))

    @classmethod
    def parse(cls, text: str) -> Self:
        match = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
        if match is None:
            raise _not_understood("device", text)
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.major}:{self.minor}"


def _not_understood(what: str, text: str) -> NotSupportedError:
    return NotSupportedError(
        f"the kernel's {what} {text!r} is not understood: this kernel is too new or too old"
    )


def _sectors(size: int, what: str) -> int:
    if size % SECTOR or size < 0:
        raise ArgumentError(f"{what} {size}: the kernel counts in sectors of {SECTOR} bytes: use a multiple")
    return size // SECTOR


def _number(text: str, line: str) -> int:
    # int() would also take "+1", "1_0" and other scripts' digits.
    if not re.fullmatch(r"\d{1,20}", text, re.ASCII):
        raise _not_understood("line", line)
    return int(text)


def _pair(text: str, line: str) -> tuple[int, int]:
    used, slash, total = text.partition("/")
    if not slash:
        raise _not_understood("line", line)
    return _number(used, line), _number(total, line)


# ---- status ----


class PoolMode(StrEnum):
    READ_WRITE = "rw"
    READ_ONLY = "ro"
    """Also shown when the metadata device is full."""
    OUT_OF_DATA_SPACE = "out_of_data_space"
    UNKNOWN = "unknown"
    """A word that only later kernels have, or none: take it for not writable."""


@dataclass(frozen=True, slots=True)
class FailedStatus:
    """A target that does not work: its line is one word, such as Fail, Error or Invalid."""

    reason: str


@dataclass(frozen=True, slots=True)
class OtherStatus:
    """The line of a target that is no concern of ours; empty for linear."""

    text: str


@dataclass(frozen=True, slots=True)
class ThinPoolStatus:
    """The line of a pool: counts of data blocks (of the pool's size) and metadata blocks (4096 bytes).

    What an older kernel leaves out is None, "" or False; what a later one adds is in `extra`.
    """

    transaction_id: int
    used_metadata_blocks: int
    total_metadata_blocks: int
    used_data_blocks: int
    total_data_blocks: int
    held_root: int | None = None
    mode: PoolMode = PoolMode.UNKNOWN
    discard: str = ""
    when_full: str = ""
    needs_check: bool = False
    metadata_low_water_blocks: int | None = None
    extra: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "ThinPoolStatus | FailedStatus":
        """Parse a line. Raises NotSupportedError for one without the five counts."""
        fields = text.split()
        if fields in (["Fail"], ["Error"]):
            return FailedStatus(fields[0])
        if len(fields) < 3:
            raise _not_understood("pool status", text)
        root, mode, discard, when_full, check, low_water = (fields[3:] + [""] * 6)[:6]
        return cls(
            _number(fields[0], text),
            *_pair(fields[1], text),
            *_pair(fields[2], text),
            held_root=None if root in ("", "-") else _number(root, text),
            mode=_pool_mode(mode),
            discard=discard,
            when_full=when_full,
            needs_check=check == "needs_check",
            metadata_low_water_blocks=_number(low_water, text) if low_water else None,
            extra=tuple(fields[9:]),
        )

    @property
    def free_data_blocks(self) -> int:
        return self.total_data_blocks - self.used_data_blocks

    @property
    def free_metadata_blocks(self) -> int:
        return self.total_metadata_blocks - self.used_metadata_blocks


def _pool_mode(word: str) -> PoolMode:
    try:
        return PoolMode(word)
    except ValueError:
        return PoolMode.UNKNOWN


@dataclass(frozen=True, slots=True)
class ThinStatus:
    """The line of a thin device: bytes mapped, and the byte behind the highest mapped block (0: none)."""

    mapped_bytes: int
    mapped_end: int

    @classmethod
    def parse(cls, text: str) -> "ThinStatus | FailedStatus":
        """Parse a line. A reason of "-" means that the kernel has no metadata at hand."""
        fields = text.split()
        if fields in (["Fail"], ["Error"], ["-"]):
            return FailedStatus(fields[0])
        if len(fields) < 2:
            raise _not_understood("thin status", text)
        end = 0 if fields[1] == "-" else _number(fields[1], text) + 1
        return cls(_number(fields[0], text) * SECTOR, end * SECTOR)


@dataclass(frozen=True, slots=True)
class SnapshotStatus:
    """The line of a classic snapshot: bytes of its COW device in use and in all, and used for metadata."""

    used_bytes: int
    total_bytes: int
    metadata_bytes: int

    @classmethod
    def parse(cls, text: str) -> "SnapshotStatus | FailedStatus":
        fields = text.split()
        if text.strip() in ("Invalid", "Overflow", "Merge failed", "Unknown"):
            return FailedStatus(text.strip())
        if len(fields) < 2:
            raise _not_understood("snapshot status", text)
        used, total = _pair(fields[0], text)
        return cls(used * SECTOR, total * SECTOR, _number(fields[1], text) * SECTOR)


Status = ThinPoolStatus | ThinStatus | SnapshotStatus | FailedStatus | OtherStatus


# ---- tables ----


@dataclass(frozen=True, slots=True)
class Target(ABC):
    """One line of a table, `length` bytes of the device."""

    type: ClassVar[str]
    length: int

    def __post_init__(self) -> None:
        if _sectors(self.length, "length") == 0:
            raise ArgumentError("a target of length 0 cannot be: give it at least a sector")

    @property
    def kind(self) -> str:
        """The kernel's word for the target."""
        return self.type

    @abstractmethod
    def parameters(self) -> str:
        """Return the target's own words in a table line."""


@dataclass(frozen=True, slots=True)
class OtherTarget(Target):
    """A target that no class here stands for."""

    type = ""
    word: str
    text: str

    @property
    def kind(self) -> str:
        return self.word

    def parameters(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class LinearTarget(Target):
    """A range of another device."""

    type = "linear"
    device: DeviceNumber
    offset: int = 0

    def parameters(self) -> str:
        return f"{self.device} {_sectors(self.offset, 'offset')}"

    @classmethod
    def parse(cls, length: int, text: str) -> Self:
        device, offset, *_ = _fields(text, 2)
        return cls(length, DeviceNumber.parse(device), _number(offset, text) * SECTOR)


_FEATURES = ("skip_block_zeroing", "ignore_discard", "no_discard_passdown", "read_only", "error_if_no_space")


@dataclass(frozen=True, slots=True)
class ThinPoolTarget(Target):
    """A pool of a metadata and a data device.

    Raises NotSupportedError for a block size that only the user engine has.
    """

    type = "thin-pool"
    metadata: DeviceNumber
    data: DeviceNumber
    block_size: int
    low_water_blocks: int = 0
    skip_block_zeroing: bool = False
    ignore_discard: bool = False
    no_discard_passdown: bool = False
    read_only: bool = False
    error_if_no_space: bool = False

    def __post_init__(self) -> None:
        Target.__post_init__(self)
        if self.block_size % _KERNEL_BLOCK or not _KERNEL_BLOCK <= self.block_size <= _KERNEL_BLOCK_MAX:
            raise NotSupportedError(
                f"blocks of {self.block_size} bytes: the kernel takes 64 KiB to 1 GiB in steps of 64 KiB: "
                'open this pool with engine="user"'
            )
        if self.low_water_blocks < 0:
            raise ArgumentError(f"low water mark {self.low_water_blocks}: it is a number of blocks from 0 on")

    def parameters(self) -> str:
        features = [name for name in _FEATURES if getattr(self, name)]
        words = [self.metadata, self.data, self.block_size // SECTOR, self.low_water_blocks, len(features)]
        return " ".join(map(str, words + features))

    @classmethod
    def parse(cls, length: int, text: str) -> Self:
        metadata, data, block, low_water, *rest = _fields(text, 4)
        features = rest[1:]
        if rest and _number(rest[0], text) != len(features):
            raise _not_understood("pool table", text)
        if not set(features) <= set(_FEATURES):
            raise _not_understood("pool table", text)
        return cls(
            length,
            DeviceNumber.parse(metadata),
            DeviceNumber.parse(data),
            _number(block, text) * SECTOR,
            _number(low_water, text),
            **{name: name in features for name in _FEATURES},
        )


@dataclass(frozen=True, slots=True)
class ThinTarget(Target):
    """A thin device of a pool; its length is its size, which the pool does not store.

    What it has not mapped is read from `external_origin`, which nobody may write to.
    """

    type = "thin"
    pool: DeviceNumber
    device_id: int
    external_origin: DeviceNumber | None = None

    def __post_init__(self) -> None:
        Target.__post_init__(self)
        if not 0 <= self.device_id <= _LARGEST_DEVICE_ID:
            raise ArgumentError(f"device id {self.device_id}: 0 to {_LARGEST_DEVICE_ID} can be")

    def parameters(self) -> str:
        origin = f" {self.external_origin}" if self.external_origin else ""
        return f"{self.pool} {self.device_id}{origin}"

    @classmethod
    def parse(cls, length: int, text: str) -> Self:
        pool, device_id, *rest = _fields(text, 2)
        origin = DeviceNumber.parse(rest[0]) if rest else None
        return cls(length, DeviceNumber.parse(pool), _number(device_id, text), origin)


@dataclass(frozen=True, slots=True)
class SnapshotTarget(Target):
    """The classic snapshot: old content of the origin goes to a COW device in blocks of `block_size`."""

    type = "snapshot"
    origin: DeviceNumber
    cow: DeviceNumber
    block_size: int = 4096
    persistent: bool = True

    def parameters(self) -> str:
        kept = "P" if self.persistent else "N"
        return f"{self.origin} {self.cow} {kept} {_sectors(self.block_size, 'block size')}"

    @classmethod
    def parse(cls, length: int, text: str) -> Self:
        origin, cow, kept, block, *_ = _fields(text, 4)
        return cls(
            length,
            DeviceNumber.parse(origin),
            DeviceNumber.parse(cow),
            _number(block, text) * SECTOR,
            kept.startswith("P"),
        )


@dataclass(frozen=True, slots=True)
class SnapshotOriginTarget(Target):
    """The device that writers use while classic snapshots of `origin` exist."""

    type = "snapshot-origin"
    origin: DeviceNumber

    def parameters(self) -> str:
        return str(self.origin)

    @classmethod
    def parse(cls, length: int, text: str) -> Self:
        return cls(length, DeviceNumber.parse(_fields(text, 1)[0]))


def _fields(text: str, least: int) -> list[str]:
    fields = text.split()
    if len(fields) < least:
        raise _not_understood("table", text)
    return fields


_Known = LinearTarget | ThinPoolTarget | ThinTarget | SnapshotTarget | SnapshotOriginTarget
_KINDS: tuple[type[_Known], ...] = (
    LinearTarget,
    ThinPoolTarget,
    ThinTarget,
    SnapshotTarget,
    SnapshotOriginTarget,
)
_TARGETS = {kind.type: kind for kind in _KINDS}


def _split_line(line: str) -> tuple[int, str, str]:
    """Return length, type and text of "START LENGTH TYPE TEXT"."""
    fields = line.split(" ", 3)
    if len(fields) < 4:
        raise _not_understood("line", line)
    return _number(fields[1], line) * SECTOR, fields[2], fields[3]


def parse_target(line: str) -> Target:
    """Parse a line of a table."""
    length, kind, text = _split_line(line)
    target = _TARGETS.get(kind)
    return target.parse(length, text) if target else OtherTarget(length, kind, text)


def parse_status(line: str) -> Status:
    """Parse a line of a status."""
    _, kind, text = _split_line(line)
    if kind == ThinPoolTarget.type:
        return ThinPoolStatus.parse(text)
    if kind == ThinTarget.type:
        return ThinStatus.parse(text)
    if kind == SnapshotTarget.type:
        return SnapshotStatus.parse(text)
    return OtherStatus(text)
