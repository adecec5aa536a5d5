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
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from os import PathLike, fspath
from typing import Self

from . import metadata as metadata_walks
from .device_mapper import Control, Device, FailedStatus, PoolMode, ThinPoolStatus
from .errors import (
    ArgumentError,
    BlocksnapError,
    BusyError,
    DeviceIOError,
    NoSpaceError,
    PrivilegeError,
)
from .kernel_active import ActiveDevices, open_external_origin
from .kernel_backing import (
    Backing,
    Superblock,
    identity_of,
    locked,
    pool_target,
    require_block_size,
    require_undamaged,
    settle_former_writes,
)
from .kernel_counters import KernelCounters
from .kernel_device import KernelDevice
from .kernel_leftovers import clear_devices
from .kernel_table import PoolTable
from .kernel_watch import KernelWatch
from .metadata import DeviceInfo
from .user_pool import EngineStatus, PoolCounters, UserPool

__all__ = ["KernelDevice", "KernelPool"]

_METADATA_RESERVE = 32
"""Metadata blocks that creations leave: a kernel that finds none makes the pool read-only until a check."""

_METADATA_LOW_WATER = 1024
_WAIT_FOR_ROOM_SECONDS = 60.0
_MUCH_ROOM, _ROOMY_SECONDS = 2048, 0.05


