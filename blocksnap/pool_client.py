"""A pool that another process serves, with the methods of Pool; and starting that process.

with pool_client.serve("pool") as pool:        # starts a server if there is none
    pool.mount("base", "/mnt")
pool = pool_client.connect("pool")             # None if nobody serves it

A server runs its pool with one engine. Who asks for another gets BusyError; who asks for none takes the
server that there is.
"""

import os
import select
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from .device_mounts import DeviceMount
from .engines import DEFAULT_ENGINE, engine_named
from .errors import ArgumentError, BlocksnapError, BusyError, DeviceIOError, NotSupportedError, system_errors
from .metadata import DELTA_RANGE, CheckReport, Finding
from .pool_files import PathArgument, PoolFiles, Progress
from .pool_protocol import PAYLOAD_BYTES, VERSION, Message, error_from, peer, receive, send, socket_address
from .pool_report import REVERSE_MAPPING, DeviceUsage, PoolStatus
from .pool_service import mount_namespace
from .remote_device import DeviceDescription, RemoteDevice
from .thin_device import parse_device_size, require_name
from .units import Size, parse_size
from .user_pool import PoolCounters

__all__ = ["PoolClient", "RemoteDevice", "ServerProcess", "connect", "serve", "server_of"]

_START_SECONDS = 10.0
_RETRY_SECONDS = 0.02
_MAX_LOG = 1 << 20
_LOOK_MILLISECONDS = 500
_STATES = {"T": "stopped", "t": "stopped", "D": "waiting for a device", "Z": "dead", "X": "dead"}


