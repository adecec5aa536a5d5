"""The bytes of a trace file, decompressed on the way; read once, from front to back, in constant memory."""

import bz2
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

import zstandard

from ..errors import system_errors

__all__ = ["ByteStream", "Ending", "Window"]

_PIECE = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DAMAGED = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError)


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


_COMPRESSIONS: tuple[tuple[bytes, str, Callable[[], _Decompressor]], ...] = (
    (b"\x1f\x8b", "gzip", lambda: zlib.decompressobj(wbits=31)),
    (b"BZh", "bz2", bz2.BZ2Decompressor),
    (b"\xfd7zXZ\x00", "xz", lzma.LZMADecompressor),
    (
        b"\x28\xb5\x2f\xfd",
        "zstd",
        lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    ),
)


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    if path == "-":
        return sys.stdin.buffer
    return open(path, "rb", buffering=0)


class ByteStream:
    """A file, or "-" for standard input; gzip, bz2, xz and zstd are known by their first bytes.

    A compressed file that ends early or is damaged gives what can be had and then ends; `damage` says why.
    `position` counts the bytes of the file itself, of `size` (None for a pipe).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = "standard input" if path == "-" else os.fspath(path)
        self.damage: str | None = None
        self.position = 0
        with system_errors(self.name):
            self._file = _open(path)
            status = os.fstat(self._file.fileno())
            self._head = self._read_head(8)
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else None
        self.compression: str | None = None
        self._pieces: Iterator[bytes] | None = None
        self._decompress()
        if self.peek(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK:
            self._head = self._head[len(_BYTE_ORDER_MARK) :]

    def _decompress(self) -> None:
        for magic, compression, make in _COMPRESSIONS:
            if self._head.startswith(magic):
                self.compression = compression
                self._pieces = self._decompressed(make, self._head)
                self._head = b""

    def _read_head(self, count: int) -> bytes:
        head = b""
        while len(head) < count and (more := self._file.read(count - len(head))):
            head += more
        self.position += len(head)
        return head

    def _decompressed(self, make: Callable[[], _Decompressor], data: bytes) -> Iterator[bytes]:
        """Yield what one compressed stream after the other holds; zeros behind the last are padding."""
        while data:
            decompressor = make()
            while not decompressor.eof:
                if not data:
                    raise EOFError(f"the {self.compression} data end early")
                if piece := decompressor.decompress(data):
                    yield piece
                data = b"" if decompressor.eof else self._next_piece()
            data = (decompressor.unused_data or self._next_piece()).lstrip(b"\0")

    def _next_piece(self) -> bytes:
        piece = self._file.read(_PIECE)
        self.position += len(piece)
        return piece

    def peek(self, count: int) -> bytes:
        """Return the next bytes, fewer only where the stream ends; they are still to be read."""
        head = bytearray(max(count, len(self._head)))
        got = self.fill(memoryview(head))
        self._head = bytes(head[:got]) + self._head
        return self._head[:count]

    def fill(self, view: memoryview) -> int:
        """Read into a buffer until it is full or the stream ends; return how many bytes."""
        have = self._take_head(view)
        while have < len(view) and (got := self._read_into(view[have:])):
            have += got
        return have

    def _take_head(self, view: memoryview) -> int:
        have = min(len(self._head), len(view))
        view[:have] = self._head[:have]
        self._head = self._head[have:]
        return have

    def _read_into(self, view: memoryview) -> int:
        if self._pieces is None:
            with system_errors(self.name):
                got: int = self._file.readinto(view) or 0  # type: ignore[attr-defined]
            self.position += got
            return got
        try:
            self._head = next(self._pieces, b"")
        except _DAMAGED as error:
            self.damage = (
                str(error)
                if isinstance(error, EOFError)
                else f"the {self.compression} data are damaged ({error})"
            )
            self._pieces = iter(())
        return self._take_head(view)

    def close(self) -> None:
        if self._file is not sys.stdin.buffer:
            self._file.close()


Ending = Callable[[bytes], bytes]
"""From the last bytes of a stream to what they lack: a byte at most."""


class Window:
    """The next bytes of a stream in a buffer: what was not taken stays for the next refill.

    `ending` is asked once, at the end of a stream without damage.
    """

    def __init__(self, stream: ByteStream, capacity: int, ending: Ending | None = None) -> None:
        self._stream = stream
        self._ending = ending
        self._buffer = memoryview(bytearray(capacity))
        self.view = self._buffer[:0]

    def refill(self) -> bool:
        """Read more until the buffer is full; return False if there is no more, or no room for it."""
        have = len(self.view)
        self._buffer[:have] = bytes(self.view)
        got = self._stream.fill(self._buffer[have:])
        if have + got < len(self._buffer):
            got += self._end(have + got)
        self.view = self._buffer[: have + got]
        return got > 0

    def _end(self, have: int) -> int:
        """Append what the last record may lack, once, unless the stream is damaged; return how many bytes."""
        if self._ending is None or self._stream.damage is not None:
            return 0
        lacking = self._ending(bytes(self._buffer[:have]))
        self._ending = None
        self._buffer[have : have + len(lacking)] = lacking
        return len(lacking)

    @property
    def is_full(self) -> bool:
        return len(self.view) == len(self._buffer)

    def take(self, count: int) -> None:
        """Give up bytes at the front; arrays on them become invalid with the next refill."""
        self.view = self.view[count:]
