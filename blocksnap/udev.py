"""Block devices of the machine: their nodes, their events, and which of them a pool may take.

Where udevd runs its database and events are used, through pyudev; without it the kernel's own (sysfs,
devtmpfs and uevents).
"""

import errno
import os
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from .dm_cookie import left_cookies, udev_runs
from .dm_target import SECTOR, DeviceNumber
from .errors import ArgumentError, BusyError, DeviceNotFoundError, NotSupportedError, system_errors

__all__ = [
    "BlockEvent",
    "BlockEvents",
    "Candidate",
    "candidates",
    "check_unused",
    "left_cookies",
    "make_node",
    "settle",
    "udev_runs",
]

_SYSFS = Path("/sys/dev/block")


def _pyudev() -> Any:
    """Import pyudev where it is used: everything else works on a machine without libudev."""
    try:
        import pyudev
    except ImportError as error:
        raise NotSupportedError(f"no libudev here ({error}): apt-get install libudev1") from None
    return pyudev


# ---- nodes ----


def make_node(number: DeviceNumber) -> str:
    """Return the node of a block device; it is made where nobody else (devtmpfs, udev) makes nodes."""
    try:
        lines = (_SYSFS / str(number) / "uevent").read_text().splitlines()
    except OSError:
        raise DeviceNotFoundError(f"block device {number} does not exist") from None
    path = "/dev/" + dict(line.split("=", 1) for line in lines)["DEVNAME"]
    with system_errors(path):
        try:
            found = os.stat(path)
            if stat.S_ISBLK(found.st_mode) and found.st_rdev == os.makedev(*number):
                return path
            os.unlink(path)
        except FileNotFoundError:
            pass
        os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(*number))
    return path


def settle(number: DeviceNumber, timeout: float = 10.0) -> str:
    """Return the node of a device just made once udevd is done with it; at once where no udevd runs.

    A udevd that does not answer within `timeout` seconds is not waited for any longer.
    """
    deadline = time.monotonic() + timeout
    known = Path(f"/run/udev/data/b{number}")
    if udev_runs() and not known.exists():
        with BlockEvents() as events:
            while not known.exists() and (left := deadline - time.monotonic()) > 0:
                events.wait(min(left, 1.0))
    return make_node(number)


# ---- events ----


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """What happened to a block device: "add", "change" or "remove".

    Only mapped devices have a name and uuid; without udevd only while they are there.
    """

    action: str
    number: DeviceNumber
    kernel_name: str
    name: str
    uuid: str
    links: tuple[str, ...]


