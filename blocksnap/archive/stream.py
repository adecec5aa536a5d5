"""A tar read forward only: counted, limited, and never past its end without an error."""

import io
from collections.abc import Iterator
from typing import BinaryIO

from ..errors import UnsafeLayerError
from ..units import format_size

__all__ = ["BLOCK", "PIECE", "TarStream"]

BLOCK = 512
PIECE = 1 << 20


class TarStream:
    """The bytes of a tar from its start; a seekable one is skipped through without reading.

    The limit is on all bytes that come out of it, so it holds for what a decompressor inflates.
    """

    def __init__(self, raw: BinaryIO, max_bytes: int, *, seek: bool = False) -> None:
        self._raw = raw
        self._max_bytes = max_bytes
        self._seek_end = _size_of(raw) if seek else None
        self.position = 0

    def read_some(self, size: int) -> bytes:
        """Return at most size bytes, b"" at the end of the stream."""
        data = self._raw.read(size)
        self.position += len(data)
        if self.position > self._max_bytes:
            limit = format_size(self._max_bytes)
            raise UnsafeLayerError(f"the layer inflates to more than {limit}: raise the limit if it is meant")
        return data

    def read(self, size: int, what: str) -> bytes:
        """Return exactly size bytes; what names them in the error of a truncated archive."""
        data = self.read_some(size)
        if len(data) == size:
            return data
        return b"".join([data, *self._pieces(size - len(data), what)])

    def read_block(self, what: str) -> bytes:
        """Return one block, b"" at the end of the stream."""
        data = self.read_some(BLOCK)
        return data and (data + self.read(BLOCK - len(data), what))

    def pieces(self, size: int, what: str) -> Iterator[bytes]:
        """Yield exactly size bytes in pieces."""
        yield from self._pieces(size, what)

    def skip_padding(self) -> None:
        """Step to the start of the next block; at the end of the stream the padding may be missing."""
        left = -self.position % BLOCK
        while left and (data := self.read_some(left)):
            left -= len(data)

    def skip(self, size: int, what: str) -> None:
        """Step over size bytes."""
        if self._seek_end is None:
            for _ in self._pieces(size, what):
                pass
            return
        if self.position + size > self._seek_end:
            raise _truncated(what)
        self.position += size
        self._raw.seek(size, io.SEEK_CUR)

    def drain(self) -> None:
        """Read what is behind the end mark: padding, and the check of the digest in a verified stream."""
        while self.read_some(PIECE):
            pass

    def _pieces(self, size: int, what: str) -> Iterator[bytes]:
        while size:
            data = self.read_some(min(size, PIECE))
            if not data:
                raise _truncated(what)
            size -= len(data)
            yield data


def _size_of(raw: BinaryIO) -> int:
    size = raw.seek(0, io.SEEK_END)
    raw.seek(0)
    return size


def _truncated(what: str) -> UnsafeLayerError:
    return UnsafeLayerError(f"the archive is truncated inside {what}: fetch it again")
