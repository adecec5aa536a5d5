"""The kernel engine: one thin pool run by device-mapper, devices by number, behind the calls of UserPool.

1. The kernel commits each creation, snapshot and deletion at once: between begin() and end() nothing is taken
   back by itself (see pool_recovery.py).
2. A thin device is active in the kernel from its first handle to its last, and longer if a program or a mount
   has it open.
3. Every device of a pool has a uuid that tells the pool: what a killed process left is removed at the next
   open, by either engine.
4. Who reads the metadata of a running pool reads a metadata snapshot, or has the pool suspended by a guard
   that resumes it if this process dies.

Calls may come from any thread.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from os import PathLike, fspath
from typing import Self

from . import metadata as metadata_walks
from .device_mapper import (
    Control,
    Device,
    FailedStatus,
    PoolMode,
    ThinPoolStatus,
    ThinPoolTarget,
    ThinTarget,
)
from .errors import (
    ArgumentError,
    BlocksnapError,
    BusyError,
    DeviceIOError,
    NoSpaceError,
    PrivilegeError,
)
from .kernel_backing import (
    Backing,
    Superblock,
    identity_of,
    locked,
    pool_target,
    require_block_size,
    require_undamaged,
)
from .kernel_counters import KernelCounters
from .kernel_device import ActiveDevice, KernelDevice, users_of
from .kernel_leftovers import LeftPool, clear_devices
from .metadata import DeviceInfo
from .user_pool import EngineStatus, PoolCounters, UserPool

__all__ = ["KernelDevice", "KernelPool"]

_METADATA_RESERVE = 32
"""Metadata blocks that creations leave: a kernel that finds none makes the pool read-only until a check."""


class KernelPool:
    """A thin pool that is live in the kernel; it belongs to this process until it is closed."""

    name = "kernel"
    messages_commit = True
    taken_over: frozenset[int] = frozenset()
    """Devices that a killed process left in use."""

    def __init__(self, control: Control, metadata: Backing, data: Backing, what: str) -> None:
        # What even an abandoned pool lets go of, and what only a closed one does.
        self._held, self._live = ExitStack(), ExitStack()
        self._control = control
        self._metadata, self._data = metadata, data
        self._what = what
        self._identity = identity_of(metadata.path)
        self._active: dict[int, ActiveDevice] = {}
        self._handles: list[KernelDevice] = []
        self._lock = threading.RLock()
        # Held between begin() and end(), and by each flush and commit; taken before _lock.
        self._commits = threading.Lock()
        self._begun = False
        self._closed = False
        self._nr_devices = 0

    # ---- making, opening, closing

    @staticmethod
    def format(
        metadata: str | PathLike[str], data: str | PathLike[str], *, data_bytes: int, block_size: int
    ) -> None:
        """Write an empty pool to two files or devices; the first block of metadata must be zero."""
        require_block_size(block_size)
        Control.open().close()
        UserPool.format(metadata, data, data_bytes=data_bytes, block_size=block_size)

    @classmethod
    def open(
        cls,
        metadata: str | PathLike[str],
        data: str | PathLike[str],
        *,
        read_only: bool = False,
        direct_io: bool = False,  # noqa: ARG003 - it is direct wherever the backing can
        passdown: bool = False,
    ) -> Self:
        """Lock a pool and make it live in the kernel; files become loop devices.

        A pool that a killed process left live, with devices in use, is taken over. Raises BusyError if it is
        in use, NotSupportedError without device-mapper or for blocks that the kernel does not take,
        DamagedMetadataError for metadata that must not reach the kernel.
        """
        with ExitStack() as held, ExitStack() as live:
            held.enter_context(locked(metadata, shared=read_only))
            control = held.enter_context(Control.open())
            left = clear_devices(control, identity_of(metadata))
            if left is not None and read_only:
                raise left.busy()
            nr_devices = require_undamaged(metadata).devices if left is None else 0
            superblock = Superblock.read(metadata)
            require_block_size(superblock.block_size)
            read_only = read_only or superblock.needs_check
            numbers = (None, None) if left is None else (left.target.metadata, left.target.data)
            parts = []
            for path, number in zip((metadata, data), numbers, strict=True):
                # The kernel opens the data device for writing even if it is not to.
                part = Backing(path, read_only=read_only and path is metadata, live=number)
                live.callback(part.close if left is None else part.abandon)
                parts.append(part)
            pool = cls(control, parts[0], parts[1], f"the pool of {fspath(metadata)}")
            pool._nr_devices = nr_devices
            target = pool_target(superblock, *parts, read_only=read_only, passdown=passdown)
            pool._start(target, live, left)
            pool._held, pool._live = held.pop_all(), live.pop_all()
        return pool

    def _start(self, target: ThinPoolTarget, live: ExitStack, left: LeftPool | None) -> None:
        if left is not None:
            self._target, self._device = left.target, left.device
        else:
            self._target = target
            self._device = Device.create(
                self._control,
                f"blocksnap-{self._identity}-pool",
                [self._target],
                uuid=f"{self._identity}-pool",
                private=True,
            )
            live.callback(self._device.remove)
        self._read_only = self._target.read_only
        self._counts = KernelCounters(self._device.number, self._metadata.number, self._target.block_size)
        self._last = self._require_status()
        if left is not None:
            self._take_over(left)
            live.callback(self._device.remove)  # what failed before has left it as it was

    def _take_over(self, left: LeftPool) -> None:
        self._nr_devices = len(self.devices())
        for device_id, device in left.thin.items():
            self._active[device_id] = self._make_active(device_id, device, device.table()[0].length)
        self.taken_over = frozenset(self._active)

    def close(self) -> None:
        """Commit and release. BusyError while a device is open: the pool then stays as it is."""
        with self._lock:
            if self._closed:
                return
            if self._begun:
                raise BusyError(f"{self._what} has a running transaction: end it first")
            busy = [error for device_id in list(self._active) if (error := self._busy(device_id))]
            if busy and not self.taken_over >= self._active.keys():
                raise busy[0]
            if not self._read_only:
                with suppress(BlocksnapError):  # what has failed is told by who opens it next
                    self._commit()
            if busy:
                self.abandon()  # it goes on as it did before this process came
                return
            self._closed = True
            with self._held, self._live:
                pass

    def abandon(self) -> None:
        """Drop every handle and leave the devices in the kernel: what a killed process leaves behind."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for handle in self._handles:
                handle.forget()
            for active in self._active.values():
                active.close()
            self._active.clear()
            for part in (self._metadata, self._data):
                part.abandon()
            self._release_begun()
            self._live.pop_all()
            self._held.close()

    @property
    def closed(self) -> bool:
        return self._closed

    def _require_open(self) -> None:
        if self._closed:
            raise ArgumentError(f"{self._what} is closed: open it again")

    # ---- commits

    def commit(self) -> None:
        with self._commits:
            self._commit()

    def _commit(self) -> None:
        with self._lock:
            self._require_open()
            for active in self._active.values():
                active.flush()
            self._counts.add(commits=1)
            self._device.status(commit=True)
            self._require_status()

    def begin(self) -> None:
        """Hold back commits of flushes until end()."""
        self._require_open()
        self._commits.acquire()
        self._begun = True

    def end(self, current_id: int, new_id: int) -> None:
        """Commit a new transaction id: with it everything since begin() is whole."""
        if not self._begun:
            raise ArgumentError(f"{self._what} has no transaction to end")
        try:
            if new_id != current_id:
                with self._lock:
                    self._require_open()
                    self._device.set_transaction_id(current_id, new_id)
        finally:
            self._release_begun()

    def _release_begun(self) -> None:
        if self._begun:
            self._begun = False
            self._commits.release()

    @contextmanager
    def quiescent(self) -> Iterator[None]:
        """Commit, and let no commit happen within the block: the metadata stay as they are."""
        with self._commits:
            if not self._read_only:
                self._commit()
            with self._metadata_at_rest():
                yield

    @contextmanager
    def _metadata_at_rest(self) -> Iterator[None]:
        with self._lock:
            self._require_open()
            if self._read_only or isinstance(self._device.status()[0], FailedStatus):
                Superblock.read(self._metadata.path)
                yield
                return
            with self._device.suspended():
                Superblock.read(self._metadata.path)  # which also drops what the page cache remembers
                yield

    # ---- growing and reporting

    def _require_status(self) -> ThinPoolStatus:
        (status,) = self._device.status()
        if not isinstance(status, ThinPoolStatus):
            raise DeviceIOError(
                f'{self._what} has failed in the kernel: close it, "blocksnap pool check", then open it again'
            )
        if status.needs_check and not self._read_only:
            raise DeviceIOError(
                f"{self._what} could not commit and is read-only:"
                ' close it, then "blocksnap pool check --clear-needs-check"'
            )
        return status

    def status(self) -> EngineStatus:
        with self._lock:
            self._require_open()
            (now,) = self._device.status()
            failed = not isinstance(now, ThinPoolStatus)
            if isinstance(now, ThinPoolStatus):
                self._last = now
            last = self._last
            return EngineStatus(
                transaction_id=last.transaction_id,
                block_size=self._target.block_size,
                data_blocks=last.total_data_blocks,
                data_blocks_free=last.free_data_blocks,
                metadata_blocks=last.total_metadata_blocks,
                metadata_blocks_free=last.free_metadata_blocks,
                held_root=last.held_root or 0,
                time=Superblock.read(self._metadata.path).time,
                nr_devices=self._nr_devices,
                read_only=self._read_only or last.mode in (PoolMode.READ_ONLY, PoolMode.UNKNOWN),
                needs_check=last.needs_check,
                out_of_space=last.mode is PoolMode.OUT_OF_DATA_SPACE,
                failed=failed,
                direct_io=self._metadata.direct_io and self._data.direct_io,
            )

    def counters(self) -> PoolCounters:
        return self._counts.counters()

    def extend(self, data_bytes: int) -> None:
        """Grow to the present sizes of the backing, of the data at most data_bytes (0 = all)."""
        with self._lock:
            self._require_open()
            for part in (self._metadata, self._data):
                part.refresh()
            length = min(data_bytes or self._data.size, self._data.size)
            length = max(length - length % self._target.block_size, self._target.length)
            target = replace(self._target, length=length)
            self._device.replace([target])
            self._target = target
            self._require_status()

    # ---- devices

    def create_device(self, device_id: int) -> None:
        with self._lock:
            self._require_room(f"thin device {device_id}")
            self._device.create_thin(device_id)
            self._nr_devices += 1

    def create_snapshot(self, device_id: int, origin_id: int) -> None:
        with self._lock:
            self._require_room(f"thin device {device_id}")
            active = self._active.get(origin_id)
            if active is None:
                self._device.create_snap(device_id, origin_id)
            else:
                with active.device.suspended(timeout=active.freeze_seconds):
                    self._device.create_snap(device_id, origin_id)
            self._nr_devices += 1

    def _require_room(self, what: str) -> None:
        self._require_open()
        if self._read_only:
            raise PrivilegeError(f"{self._what} is open read-only: open it for writing")
        status = self._require_status()
        if status.free_metadata_blocks < min(_METADATA_RESERVE, status.total_metadata_blocks // 4):
            raise NoSpaceError(
                f"{what}: the metadata of {self._what.removeprefix('the ')} are full:"
                ' delete devices, or "blocksnap pool extend --metadata-size"'
            )

    def delete_device(self, device_id: int) -> None:
        """Delete a device; BusyError, which tells by whom, while it is open."""
        with self._lock:
            self._require_open()
            if busy := self._busy(device_id):
                raise busy
            self._device.delete(device_id)
            self._nr_devices -= 1

    def open_device(self, device_id: int, size: int) -> KernelDevice:
        with self._lock:
            self._require_open()
            active = self._active.get(device_id)
            if active is None:
                active = self._active[device_id] = self._activate(device_id, size)
            active.open()
            active.handles += 1
            what = self._called(device_id)
            handle = KernelDevice(active, what, self._commits, self._resize, self._release)
            self._handles = [each for each in self._handles if not each.closed] + [handle]
            return handle

    def _called(self, device_id: int) -> str:
        return f"thin device {device_id} of {self._what.removeprefix('the ')}"

    def _activate(self, device_id: int, size: int) -> ActiveDevice:
        device = Device.create(
            self._control,
            f"blocksnap-{self._identity}-{device_id}",
            [ThinTarget(size, self._device.number, device_id)],
            uuid=f"{self._identity}-{device_id}",
            read_only=self._read_only,
        )
        try:
            return self._make_active(device_id, device, size)
        except BaseException:
            device.remove()
            raise

    def _make_active(self, device_id: int, device: Device, size: int) -> ActiveDevice:
        self._counts.watch(device.number)
        what, block_size = self._called(device_id), self._target.block_size
        return ActiveDevice(device, size, block_size, what, self._counts, read_only=self._read_only)

    def _release(self, active: ActiveDevice) -> None:
        """Let a handle go; the last one takes the device out of the kernel, unless others have it open."""
        with self._lock:
            active.handles -= 1
            if active.handles == 0 and not self._closed:
                with suppress(BusyError):
                    self._deactivate(active, timeout=0.5)

    def _deactivate(self, active: ActiveDevice, timeout: float = 5.0) -> None:
        with suppress(BlocksnapError):  # the pool is full or has failed: it tells so itself
            active.flush()
        active.close()
        self._counts.forget(active.device.number)
        try:
            active.device.remove(timeout=timeout)
        except BaseException:
            self._counts.watch(active.device.number)
            raise
        for device_id, each in list(self._active.items()):
            if each is active:
                del self._active[device_id]

    def _busy(self, device_id: int) -> BusyError | None:
        """Return the error that says who uses a device; one that nobody uses leaves the kernel."""
        active = self._active.get(device_id)
        if active is not None and active.handles == 0:
            with suppress(BusyError):
                self._deactivate(active)
        if active is None or device_id not in self._active:
            return None
        what = f"{self._called(device_id)} ({active.device.path})"
        return BusyError(f"{what} is in use ({users_of(active.device)}): unmount or close it first")

    def _resize(self, active: ActiveDevice, size: int) -> None:
        with self._lock:
            active.resize(size)

    # ---- metadata

    def hold_metadata(self) -> None:
        """Commit, and hold what is committed for walks; BusyError if a metadata snapshot is held already."""
        with self._lock:
            self._require_room("a metadata snapshot")
            self._device.reserve_metadata_snap()

    def release_metadata(self) -> None:
        with self._lock:
            self._require_open()
            self._device.release_metadata_snap()

    def devices(self) -> list[DeviceInfo]:
        """Return the details of every device by ascending id."""
        with self._metadata_at_rest():
            return metadata_walks.devices(self._metadata.path)
