"""Packing the changes of a tree as a layer: an uncompressed PAX tar with whiteouts."""

import os
import stat
import tarfile
from pathlib import Path
from typing import BinaryIO

from ..errors import BusyError, UnsafeLayerError
from .changes import find_changes
from .confined import Identity, Root, identity, named, open_entry
from .metadata import is_whiteout, read_xattrs
from .names import WHITEOUT, Parts
from .pax import XATTR_PREFIX, format_seconds
from .pruned import Unchanged
from .stream import BLOCK, PIECE

__all__ = ["pack_diff"]

_BILLION = 1_000_000_000
_ENCODING = ("utf-8", "surrogateescape")
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


def pack_diff(
    old_root: Path | None, new_root: Path, out: BinaryIO, *, unchanged: Unchanged | None = None
) -> int:
    """Write the layer that turns old_root into new_root (without an old root: all of it); return its bytes.

    Times are exact to the nanosecond; holes are written as zeros; sockets are left out, as are extended
    attributes with an empty value, which PAX cannot say. When one name of a file with hard links is packed,
    all are, so that they stay links. A file that changes while it is read is a BusyError: pack a snapshot.
    """
    with Root.open(new_root) as root, named(str(new_root)):
        writer = _Writer(root, out)
        if old_root is None or _root_differs(old_root, root):
            writer.add(())
        for parts, deleted in _wanted(old_root, new_root, unchanged):
            if deleted:
                writer.add_whiteout(parts)
            else:
                writer.add(parts)
        return writer.finish()


def _wanted(old_root: Path | None, new_root: Path, unchanged: Unchanged | None) -> list[tuple[Parts, bool]]:
    """Return the paths to pack and whether they are deletions, directories first."""
    links: dict[Identity, list[Parts]] = {}
    wanted: dict[Parts, bool] = {}
    packed: set[Identity] = set()
    for found in find_changes(old_root, new_root, unchanged_links=links, unchanged=unchanged):
        wanted[found.parts] = found.status is None
        if found.status is not None and not stat.S_ISDIR(found.status.st_mode):
            packed.add(identity(found.status))
    for where in links.keys() & packed:
        for parts in links[where]:
            wanted.update({parts[:depth]: False for depth in range(1, len(parts) + 1)})
    return sorted(wanted.items())


def _root_differs(old_root: Path, new: Root) -> bool:
    with Root.open(old_root) as old:
        return _root_fingerprint(old) != _root_fingerprint(new)


def _root_fingerprint(root: Root) -> tuple[object, ...]:
    status = os.fstat(root.descriptor)
    return (
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_mtime_ns,
        read_xattrs(root.descriptor, ""),
    )


class _Writer:
    """Entries on their way to a tar: the first name of an inode carries it, later ones are links to that."""

    def __init__(self, root: Root, out: BinaryIO) -> None:
        self._root = root
        self._out = out
        self._written = 0
        self._first: dict[Identity, str] = {}

    def add(self, parts: Parts) -> None:
        """Write one entry as it is now."""
        if any(part.startswith(WHITEOUT) for part in parts):
            raise UnsafeLayerError(
                f"{_name(parts)}: a name with {WHITEOUT} in front is a whiteout: rename it"
            )
        try:
            directory = self._root.open_directory(parts[:-1])
        except FileNotFoundError:
            raise _changed(parts) from None
        try:
            self._add(directory, parts)
        except FileNotFoundError:
            raise _changed(parts) from None
        finally:
            os.close(directory)

    def add_whiteout(self, parts: Parts) -> None:
        """Write an entry that takes a name of lower layers away."""
        self._put(_header("/".join((*parts[:-1], WHITEOUT + parts[-1])), tarfile.REGTYPE))

    def finish(self) -> int:
        """Write the end mark; return the size of the tar."""
        self._put(bytes(2 * BLOCK))
        return self._written

    def _add(self, directory: int, parts: Parts) -> None:
        name = parts[-1] if parts else ""
        status = os.stat(name, dir_fd=directory, follow_symlinks=False) if name else os.fstat(directory)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFSOCK:
            return
        if is_whiteout(status):
            raise UnsafeLayerError(f"{_name(parts)}: a whiteout of overlayfs: pack the merged tree")
        header = _described(_name(parts), status, read_xattrs(directory, name))
        first = self._first.get(identity(status))
        if first is not None:
            header.type, header.linkname, header.size = tarfile.LNKTYPE, first, 0
            self._put(header)
            return
        if kind == stat.S_IFLNK:
            header.linkname = os.readlink(name, dir_fd=directory)
        if kind != stat.S_IFDIR and status.st_nlink > 1:
            self._first[identity(status)] = header.name
        if kind == stat.S_IFREG:
            self._put_file(directory, parts, header)
        else:
            self._put(header)

    def _put_file(self, directory: int, parts: Parts, header: tarfile.TarInfo) -> None:
        with open_entry(directory, parts[-1], os.O_RDONLY | os.O_NONBLOCK) as descriptor:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size != header.size:
                raise _changed(parts)
            self._put(header)
            left = header.size
            while left:
                piece = os.read(descriptor, min(left, PIECE))
                if not piece:
                    raise _changed(parts)
                self._put(piece)
                left -= len(piece)
        self._put(bytes(-header.size % BLOCK))

    def _put(self, data: bytes | tarfile.TarInfo) -> None:
        if isinstance(data, tarfile.TarInfo):
            data = data.tobuf(tarfile.PAX_FORMAT, *_ENCODING)
        self._out.write(data)
        self._written += len(data)


def _name(parts: Parts) -> str:
    return "/".join(parts) or "."


def _header(name: str, kind: bytes) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type = kind
    return header


def _described(name: str, status: os.stat_result, xattrs: dict[str, bytes]) -> tarfile.TarInfo:
    kind = stat.S_IFMT(status.st_mode)
    header = _header(name, _TYPES[kind])
    header.mode = stat.S_IMODE(status.st_mode)
    header.uid, header.gid = status.st_uid, status.st_gid
    header.size = status.st_size if kind == stat.S_IFREG else 0
    header.mtime = status.st_mtime_ns // _BILLION
    header.pax_headers = _pax_records(status, xattrs)
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        header.devmajor, header.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    return header


def _pax_records(status: os.stat_result, xattrs: dict[str, bytes]) -> dict[str, str]:
    records = {XATTR_PREFIX + key: value.decode(*_ENCODING) for key, value in xattrs.items() if value}
    if status.st_mtime_ns % _BILLION or status.st_mtime_ns < 0:
        records["mtime"] = format_seconds(status.st_mtime_ns)
    return records


def _changed(parts: Parts) -> BusyError:
    return BusyError(f"{_name(parts)} changed while it was packed: pack a snapshot of it")
