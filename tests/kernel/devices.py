"""Loop devices and mapped devices for kernel tests, and the sweeping of what a test leaves."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blocksnap.device_mapper import UUID_PREFIX, Control, Device, DeviceNumber, LinearTarget
from blocksnap.errors import BlocksnapError, BusyError
from blocksnap.mount import LoopDevice

MIB = 1 << 20
BLOCK = 64 << 10

__all__ = ["BLOCK", "MIB", "Disks", "linear", "read_at", "sweep", "write_at"]


def leftovers(control: Control) -> list[Device]:
    """Return the devices that a test made: ours by uuid, and by the suffix that only tests use."""
    assert control.name_suffix, "without a suffix a test's devices cannot be told from others"
    return [
        Device(control, entry.name, entry.uuid, entry.number)
        for entry in control.devices()
        if entry.uuid.startswith(UUID_PREFIX) and entry.name.endswith(control.name_suffix)
    ]


def sweep(control: Control) -> list[str]:
    """Remove a test's devices, upper ones first; return the names of all that were there."""
    names = [device.name for device in leftovers(control)]
    for _ in names:
        for device in leftovers(control):
            _try_to_remove(device)
    still = [device.name for device in leftovers(control)]
    assert not still, f"cannot be removed: {still}"
    return names


def _try_to_remove(device: Device) -> None:
    try:
        if device.info().suspended:
            device.resume()
        device.remove(timeout=0)
    except BusyError:
        pass  # below another one, which goes in this pass or the next
    except BlocksnapError as error:
        print(f"{device.name}: {error}")


class Disks:
    """Block devices for a test: files in its directory, attached to loop devices."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._loops: dict[str, LoopDevice] = {}

    def file(self, name: str, size: int = 0) -> Path:
        """Return a file of the directory, made or grown to a size."""
        path = self._directory / name
        if size:
            with path.open("ab") as file:
                file.truncate(max(size, file.tell()))
        return path

    def attach(self, name: str, size: int = 0) -> DeviceNumber:
        """Return the loop device of a file, attached or told of the file's size."""
        path = self.file(name, size)
        if name in self._loops:
            self._loops[name].refresh()
        else:
            self._loops[name] = LoopDevice.attach(path)
        return DeviceNumber.of(self._loops[name].path)

    def path(self, name: str) -> str:
        return self._loops[name].path

    def detach(self) -> None:
        while self._loops:
            self._loops.popitem()[1].detach()


def linear(control: Control, name: str, device: DeviceNumber, length: int, offset: int = 0) -> Device:
    return Device.create(control, name, [LinearTarget(length, device, offset)])


@contextmanager
def _opened(path: str | Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_at(path: str | Path, offset: int, content: bytes) -> None:
    """Write to a device and wait until it has it."""
    with _opened(path, os.O_WRONLY) as descriptor:
        assert os.pwrite(descriptor, content, offset) == len(content)
        os.fsync(descriptor)


def read_at(path: str | Path, offset: int, length: int) -> bytes:
    """Read what the device has, not what the page cache remembers of an earlier table."""
    with _opened(path, os.O_RDONLY) as descriptor:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(descriptor, length, offset)
