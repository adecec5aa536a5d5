"""Binary traces of blktrace, version 7, in either byte order."""

from collections.abc import Iterator
from typing import Any

from .._native import ffi, lib
from .complaints import Complaints
from .records import Piece, native_piece, read_records
from .request import Requests
from .stream import ByteStream

__all__ = ["EVENTS", "is_swapped", "read_blktrace"]

EVENTS = {"queue": 1, "issue": 7, "complete": 8}
"""The events that can stand for requests, and the number of each action."""

_MAGIC = b"\x74\x61\x65"
_EVENT = 48


def is_swapped(head: bytes) -> bool | None:
    """Say whether the first record is big-endian; None if it is not of blktrace."""
    if head[1:4] == _MAGIC:
        return False
    return True if head[:3] == _MAGIC[::-1] else None


def read_blktrace(stream: ByteStream, complaints: Complaints, *, event: str = "queue") -> Iterator[Requests]:
    """Return the requests in the order of the file, which is by time only within each processor's pieces.

    A write with a preflush becomes a flush and a write, as in the block layer.
    """
    progress = ffi.new("struct bs_trace_progress *")
    swapped = bool(is_swapped(stream.peek(4)))

    def native(data: Any, length: int, out: Any, capacity: int) -> int:
        code: int = lib.bs_trace_blktrace(data, length, EVENTS[event], swapped, out, capacity, progress)
        return code

    def read(view: memoryview) -> Piece:
        return native_piece(native, view, progress, _EVENT // 2)

    return read_records(stream, read, complaints)
