"""What a pool of the kernel engine lies on: its lock, its two block devices, its superblock."""

import fcntl
import hashlib
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Self

from . import metadata as metadata_walks
from .dm_target import DeviceNumber, ThinPoolTarget
from .errors import BusyError, DamagedMetadataError, NotSupportedError, PoolFormatError, system_errors
from .mount import LoopDevice, backing_loops

__all__ = [
    "Backing",
    "PathArgument",
    "Superblock",
    "identity_of",
    "locked",
    "pool_target",
    "require_block_size",
    "require_undamaged",
    "settle_former_writes",
]

_METADATA_BLOCK_SIZE = 4096
_SECTOR = 512
_NEEDS_CHECK = 1
_KERNEL_BLOCK, _KERNEL_BLOCK_MAX = 64 << 10, 1 << 30

_LOOKS, _LOOK_SECONDS = 300, 0.01

PathArgument = str | PathLike[str]


@dataclass(frozen=True, slots=True)
class Superblock:
    """Fields of block 0 of the metadata (the kernel's dm-thin-metadata.c); sizes in bytes."""

    needs_check: bool
    time: int
    transaction_id: int
    held_root: int
    data_blocks: int
    block_size: int

    @classmethod
    def read(cls, metadata: PathArgument) -> Self:
        """Read what is on disk; its checksum is the affair of `require_undamaged`."""
        with system_errors(fspath(metadata)), open(metadata, "rb") as device:
            # The kernel writes below the page cache of a block device.
            os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            block = device.read(_METADATA_BLOCK_SIZE)
        if len(block) < _METADATA_BLOCK_SIZE:
            raise PoolFormatError(f"{fspath(metadata)} is no thin pool: it has {len(block)} bytes")
        (flags,) = struct.unpack_from("<I", block, 4)
        time, transaction_id, held_root, data_blocks = struct.unpack_from("<IQQQ", block, 44)
        (block_sectors,) = struct.unpack_from("<I", block, 336)
        return cls(
            bool(flags & _NEEDS_CHECK), time, transaction_id, held_root, data_blocks, block_sectors * _SECTOR
        )


def identity_of(metadata: PathArgument) -> str:
    """Return what the uuids of a pool's devices have in common: the same for every path to its metadata."""
    with system_errors(fspath(metadata)):
        found = os.stat(metadata)
    place = f"{found.st_rdev}" if stat.S_ISBLK(found.st_mode) else f"{found.st_dev} {found.st_ino}"
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def require_undamaged(metadata: PathArgument) -> metadata_walks.CheckReport:
    """Prove the metadata before the kernel trusts them: it checks little, and panics or hangs on some."""
    report = metadata_walks.check(metadata)
    if report.fatal:
        first = next(each for each in report.findings if each.severity == "fatal")
        raise DamagedMetadataError(
            f'the metadata of the pool are damaged ({first.text}): "blocksnap pool check" tells all,'
            ' "blocksnap pool repair" makes new ones'
        )
    return report


def settle_former_writes(metadata: PathArgument) -> None:
    """Make durable what a killed process wrote and did not flush: the kernel builds upon it."""
    with system_errors(fspath(metadata)):
        descriptor = os.open(metadata, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_block_size(block_size: int) -> None:
    if block_size % _KERNEL_BLOCK or not _KERNEL_BLOCK <= block_size <= _KERNEL_BLOCK_MAX:
        raise NotSupportedError(
            f"blocks of {block_size} bytes: the kernel takes 64 KiB to 1 GiB in steps of 64 KiB:"
            ' use engine="user" for this pool'
        )


def _lock(descriptor: int) -> None:
    looks = _LOOKS if stat.S_ISBLK(os.fstat(descriptor).st_mode) else 0
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if looks == 0:
                raise
        # udevd has a shared lock on a device that it looks into; who has it for itself is no udevd.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        looks -= 1
        time.sleep(_LOOK_SECONDS)


@contextmanager
def locked(metadata: PathArgument) -> Iterator[None]:
    """Hold the lock that both engines take on a pool."""
    with system_errors(fspath(metadata)):
        descriptor = os.open(metadata, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            _lock(descriptor)
        except BlockingIOError:
            raise BusyError(
                f"{fspath(metadata)} is in use by another process: end it or go through it"
            ) from None
        yield
    finally:
        os.close(descriptor)


def pool_target(
    superblock: Superblock, metadata: "Backing", data: "Backing", *, read_only: bool, passdown: bool
) -> ThinPoolTarget:
    """Return what the kernel needs to run a pool. Raises PoolFormatError if its data device is too small."""
    length = superblock.data_blocks * superblock.block_size
    if data.size < length:
        raise PoolFormatError(
            f"{fspath(data.path)} has {data.size} bytes, the pool says {length}: restore its size"
        )
    return ThinPoolTarget(
        length,
        metadata.number,
        data.number,
        superblock.block_size,
        no_discard_passdown=not passdown,
        read_only=read_only,
        error_if_no_space=True,
    )


class Backing:
    """The block device of one part of a pool: itself, or a loop device over a file.

    The loop device goes with its last user even if this process is killed.
    """

    def __init__(
        self, path: PathArgument, *, read_only: bool = False, live: DeviceNumber | None = None
    ) -> None:
        """`live` is the device that a live pool has for it already."""
        self.path = path
        self._loop: LoopDevice | None = None
        with system_errors(fspath(path)):
            is_file = stat.S_ISREG(os.stat(path).st_mode)
        if is_file and live is not None:
            self._loop = next((loop for loop in backing_loops(path) if loop.number == live.minor), None)
        elif is_file:
            self._loop = LoopDevice.attach(path, read_only=read_only, direct_io=True, autoclear=True)
        self.number = live or DeviceNumber.of(self._loop.path if self._loop else path)

    @property
    def direct_io(self) -> bool:
        return self._attribute("loop/dio") == "1" if self._loop else True

    @property
    def read_only(self) -> bool:
        return self._attribute("ro") == "1"

    @property
    def size(self) -> int:
        return int(self._attribute("size") or 0) * _SECTOR

    def _attribute(self, name: str) -> str:
        with system_errors(fspath(self.path)), open(f"/sys/dev/block/{self.number}/{name}") as file:
            return file.read().strip()

    def refresh(self) -> None:
        """Take over a changed size of the file."""
        if self._loop is not None:
            self._loop.refresh()

    def close(self) -> None:
        if self._loop is not None:
            self._loop.detach()

    def abandon(self) -> None:
        """Leave the loop device to its other users."""
        if self._loop is not None:
            with suppress(BusyError):
                self._loop.detach(timeout=0)
