"""The files of a pool: where they lie, making them whole or not at all, growing them.

A pool is a directory with `metadata`, `data` and `catalog.db`, or two devices and a catalog elsewhere. While
a pool is being made, a file `<catalog>.creating` lies there, locked by the maker. Found unlocked it says
that the maker was killed: open names it, create sweeps the directory and starts again.
"""

import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .catalog import sync_directory
from .errors import (
    ArgumentError,
    BusyError,
    DeviceExistsError,
    DeviceNotFoundError,
    PoolFormatError,
    PrivilegeError,
    system_errors,
)
from .units import Size, parse_size

__all__ = [
    "PathArgument",
    "PoolFiles",
    "Progress",
    "backing_size",
    "creation",
    "fully_allocated",
    "grow_file",
    "metadata_size_for",
    "require_own",
    "whole_blocks",
    "wipe_superblock",
]

PathArgument = str | os.PathLike[str]
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

_CATALOGS = Path("/var/lib/blocksnap")
_CHUNK = 4 << 20
_METADATA_BLOCK_SIZE = 4096
_MIN_METADATA_SIZE = 2 << 20
_MAX_METADATA_SIZE = 255 * 16320 * _METADATA_BLOCK_SIZE
_METADATA_BYTES_A_DATA_BLOCK = 48


@dataclass(frozen=True, slots=True)
class PoolFiles:
    """Where the parts of a pool lie; directory is None for two devices."""

    metadata: Path
    data: Path
    catalog: Path
    directory: Path | None

    @classmethod
    def locate(
        cls,
        path: PathArgument | None,
        *,
        metadata: PathArgument | None = None,
        data: PathArgument | None = None,
        catalog: PathArgument | None = None,
    ) -> Self:
        """Name the files of a pool given as a directory or as two devices."""
        if path is not None:
            if metadata is not None or data is not None or catalog is not None:
                raise ArgumentError("give the directory of the pool, or metadata and data, not both")
            directory = Path(os.path.abspath(path))
            return cls(directory / "metadata", directory / "data", directory / "catalog.db", directory)
        if metadata is None or data is None:
            raise ArgumentError("give the directory of the pool, or both its metadata and its data device")
        devices = Path(os.path.abspath(metadata)), Path(os.path.abspath(data))
        if os.path.realpath(devices[0]) == os.path.realpath(devices[1]):
            raise ArgumentError(f"{devices[0]} is given as metadata and as data: give two devices")
        chosen = Path(os.path.abspath(catalog)) if catalog is not None else _default_catalog(devices[0])
        return cls(*devices, chosen, None)

    def __str__(self) -> str:
        return str(self.directory or self.metadata)

    @property
    def marker(self) -> Path:
        return self.catalog.with_name(self.catalog.name + ".creating")

    def require(self) -> None:
        """Raise the error that says what is missing, if this is no whole pool, or whose it is."""
        if self.directory is not None:
            require_own(self.directory)
        if os.path.lexists(self.marker):
            with system_errors(str(self)), _locked_marker(self):
                pass
            again = f"remove {self.directory} and " if self.directory else ""
            raise PoolFormatError(
                f"the pool {self} was never completed: its creation was interrupted; {again}create it again"
            )
        for part in (self.metadata, self.data):
            if not part.exists():
                raise DeviceNotFoundError(
                    f'no pool at {self}: {part} does not exist; see "blocksnap pool create"'
                )


def require_own(directory: Path) -> None:
    """Raise PrivilegeError if a directory is another user's, who could put anything there."""
    with system_errors(str(directory)):
        try:
            owner = directory.stat().st_uid
        except (FileNotFoundError, NotADirectoryError):
            return
    if owner != os.geteuid():
        raise PrivilegeError(
            f"{directory} belongs to user {owner}, not {os.geteuid()}: "
            "run as that user, or make it yours (chown)"
        )


def _default_catalog(metadata: Path) -> Path:
    """Return a file's neighbour, or for a device a file in the machine's state named after it."""
    with system_errors(str(metadata)):
        is_device = metadata.is_block_device()
    if is_device:
        return _CATALOGS / (str(metadata).strip("/").replace("/", "-") + ".catalog.db")
    return metadata.with_name(metadata.name + ".catalog.db")


@contextmanager
def creation(files: PoolFiles) -> Iterator[None]:
    """Hold the marker while the body makes the pool; if it fails, take away everything that was made."""
    with system_errors(str(files)), ExitStack() as undo:
        if _prepare_directory(files):
            undo.callback(_remove_directory, files)
        with _locked_marker(files, create=True):
            try:
                _sweep(files)
                yield
                _sync(files)
                files.marker.unlink()
            except BaseException:
                _take_away(files)
                raise
            undo.pop_all()
            sync_directory(files.marker.parent)


