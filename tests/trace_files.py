"""Writes traces in each format, so that what is read can be held against what was meant."""

import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from blocksnap.traces import DISCARD, FLUSH, READ, REQUEST, WRITE, Requests, Trace

__all__ = ["CARRIED", "TEXTS", "Row", "blktrace_event", "read", "requests", "vscsi"]

CARRIED = Path(__file__).parent / "traces"

Row = tuple[int, int, int, int, int]
"""time, offset, length, kind, device."""

SECTOR = 512


def requests(rows: Sequence[Row]) -> Requests:
    return np.array(list(rows), REQUEST)


def read(*paths: Path | str, **options: object) -> Requests:
    with Trace(paths, **options) as trace:  # type: ignore[arg-type]
        return np.concatenate([np.empty(0, REQUEST), *trace])


def _lines(form: Callable[[Row], str], header: str = "") -> Callable[[Sequence[Row]], bytes]:
    return lambda rows: (header + "".join(form(row) + "\n" for row in rows)).encode()


def _seconds(ns: int) -> str:
    return f"{ns // 10**9}.{ns % 10**9:09d}"


def _milliseconds(ns: int) -> str:
    return f"{ns // 10**6}.{ns % 10**6:06d}"


def _sectors(row: Row) -> str:
    return f"{row[1] // SECTOR} {row[2] // SECTOR}"


_RW = {READ: "R", WRITE: "W", DISCARD: "D", FLUSH: "F"}
_WORDS = {READ: "read", WRITE: "write", DISCARD: "trim", FLUSH: "sync"}

TEXTS: dict[str, tuple[Callable[[Sequence[Row]], bytes], int, tuple[int, ...]]] = {
    "msr": (
        _lines(lambda r: f"{r[0] // 100},hm,{r[4]},{_WORDS[r[3]].title()},{r[1]},{r[2]},4711"),
        100,
        (READ, WRITE),
    ),
    "alibaba": (_lines(lambda r: f"{r[4]},{_RW[r[3]]},{r[1]},{r[2]},{r[0] // 1000}"), 1000, (READ, WRITE)),
    "tencent": (
        _lines(lambda r: f"{r[0] // 10**9},{_sectors(r).replace(' ', ',')},{r[3]},{r[4]}"),
        10**9,
        (READ, WRITE),
    ),
    "spc": (
        _lines(lambda r: f"{r[4]},{r[1] // SECTOR},{r[2]},{_RW[r[3]].lower()},{_seconds(r[0])}"),
        1,
        (READ, WRITE),
    ),
    "libcachesim": (
        _lines(
            lambda r: f"1,{r[0] // 10**9},{'2a' if r[3] else '28'},{r[2]},{r[1] // SECTOR}",
            "version,time,op,size,lbn\n",
        ),
        10**9,
        (READ, WRITE),
    ),
    "diskmon": (
        _lines(
            lambda r: (
                f"7\t{_seconds(r[0])}\t0.0001\t{r[4]}\t{_WORDS[r[3]].title()}\t"
                + _sectors(r).replace(" ", "\t")
                + "\r"
            )
        ),
        1,
        (READ, WRITE),
    ),
    "disksim": (_lines(lambda r: f"{_milliseconds(r[0])} {r[4]} {_sectors(r)} {1 - r[3]}"), 1, (READ, WRITE)),
    "heimdall": (
        _lines(lambda r: f"{_milliseconds(r[0])} {r[4]} {r[1]} {r[2]} {1 - r[3]}"),
        1,
        (READ, WRITE),
    ),
    "mqsim": (_lines(lambda r: f"{r[0]} {r[4]} {_sectors(r)} {1 - r[3]}"), 1, (READ, WRITE)),
    "iolog3": (
        _lines(lambda r: f"{r[0] // 1000} {r[4]} {_WORDS[r[3]]} {r[1]} {r[2]}", "fio version 3 iolog\n"),
        1000,
        (READ, WRITE, DISCARD, FLUSH),
    ),
    "csv": (
        _lines(
            lambda r: f"{_WORDS[r[3]].upper()};{r[4]};{r[2]};{r[1]};{r[0]}",
            "op;device;length;offset;time_ns\n",
        ),
        1,
        (READ, WRITE, DISCARD, FLUSH),
    ),
    "blkparse": (
        _lines(
            lambda r: (
                f"{r[4] >> 20:3},{r[4] & 0xFFFFF} {0:4} {1:8} {_seconds(r[0]):>14} {4711:5}  Q "
                + (
                    "FWS [kworker]"
                    if r[3] == FLUSH
                    else f"{_RW[r[3]]}S {r[1] // SECTOR} + {r[2] // SECTOR} [cp]"
                )
            )
        ),
        1,
        (READ, WRITE, DISCARD, FLUSH),
    ),
}
"""Of each text format: its writer, the unit of its times in nanoseconds, and the kinds it knows."""

_EVENT = {READ: 1 << 16, WRITE: 1 << 17, DISCARD: 1 << 17 | 1 << 29, FLUSH: 1 << 17 | 1 << 18}


def blktrace_event(row: Row, *, action: int = 1, pdu: bytes = b"", order: str = "<", flags: int = 0) -> bytes:
    """Return a record; `flags` are added to the action."""
    time, offset, length, kind, device = row
    length = 0 if kind == FLUSH else length
    category = _EVENT[kind] | flags | action
    head = struct.pack(
        order + "IIQQIIIIIHH",
        0x65617407,
        1,
        time,
        offset // SECTOR,
        length,
        category,
        4711,
        device,
        0,
        0,
        len(pdu),
    )
    return head + pdu


def vscsi(rows: Sequence[Row], *, version: int = 1, order: str = "<") -> bytes:
    def records() -> Iterator[bytes]:
        for serial, (time, offset, length, kind, _) in enumerate(rows):
            command, sector, microseconds = (0x28, 0x2A)[kind], offset // SECTOR, time // 1000
            if version == 1:
                yield struct.pack(order + "IIIHHQQ", serial, length, 1, command, 1 << 8, sector, microseconds)
            else:
                yield struct.pack(
                    order + "HHIIIQQQ", command, 2 << 8, serial, length, 1, sector, microseconds, 5
                )

    return b"".join(records())
