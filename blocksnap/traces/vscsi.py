"""CloudPhysics vscsi traces, version 1 and 2, in either byte order."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .._native import ffi, lib
from .complaints import Complaints
from .records import Piece, native_piece, read_records
from .request import Requests
from .stream import ByteStream

__all__ = ["Variant", "read_vscsi", "variant_of"]


class Variant(NamedTuple):
    """Version of the format and byte order (True: big-endian)."""

    version: int
    swapped: bool


_SIZES = {1: 32, 2: 40}
_COMMAND_AND_VERSION = {1: 12, 2: 0}
_HEAD = 64


def variant_of(head: bytes) -> Variant | None:
    """Return the variant in which all of the first records have a likely version and command, or None."""
    for version in (2, 1):  # a small number of segments looks like version 1
        for swapped in (False, True):
            if _fits(head, Variant(version, swapped)):
                return Variant(version, swapped)
    return None


def _fits(head: bytes, variant: Variant) -> bool:
    size = _SIZES[variant.version]
    count = min(len(head) // size, _HEAD)
    if count == 0:
        return False
    records = np.frombuffer(head, np.uint8, count * size).reshape(count, size)
    place = _COMMAND_AND_VERSION[variant.version]
    pairs = np.ascontiguousarray(records[:, place : place + 4]).view(">u2" if variant.swapped else "<u2")
    return bool((pairs[:, 0] <= 0xFF).all() and (pairs[:, 1] >> 8 == variant.version).all())


def read_vscsi(
    stream: ByteStream, complaints: Complaints, *, variant: Variant | None = None, ordered: bool = True
) -> Iterator[Requests]:
    """Return the requests of a trace; the variant is taken from its first records."""
    version, swapped = variant or variant_of(stream.peek(_HEAD * 40)) or Variant(1, swapped=False)
    form = ffi.new("struct bs_trace_vscsi *", {"version": version, "swapped": swapped, "ordered": ordered})
    progress = ffi.new("struct bs_trace_progress *")

    def native(data: Any, length: int, out: Any, capacity: int) -> int:
        code: int = lib.bs_trace_vscsi(data, length, form, out, capacity, progress)
        return code

    def read(view: memoryview) -> Piece:
        return native_piece(native, view, progress, _SIZES[version])

    return read_records(stream, read, complaints)
