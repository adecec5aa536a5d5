"""The process that serves a pool: `python -m blocksnap.pool_server PATH DESCRIPTOR ENGINE`.

It holds the pool open, shows and mounts its devices and answers on the socket in the pool's directory, for as
long as somebody is connected or something is mounted. pool_client starts it; DESCRIPTOR is the first
connection, that of the process which did so: the greeting goes there, or the error that prevents one.
"""

import errno
import logging
import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from .device_mounts import DeviceMounts
from .errors import ArgumentError, BlocksnapError, BusyError, PrivilegeError, system_errors
from .pool import Pool
from .pool_protocol import VERSION, Message, describe_error, peer, receive, send, socket_address
from .pool_service import VERBS, Answer, PoolService

__all__ = ["PoolServer", "main"]

_LOCK_SECONDS = 2.0
_LOCK_RETRY_SECONDS = 0.05
_FAREWELL_SECONDS = 30.0
_RETRY_MILLISECONDS = 500
_WITH_PAYLOAD = frozenset(("write",))
_WITH_OUTPUT = frozenset(("write_delta", "dump"))
_WITH_PROGRESS = frozenset(("extend",))

_log = logging.getLogger("blocksnap.pool_server")


class PoolServer:
    """One served pool; `run` returns when nobody needs it any more."""

    def __init__(self, directory: Path, pool: Pool) -> None:
        """Take over an open pool, which is closed at the end."""
        self._directory = directory
        self._pool = pool
        self._mounts = DeviceMounts(pool, directory / "export")
        self._service = PoolService(pool, self._mounts)
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._leaving: set[socket.socket] = set()
        self._ending = False
        self._terminated = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        # What the loop needs it has from the start: connections may take every other descriptor.
        self._mount_table = open("/proc/self/mountinfo", "rb")  # noqa: SIM115
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._listener = self._listen()

    def run(self, first: socket.socket) -> None:
        """Serve until the last connection and the last mount are gone, or until SIGTERM.

        To be called in the main thread, which alone gets signals.
        """
        # The kernel may hand a signal to another thread, which does not interrupt a poll of this one.
        signal.set_wakeup_fd(self._wake_write.fileno())
        signal.signal(signal.SIGTERM, self._terminate)
        self._welcome(first)
        try:
            while not self._is_over():
                self._wait()
        finally:
            self._end()

    def _terminate(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler
        self._terminated = True

    # ---- the loop

    def _listen(self) -> socket.socket:
        """Open the socket; one that lies there is a dead server's, since the pool's lock is ours."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        (self._directory / "socket").unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            with socket_address(self._directory) as address:
                listener.bind(address)
        finally:
            os.umask(mask)
        listener.listen(64)
        listener.setblocking(False)
        return listener

    def _wait(self) -> None:
        """Wait for a connection, a wake-up, or, while nobody is connected, a change of the mounts."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        patience = None
        if not self._connections:
            poll.register(self._mount_table, select.POLLPRI)
            if not self._mounts.forget_ended():
                patience = _RETRY_MILLISECONDS
            if self._is_over():
                return
        ready = dict(poll.poll(patience))
        with suppress(BlockingIOError):
            while self._wake_read.recv(4096):
                pass
        if self._listener.fileno() in ready:
            self._accept()

    def _is_over(self) -> bool:
        with self._lock:
            if self._terminated or not (self._connections or self._mounts.mounts()):
                self._ending = True
            return self._ending

    def _wake(self) -> None:
        with suppress(BlockingIOError, OSError):
            self._wake_write.send(b"w")

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as lack:
            if lack.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return  # else it has gone away meanwhile
        _, user = peer(connection)
        if user in (0, os.geteuid()):
            self._welcome(connection)
            return
        error = PrivilegeError(
            f"pool {self._directory} is served for user {os.geteuid()}, not {user}: run as that user"
        )
        with connection, suppress(OSError):
            send(connection, {"error": describe_error(error)})

    def _turn_away(self) -> None:
        """Tell the next client that there is no descriptor for it; it gets the spare one for that long."""
        error = BusyError(
            f"the server of pool {self._directory} (process {os.getpid()}) has no descriptor left:"
            " close other connections, or raise its limit (ulimit -n)"
        )
        self._give_up_spare()
        with suppress(OSError):
            connection, _ = self._listener.accept()
            with connection:
                send(connection, {"error": describe_error(error)})
        try:
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # another thread was faster: the next client waits for a descriptor
            threading.Event().wait(_LOCK_RETRY_SECONDS)

    def _give_up_spare(self) -> None:
        spare, self._spare = self._spare, -1
        if spare >= 0:
            os.close(spare)

    def _welcome(self, connection: socket.socket) -> None:
        thread = threading.Thread(target=self._converse, args=(connection,), daemon=True)
        with self._lock:
            if self._ending:
                connection.close()
                return
            self._connections[connection] = thread
        thread.start()

    # ---- one connection

    def _converse(self, connection: socket.socket) -> None:
        try:
            with suppress(OSError, BlocksnapError):
                greeting = {"pid": os.getpid(), "version": VERSION, "engine": self._pool.engine}
                send(connection, {"result": greeting})
                while (message := receive(connection)) is not None:
                    try:
                        self._answer(connection, message)
                    finally:
                        message.close()
        finally:
            self._part(connection)

    def _answer(self, connection: socket.socket, message: Message) -> None:
        try:
            verb = message.body.get("verb")
            if verb == "leave":
                result: Any = self._leave(connection)
            else:
                result = self._perform(verb, message, connection)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is the client's to hear
            if not isinstance(error, BlocksnapError):
                _log.exception("verb %r", message.body.get("verb"))
            send(connection, {"error": describe_error(error)})
            return
        answer = result if isinstance(result, Answer) else Answer(result)
        send(connection, {"result": answer.result}, answer.payload)

    def _perform(self, verb: Any, message: Message, connection: socket.socket) -> Any:
        arguments = message.body.get("arguments")
        if not isinstance(verb, str) or verb not in VERBS or not isinstance(arguments, dict):
            raise ArgumentError(f'the server of pool {self._directory} knows no "{verb}"')
        if verb in _WITH_PAYLOAD:
            arguments["payload"] = message.payload
        if verb in _WITH_OUTPUT:
            arguments["output"] = message.descriptor
        if verb in _WITH_PROGRESS:
            arguments["progress"] = lambda done, total: send(connection, {"progress": [done, total]})
        return getattr(self._service, verb)(**arguments)

    def _leave(self, connection: socket.socket) -> bool:
        """Say whether the server ends when this client goes."""
        with self._lock:
            self._leaving.add(connection)
            if self._leaving == self._connections.keys() and not self._mounts.mounts():
                self._ending = True
        self._wake()
        return self._ending

    def _part(self, connection: socket.socket) -> None:
        # Not closed while the server ends: the connection's end tells the client that everything is done.
        with self._lock:
            if not self._ending:
                del self._connections[connection]
                self._leaving.discard(connection)
                connection.close()
        self._wake()

    # ---- the end

    def _end(self) -> None:
        (self._directory / "socket").unlink(missing_ok=True)
        self._listener.close()
        self._mount_table.close()
        self._give_up_spare()
        for connection, thread in list(self._connections.items()):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
            thread.join(_FAREWELL_SECONDS)
        self._mounts.close()
        try:
            self._pool.close()
        except BusyError as error:  # what the kernel runs and somebody uses goes on there
            _log.info("left to the kernel: %s", error)
            with suppress(BlocksnapError):
                self._pool.commit()
            self._pool.abandon()
        _log.info("done with %s", self._directory)
        _let_go_of_log()
        for connection in self._connections:
            connection.close()


def _let_go_of_log() -> None:
    """Close the log, which keeps the pool's file system busy."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)


def _open_pool(directory: Path, engine: str) -> Pool:
    """Open the pool; wait a little for a verb that has it open."""
    for _ in range(int(_LOCK_SECONDS / _LOCK_RETRY_SECONDS)):
        try:
            return Pool.open(directory, engine=engine, direct_io=True)
        except BusyError:
            if _is_served(directory):
                raise
            threading.Event().wait(_LOCK_RETRY_SECONDS)
    return Pool.open(directory, engine=engine, direct_io=True)


def _is_served(directory: Path) -> bool:
    with socket_address(directory) as address, socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(address) == 0


def _start(directory: Path, engine: str) -> PoolServer:
    pool = _open_pool(directory, engine)
    try:
        with system_errors(str(directory)):
            return PoolServer(directory, pool)
    except BaseException:
        pool.close()
        raise


def main(arguments: list[str]) -> int:
    """Serve the pool in a directory to the process at the other end of a descriptor, then to everybody."""
    directory, first, engine = Path(arguments[0]), socket.socket(fileno=int(arguments[1])), arguments[2]
    logging.basicConfig(format="%(asctime)s %(process)d %(message)s", level=logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        server = _start(directory, engine)
    except Exception as error:  # noqa: BLE001 - the process that started this one raises it
        if not isinstance(error, BlocksnapError):
            _log.exception("opening %s", directory)
        with suppress(OSError):
            send(first, {"error": describe_error(error)})
        return 1
    _log.info("serving %s", directory)
    server.run(first)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
