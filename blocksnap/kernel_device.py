"""Thin devices that are active in the kernel: byte requests on them, and the handles that share them.

All I/O is direct: a write that the pool has no space for fails at once and not in some later flush, and a
snapshot needs no page cache written back first.
"""

import errno
import fcntl
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Self

from ._native import ffi
from .device_mapper import Device, Target
from .errors import (
    ArgumentError,
    BlocksnapError,
    BusyError,
    DeviceIOError,
    NoSpaceError,
    PrivilegeError,
    error_for,
)
from .kernel_backing import Backing
from .kernel_counters import KernelCounters
from .mount import mount_table
from .udev import make_node
from .user_pool import Buffer, Handle, bytes_of

__all__ = ["ActiveDevice", "KernelDevice", "users_of"]

_PIECE = 1 << 20
_FREEZE_SECONDS = 30.0
_RETRY_SECONDS = 0.05
_BLKDISCARD, _BLKSSZGET = 0x1277, 0x1268


def users_of(device: Device) -> str:
    """Return who has a device open, as the kernel counts and names them."""
    mounts = [entry.target for entry in mount_table() if entry.device == str(device.number)]
    users = [f"mounted at {target}" for target in mounts]
    users += [f"held by {name}" for name in device.holders()]
    return ", ".join([f"open {device.info().open_count} times", *users])


