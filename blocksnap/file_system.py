"""Making file systems on thin devices, and mounting them without privilege: the programs of e2fsprogs,
xfsprogs and fuse2fs, which work on the files of an export.
"""

import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO

from . import mount
from .errors import ArgumentError, BlocksnapError, BusyError, NotSupportedError

__all__ = [
    "FILE_SYSTEMS",
    "Fuse2fs",
    "find_program",
    "grow_ext4",
    "grow_xfs",
    "make_file_system",
    "may_mount",
    "unmount_fuse",
]

FILE_SYSTEMS = ("ext4", "xfs")

_PACKAGES = {
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "fuse2fs": "fuse2fs",
    "fusermount3": "fuse3",
}
# One inode for 64 KiB is enough for images. Nothing is left for the kernel to initialise later: an idle file
# system writes nothing.
_EXT4 = ("-q", "-F", "-t", "ext4", "-m", "0", "-i", "65536")
_EXT4_EXTENDED = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
_MOUNT_SECONDS = 10.0

_XFS_GROW_DATA = 0x4010586E  # fs/xfs/libxfs/xfs_fs.h of the kernel
_XFS_INODE_PERCENT = 25  # what mkfs.xfs gives a file system of less than 1 TiB


def may_mount() -> bool:
    """Say whether this process may use loop devices and mount(2): root with CAP_SYS_ADMIN in effect."""
    if os.geteuid() != 0:
        return False
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> 21 & 1)


def find_program(name: str) -> str | None:
    """Return the path of a program, looked for in the system directories too."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _program(name: str) -> str:
    path = find_program(name)
    if path is None:
        raise NotSupportedError(f"{name} is not installed: apt install {_PACKAGES[name]}")
    return path


def make_file_system(path: Path, kind: str) -> None:
    """Make an empty file system whose root directory has mode 0755, belongs to this user and is empty."""
    if kind == "ext4":
        extended = f"{_EXT4_EXTENDED},root_owner={os.geteuid()}:{os.getegid()}"
        _run([_program("mke2fs"), *_EXT4, "-E", extended, str(path)])
        _run([_program("debugfs"), "-w", "-R", "rmdir lost+found", str(path)])
    elif kind == "xfs":
        _run([_program("mkfs.xfs"), "-q", "-f", "-K", str(path)])
    else:
        raise ArgumentError(
            f'"{kind}" is no file system that can be made here: take {" or ".join(FILE_SYSTEMS)}'
        )


def _run(command: list[str], *, good: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode not in good:
        said = " ".join(done.stderr.split())
        raise BlocksnapError(f"{Path(command[0]).name} failed on {command[-1]}: {said}")


def grow_ext4(path: str | os.PathLike[str]) -> None:
    """Let an ext4 that is not mounted take all of its device or file, which has grown."""
    # A whole check would make a lost+found anew.
    _run([_program("e2fsck"), "-y", "-E", "journal_only", os.fspath(path)], good=(0, 1))
    _run([_program("resize2fs"), "-f", os.fspath(path)])


def grow_xfs(mounted: str | os.PathLike[str], size: int) -> None:
    """Let a mounted xfs take all of its device, which has grown to `size` bytes."""
    blocks = size // os.statvfs(mounted).f_bsize
    descriptor = os.open(mounted, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _XFS_GROW_DATA, struct.pack("=QIxxxx", blocks, _XFS_INODE_PERCENT))
    except OSError as error:
        raise BlocksnapError(f"{os.fspath(mounted)} cannot grow to {size} bytes: {error.strerror}") from None
    finally:
        os.close(descriptor)


def unmount_fuse(target: str | os.PathLike[str], *, lazy: bool = False) -> None:
    """Unmount a FUSE file system of this user without privilege. BusyError when that fails."""
    command = [_program("fusermount3"), "-u", *(["-z"] if lazy else []), os.fspath(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BusyError(f"unmounting {os.fspath(target)}: {' '.join(done.stderr.split())}")


class Fuse2fs:
    """An ext4 file system mounted by a process of ours, without privilege.

    The target is a real path. Nothing here looks at it: what serves the source could wait for itself.
    """

    def __init__(self, source: Path, target: Path, *, read_only: bool = False) -> None:
        options = "fakeroot" + (",ro" if read_only else "")
        command = [_program("fuse2fs"), "-f", "-o", options, str(source), str(target)]
        self._target = target
        with tempfile.TemporaryFile() as said:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
            )
            self._wait_mounted(said)

    def _wait_mounted(self, said: IO[bytes]) -> None:
        deadline = time.monotonic() + _MOUNT_SECONDS
        while all(entry.target != str(self._target) for entry in mount.mount_table()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                self._process.wait()
                said.seek(0)
                reason = " ".join(said.read().decode(errors="replace").split())
                raise BlocksnapError(f"fuse2fs could not mount {self._target}: {reason}")
            time.sleep(0.005)

    def is_mounted(self) -> bool:
        return self._process.poll() is None

    def unmount(self, *, lazy: bool = False) -> None:
        """Unmount and wait until everything is written."""
        try:
            unmount_fuse(self._target, lazy=lazy)
        except BusyError:
            if self._process.poll() is None:
                raise
        if not lazy:
            self._process.wait()
