"""The library's front door: Pool and ThinDevice, by name, over an engine and a catalog that always agree."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from . import metadata as metadata_walks
from .catalog import Catalog
from .dead_mounts import end_dead_export
from .device_record import DeviceRecord
from .engines import Engine, EngineDevice, engine_named
from .errors import (
    ArgumentError,
    BlocksnapError,
    BusyError,
    DeviceNotFoundError,
)
from .kernel_leftovers import remove_leftovers
from .pool_changes import PoolChanges
from .pool_creation import make_pool
from .pool_files import PathArgument, PoolFiles, Progress, fully_allocated, grow_file
from .pool_recovery import open_catalog
from .pool_report import DeviceUsage, PoolStatus, device_usage, pool_status, reverse_mappings
from .pool_space import OnEvent, SpaceKeeper
from .pool_transaction import DeviceTable
from .pool_walk import MetadataAtRest, MetadataWalks
from .space_policy import ExtendPolicy
from .thin_device import ThinDevice, parse_device_size, require_labels, require_name
from .units import Size, parse_size

__all__ = ["Pool"]


class Pool:
    """An open pool: `with Pool.create("pool", size="10G") as pool: ...`.

    Each of create_device, snapshot, resize and delete is a transaction of its own, or part of
    `transaction()`. When it returns, it is durable in the pool and in the catalog. Methods may be called
    from any thread.
    """

    def __init__(self, files: PoolFiles, engine: Engine, catalog: Catalog) -> None:
        self._files = files
        self._engine = engine
        self._catalog = catalog
        name = f"pool {files}"
        self._table = DeviceTable(catalog.records(), name)
        self._devices: dict[int, ThinDevice] = {}
        self._changes = PoolChanges(name, engine, catalog, self._table, self._close_handle, self._forget)
        self._lock = self._changes.lock
        self._walks = MetadataWalks(files.metadata, engine, catalog, self._lock)
        self._extending = threading.Lock()
        self._keeper: SpaceKeeper | None = None

    # ---- making, opening, closing

    @classmethod
    def create(
        cls,
        path: PathArgument | None = None,
        *,
        size: Size | None = None,
        block_size: Size = "64K",
        engine: str = "user",
        metadata_size: Size | None = None,
        preallocate: bool = False,
        progress: Progress | None = None,
        metadata: PathArgument | None = None,
        data: PathArgument | None = None,
        catalog: PathArgument | None = None,
        direct_io: bool = False,
        auto_extend: ExtendPolicy | None = None,
        on_event: OnEvent | None = None,
    ) -> Self:
        """Make a pool in a new directory, or on two devices (or files), and open it.

        size is that of the data; without one, two devices are used whole. metadata_size defaults to 48 bytes
        a data block, at least 2 MiB. preallocate writes the data file full of zeros, so that later writes
        change no metadata of its file system. A failure while it is made leaves nothing behind that looks
        like a pool; one that was made and then cannot be opened stays. auto_extend and on_event are those of
        open().
        """
        kind = engine_named(engine)
        files = PoolFiles.locate(path, metadata=metadata, data=data, catalog=catalog)
        make_pool(
            kind,
            files,
            size=size,
            block_size=block_size,
            metadata_size=metadata_size,
            preallocate=preallocate,
            progress=progress,
        )
        return cls.open(
            path,
            engine=engine,
            metadata=metadata,
            data=data,
            catalog=catalog,
            direct_io=direct_io,
            auto_extend=auto_extend,
            on_event=on_event,
        )

    @classmethod
    def open(
        cls,
        path: PathArgument | None = None,
        *,
        engine: str = "user",
        read_only: bool = False,
        direct_io: bool = False,
        passdown: bool | None = None,
        metadata: PathArgument | None = None,
        data: PathArgument | None = None,
        catalog: PathArgument | None = None,
        adopt: bool = False,
        auto_extend: ExtendPolicy | None = None,
        on_event: OnEvent | None = None,
    ) -> Self:
        """Open an existing pool and repair what a crash interrupted.

        passdown gives the space of freed blocks back to the backing file system; by default it does unless
        the data file is fully allocated. A pool without a catalog gets one with devices named "thin-<id>".
        Where pool and catalog disagree in a way that no crash explains, PoolFormatError; adopt takes over
        what the pool holds.

        With auto_extend the pool grows by itself while it is open, and a write that finds it full waits for
        that; without, it fails at once. on_event is called with what happens to the pool's space, on another
        thread.
        """
        kind = engine_named(engine)
        files = PoolFiles.locate(path, metadata=metadata, data=data, catalog=catalog)
        files.require()
        remove_leftovers(files.metadata, take_over=kind.name == "kernel")
        if passdown is None:
            passdown = not fully_allocated(files.data)
        core = kind.open(
            files.metadata, files.data, read_only=read_only, direct_io=direct_io, passdown=passdown
        )
        try:
            if files.directory is not None:
                # What a killed server left mounted can wait for who may unmount.
                with suppress(BlocksnapError):
                    end_dead_export(files.directory / "export")
            pool = cls(files, core, open_catalog(files, core, adopt=adopt))
            if not pool.read_only:
                pool._changes.delete_condemned()
            if (auto_extend is not None or on_event is not None) and not pool.read_only:
                pool._keeper = SpaceKeeper(files, core, pool._extending, auto_extend, on_event)
        except BaseException:
            core.abandon()
            raise
        return pool

    def close(self) -> None:
        """Commit and release the pool; BusyError while a device is held by an export."""
        self._refuse_in_transaction("close")
        try:
            with self._walks.turn, self._lock:
                self._close()
        finally:
            if self._engine.closed:
                self._end_keeper()

    def _close(self) -> None:
        held = next((device.name for device in self._devices.values() if device.held), None)
        if held is not None:
            raise BusyError(f'thin device "{held}" is in use: unmount it before closing pool {self._files}')
        for device in self._devices.values():
            device._close()
        if self._changes.failed:
            self._engine.abandon()
        try:
            self._engine.close()
        finally:
            if self._engine.closed:
                self._catalog.close()

    def abandon(self) -> None:
        """Drop the pool without a commit, as a killed process does. For tests and emergencies."""
        self._engine.abandon()
        self._catalog.close()
        self._end_keeper()

    def _end_keeper(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Pool {str(self._files)!r}{' closed' if self.closed else ''}>"

    # ---- devices

    @property
    def path(self) -> Path:
        """The directory of the pool, or its metadata device."""
        return self._files.directory or self._files.metadata

    @property
    def engine(self) -> str:
        """The name of the engine that runs it."""
        return self._engine.name

    @property
    def closed(self) -> bool:
        return self._engine.closed

    @property
    def read_only(self) -> bool:
        return self._changes.read_only

    def devices(self) -> list[ThinDevice]:
        """Return every thin device by name."""
        with self._lock:
            return [self._device(record) for record in self._table.records()]

    def device(self, name: str) -> ThinDevice:
        """Return a thin device; DeviceNotFoundError if there is none of that name."""
        with self._lock:
            return self._device(self._table.named(name))

    def taken_over(self) -> list[ThinDevice]:
        """Return the devices in use that a killed process left in the kernel, and this one has taken over."""
        with self._lock:
            return [device for device in self.devices() if device.id in self._engine.taken_over]

    def create_device(
        self,
        name: str,
        size: Size,
        *,
        labels: Mapping[str, str] | None = None,
        external_origin: PathArgument | None = None,
    ) -> ThinDevice:
        """Create a thin device that takes no space until it is written to.

        What was not written reads as zeros, or as the external origin has it: a file or a read-only block
        device, which nobody may change from now on.
        """
        require_name(name)
        require_labels(labels or {})
        size_bytes = parse_device_size(size)
        below = None
        if external_origin is not None:
            self._engine.require_external_origin(external_origin)
            below = os.path.abspath(external_origin)
        with self._changes.one() as transaction:
            return self._device(transaction.create(name, size_bytes, labels or {}, external_origin=below))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the operations of the block one transaction: one commit at its end, none after an exception.

        Deletions and shrinking take effect at the end. No flush or commit of this thread can happen inside;
        those of other threads wait.
        """
        with self._changes.several():
            yield

    def commit(self) -> None:
        """Make everything written so far durable, in one commit for all devices."""
        self._refuse_in_transaction("commit")
        self._engine.commit()

    # ---- growing and reporting

    def extend(
        self,
        *,
        size: Size | None = None,
        metadata_size: Size | None = None,
        preallocate: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Grow data, metadata or both to new sizes; a pool on devices grows to what its devices have now."""
        with self._lock, self._extending:
            self._refuse_in_transaction("extend")
            self._changes.require_writable()
            status = self.status()
            data_bytes = status.data_bytes if size is None else parse_size(size)
            metadata_bytes = (
                status.metadata_bytes if metadata_size is None else parse_size(metadata_size, "metadata size")
            )
            if data_bytes < status.data_bytes or metadata_bytes < status.metadata_bytes:
                raise ArgumentError(f"pool {self._files} cannot shrink: give a larger size")
            if self._files.directory is not None:
                grow_file(self._files.metadata, metadata_bytes, reserve=True, preallocate=preallocate)
                grow_file(self._files.data, data_bytes, preallocate=preallocate, progress=progress)
                self._engine.extend(data_bytes)
            else:
                self._engine.extend(0 if size is None and metadata_size is None else data_bytes)

    def status(self) -> PoolStatus:
        """Return sizes, numbers, flags and byte counters of the pool."""
        return pool_status(str(self._files), self._engine, len(self._table.condemned()))

    def usage(self) -> list[DeviceUsage]:
        """Return the mapped, exclusive and shared bytes of every thin device, by name."""
        with self._walk() as metadata:
            found = metadata_walks.usage(metadata.path, held=metadata.held)
        with self._lock:
            names = {record.id: record.name for record in self._table.records()}
        return device_usage(found, names, self._engine.status().block_size)

    def delta(self, left: ThinDevice | str, right: ThinDevice | str) -> NDArray[np.void]:
        """Return where two devices differ: a structured array (thin_begin, length, kind), in blocks.

        kind is one of the DELTA_ constants of blocksnap.metadata. What both share is not read.
        """
        ids = self._id_of(left), self._id_of(right)
        with self._walk() as metadata:
            return metadata_walks.delta_ranges(metadata.path, *ids, held=metadata.held)

    def reverse_mappings(self, begin: int = 0, end: int | None = None) -> NDArray[np.void]:
        """Return who uses the data blocks from begin to before end.

        The array has the fields data_begin, length, device_id and thin_begin, in blocks.
        """
        with self._walk() as metadata:
            return reverse_mappings(metadata.path, begin, end, held=metadata.held)

    def mapped_blocks(self) -> NDArray[np.uint8]:
        """Return a bit for each data block, the lowest of a byte first: whether any device maps it."""
        with self._walk() as now:
            return metadata_walks.mapped_blocks(now.path, self._engine.status().data_blocks, held=now.held)

    def write_delta(self, left: ThinDevice | str, right: ThinDevice | str, output: int) -> None:
        """Write to a file descriptor what `thin_delta` prints for two devices."""
        ids = self._id_of(left), self._id_of(right)
        with self._walk() as metadata:
            metadata_walks.write_delta(metadata.path, *ids, output, held=metadata.held)

    def dump(self, output: int) -> None:
        """Write to a file descriptor what `thin_dump` prints."""
        with self._walk() as metadata:
            metadata_walks.dump(metadata.path, output, held=metadata.held)

    def check(self) -> metadata_walks.CheckReport:
        """Prove every invariant of the metadata and recompute all counts; the pool stands still meanwhile."""
        with self._walk(whole=True) as metadata:
            return metadata_walks.check(metadata.path)

    # ---- what the devices ask for

    def _current(self, record: DeviceRecord) -> DeviceRecord:
        current = self._table.find(record.id)
        if current is None or current.created != record.created:
            raise DeviceNotFoundError(f'thin device "{record.name}" has been deleted')
        return current

    def _origin_of(self, record: DeviceRecord) -> str | None:
        origin = None if record.origin is None else self._table.find(record.origin)
        # A later device that was given the id of a deleted origin is none.
        return origin.name if origin is not None and origin.created <= record.created else None

    def _open_handle(self, record: DeviceRecord) -> EngineDevice:
        return self._engine.open_device(record.id, record.size, record.external_origin)

    def _snapshot(self, device: ThinDevice, name: str, labels: Mapping[str, str]) -> ThinDevice:
        require_name(name)
        require_labels(labels)
        with self._changes.one() as transaction:
            origin = device._current()
            return self._device(transaction.create(name, origin.size, labels, origin))

    def _resize(self, device: ThinDevice, size: int) -> None:
        with self._changes.one() as transaction:
            transaction.resize(device._current(), size)

    def _relabel(self, device: ThinDevice, labels: Mapping[str, str]) -> None:
        require_labels(labels)
        with self._changes.one() as transaction:
            transaction.relabel(device._current(), labels)

    def _delete(self, device: ThinDevice, *, deferred: bool) -> None:
        with self._changes.one() as transaction:
            record = device._current()
            if not device.held:
                device._close()
            users = "" if transaction.holds(record.id) else self._engine.users_of(record.id)
            if not users:
                transaction.delete(record)
            elif deferred:
                transaction.condemn(record)
            else:
                raise BusyError(f'thin device "{record.name}" is in use ({users}): unmount or close it first')

    # ---- inside

    def _device(self, record: DeviceRecord) -> ThinDevice:
        device = self._devices.get(record.id)
        if device is None or device.created != record.created:
            device = self._devices[record.id] = ThinDevice(self, record)
        return device

    def _id_of(self, device: ThinDevice | str) -> int:
        return device._current().id if isinstance(device, ThinDevice) else self._table.named(device).id

    def _forget(self, device_id: int) -> None:
        self._devices.pop(device_id, None)

    def _close_handle(self, device_id: int) -> None:
        device = self._devices.get(device_id)
        if device is not None:
            device._close()

    @contextmanager
    def _walk(self, *, whole: bool = False) -> Iterator[MetadataAtRest]:
        """Give metadata that stay as they are; the pool goes on unless the walk wants the whole of them."""
        self._refuse_in_transaction("walk the metadata")
        if self._changes.read_only or self._changes.failed:
            walk = self._walks.as_they_are
        else:
            walk = self._walks.at_rest if whole else self._walks.committed
        with walk() as metadata:
            yield metadata

    def _refuse_in_transaction(self, what: str) -> None:
        self._changes.refuse_inside(what)
