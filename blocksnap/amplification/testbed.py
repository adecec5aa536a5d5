"""Where a driver is measured: a fresh file system on a loop device of its own, which nobody else writes to.

A work directory (`blocksnap-compare-*`) belongs to one process, which holds its file `owner` locked; whoever
can take that lock may clear the directory away.

Without root there is no loop device: the testbed is then a plain directory and has no counter.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .. import mount
from ..dead_mounts import remove_mapped
from ..drivers.mount_server import terminate_servers
from ..drivers.qcow2 import DAEMON
from ..errors import BlocksnapError, BusyError, NoSpaceError, NotSupportedError
from ..file_system import find_program
from ..units import format_size

__all__ = [
    "DEFAULT_WORK_DIR",
    "KINDS",
    "PREFIX",
    "Testbed",
    "check_space",
    "clear_below",
    "make_file_system",
    "missing_for",
    "open_testbed",
    "owner_is_alive",
    "work_directory",
]

DEFAULT_WORK_DIR = Path("/var/tmp")  # unlike /tmp it is seldom in memory
PREFIX = "blocksnap-compare-"

# How each kind is made, so that the kernel has nothing left to initialise in it; the package that can; how it
# is mounted: nothing is discarded behind the back of what is measured.
_MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
KINDS = tuple(_MKFS)
_PACKAGES = {"ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs"}
_OPTIONS = {"btrfs": "nodiscard"}

_QUIET_SECONDS = 0.15
_QUIET_TIMEOUT = 5.0
_DETACH_TIMEOUT = 5.0
_SERVER_TIMEOUT = 5.0


class Testbed:
    """A root directory for one driver; on a loop device when there is one."""

    __test__ = False  # nothing for pytest to collect

    def __init__(self, root: Path, loop: mount.LoopDevice | None) -> None:
        self.root = root
        self._loop = loop

    def written_bytes(self) -> int | None:
        """Return the bytes written to the loop device so far; only differences mean something."""
        return None if self._loop is None else self._loop.written_bytes()

    def used_bytes(self) -> int | None:
        """Return the space in use on the file system of the testbed; None where others use it too."""
        if self._loop is None:
            return None
        status = os.statvfs(self.root)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def settle(self) -> None:
        """Sync the file system and wait until the device's counter stands still."""
        mount.sync_filesystem(self.root)
        deadline = time.monotonic() + _QUIET_TIMEOUT
        last, since = self.written_bytes(), time.monotonic()
        while self._loop is not None and time.monotonic() - since < _QUIET_SECONDS:
            time.sleep(0.03)
            if (now := self.written_bytes()) != last:
                last, since = now, time.monotonic()
            if time.monotonic() > deadline:
                raise BusyError(
                    f"{self._loop.path} is written to without a pause: something else uses {self.root}"
                )


@contextmanager
def work_directory(parent: Path, *, keep: bool = False) -> Iterator[Path]:
    """Make a directory below parent and hold it as ours; it is gone afterwards, unless it is to be kept."""
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent.resolve()))
    owner = os.open(directory / "owner", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX)
        yield directory
    finally:
        clear_below(directory)
        if not keep:
            shutil.rmtree(directory)
        os.close(owner)


