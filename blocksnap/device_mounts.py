"""Mounting thin devices of an open pool: showing them, file systems on them, and the way back.

As root the kernel mounts the file system from the block device that shown_devices.py gives; without privilege
fuse2fs mounts it from the exported file.

This process never opens, reads or asks for anything on its own export or above it, but in child processes: a
thread that waits for an answer of its own process cannot be killed, and keeps the dead export from failing.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from . import mount
from .engines import EngineDevice
from .errors import ArgumentError, BlocksnapError, BusyError, NeedsCheckError
from .file_system import Fuse2fs, grow_ext4, make_file_system, may_mount
from .mount_users import mount_users
from .pool import Pool
from .shown_devices import MountSource, shown_devices

__all__ = ["DeviceMount", "DeviceMounts"]

_OPTIONS = {"ext4": "discard", "xfs": "discard,nouuid", "btrfs": "discard"}
_WITHOUT_LOG = {"ext4": "noload", "xfs": "norecovery", "btrfs": "rescue=nologreplay"}
_DETACH_SECONDS = 5.0
_END_SECONDS = 3.0
_RETRY_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class DeviceMount:
    """A mounted thin device.

    node is the block device that is mounted, None where fuse2fs mounts the exported file; loop the same where
    that is a loop device.
    """

    device: str
    target: str
    filesystem: str
    loop: str | None
    read_only: bool
    node: str | None = None


@dataclass(slots=True)
class _Active:
    """What there is between a device and its mount; source or process is set."""

    shown: DeviceMount
    handle: EngineDevice
    source: MountSource | None = None
    process: Fuse2fs | None = None
    written_before: int = 0

    @property
    def lives_on(self) -> bool:
        """Whether the mount goes on when this process ends."""
        return self.source is not None and self.source.lives_on

    def is_mounted(self) -> bool:
        if self.process is not None:
            return self.process.is_mounted()
        assert self.source is not None
        return self.source.mount_entry() is not None

    def unmount(self, *, lazy: bool) -> None:
        try:
            if self.process is not None:
                self.process.unmount(lazy=lazy)
            else:
                mount.unmount(self.shown.target, lazy=lazy)
        except BusyError:
            users = mount_users(self.shown.target)
            if not users:
                raise
            raise BusyError(
                f"{self.shown.target} is in use by {', '.join(users[:3])}: end that first"
            ) from None

    def written_bytes(self) -> int:
        return 0 if self.source is None else self.source.written_bytes() - self.written_before

    def take_written_bytes(self) -> int:
        written = self.written_bytes()
        self.written_before += written
        return written


@dataclass(slots=True)
class _Device:
    """A device that is or was mounted; its lock is held for the length of each change to it."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    active: _Active | None = None
    written: int = 0


