"""Layers as the kernel's classic snapshots: for the comparison only, as what thin pools took the place of.

<root>/dm-snapshot/ID/store     the file system of a layer without a parent, else what the layer changes
<root>/dm-snapshot/ID/figures   what its device has written
<root>/mnt/ID                   where it is mounted

A chain of layers is a chain of snapshots of snapshots, through which every read of old content goes. An
origin must stay as it is: no snapshot is taken of a layer in use, and one with children is mounted for
reading only. Layers of images stay active when they are unmounted: others are on them, or soon will be. All
that nobody uses is taken out of the kernel by the next close, cleanup or open of a driver.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from .. import mount
from ..device_mapper import Control, Device, SnapshotTarget
from ..errors import ArgumentError, BusyError, NotSupportedError
from ..file_system import make_file_system
from ..kernel_backing import identity_of
from ..units import Size, format_size, parse_size
from .base import Accounting
from .devicemapper import missing_device_mapper
from .directory import DirectoryDriver, backing_filesystem
from .snapshot_device import SECTOR, Figures, SnapshotDevice
from .tree_copy import copy_tree

__all__ = ["DmSnapshotDriver"]

_CHUNK_SIZE, _LARGEST_CHUNK = 4 << 10, 1 << 20
_EXCEPTION_BYTES = 16


class DmSnapshotDriver(DirectoryDriver):
    """Layers as classic snapshots, with an ext4 file system on the lowest."""

    name: ClassVar[str] = "dm-snapshot"
    engine: ClassVar[str] = "kernel"
    deepest: ClassVar[int | None] = (
        24  # the kernel ends a request level inside level; at 50 its stack is full
    )

    def __init__(self, root: Path, *, block_size: Size = _CHUNK_SIZE, base_size: Size = "10G") -> None:
        """block_size is the chunk of layers made from now on, base_size the size of one without a parent."""
        super().__init__(root)
        self._chunk_size = _parse_chunk(block_size)
        self._base_size = parse_size(base_size, "base size") // SECTOR * SECTOR
        self._mounts = self.root / "mnt"
        self._mounts.mkdir(mode=0o700, exist_ok=True)
        self._identity = identity_of(self._layers.path)
        self._control: Control | None = None
        with self._home.lock.hold():
            self._unmount_abandoned()
            self._deactivate_unused()

    @classmethod
    def missing(cls, root: Path) -> str | None:  # noqa: ARG003 - the root's file system does not matter
        return missing_device_mapper(SnapshotTarget.type)

    @classmethod
    def block_sizes(cls, wanted: Sequence[int]) -> Sequence[int | None]:
        """Return the default chunk if it is wanted; of larger ones nobody tells what the kernel copies."""
        return [size for size in wanted if size == _CHUNK_SIZE]

    def close(self) -> None:
        """Take what nobody uses out of the kernel."""
        with self._home.lock.hold():
            self._deactivate_unused()
        control, self._control = self._control, None
        if control is not None:
            control.close()

    def cleanup(self) -> None:
        super().cleanup()
        with self._home.lock.hold():
            self._deactivate_unused()

    # ---- questions

    def status(self) -> list[tuple[str, str]]:
        return [
            ("Root", str(self.root)),
            ("Purpose", "comparison only"),
            ("Chunk Size", format_size(self._chunk_size)),
            ("Base Device Size", format_size(self._base_size)),
            ("Backing Filesystem", backing_filesystem(self.root)),
            ("Layers", str(len(self.layers()))),
        ]

    def metadata(self, id: str) -> dict[str, str]:
        self._check_known(id)
        layer = self._device(id)
        found = {"Store": str(layer.store), "ChunkSize": str(layer.figures().chunk_size)}
        device = layer.find()
        if device is not None:
            found |= {"DeviceName": device.name, "Node": device.path}
        return found

    def accounting(self, id: str) -> Accounting:
        """Return what the layer's device and store have counted.

        With chunks of the default size each write covers whole chunks: nothing is copied, and what the store
        got beyond the writes is its list of chunks. With larger ones the two cannot be told apart.
        """
        self._check_known(id)
        figures = self._device(id).figures()
        exact = figures.chunk_size == SECTOR and figures.stored_bytes is not None
        written = figures.written_bytes or 0
        return Accounting(
            filesystem_bytes=figures.written_bytes,
            data_bytes=figures.written_bytes,
            copy_bytes=figures.copied_bytes if exact else None,
            zero_filled_bytes=0,
            metadata_bytes=max(0, (figures.stored_bytes or 0) - written) if exact else None,
            allocated_bytes=figures.allocated_bytes,
        )

    # ---- layers

    def _create(self, id: str, parent: str | None, *, writable: bool) -> None:
        size = self._base_size
        if parent is not None:
            self._require_shallow(id, parent)
            self._settle(parent)
            size = self._device(parent).figures().size
        with self._layers.new(id, parent) as staging:
            Figures(size, self._chunk_size, writable).save(staging / "figures")
            _make_file(staging / "store", size if parent is None else self._store_size(size))
            if parent is None:
                with mount.LoopDevice.attach(staging / "store", sector_size=SECTOR) as loop:
                    make_file_system(Path(loop.path), "ext4")

    def _require_shallow(self, id: str, parent: str) -> None:
        depth = 1 + len(self._layers.ancestors(parent))
        if self.deepest is not None and depth >= self.deepest:
            raise NotSupportedError(
                f'layer "{id}" would be the {depth + 1}th of its chain: the kernel bears no more than'
                f" {self.deepest} stacked snapshots; use fewer layers"
            )

    def _settle(self, origin: str) -> None:
        """Make sure that nobody writes to a layer from now on."""
        if self.children(origin):
            return
        if holders := self._home.holders(origin):
            raise BusyError(
                f'layer "{origin}" is in use by {holders[0]}: a classic snapshot wants an origin that nobody'
                " writes to; unmount it first"
            )
        self._unmount(origin)

    def _store_size(self, size: int) -> int:
        """Return room for every chunk of a device, the list of them, and the head."""
        chunks = -(-size // self._chunk_size)
        lists = -(-chunks * _EXCEPTION_BYTES // self._chunk_size)
        return (chunks + lists + 2) * self._chunk_size

    def _snapshot(self, id: str, origin: str) -> None:
        old = self._device(origin).figures()
        with self._layers.new(id, self.parent(origin)) as staging:
            copied = copy_tree(self._layers.path / origin, staging, reflink=True)
            (staging / "parent").unlink()
            made = replace(old, written_bytes=0, stored_bytes=0, copied_bytes=copied, before=None)
            made.save(staging / "figures")

    def _remove(self, id: str) -> None:
        self._device(id).deactivate()
        self._layers.remove(id)

    # ---- mounts

    def _mount(self, id: str, mount_label: str, *, read_only: bool, lasting: bool) -> Path:  # noqa: ARG002
        target = self._mounts / id
        target.mkdir(mode=0o700, exist_ok=True)
        if mount.is_mounted(target):
            if read_only or not _is_read_only(target):
                return target
            mount.unmount(target)
        layer, device = self._device(id), self._activate(id)
        if read_only:
            device = layer.view(device)
        else:
            layer.end_view()
        label = f'context="{mount_label}"' if mount_label else ""
        options = ",".join(filter(None, ("noload" if read_only else "", label)))
        mount.mount(device.path, target, "ext4", read_only=read_only, noatime=True, options=options)
        return target

    def _unmount(self, id: str) -> None:
        target = self._mounts / id
        if mount.is_mounted(target):
            mount.unmount(target)
        with suppress(FileNotFoundError):
            target.rmdir()
        layer = self._device(id)
        if layer.figures().writable and not self.children(id):
            layer.deactivate()

    def _unmount_abandoned(self) -> None:
        """Unmount the layers whose holders died without a put, but what somebody still uses."""
        for entry in mount.mount_table():
            target = Path(entry.target)
            if target.parent == self._mounts and self.exists(target.name) and not self.holders(target.name):
                with suppress(BusyError):
                    self._unmount(target.name)

    # ---- devices

    def _device(self, id: str) -> SnapshotDevice:
        if self._control is None:
            self._control = Control.open()
        return SnapshotDevice(self._control, self._layers.path / id, self._identity)

    def _activate(self, id: str) -> Device:
        self._layers.ancestors(id)  # they have an end
        parent = self.parent(id)
        return self._device(id).activate(None if parent is None else partial(self._activate, parent))

    def _deactivate_unused(self) -> None:
        """Take the devices that nobody uses out of the kernel, upper ones first."""
        active = [layer for layer in map(self._device, self.layers()) if layer.find() is not None]
        while active:
            busy = [layer for layer in active if not _deactivated(layer)]
            if len(busy) == len(active):
                return
            active = busy


def _deactivated(layer: SnapshotDevice) -> bool:
    try:
        layer.deactivate()
    except BusyError:
        return False
    return True


def _parse_chunk(size: Size) -> int:
    chunk = parse_size(size, "block size")
    if chunk & (chunk - 1) or not _CHUNK_SIZE <= chunk <= _LARGEST_CHUNK:
        raise ArgumentError(f"chunks of {format_size(chunk)}: take a power of two from 4K to 1M")
    return chunk


def _make_file(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _is_read_only(target: Path) -> bool:
    return any(
        entry.target == str(target) and "ro" in entry.options.split(",") for entry in mount.mount_table()
    )
