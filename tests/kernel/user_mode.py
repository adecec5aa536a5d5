"""A kernel with device-mapper that runs as a process: Debian's user-mode Linux on this machine's own files.

The guest is root and sees every file of this machine; what it writes stays in its memory, except below the
directories that it is given as writable and on the files that it is given as disks. That guards against
accidents, not against malice. It boots in about two seconds and ends with this process, however that ends.

    python -m tests.kernel.user_mode [--writable DIR] [--disk FILE] COMMAND...     run one command in a guest

Host files take no direct I/O, punched holes or attributes from inside: put the files of loop devices on the
guest's /dev/shm, or use disks (/dev/ubda, ...). The one processor and no preemption hide races.
"""

import argparse
import fcntl
import functools
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = Path("/usr/lib/uml/modules")
PACKAGES = "user-mode-linux kmod gcc libc6-dev"
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV", "PYTHONPATH", "PYTEST_ADDOPTS")
_PREFIX = "blocksnap-guest."


class GuestError(Exception):
    """The guest ended without telling an exit status."""


def missing() -> str:
    """Return what this machine lacks to run a guest, empty if nothing."""
    if os.uname().machine != "x86_64":
        return "an x86_64 machine"
    if os.geteuid() != 0:
        return "root"
    tools = ["linux.uml", "insmod", "cc", "unshare", "setpriv", "taskset"]
    absent = [tool for tool in tools if _tool(tool) is None]
    if absent or not MODULES.is_dir():
        return f"{' '.join(absent) or MODULES} (apt-get install {PACKAGES})"
    return ""