class ActiveDevice:
    """A thin device's node, open for direct I/O, and the number of handles that share it."""

    def __init__(
        self,
        device: Device,
        size: int,
        block_size: int,
        what: str,
        counts: KernelCounters,
        require_room: Callable[[str], object],
        *,
        read_only: bool,
        origin: Backing | None = None,
    ) -> None:
        """require_room raises why nothing can be written just now.

        origin is what is read where the device has no block of its own; it goes with the device.
        """
        self.device = device
        self.origin = origin
        self.size = size
        self.handles = 0
        self.freeze_seconds = _FREEZE_SECONDS
        self._block_size = block_size
        self._what = what
        self._counts = counts
        self._require_room = require_room
        self._read_only = read_only
        # The sectors at the edges of a request are read, changed and written.
        self._writing = threading.Lock()
        self._resizing = threading.Lock()
        self._fd = -1
        self.open()
        self._sector = int.from_bytes(fcntl.ioctl(self._fd, _BLKSSZGET, bytes(4)), "little")

    def open(self) -> None:
        """Open the node, unless it is open."""
        if self._fd < 0:
            mode = os.O_RDONLY if self._read_only else os.O_RDWR
            with self._errors():
                self._fd = os.open(make_node(self.device.number), mode | os.O_DIRECT | os.O_CLOEXEC)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except BlocksnapError:
            raise
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise NoSpaceError(
                    f'{self._what}: its pool is full: delete devices, or "blocksnap pool extend"'
                ) from None
            mend = ': "blocksnap pool status" tells the state of its pool' if error.errno == errno.EIO else ""
            raise error_for(-(error.errno or errno.EIO), f"{self._what}: {error.strerror}{mend}") from None

    def _require_inside(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ArgumentError(
                f"{self._what}: {length} bytes at {offset} are not within its {self.size} bytes"
            )

    def _require_writable(self) -> None:
        if self._read_only:
            raise PrivilegeError(f"{self._what} is open read-only: open its pool for writing")

    def _read_sectors(self, offset: int, area: memoryview) -> None:
        self._counts.add(sector_read=len(area))
        if os.preadv(self._fd, [area], offset) != len(area):
            raise DeviceIOError(f"{self._what}: a short read at {offset}: check its data device")

    def _write_sectors(self, offset: int, area: memoryview) -> None:
        self._counts.add(sector_written=len(area))
        if os.pwritev(self._fd, [area], offset) != len(area):
            raise DeviceIOError(f"{self._what}: a short write at {offset}: check its data device")

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, memoryview, slice, slice]]:
        """Yield sectors that cover a range, a buffer for them, and the bytes within buffer and range."""
        sector = self._sector
        begin, end = offset // sector * sector, -(-(offset + length) // sector) * sector
        buffer = memoryview(mmap.mmap(-1, max(min(_PIECE, end - begin), sector)))
        while begin < offset + length:
            area = buffer[: min(_PIECE, end - begin)]
            first, last = max(begin, offset), min(begin + len(area), offset + length)
            yield begin, area, slice(first - begin, last - begin), slice(first - offset, last - offset)
            begin += len(area)

    def read(self, offset: int, target: memoryview) -> None:
        self._require_inside(offset, len(target))
        with self._errors():
            for at, area, inside, part in self._pieces(offset, len(target)):
                self._read_sectors(at, area)
                target[part] = area[inside]
        self._counts.add(read=len(target))

    def write(self, offset: int, source: memoryview) -> None:
        self._require_inside(offset, len(source))
        self._require_writable()
        with self._errors(), self._writing:
            for at, area, inside, part in self._pieces(offset, len(source)):
                self._require_room(self._what)
                self._read_edges(at, area, inside)
                area[inside] = source[part]
                self._write_sectors(at, area)
        self._counts.add(written=len(source))

    def _read_edges(self, at: int, area: memoryview, inside: slice) -> None:
        sector = self._sector
        if inside.start > 0:
            self._read_sectors(at, area[:sector])
        if inside.stop < len(area) and (inside.start == 0 or len(area) > sector):
            self._read_sectors(at + len(area) - sector, area[-sector:])

    def discard(self, offset: int, length: int) -> None:
        """Unmap the whole blocks of a range; zero the rest of it, and what an external origin would show."""
        self._require_inside(offset, length)
        self._require_writable()
        shown = 0 if self.origin is None else self.origin.size
        unmapped = min(max(offset, shown), offset + length)
        with self._errors():
            self._zero(offset, unmapped)
            self._unmap(unmapped, offset + length)

    def _unmap(self, begin: int, end: int) -> None:
        block = self._block_size
        first, last = -(-begin // block) * block, end // block * block
        self._zero(begin, min(first, end))
        if first < last:
            fcntl.ioctl(self._fd, _BLKDISCARD, struct.pack("QQ", first, last - first))
            self._counts.add(discarded=last - first)
        self._zero(max(first, last), end)

    def _zero(self, begin: int, end: int) -> None:
        """Zero what is not zero already: writing to a hole would provision it."""
        if begin >= end:
            return
        with self._writing:
            for at, area, inside, _ in self._pieces(begin, end - begin):
                self._read_sectors(at, area)
                if any(area[inside]):
                    area[inside] = bytes(inside.stop - inside.start)
                    self._write_sectors(at, area)

    def resize(self, size: int) -> None:
        """Load another size; shrinking frees and zeroes what lies behind the new end."""
        self._require_writable()
        with self._resizing:
            (target,) = self.device.table()
            if size < self.size:
                self._trim(target, size)
            self.device.replace([replace(target, length=size)])
            self.size = size

    def _trim(self, target: Target, size: int) -> None:
        block = self._block_size
        whole = -(-self.size // block) * block
        if whole != self.size:  # the kernel discards whole blocks only
            self.device.replace([replace(target, length=whole)])
            self.size = whole
        with self._errors():
            self._unmap(size, whole)

    def flush(self) -> None:
        if self._read_only or self._fd < 0:
            return
        with self._errors():
            os.fsync(self._fd)
        self._counts.add(flushes=1)


class KernelDevice:
    """A handle of an active thin device."""

    __slots__ = ("__weakref__", "_commits", "_handle", "_release")

    def __init__(
        self,
        active: ActiveDevice,
        what: str,
        commits: threading.Lock,
        release: Callable[[ActiveDevice], None],
    ) -> None:
        """`commits` is held while the pool may not commit; `release` is called with the last call over."""
        self._handle = Handle(active, what)
        self._commits = commits
        self._release = release

    @property
    def size(self) -> int:
        with self._handle as active:
            return int(active.size)

    @property
    def path(self) -> str:
        """The block device, which programs may open or mount."""
        with self._handle as active:
            return str(active.device.path)

    @property
    def closed(self) -> bool:
        return self._handle.closed

    def read_into(self, offset: int, buffer: Buffer) -> int:
        target = bytes_of(buffer, offset, True)
        with self._handle as active:
            active.read(offset, memoryview(ffi.buffer(target)))
        return len(target)

    def write(self, offset: int, buffer: Buffer) -> int:
        source = bytes_of(buffer, offset, False)
        with self._handle as active:
            active.write(offset, memoryview(ffi.buffer(source)))
        return len(source)

    def discard(self, offset: int, length: int) -> None:
        with self._handle as active:
            active.discard(offset, length)

    def flush(self) -> None:
        with self._handle as active, self._commits:
            active.flush()

    def resize(self, size: int) -> None:
        with self._handle as active:
            active.resize(size)

    def await_others(self, timeout: float) -> None:
        """Wait until nobody else has the device open. BusyError tells who, after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._handle as active:
            while active.device.info().open_count > 1:  # one is ours
                if time.monotonic() >= deadline:
                    users = users_of(active.device)
                    raise BusyError(f"{active.device.path} is in use ({users}): unmount or close it first")
                time.sleep(_RETRY_SECONDS)

    @contextmanager
    def freezing_within(self, seconds: float) -> Iterator[None]:
        """Limit how long a snapshot in the block may wait for the file system on the device to freeze."""
        with self._handle as active:
            before, active.freeze_seconds = active.freeze_seconds, seconds
            try:
                yield
            finally:
                active.freeze_seconds = before

    def close(self) -> None:
        active = self._handle.take()
        if active is not None:
            self._release(active)

    def forget(self) -> None:
        """Let go of the device once no call uses it, and leave it active."""
        self._handle.take()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
