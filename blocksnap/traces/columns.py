"""Tables with named columns, CSV or parquet: what a column's name says of its content and unit."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import TraceError
from .request import READ, WRITE
from .text import Layout
from .text_formats import SECTOR, WORDS

__all__ = ["Column", "column_of", "columns_of", "layout_of", "separator_of"]

_TIME = re.compile(
    r"(?:time|timestamp|ts|clock|time_?stamp|issue_time|arrival)(?:_?(s|sec|seconds|ms|us|ns))?\Z"
)
_TIME_UNITS = {"s": 10**9, "sec": 10**9, "seconds": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_NAMES: Mapping[str, tuple[tuple[int, str], ...]] = {
    "offset": (
        (1, "offset offset_bytes byte_offset address addr start"),
        (SECTOR, "sector sectornum lba lbn blkno lsn offset_sectors start_sector offset_sector"),
    ),
    "length": (
        (1, "length size bytes len size_bytes length_bytes nbytes io_size request_size byte_count"),
        (SECTOR, "sectors nsectors nr_sectors num_sectors size_sectors length_sectors sector_count"),
    ),
    "kind": (
        (1, "op operation type kind opcode rw action io_type iotype cmd command"),
        (0, "is_write is_read"),
    ),
    "device": (
        (1, "device dev disk volume device_id dev_id disk_id volume_id volumeid disknumber file filename"),
    ),
    "host": ((1, "host hostname server"),),
}
_EXAMPLES = {
    "offset": '"offset" or "sector"',
    "length": '"length" or "sectors"',
    "kind": '"op" or "is_write"',
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column that matters: its place from 0 on, its name, and its unit in nanoseconds or bytes."""

    index: int
    name: str
    unit: int

    @property
    def words(self) -> Mapping[str, int]:
        """What the operations of a column of kinds are called."""
        flags = {"is_write": (READ, WRITE), "is_read": (WRITE, READ)}.get(_plain(self.name))
        if flags is None:
            return WORDS
        no, yes = flags
        return {"0": no, "1": yes, "false": no, "true": yes}


def _plain(name: str) -> str:
    return re.sub(r"[\s.-]+", "_", name.strip().strip('"').strip().lower())


def column_of(index: int, name: str) -> tuple[str, Column] | None:
    """Return what a column holds and the column, None if its name says nothing to us."""
    plain = _plain(name)
    if match := _TIME.match(plain):
        return "time", Column(index, name, _TIME_UNITS[match[1] or "s"])
    for role, spellings in _NAMES.items():
        for unit, names in spellings:
            if plain in names.split():
                return role, Column(index, name, unit)
    return None


def columns_of(names: Sequence[str], trace: str) -> Mapping[str, Column]:
    """Return the columns by what they hold; TraceError if offset, length or operation is not among them."""
    found: dict[str, Column] = {}
    for index, name in enumerate(names):
        if known := column_of(index, name):
            found.setdefault(*known)
    for role, examples in _EXAMPLES.items():
        if role not in found:
            what = "operation" if role == "kind" else role
            have = ", ".join(name.strip() for name in names[:12])
            raise TraceError(
                f"{trace}: no column holds the {what}: name one {examples} (--columns); there are {have}"
            )
    return found


def separator_of(header: str) -> str:
    """Return what separates the names of a header: comma, semicolon, tab or blanks."""
    best = max(",;\t", key=header.count)
    return best if best in header else " "


def layout_of(header: str, trace: str, *, separator: str | None = None, skip: int = 1) -> Layout:
    """Return the layout of a CSV trace from its header line."""
    separator = separator or separator_of(header)
    names = header.split() if separator == " " else header.split(separator)
    columns = columns_of(names, trace)
    time, device, host = columns.get("time"), columns.get("device"), columns.get("host")
    return Layout(
        separator=separator,
        offset=columns["offset"].index,
        offset_unit=columns["offset"].unit,
        length=columns["length"].index,
        length_unit=columns["length"].unit,
        kind=columns["kind"].index,
        words=columns["kind"].words,
        time=time.index if time else None,
        time_unit=time.unit if time else 1,
        device=device.index if device else None,
        host=host.index if host else None,
        skip=skip,
    )
