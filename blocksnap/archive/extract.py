"""Applying a layer to a directory: nothing in a layer is trusted, the kernel keeps it all below the root."""

import errno
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import PrivilegeError, UnsafeLayerError
from .confined import Identity, Root, identity, named, open_entry, walk
from .directories import Directories, Parent
from .header import Entry, Kind, read_entries
from .metadata import is_whiteout, set_mode, set_owner, set_times, set_xattrs
from .names import OPAQUE, is_aufs_metadata, shown, split_name, whiteout_target
from .stream import TarStream

__all__ = ["LayerStats", "Limits", "apply_layer"]

MAX_MAJOR = (1 << 12) - 1
MAX_MINOR = (1 << 20) - 1
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL


@dataclass(frozen=True, slots=True)
class Limits:
    """What a layer may grow to: bytes of the uncompressed tar, and entries."""

    max_bytes: int = 64 << 30
    max_entries: int = 1 << 20


@dataclass(frozen=True, slots=True)
class LayerStats:
    """What was applied; bytes are those stored for regular files."""

    entries: int
    bytes: int


def apply_layer(
    stream: BinaryIO,
    root: Path,
    *,
    limits: Limits | None = None,
    progress: Callable[[int], None] | None = None,
) -> LayerStats:
    """Apply an uncompressed layer tar to a directory and read the stream to its end.

    The directory holds the layers below, merged: whiteouts take names of theirs away. progress is called
    with the bytes of the tar read so far. An ordinary user becomes the owner of everything and gets no
    capabilities.

    Raises UnsafeLayerError for what a layer must not hold, PrivilegeError for device nodes without root,
    and the errors of the file system. After an error the directory holds a part of the layer.
    """
    limits = limits or Limits()
    tar = TarStream(stream, limits.max_bytes)
    try:
        with Root.open(root) as confined:
            return _apply_all(_Extraction(confined, tar), tar, limits, progress)
    except UnsafeLayerError:
        with suppress(UnsafeLayerError):
            tar.drain()  # the end of a verified stream tells a layer damaged on its way from an evil one
        raise


def _apply_all(
    extraction: "_Extraction", tar: TarStream, limits: Limits, progress: Callable[[int], None] | None
) -> LayerStats:
    entries = stored = 0
    for entry in read_entries(tar, limits.max_entries):
        extraction.apply(entry)
        entries, stored = entries + 1, stored + entry.stored
        if progress is not None:
            progress(tar.position)
    extraction.finish()
    return LayerStats(entries, stored)


