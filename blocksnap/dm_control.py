"""The kernel's device-mapper as a whole: its version, targets, list of devices and events; calls to it."""

import errno
import os
import select
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from ._native import check, ffi, lib
from .dm_target import DeviceNumber
from .errors import ArgumentError, DeviceNotFoundError, NotSupportedError

__all__ = [
    "SUFFIX_VARIABLE",
    "UUID_PREFIX",
    "Control",
    "DeviceEntry",
    "DeviceInfo",
    "called",
    "decode_text",
    "device_info",
    "device_number",
    "encode_text",
    "growing",
    "require_interface",
]

UUID_PREFIX = "BLOCKSNAP-"
SUFFIX_VARIABLE = "BLOCKSNAP_DEVICE_SUFFIX"
"""What this variable of the environment holds ends every name: tests find their leftovers by it."""

_OLDEST_INTERFACE = 37  # ARM_POLL; Linux 4.13


def encode_text(text: str) -> bytes:
    if "\0" in text:
        raise ArgumentError(f"{text!r}: a name, uuid, table or message cannot hold a NUL")
    return text.encode(errors="surrogateescape")


def decode_text(chars: Any) -> str:
    return str(ffi.string(chars).decode(errors="surrogateescape"))


def device_number(device: int) -> DeviceNumber:
    return DeviceNumber(os.major(device), os.minor(device))


def called(call: Callable[[], int], device: str) -> int:
    """Make a call until no signal interrupts it; its failure carries the kernel's errno and the device."""
    while (code := call()) == -errno.EINTR:
        pass  # Python has run the signal's handler, which may have raised
    try:
        if code == -errno.ENXIO:
            raise DeviceNotFoundError(decode_text(lib.bs_last_error()), errno.ENXIO)
        return check(code)
    except OSError as error:
        error.filename = device
        raise


