"""Loop devices, mounts and freezing, by system calls of the C core: nothing is shelled out.

Most of it needs root. A process that serves a device over FUSE may call everything here on the file systems
above that device: what can wait for them runs in a child process.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ._native import check, encode, ffi, lib
from .errors import ArgumentError, DeviceIOError, system_errors

__all__ = [
    "LoopDevice",
    "MountEntry",
    "backing_loops",
    "filesystem_type",
    "frozen",
    "is_mounted",
    "limit_fuse_background",
    "loop_devices",
    "loop_files",
    "mount",
    "mount_table",
    "probe",
    "sync_filesystem",
    "thaw",
    "told_by_magic",
    "unmount",
]

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_NOATIME, _MS_BIND = 1, 2, 4, 32, 1024, 4096
_MNT_FORCE, _MNT_DETACH = 1, 2
_SECTOR = 512


def _native_path(path: str | os.PathLike[str]) -> bytes:
    return encode(os.fspath(path))


def _read_attribute(number: int, name: str) -> str | None:
    try:
        return Path(f"/sys/block/loop{number}/{name}").read_text(errors="surrogateescape")
    except FileNotFoundError:
        return None


class LoopDevice:
    """A loop device and the attachment that it had when this object was made."""

    __slots__ = ("_inode", "_sequence", "backing_path", "number")

    def __init__(self, number: int) -> None:
        """Take the loop device of that number. Raises DeviceIOError (ENXIO) when it is free."""
        info = ffi.new("struct bs_loop_info *")
        check(lib.bs_loop_info(number, info))
        self.number = number
        self.backing_path = os.fsdecode(ffi.string(info.backing_path))
        self._inode = (info.backing_device, info.backing_inode)
        self._sequence = _read_attribute(number, "diskseq")

    @classmethod
    def attach(
        cls,
        path: str | os.PathLike[str],
        *,
        read_only: bool = False,
        direct_io: bool = False,
        autoclear: bool = False,
        sector_size: int = 0,
    ) -> Self:
        """Attach a file to a free loop device.

        With `autoclear` the kernel detaches it once this process has ended (or called `detach`) and nobody
        has it open or mounted. A `sector_size` of 0 is the kernel's 512. `direct_io` bypasses the page cache
        of the file where its file system can.
        """
        flags = read_only * lib.BS_LOOP_READ_ONLY | direct_io * lib.BS_LOOP_DIRECT_IO
        flags |= autoclear * lib.BS_LOOP_AUTOCLEAR
        number = ffi.new("int *")
        check(lib.bs_loop_attach(_native_path(path), flags, sector_size, number))
        return cls(number[0])

    @property
    def path(self) -> str:
        return f"/dev/loop{self.number}"

    def detach(self, timeout: float = 10.0) -> None:
        """Detach, unless that has happened already; wait while others have it open.

        Raises BusyError after `timeout` seconds; the kernel then detaches it when its last user closes it.
        """
        if self.is_attached():
            check(lib.bs_loop_detach(self.number, int(timeout * 1000)))

    def is_attached(self) -> bool:
        """Whether the device still has the file that it had when this object was made."""
        attached = _read_attribute(self.number, "loop/backing_file") is not None
        return attached and _read_attribute(self.number, "diskseq") == self._sequence

    def refresh(self) -> None:
        """Take over a changed size of the file."""
        check(lib.bs_loop_refresh(self.number))

    def written_bytes(self) -> int:
        """Return the bytes written to the device number so far: take differences for this attachment."""
        return self._counter(6)

    def discarded_bytes(self) -> int:
        """Return the bytes discarded on the device number so far; see `written_bytes`."""
        return self._counter(13)

    def _counter(self, field: int) -> int:
        # Fields: Documentation/block/stat.rst of the kernel.
        return int((_read_attribute(self.number, "stat") or "").split()[field]) * _SECTOR

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"<LoopDevice {self.path} {self.backing_path!r}>"


def loop_devices(below: Path | None = None) -> list[LoopDevice]:
    """Return every attached loop device of the machine, or those over the files below a directory.

    Only what is returned is asked: one over a file whose FUSE server hangs does not answer.
    """
    files = loop_files().items()
    numbers = sorted(
        int(path[len("/dev/loop") :])
        for path, backing in files
        if below is None or Path(backing).is_relative_to(below)
    )
    found = []
    for number in numbers:
        try:
            found.append(LoopDevice(number))
        except DeviceIOError:  # detached meanwhile
            continue
    return found


def loop_files() -> dict[str, str]:
    """Return the path of the file below each attached loop device, by its own path. No server is asked."""
    found = {}
    for attribute in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # detached meanwhile
            backing = attribute.read_text(errors="surrogateescape").removesuffix("\n")
            found[f"/dev/{attribute.parts[3]}"] = backing
    return found


def backing_loops(path: str | os.PathLike[str]) -> list[LoopDevice]:
    """Return the loop devices attached to a file, found by its device and inode.

    When nobody answers for the file any more (its FUSE server was killed) they are found by the path alone.
    """
    real = os.path.realpath(path)
    try:
        status = os.stat(real)
    except OSError:
        return [loop for loop in loop_devices() if loop.backing_path == real]
    wanted = (status.st_dev, status.st_ino)
    return [loop for loop in loop_devices() if loop._inode == wanted]


_MAGIC = ((1080, b"\x53\xef", "ext4"), (0, b"XFSB", "xfs"), (65600, b"_BHRfS_M", "btrfs"))


def filesystem_type(source: str | os.PathLike[str]) -> str:
    """Return the type that mount(2) takes for what is on a device or file, told by its magic."""
    with open(source, "rb") as device:
        descriptor = device.fileno()
        return told_by_magic(lambda offset, length: os.pread(descriptor, length, offset), os.fspath(source))


def told_by_magic(read: Callable[[int, int], bytes], name: str) -> str:
    """Return the type of a file system of which `read(offset, length)` gives the contents."""
    for offset, magic, kind in _MAGIC:
        if read(offset, len(magic)) == magic:
            return kind
    raise ArgumentError(f"{name}: no ext4, xfs or btrfs on it: make a file system first")


def mount(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    fstype: str | None = None,
    *,
    read_only: bool = False,
    bind: bool = False,
    remount: bool = False,
    nosuid: bool = False,
    nodev: bool = False,
    noatime: bool = False,
    options: str = "",
) -> None:
    """Mount a block device, or with `bind` a directory; with `remount` change what is mounted.

    `options` go to the file system ("discard,data=ordered"). Without `fstype` the type is told from the
    device.
    """
    flags = read_only * _MS_RDONLY | nosuid * _MS_NOSUID | nodev * _MS_NODEV | noatime * _MS_NOATIME
    flags |= bind * _MS_BIND | remount * _MS_REMOUNT
    if fstype is None and not bind:
        fstype = filesystem_type(source)
    kind = ffi.NULL if fstype is None else fstype.encode()
    check(lib.bs_mount(_native_path(source), _native_path(target), kind, flags, options.encode() or ffi.NULL))


def unmount(target: str | os.PathLike[str], *, lazy: bool = False, abort: bool = False) -> None:
    """Unmount; `lazy` takes it out of sight now and ends it with its last user.

    `abort` makes a FUSE mount fail every request from now on, even if the unmounting then fails: the way out
    when its server is gone.
    """
    flags = lazy * _MNT_DETACH | abort * _MNT_FORCE
    check(lib.bs_umount(_native_path(target), flags))


def limit_fuse_background(device: str, limit: int) -> None:
    """Let the kernel have at most `limit` reads and writes under way that nobody waits for one by one.

    The FUSE file system is named by its device in the table of mounts ("0:43"). Needs root.
    """
    check(lib.bs_fuse_set_max_background(int(device.partition(":")[2]), limit))


@contextmanager
def frozen(path: str | os.PathLike[str], timeout: float = 10.0) -> Iterator[None]:
    """Hold the file system mounted at a path frozen: everything on disk, writers waiting.

    It is thawed at the end, however the block or the process ends. Raises DeviceIOError (ETIMEDOUT) when it
    cannot be frozen within `timeout` seconds.
    """
    check(lib.bs_filesystem_freeze(_native_path(path), int(timeout * 1000)))
    try:
        yield
    finally:
        thaw(path)


def thaw(path: str | os.PathLike[str]) -> None:
    """Thaw a frozen file system. Raises ArgumentError when it is not frozen."""
    check(lib.bs_filesystem_thaw(_native_path(path)))


def sync_filesystem(path: str | os.PathLike[str]) -> None:
    """Write back the file system that holds a path."""
    check(lib.bs_filesystem_sync(_native_path(path)))


def probe(path: str | os.PathLike[str], timeout: float) -> int:
    """Ask the file system mounted at a path for a sign of life; return 0, or the errno that came instead.

    ETIMEDOUT without an answer within `timeout` seconds; ENOTCONN when its FUSE server is gone.
    """
    return -min(0, int(lib.bs_filesystem_probe(_native_path(path), int(timeout * 1000))))


@dataclass(frozen=True, slots=True)
class MountEntry:
    """A line of /proc/self/mountinfo (proc(5))."""

    mount_id: int
    parent_id: int
    device: str
    root: str
    target: str
    options: str
    fstype: str
    source: str
    super_options: str


_ESCAPE = re.compile(rb"\\([0-7]{3})")


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda m: bytes([int(m[1], 8)]), field))


def _parse_mountinfo(line: bytes) -> MountEntry:
    fields = line.split(b" ")
    end = fields.index(b"-", 6)
    mount_id, parent_id, device, root, target, options = (_unescape(field) for field in fields[:6])
    fstype, source, super_options = (_unescape(field) for field in fields[end + 1 : end + 4])
    return MountEntry(
        int(mount_id), int(parent_id), device, root, target, options, fstype, source, super_options
    )


def mount_table() -> list[MountEntry]:
    """Return the mounts of this process's mount namespace, older ones first."""
    table = Path("/proc/self/mountinfo")
    with system_errors(str(table)):
        return [_parse_mountinfo(line) for line in table.read_bytes().splitlines()]


def is_mounted(path: str | os.PathLike[str]) -> bool:
    """Whether something is mounted exactly at a path."""
    real = os.path.realpath(path)
    return any(entry.target == real for entry in mount_table())