class ServerProcess(NamedTuple):
    """The process that serves a pool, and its state: a letter of proc(5)."""

    pid: int
    state: str

    @classmethod
    def of(cls, connection: socket.socket) -> Self:
        """Return the process that listens at the other end, which may be too ill to say so itself."""
        pid, _ = peer(connection)
        try:
            return cls(pid, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        except OSError:
            return cls(pid, "X")

    @property
    def is_stopped(self) -> bool:
        return self.state in ("T", "t")

    @property
    def mend(self) -> str:
        """What somebody can do who waits for it."""
        return f"kill -CONT {self.pid}" if self.is_stopped else "wait, or end that process"

    def __str__(self) -> str:
        return f"process {self.pid}, which is {_STATES.get(self.state, 'running')}"


class PoolClient:
    """A connection to the server of a pool. Methods may be called from any thread; they take turns."""

    def __init__(self, directory: Path, connection: socket.socket) -> None:
        """Read the greeting of a new connection and take it over; its owner closes it after an error."""
        self.path = directory
        self._connection = connection
        self._lock = threading.Lock()
        self._await_greeting()
        greeting = self._next()
        self.server_pid: int = greeting.body["result"]["pid"]
        if greeting.body["result"]["version"] != VERSION:
            raise NotSupportedError(
                f"pool {directory} is served by another version of blocksnap (process {self.server_pid}):"
                " unmount what it has mounted, then it ends"
            )
        self.engine: str = greeting.body["result"]["engine"]

    def _await_greeting(self) -> None:
        """Wait until the server speaks; a stopped one would be waited for in vain."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        while not poll.poll(_LOOK_MILLISECONDS):
            server = ServerProcess.of(self._connection)
            if server.is_stopped:
                raise BusyError(f"pool {self.path} is served by {server}: {server.mend}")

    def close(self) -> None:
        """Say good-bye; returns when the server has closed the pool, if this was all that kept it."""
        with self._lock, self._connection, suppress(OSError, BlocksnapError):
            send(self._connection, {"verb": "leave"})
            if self._next().body["result"]:
                self._connection.recv(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PoolClient {str(self.path)!r} of process {self.server_pid}>"

    # ---- as Pool

    @property
    def closed(self) -> bool:
        return self._connection.fileno() < 0

    @property
    def read_only(self) -> bool:
        return self.status().read_only

    def devices(self) -> list[RemoteDevice]:
        """Return every thin device by name."""
        return [self._device(described) for described in self.ask("devices").body["result"]]

    def device(self, name: str) -> RemoteDevice:
        """Return a thin device; DeviceNotFoundError if there is none of that name."""
        return RemoteDevice(self, self.describe(name))

    def create_device(
        self, name: str, size: Size, *, labels: Mapping[str, str] | None = None
    ) -> RemoteDevice:
        """Create a thin device that reads as zeros and takes no space until it is written to."""
        require_name(name)
        made = self.ask("create_device", name=name, size=parse_device_size(size), labels=dict(labels or {}))
        return self._device(made.body["result"])

    def commit(self) -> None:
        """Make everything written so far durable, in one commit for all devices."""
        self.ask("commit")

    def extend(
        self,
        *,
        size: Size | None = None,
        metadata_size: Size | None = None,
        preallocate: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Grow data, metadata or both to new sizes."""
        sizes = {
            "size": None if size is None else parse_size(size),
            "metadata_size": None if metadata_size is None else parse_size(metadata_size, "metadata size"),
        }
        self.ask("extend", progress=progress, preallocate=preallocate, **sizes)

    def status(self) -> PoolStatus:
        """Return sizes, numbers, flags and byte counters of the pool."""
        found = self.ask("status").body["result"]
        return PoolStatus(**{**found, "counters": PoolCounters(**found["counters"])})

    def usage(self) -> list[DeviceUsage]:
        """Return the mapped, exclusive and shared bytes of every thin device, by name."""
        return [DeviceUsage(**one) for one in self.ask("usage").body["result"]]

    def delta(self, left: RemoteDevice | str, right: RemoteDevice | str) -> NDArray[np.void]:
        """Return where two devices differ, as Pool.delta does."""
        found = self.ask("delta", left=_name(left), right=_name(right))
        return np.frombuffer(found.payload, DELTA_RANGE)

    def reverse_mappings(self, begin: int = 0, end: int | None = None) -> NDArray[np.void]:
        """Return who uses the data blocks from begin to before end, as Pool.reverse_mappings does."""
        return np.frombuffer(self.ask("reverse_mappings", begin=begin, end=end).payload, REVERSE_MAPPING)

    def mapped_blocks(self) -> NDArray[np.uint8]:
        """Return a bit for each data block, as Pool.mapped_blocks does."""
        return np.frombuffer(self.ask("mapped_blocks").payload, np.uint8)

    def write_delta(self, left: RemoteDevice | str, right: RemoteDevice | str, output: int) -> None:
        """Write to a file descriptor what `thin_delta` prints for two devices."""
        with _regular_file(output) as file:
            self.ask("write_delta", descriptor=file, left=_name(left), right=_name(right))

    def dump(self, output: int) -> None:
        """Write to a file descriptor what `thin_dump` prints."""
        with _regular_file(output) as file:
            self.ask("dump", descriptor=file)

    def check(self) -> CheckReport:
        """Prove every invariant of the metadata and recompute all counts."""
        found = self.ask("check").body["result"]
        return CheckReport(**{**found, "findings": tuple(Finding(*each) for each in found["findings"])})

    # ---- what only a served pool can do

    def mounts(self) -> list[DeviceMount]:
        """Return what is mounted, by device."""
        return [DeviceMount(**one) for one in self.ask("mounts").body["result"]]

    def mount(
        self, device: RemoteDevice | str, target: PathArgument, *, read_only: bool = False, options: str = ""
    ) -> DeviceMount:
        """Mount a device at a directory until `umount`, beyond the end of this process.

        A device that is mounted there already stays as it is; BusyError when it is mounted elsewhere.
        """
        if not os.path.isdir(target):
            raise ArgumentError(f"{os.fspath(target)} is not a directory: make it, or mount elsewhere")
        done = self.ask(
            "mount",
            name=_name(device),
            target=os.path.realpath(target),
            read_only=read_only,
            options=options,
            namespace=mount_namespace(),
        )
        return DeviceMount(**done.body["result"])

    def umount(self, device: RemoteDevice | str) -> None:
        """Unmount a device. BusyError names who uses it, ArgumentError says that it is not mounted."""
        self.ask("umount", name=_name(device))

    def make_file_system(self, device: RemoteDevice | str, kind: str = "ext4") -> None:
        """Make an empty file system on a device: all that was on it is lost."""
        self.ask("make_file_system", name=_name(device), kind=kind)

    def grow_ext4(self, device: RemoteDevice | str) -> None:
        """Let the ext4 on a device that has grown, and is not mounted, take all of it."""
        self.ask("grow_ext4", name=_name(device))

    def figures(self, device: RemoteDevice | str) -> dict[str, Any] | None:
        """Return the bytes that the pool wrote since a device was made, None if it is older than the server.

        filesystem_bytes are those of the device's own file system (None without root), the rest is of the
        whole pool.
        """
        found: dict[str, Any] | None = self.ask("figures", name=_name(device)).body["result"]
        return found

    # ---- what the devices ask for

    def describe(self, name: str) -> DeviceDescription:
        return DeviceDescription(**self.ask("device", name=name).body["result"])

    def ask(
        self,
        verb: str,
        *,
        payload: Any = b"",
        descriptor: int | None = None,
        progress: Progress | None = None,
        **arguments: Any,
    ) -> Message:
        """Send a request and return the answer; raise the error that the server answers with."""
        with self._lock, self._named_loss():
            if self.closed:
                raise ArgumentError(
                    f"the connection to the server of pool {self.path} is closed: open it again"
                )
            send(self._connection, {"verb": verb, "arguments": arguments}, payload, descriptor)
            while True:
                answer = self._next()
                if "progress" not in answer.body:
                    return answer
                if progress is not None:
                    progress(*answer.body["progress"])

    # ---- how

    def _device(self, described: dict[str, Any]) -> RemoteDevice:
        return RemoteDevice(self, DeviceDescription(**described))

    def _next(self) -> Message:
        answer = receive(self._connection)
        if answer is None:
            raise ConnectionResetError
        if "error" in answer.body:
            raise error_from(answer.body["error"])
        return answer

    @contextmanager
    def _named_loss(self) -> Iterator[None]:
        try:
            yield
        except BlocksnapError:
            raise
        except BaseException as error:
            # After an interruption half an answer may be on its way.
            self._connection.close()
            if not isinstance(error, ConnectionError):
                raise
            raise DeviceIOError(
                f"the server of pool {self.path} (process {self.server_pid}) has ended:"
                f" see {_log_path(self.path)}"
            ) from None


def _name(device: RemoteDevice | str) -> str:
    return device if isinstance(device, str) else device.name


def _log_path(directory: Path) -> Path:
    return directory / "server.log"


@contextmanager
def _regular_file(output: int) -> Iterator[int]:
    """Give a regular file, whose content ends up in output: the server must not wait for a pipe's reader."""
    if stat.S_ISREG(os.fstat(output).st_mode):
        yield output
        return
    with tempfile.TemporaryFile() as file:
        yield file.fileno()
        file.seek(0)
        with os.fdopen(os.dup(output), "wb") as target:
            shutil.copyfileobj(file, target, PAYLOAD_BYTES)


def connect(path: PathArgument, *, engine: str | None = None) -> PoolClient | None:
    """Connect to the server of the pool in a directory; None when there is none.

    Raises BusyError for a server that runs the pool with another engine than the one named.
    """
    client = _connect(Path(os.path.abspath(path)))
    if client is not None and engine not in (None, client.engine):
        with client:
            raise BusyError(
                f"pool {client.path} is served by process {client.server_pid} with the engine"
                f' "{client.engine}", not "{engine}": unmount what it has mounted, or use its engine'
            )
    return client


def server_of(path: PathArgument) -> ServerProcess | None:
    """Return the process that listens for a pool in a directory, None when there is none. It is not asked."""
    try:
        with _connection(Path(os.path.abspath(path))) as connection:
            return ServerProcess.of(connection)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return None


def _connect(directory: Path) -> PoolClient | None:
    try:
        connection = _connection(directory)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return None
    try:
        return PoolClient(directory, connection)
    except (ConnectionError, BrokenPipeError):  # it is about to end
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise


def _connection(directory: Path) -> socket.socket:
    with system_errors(str(directory / "socket")):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket_address(directory) as address:
            connection.connect(address)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        connection.close()
        raise
    except OSError:
        connection.close()
        with system_errors(str(directory / "socket")):
            raise
    return connection


def serve(path: PathArgument, *, engine: str | None = None) -> PoolClient:
    """Connect to the server of the pool in a directory; start one that stays until nobody needs it.

    A new one runs the pool with the engine that is named, "user" by default. Raises what `connect` raises and
    what opening the pool raises: BusyError when another process has it open.
    """
    directory = Path(os.path.abspath(path))
    if engine is not None:
        engine_named(engine)
    PoolFiles.locate(directory).require()
    deadline = time.monotonic() + _START_SECONDS
    while True:
        client = connect(directory, engine=engine)
        if client is not None:
            return client
        try:
            return _start(directory, engine or DEFAULT_ENGINE)
        except (BusyError, ConnectionError) as error:
            # Somebody else was faster, or a server is about to end.
            is_served = (directory / "socket").exists()
            if time.monotonic() > deadline or (isinstance(error, BusyError) and not is_served):
                raise
            time.sleep(_RETRY_SECONDS)


def _start(directory: Path, engine: str) -> PoolClient:
    with system_errors(str(directory)):
        ours, theirs = socket.socketpair()
    try:
        with theirs, system_errors(str(directory)), _open_log(_log_path(directory)) as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "blocksnap.pool_server"),
                    *(str(directory), str(theirs.fileno()), engine),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
            )
        # It outlives this process or not; a thread that waits leaves no zombie.
        threading.Thread(target=process.wait, daemon=True).start()
        return PoolClient(directory, ours)
    except ConnectionError:
        ours.close()
        raise BlocksnapError(
            f"the server of pool {directory} ended while it started: see {_log_path(directory)}"
        ) from None
    except BaseException:
        ours.close()
        raise


def _open_log(path: Path) -> Any:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if os.fstat(descriptor).st_size > _MAX_LOG:
        os.ftruncate(descriptor, 0)
    return os.fdopen(descriptor, "ab")