class BlockEvents:
    """The events of block devices from now on: udevd's after its rules, or the kernel's where none runs."""

    def __init__(self) -> None:
        pyudev = _pyudev()
        source = "udev" if udev_runs() else "kernel"
        self._monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source=source)
        self._monitor.filter_by("block")
        self._monitor.start()

    def fileno(self) -> int:
        return int(self._monitor.fileno())

    def wait(self, timeout: float) -> BlockEvent | None:
        """Return the next event, None if there is none within `timeout` seconds."""
        device = self._monitor.poll(timeout)
        return None if device is None else _event(device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # the socket goes with the monitor


def _event(device: Any) -> BlockEvent:
    number = DeviceNumber(os.major(device.device_number), os.minor(device.device_number))
    # udevd's rules add them to the event; the kernel's own does not have them.
    mapped = _SYSFS / str(number) / "dm"
    return BlockEvent(
        action=device.action,
        number=number,
        kernel_name=device.sys_name,
        name=device.properties.get("DM_NAME") or _attribute(mapped, "name"),
        uuid=device.properties.get("DM_UUID") or _attribute(mapped, "uuid"),
        links=tuple(device.device_links),
    )


# ---- what a pool may take ----

# Offset, magic, and what it is the mark of.
_MARKS = (
    (0, b"XFSB", "an xfs file system"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (0, b"hsqs", "a squashfs"),
    (3, b"NTFS    ", "an NTFS file system"),
    (32, struct.pack("<Q", 27022010), "the metadata of a thin pool"),
    (512, b"EFI PART", "a partition table"),
    (510, b"\x55\xaa", "a partition table or boot sector"),
    (512, b"LABELONE", "an LVM physical volume"),
    (1024, struct.pack("<I", 0xF2F52010), "an f2fs file system"),
    (1024, struct.pack("<I", 0xE0F5E1E2), "an erofs"),
    (1080, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (4086, b"SWAPSPACE2", "swap space"),
    (4096, struct.pack("<I", 0xA92B4EFC), "a member of an md array"),
    (32769, b"CD001", "an ISO 9660 image"),
    (65600, b"_BHRfS_M", "a btrfs file system"),
)
_LOOKED_AT = 65600 + 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """A block device, and why a pool may not take it (empty if it may)."""

    path: str
    number: DeviceNumber
    size: int
    reason: str


def _attribute(device: Path, name: str) -> str:
    try:
        return (device / name).read_text().strip()
    except OSError:
        return ""


def _in_sysfs(device: Path, path: str) -> str:
    """Return what the kernel holds against a device."""
    if _attribute(device, "size") in ("", "0"):
        return f"{path} is empty"
    if _attribute(device, "ro") == "1":
        return f"{path} is read-only"
    if parts := sorted(part.parent.name for part in device.glob("*/partition")):
        return f"{path} has partitions ({', '.join(parts)})"
    holders = device / "holders"
    if names := sorted(p.name for p in holders.iterdir()) if holders.is_dir() else []:
        return f"{path} is in use by {', '.join(names)}"
    return ""


def _in_content(path: str) -> str:
    """Return what is on a device; opening it for exclusive use fails while it is mounted or in use."""
    with system_errors(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.ENXIO, errno.ENOMEDIUM):
                return f"{path} is {'mounted or in use' if error.errno == errno.EBUSY else 'empty'}"
            raise
        try:
            content = os.pread(descriptor, _LOOKED_AT, 0)
        finally:
            os.close(descriptor)
    for offset, magic, what in _MARKS:
        if content[offset : offset + len(magic)] == magic:
            return f"{path} carries {what}"
    return ""


def _in_udev(number: DeviceNumber, path: str) -> str:
    """Return what udevd found on a device: it knows more marks than we do."""
    if not udev_runs():
        return ""
    pyudev = _pyudev()
    device = pyudev.Devices.from_device_number(pyudev.Context(), "block", os.makedev(*number))
    for name, what in (("ID_FS_TYPE", "file system"), ("ID_PART_TABLE_TYPE", "partition table")):
        if kind := device.properties.get(name):
            return f"{path} carries a {what} ({kind})"
    return ""


def _reason(number: DeviceNumber, path: str) -> str:
    device = _SYSFS / str(number)
    return _in_sysfs(device, path) or _in_content(path) or _in_udev(number, path)


def check_unused(path: str) -> DeviceNumber:
    """Return the number of a block device that a new pool may take.

    Raises BusyError for one that is in use, ArgumentError for one that is none or carries something.
    """
    number = DeviceNumber.of(path)
    reason = _reason(number, path)
    if "in use" in reason:
        raise BusyError(f"{reason}: unmount it or end its users first")
    if reason:
        raise ArgumentError(f"{reason}: take another device, or wipe this one with wipefs")
    return number


def candidates() -> list[Candidate]:
    """Return every disk, partition and loop device of the machine that has a size."""
    return sorted(_candidates(), key=lambda candidate: candidate.path)


def _candidates() -> Iterator[Candidate]:
    for device in _SYSFS.iterdir():
        number = DeviceNumber.parse(device.name)
        size = int(_attribute(device, "size") or 0) * SECTOR
        if size:
            path = make_node(number)
            yield Candidate(path, number, size, _reason(number, path))
