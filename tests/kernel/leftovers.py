"""What a test leaves behind in the kernel is cleared by force, so that it fails no test but its own."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from blocksnap import mount
from blocksnap.device_mapper import Control, Device
from blocksnap.dm_cookie import own_left_cookies, remove_left_cookies
from blocksnap.dm_target import OtherTarget
from blocksnap.errors import ArgumentError, BlocksnapError, NotSupportedError, PrivilegeError
from blocksnap.mount_users import processes_on
from tests.kernel.devices import leftovers
from tests.processes import processes_below

__all__ = ["clear"]

_GRACE_SECONDS = 5.0
"""A server ends by itself after the last mount, and its loop devices after it."""


def clear(base: Path, grace: float = _GRACE_SECONDS) -> list[str]:
    """Take away what was made below a directory, or by the suffix of tests, and stays there; name it."""
    try:
        control = Control.open()
    except (NotSupportedError, PrivilegeError):
        return []
    deadline = time.monotonic() + grace
    with control:
        while (left := [*_left(base, control)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            _end_processes(base)
            _end_mounts(base, control)
            _end_devices(control)
            _detach_loops(base)
            remove_left_cookies()
    return left


def _left(base: Path, control: Control) -> Iterator[str]:
    yield from (f"{entry.source} mounted at {entry.target}" for entry in _mounts(base, control))
    yield from (f"process {process}" for process in _processes(base))
    yield from (device.name for device in leftovers(control))
    yield from (f"{loop.path} over {loop.backing_path}" for loop in mount.loop_devices(below=base))
    yield from (f"cookie {key:#x}" for key in own_left_cookies(older_than=0))


def _mounts(base: Path, control: Control) -> list[mount.MountEntry]:
    ours = {str(device.number) for device in leftovers(control)}
    return [
        entry
        for entry in mount.mount_table()
        if Path(entry.target).is_relative_to(base) or entry.device in ours
    ]


def _processes(base: Path) -> set[int]:
    """Return the processes with an open file or an argument below a directory, but this one."""
    return {*processes_on(str(base)), *processes_below(base)} - {os.getpid()}


def _end_processes(base: Path) -> None:
    for process in _processes(base):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _end_mounts(base: Path, control: Control) -> None:
    for entry in reversed(_mounts(base, control)):
        with suppress(ArgumentError):  # it is not frozen
            mount.thaw(entry.target)
        mount.unmount(entry.target, lazy=True, abort=True)


def _end_devices(control: Control) -> None:
    """Have all requests of devices fail, then remove them: at once, or when their last user goes.

    A pool must not fail below its thin devices: those on top come first, which lets go of what they stand on.
    """
    found = leftovers(control)
    while top := [device for device in found if not device.holders()]:
        found = [device for device in found if device not in top]
        for device in top:
            with suppress(BlocksnapError):
                _make_fail(device)
    for device in leftovers(control):
        _remove(device)


def _make_fail(device: Device) -> None:
    table = device.table() or device.table(pending=True)
    device.load([OtherTarget(sum(target.length for target in table), "error", "")])
    if not device.info().suspended:
        device.suspend(noflush=True, skip_lockfs=True)
    device.resume()


def _remove(device: Device) -> None:
    try:
        device.remove(timeout=1)
    except BlocksnapError:
        with Control.open(name_suffix="") as plain:  # under a name that no test meets again
            held = Device.open(plain, device.name)
            held.rename(f"{device.name}-{held.number.minor}-held")
            held.remove(deferred=True)


def _detach_loops(base: Path) -> None:
    for loop in mount.loop_devices(below=base):
        with suppress(BlocksnapError):  # the kernel detaches it at its last close
            loop.detach(timeout=1)
