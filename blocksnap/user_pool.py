"""The user engine: one thin pool run in this process by the C core, devices by number.

Every call may come from any thread. A handle that one thread closes is freed only when no other thread is
inside a call with it; a call that comes later fails with ArgumentError.
"""

import errno
import os
import select
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, Self

from ._native import check, encode, ffi, lib
from .errors import ArgumentError, NotSupportedError
from .metadata import DeviceInfo

__all__ = [
    "Buffer",
    "EngineStatus",
    "Handle",
    "PoolCounters",
    "UserDevice",
    "UserPool",
    "UserWatch",
    "bytes_of",
]

Buffer = Any
"""Anything with the buffer protocol, contiguous: bytes, bytearray, memoryview, numpy arrays."""

_DEVICES_A_CALL = 1 << 10
_WAIT_WHEN_FULL_MS = 60_000  # as long as the kernel's pool waits


@dataclass(frozen=True, slots=True)
class PoolCounters:
    """Bytes, blocks and requests since the pool was opened, each counted where it meets the backing.

    None is what an engine cannot know.
    """

    application_bytes: int
    application_read_bytes: int
    zero_filled_bytes: int
    copied_bytes: int
    read_for_copy_bytes: int
    metadata_bytes: int
    padding_bytes: int
    discarded_bytes: int
    blocks_provisioned: int | None
    blocks_copied: int
    blocks_overwritten: int | None
    commits: int
    flushes: int


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What the engine knows of its pool; a data block has block_size bytes, a metadata block 4096."""

    transaction_id: int
    block_size: int
    data_blocks: int
    data_blocks_free: int
    metadata_blocks: int
    metadata_blocks_free: int
    held_root: int
    time: int
    nr_devices: int
    read_only: bool
    needs_check: bool
    out_of_space: bool
    metadata_low: bool
    failed: bool
    direct_io: bool


_FLAGS = {"read_only", "needs_check", "out_of_space", "metadata_low", "failed", "direct_io"}


def _values(struct: Any, kind: type[Any]) -> dict[str, Any]:
    names = kind.__slots__
    return {name: bool(getattr(struct, name)) if name in _FLAGS else getattr(struct, name) for name in names}


class Handle:
    """A pointer of the core and the number of calls that are using it."""

    __slots__ = ("_idle", "_lock", "_pointer", "_users", "_what")

    def __init__(self, pointer: Any, what: str) -> None:
        self._pointer = pointer
        self._users = 0
        self._lock = threading.Lock()
        self._idle: threading.Event | None = None
        self._what = what

    def __enter__(self) -> Any:
        with self._lock:
            if self._pointer is None:
                raise ArgumentError(f"{self._what} is closed: open it again")
            self._users += 1
            return self._pointer

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._idle is not None and self._users == 0:
                self._idle.set()

    def take(self) -> Any:
        """Return the pointer for freeing once no call uses it, None if it was taken before."""
        with self._lock:
            pointer, self._pointer = self._pointer, None
            if self._users == 0:
                return pointer
            idle = self._idle = self._idle or threading.Event()
        idle.wait()
        return pointer

    def give_back(self, pointer: Any) -> None:
        with self._lock:
            self._pointer, self._idle = pointer, None

    @property
    def closed(self) -> bool:
        return self._pointer is None


_char_array = ffi.typeof("char[]")


def bytes_of(buffer: Buffer, offset: int, writable: bool) -> Any:
    if offset < 0:
        raise ArgumentError(f"offset {offset} is negative")
    try:
        return ffi.from_buffer(_char_array, buffer, writable)
    except (BufferError, ValueError) as error:
        raise ArgumentError(f"the buffer cannot be used: {error}") from None


class UserDevice:
    """An active thin device."""

    __slots__ = ("__weakref__", "_handle", "id")

    def __init__(self, pointer: Any, device_id: int, what: str) -> None:
        self._handle = Handle(pointer, what)
        self.id = device_id

    @property
    def size(self) -> int:
        with self._handle as device:
            return int(lib.bs_device_size(device))

    @property
    def closed(self) -> bool:
        return self._handle.closed

    def handle(self) -> Handle:
        """Return the handle for another wrapper of the core (the FUSE export): `with` gives the pointer."""
        return self._handle

    def read_into(self, offset: int, buffer: Buffer) -> int:
        target = bytes_of(buffer, offset, True)
        with self._handle as device:
            return check(lib.bs_device_read(device, offset, target, len(target)))

    def write(self, offset: int, buffer: Buffer) -> int:
        source = bytes_of(buffer, offset, False)
        with self._handle as device:
            return check(lib.bs_device_write(device, offset, source, len(source)))

    def discard(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0:
            raise ArgumentError(f"offset {offset}, length {length}: neither may be negative")
        with self._handle as device:
            check(lib.bs_device_discard(device, offset, length))

    def flush(self) -> None:
        with self._handle as device:
            check(lib.bs_device_flush(device))

    def resize(self, size: int) -> None:
        with self._handle as device:
            check(lib.bs_device_resize(device, size))

    def close(self) -> None:
        pointer = self._handle.take()
        if pointer is not None:
            lib.bs_device_close(pointer)

    def forget(self) -> None:
        """Let go of the handle once no call uses it: the pool frees it."""
        self._handle.take()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class UserWatch:
    """What the core tells of a pool's space; one thread waits for it."""

    def __init__(self, pool: Handle) -> None:
        self._pool = pool
        self._armed: tuple[int, bool] | None = None
        self._events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def arm(self, low_water: int, *, wait_when_full: bool) -> None:
        """Tell when the free data fall to low_water bytes; a full pool lets writers wait, or fails them."""
        if self._armed == (low_water, wait_when_full):
            return
        with self._pool as pool:
            wait = _WAIT_WHEN_FULL_MS if wait_when_full else 0
            check(lib.bs_pool_watch(pool, self._events, low_water, wait))
        self._armed = low_water, wait_when_full

    def wait(self, timeout: float) -> None:
        """Return when something was told, which may have been before the call, or after the time-out."""
        select.select([self._events], [], [], timeout)
        with suppress(BlockingIOError):
            os.eventfd_read(self._events)

    def wake(self) -> None:
        os.eventfd_write(self._events, 1)

    def close(self) -> None:
        with suppress(ArgumentError), self._pool as pool:  # a closed pool watches nothing
            lib.bs_pool_watch(pool, -1, 0, 0)
        os.close(self._events)


