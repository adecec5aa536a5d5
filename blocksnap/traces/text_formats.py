"""The text formats that have a name: how to know them by their first lines, and their layouts."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .request import DISCARD, FLUSH, READ, WRITE
from .text import NOTHING, WAIT, Layout

__all__ = ["TEXT_FORMATS", "WORDS", "TextFormat"]

SECTOR = 512
MILLISECOND, MICROSECOND, FILETIME = 1_000_000, 1_000, 100

WORDS: Mapping[str, int] = {
    "r": READ,
    "w": WRITE,
    "read": READ,
    "write": WRITE,
    "d": DISCARD,
    "discard": DISCARD,
    "trim": DISCARD,
    "unmap": DISCARD,
    "f": FLUSH,
    "flush": FLUSH,
    "sync": FLUSH,
    "fsync": FLUSH,
    "rs": READ,
    "ws": WRITE,
}

_IOLOG_WORDS = {
    "write": WRITE,
    "read": READ,
    "trim": DISCARD,
    "sync": FLUSH,
    "datasync": FLUSH,
    "wait": WAIT,
    "add": NOTHING,
    "open": NOTHING,
    "close": NOTHING,
}

# READ, WRITE, WRITE SAME and SYNCHRONIZE CACHE of all lengths; what else a disk is told moves no data.
_SCSI = {READ: "28 88 a8 08", WRITE: "2a 8a aa 0a 2e 8e ae 41 93", FLUSH: "35 91"}
_SCSI_WORDS = {word: kind for kind, words in _SCSI.items() for word in words.split()}
_SCSI_WORDS |= {word: NOTHING for word in (f"{code:02x}" for code in range(256)) if word not in _SCSI_WORDS}


@dataclass(frozen=True, slots=True)
class TextFormat:
    """A text format and its layout; `line` matches each of its lines, `header` its first one if it has one.

    `tell` decides between formats whose lines look alike, from the fields of the first lines.
    """

    name: str
    summary: str
    layout: Layout
    line: re.Pattern[str]
    header: re.Pattern[str] | None = None
    tell: Callable[[Sequence[Sequence[str]]], bool] | None = None


def _pattern(text: str) -> re.Pattern[str]:
    """Compile a pattern in which N stands for a whole number, T for one with a fraction or without."""
    spelled = text.replace("T", r"\d+(?:\.\d+)?").replace("N", r"-?\d+")
    return re.compile(spelled + r"\s*\Z", re.IGNORECASE)


def _in_bytes(lines: Sequence[Sequence[str]]) -> bool:
    return all(int(field) % SECTOR == 0 for fields in lines for field in fields[2:4])


def _has_fractions(lines: Sequence[Sequence[str]]) -> bool:
    return any("." in fields[0] for fields in lines)


_FIVE_COLUMNS = _pattern(r"\s*T\s+N\s+N\s+N\s+[0-9a-f]+")


def _five_columns(*, time_unit: int, unit: int) -> Layout:
    return Layout(
        time=0,
        device=1,
        offset=2,
        length=3,
        kind=4,
        separator=" ",
        words={"0": WRITE, "1": READ},
        time_unit=time_unit,
        offset_unit=unit,
        length_unit=unit,
    )


def _iolog(version: int, layout: Layout) -> TextFormat:
    return TextFormat(
        f"iolog{version}",
        f"fio's write_iolog, version {version}",
        layout,
        re.compile(r"(?!)"),
        re.compile(rf"fio version {version} iolog\s*\Z"),
    )


TEXT_FORMATS = (
    TextFormat(
        "blkparse",
        "what blkparse prints, its requests queued",
        Layout(
            device=0,
            time=3,
            kind=6,
            offset=7,
            length=9,
            separator=" ",
            only=(5, "Q"),
            offset_unit=SECTOR,
            length_unit=SECTOR,
        ),
        _pattern(r"\s*\d+,\d+\s+\d+\s+\d+\s+\d+\.\d{9}\s+\d+\s+[A-Za-z]{1,2}\s+\S.*"),
    ),
    _iolog(2, Layout(device=0, kind=1, offset=2, length=3, separator=" ", words=_IOLOG_WORDS, skip=1)),
    _iolog(
        3,
        Layout(
            time=0,
            device=1,
            kind=2,
            offset=3,
            length=4,
            separator=" ",
            words=_IOLOG_WORDS,
            time_unit=MICROSECOND,
            skip=1,
        ),
    ),
    TextFormat(
        "iolog1",
        "fio's oldest iolog: 0 or 1, offset, length",
        Layout(kind=0, offset=1, length=2, words={"0": READ, "1": WRITE}),
        _pattern(r"[01]\s*,\s*N\s*,\s*N"),
    ),
    TextFormat(
        "msr",
        "MSR Cambridge: Timestamp,Hostname,DiskNumber,Type,Offset,Size,ResponseTime",
        Layout(time=0, host=1, device=2, kind=3, offset=4, length=5, words=WORDS, time_unit=FILETIME),
        _pattern(r"\d{15,},[^,]*,N,(?:read|write),N,N,N"),
        _pattern(r"timestamp,hostname,disknumber,type,offset,size(?:,.*)?"),
    ),
    TextFormat(
        "alibaba",
        "Alibaba: device_id,opcode,offset,length,timestamp",
        Layout(device=0, kind=1, offset=2, length=3, time=4, words=WORDS, time_unit=MICROSECOND),
        _pattern(r"N,[RW],N,N,\d+"),
        _pattern(r"device_id,opcode,offset,length,timestamp"),
    ),
    TextFormat(
        "spc",
        "SPC (UMass): ASU,LBA,Size,Opcode,Timestamp",
        Layout(device=0, offset=1, length=2, kind=3, time=4, words=WORDS, offset_unit=SECTOR),
        _pattern(r"N,N,N,[RW],T(?:,.*)?"),
    ),
    TextFormat(
        "tencent",
        "Tencent CBS: Timestamp,Offset,Size,IOType,VolumeID",
        Layout(
            time=0,
            offset=1,
            length=2,
            kind=3,
            device=4,
            words={"0": READ, "1": WRITE},
            offset_unit=SECTOR,
            length_unit=SECTOR,
        ),
        _pattern(r"\d+,N,N,[01],N"),
        _pattern(r"timestamp,offset,size,iotype,volumeid"),
    ),
    TextFormat(
        "libcachesim",
        "libCacheSim: version,time,op,size,lbn with SCSI operations",
        Layout(time=1, kind=2, length=3, offset=4, words=_SCSI_WORDS, offset_unit=SECTOR),
        re.compile(r"(?!)"),
        _pattern(r"version,time,op,size,lbn"),
    ),
    TextFormat(
        "diskmon",
        "DiskMon: sequence, time, duration, disk, Read or Write, sector, length",
        Layout(
            time=1,
            device=3,
            kind=4,
            offset=5,
            length=6,
            separator="\t",
            words=WORDS,
            offset_unit=SECTOR,
            length_unit=SECTOR,
        ),
        _pattern(r"\d+\tT\tT\t\d+\t(?:read|write)\tN\tN"),
    ),
    TextFormat(
        "heimdall",
        "time in milliseconds, device, offset, length in bytes, 0 for a write or 1",
        _five_columns(time_unit=MILLISECOND, unit=1),
        _FIVE_COLUMNS,
        tell=lambda lines: _has_fractions(lines) and _in_bytes(lines),
    ),
    TextFormat(
        "disksim",
        "DiskSim ASCII: time in milliseconds, device, sector, sectors, 0 for a write or 1",
        _five_columns(time_unit=MILLISECOND, unit=SECTOR),
        _FIVE_COLUMNS,
        tell=_has_fractions,
    ),
    TextFormat(
        "mqsim",
        "MQSim and SSDsim: time in nanoseconds, device, sector, sectors, 0 for a write or 1",
        _five_columns(time_unit=1, unit=SECTOR),
        _FIVE_COLUMNS,
        tell=lambda lines: not _has_fractions(lines),
    ),
)
"""In the order in which they are tried."""
