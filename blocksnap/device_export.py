"""Thin devices as files of a FUSE file system, for loop devices and programs that want a file."""

from pathlib import Path

from ._native import check, encode, ffi, lib
from .engines import EngineDevice
from .errors import NotSupportedError
from .user_pool import UserDevice

__all__ = ["DeviceExport"]

_THREADS = 8


class DeviceExport:
    """A mounted FUSE file system in which each added device is a file of its size."""

    def __init__(self, mountpoint: Path, *, threads: int = _THREADS) -> None:
        """Mount it. Only the user who does so, and root's loop devices, may open the files."""
        result = ffi.new("struct bs_export **")
        check(lib.bs_export_start(encode(str(mountpoint)), threads, 0, result))
        self._pointer = result[0]
        self.mountpoint = mountpoint

    def path(self, name: str) -> Path:
        return self.mountpoint / name

    def add(self, name: str, device: EngineDevice) -> None:
        """Show a device as a file; it must stay open until `remove` or `stop`."""
        if not isinstance(device, UserDevice):
            raise NotSupportedError(f"{name} is a block device of the kernel already: mount {device.path}")
        with device.handle() as pointer:
            check(lib.bs_export_add(self._pointer, encode(name), pointer))

    def remove(self, name: str) -> None:
        """Take a file away. BusyError while it is open."""
        check(lib.bs_export_remove(self._pointer, encode(name)))

    def stop(self) -> None:
        """Unmount and end; files that are still open fail from now on."""
        pointer, self._pointer = self._pointer, ffi.NULL
        lib.bs_export_stop(pointer)
