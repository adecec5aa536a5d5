"""How the thin devices of an open pool are shown to programs and to mount(2).

Those of the user engine are files of a FUSE export, and what is mounted is a loop device over one, with
direct I/O so that nothing is cached twice. Those of the kernel engine are block devices already.
"""

import threading
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import ClassVar

from . import mount
from .block_counters import BlockCounters
from .dead_mounts import end_dead_export
from .device_export import DeviceExport
from .dm_target import DeviceNumber
from .engines import EngineDevice
from .errors import NotSupportedError
from .kernel_pool import KernelDevice
from .pool import Pool

__all__ = ["MountSource", "ShownDevices", "shown_devices"]


class MountSource(ABC):
    """The block device that is mounted for a thin device."""

    path: str
    loop: str | None = None
    lives_on: ClassVar[bool] = False
    """Whether a mount of it goes on when this process ends."""

    @abstractmethod
    def mount_entry(self) -> mount.MountEntry | None:
        """Return the youngest mount of it."""

    @abstractmethod
    def written_bytes(self) -> int:
        """Return the bytes written to it so far: take differences."""

    @abstractmethod
    def frozen(self, target: str, timeout: float) -> AbstractContextManager[None]:
        """Keep the file system that is mounted at target whole while a snapshot is taken in the block."""

    def refresh(self) -> None:  # noqa: B027 - what has no size of its own has none to take over
        """Take over a changed size of the device."""

    @abstractmethod
    def detach(self, timeout: float) -> None:
        """Let go of it. BusyError while others have it open."""


class ShownDevices(ABC):
    """The devices of a pool that are shown. Calls may come from any thread."""

    @abstractmethod
    def show(self, name: str, handle: EngineDevice) -> Path:
        """Return where a device is, until `hide`; its handle stays open as long."""

    @abstractmethod
    def hide(self, name: str) -> None: ...

    @abstractmethod
    def attach(self, path: Path, handle: EngineDevice, *, read_only: bool) -> MountSource:
        """Return what to mount for a device that is shown at a path."""

    @abstractmethod
    def stop(self) -> None:
        """Hide everything; what is still open fails from now on."""


def shown_devices(pool: Pool, directory: Path) -> ShownDevices:
    """Return how a pool's engine shows devices; the directory is for an export of files."""
    return MappedDevices() if pool.engine == "kernel" else ExportedFiles(directory)


# ---- the user engine


class _LoopDevice(MountSource):
    """A loop device over an exported file; it detaches by itself when this process dies."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self._loop = mount.LoopDevice.attach(path, read_only=read_only, direct_io=True, autoclear=True)
        self.path = self.loop = self._loop.path

    def mount_entry(self) -> mount.MountEntry | None:
        return next((each for each in reversed(mount.mount_table()) if each.source == self.path), None)

    def written_bytes(self) -> int:
        return self._loop.written_bytes()

    def frozen(self, target: str, timeout: float) -> AbstractContextManager[None]:
        return mount.frozen(target, timeout)

    def refresh(self) -> None:
        self._loop.refresh()

    def detach(self, timeout: float) -> None:
        self._loop.detach(timeout)


class ExportedFiles(ShownDevices):
    """Files of a FUSE export, which is mounted while there is one."""

    def __init__(self, directory: Path) -> None:
        """Take over the directory: what a killed process left mounted there is unmounted."""
        self._directory = directory
        self._lock = threading.Lock()
        self._export: DeviceExport | None = None
        self._names: set[str] = set()
        end_dead_export(directory)
        directory.mkdir(mode=0o700, exist_ok=True)

    def show(self, name: str, handle: EngineDevice) -> Path:
        with self._lock:
            if self._export is None:
                self._export = DeviceExport(self._directory)
            self._export.add(name, handle)
            self._names.add(name)
            return self._export.path(name)

    def hide(self, name: str) -> None:
        with self._lock:
            if self._export is not None:
                self._export.remove(name)
                self._names.discard(name)
                if not self._names:
                    self._export.stop()
                    self._export = None

    def attach(self, path: Path, handle: EngineDevice, *, read_only: bool) -> MountSource:  # noqa: ARG002
        return _LoopDevice(path, read_only=read_only)

    def stop(self) -> None:
        export, self._export = self._export, None
        if export is not None:
            export.stop()
        with suppress(OSError):
            self._directory.rmdir()


# ---- the kernel engine


class _MappedDevice(MountSource):
    """The kernel's own node of a thin device."""

    lives_on = True

    def __init__(self, path: Path, device: KernelDevice) -> None:
        self.path = str(path)
        self._device = device
        self._number = DeviceNumber.of(path)

    def mount_entry(self) -> mount.MountEntry | None:
        known = self.path, str(self._number)
        entries = reversed(mount.mount_table())
        return next((each for each in entries if each.source == known[0] or each.device == known[1]), None)

    def written_bytes(self) -> int:
        return BlockCounters.of(self._number).written_bytes

    def frozen(self, target: str, timeout: float) -> AbstractContextManager[None]:  # noqa: ARG002
        # The snapshot suspends the device, which freezes what is mounted: it cannot be frozen twice.
        return self._device.freezing_within(timeout)

    def detach(self, timeout: float) -> None:
        self._device.await_others(timeout)


class MappedDevices(ShownDevices):
    """Block devices of the kernel, there while a handle is open."""

    def show(self, name: str, handle: EngineDevice) -> Path:
        return Path(_mapped(name, handle).path)

    def hide(self, name: str) -> None:
        pass

    def attach(self, path: Path, handle: EngineDevice, *, read_only: bool) -> MountSource:  # noqa: ARG002
        return _MappedDevice(path, _mapped(str(path), handle))

    def stop(self) -> None:
        pass


def _mapped(name: str, handle: EngineDevice) -> KernelDevice:
    if not isinstance(handle, KernelDevice):
        raise NotSupportedError(f"{name} is no block device of the kernel: export it")
    return handle
