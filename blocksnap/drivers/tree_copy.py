"""Copy a tree with everything that a layer can hold: links, holes, devices, owners, modes, xattrs, times.

Both trees are walked by descriptors, never through a symbolic link and however deep: a tree that somebody
still writes to cannot lead the copy outside. Contents move inside the kernel: with reflink by FICLONE,
without by sendfile, since copy_file_range shares blocks of its own accord on btrfs and XFS and would make a
full copy look free.
"""

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..archive.confined import Identity, Root, Visit, descriptor_path, identity, open_entry, walk
from ..archive.names import Parts

__all__ = ["clones_files", "copy_attributes", "copy_contents", "copy_tree", "opened_for_reading"]

_FICLONE = 0x40049409
_NOT_CLONABLE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY)
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_tree(source: Path, target: Path, *, reflink: bool) -> int:
    """Copy a directory's contents and attributes to an empty one; return the bytes of contents copied."""
    with Root.open(source) as old, Root.open(target) as new:
        copied = _TreeCopy(new, reflink=reflink).run(old)
    copy_attributes(source, target)
    return copied


class _TreeCopy:
    """One open directory of the target, which follows the walk through the source."""

    def __init__(self, target: Root, *, reflink: bool) -> None:
        self._root = target
        self._reflink = reflink
        self._place: Parts = ()
        self._directory = os.open(".", _OPEN_DIRECTORY, dir_fd=target.descriptor)
        self._links: dict[Identity, Parts] = {}
        self._copied = 0

    def run(self, source: Root) -> int:
        try:
            for visit in walk(source.descriptor):
                self._move(visit.parts[:-1])
                self._copy(visit)
        finally:
            os.close(self._directory)
        return self._copied

    def _move(self, parts: Parts) -> None:
        while len(self._place) > len(parts):
            self._enter("..", self._place[:-1])
        if len(self._place) < len(parts):
            self._enter(parts[-1], parts)

    def _enter(self, name: str, parts: Parts) -> None:
        below = os.open(name, _OPEN_DIRECTORY, dir_fd=self._directory)
        os.close(self._directory)
        self._directory, self._place = below, parts

    def _copy(self, visit: Visit) -> None:
        if visit.is_directory and not visit.leaving:
            os.mkdir(visit.name, 0o700, dir_fd=self._directory)
            return  # attributes follow when all that is in it was made
        if not visit.leaving and not self._make(visit):
            return
        source = descriptor_path(visit.directory, visit.name)
        copy_attributes(source, descriptor_path(self._directory, visit.name))

    def _make(self, visit: Visit) -> bool:
        """Make what is no directory; False when it is a further link to an inode that has all it needs."""
        kind = stat.S_IFMT(visit.status.st_mode)
        first = self._links.setdefault(identity(visit.status), visit.parts)
        if first != visit.parts and visit.status.st_nlink > 1:
            self._link(first, visit.name)
            return False
        if kind == stat.S_IFREG:
            self._copy_file(visit)
        elif kind == stat.S_IFLNK:
            target = os.readlink(visit.name, dir_fd=visit.directory)
            os.symlink(target, visit.name, dir_fd=self._directory)
        else:
            os.mknod(visit.name, kind | 0o600, visit.status.st_rdev, dir_fd=self._directory)
        return True

    def _link(self, first: Parts, name: str) -> None:
        directory = self._root.open_directory(first[:-1])
        try:
            os.link(first[-1], name, src_dir_fd=directory, dst_dir_fd=self._directory, follow_symlinks=False)
        finally:
            os.close(directory)

    def _copy_file(self, visit: Visit) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with opened_for_reading(visit) as source:
            target = os.open(visit.name, flags, 0o600, dir_fd=self._directory)
            try:
                self._copied += copy_contents(source, target, reflink=self._reflink)
            finally:
                os.close(target)


@contextmanager
def opened_for_reading(visit: Visit) -> Iterator[int]:
    """Open a regular file that a walk has come to, though its mode may forbid its owner to read it."""
    descriptor = _open_file(visit)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def copy_contents(source: int, target: int, *, reflink: bool) -> int:
    """Give an empty file the contents of another; return the bytes copied, 0 if they share blocks now."""
    return 0 if reflink and _clone(source, target) else _copy_data(source, target)


def clones_files(directory: Path) -> bool:
    """Say whether files in a directory can share their blocks."""
    with tempfile.TemporaryFile(dir=directory) as source, tempfile.TemporaryFile(dir=directory) as target:
        source.write(b"some contents")
        source.flush()
        return _clone(source.fileno(), target.fileno())


def _open_file(visit: Visit) -> int:
    """Open a file for reading; an owner who may not read it (mode 0) allows it to himself for that moment."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(visit.name, flags | os.O_NOFOLLOW, dir_fd=visit.directory)
    except PermissionError:
        if visit.status.st_uid != os.geteuid():
            raise
    with open_entry(visit.directory, visit.name, os.O_PATH) as handle:
        path, mode = descriptor_path(handle), stat.S_IMODE(visit.status.st_mode)
        os.chmod(path, mode | stat.S_IRUSR)
        try:
            return os.open(path, flags)
        finally:
            os.chmod(path, mode)


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _NOT_CLONABLE:
            return False
        raise
    return True


def _copy_data(source: int, target: int) -> int:
    """Copy the data of a file, leaving holes; return the bytes copied."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    copied = end = 0
    while end < size:
        try:
            begin = os.lseek(source, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        end = min(os.lseek(source, begin, os.SEEK_HOLE), size)
        os.lseek(target, begin, os.SEEK_SET)
        copied += _send(source, target, begin, end)
    return copied


def _send(source: int, target: int, begin: int, end: int) -> int:
    position = begin
    while position < end:
        sent = os.sendfile(target, source, position, min(end - position, 1 << 30))
        if sent == 0:
            break
        position += sent
    return position - begin


def copy_attributes(source: str | Path, target: str | Path, *, without: tuple[str, ...] = ()) -> None:
    """Give one inode the attributes of another, but for xattrs whose names start with one of `without`."""
    # In this order: a change of owner clears setuid bits and capabilities, and all of it moves ctime alone.
    info = os.stat(source, follow_symlinks=False)
    fresh = os.stat(target, follow_symlinks=False)
    if (info.st_uid, info.st_gid) != (fresh.st_uid, fresh.st_gid):
        os.chown(target, info.st_uid, info.st_gid, follow_symlinks=False)
    for attribute in os.listxattr(source, follow_symlinks=False):
        if not attribute.startswith(without):
            value = os.getxattr(source, attribute, follow_symlinks=False)
            os.setxattr(target, attribute, value, follow_symlinks=False)
    if not stat.S_ISLNK(info.st_mode):
        os.chmod(target, stat.S_IMODE(info.st_mode))
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)
