"""Devices and cookies that a process which ran a pool in the kernel left there when it was killed.

What nobody uses is removed. A device that is mounted or open works on, and the pool with it: the kernel
engine takes such a pool over as it is, the user engine names who uses it.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from .device_mapper import UUID_PREFIX, Control, Device, ThinPoolTarget
from .dm_cookie import remove_left_cookies
from .errors import BlocksnapError, BusyError, NotSupportedError, PrivilegeError
from .kernel_backing import identity_of, locked
from .kernel_device import users_of
from .mount import loop_files
from .udev import make_node

__all__ = ["LeftPool", "clear_devices", "left_pools", "remove_leftovers"]

_SCAN_SECONDS = 1.0
"""How long something that looks at every new device may have one open."""


@dataclass(frozen=True, slots=True)
class LeftPool:
    """A pool that is live in the kernel, and its thin devices in use by id."""

    device: Device
    thin: Mapping[int, Device]

    @property
    def target(self) -> ThinPoolTarget:
        (target,) = self.device.table()
        assert isinstance(target, ThinPoolTarget)
        return target

    def busy(self) -> BusyError:
        """Return the error that says who uses it."""
        device = next(iter(self.thin.values()))
        return BusyError(
            f"{device.path}, left by a process that was killed, is in use ({users_of(device)}):"
            " unmount or close it first"
        )


def _leftovers(control: Control, identity: str) -> list[Device]:
    """Return the devices of a pool in the kernel, the pool itself last."""
    prefix = f"{UUID_PREFIX}{identity}-"
    found = [
        Device(control, entry.name, entry.uuid, entry.number, private=entry.uuid.endswith("-pool"))
        for entry in control.devices()
        if entry.uuid.startswith(prefix)
    ]
    return sorted(found, key=lambda device: device.private)


def clear_devices(control: Control, identity: str) -> LeftPool | None:
    """Take the devices of a pool that nobody uses out of the kernel; return what stays.

    The caller holds the lock of the pool.
    """
    found = _leftovers(control, identity)
    for device in reversed(found):  # a thin device cannot go while its pool is suspended
        if device.info().suspended:
            with suppress(BlocksnapError):
                device.resume()
    used = {_id_of(device): device for device in found if not (device.private or _removed(device))}
    pools = [device for device in found if device.private]
    if used:
        return LeftPool(pools[0], used)
    for device in pools:
        device.remove()
    return None


def left_pools() -> list[str]:
    """Return the metadata (a file or device) of each pool that is live in the kernel for no process."""
    try:
        control = Control.open()
    except (NotSupportedError, PrivilegeError):
        return []
    with control:
        pools = [entry.uuid for entry in control.devices() if entry.ours and entry.uuid.endswith("-pool")]
        paths = {uuid: _metadata_of(Device.open(control, uuid=uuid)) for uuid in pools}
    return [path for uuid, path in paths.items() if path and _is_left(path, uuid)]


def _metadata_of(device: Device) -> str:
    """Return where the metadata of a live pool lie, empty if that is nowhere in sight."""
    (target,) = device.table()
    if not isinstance(target, ThinPoolTarget):
        return ""
    node = make_node(target.metadata)
    return loop_files().get(node, node)


def _is_left(path: str, uuid: str) -> bool:
    if not Path(path).exists() or uuid != f"{UUID_PREFIX}{identity_of(path)}-pool":
        return False
    try:
        with locked(path):
            return True
    except BlocksnapError:
        return False


def _id_of(device: Device) -> int:
    return int(device.uuid.rpartition("-")[2])


def _removed(device: Device) -> bool:
    try:
        device.remove(timeout=_SCAN_SECONDS)
    except BusyError:
        return False
    return True


def remove_leftovers(metadata: str | PathLike[str], *, take_over: bool = False) -> None:
    """Take a pool that a killed process left live out of the kernel; BusyError if its process lives.

    Devices in use are for the caller to take over, else BusyError says who uses them.
    """
    try:
        control = Control.open()
    except (NotSupportedError, PrivilegeError):
        return
    remove_left_cookies()
    with control:
        identity = identity_of(metadata)
        if not take_over and _leftovers(control, identity):
            with locked(metadata):
                left = clear_devices(control, identity)
            if left is not None:
                raise left.busy()