class _Extraction:
    """The state of one layer while it is applied.

    Whiteouts concern the layers below only, whatever their order in the archive; hence the names made by
    this layer are kept, each with the inode of its directory, because one directory can be reached under
    several names.
    """

    def __init__(self, root: Root, tar: TarStream) -> None:
        self._tar = tar
        self._directories = Directories(root)
        self._made: set[tuple[Identity, str]] = set()

    def apply(self, entry: Entry) -> None:
        """Make what one entry says."""
        what = f"layer entry {shown(entry.name)}"
        try:
            with named(what):
                self._apply(entry)
        except UnsafeLayerError as error:
            if str(error).startswith("layer entry "):
                raise
            raise UnsafeLayerError(f"{what}: {error}") from None

    def finish(self) -> None:
        """Set what can be set only when nothing is added any more."""
        self._directories.finish()

    def _apply(self, entry: Entry) -> None:
        parts = split_name(entry.name)
        if is_aufs_metadata(parts):
            return
        hidden = whiteout_target(parts)
        if hidden is not None:
            if entry.kind is not Kind.FILE or entry.size:
                raise UnsafeLayerError("a whiteout must be an empty regular file")
            self._hide(parts[:-1], hidden)
        elif parts:
            with self._directories.made(parts[:-1]) as parent:
                self._make(parent, parts[-1], entry)
                self._made.add((parent.identity, parts[-1]))
        elif entry.kind is Kind.DIRECTORY:
            with self._directories.made(()) as root:
                self._describe_directory(root, entry)
        else:
            raise UnsafeLayerError("the root of a layer must be a directory")

    def _make(self, parent: Parent, name: str, entry: Entry) -> None:
        match entry.kind:
            case Kind.DIRECTORY:
                self._make_directory(parent, name, entry)
            case Kind.FILE:
                self._make_file(parent, name, entry)
            case Kind.HARD_LINK:
                self._make_hard_link(parent, name, entry)
            case Kind.SYMLINK:
                self._make_symlink(parent, name, entry)
            case _:
                self._make_node(parent, name, entry)

    # ---- kinds -------------------------------------------------------------------------------------------

    def _make_directory(self, parent: Parent, name: str, entry: Entry) -> None:
        status = parent.lstat(name)
        if status is None or not stat.S_ISDIR(status.st_mode):
            if status is not None:
                self._clear(parent, name)
            os.mkdir(name, 0o700, dir_fd=parent.descriptor)
        with open_entry(parent.descriptor, name, os.O_PATH | os.O_DIRECTORY) as descriptor:
            where = identity(os.fstat(descriptor))
            self._describe_directory(Parent(descriptor, where, (*parent.parts, name)), entry)

    def _describe_directory(self, directory: Parent, entry: Entry) -> None:
        if os.geteuid() != 0:
            os.chmod(f"/proc/self/fd/{directory.descriptor}", 0o700)
        set_owner(directory.descriptor, "", entry.uid, entry.gid)
        set_xattrs(directory.descriptor, "", stat.S_IFDIR, entry.xattrs)
        self._directories.promise(directory, entry.mtime_ns, entry.mode)

    def _make_file(self, parent: Parent, name: str, entry: Entry) -> None:
        self._clear(parent, name)
        descriptor = os.open(name, _NEW_FILE | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent.descriptor)
        try:
            self._write(descriptor, entry)
        finally:
            os.close(descriptor)
        self._describe(parent, name, stat.S_IFREG, entry)

    def _write(self, descriptor: int, entry: Entry) -> None:
        what = shown(entry.name)
        if entry.sparse is None:
            _write_all(descriptor, self._tar.pieces(entry.stored, what))
            return
        for segment in entry.sparse.segments:
            os.lseek(descriptor, segment.offset, os.SEEK_SET)
            left = segment.length
            while left:
                data = self._tar.read(min(left, 1 << 20), what)
                _write_all(descriptor, [data])
                left -= len(data)
        os.ftruncate(descriptor, entry.size)

    def _make_symlink(self, parent: Parent, name: str, entry: Entry) -> None:
        if not entry.link or "\0" in entry.link:
            raise UnsafeLayerError("the target of the symlink is empty or holds a NUL byte")
        self._clear(parent, name)
        os.symlink(entry.link, name, dir_fd=parent.descriptor)
        self._describe(parent, name, stat.S_IFLNK, entry)

    def _make_node(self, parent: Parent, name: str, entry: Entry) -> None:
        kind, device = stat.S_IFIFO, 0
        if entry.kind is not Kind.FIFO:
            kind = stat.S_IFCHR if entry.kind is Kind.CHARACTER else stat.S_IFBLK
            device = self._device(entry)
        self._clear(parent, name)
        try:
            os.mknod(name, kind | 0o600, device, dir_fd=parent.descriptor)
        except PermissionError:
            what = f"layer entry {shown(entry.name)}"
            raise PrivilegeError(
                f"{what} is a {entry.kind.value}, which only root can make: run as root"
            ) from None
        self._describe(parent, name, kind, entry)

    def _device(self, entry: Entry) -> int:
        major, minor = entry.device
        if not (0 <= major <= MAX_MAJOR and 0 <= minor <= MAX_MINOR):
            raise UnsafeLayerError(f"its device number {major}:{minor} is out of range")
        if entry.kind is Kind.CHARACTER and (major, minor) == (0, 0):
            raise UnsafeLayerError("the character device 0:0 is overlayfs's whiteout and no entry of a layer")
        return os.makedev(major, minor)

    def _describe(self, parent: Parent, name: str, kind: int, entry: Entry) -> None:
        """Owner first, since a change of owner drops setuid bits and capabilities; times last."""
        set_owner(parent.descriptor, name, entry.uid, entry.gid)
        if entry.xattrs:
            set_xattrs(parent.descriptor, name, kind, entry.xattrs)
        if kind != stat.S_IFLNK:
            set_mode(parent.descriptor, name, entry.mode)
        set_times(parent.descriptor, name, entry.mtime_ns)

    def _make_hard_link(self, parent: Parent, name: str, entry: Entry) -> None:
        """Link what the target names in the root, be it a symlink; a link has no metadata of its own."""
        parts = split_name(entry.link)
        missing = UnsafeLayerError(f"a hard link to {shown(entry.link)}, which is not there")
        if not parts:
            raise UnsafeLayerError("a hard link to the root")
        with self._directories.existing(parts[:-1]) as source:
            status = None if source is None else source.lstat(parts[-1])
            if source is None or status is None or is_whiteout(status):
                raise missing
            if stat.S_ISDIR(status.st_mode):
                raise UnsafeLayerError(f"a hard link to the directory {shown(entry.link)}")
            if (source.identity, parts[-1]) == (parent.identity, name):
                raise UnsafeLayerError("a hard link to itself")
            self._clear(parent, name)
            try:
                os.link(
                    parts[-1],
                    name,
                    src_dir_fd=source.descriptor,
                    dst_dir_fd=parent.descriptor,
                    follow_symlinks=False,
                )
            except FileNotFoundError:
                raise missing from None

    # ---- taking away -------------------------------------------------------------------------------------

    def _clear(self, parent: Parent, name: str) -> None:
        """Remove whatever has a name: the last entry of a name wins."""
        status = parent.lstat(name)
        if status is None:
            return
        if stat.S_ISDIR(status.st_mode):
            self._remove_below(parent, name, keep_made=False)
            os.rmdir(name, dir_fd=parent.descriptor)
        else:
            os.unlink(name, dir_fd=parent.descriptor)

    def _hide(self, parts: tuple[str, ...], hidden: str) -> None:
        with self._directories.existing(parts) as parent:
            if parent is not None:
                self._hide_in(parent, hidden)

    def _hide_in(self, parent: Parent, hidden: str) -> None:
        if hidden == OPAQUE:
            self._remove_below(parent, "", keep_made=True)
            return
        status = parent.lstat(hidden)
        if status is None:
            return
        if stat.S_ISDIR(status.st_mode):
            self._remove_below(parent, hidden, keep_made=True)
        self._remove(parent.descriptor, parent.identity, hidden, status, keep_made=True)

    def _remove_below(self, parent: Parent, name: str, *, keep_made: bool) -> None:
        """Empty a directory ("" is the parent itself); with keep_made of what lower layers put there."""
        base = (*parent.parts, name) if name else parent.parts
        with open_entry(parent.descriptor, name or ".", os.O_PATH | os.O_DIRECTORY) as descriptor:
            status = os.fstat(descriptor)
            self._directories.remember(base, identity(status), status)
            for visit in walk(descriptor, loosen=True):
                if visit.is_directory and not visit.leaving:
                    continue
                gone = self._remove(
                    visit.directory, visit.directory_identity, visit.name, visit.status, keep_made=keep_made
                )
                if not gone and visit.leaving:
                    self._directories.remember((*base, *visit.parts), identity(visit.status), visit.status)

    def _remove(
        self, directory: int, where: Identity, name: str, status: os.stat_result, *, keep_made: bool
    ) -> bool:
        """Remove one name unless this layer made it, or put something into it."""
        if keep_made and (where, name) in self._made:
            return False
        self._made.discard((where, name))
        if not stat.S_ISDIR(status.st_mode):
            os.unlink(name, dir_fd=directory)
            return True
        try:
            os.rmdir(name, dir_fd=directory)
        except OSError as error:
            if keep_made and error.errno == errno.ENOTEMPTY:
                return False
            raise
        return True


def _write_all(descriptor: int, pieces: Iterable[bytes]) -> None:
    for piece in pieces:
        view = memoryview(piece)
        while view:
            view = view[os.write(descriptor, view) :]
