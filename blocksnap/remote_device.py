"""RemoteDevice: one thin device of a pool that another process serves."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from .pool_protocol import PAYLOAD_BYTES, Message
from .thin_device import parse_device_size, require_name
from .units import Size
from .user_pool import Buffer

__all__ = ["DeviceDescription", "RemoteDevice"]

_FREEZE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    name: str
    id: int
    size: int
    origin: str | None
    created: int
    labels: Mapping[str, str]


class Owner(Protocol):
    """What a device asks of the connection to its pool's server."""

    def ask(self, verb: str, *, payload: Any = b"", **arguments: Any) -> Message: ...
    def describe(self, name: str) -> DeviceDescription: ...


class RemoteDevice:
    """A thin device of a served pool."""

    def __init__(self, pool: Owner, description: DeviceDescription) -> None:
        self._pool = pool
        self._description = description

    def __repr__(self) -> str:
        return f"<RemoteDevice {self.name!r} id {self.id}>"

    @property
    def name(self) -> str:
        return self._description.name

    @property
    def id(self) -> int:
        return self._description.id

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._description.size

    @property
    def origin(self) -> str | None:
        return self._description.origin

    @property
    def created(self) -> int:
        """Time of creation in nanoseconds since 1970."""
        return self._description.created

    @property
    def labels(self) -> Mapping[str, str]:
        return MappingProxyType(dict(self._description.labels))

    def read(self, offset: int, length: int) -> bytes:
        """Return length bytes from offset on; holes read as zeros."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: Buffer) -> int:
        """Fill a writable buffer from offset on; return the number of bytes."""
        view = memoryview(buffer).cast("B")
        for begin in range(0, len(view), PAYLOAD_BYTES):
            part = view[begin : begin + PAYLOAD_BYTES]
            part[:] = self._pool.ask("read", name=self.name, offset=offset + begin, length=len(part)).payload
        return len(view)

    def write(self, offset: int, buffer: Buffer) -> int:
        """Write a buffer at offset; return the number of bytes."""
        view = memoryview(buffer).cast("B")
        for begin in range(0, len(view), PAYLOAD_BYTES):
            part = view[begin : begin + PAYLOAD_BYTES]
            self._pool.ask("write", name=self.name, offset=offset + begin, payload=part)
        return len(view)

    def discard(self, offset: int, length: int) -> None:
        self._pool.ask("discard", name=self.name, offset=offset, length=length)

    def flush(self) -> None:
        self._pool.ask("flush", name=self.name)

    def resize(self, size: Size) -> None:
        self._pool.ask("resize", name=self.name, size=parse_device_size(size))
        self._description = self._pool.describe(self.name)

    def snapshot(
        self, name: str, *, labels: Mapping[str, str] | None = None, freeze_timeout: float = _FREEZE_SECONDS
    ) -> "RemoteDevice":
        """Create a device that shares every block with this one; a mounted file system is frozen meanwhile.

        DeviceIOError (ETIMEDOUT) when it could not be frozen within freeze_timeout seconds.
        """
        require_name(name)
        made = self._pool.ask(
            "snapshot", name=self.name, new=name, labels=dict(labels or {}), freeze_timeout=freeze_timeout
        )
        return RemoteDevice(self._pool, DeviceDescription(**made.body["result"]))

    def set_labels(self, labels: Mapping[str, str]) -> None:
        self._pool.ask("set_labels", name=self.name, labels=dict(labels))
        self._description = self._pool.describe(self.name)

    def delete(self) -> None:
        self._pool.ask("delete", name=self.name)