def _tool(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def _sweep(base: Path) -> None:
    """Remove the directories of runs that were killed: nobody holds their lock."""
    for old in base.glob(_PREFIX + "*"):
        try:
            with (old / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
        except OSError:
            continue


def _memory_directory(memory: int) -> str:
    """Return where the guest's memory, a sparse file, has room; it is unlinked at once."""
    status = os.statvfs("/dev/shm")
    return "/dev/shm" if status.f_bavail * status.f_frsize >= memory else tempfile.gettempdir()


class _Processor:
    """The processor to pin a guest to, if possible one that no other guest has.

    On two its processes would wake each other across them, which is slower than to share one.
    """

    def __init__(self) -> None:
        self._lock = -1
        numbers = sorted(os.sched_getaffinity(0))
        self.number = numbers[os.getpid() % len(numbers)]
        for number in numbers:
            lock = os.open(f"/sys/devices/system/cpu/cpu{number}", os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                continue
            self._lock, self.number = lock, number
            return

    def release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


@functools.cache
def _shim() -> bytes:
    """Return the compiled ptrace_shim.c."""
    with tempfile.NamedTemporaryFile() as library:
        subprocess.run(
            ["cc", "-O2", "-shared", "-fPIC", "-o", library.name, HERE / "ptrace_shim.c"], check=True
        )
        return Path(library.name).read_bytes()


class Guest:
    """A running guest and the one command in it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        writable: Sequence[Path] = (),
        disks: Sequence[Path] = (),
        memory: int = 1 << 30,
        environment: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
        output: Callable[[bytes], object] | None = None,
    ) -> None:
        """Boot, and run the command in this directory. `output` gets what it prints, piece by piece.

        `files` are put below /run/host.
        """
        _sweep(Path(tempfile.gettempdir()))
        made = Path(tempfile.mkdtemp(prefix="new-" + _PREFIX))
        self._lock = (made / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Only under this name others sweep it.
        self.directory = made.rename(made.with_name(made.name.removeprefix("new-")))
        self._output: list[bytes] = []
        self._status: list[bytes] = []
        self.reports: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        """Lines that the command writes to /dev/ttyS1, then None."""
        self._processor = _Processor()
        try:
            for name, text in (files or {}).items():
                (self.directory / name).write_text(text)
            self._prepare(command, writable, environment or {})
            self._boot(disks, memory, output or self._output.append)
        except BaseException:
            self._release()
            raise

    def _prepare(
        self, command: Sequence[str], writable: Sequence[Path], environment: Mapping[str, str]
    ) -> None:
        modules = max(MODULES.iterdir())
        places = " ".join(shlex.quote(str(place.resolve(strict=True))) for place in writable)
        (self.directory / "settings").write_text(f"modules={modules}\nwritable=({places})\n")
        passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | dict(environment)
        words = ["env", "-i", *(f"{name}={value}" for name, value in passed.items()), *command]
        (self.directory / "command").write_text(f"cd {shlex.quote(os.getcwd())}\nexec {shlex.join(words)}\n")
        shutil.copy(HERE / "init", self.directory / "init")
        (self.directory / "shim.so").write_bytes(_shim())

    def _boot(self, disks: Sequence[Path], memory: int, output: Callable[[bytes], object]) -> None:
        lines = [os.pipe() for _ in range(3)]
        arguments = [
            *(f"ssl{number}=null,fd:{write}" for number, (_, write) in enumerate(lines)),
            *(f"ubd{number}d={disk.resolve(strict=True)}" for number, disk in enumerate(disks)),
            *(
                f"mem={memory >> 10}K",
                f"uml_dir={self.directory}/uml",
                "umid=guest",
                "con=null",
                "con0=null,fd:1",
            ),
            *("ssl=null", "rootfstype=hostfs", "rootflags=/", "ro", "noreboot", "quiet"),
            *(f"init={self.directory}/init", f"run={self.directory}"),
        ]
        with (self.directory / "console").open("wb") as console:
            self._process = subprocess.Popen(
                [*self._fence(), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                pass_fds=[write for _, write in lines],
                env={
                    "PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin",
                    "TMPDIR": _memory_directory(memory),
                    "HOME": str(self.directory),
                },
            )
        for _, write in lines:
            os.close(write)
        takers = [output, _Lines(self.reports), self._status.append]
        self._readers = [
            threading.Thread(target=_read, args=(read, taker), daemon=True)
            for (read, _), taker in zip(lines, takers, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    def _fence(self) -> list[str]:
        """Return what starts the kernel: it must not outlive us, nor its processes the kernel."""
        return [
            *("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child=KILL"),
            # As process 1 the kernel would survive its own end: it ends by a signal, which those ignore.
            *("timeout", "--foreground", "0"),
            *("taskset", "-c", str(self._processor.number)),
            # Only the kernel may be preloaded, not the tools that start it.
            *("env", f"LD_PRELOAD={self.directory}/shim.so", _tool("linux.uml") or "linux.uml"),
        ]

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the command's end and return its status; GuestError tells the end of the console."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise GuestError(f"the guest did not end within {timeout} s\n{self.console()}") from None
        self._join()
        text = b"".join(self._status).strip()
        if not text.isdigit():
            raise GuestError(f"the guest ended without an exit status\n{self.console()}")
        return int(text)

    def kill(self) -> None:
        """End the guest at once: for what it wrote, a power cut."""
        self._process.kill()
        self._process.wait()
        self._join()

    def _join(self) -> None:
        for reader in self._readers:
            reader.join()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def output(self) -> str:
        return b"".join(self._output).decode(errors="replace")

    def console(self, lines: int = 40) -> str:
        """Return the end of the kernel's console."""
        text = (self.directory / "console").read_bytes().decode(errors="replace")
        return "\n".join(text.replace("\r", "").splitlines()[-lines:])

    def close(self) -> None:
        if self.running:
            self.kill()
        self._release()

    def _release(self) -> None:
        self._processor.release()
        shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Lines:
    """Takes pieces, gives lines, and None at the end."""

    def __init__(self, lines: "queue.SimpleQueue[bytes | None]") -> None:
        self._lines = lines
        self._rest = b""

    def __call__(self, piece: bytes) -> None:
        *whole, self._rest = (self._rest + piece).split(b"\n")
        for line in whole:
            self._lines.put(line)
        if not piece:
            self._lines.put(None)


def _read(descriptor: int, take: Callable[[bytes], object]) -> None:
    """Read to the end; the last piece taken is empty."""
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        while piece := stream.read(1 << 16):
            take(piece)
    take(b"")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a command under a kernel with device-mapper.")
    parser.add_argument(
        "--writable", type=Path, action="append", default=[], help="a directory to write through"
    )
    parser.add_argument(
        "--disk", type=Path, action="append", default=[], help="a file as /dev/ubda, /dev/ubdb, ..."
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds (300)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if lack := missing():
        parser.error(f"needs {lack}")

    def show(piece: bytes) -> None:
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()

    begun = time.monotonic()
    with Guest(options.command, writable=options.writable, disks=options.disk, output=show) as guest:
        status = guest.wait(options.timeout)
    print(f"exit status {status} after {time.monotonic() - begun:.1f} s", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