def _prepare_directory(files: PoolFiles) -> bool:
    directory = files.directory
    if directory is None:
        _refuse_existing(files, [files.catalog])
        files.catalog.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return False
    if os.path.lexists(files.marker):
        return False
    _refuse_existing(files, [files.metadata, files.data, files.catalog])
    if os.path.lexists(directory):
        require_own(directory)
        if set(os.listdir(directory)) - {"lost+found"}:
            raise ArgumentError(f"{directory} is not empty: give a new directory for the pool")
        directory.chmod(0o700)
        return False
    directory.mkdir(mode=0o700)
    return True


def _refuse_existing(files: PoolFiles, parts: list[Path]) -> None:
    for part in parts:
        if os.path.lexists(part) and not os.path.lexists(files.marker):
            raise DeviceExistsError(f"{part} exists already: open the pool, or create it elsewhere")


@contextmanager
def _locked_marker(files: PoolFiles, *, create: bool = False) -> Iterator[None]:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    descriptor = os.open(files.marker, flags, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"another process is creating the pool {files}: wait for it") from None
        if os.fstat(descriptor).st_nlink == 0:
            raise BusyError(f"another process has just created the pool {files}: open it")
        yield
    finally:
        os.close(descriptor)


def _own_parts(files: PoolFiles) -> list[Path]:
    """Return the files that creation makes: with two devices the catalog alone."""
    names = [files.catalog.name + suffix for suffix in ("", "-wal", "-journal", ".new", ".new-wal")]
    catalogs = [files.catalog.with_name(name) for name in names]
    return catalogs if files.directory is None else [files.metadata, files.data, *catalogs]


def _sweep(files: PoolFiles) -> None:
    for part in _own_parts(files):
        part.unlink(missing_ok=True)


def _take_away(files: PoolFiles) -> None:
    with suppress(OSError):
        _sweep(files)
        files.marker.unlink(missing_ok=True)


def _remove_directory(files: PoolFiles) -> None:
    assert files.directory is not None
    with suppress(OSError):
        files.directory.rmdir()


def _sync(files: PoolFiles) -> None:
    for part in (files.metadata, files.data, files.catalog):
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_directory(files.catalog.parent)
    if files.directory is not None:
        sync_directory(files.directory.parent)


def grow_file(
    path: Path,
    size: int,
    *,
    reserve: bool = False,
    preallocate: bool = False,
    progress: Progress | None = None,
) -> None:
    """Make a file (a new one with mode 0600) at least size bytes long; a failure leaves it as it was.

    With reserve the file system sets the space aside, with preallocate it is written full of zeros too.
    """
    with system_errors(str(path)):
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            before = os.fstat(descriptor).st_size
            if not stat.S_ISREG(os.fstat(descriptor).st_mode) or size <= before:
                return
            try:
                if preallocate:
                    _fill_with_zeros(descriptor, before, size, progress)
                elif reserve:
                    os.posix_fallocate(descriptor, before, size - before)
                os.ftruncate(descriptor, size)
                # Before anything says that the pool is this large.
                os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)


def _fill_with_zeros(descriptor: int, begin: int, end: int, progress: Progress | None = None) -> None:
    """Write zeros, so that the file system has allocated and initialised every block before data come."""
    zeros = memoryview(mmap.mmap(-1, _CHUNK))
    offset = begin
    while offset < end:
        offset += os.pwrite(descriptor, zeros[: min(_CHUNK, end - offset)], offset)
        if progress is not None:
            progress(offset - begin, end - begin)
    os.fsync(descriptor)


def whole_blocks(size: Size | None, block_size: int) -> int:
    """Return the size of the data of a new pool, rounded down to whole blocks; at least one."""
    if size is None:
        raise ArgumentError('give the size of the pool, like size="10G"')
    size_bytes = parse_size(size)
    if block_size == 0 or size_bytes < block_size:
        raise ArgumentError(f"a pool of {size_bytes} bytes holds no block of {block_size} bytes: give more")
    return size_bytes - size_bytes % block_size


def metadata_size_for(data_bytes: int, block_size: int) -> int:
    """Return the metadata size to give a pool: 48 bytes a data block, at least 2 MiB."""
    needed = -(-data_bytes // block_size) * _METADATA_BYTES_A_DATA_BLOCK
    whole = -(-needed // _METADATA_BLOCK_SIZE) * _METADATA_BLOCK_SIZE
    return min(max(whole, _MIN_METADATA_SIZE), _MAX_METADATA_SIZE)


def backing_size(path: Path) -> int:
    """Return the size of a file or block device in bytes."""
    with system_errors(str(path)), path.open("rb") as backing:
        return backing.seek(0, os.SEEK_END)


def fully_allocated(path: Path) -> bool:
    """Return whether a file has no holes; a block device counts as full."""
    with system_errors(str(path)):
        found = path.stat()
    return not stat.S_ISREG(found.st_mode) or found.st_blocks * 512 >= found.st_size


def wipe_superblock(metadata: Path) -> None:
    """Make a metadata device empty again."""
    with system_errors(str(metadata)), metadata.open("r+b") as device:
        device.write(bytes(_METADATA_BLOCK_SIZE))
        device.flush()
        os.fsync(device.fileno())
