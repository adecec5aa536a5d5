"""A directory tree that nothing leads out of: opened through the kernel's openat2, walked by descriptors.

Every last component is used without following it, relative to the descriptor of its directory. Where a
system call takes only a path (extended attributes, chmod of what cannot be opened), the path goes through
/proc/self/fd/N of that descriptor, which is not a name that anybody can exchange.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .._native import encode, lib
from ..errors import (
    BlocksnapError,
    BusyError,
    DeviceIOError,
    NoSpaceError,
    NotSupportedError,
    PrivilegeError,
    UnsafeLayerError,
)
from .names import Parts

__all__ = [
    "Identity",
    "Names",
    "Root",
    "Visit",
    "all_names",
    "descriptor_path",
    "identity",
    "named",
    "open_entry",
    "walk",
]

Identity = tuple[int, int]  # device and inode
Names = Callable[[int, Parts, os.stat_result], list[str]]
"""Lists what a walk shall visit of an open directory, in their order."""

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Root:
    """The directory that stands for "/" in all that is opened through it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def open(cls, path: Path) -> "Root":
        """Open an existing directory; the path itself is trusted."""
        with named(str(path)):
            return cls(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))

    def __enter__(self) -> "Root":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptor back."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def open_directory(self, parts: Parts) -> int:
        """Return a path descriptor of a directory, symlinks on the way resolved inside the root."""
        path = "/".join(parts) or "."
        result: int = lib.bs_open_in_root(self.descriptor, encode(path), os.O_PATH | os.O_DIRECTORY)
        if result < 0:
            raise OSError(-result, os.strerror(-result), path)
        return result


@contextlib.contextmanager
def open_entry(directory: int, name: str, flags: int) -> Iterator[int]:
    """Open a name of a directory without following it; closed at the end of the block."""
    descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def descriptor_path(descriptor: int, name: str = "") -> str:
    """Return the path for a system call that takes no descriptor."""
    return f"/proc/self/fd/{descriptor}/{name}" if name else f"/proc/self/fd/{descriptor}"


def identity(status: os.stat_result) -> Identity:
    """Return what tells one inode from all others."""
    return (status.st_dev, status.st_ino)


@dataclass(slots=True)
class Visit:
    """One step of a walk; directory is open only until the next step."""

    directory: int
    directory_identity: Identity
    parts: Parts
    status: os.stat_result
    leaving: bool = False

    @property
    def name(self) -> str:
        return self.parts[-1]

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)


class _Place:
    """Where a walk is: one open directory and the way back, however deep."""

    def __init__(self, descriptor: int, names: Names) -> None:
        self.descriptor = descriptor
        self.above: list[tuple[os.stat_result, list[str]]] = []
        self._names = names
        self.enter(descriptor, ())

    def enter(self, descriptor: int, parts: Parts) -> None:
        self.descriptor = descriptor
        status = os.fstat(descriptor)
        self.above.append((status, self._names(descriptor, parts, status)[::-1]))

    def replace(self, descriptor: int) -> None:
        os.close(self.descriptor)
        self.descriptor = descriptor

    def next_name(self) -> str | None:
        names = self.above[-1][1]
        return names.pop() if names else None

    @property
    def status(self) -> os.stat_result:
        return self.above[-1][0]


def all_names(descriptor: int, parts: Parts, status: os.stat_result) -> list[str]:  # noqa: ARG001
    return sorted(os.listdir(descriptor))


def walk(directory: int, *, loosen: bool = False, names: Names = all_names) -> Iterator[Visit]:
    """Yield what is below a directory in the order of names, each directory before its content and again
    after it.

    Takes one descriptor however deep the tree is: the way up is "..", checked against the directory that
    was left. With loosen, directories that their owner may not read are made readable; with names, only what
    that lists is visited.
    """
    start = os.open(".", _OPEN_DIRECTORY, dir_fd=directory)
    place = _Place(start, names)
    parts: Parts = ()
    try:
        while True:
            name = place.next_name()
            if name is None:
                if not parts:
                    return
                left = _ascend(place)
                yield Visit(place.descriptor, identity(place.status), parts, left, leaving=True)
                parts = parts[:-1]
                continue
            try:
                status = os.stat(name, dir_fd=place.descriptor, follow_symlinks=False)
            except FileNotFoundError:
                continue  # taken away since the directory was listed
            yield Visit(place.descriptor, identity(place.status), (*parts, name), status)
            if stat.S_ISDIR(status.st_mode) and _descend(place, (*parts, name), status, loosen=loosen):
                parts = (*parts, name)
    finally:
        os.close(place.descriptor)


def _descend(place: _Place, parts: Parts, status: os.stat_result, *, loosen: bool) -> bool:
    name = parts[-1]
    if loosen and status.st_mode & 0o700 != 0o700 and os.geteuid() != 0:
        with open_entry(place.descriptor, name, os.O_PATH | os.O_DIRECTORY) as descriptor:
            os.chmod(descriptor_path(descriptor), stat.S_IMODE(status.st_mode) | 0o700)
    try:
        below = os.open(name, _OPEN_DIRECTORY, dir_fd=place.descriptor)
    except FileNotFoundError:
        return False
    place.replace(below)
    place.enter(below, parts)
    return True


def _ascend(place: _Place) -> os.stat_result:
    left, _ = place.above.pop()
    place.replace(os.open("..", _OPEN_DIRECTORY, dir_fd=place.descriptor))
    if identity(os.fstat(place.descriptor)) != identity(place.status):
        raise BusyError("a directory was moved while it was walked: stop what is writing there and try again")
    return left


_KINDS: dict[int, type[BlocksnapError]] = {
    errno.ENOSPC: NoSpaceError,
    errno.EDQUOT: NoSpaceError,
    errno.EPERM: PrivilegeError,
    errno.EACCES: PrivilegeError,
    errno.EOPNOTSUPP: NotSupportedError,
    errno.ELOOP: UnsafeLayerError,
    errno.ENOTDIR: UnsafeLayerError,
    errno.ENAMETOOLONG: UnsafeLayerError,
    errno.EXDEV: UnsafeLayerError,
}


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Turn the system's errors into ours, with what they happened to; ours pass unchanged."""
    try:
        yield
    except BlocksnapError:
        raise
    except OSError as error:
        code = error.errno or errno.EIO
        message = f"{what}: {os.strerror(code)}"
        kind = _KINDS.get(code)
        if kind is None:
            raise DeviceIOError(message, code) from error
        raise kind(message) from error
