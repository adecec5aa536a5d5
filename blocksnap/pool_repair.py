"""Repairing a pool: new metadata beside the damaged ones, then in their place, and a catalog that agrees.

The damaged metadata are never written to. The new ones are made under another name, pass the check, and only
then, and only if asked, take the place of the old, which stay as `metadata.damaged`. The catalog tells the
names of what is lost, and the transaction id if the superblock does not; when the new metadata are in place
it keeps the names of the devices that are there, forgets the others, and calls those that it did not know
"thin-<id>".
"""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import metadata as metadata_walks
from . import metadata_repair
from .catalog import Catalog, sync_directory
from .device_record import Action, DeviceRecord
from .errors import (
    ArgumentError,
    BlocksnapError,
    DamagedMetadataError,
    DeviceIOError,
    DeviceNotFoundError,
    NoSpaceError,
    PoolFormatError,
    system_errors,
)
from .kernel_backing import locked
from .kernel_leftovers import remove_leftovers
from .metadata_repair import LostBlocks, RepairReport
from .pool import Pool
from .pool_files import PathArgument, PoolFiles, backing_size, grow_file
from .units import Size, parse_size

__all__ = ["LostDevice", "LostRange", "PoolRepair", "RepairedDevice", "repair"]

_SMALLEST, _LARGEST = 2 << 20, 255 * 16320 * 4096
_LAST_BLOCK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class RepairedDevice:
    """A thin device of the new pool; name is None if the catalog does not know it yet.

    mapped_bytes_before is what the damaged metadata said, None if that is lost.
    """

    id: int
    name: str | None
    mapped_bytes: int
    mapped_bytes_before: int | None


