"""Programs that serve a FUSE mount for a driver: started, found again, waited for, by any process.

A server outlives who started it and ends with its mount or by a signal. Nothing is recorded of it: the
kernel's list of processes and its table of mounts say what there is, whoever was killed in between.
"""

import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import mount
from ..errors import BlocksnapError, BusyError
from ..file_system import may_mount, unmount_fuse

__all__ = ["MountServer", "terminate_servers"]

_START_SECONDS = 10.0
_END_SECONDS = 10.0


class MountServer:
    """The program that serves one mount point; it may be running or not."""

    def __init__(self, program: str, target: Path, argument: str) -> None:
        """Take the server of a real path; it is known by its program's name and one argument of its own."""
        self.target = target
        self._program = program
        self._argument = os.fsencode(argument)

    def start(self, command: Sequence[str], *, cwd: Path) -> None:
        """Start it, and return when the target is mounted. Raises what the program says if it is not."""
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
                cwd=cwd,
            )
            try:
                self._wait_mounted(process)
            except BaseException as error:
                process.kill()
                process.wait()
                self.unmount_dead()
                if not isinstance(error, BlocksnapError):
                    raise
                said.seek(0)
                reason = " ".join(said.read().decode(errors="replace").split())
                raise BlocksnapError(f"{self._program} could not mount {self.target}: {reason}") from None
        # A thread that waits leaves no zombie.
        threading.Thread(target=process.wait, daemon=True).start()

    def _wait_mounted(self, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not self.is_mounted():
            if process.poll() is not None or time.monotonic() > deadline:
                raise BlocksnapError("not mounted")
            time.sleep(0.002)

    def is_mounted(self) -> bool:
        """Say whether the target is mounted, without asking whoever serves it."""
        return any(entry.target == str(self.target) for entry in mount.mount_table())

    def is_running(self) -> bool:
        """Say whether the server lives."""
        return bool(self._processes())

    def is_serving(self) -> bool:
        """Say whether the target is mounted by a server that lives; a mount of a dead one is ended."""
        if self.is_mounted() and not self.is_running():
            self.unmount_dead()
        return self.is_mounted()

    def unmount(self) -> None:
        """Unmount, by which the server ends, and wait for that. BusyError while it is in use."""
        if not self.is_serving():
            return
        with self._awaited():
            if may_mount():
                mount.unmount(self.target)
            else:
                unmount_fuse(self.target)

    def terminate(self) -> None:
        """Let the server write everything back, unmount and end, and wait for that."""
        with self._awaited() as processes:
            for process in processes:
                signal.pidfd_send_signal(process, signal.SIGTERM)
        self.unmount_dead()

    def take_one_at_a_time(self) -> None:
        """Let the kernel send reads and writes in the background, as a loop device's, one after the other."""
        (entry,) = (entry for entry in mount.mount_table() if entry.target == str(self.target))
        mount.limit_fuse_background(entry.device, 1)

    def unmount_dead(self) -> None:
        """Unmount what nobody serves any more, and whatever waits for it fails."""
        while self.is_mounted():
            if may_mount():
                self.abort()
                if self.is_mounted():
                    mount.unmount(self.target, lazy=True)
            else:
                unmount_fuse(self.target, lazy=True)

    def abort(self) -> None:
        """Let every request to a dead server fail, also those that wait already. Needs root."""
        with suppress(BusyError):
            mount.unmount(self.target, abort=True)

    @contextmanager
    def _awaited(self) -> Iterator[list[int]]:
        """Give descriptors of the server's processes; wait afterwards until they have ended."""
        with _awaited(self._processes(), f"{self._program} has unmounted {self.target} and") as descriptors:
            yield descriptors

    def _processes(self) -> list[int]:
        return _find_processes(self._program, lambda words: self._argument in words)


def terminate_servers(program: str, below: Path) -> None:
    """Let every process of a program end that has a path below a directory among its arguments."""
    prefix = os.fsencode(below) + b"/"
    found = _find_processes(program, lambda words: any(word.startswith(prefix) for word in words))
    with _awaited(found, f"{program} on {below}") as descriptors:
        for descriptor in descriptors:
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)


def _find_processes(program: str, are_of_it: Callable[[list[bytes]], bool]) -> list[int]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (directory / "cmdline").read_bytes().split(b"\0")
            if os.path.basename(os.fsdecode(words[0])) == program and are_of_it(words[1:]):
                found.append(int(directory.name))
    return found


@contextmanager
def _awaited(pids: Sequence[int], what: str) -> Iterator[list[int]]:
    """Give descriptors of processes; wait afterwards until they have ended: BusyError says what does not."""
    descriptors = []
    for pid in pids:
        with suppress(ProcessLookupError):
            descriptors.append(os.pidfd_open(pid))
    try:
        yield descriptors
        deadline = time.monotonic() + _END_SECONDS
        for descriptor in descriptors:
            if not _has_ended(descriptor, deadline - time.monotonic()):
                raise BusyError(f"{what} does not end")
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _has_ended(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(seconds, 0) * 1000))
