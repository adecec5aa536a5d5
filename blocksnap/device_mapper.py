"""Mapped devices of the kernel: made, changed, watched and removed by ioctls of the C core.

A device of ours has a uuid that begins with "BLOCKSNAP-"; it is found and removed by that uuid, so a device
that somebody else made under the same name is never touched. Needs root. Calls may come from any thread.

A process that suspends a device and dies leaves it suspended, and whoever writes to it hangs:
`Device.suspended` guards against that, `Device.suspend` does not.
"""

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from ._native import ffi, lib
from .dm_control import (
    SUFFIX_VARIABLE,
    UUID_PREFIX,
    Control,
    DeviceEntry,
    DeviceInfo,
    called,
    decode_text,
    device_info,
    device_number,
    encode_text,
    growing,
)
from .dm_cookie import udev_cookie
from .dm_target import (
    SECTOR,
    DeviceNumber,
    FailedStatus,
    LinearTarget,
    OtherStatus,
    OtherTarget,
    PoolMode,
    SnapshotOriginTarget,
    SnapshotStatus,
    SnapshotTarget,
    Status,
    Target,
    ThinPoolStatus,
    ThinPoolTarget,
    ThinStatus,
    ThinTarget,
    parse_status,
    parse_target,
)
from .errors import BusyError, DeviceIOError, DeviceNotFoundError

__all__ = [
    "SUFFIX_VARIABLE",
    "UUID_PREFIX",
    "Control",
    "Device",
    "DeviceEntry",
    "DeviceInfo",
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
]

_RETRY_SECONDS = 0.1


