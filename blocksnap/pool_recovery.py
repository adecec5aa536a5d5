"""Opening the catalog of a pool so that both tell the same: finish or undo, then compare device by device."""

import time
from collections.abc import Collection
from contextlib import closing

from . import metadata as metadata_walks
from .catalog import ADOPT, Catalog
from .device_record import MAX_DEVICE_SIZE, Action, DeviceRecord, Operation
from .engines import Engine
from .errors import PoolFormatError
from .pool_files import PoolFiles
from .pool_walk import release_left
from .user_pool import EngineStatus

__all__ = ["open_catalog", "require_agreement"]

_SIZES = (Action.CREATE, Action.RESIZE, Action.SHRINK)


def open_catalog(files: PoolFiles, engine: Engine, *, adopt: bool = False) -> Catalog:
    """Return the catalog, recovered and in agreement with the pool; only a writable pool's is changed on
    disk.

    Without a catalog the pool gets one with devices named "thin-<id>". With adopt the pool is the truth: the
    catalog keeps the names it has for devices that are there and forgets the others.
    """
    status = engine.status()
    present = {info.id for info in engine.devices()}
    if not files.catalog.exists():
        path = None if status.read_only else files.catalog
        return Catalog.create(path, status.transaction_id, _named_by_number(files, status, present))
    catalog = Catalog.open(files.catalog, read_only=status.read_only)
    try:
        if adopt:
            known = [record for record in catalog.records() if record.id in present]
            unknown = present - {record.id for record in known}
            taken = {record.name for record in known}
            catalog.adopt([*known, *_named_by_number(files, status, unknown, taken)], status.transaction_id)
        if status.transaction_id == catalog.transaction_id and _settle(catalog, engine, present, files):
            present = {info.id for info in engine.devices()}
        catalog.recover(engine.status().transaction_id)
        _compare(catalog, present, files)
        if not status.read_only:
            release_left(engine, catalog)
    except BaseException:
        catalog.close()
        raise
    return catalog


def require_agreement(files: PoolFiles, engine: Engine) -> None:
    """Raise unless the catalog, if there is one, and the pool tell the same, or the next open sees to it."""
    if not files.catalog.exists():
        return
    with closing(Catalog.open(files.catalog, read_only=True)) as catalog:
        interrupted = {operation.record.id for operation in catalog.intent()}
        catalog.recover(engine.status().transaction_id)
        _compare(catalog, {info.id for info in engine.devices()}, files, interrupted)


def _settle(catalog: Catalog, engine: Engine, present: set[int], files: PoolFiles) -> bool:
    """Bring a pool whose engine commits each message to where the intent begins or ends; tell if it changed.

    Deletions and shrinkings come last and cannot be taken back: if one was made, or may have been, the rest
    of the transaction follows.
    """
    intended = catalog.intent()
    ids = {action: {each.record.id for each in intended if each.action is action} for action in Action}
    finish = bool(ids[Action.SHRINK] or ids[Action.DELETE] - present)
    unwanted = ids[Action.UNMAKE] | ids[Action.DELETE if finish else Action.CREATE]
    if engine.status().read_only and (finish or unwanted & present):
        raise PoolFormatError(
            f"a transaction of pool {files} was interrupted: open it for writing once, which repairs it"
        )
    if finish:
        _shrink(engine, catalog.records(), intended)
    for device_id in sorted(unwanted & present):
        engine.delete_device(device_id)
    if finish:
        engine.begin()
        engine.end(catalog.transaction_id, catalog.transaction_id + 1)
    elif unwanted & present:
        engine.commit()
    return finish or bool(unwanted & present)


def _shrink(engine: Engine, records: list[DeviceRecord], intended: list[Operation]) -> None:
    """Resize what an intent resizes, once more: the tails of what shrinks may be there still."""
    before = {record.id: record for record in records}
    present = {info.id for info in engine.devices()}
    for operation in intended:
        record = operation.record
        if operation.action is Action.SHRINK and record.id in present:
            old = before[record.id]
            with engine.open_device(old.id, old.size, old.external_origin) as device:
                device.resize(record.size)
        if operation.action in _SIZES:
            before[record.id] = record


def _named_by_number(
    files: PoolFiles, status: EngineStatus, device_ids: Collection[int], taken: Collection[str] = ()
) -> list[DeviceRecord]:
    return [
        DeviceRecord(
            device_id,
            _free_name(f"thin-{device_id}", taken),
            min(
                max(metadata_walks.end_of_mappings(files.metadata, device_id), 1) * status.block_size,
                MAX_DEVICE_SIZE,
            ),
            time.time_ns(),
        )
        for device_id in sorted(device_ids)
    ]


def _free_name(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "+"
    return name


def _compare(catalog: Catalog, present: set[int], files: PoolFiles, but: Collection[int] = ()) -> None:
    known = {record.id: record.name for record in catalog.records()}
    unknown = sorted(present - known.keys() - set(but))
    gone = sorted(known.keys() - present - set(but))
    missing = [f'"{known[device_id]}" (id {device_id})' for device_id in gone]
    if unknown:
        raise PoolFormatError(
            f"pool {files} holds thin devices that its catalog does not know (ids {_some(unknown)}): {ADOPT}"
        )
    if missing:
        raise PoolFormatError(
            f"the catalog of pool {files} names thin devices that it does not hold: {_some(missing)}; {ADOPT}"
        )


def _some(things: Collection[object]) -> str:
    shown = ", ".join(str(thing) for thing in list(things)[:5])
    return shown if len(things) <= 5 else f"{shown} and {len(things) - 5} more"
