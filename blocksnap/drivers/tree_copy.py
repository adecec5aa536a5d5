"""Copy a tree with everything that a layer can hold: links, holes, devices, owners, modes, xattrs, times.

Files are reached by directory descriptors and never through a symbolic link, so that a tree which somebody
still writes to cannot lead the copy outside. Contents move inside the kernel: with reflink by FICLONE,
without by sendfile, since copy_file_range shares blocks of its own accord on btrfs and XFS and would make a
full copy look free.
"""

import errno
import fcntl
import os
import stat
from pathlib import Path

__all__ = ["copy_attributes", "copy_tree"]

_FICLONE = 0x40049409
_NOT_CLONABLE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY)


def copy_tree(source: Path, target: Path, *, reflink: bool) -> int:
    """Copy a directory's contents and attributes to an empty one; return the bytes of contents copied."""
    return _TreeCopy(target, reflink=reflink).run(source)


class _TreeCopy:
    def __init__(self, target: Path, *, reflink: bool) -> None:
        self._target = target
        self._reflink = reflink
        self._links: dict[tuple[int, int], Path] = {}
        self._copied = 0

    def run(self, source: Path) -> int:
        from_fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
        try:
            to_fd = os.open(self._target, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._directory(from_fd, to_fd, Path())
                copy_attributes(source, self._target)
            finally:
                os.close(to_fd)
        finally:
            os.close(from_fd)
        return self._copied

    def _directory(self, from_fd: int, to_fd: int, path: Path) -> None:
        with os.scandir(from_fd) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            info = os.stat(name, dir_fd=from_fd, follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                self._subdirectory(name, from_fd, to_fd, path / name)
            elif not self._link(name, info, to_fd, path / name):
                self._node(name, info, from_fd, to_fd)
            else:
                continue
            copy_attributes(_at(from_fd, name), _at(to_fd, name))

    def _subdirectory(self, name: str, from_fd: int, to_fd: int, path: Path) -> None:
        os.mkdir(name, 0o700, dir_fd=to_fd)
        inner_from = _open_directory(name, from_fd)
        try:
            inner_to = _open_directory(name, to_fd)
            try:
                self._directory(inner_from, inner_to, path)
            finally:
                os.close(inner_to)
        finally:
            os.close(inner_from)

    def _link(self, name: str, info: os.stat_result, to_fd: int, path: Path) -> bool:
        if info.st_nlink < 2:
            return False
        first = self._links.setdefault((info.st_dev, info.st_ino), path)
        if first == path:
            return False
        os.link(self._target / first, name, dst_dir_fd=to_fd, follow_symlinks=False)
        return True

    def _node(self, name: str, info: os.stat_result, from_fd: int, to_fd: int) -> None:
        if stat.S_ISREG(info.st_mode):
            self._file(name, from_fd, to_fd)
        elif stat.S_ISLNK(info.st_mode):
            os.symlink(os.readlink(name, dir_fd=from_fd), name, dir_fd=to_fd)
        else:
            os.mknod(name, stat.S_IFMT(info.st_mode) | 0o600, info.st_rdev, dir_fd=to_fd)

    def _file(self, name: str, from_fd: int, to_fd: int) -> None:
        source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=from_fd)
        try:
            target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=to_fd)
            try:
                if not (self._reflink and _clone(source, target)):
                    self._copied += _copy_contents(source, target)
            finally:
                os.close(target)
        finally:
            os.close(source)


def _open_directory(name: str, parent: int) -> int:
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)


def _at(directory: int, name: str) -> str:
    # The xattr calls take no dir_fd; a path through the descriptor follows no link but the kernel's own.
    return f"/proc/self/fd/{directory}/{name}"


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _NOT_CLONABLE:
            return False
        raise
    return True


def _copy_contents(source: int, target: int) -> int:
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


def copy_attributes(source: str | Path, target: str | Path, *, without: str | None = None) -> None:
    """Give one inode the attributes of another, but for xattrs whose names start with `without`."""
    # In this order: a change of owner clears setuid bits and capabilities, and everything moves the change
    # time only.
    info = os.stat(source, follow_symlinks=False)
    fresh = os.stat(target, follow_symlinks=False)
    if (info.st_uid, info.st_gid) != (fresh.st_uid, fresh.st_gid):
        os.chown(target, info.st_uid, info.st_gid, follow_symlinks=False)
    for attribute in os.listxattr(source, follow_symlinks=False):
        if without is None or not attribute.startswith(without):
            value = os.getxattr(source, attribute, follow_symlinks=False)
            os.setxattr(target, attribute, value, follow_symlinks=False)
    if not stat.S_ISLNK(info.st_mode):
        os.chmod(target, stat.S_IMODE(info.st_mode))
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)