class Device:
    """A mapped device, known by its uuid, or by its name if it has none.

    What is `private` udev does not look into: no links below /dev/disk lead to it.
    """

    __slots__ = ("_control", "name", "number", "private", "uuid")

    def __init__(
        self, control: Control, name: str, uuid: str, number: DeviceNumber, *, private: bool = False
    ) -> None:
        self._control = control
        self.private = private
        self.name = name
        self.uuid = uuid
        self.number = number

    @classmethod
    def create(
        cls,
        control: Control,
        name: str,
        targets: Sequence[Target],
        *,
        uuid: str | None = None,
        read_only: bool = False,
        private: bool = False,
    ) -> Self:
        """Make a device with a live table, and where udev runs its links; if a step fails nothing is left.

        `uuid` (default: a random one) follows UUID_PREFIX. Raises BusyError if name or uuid are taken.
        """
        device = cls._create_empty(control, name + control.name_suffix, UUID_PREFIX + (uuid or str(uuid4())))
        device.private = private
        try:
            device.load(targets, read_only=read_only)
            device.resume()
        except BaseException:
            with suppress(DeviceNotFoundError):
                device.remove()
            raise
        return device

    @classmethod
    def _create_empty(cls, control: Control, name: str, uuid: str) -> Self:
        info = ffi.new("struct bs_dm_info *")
        fd = control.fileno()
        called(lambda: lib.bs_dm_create(fd, encode_text(name), encode_text(uuid), info), name)
        return cls(control, name, uuid, device_number(info.device))

    @classmethod
    def open(cls, control: Control, name: str = "", *, uuid: str = "") -> Self:
        """Find a device by its full name or its full uuid. Raises DeviceNotFoundError."""
        info = cls(control, name, uuid, DeviceNumber(0, 0)).info()
        return cls(control, info.name, info.uuid, info.number)

    @property
    def path(self) -> str:
        """The node that the kernel itself makes (devtmpfs), with and without udev."""
        return f"/dev/dm-{self.number.minor}"

    @property
    def _key(self) -> tuple[bytes, Any]:
        return encode_text(self.name), encode_text(self.uuid) if self.uuid else ffi.NULL

    def _call(self, function: Callable[..., int], *arguments: Any) -> int:
        fd, key = self._control.fileno(), self._key
        return called(lambda: function(fd, *key, *arguments), self.name or self.uuid)

    def _change(self, function: Callable[..., int], *arguments: Any) -> DeviceInfo:
        info = ffi.new("struct bs_dm_info *")
        self._call(function, *arguments, info)
        return device_info(info)

    def _change_seen(self, function: Callable[..., int], *arguments: Any) -> DeviceInfo:
        """Make a change that udev hears of, and wait until it has."""
        info = ffi.new("struct bs_dm_info *")
        with udev_cookie(private=self.private) as cookie:
            self._call(function, *arguments, cookie.value, info)
            cookie.sent = bool(info.flags & lib.BS_DM_UEVENT_GENERATED)
        return device_info(info)

    # ---- tables ----

    def load(self, targets: Sequence[Target], *, read_only: bool = False) -> None:
        """Load a table that the next `resume` makes live."""
        kept: list[Any] = []
        lines = ffi.new("struct bs_dm_target[]", len(targets))
        start = 0
        for line, target in zip(lines, targets, strict=True):
            kind = ffi.new("char[]", encode_text(target.kind))
            parameters = ffi.new("char[]", encode_text(target.parameters()))
            kept += [kind, parameters]
            line.start_sector, line.length_sectors = start, target.length // SECTOR
            line.type, line.parameters = kind, parameters
            start += line.length_sectors
        self._change(lib.bs_dm_load, lines, len(targets), lib.BS_DM_READ_ONLY if read_only else 0)

    def clear(self) -> None:
        """Drop the pending table."""
        self._change(lib.bs_dm_clear)

    def replace(self, targets: Sequence[Target], *, noflush: bool = False, skip_lockfs: bool = False) -> None:
        """Put a live device on another table; if that fails it runs on with the old one."""
        old, read_only = self.table(), self.info().read_only
        self.load(targets, read_only=read_only)
        try:
            with self.suspended(noflush=noflush, skip_lockfs=skip_lockfs):
                pass
        except BaseException:
            self._restore(old, read_only)
            raise

    def _restore(self, table: Sequence[Target], read_only: bool) -> None:
        """Let a device go on whose resume was refused: it is suspended, with the refused table live."""
        self.clear()
        if self.info().suspended:
            self.load(table, read_only=read_only)
            self.resume()

    def table(self, *, pending: bool = False) -> tuple[Target, ...]:
        flags = lib.BS_DM_QUERY_PENDING if pending else 0
        return tuple(map(parse_target, self._lines(lib.BS_DM_TABLE | flags)))

    def status(self, *, commit: bool = False) -> tuple[Status, ...]:
        """Return the status of each target; with `commit` a thin pool commits first."""
        return tuple(map(parse_status, self._lines(0 if commit else lib.BS_DM_NOFLUSH)))

    def _lines(self, flags: int) -> list[str]:
        info = ffi.new("struct bs_dm_info *")
        fd, key = self._control.fileno(), self._key
        out, used = growing(
            lambda out, n: lib.bs_dm_lines(fd, *key, flags, out, n, info),
            "char",
            self.name or self.uuid,
            capacity=4096,
        )
        text: str = ffi.buffer(out, used)[:].decode(errors="surrogateescape")
        return text.split("\0")[:-1]

    def dependencies(self, *, pending: bool = False) -> tuple[DeviceNumber, ...]:
        """Return the devices that the table names."""
        fd, key = self._control.fileno(), self._key
        flags = lib.BS_DM_QUERY_PENDING if pending else 0
        out, count = growing(
            lambda out, n: lib.bs_dm_dependencies(fd, *key, flags, out, n), "uint64_t", self.name or self.uuid
        )
        return tuple(device_number(out[i]) for i in range(count))

    def holders(self) -> list[str]:
        """Return the block devices, by their kernel names, that are made on this one."""
        directory = Path(f"/sys/dev/block/{self.number}/holders")
        return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []

    # ---- states ----

    def info(self) -> DeviceInfo:
        return self._change(lib.bs_dm_info)

    def suspend(self, *, noflush: bool = False, skip_lockfs: bool = False) -> None:
        """Hold back all I/O, with what is under way completed and the file system above frozen.

        `noflush` completes nothing, `skip_lockfs` freezes nothing. See `suspended` for the safe way.
        """
        self._change(lib.bs_dm_suspend, _suspend_flags(noflush, skip_lockfs))

    def resume(self) -> DeviceInfo:
        """Make a pending table live and let I/O go on.

        If the target refuses, the device stays suspended with the refused table (see `replace`).
        """
        return self._change_seen(lib.bs_dm_resume, 0)

    @contextmanager
    def suspended(
        self, *, noflush: bool = False, skip_lockfs: bool = False, timeout: float = 30.0
    ) -> Iterator[None]:
        """Hold the device suspended for a block of code; it is resumed however the block or the process ends.

        Raises DeviceIOError (ETIMEDOUT) if the I/O under way and the file system's freeze take longer than
        `timeout` seconds; the device then goes on.
        """
        guard = ffi.new("struct bs_dm_guard **")
        flags = _suspend_flags(noflush, skip_lockfs)
        called(
            lambda: lib.bs_dm_guard_suspend(*self._key, flags, int(timeout * 1000), guard),
            self.name or self.uuid,
        )
        try:
            yield
        finally:
            called(lambda: lib.bs_dm_guard_resume(guard[0]), self.name or self.uuid)

    def rename(self, name: str) -> None:
        """Give another name, to which the suffix of the control is added."""
        name += self._control.name_suffix
        # The kernel renames by name only.
        self.name = self.info().name
        self._change_seen(
            lambda fd, present, _uuid, *arguments: lib.bs_dm_rename(fd, present, *arguments),
            encode_text(name),
        )
        self.name = name

    def remove(self, *, deferred: bool = False, timeout: float = 5.0) -> None:
        """Remove; wait while others (a scan of new devices) have it open for a moment.

        With `deferred` it goes at its last close. Raises BusyError after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._change_seen(lib.bs_dm_remove, lib.BS_DM_DEFERRED_REMOVE if deferred else 0)
                return
            except BusyError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_RETRY_SECONDS)

    def cancel_deferred_remove(self) -> None:
        self.message("@cancel_deferred_remove")

    def wait(self, event_nr: int) -> DeviceInfo:
        """Wait until the event counter is not `event_nr`; only a signal ends it before.

        `Control.await_events` waits for many devices, with a time-out.
        """
        return self._change(lib.bs_dm_wait, event_nr)

    # ---- messages ----

    def message(self, text: str) -> str:
        """Send a message to the first target and return its answer, usually empty."""
        fd, key = self._control.fileno(), self._key
        out = ffi.new("char[]", 4096)
        called(
            lambda: lib.bs_dm_message(fd, *key, 0, encode_text(text), out, len(out)), self.name or self.uuid
        )
        return decode_text(out)

    def _pool_message(self, text: str) -> None:
        self.message(text)
        # The kernel commits after each message, but does not tell when that fails.
        (status,) = self.status()
        if isinstance(status, FailedStatus) or (isinstance(status, ThinPoolStatus) and status.needs_check):
            raise DeviceIOError(
                f'{self.name}: "{text}" is not committed, the pool has failed: check its metadata device',
                errno.EIO,
            )

    def create_thin(self, device_id: int) -> None:
        """Make an empty thin device in this pool. Raises DeviceExistsError."""
        self._pool_message(f"create_thin {device_id:d}")

    def create_snap(self, device_id: int, origin_id: int) -> None:
        """Make a snapshot; an active origin must be suspended, which the kernel does not check."""
        self._pool_message(f"create_snap {device_id:d} {origin_id:d}")

    def delete(self, device_id: int) -> None:
        """Delete a thin device. Raises BusyError while it is active, DeviceNotFoundError if there is none."""
        self._pool_message(f"delete {device_id:d}")

    def set_transaction_id(self, current: int, new: int) -> None:
        """Go from one transaction id to another. Raises ArgumentError if the pool's is not `current`."""
        self._pool_message(f"set_transaction_id {current:d} {new:d}")

    def reserve_metadata_snap(self) -> None:
        """Hold the metadata of now, whose root the pool's status tells. BusyError if some are held."""
        self._pool_message("reserve_metadata_snap")

    def release_metadata_snap(self) -> None:
        self._pool_message("release_metadata_snap")

    def __repr__(self) -> str:
        return f"<Device {self.name!r} {self.number}>"


def _suspend_flags(noflush: bool, skip_lockfs: bool) -> int:
    flags = lib.BS_DM_NOFLUSH if noflush else 0
    return int(flags | (lib.BS_DM_SKIP_LOCKFS if skip_lockfs else 0))
