"""HP's SRT traces, as DiskSim ships them: a text header, then big-endian records."""

import re
from collections.abc import Iterator
from typing import Any

from .._native import ffi, lib
from ..errors import TraceError
from .complaints import Complaints
from .records import Piece, native_piece, read_records
from .request import Requests
from .stream import ByteStream

__all__ = ["MAGIC", "read_srt"]

MAGIC = b"$$TR_IOREC"

_HEADER = 1 << 16
_SHORTEST = 52
_SECTOR_SIZE = 256


def read_srt(stream: ByteStream, complaints: Complaints, *, ordered: bool = True) -> Iterator[Requests]:
    """Return the requests of a trace; its header says how large the sectors of its disks are."""
    sector_size = _sector_size(_take_header(stream))
    progress = ffi.new("struct bs_trace_progress *")

    def native(data: Any, length: int, out: Any, capacity: int) -> int:
        code: int = lib.bs_trace_srt(data, length, sector_size, ordered, out, capacity, progress)
        return code

    def read(view: memoryview) -> Piece:
        return native_piece(native, view, progress, _SHORTEST)

    return read_records(stream, read, complaints)


def _take_header(stream: ByteStream) -> bytes:
    length = stream.peek(_HEADER).find(b"\f") + 1
    if length == 0:
        raise TraceError(f"{stream.name}: the header of the SRT trace has no end: the file is cut or damaged")
    header = bytearray(length)
    stream.fill(memoryview(header))
    return bytes(header)


def _sector_size(header: bytes) -> int:
    match = re.search(rb"sectorsize\s*=\s*(\d{1,5})\b", header)
    return int(match[1]) if match else _SECTOR_SIZE
