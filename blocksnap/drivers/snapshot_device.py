"""One layer of the driver dm-snapshot as a device of the kernel, and the account of what went through it.

The device of a layer without a parent is its store, a file with a file system; that of any other a classic
snapshot of its parent's device, with the store for what was written to it. A device that is mounted cannot be
an origin, nor the other way: where a layer may be one, a snapshot-origin over its device is mounted instead.
The kernel tells what a device has written only while it is there: `figures` keeps the sums of before.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..block_counters import BlockCounters
from ..device_mapper import (
    UUID_PREFIX,
    Control,
    Device,
    DeviceNumber,
    LinearTarget,
    SnapshotOriginTarget,
    SnapshotStatus,
    SnapshotTarget,
    Target,
)
from ..errors import BusyError, DeviceIOError, DeviceNotFoundError
from ..mount import LoopDevice
from ..udev import make_node
from .root import never_written, read_note, write_durable

__all__ = ["SECTOR", "Figures", "SnapshotDevice"]

SECTOR = 4096
"""No request is smaller, so none covers a chunk of the default size in part."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What is known of a layer: bytes so far, None for what a crash has made unknown.

    size is that of its device; a writable one is a container's, which will have no children. written_bytes
    went to the device, stored_bytes to the store, which holds allocated_bytes; copied_bytes were copied to
    make it. While it is active, before is what its loop device had counted when it began.
    """

    size: int
    chunk_size: int
    writable: bool
    written_bytes: int | None = 0
    stored_bytes: int | None = 0
    allocated_bytes: int = 0
    copied_bytes: int = 0
    before: int | None = None

    @classmethod
    def load(cls, path: Path) -> "Figures":
        text = read_note(path)
        try:
            figures = cls(**json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            raise never_written(path, text) from error
        unknown = (figures.written_bytes, figures.stored_bytes, figures.before)
        known = (figures.size, figures.chunk_size, figures.allocated_bytes, figures.copied_bytes)
        numbers = [*known, *(number for number in unknown if number is not None)]
        fits = all(type(number) is int and number >= 0 for number in numbers) and all(known[:2])
        if not fits or type(figures.writable) is not bool:
            raise never_written(path, text)
        return figures

    def save(self, path: Path) -> None:
        write_durable(path, json.dumps(asdict(self)))

    def begun(self, before: int) -> "Figures":
        if self.before is None:
            return replace(self, before=before)
        return replace(self, written_bytes=None, stored_bytes=None, before=before)

    def with_activity(self, written: int, counted: int, allocated: int) -> "Figures":
        """Return the figures with those of an activity that ends now."""
        ended = replace(self, allocated_bytes=allocated, before=None)
        if self.written_bytes is None or self.stored_bytes is None or self.before is None:
            return replace(ended, written_bytes=None, stored_bytes=None)
        stored = self.stored_bytes + counted - self.before
        return replace(ended, written_bytes=self.written_bytes + written, stored_bytes=stored)


class SnapshotDevice:
    """The device of the layer in a directory, active or not."""

    def __init__(self, control: Control, directory: Path, identity: str) -> None:
        """`identity` tells the driver's root from every other on this machine."""
        self.directory = directory
        self._control = control
        self._key = f"{identity}-{directory.stat().st_ino}"
        self._figures = directory / "figures"

    @property
    def store(self) -> Path:
        return self.directory / "store"

    def find(self) -> Device | None:
        """Return the device if it is active."""
        return self._find(self._key)

    def _find(self, key: str) -> Device | None:
        try:
            return Device.open(self._control, uuid=f"{UUID_PREFIX}{key}")
        except DeviceNotFoundError:
            return None

    def view(self, device: Device) -> Device:
        """Return what to mount, for reading only, of a device that may be an origin."""
        key = f"{self._key}-view"
        target = SnapshotOriginTarget(device.table()[0].length, device.number)
        return self._find(key) or self._create(key, target, read_only=True)

    def activate(self, origin: Callable[[], Device] | None) -> Device:
        """Make the device, unless it is there; `origin` gives that of the parent, if there is one."""
        device = self.find()
        if device is not None:
            return self._require_valid(device)
        loop = LoopDevice.attach(self.store, direct_io=True, autoclear=True, sector_size=SECTOR)
        try:
            Figures.load(self._figures).begun(loop.written_bytes()).save(self._figures)
            number = DeviceNumber.of(loop.path)
            device = self._create(self._key, self._target(number, origin and origin()))
        finally:
            with suppress(BusyError):  # it stays as long as the device that is made on it
                loop.detach(timeout=0)
        return self._require_valid(device)

    def _target(self, number: DeviceNumber, origin: Device | None) -> Target:
        figures = Figures.load(self._figures)
        if origin is None:
            return LinearTarget(figures.size, number)
        return SnapshotTarget(figures.size, origin.number, number, figures.chunk_size)

    def _create(self, key: str, target: Target, *, read_only: bool = False) -> Device:
        name = f"blocksnap-{key}"
        device = Device.create(self._control, name, [target], uuid=key, read_only=read_only, private=True)
        make_node(device.number)
        return device

    def _require_valid(self, device: Device) -> Device:
        if isinstance(device.table()[0], SnapshotTarget) and _used(device) is None:
            raise DeviceIOError(
                f'layer "{self.directory.name}" is lost: its store could not be written to; remove the layer'
            )
        return device

    def end_view(self) -> None:
        """Let the device be mounted itself. BusyError while its view is mounted."""
        view = self._find(f"{self._key}-view")
        if view is not None:
            self._require_unused(view)
            view.remove()

    def deactivate(self) -> None:
        """Take the device out of the kernel. BusyError while it is mounted or the origin of an active one."""
        device = self.find()
        if device is None:
            return
        self.end_view()
        self._require_unused(device)
        figures = self._figures_with(device)
        device.remove()
        figures.save(self._figures)

    def _require_unused(self, device: Device) -> None:
        if device.info().open_count:
            raise BusyError(f'{device.path} of layer "{self.directory.name}" is in use: unmount it first')

    def figures(self) -> Figures:
        device = self.find()
        return Figures.load(self._figures) if device is None else self._figures_with(device)

    def _figures_with(self, device: Device) -> Figures:
        (target,) = device.table()
        number = target.cow if isinstance(target, SnapshotTarget) else device.dependencies()[0]
        allocated = _used(device) if isinstance(target, SnapshotTarget) else self.store.stat().st_blocks * 512
        return Figures.load(self._figures).with_activity(
            BlockCounters.of(device.number).written_bytes,
            BlockCounters.of(number).written_bytes,
            allocated or 0,
        )


def _used(device: Device) -> int | None:
    """Return what a snapshot's store holds, None if the snapshot is lost."""
    (status,) = device.status()
    return status.used_bytes if isinstance(status, SnapshotStatus) else None
