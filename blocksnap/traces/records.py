"""The loop of every reader: a window over the stream, records read from it by the C core, complaints."""

import errno
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .._native import ffi, lib
from .complaints import Complaints
from .request import REQUEST, Requests
from .stream import ByteStream, Ending, Window

__all__ = ["Piece", "native_piece", "read_records"]

_CHUNK = 4 << 20


class Piece(NamedTuple):
    """What was read from the front of a buffer: requests, bytes, and the number of the last record.

    `reason` says why that record is bad; `lost` that no record can be found behind it.
    """

    requests: Requests
    consumed: int
    record: int
    reason: str | None = None
    lost: bool = False


def native_piece(
    call: Callable[[Any, int, Any, int], int], view: memoryview, progress: Any, shortest: int
) -> Piece:
    """Read with a function of the C core that takes input, its length, output and its capacity.

    `shortest` is the least number of bytes for a request.
    """
    out = np.empty(len(view) // shortest + 2, REQUEST)
    code = call(ffi.from_buffer(view), len(view), ffi.from_buffer("struct bs_request *", out), len(out))
    reason = ffi.string(lib.bs_last_error()).decode(errors="replace") if code < 0 else None
    return Piece(out[: progress.count], progress.consumed, progress.record, reason, code == -errno.EUCLEAN)


def read_records(
    stream: ByteStream,
    read: Callable[[memoryview], Piece],
    complaints: Complaints,
    *,
    ending: Ending | None = None,
) -> Iterator[Requests]:
    """Yield the requests of a stream, some ten thousand at a time, and complain of what is bad.

    `ending` returns what the last record may lack.
    """
    window = Window(stream, _CHUNK, ending)
    record = 0
    while window.refill():
        for piece in _pieces(window, read):
            record = piece.record
            if len(piece.requests):
                yield piece.requests
            if piece.lost:
                complaints.end(stream.name, record, piece.reason or "")
                return
            if piece.reason is not None:
                complaints.bad_record(stream.name, record, piece.reason)
    if window.is_full:
        complaints.end(stream.name, record + 1, "does not end within 4 MiB: damaged, or of another format")
    else:
        without = " without a newline" if ending else ""
        complaints.check_end(stream, record + 1, len(window.view), without=without)


def _pieces(window: Window, read: Callable[[memoryview], Piece]) -> Iterator[Piece]:
    """Read what the window holds whole; every piece but the last ends with a bad record."""
    bad = True
    while bad:
        piece = read(window.view)
        window.take(piece.consumed)
        bad = piece.reason is not None and not piece.lost
        yield piece
