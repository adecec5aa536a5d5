"""Where the files of an image lie: a folder or a tar. Both give bytes by name, neither lets a name out.

A folder is opened through the kernel's confinement; a tar is never unpacked, its members are read in place
through an index, so that a member's name is only ever a key.
"""

import gzip
import io
import os
import posixpath
import stat
import tempfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from ..archive.confined import Root, named, open_entry
from ..archive.header import Entry, Kind, read_entries
from ..archive.stream import TarStream
from ..errors import ImageError, MissingParentError, NoSpaceError, UnsafeLayerError
from .document import MAX_DOCUMENT

__all__ = ["FolderStore", "Store", "TarStore", "open_store"]

MAX_ARCHIVE = 64 << 30
MAX_MEMBERS = 1 << 16
MAX_LINKS = 8
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_PIECE = 1 << 20


class Store(ABC):
    """Read access to the files of one image or layout; name is what people gave to find it."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def size(self, file: str) -> int | None:
        """Return the size of a regular file, None when there is none."""

    @abstractmethod
    def open(self, file: str) -> BinaryIO:
        """Open a file; MissingParentError when it is not there."""

    @abstractmethod
    def close(self) -> None:
        """Give the descriptors back; open files stay usable."""

    def read(self, file: str) -> bytes:
        """Return a small file as a whole."""
        size = self.size(file)
        if size is not None and size > MAX_DOCUMENT:
            raise ImageError(f"{self.name}: {file} has {size} bytes; at most {MAX_DOCUMENT} are read")
        with self.open(file) as stream:
            return stream.read(MAX_DOCUMENT + 1)

    def missing(self, file: str) -> MissingParentError:
        """Return the error for a file that is not there."""
        return MissingParentError(f"{self.name}: {file} is missing: the image is incomplete, fetch it again")


class FolderStore(Store):
    """A directory; symlinks in it are not followed."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._root = Root.open(path)

    def size(self, file: str) -> int | None:
        try:
            with self.open(file) as stream:
                return os.fstat(stream.fileno()).st_size
        except MissingParentError:
            return None

    def open(self, file: str) -> BinaryIO:
        *above, last = file.split("/")
        with named(f"{self.name}/{file}"):
            try:
                directory = self._root.open_directory(tuple(above))
            except (FileNotFoundError, NotADirectoryError):
                raise self.missing(file) from None
            try:
                return self._open(directory, last, file)
            finally:
                os.close(directory)

    def _open(self, directory: int, last: str, file: str) -> BinaryIO:
        try:
            with open_entry(directory, last, os.O_RDONLY | os.O_NONBLOCK) as descriptor:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    return os.fdopen(os.dup(descriptor), "rb")
        except FileNotFoundError:
            raise self.missing(file) from None
        raise ImageError(f"{self.name}: {file} is not a regular file")

    def close(self) -> None:
        self._root.close()


class TarStore(Store):
    """A tar read through an index of its members; the last of several with one name counts."""

    def __init__(self, name: str, archive: BinaryIO) -> None:
        super().__init__(name)
        self._archive = archive
        self._members = _index(archive, name)

    def size(self, file: str) -> int | None:
        entry = self._find(file)
        return None if entry is None else entry.size

    def open(self, file: str) -> BinaryIO:
        entry = self._find(file)
        if entry is None:
            raise self.missing(file)
        if entry.sparse is not None:
            raise ImageError(
                f"{self.name}: {file} is stored as a sparse file: make the archive without --sparse"
            )
        return cast(BinaryIO, io.BufferedReader(_Member(self._archive, entry.offset, entry.size), _PIECE))

    def close(self) -> None:
        self._archive.close()

    def _find(self, file: str) -> Entry | None:
        """Return a regular member; links are followed from key to key (docker save links equal layers)."""
        for _ in range(MAX_LINKS):
            entry = self._members.get(_key(file))
            if entry is None or entry.kind is Kind.FILE:
                return entry
            if entry.kind is Kind.SYMLINK:
                file = posixpath.join(posixpath.dirname(_key(file)), entry.link)
            elif entry.kind is Kind.HARD_LINK:
                file = entry.link
            else:
                return None
        raise ImageError(f"{self.name}: too many links lead to {file}")


def _key(name: str) -> str:
    return posixpath.normpath("/" + name.lstrip("/"))


def _index(archive: BinaryIO, name: str) -> dict[str, Entry]:
    try:
        stream = TarStream(archive, MAX_ARCHIVE, seek=True)
        return {_key(entry.name): entry for entry in read_entries(stream, MAX_MEMBERS)}
    except UnsafeLayerError as error:
        raise ImageError(f"{name}: not a sound tar archive: {error}") from None


class _Member(io.RawIOBase):
    """A part of an open file with a position of its own, so that several can be read at once."""

    def __init__(self, archive: BinaryIO, offset: int, size: int) -> None:
        self._descriptor = os.dup(archive.fileno())
        self._at = offset
        self._end = offset + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer))
        size = min(len(view), self._end - self._at)
        count = os.preadv(self._descriptor, [view[:size]], self._at) if size else 0
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def open_store(path: Path) -> Store:
    """Open a folder, a tar, or a tar that was compressed as a whole (it is inflated into a nameless file)."""
    with named(str(path)):
        if path.is_dir():
            return FolderStore(path)
        archive = path.open("rb")
        try:
            magic = archive.read(4)
            archive.seek(0)
            if not magic.startswith((_GZIP, _ZSTD)):
                return TarStore(str(path), archive)
            with archive:
                return TarStore(str(path), _inflated(archive, magic, path))
        except BaseException:
            archive.close()
            raise


def _inflated(archive: BinaryIO, magic: bytes, path: Path) -> BinaryIO:
    plain = cast(BinaryIO, tempfile.TemporaryFile(prefix="blocksnap-"))  # noqa: SIM115
    try:
        source: BinaryIO = cast(BinaryIO, gzip.GzipFile(fileobj=archive))
        if magic.startswith(_ZSTD):
            source = zstandard.ZstdDecompressor().stream_reader(archive, read_across_frames=True)
        while piece := source.read(_PIECE):
            plain.write(piece)
            if plain.tell() > MAX_ARCHIVE:
                raise NoSpaceError(f"{path} inflates to more than {MAX_ARCHIVE} bytes")
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        plain.close()
        raise ImageError(f"{path} is damaged: {error}") from None
    except BaseException:
        plain.close()
        raise
    return plain