def growing(
    call: Callable[[Any, int], int], kind: str, device: str, *, capacity: int = 64
) -> tuple[Any, int]:
    """Repeat a call with an array as long as it asks for; return the array and how much of it is used."""
    while True:
        out = ffi.new(f"{kind}[]", capacity)
        used = called(partial(call, out, capacity), device)
        if used <= capacity:
            return out, used
        capacity = used + used // 8


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """A mapped device in a list."""

    name: str
    uuid: str
    number: DeviceNumber
    event_nr: int

    @property
    def ours(self) -> bool:
        return self.uuid.startswith(UUID_PREFIX)


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The state of a mapped device."""

    name: str
    uuid: str
    number: DeviceNumber
    open_count: int
    event_nr: int
    target_count: int
    read_only: bool
    suspended: bool
    internally_suspended: bool
    live: bool
    pending: bool
    deferred_remove: bool


def device_info(struct: Any) -> DeviceInfo:
    flags = struct.flags
    return DeviceInfo(
        name=decode_text(struct.name),
        uuid=decode_text(struct.uuid),
        number=device_number(struct.device),
        open_count=struct.open_count,
        event_nr=struct.event_nr,
        target_count=struct.target_count,
        read_only=bool(flags & lib.BS_DM_READ_ONLY),
        suspended=bool(flags & lib.BS_DM_SUSPENDED),
        internally_suspended=bool(flags & lib.BS_DM_INTERNAL_SUSPEND),
        live=bool(flags & lib.BS_DM_LIVE),
        pending=bool(flags & lib.BS_DM_PENDING),
        deferred_remove=bool(flags & lib.BS_DM_DEFERRED_REMOVE),
    )


def require_interface(version: tuple[int, int, int]) -> None:
    """Raise NotSupportedError for an interface that lacks what we use."""
    if version[0] != 4 or version[1] < _OLDEST_INTERFACE:
        found = ".".join(map(str, version))
        raise NotSupportedError(f"device-mapper interface {found} is too old: it takes Linux 4.13 or later")


class Control:
    """The kernel's device-mapper, opened. One is enough for all pools of a process."""

    __slots__ = ("_fd", "name_suffix", "version")

    def __init__(self, fd: int, version: tuple[int, int, int], name_suffix: str) -> None:
        self._fd = fd
        self.version = version
        self.name_suffix = name_suffix

    @classmethod
    def open(cls, *, name_suffix: str | None = None) -> Self:
        """Open /dev/mapper/control; every device that is created gets the suffix to its name.

        Raises NotSupportedError without a device-mapper of Linux 4.13 or later, PrivilegeError without root.
        """
        suffix = os.environ.get(SUFFIX_VARIABLE, "") if name_suffix is None else name_suffix
        fd = check(lib.bs_dm_open())
        try:
            version = ffi.new("uint32_t[3]")
            check(lib.bs_dm_version(fd, version))
            require_interface((version[0], version[1], version[2]))
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, (version[0], version[1], version[2]), suffix)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def fileno(self) -> int:
        """Return the descriptor: readable once there was an event since the last `arm`."""
        if self._fd < 0:
            raise ArgumentError("this device-mapper is closed: open it again")
        return self._fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def devices(self) -> list[DeviceEntry]:
        """Return every mapped device of the machine; `DeviceEntry.ours` tells which are ours."""
        fd = self.fileno()
        out, count = growing(lambda out, n: lib.bs_dm_devices(fd, out, n), "struct bs_dm_entry", "devices")
        return [self._entry(out[i]) for i in range(count)]

    def _entry(self, struct: Any) -> DeviceEntry:
        name, uuid = decode_text(struct.name), decode_text(struct.uuid)
        if not uuid and self.version < (4, 45, 0):
            uuid = self._uuid_of(name)
        return DeviceEntry(name, uuid, device_number(struct.device), struct.event_nr)

    def _uuid_of(self, name: str) -> str:
        info = ffi.new("struct bs_dm_info *")
        fd = self.fileno()
        try:
            called(lambda: lib.bs_dm_info(fd, encode_text(name), ffi.NULL, info), name)
        except DeviceNotFoundError:  # removed meanwhile
            return ""
        return decode_text(info.uuid)

    def target_versions(self) -> dict[str, tuple[int, int, int]]:
        """Return the version of each target that the kernel has loaded."""
        fd = self.fileno()
        out, count = growing(
            lambda out, n: lib.bs_dm_target_versions(fd, out, n), "struct bs_dm_target_version", "targets"
        )
        return {decode_text(out[i].name): tuple(out[i].version) for i in range(count)}

    def target_version(self, kind: str) -> tuple[int, int, int]:
        """Return a target's version, its module loaded. Raises NotSupportedError when there is none."""
        if self.version < (4, 41, 0):
            return self._loaded_version(kind)
        out = ffi.new("struct bs_dm_target_version *")
        fd = self.fileno()
        called(lambda: lib.bs_dm_target_version(fd, encode_text(kind), out), kind)
        return out.version[0], out.version[1], out.version[2]

    def _loaded_version(self, kind: str) -> tuple[int, int, int]:
        versions = self.target_versions()
        if kind not in versions:
            raise NotSupportedError(f"no target {kind} is loaded: load its module (modprobe dm-{kind})")
        return versions[kind]

    def arm(self) -> None:
        """Make the descriptor unreadable until the next event of any mapped device."""
        fd = self.fileno()
        called(lambda: lib.bs_dm_arm_poll(fd), "events")

    def await_events(
        self, seen: Mapping[str, int], timeout: float | None = None, *, wakeup: int | None = None
    ) -> dict[str, int]:
        """Wait until a device of `seen` (event counters by uuid) has another counter or is gone.

        Returns the counters as they are then: those of `seen` after the time-out, or once the descriptor
        `wakeup` is readable.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        for fd in [self.fileno()] if wakeup is None else [self.fileno(), wakeup]:
            poll.register(fd, select.POLLIN)
        while True:
            self.arm()  # before the look: what happens after it makes the descriptor readable
            found = {d.uuid: d.event_nr for d in self.devices() if d.uuid in seen}
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if found != seen or left == 0:
                return found
            ready = poll.poll(None if left is None else left * 1000)
            if any(fd == wakeup for fd, _ in ready):
                return found
