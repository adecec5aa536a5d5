"""Sparse files in tars: the old GNU form and GNU.sparse 0.0, 0.1 and 1.0 in PAX records.

Source: the appendix "Storing Sparse Files" of the GNU tar manual.
"""

from typing import NamedTuple

from ..errors import UnsafeLayerError
from .pax import Records
from .stream import BLOCK, TarStream

__all__ = ["Segment", "SparseMap", "number", "old_gnu_map", "pax_map"]

MAX_SEGMENTS = 1 << 20
_DIGITS = 20


class Segment(NamedTuple):
    """Bytes that are stored; what lies between segments is a hole."""

    offset: int
    length: int


class SparseMap(NamedTuple):
    """A file of size bytes; consumed counts the bytes of payload that hold the map itself."""

    segments: tuple[Segment, ...]
    size: int
    consumed: int = 0

    def check(self, stored: int) -> "SparseMap":
        """Return the map; refuse one whose segments overlap, leave the file or do not add up to stored."""
        end = 0
        for segment in self.segments:
            if segment.offset < end:
                raise UnsafeLayerError("its sparse map overlaps or runs backwards")
            end = segment.offset + segment.length
        if end > self.size:
            raise UnsafeLayerError(f"its sparse map reaches to {end}, past its size of {self.size}")
        total = sum(segment.length for segment in self.segments)
        if total != stored:
            raise UnsafeLayerError(f"its sparse map has {total} bytes, but {stored} are stored")
        return self


def number(field: bytes) -> int:
    """Return a number of a tar header: octal digits, or binary when the first bit is set (GNU)."""
    if field[:1] >= b"\x80":
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not digits.strip(b"01234567") and len(digits) <= len(field):
        return int(digits or b"0", 8)
    raise UnsafeLayerError("a number in its header is not octal")


def old_gnu_map(block: bytes, stream: TarStream) -> SparseMap:
    """Read the map of a header of type S; extension blocks follow it in the stream."""
    segments, extended, size = _old_gnu_segments(block[386:482]), block[482], number(block[483:495])
    while extended:
        if len(segments) > MAX_SEGMENTS:
            raise _too_many()
        extension = stream.read(BLOCK, "a sparse map")
        segments += _old_gnu_segments(extension[:504])
        extended = extension[504]
    return SparseMap(tuple(segments), size)


def _old_gnu_segments(data: bytes) -> list[Segment]:
    fields = [data[at : at + 24] for at in range(0, len(data), 24)]
    return [Segment(number(field[:12]), number(field[12:])) for field in fields if field.strip(b"\0")]


def pax_map(records: Records, stream: TarStream, stored: int) -> SparseMap | None:
    """Return the map that GNU.sparse records tell of, None when there are none."""
    if records.text("GNU.sparse.major") is not None:
        return _map_1_0(records, stream, stored)
    size = records.text("GNU.sparse.size")
    if size is None:
        return None
    joined = records.text("GNU.sparse.map")
    numbers = joined.split(",") if joined else records.sparse_numbers
    return SparseMap(_paired([_decimal(text) for text in numbers if text]), _decimal(size))


def _map_1_0(records: Records, stream: TarStream, stored: int) -> SparseMap:
    version = records.text("GNU.sparse.major"), records.text("GNU.sparse.minor")
    if version != ("1", "0"):
        raise UnsafeLayerError(f"its sparse format {version[0]}.{version[1]} is unknown")
    lines = _Lines(stream, stored)
    count = lines.next()
    if count > MAX_SEGMENTS:
        raise _too_many()
    numbers = [lines.next() for _ in range(2 * count)]
    return SparseMap(_paired(numbers), _decimal(records.text("GNU.sparse.realsize") or ""), lines.consumed)


class _Lines:
    """Decimal numbers, one a line, in blocks at the start of the payload."""

    def __init__(self, stream: TarStream, stored: int) -> None:
        self._stream = stream
        self._stored = stored
        self._rest = b""
        self.consumed = 0

    def next(self) -> int:
        while b"\n" not in self._rest:
            if self.consumed + BLOCK > self._stored or len(self._rest) > _DIGITS:
                raise UnsafeLayerError("its sparse map does not end")
            self._rest += self._stream.read(BLOCK, "a sparse map")
            self.consumed += BLOCK
        line, self._rest = self._rest.split(b"\n", 1)
        return _decimal(line.decode("ascii", "replace"))


def _paired(numbers: list[int]) -> tuple[Segment, ...]:
    if len(numbers) % 2:
        raise UnsafeLayerError("its sparse map has an offset without a length")
    if len(numbers) > 2 * MAX_SEGMENTS:
        raise _too_many()
    return tuple(map(Segment, numbers[::2], numbers[1::2]))


def _decimal(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= _DIGITS:
        return int(text)
    raise UnsafeLayerError("a number in its sparse map is not decimal")


def _too_many() -> UnsafeLayerError:
    return UnsafeLayerError(f"its sparse map has more than {MAX_SEGMENTS} segments")
