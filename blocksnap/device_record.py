"""What a catalog knows of a thin device, what is done to one, and how both lie in a row of the database."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from reprlib import repr as shown
from typing import Any

from .database import UnfitRowError

__all__ = [
    "COLUMNS",
    "MAX_DEVICE_ID",
    "MAX_DEVICE_SIZE",
    "MAX_NAME_BYTES",
    "SECTOR_SIZE",
    "Action",
    "DeviceRecord",
    "Operation",
    "is_name",
    "labels_text",
    "operation_of",
    "record_of",
    "row_of",
]

MAX_DEVICE_ID = (1 << 24) - 1
MAX_DEVICE_SIZE = 1 << 62
MAX_NAME_BYTES = 255
SECTOR_SIZE = 512
COLUMNS = "id, name, size, origin, created, labels, external_origin, condemned"


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """What the catalog knows of a thin device; size in bytes, created in ns since 1970, origin an id.

    external_origin is the path of what is read where the device has no block of its own. A condemned device
    is to be deleted once nobody uses it; its name is free for others.
    """

    id: int
    name: str
    size: int
    created: int
    origin: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    external_origin: str | None = None
    condemned: bool = False


class Action(StrEnum):
    CREATE = "create"
    DELETE = "delete"
    RESIZE = "resize"
    SHRINK = "shrink"
    """A resize of an engine that commits at once: what lies behind the new end may be gone already."""
    RELABEL = "relabel"
    CONDEMN = "condemn"
    UNMAKE = "unmake"
    """A creation that an abort is taking back."""


@dataclass(frozen=True, slots=True)
class Operation:
    """An intended change; the record is the device after it (for a deletion: before it)."""

    action: Action
    record: DeviceRecord

    def creates(self, device_id: int) -> bool:
        return self.action is Action.CREATE and self.record.id == device_id


def is_name(text: str) -> bool:
    """Tell whether a text can name a thin device."""
    if not text or text in (".", "..") or "/" in text or not text.isprintable():
        return False
    return len(text.encode(errors="surrogateescape")) <= MAX_NAME_BYTES


def labels_text(record: DeviceRecord) -> str:
    """Return the labels as they lie in a row."""
    return json.dumps(dict(record.labels), sort_keys=True)


def row_of(record: DeviceRecord) -> tuple[Any, ...]:
    """Return the values of COLUMNS."""
    return (
        record.id,
        record.name,
        record.size,
        record.origin,
        record.created,
        labels_text(record),
        record.external_origin,
        record.condemned,
    )


def record_of(row: Sequence[Any]) -> DeviceRecord:
    """Return the record of a row of COLUMNS; UnfitRowError for one that `row_of` never made."""
    device_id, name, size, origin, created, labels, below, condemned = row
    _require(_is_id(device_id), device_id, "is its id:", device_id)
    _require(condemned in (0, 1), device_id, "is condemned:", condemned)
    free = name.removeprefix(f"{device_id}/") if condemned and isinstance(name, str) else name
    _require(isinstance(free, str) and is_name(free), device_id, "has the name", name)
    fits = isinstance(size, int) and 0 < size <= MAX_DEVICE_SIZE and size % SECTOR_SIZE == 0
    _require(fits, device_id, "has the size", size)
    _require(origin is None or _is_id(origin), device_id, "has the origin", origin)
    _require(isinstance(created, int), device_id, "was made at", created)
    absolute = isinstance(below, str) and below.startswith("/")
    _require(below is None or absolute, device_id, "has the external origin", below)
    known = _labels_of(device_id, labels)
    return DeviceRecord(device_id, name, size, created, origin, known, below, bool(condemned))


def operation_of(action: str, row: Sequence[Any]) -> Operation:
    """Return the operation of a row of the intent; UnfitRowError for one that nobody intended."""
    record = record_of(row)
    _require(action in set(Action), record.id, "is to be changed by", action)
    return Operation(Action(action), record)


def _labels_of(device_id: int, text: Any) -> dict[str, str]:
    try:
        labels = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        labels = None
    fits = isinstance(labels, dict) and all(isinstance(value, str) for value in labels.values())
    _require(fits, device_id, "has the labels", text)
    return dict(labels)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= MAX_DEVICE_ID


def _require(fits: bool, device_id: Any, what: str, value: Any) -> None:
    if not fits:
        raise UnfitRowError(f"thin device {shown(device_id)} {what} {shown(value)}")