class KernelPool:
    """A thin pool that is live in the kernel; it belongs to this process until it is closed."""

    name = "kernel"
    messages_commit = True
    taken_over: frozenset[int] = frozenset()
    """Devices that a killed process left in use."""

    def __init__(
        self,
        table: PoolTable,
        control: Control,
        identity: str,
        metadata: Backing,
        data: Backing,
        *,
        read_only: bool,
    ) -> None:
        # What even an abandoned pool lets go of, and what only a closed one does.
        self._held, self._live = ExitStack(), ExitStack()
        self._table = table
        self._device = table.device
        self._metadata, self._data = metadata, data
        self._what = f"the pool of {fspath(metadata.path)}"
        self._counts = KernelCounters(table.device.number, metadata.number, table.block_size)
        self._lock = threading.RLock()
        # Held between begin() and end(), and by each flush and commit; taken before _lock.
        self._commits = threading.Lock()
        self._active = ActiveDevices(
            control,
            identity,
            table.device,
            self._what,
            self._commits,
            self._counts,
            self._require_room_to_write,
            block_size=table.block_size,
            read_only=read_only,
        )
        self._begun = False
        self._closed = False
        self._watch: KernelWatch | None = None
        self._read_only = read_only
        self._time = 0
        self._roomy_until = 0.0
        self._require_status()
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
        identity = identity_of(metadata)
        with ExitStack() as held, ExitStack() as live:
            held.enter_context(locked(metadata))
            control = held.enter_context(Control.open())
            left = clear_devices(control, identity)
            if left is not None and read_only:
                raise left.busy()
            if left is None and not read_only:
                settle_former_writes(metadata)
            checked = require_undamaged(metadata) if left is None else None
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
            target = pool_target(superblock, *parts, read_only=read_only, passdown=passdown)
            if left is None:
                name, uuid = f"blocksnap-{identity}-pool", f"{identity}-pool"
                device = Device.create(control, name, [target], uuid=uuid, private=True)
                live.callback(device.remove)
            else:
                device, target = left.device, left.target
            table = PoolTable(device, target, *parts)
            pool = cls(table, control, identity, *parts, read_only=target.read_only)
            if left is not None:
                pool._take_over(left.thin)
                live.callback(device.remove)  # what failed before has left it as it was
            pool._nr_devices = checked.devices if checked else len(pool.devices())
            pool._held, pool._live = held.pop_all(), live.pop_all()
        return pool

    def _take_over(self, thin: Mapping[int, Device]) -> None:
        self._active.take_over(thin)
        self.taken_over = frozenset(thin)
        self._table.set_low_water(0, wait_when_full=False)

    def close(self) -> None:
        """Commit and release. BusyError while a device is open: the pool then stays as it is."""
        with self._lock:
            if self._closed:
                return
            if self._begun:
                raise BusyError(f"{self._what} has a running transaction: end it first")
            busy = self._active.busy()
            if busy and not self.taken_over >= busy.keys():
                raise next(iter(busy.values()))
            if not self._read_only:
                with suppress(BlocksnapError):  # what has failed is told by who opens it next
                    self._commit()
            if busy:
                self.abandon()  # it goes on as it did before this process came
                return
            self._closed = True
            self._table.end()
            with self._held, self._live:
                pass

    def abandon(self) -> None:
        """Drop every handle and leave the devices in the kernel: what a killed process leaves behind."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._table.end()
            self._active.abandon()
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
        self._require_open()
        self._active.flush()
        with self._lock:
            self._require_open()
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
                yield
                return
            with self._table.suspended():
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
        self._last = status
        return status

    def status(self) -> EngineStatus:
        """Return the present state; no lock of the pool is waited for."""
        self._require_open()
        (now,) = self._device.status()
        failed = not isinstance(now, ThinPoolStatus)
        if isinstance(now, ThinPoolStatus):
            self._last = now
        last = self._last
        with suppress(BlocksnapError):  # it may be the metadata device that has failed
            self._time = Superblock.read(self._metadata.path).time
        return EngineStatus(
            transaction_id=last.transaction_id,
            block_size=self._table.block_size,
            data_blocks=last.total_data_blocks,
            data_blocks_free=last.free_data_blocks,
            metadata_blocks=last.total_metadata_blocks,
            metadata_blocks_free=last.free_metadata_blocks,
            held_root=last.held_root or 0,
            time=self._time,
            nr_devices=self._nr_devices,
            read_only=self._read_only or last.mode in (PoolMode.READ_ONLY, PoolMode.UNKNOWN),
            needs_check=last.needs_check,
            out_of_space=last.mode is PoolMode.OUT_OF_DATA_SPACE,
            metadata_low=last.free_metadata_blocks <= _metadata_low_water(last) or not _has_room(last),
            failed=failed,
            direct_io=self._metadata.direct_io and self._data.direct_io,
        )

    def counters(self) -> PoolCounters:
        return self._counts.counters()

    def extend(self, data_bytes: int) -> None:
        """Grow to the present sizes of the backing, of the data at most data_bytes (0 = all)."""
        self._require_open()
        self._table.extend(data_bytes)
        self._require_status()

    def watch(self) -> KernelWatch:
        """Return what tells of low space from now on; one at a time."""
        self._watch = KernelWatch(self._table)
        return self._watch

    # ---- devices

    def create_device(self, device_id: int) -> None:
        with self._lock:
            self._require_room(f"thin device {device_id}")
            self._device.create_thin(device_id)
            self._nr_devices += 1

    def create_snapshot(self, device_id: int, origin_id: int) -> None:
        with self._lock:
            self._require_room(f"thin device {device_id}")
            active = self._active.find(origin_id)
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
        if not _has_room(self._require_status()) and not self._room_comes():
            raise NoSpaceError(
                f"{what}: the metadata of {self._what.removeprefix('the ')} are full:"
                ' delete devices, or "blocksnap pool extend --metadata-size"'
            )

    def _require_room_to_write(self, what: str) -> None:
        """Raise why a device cannot be written to; where there is much room it is not looked at each time."""
        now = time.monotonic()
        if now >= self._roomy_until:
            self._require_room(what)
            if self._last.free_metadata_blocks > _MUCH_ROOM:
                self._roomy_until = now + _ROOMY_SECONDS

    def _room_comes(self) -> bool:
        """Wait for the pool to grow, if somebody lets it."""
        if self._watch is None:
            return False
        self._watch.wake()
        waits = self._table.wait_until(
            lambda: _has_room(self._require_status()) or not self._table.waits_when_full,
            _WAIT_FOR_ROOM_SECONDS,
        )
        return waits and _has_room(self._require_status())

    def delete_device(self, device_id: int) -> None:
        """Delete a device; BusyError, which tells by whom, while it is open."""
        with self._lock:
            self._require_open()
            self._active.require_unused(device_id)
            self._device.delete(device_id)
            self._nr_devices -= 1

    def users_of(self, device_id: int) -> str:
        """Return who uses a device, empty if nobody does."""
        return self._active.users_of(device_id, timeout=0.5)

    def remove_when_unused(self, device_id: int) -> None:
        """Let a device that others have open leave the kernel with its last user."""
        self._active.remove_when_unused(device_id)

    @staticmethod
    def require_external_origin(path: str | PathLike[str]) -> None:
        """Raise why a path cannot be an external origin."""
        open_external_origin(path).close()

    def open_device(self, device_id: int, size: int, external_origin: str | None = None) -> KernelDevice:
        with self._lock:
            self._require_open()
            return self._active.open(device_id, size, external_origin=external_origin)

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


def _has_room(status: ThinPoolStatus) -> bool:
    return status.free_metadata_blocks >= min(_METADATA_RESERVE, status.total_metadata_blocks // 4)


def _metadata_low_water(status: ThinPoolStatus) -> int:
    """Return the kernel's own mark, which old kernels do not tell."""
    if status.metadata_low_water_blocks is not None:
        return status.metadata_low_water_blocks
    return min(_METADATA_LOW_WATER, status.total_metadata_blocks // 4)
