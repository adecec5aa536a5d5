"""Opening the catalog of a pool so that both tell the same: finish or undo, then compare device by device."""

import time
from collections.abc import Collection

from . import metadata as metadata_walks
from .catalog import ADOPT, Action, Catalog, DeviceRecord
from .engines import Engine
from .errors import PoolFormatError
from .pool_files import PoolFiles
from .pool_walk import release_left
from .user_pool import EngineStatus

__all__ = ["open_catalog"]

_MAX_SIZE = 1 << 62


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


def _settle(catalog: Catalog, engine: Engine, present: set[int], files: PoolFiles) -> bool:
    """Bring a pool whose engine commits each message to where the intent begins or ends; tell if it changed.

    Deletions come last and cannot be taken back: if one was made, the rest of the transaction follows.
    """
    intended = catalog.intent()
    made = {each.record.id for each in intended if each.action is Action.CREATE}
    deletions = [each for each in intended if each.action is Action.DELETE]
    gone = [each for each in deletions if each.record.id not in present]
    whole = made <= present
    unwanted = made if not gone or not whole else {each.record.id for each in deletions}
    if engine.status().read_only and (gone or unwanted & present):
        raise PoolFormatError(
            f"a transaction of pool {files} was interrupted: open it for writing once, which repairs it"
        )
    for device_id in sorted(unwanted & present):
        engine.delete_device(device_id)
    if gone:
        if not whole:  # an abort was interrupted
            catalog.intend(gone, again=True)
        engine.begin()
        engine.end(catalog.transaction_id, catalog.transaction_id + 1)
    elif unwanted & present:
        engine.commit()
    return bool(gone or unwanted & present)


def _named_by_number(
    files: PoolFiles, status: EngineStatus, device_ids: Collection[int], taken: Collection[str] = ()
) -> list[DeviceRecord]:
    return [
        DeviceRecord(
            device_id,
            _free_name(f"thin-{device_id}", taken),
            min(
                max(metadata_walks.end_of_mappings(files.metadata, device_id), 1) * status.block_size,
                _MAX_SIZE,
            ),
            time.time_ns(),
        )
        for device_id in sorted(device_ids)
    ]


def _free_name(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "+"
    return name


def _compare(catalog: Catalog, present: set[int], files: PoolFiles) -> None:
    known = {record.id: record.name for record in catalog.records()}
    unknown = sorted(present - known.keys())
    missing = [f'"{known[device_id]}" (id {device_id})' for device_id in sorted(known.keys() - present)]
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