def owner_is_alive(directory: Path) -> bool:
    """Say whether a process still holds a work directory."""
    try:
        owner = os.open(directory / "owner", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(owner)
    return False


@contextmanager
def open_testbed(
    directory: Path, name: str, size: int, *, on_loop: bool, keep: bool = False, file_system: str = "ext4"
) -> Iterator[Testbed]:
    """Give a fresh testbed of `size` bytes in a work directory; with keep its file NAME.FILE_SYSTEM stays."""
    root = directory / name
    root.mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        if not on_loop:
            yield Testbed(root, None)
            return
        backing = directory / f"{name}.{file_system}"
        if not keep:
            stack.callback(backing.unlink, missing_ok=True)
        make_file_system(backing, size, file_system)
        loop = mount.LoopDevice.attach(backing, direct_io=True, autoclear=True)
        stack.callback(_detach, loop)
        mount.mount(loop.path, root, file_system, options=_OPTIONS.get(file_system, ""))
        stack.callback(clear_below, root)
        stack.callback(_wait_for_servers, root)
        if file_system == "ext4":
            (root / "lost+found").rmdir()
        yield Testbed(root, loop)


def missing_for(file_system: str) -> str | None:
    """Return why no testbed with this file system can be made here, None when it can."""
    if find_program(_MKFS[file_system][0]) is None:
        return f"{_MKFS[file_system][0]} is not installed: apt install {_PACKAGES[file_system]}"
    if file_system in Path("/proc/filesystems").read_text().split():
        return None
    modprobe = find_program("modprobe")
    if modprobe and subprocess.run([modprobe, "-n", "-q", file_system], check=False).returncode == 0:
        return None  # mount(2) has it loaded
    return f"this kernel has no {file_system}: load its module"


def make_file_system(backing: Path, size: int, kind: str) -> None:
    """Make a sparse file with a file system on it that the kernel has nothing left to initialise in."""
    if (reason := missing_for(kind)) is not None:
        raise NotSupportedError(reason)
    with backing.open("wb") as file:
        file.truncate(size)
    program, *options = _MKFS[kind]
    command = [find_program(program) or program, *options, str(backing)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise BlocksnapError(f"{program} on {backing} failed: {error.stderr.strip()}") from None


def check_space(directory: Path, needed: int) -> None:
    """Raise NoSpaceError when a directory's file system has less than `needed` bytes free."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        has, needs = format_size(free), format_size(needed)
        raise NoSpaceError(f"{directory} has {has} free, {needs} are needed: choose another --work-dir")


def clear_below(directory: Path, timeout: float = 5.0) -> None:
    """Unmount everything at and below a directory, and detach the loop devices over files in it.

    What is still in use after `timeout` seconds is unmounted lazily: it ends with its last user.
    """
    real = Path(os.path.realpath(directory))
    deadline = time.monotonic() + timeout
    for target in _mounts_below(real):
        _detach_loops_below(Path(target), deadline)
        with suppress(BusyError):  # an unmounted export does not end its daemon
            terminate_servers(DAEMON, real if target == str(real) else Path(target).parent)
        _unmount_patiently(target, deadline)
    _detach_loops_below(real, deadline)


def _detach_loops_below(directory: Path, deadline: float) -> None:
    for loop in mount.loop_devices(below=directory):
        for entry in reversed(mount.mount_table()):
            if entry.source == loop.path:
                _unmount_patiently(entry.target, deadline)
        remove_mapped(loop)
        _detach(loop)


def _detach(loop: mount.LoopDevice) -> None:
    """Detach; one that is in use still, as by a copied mount namespace, ends with its last user."""
    with suppress(BusyError):
        loop.detach(_DETACH_TIMEOUT)


def _mounts_below(directory: Path) -> list[str]:
    """Return the mounts at and below a directory, the youngest first."""
    targets = [entry.target for entry in mount.mount_table()]
    return [target for target in reversed(targets) if Path(target).is_relative_to(directory)]


def _unmount_patiently(target: str, deadline: float) -> None:
    while time.monotonic() < deadline:
        if _unmount(target):
            return
        time.sleep(0.05)
    _unmount(target, lazy=True)


def _unmount(target: str, *, lazy: bool = False) -> bool:
    """Unmount; say whether nothing is mounted there any more: others may unmount it at the same time."""
    try:
        mount.unmount(target, lazy=lazy)
    except BlocksnapError:
        if any(entry.target == target for entry in mount.mount_table()):
            if lazy:
                raise
            return False
    return True


def _wait_for_servers(directory: Path) -> None:
    """Wait until the processes that serve FUSE mounts below a directory have ended, as drivers let them."""
    deadline = time.monotonic() + _SERVER_TIMEOUT
    while time.monotonic() < deadline and any(
        entry.fstype.startswith("fuse") and Path(entry.target).is_relative_to(directory)
        for entry in mount.mount_table()
    ):
        time.sleep(0.02)