class UserPool:
    """A thin pool opened by the user engine; it belongs to this process until it is closed."""

    name = "user"
    messages_commit = False
    """Whether each creation and deletion is durable at once, before end()."""
    taken_over: frozenset[int] = frozenset()

    def __init__(self, pointer: Any, what: str) -> None:
        self._handle = Handle(pointer, what)
        self._what = what
        self._devices: weakref.WeakSet[UserDevice] = weakref.WeakSet()

    @staticmethod
    def format(
        metadata: str | PathLike[str], data: str | PathLike[str], *, data_bytes: int, block_size: int
    ) -> None:
        """Write an empty pool to two files or devices; the first block of metadata must be zero."""
        paths = encode(fspath(metadata)), encode(fspath(data))
        check(lib.bs_pool_format(*paths, data_bytes, block_size))

    @staticmethod
    def clear_needs_check(metadata: str | PathLike[str]) -> None:
        """Let a pool that nobody has open be written to again; the caller found its metadata undamaged."""
        check(lib.bs_pool_clear_needs_check(encode(fspath(metadata))))

    @classmethod
    def open(
        cls,
        metadata: str | PathLike[str],
        data: str | PathLike[str],
        *,
        read_only: bool = False,
        direct_io: bool = False,
        passdown: bool = False,
        locked: bool = False,
    ) -> Self:
        """Open and lock a pool; BusyError names the process that holds it.

        With passdown the space of freed data blocks goes back to the backing file system. With `locked` the
        caller holds the lock.
        """
        flags = lib.BS_POOL_READ_ONLY if read_only else 0
        flags |= lib.BS_POOL_DIRECT_IO if direct_io else 0
        flags |= lib.BS_POOL_PASSDOWN if passdown else 0
        flags |= lib.BS_POOL_LOCKED if locked else 0
        result = ffi.new("struct bs_pool **")
        check(lib.bs_pool_open(encode(fspath(metadata)), encode(fspath(data)), flags, result))
        return cls(result[0], f"the pool of {fspath(metadata)}")

    def close(self) -> None:
        """Commit and release. BusyError while a device is open: the pool then stays as it is."""
        pointer = self._handle.take()
        if pointer is None:
            return
        code = lib.bs_pool_close(pointer)
        if code == -errno.EBUSY:
            self._handle.give_back(pointer)
        check(code)

    def abandon(self) -> None:
        """Drop every handle without a commit: what a killed process leaves behind."""
        pointer = self._handle.take()
        if pointer is not None:
            for device in list(self._devices):
                device.forget()
            lib.bs_pool_abandon(pointer)

    @property
    def closed(self) -> bool:
        return self._handle.closed

    def commit(self) -> None:
        with self._handle as pool:
            check(lib.bs_pool_commit(pool))

    def begin(self) -> None:
        """Hold back every commit until end()."""
        with self._handle as pool:
            check(lib.bs_pool_begin(pool))

    def end(self, current_id: int, new_id: int) -> None:
        """Commit what happened since begin() together with a new transaction id."""
        with self._handle as pool:
            check(lib.bs_pool_end(pool, current_id, new_id))

    @contextmanager
    def quiescent(self) -> Iterator[None]:
        """Commit, and let no commit happen within the block: the metadata stay as they are."""
        self.commit()
        self.begin()
        try:
            yield
        finally:
            current = self.status().transaction_id
            self.end(current, current)

    def hold_metadata(self) -> None:
        """Commit, and hold what is committed for walks; BusyError if a metadata snapshot is held already."""
        with self._handle as pool:
            check(lib.bs_pool_hold_metadata(pool))

    def release_metadata(self) -> None:
        with self._handle as pool:
            check(lib.bs_pool_release_metadata(pool))

    def status(self) -> EngineStatus:
        result = ffi.new("struct bs_pool_status *")
        with self._handle as pool:
            check(lib.bs_pool_status(pool, result))
        return EngineStatus(**_values(result, EngineStatus))

    def counters(self) -> PoolCounters:
        result = ffi.new("struct bs_pool_counters *")
        with self._handle as pool:
            check(lib.bs_pool_counters(pool, result))
        return PoolCounters(**_values(result, PoolCounters))

    def extend(self, data_bytes: int) -> None:
        """Grow to the present sizes of the backing, of the data at most data_bytes (0 = all)."""
        with self._handle as pool:
            check(lib.bs_pool_extend(pool, data_bytes))

    def watch(self) -> "UserWatch":
        """Return what tells of low space from now on; one at a time."""
        return UserWatch(self._handle)

    def create_device(self, device_id: int) -> None:
        with self._handle as pool:
            check(lib.bs_pool_create_device(pool, device_id))

    def create_snapshot(self, device_id: int, origin_id: int) -> None:
        with self._handle as pool:
            check(lib.bs_pool_create_snapshot(pool, device_id, origin_id))

    def delete_device(self, device_id: int) -> None:
        """Delete a device; BusyError while it is open."""
        with self._handle as pool:
            check(lib.bs_pool_delete_device(pool, device_id))

    def users_of(self, device_id: int) -> str:
        """Return who uses a device, empty if nobody does."""
        count = sum(each.id == device_id and not each.closed for each in list(self._devices))
        return f"open {count} times" if count else ""

    def remove_when_unused(self, device_id: int) -> None:
        """A device that nobody uses takes nothing but its place in the pool."""

    @staticmethod
    def require_external_origin(path: str | PathLike[str]) -> None:
        """Raise why a path cannot be an external origin."""
        raise NotSupportedError(f'{fspath(path)}: only engine="kernel" has devices with an external origin')

    def open_device(self, device_id: int, size: int, external_origin: str | None = None) -> UserDevice:
        if external_origin is not None:
            raise NotSupportedError(
                f"thin device {device_id} has the external origin {external_origin}, which only the kernel"
                ' engine reads: open the pool with engine="kernel"'
            )
        result = ffi.new("struct bs_device **")
        with self._handle as pool:
            check(lib.bs_device_open(pool, device_id, size, result))
            what = f"thin device {device_id} of {self._what.removeprefix('the ')}"
            device = UserDevice(result[0], device_id, what)
            self._devices.add(device)
        return device

    def devices(self) -> list[DeviceInfo]:
        """Return the details of every device by ascending id."""
        found: list[DeviceInfo] = []
        out = ffi.new("struct bs_device_info[]", _DEVICES_A_CALL)
        count = -1
        while count:
            begin = found[-1].id + 1 if found else 0
            with self._handle as pool:
                count = check(lib.bs_pool_devices(pool, begin, out, _DEVICES_A_CALL))
            found += map(DeviceInfo.of, out[0:count])
        return found