class DeviceMounts:
    """The mounts of one pool's devices. Methods may be called from any thread."""

    def __init__(self, pool: Pool, export: Path) -> None:
        """The directory `export` is for the files of an engine that has no block devices of its own."""
        self._pool = pool
        self._devices: dict[str, _Device] = {}
        self._lock = threading.Lock()
        self._shown = shown_devices(pool, export)
        for device in pool.taken_over():
            self._take_over(device.name)

    # ---- questions

    def mounts(self) -> list[DeviceMount]:
        """Return what is mounted, by device."""
        with self._lock:
            found = [device.active.shown for device in self._devices.values() if device.active is not None]
        return sorted(found, key=lambda one: one.device)

    def of(self, name: str) -> DeviceMount | None:
        """Return the mount of a device."""
        device = self._devices.get(name)
        active = device.active if device is not None else None
        return active.shown if active is not None else None

    def written_bytes(self, name: str) -> int | None:
        """Return what file systems on a device wrote to it, None without block devices."""
        if not may_mount():
            return None
        device = self._device(name)
        with device.lock:
            return device.written + (device.active.written_bytes() if device.active else 0)

    # ---- changes

    @contextmanager
    def holding(self, name: str) -> Iterator[DeviceMount | None]:
        """Keep a device from being mounted or unmounted meanwhile; gives its mount."""
        device = self._device(name)
        with device.lock:
            yield device.active.shown if device.active is not None else None

    def mount(self, name: str, target: Path, *, read_only: bool = False, options: str = "") -> DeviceMount:
        """Mount a device at a real path; one that is mounted there already stays as it is."""
        device = self._device(name)
        with device.lock:
            self._forget_ended(name, device)
            if device.active is None:
                device.active = self._activate(name, target, read_only, options)
            elif str(target) != device.active.shown.target:
                raise BusyError(
                    f'thin device "{name}" is mounted at {device.active.shown.target}: unmount it first'
                )
            return device.active.shown

    def umount(self, name: str) -> None:
        """Unmount a device. BusyError while it is in use, ArgumentError when it is not mounted."""
        device = self._device(name)
        with device.lock:
            if device.active is None:
                raise ArgumentError(f'thin device "{name}" is not mounted')
            self._deactivate(name, device)

    def make_file_system(self, name: str, kind: str) -> None:
        """Make a file system on a device that is not mounted."""
        device = self._device(name)
        with device.lock, ExitStack() as stack:
            if device.active is not None:
                raise BusyError(f'thin device "{name}" is mounted: unmount it first')
            handle, path = self._show(name, stack)
            if kind == "xfs":  # mkfs.xfs wants to know a device's geometry
                path = Path(self._attach(path, handle, stack).path)
            make_file_system(path, kind)

    def grow_ext4(self, name: str) -> None:
        """Let the ext4 on a device that is not mounted take all of it."""
        device = self._device(name)
        with device.lock, ExitStack() as stack:
            if device.active is not None:
                raise BusyError(f'thin device "{name}" is mounted: unmount it first')
            grow_ext4(self._show(name, stack)[1])

    @contextmanager
    def frozen(self, name: str, timeout: float) -> Iterator[None]:
        """Hold the file system on a device frozen, if it is mounted for writing."""
        device = self._device(name)
        with device.lock:
            active = device.active
            if active is None or active.shown.read_only:
                yield
            elif active.source is None:
                raise BusyError(
                    f'thin device "{name}" is mounted by fuse2fs, which cannot be frozen: unmount it first'
                )
            else:
                with active.source.frozen(active.shown.target, timeout):
                    yield

    def refresh(self, name: str) -> None:
        """Show the kernel the new size of a device."""
        device = self._device(name)
        with device.lock:
            if device.active is not None and device.active.source is not None:
                device.active.source.refresh()

    def forget(self, name: str) -> None:
        """Forget what was counted for a device, which is about to be deleted."""
        with self._lock:
            device = self._devices.get(name)
            if device is not None and device.active is None:
                del self._devices[name]

    def forget_ended(self) -> bool:
        """Let go of devices that somebody has unmounted behind our back; False if one is still in use."""
        settled = True
        for name, device in list(self._devices.items()):
            with device.lock:
                try:
                    self._forget_ended(name, device, 0)
                except BlocksnapError:
                    settled = False
        return settled

    def close(self) -> None:
        """Unmount everything. What stays in use is written back and taken out of sight, or lives on."""
        deadline = time.monotonic() + _END_SECONDS
        for name, device in list(self._devices.items()):
            with device.lock, suppress(BlocksnapError):
                if device.active is not None:
                    self._end(name, device, deadline)
        self._shown.stop()
        for device in self._devices.values():
            if device.active is not None and not device.active.lives_on:
                device.active.handle.close()
                device.active = None

    # ---- how

    def _device(self, name: str) -> _Device:
        with self._lock:
            return self._devices.setdefault(name, _Device())

    def _show(self, name: str, stack: ExitStack) -> tuple[EngineDevice, Path]:
        """Show a device until the stack unwinds."""
        handle = self._pool.device(name).hold()
        stack.callback(handle.close)
        path = self._shown.show(name, handle)
        stack.callback(self._shown.hide, name)
        return handle, path

    def _attach(
        self, path: Path, handle: EngineDevice, stack: ExitStack, *, read_only: bool = False
    ) -> MountSource:
        source = self._shown.attach(path, handle, read_only=read_only)
        stack.callback(source.detach, _DETACH_SECONDS)
        return source

    def _activate(self, name: str, target: Path, read_only: bool, options: str) -> _Active:
        if self._pool.read_only and not read_only:
            raise NeedsCheckError(
                f"pool {self._pool.path} is read-only until it was repaired: mount read-only"
            )
        with ExitStack() as stack:
            handle, path = self._show(name, stack)
            if may_mount():
                source = self._attach(path, handle, stack, read_only=self._pool.read_only)
                active = self._mount(name, source, handle, str(target), read_only, options)
            else:
                process = Fuse2fs(path, target, read_only=read_only)
                active = _Active(
                    DeviceMount(name, str(target), "ext4", None, read_only), handle, process=process
                )
            stack.pop_all()
            return active

    def _mount(
        self,
        name: str,
        source: MountSource,
        handle: EngineDevice,
        target: str,
        read_only: bool,
        options: str,
    ) -> _Active:
        before = source.written_bytes()
        # Never read through a loop device: this process would wait for itself, which SIGKILL cannot end.
        kind = mount.told_by_magic(partial(_read_inside, handle), f'thin device "{name}"')
        without_log = _WITHOUT_LOG[kind] if self._pool.read_only else ""
        chosen = ",".join(filter(None, (_OPTIONS[kind], without_log, options)))
        mount.mount(source.path, target, kind, read_only=read_only, noatime=True, options=chosen)
        shown = DeviceMount(name, target, kind, source.loop, read_only, source.path)
        return _Active(shown, handle, source, written_before=before)

    def _take_over(self, name: str) -> None:
        """Go on with the mount of a device that a killed process left."""
        with ExitStack() as stack:
            handle, path = self._show(name, stack)
            source = self._shown.attach(path, handle, read_only=False)
            entry = source.mount_entry()
            if entry is not None:
                read_only = "ro" in entry.options.split(",")
                shown = DeviceMount(name, entry.target, entry.fstype, source.loop, read_only, source.path)
                active = _Active(shown, handle, source, written_before=source.written_bytes())
                self._device(name).active = active
                stack.pop_all()

    def _deactivate(
        self, name: str, device: _Device, *, lazy: bool = False, patience: float = _DETACH_SECONDS
    ) -> None:
        """Undo _activate; after a failure the rest can be done later."""
        active = device.active
        assert active is not None
        if active.is_mounted():
            active.unmount(lazy=lazy)
            device.written += active.take_written_bytes()
        if active.source is not None:
            active.source.detach(patience)
        self._shown.hide(name)
        active.handle.close()
        device.active = None

    def _forget_ended(self, name: str, device: _Device, patience: float = _DETACH_SECONDS) -> None:
        if device.active is not None and not device.active.is_mounted():
            self._deactivate(name, device, patience=patience)

    def _end(self, name: str, device: _Device, deadline: float) -> None:
        assert device.active is not None
        while True:
            try:
                self._deactivate(name, device)
                return
            except BusyError:
                if time.monotonic() > deadline:
                    break
                time.sleep(_RETRY_SECONDS)
        with suppress(BlocksnapError):
            mount.sync_filesystem(device.active.shown.target)
        if not device.active.lives_on:
            self._deactivate(name, device, lazy=True, patience=0)


def _read_inside(handle: EngineDevice, offset: int, length: int) -> bytes:
    content = bytearray(length)
    if offset + length > handle.size:
        return b""
    handle.read_into(offset, content)
    return bytes(content)
