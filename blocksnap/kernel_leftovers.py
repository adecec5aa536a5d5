"""Devices and cookies that a process which ran a pool in the kernel left there when it was killed."""

from contextlib import suppress
from os import PathLike

from .device_mapper import UUID_PREFIX, Control, Device
from .dm_cookie import remove_left_cookies
from .errors import BlocksnapError, BusyError, NotSupportedError, PrivilegeError
from .kernel_backing import identity_of, locked
from .kernel_device import users_of

__all__ = ["remove_devices", "remove_leftovers"]


def _leftovers(control: Control, identity: str) -> list[Device]:
    """Return the devices of a pool in the kernel, the pool itself last."""
    prefix = f"{UUID_PREFIX}{identity}-"
    found = [
        Device(control, entry.name, entry.uuid, entry.number, private=entry.uuid.endswith("-pool"))
        for entry in control.devices()
        if entry.uuid.startswith(prefix)
    ]
    return sorted(found, key=lambda device: device.private)


def remove_devices(control: Control, identity: str) -> None:
    """Take the devices of a pool out of the kernel; the caller holds the lock of the pool."""
    found = _leftovers(control, identity)
    for device in reversed(found):  # a thin device cannot go while its pool is suspended
        if device.info().suspended:
            with suppress(BlocksnapError):
                device.resume()
    for device in found:
        try:
            device.remove()
        except BusyError:
            raise BusyError(
                f"{device.path}, left by a process that was killed, is in use ({users_of(device)}):"
                " unmount or close it first"
            ) from None


def remove_leftovers(metadata: str | PathLike[str]) -> None:
    """Take a pool that a killed process left live out of the kernel; BusyError if its process lives."""
    try:
        control = Control.open()
    except (NotSupportedError, PrivilegeError):
        return
    remove_left_cookies()
    with control:
        identity = identity_of(metadata)
        if _leftovers(control, identity):
            with locked(metadata):
                remove_devices(control, identity)
