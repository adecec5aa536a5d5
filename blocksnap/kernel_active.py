"""The thin devices of a pool that are active in the kernel, and the handles that share them.

A device is active from its first handle to its last, and longer if a program or a mount has it open.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from os import fspath

from .device_mapper import Control, Device, ThinTarget
from .errors import ArgumentError, BlocksnapError, BusyError, DeviceNotFoundError
from .kernel_backing import Backing, PathArgument
from .kernel_counters import KernelCounters
from .kernel_device import ActiveDevice, KernelDevice, users_of
from .udev import make_node

__all__ = ["ActiveDevices", "open_external_origin"]


class ActiveDevices:
    """The active devices of one pool, by number."""

    def __init__(
        self,
        control: Control,
        identity: str,
        pool: Device,
        what: str,
        commits: threading.Lock,
        counts: KernelCounters,
        require_room: Callable[[str], object],
        *,
        block_size: int,
        read_only: bool,
    ) -> None:
        """identity is what the uuids begin with; commits is held while the pool may not commit; require_room
        raises why a device cannot be written to.
        """
        self._control = control
        self._identity = identity
        self._pool = pool
        self._what = what
        self._commits = commits
        self._counts = counts
        self._require_room = require_room
        self._block_size = block_size
        self._read_only = read_only
        self._lock = threading.RLock()
        self._active: dict[int, ActiveDevice] = {}
        self._handles: list[KernelDevice] = []
        self._abandoned = False

    def find(self, device_id: int) -> ActiveDevice | None:
        return self._active.get(device_id)

    def open(self, device_id: int, size: int, *, external_origin: PathArgument | None = None) -> KernelDevice:
        """Return a new handle of a device, which becomes active with its first."""
        with self._lock:
            active = self._active.get(device_id)
            if active is None:
                active = self._active[device_id] = self._activate(device_id, size, external_origin)
            active.open()
            active.handles += 1
            handle = KernelDevice(active, self._called(device_id), self._commits, self._release)
            self._handles = [each for each in self._handles if not each.closed] + [handle]
            return handle

    def take_over(self, thin: Mapping[int, Device]) -> None:
        """Know the devices that a killed process left active and in use."""
        for device_id, device in thin.items():
            (target,) = device.table()
            below = target.external_origin if isinstance(target, ThinTarget) else None
            origin = None if below is None else Backing(make_node(below))
            self._active[device_id] = self._make_active(device_id, device, target.length, origin)

    def _activate(self, device_id: int, size: int, external_origin: PathArgument | None) -> ActiveDevice:
        origin = None if external_origin is None else open_external_origin(external_origin)
        try:
            device = Device.create(
                self._control,
                f"blocksnap-{self._identity}-{device_id}",
                [ThinTarget(size, self._pool.number, device_id, origin.number if origin else None)],
                uuid=f"{self._identity}-{device_id}",
                read_only=self._read_only,
            )
            try:
                return self._make_active(device_id, device, size, origin)
            except BaseException:
                device.remove()
                raise
        except BaseException:
            if origin is not None:
                origin.close()
            raise

    def _make_active(self, device_id: int, device: Device, size: int, origin: Backing | None) -> ActiveDevice:
        self._counts.watch(device.number)
        return ActiveDevice(
            device,
            size,
            self._block_size,
            self._called(device_id),
            self._counts,
            self._require_room,
            read_only=self._read_only,
            origin=origin,
        )

    def _called(self, device_id: int) -> str:
        return f"thin device {device_id} of {self._what.removeprefix('the ')}"

    def _release(self, active: ActiveDevice) -> None:
        """Let a handle go; the last one takes the device out of the kernel, unless others have it open."""
        with self._lock:
            active.handles -= 1
            if active.handles == 0 and not self._abandoned:
                with suppress(BusyError):
                    self._deactivate(active, timeout=0.5)

    def _deactivate(self, active: ActiveDevice, timeout: float) -> None:
        with suppress(BlocksnapError):  # the pool is full or has failed: it tells so itself
            active.flush()
        active.close()
        self._counts.forget(active.device.number)
        try:
            active.device.remove(timeout=timeout)
        except DeviceNotFoundError:
            pass  # a deferred removal took it away
        except BaseException:
            self._counts.watch(active.device.number)
            raise
        if active.origin is not None:
            active.origin.abandon()
        for device_id, each in list(self._active.items()):
            if each is active:
                del self._active[device_id]

    # ---- in use

    def users_of(self, device_id: int, timeout: float = 5.0) -> str:
        """Return who uses a device; empty if nobody does: it is then not active any more.

        What opens it for a moment (a scan of new devices) is waited for.
        """
        with self._lock:
            active = self._active.get(device_id)
            if active is not None and active.handles == 0:
                with suppress(BusyError):
                    self._deactivate(active, timeout)
                active = self._active.get(device_id)
            return "" if active is None else f"{active.device.path}: {users_of(active.device)}"

    def require_unused(self, device_id: int) -> None:
        if users := self.users_of(device_id):
            raise self._busy(device_id, users)

    def _busy(self, device_id: int, users: str) -> BusyError:
        return BusyError(f"{self._called(device_id)} is in use ({users}): unmount or close it first")

    def remove_when_unused(self, device_id: int) -> None:
        """Have the kernel remove a device at its last close."""
        with self._lock:
            active = self._active.get(device_id)
            if active is not None and active.handles == 0:
                with suppress(DeviceNotFoundError):
                    active.device.remove(deferred=True)

    # ---- all of them

    def flush(self) -> None:
        for active in list(self._active.values()):
            active.flush()

    def busy(self) -> dict[int, BusyError]:
        """Return the errors of those in use; the others are not active any more."""
        with self._lock:
            users = {device_id: self.users_of(device_id) for device_id in list(self._active)}
            return {device_id: self._busy(device_id, who) for device_id, who in users.items() if who}

    def abandon(self) -> None:
        """Drop every handle and leave the devices in the kernel."""
        self._abandoned = True
        for handle in self._handles:
            handle.forget()
        for active in self._active.values():
            active.close()
            if active.origin is not None:
                active.origin.abandon()
        self._active.clear()


def open_external_origin(path: PathArgument) -> Backing:
    """Return a file or block device, read-only; ArgumentError for a block device that can be written to."""
    origin = Backing(path, read_only=True)
    if not origin.read_only:
        origin.close()
        raise ArgumentError(
            f"{fspath(path)} can be written to, which would change every device on it:"
            " make it read-only (blockdev --setro)"
        )
    return origin
