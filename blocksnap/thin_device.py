"""ThinDevice: one thin device of an open pool, by name."""

import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from .device_record import MAX_DEVICE_SIZE, MAX_NAME_BYTES, SECTOR_SIZE, DeviceRecord, is_name
from .engines import EngineDevice
from .errors import ArgumentError
from .units import Size, parse_size
from .user_pool import Buffer

__all__ = ["ThinDevice", "parse_device_size", "require_labels", "require_name"]


class Owner(Protocol):
    """What a thin device asks of its pool."""

    def _current(self, record: DeviceRecord) -> DeviceRecord: ...
    def _origin_of(self, record: DeviceRecord) -> str | None: ...
    def _open_handle(self, record: DeviceRecord) -> EngineDevice: ...
    def _refuse_in_transaction(self, what: str) -> None: ...
    def _snapshot(self, device: "ThinDevice", name: str, labels: Mapping[str, str]) -> "ThinDevice": ...
    def _resize(self, device: "ThinDevice", size: int) -> None: ...
    def _relabel(self, device: "ThinDevice", labels: Mapping[str, str]) -> None: ...
    def _delete(self, device: "ThinDevice", *, deferred: bool) -> None: ...


def require_name(name: str) -> None:
    if not is_name(name):
        raise ArgumentError(
            f'"{name}" cannot name a thin device: use 1 to {MAX_NAME_BYTES} printable characters without "/"'
        )


def require_labels(labels: Mapping[str, str]) -> None:
    for key, value in labels.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ArgumentError(f"the label {key!r}: {value!r}: both must be strings")


def parse_device_size(size: Size) -> int:
    size_bytes = parse_size(size)
    if size_bytes == 0 or size_bytes % SECTOR_SIZE:
        raise ArgumentError(
            f"a thin device of {size_bytes} bytes: the size must be a multiple of {SECTOR_SIZE}"
        )
    if size_bytes > MAX_DEVICE_SIZE:
        raise ArgumentError(f"a thin device of {size_bytes} bytes is too large: at most {MAX_DEVICE_SIZE}")
    return size_bytes


class ThinDevice:
    """A thin device of an open pool; the pool makes these.

    The handle of the engine is opened by the first use and closed with the pool. Methods may be called from
    any thread.
    """

    def __init__(self, pool: Owner, record: DeviceRecord) -> None:
        self._pool = pool
        self._record = record
        self._handle: EngineDevice | None = None
        self._held: list[EngineDevice] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<ThinDevice {self.name!r} id {self.id}>"

    @property
    def name(self) -> str:
        return self._record.name

    @property
    def id(self) -> int:
        return self._record.id

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._current().size

    @property
    def origin(self) -> str | None:
        """Name of the device that this is a snapshot of; None without one, or if it has been deleted."""
        return self._pool._origin_of(self._current())

    @property
    def external_origin(self) -> str | None:
        """Path of what is read where the device has no block of its own; None without one."""
        return self._record.external_origin

    @property
    def created(self) -> int:
        """Time of creation in nanoseconds since 1970."""
        return self._record.created

    @property
    def labels(self) -> Mapping[str, str]:
        return MappingProxyType(dict(self._current().labels))

    def read(self, offset: int, length: int) -> bytes:
        """Return length bytes from offset on; holes read as zeros."""
        if not 0 <= length <= self.size:
            raise ArgumentError(f'"{self.name}" has {self.size} bytes: a length of {length} cannot be read')
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: Buffer) -> int:
        """Fill a writable buffer from offset on; return the number of bytes."""
        return self._open().read_into(offset, buffer)

    def write(self, offset: int, buffer: Buffer) -> int:
        """Write a buffer at offset without copying it first; return the number of bytes."""
        return self._open().write(offset, buffer)

    def discard(self, offset: int, length: int) -> None:
        """Make a range read as zeros and free the whole blocks in it."""
        self._open().discard(offset, length)

    def flush(self) -> None:
        """Make everything written so far durable."""
        self._pool._refuse_in_transaction("flush")
        self._open().flush()

    def resize(self, size: Size) -> None:
        """Change the size; shrinking frees what lies behind the new end."""
        self._pool._resize(self, parse_device_size(size))

    def snapshot(self, name: str, *, labels: Mapping[str, str] | None = None) -> "ThinDevice":
        """Create a device that shares every block with this one."""
        return self._pool._snapshot(self, name, labels or {})

    def set_labels(self, labels: Mapping[str, str]) -> None:
        """Replace the labels."""
        self._pool._relabel(self, labels)

    def delete(self, *, deferred: bool = False) -> None:
        """Delete the device; BusyError, which tells by whom, while it is exported, mounted or open.

        With deferred such a device leaves the pool's list at once, and its name is free; it is deleted by the
        next operation of the pool that finds it unused, at the latest when the pool is opened next.
        """
        self._pool._delete(self, deferred=deferred)

    def hold(self) -> EngineDevice:
        """Return a handle of its own for an export; until it is closed the device cannot be deleted."""
        record = self._current()
        with self._lock:
            handle = self._pool._open_handle(record)
            self._held = [each for each in self._held if not each.closed] + [handle]
        return handle

    @property
    def held(self) -> bool:
        """Whether a handle of hold() is open."""
        return any(not each.closed for each in self._held)

    def _current(self) -> DeviceRecord:
        self._record = self._pool._current(self._record)
        return self._record

    def _open(self) -> EngineDevice:
        handle = self._handle
        if handle is None or handle.closed:
            record = self._current()
            with self._lock:
                if self._handle is None or self._handle.closed:
                    self._handle = self._pool._open_handle(record)
                handle = self._handle
        return handle

    def _close(self) -> None:
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()