@dataclass(frozen=True, slots=True)
class LostDevice:
    """A thin device that is gone."""

    id: int
    name: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class LostRange:
    """Bytes of a thin device that are not mapped any more, and may have been; length None: to its end."""

    id: int
    name: str | None
    offset: int
    length: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class PoolRepair:
    """What a repair made and saved.

    `metadata` is where the new metadata are, `damaged` where the damaged ones are.
    """

    metadata: str
    damaged: str
    devices: tuple[RepairedDevice, ...]
    lost_devices: tuple[LostDevice, ...]
    lost_ranges: tuple[LostRange, ...]
    changes: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing is lost."""
        return not self.lost_devices and not self.lost_ranges


def repair(
    path: PathArgument | None = None,
    *,
    metadata: PathArgument | None = None,
    data: PathArgument | None = None,
    catalog: PathArgument | None = None,
    output: PathArgument | None = None,
    swap: bool = False,
    block_size: Size | None = None,
) -> PoolRepair:
    """Build new metadata from what can be read of a pool's: in `output`, or beside the old ones.

    With swap they take the place of the old, unless a read of those failed (DeviceIOError). block_size is
    needed if the superblock is lost. BusyError while the pool is in use.
    """
    files = PoolFiles.locate(path, metadata=metadata, data=data, catalog=catalog)
    files.require()
    if swap and (output is not None or not files.metadata.is_file()):
        raise ArgumentError("only metadata in a file can be swapped in: give the new device with --metadata")
    remove_leftovers(files.metadata)
    with locked(files.metadata):
        known = _Known.read(files.catalog)
        size = 0 if block_size is None else parse_size(block_size, "block size")
        made, report = _build(files, known, None if output is None else Path(output), size)
        if swap and report.failed_reads:
            # The catalog would forget devices that another try can read.
            raise DeviceIOError(
                f"{files.metadata} stays in its place, because {report.failed_reads} of its reads failed"
                f" (what could be read is in {made}): try again, or repair a copy on a disk that is well"
            )
        damaged = _swap(files.metadata, made) if swap else files.metadata
        found = _described(files.metadata if swap else made, damaged, report, known)
    if not swap:
        return found
    try:
        _agree(files, report.transaction_id)
    except BlocksnapError as error:
        # What was saved must be told all the same.
        return replace(found, changes=(*found.changes, f"the catalog does not agree yet: {error}"))
    return found


# ---- the catalog


@dataclass(frozen=True, slots=True)
class _Known:
    """What the catalog of the damaged pool says; expected are the devices that must be there."""

    records: Mapping[int, DeviceRecord]
    expected: frozenset[int]
    transaction_id: int

    @classmethod
    def read(cls, path: Path) -> "_Known":
        """Read it; without one that can be read nothing is known."""
        try:
            catalog = Catalog.open(path, read_only=True)
        except (BlocksnapError, FileNotFoundError):
            return cls({}, frozenset(), 0)
        try:
            records, intent = catalog.records(), catalog.intent()
            intended = [each.record for each in intent if each.action is Action.CREATE]
            going = {each.record.id for each in intent if each.action is Action.DELETE}
            return cls(
                {record.id: record for record in [*intended, *records]},
                frozenset({record.id for record in records} - going),
                catalog.transaction_id,
            )
        finally:
            catalog.close()

    def name(self, device_id: int) -> str | None:
        return self.records[device_id].name if device_id in self.records else None


def _agree(files: PoolFiles, transaction_id: int) -> None:
    """Open the pool once, which brings its catalog into agreement; if that cannot be, by adopting it."""
    try:
        _open(files, adopt=False).close()
    except PoolFormatError:
        catalog = Catalog.open(files.catalog)
        with closing(catalog), suppress(PoolFormatError):
            catalog.recover(transaction_id)
        _open(files, adopt=True).close()


def _open(files: PoolFiles, *, adopt: bool) -> Pool:
    if files.directory is not None:
        return Pool.open(files.directory, adopt=adopt)
    return Pool.open(metadata=files.metadata, data=files.data, catalog=files.catalog, adopt=adopt)


# ---- the new metadata


def _build(
    files: PoolFiles, known: _Known, output: Path | None, block_size: int
) -> tuple[Path, RepairReport]:
    """Make the new metadata; return where they are."""
    options = {
        "block_size": block_size,
        "data_bytes": backing_size(files.data),
        "transaction_id": known.transaction_id,
    }
    if output is not None and output.exists():
        report = metadata_repair.repair(files.metadata, output, **options)
        _require_sound(output)
        return output, report
    made = output or files.metadata.with_name(files.metadata.name + ".repaired")
    if not made.parent.is_dir():
        raise DeviceNotFoundError(f"{made.parent} does not exist: make it, or give another output")
    unfinished = made.with_name(made.name + ".new")
    try:
        report = _build_file(files.metadata, unfinished, options)
        _require_sound(unfinished)
        with system_errors(str(made)):
            unfinished.rename(made)
            sync_directory(made.parent)
    finally:
        with suppress(OSError):  # the next repair sweeps it away
            unfinished.unlink(missing_ok=True)
    return made, report


def _build_file(damaged: Path, unfinished: Path, options: dict[str, int]) -> RepairReport:
    """Make them in a new file, as large as the damaged ones, or larger if there is no room."""
    size = max(backing_size(damaged) // 4096 * 4096, _SMALLEST)
    while True:
        with system_errors(str(unfinished)):
            unfinished.unlink(missing_ok=True)
        grow_file(unfinished, size, reserve=True)
        try:
            return metadata_repair.repair(damaged, unfinished, **options)
        except NoSpaceError:
            if size >= _LARGEST:
                raise
            size = min(2 * size, _LARGEST)


def _require_sound(made: Path) -> None:
    report = metadata_walks.check(made)
    if report.damaged:
        raise DamagedMetadataError(
            f"the repair made metadata that do not pass the check ({report.findings[0]}):"
            " keep the damaged ones and report it"
        )


def _swap(metadata: Path, made: Path) -> Path:
    """Put new metadata in the place of the damaged ones; return where those are then."""
    damaged = metadata.with_name(metadata.name + ".damaged")
    number = 1
    while os.path.lexists(damaged):
        number += 1
        damaged = metadata.with_name(f"{metadata.name}.damaged-{number}")
    with system_errors(str(metadata)):
        try:
            os.link(metadata, damaged)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise
            metadata.rename(damaged)  # a file system without hard links
        made.rename(metadata)
        sync_directory(metadata.parent)
    return damaged


# ---- what is told


def _described(made: Path, damaged: Path, report: RepairReport, known: _Known) -> PoolRepair:
    size = report.block_size
    present = {device.id for device in report.devices}
    gone = {lost.id: lost.reason for lost in report.lost_devices}
    gone |= dict.fromkeys(known.expected - present - gone.keys(), "nothing tells of it any more")
    return PoolRepair(
        metadata=str(made),
        damaged=str(damaged),
        devices=tuple(
            RepairedDevice(
                device.id,
                known.name(device.id),
                device.mappings * size,
                None if device.mappings_before is None else device.mappings_before * size,
            )
            for device in report.devices
        ),
        lost_devices=tuple(
            LostDevice(device_id, known.name(device_id), reason) for device_id, reason in sorted(gone.items())
        ),
        lost_ranges=tuple(
            found for lost in report.lost_blocks for found in _lost_ranges(made, lost, known, size)
        ),
        changes=tuple(
            change.what if change.device_id is None else f"thin device {change.device_id}: {change.what}"
            for change in report.changes
        ),
    )


def _lost_ranges(made: Path, lost: LostBlocks, known: _Known, block_size: int) -> Iterator[LostRange]:
    """Yield the parts of a range of thin blocks that are not mapped in the new pool, within the device."""
    if lost.device_id is None:
        return
    record = known.records.get(lost.device_id)
    last = lost.last if record is None else min(lost.last, (record.size - 1) // block_size)
    for begin, end in _unmapped(made, lost.device_id, lost.first, last):
        length = None if end > _LAST_BLOCK else (end - begin) * block_size
        yield LostRange(lost.device_id, known.name(lost.device_id), begin * block_size, length, lost.reason)


def _unmapped(made: Path, device_id: int, begin: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges (first, end) of thin blocks from begin to last without a mapping."""
    for mappings in metadata_walks.mappings(made, device_id, begin):
        mapped = mappings["thin_block"]
        mapped = mapped[mapped <= np.uint64(last)]
        if not len(mapped):
            break
        before = np.concatenate([[np.uint64(begin)], mapped[:-1] + np.uint64(1)])
        gaps = mapped > before
        yield from zip(before[gaps].tolist(), mapped[gaps].tolist(), strict=True)
        begin = int(mapped[-1]) + 1
    if begin <= last:
        yield begin, last + 1
