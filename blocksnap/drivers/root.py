"""A driver's root directory: whose it is, who works in it now, who holds which layer.

    <root>/driver           the name of the one driver this root belongs to
    <root>/lock             flock'ed for the length of each change, never longer: processes share a root
    <root>/references/ID    who holds a layer, one holder a line; void after a reboot, so never synced

A reference names a process (with its start time, so that a reused pid is not mistaken for it) or is
*lasting*: it belongs to no process and stays until somebody drops it. References of dead processes and of an
earlier boot do not count.
"""

import fcntl
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown

from ..errors import ArgumentError, DamagedMetadataError, system_errors
from ..pool_files import require_own

__all__ = [
    "DriverRoot",
    "FileLock",
    "Holder",
    "fsync_directory",
    "never_written",
    "read_note",
    "read_number",
    "write_durable",
]

_LONGEST_NOTE = 4096
_HOLDER = re.compile(r"(\S+) ([0-9]{1,19}) ([0-9]{1,19})", re.ASCII)


def fsync_directory(path: Path) -> None:
    """Make names made, renamed or removed in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durable(path: Path, text: str) -> None:
    """Write a file so that after a crash it holds either its former text or the new one, whole."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
    fsync_directory(path.parent)


def read_note(path: Path) -> str:
    """Return the line that a driver has noted in a file; DamagedMetadataError if that cannot be it."""
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST_NOTE + 1).decode("ascii").removesuffix("\n")
    except FileNotFoundError as error:
        raise DamagedMetadataError(f"{path} is missing: restore it") from error
    except UnicodeDecodeError as error:
        raise never_written(path, error.object) from error
    if len(text) > _LONGEST_NOTE or not text.isprintable():
        raise never_written(path, text)
    return text


def read_number(path: Path) -> int:
    """Return the number of bytes that a driver has noted in a file."""
    text = read_note(path)
    if not re.fullmatch("[0-9]{1,19}", text):
        raise never_written(path, text)
    return int(text)


def never_written(path: Path, found: str | bytes) -> DamagedMetadataError:
    """Return the error for a note that is not what a driver writes there."""
    return DamagedMetadataError(f"{path} holds {shown(found)}, which no driver wrote: restore it")


class FileLock:
    """A lock between processes (flock) and between threads; the thread that holds it may take it again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = threading.RLock()
        self._depth = 0
        self._descriptor = -1

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock, waiting for it."""
        self._acquire(wait=True)
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def try_hold(self) -> Iterator[bool]:
        """Hold the lock if it is free; the value says whether it was."""
        held = self._acquire(wait=False)
        try:
            yield held
        finally:
            if held:
                self._release()

    def _acquire(self, *, wait: bool) -> bool:
        if not self._thread.acquire(blocking=wait):
            return False
        try:
            if self._depth == 0 and not self._flock(wait=wait):
                self._thread.release()
                return False
        except BaseException:
            self._thread.release()
            raise
        self._depth += 1
        return True

    def _flock(self, *, wait: bool) -> bool:
        # The file is opened anew each time: a descriptor kept over fork() would share its lock with the
        # child.
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return False
            raise
        self._descriptor = descriptor
        return True

    def _release(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            os.close(self._descriptor)
        self._thread.release()


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a layer: a process, or with pid 0 nobody in particular (a lasting reference)."""

    boot: str
    pid: int
    started: int

    @classmethod
    def this_process(cls) -> "Holder":
        return cls(_boot(), os.getpid(), _start_time(os.getpid()))

    @classmethod
    def lasting(cls) -> "Holder":
        return cls(_boot(), 0, 0)

    def is_alive(self) -> bool:
        if self.boot != _boot():
            return False
        return self.pid == 0 or (self.started != 0 and _start_time(self.pid) == self.started)

    def __str__(self) -> str:
        return f"process {self.pid}" if self.pid else "a lasting mount"


class DriverRoot:
    """The root directory of one driver; made when it is not there, refused when it is another driver's."""

    def __init__(self, path: Path, driver: str) -> None:
        self.path = path
        require_own(path)
        with system_errors(str(path)):
            (path / "references").mkdir(mode=0o700, parents=True, exist_ok=True)
        self.lock = FileLock(path / "lock")
        with self.lock.hold(), system_errors(str(path)):
            self._claim(driver)

    def _claim(self, driver: str) -> None:
        marker = self.path / "driver"
        if not marker.exists():
            write_durable(marker, driver + "\n")
        owner = read_note(marker)
        if owner != driver:
            raise ArgumentError(
                f'{self.path} belongs to driver "{owner}", not "{driver}": open that or take another root'
            )

    def holders(self, id: str) -> list[Holder]:
        """Return who holds a layer now."""
        try:
            lines = self._references(id).read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        # What a power cut made of a file that was never synced is of another boot in any case.
        found = [Holder(m[1], int(m[2]), int(m[3])) for m in map(_HOLDER.fullmatch, lines) if m]
        return [holder for holder in found if holder.is_alive()]

    def has_references(self) -> bool:
        """Say whether there is a reference to any layer, even one of a dead process."""
        return any((self.path / "references").iterdir())

    def add_reference(self, id: str, *, lasting: bool) -> None:
        """Count one more reference of this process; a lasting one is counted once."""
        holder = Holder.lasting() if lasting else Holder.this_process()
        holders = self.holders(id)
        if not (lasting and holder in holders):
            self._write(id, [*holders, holder])

    def drop_reference(self, id: str) -> list[Holder]:
        """Drop one reference of this process, else a lasting one; return who still holds the layer."""
        holders = self.holders(id)
        for mine in (Holder.this_process(), Holder.lasting()):
            if mine in holders:
                holders.remove(mine)
                break
        self._write(id, holders)
        return holders

    def drop_references(self, id: str) -> list[Holder]:
        """Drop all references but those of other living processes, which are returned."""
        mine = (Holder.this_process(), Holder.lasting())
        others = [holder for holder in self.holders(id) if holder not in mine]
        self._write(id, others)
        return others

    def _references(self, id: str) -> Path:
        return self.path / "references" / id

    def _write(self, id: str, holders: list[Holder]) -> None:
        file = self._references(id)
        if not holders:
            file.unlink(missing_ok=True)
            return
        fresh = self.path / f".{id}.references"
        fresh.write_text("".join(f"{h.boot} {h.pid} {h.started}\n" for h in holders))
        fresh.rename(file)
