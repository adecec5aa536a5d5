"""What the server of a pool and its clients say to each other.

A message is a header (the lengths of what follows, network byte order), a JSON object and a payload of
bytes. A request is {"verb", "arguments"}, the answer {"result"} or {"error": {"kind", "message", "errno"}},
before it any number of {"progress": [done, total]}. The payload carries arrays and what is read or written. A
request may carry a file descriptor, to which the server writes text. On a new connection the server speaks
first: {"result": {"pid", "version", "engine"}}.
"""

import array
import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import errors
from .errors import BlocksnapError, DeviceIOError, error_for

__all__ = [
    "PAYLOAD_BYTES",
    "VERSION",
    "Message",
    "describe_error",
    "error_from",
    "peer",
    "receive",
    "send",
    "socket_address",
]

VERSION = 2
PAYLOAD_BYTES = 4 << 20
"""The most that one request reads from or writes to a device."""

_HEADER = struct.Struct("!IQ")
_MAX_JSON = 64 << 20
_MAX_PAYLOAD = 8 << 30
_SOCKET = "socket"


@dataclass(frozen=True, slots=True)
class Message:
    """A received message; descriptor is -1 without one, else the receiver's to close."""

    body: dict[str, Any]
    payload: bytearray
    descriptor: int = -1

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


@contextmanager
def socket_address(directory: Path, name: str = _SOCKET) -> Iterator[str]:
    """Give an address for a socket in a directory, however long its path is (sun_path takes 107 bytes)."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def peer(connection: socket.socket) -> tuple[int, int]:
    """Return the process and user ids of the other end when it connected, or began to listen."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, user, _ = struct.unpack("3i", found)
    return pid, user


def send(
    connection: socket.socket, body: dict[str, Any], payload: Any = b"", descriptor: int | None = None
) -> None:
    """Send a message; the payload is anything with the buffer protocol."""
    view = memoryview(payload).cast("B")
    text = json.dumps(body).encode()
    first = _HEADER.pack(len(text), len(view)) + text
    ancillary = (
        [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    )
    sent = connection.sendmsg([first], ancillary)
    for rest in (memoryview(first)[sent:], view):
        # Sending nothing fails too, once the other end has answered and gone.
        if len(rest):
            connection.sendall(rest)


def receive(connection: socket.socket) -> Message | None:
    """Receive a message, None at the end of the connection."""
    header = bytearray(_HEADER.size)
    count, descriptor = _receive_first(connection, header)
    if count == 0:
        return None
    try:
        _fill(connection, memoryview(header)[count:])
        text_bytes, payload_bytes = _HEADER.unpack(header)
        if text_bytes > _MAX_JSON or payload_bytes > _MAX_PAYLOAD:
            raise _foreign()
        text, payload = bytearray(text_bytes), bytearray(payload_bytes)
        _fill(connection, memoryview(text))
        _fill(connection, memoryview(payload))
        return Message(_parsed(text), payload, descriptor)
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        raise


def _parsed(text: bytearray) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _foreign() from error
    if not isinstance(body, dict):
        raise _foreign()
    return body


def _foreign() -> DeviceIOError:
    return DeviceIOError("the other end of the pool's socket does not speak this protocol")


def _receive_first(connection: socket.socket, header: bytearray) -> tuple[int, int]:
    """Receive the beginning of a message and the descriptor that travels with it."""
    found = array.array("i")
    try:
        count, ancillary, _, _ = connection.recvmsg_into(
            [header], socket.CMSG_LEN(found.itemsize), socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionResetError:
        return 0, -1
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return count, found[0] if found else -1


def _fill(connection: socket.socket, view: memoryview) -> None:
    while len(view):
        count = connection.recv_into(view)
        if count == 0:
            raise ConnectionResetError("the connection ended inside a message")
        view = view[count:]


def describe_error(error: BaseException) -> dict[str, Any]:
    """Return an exception as the `error` of an answer."""
    if isinstance(error, BlocksnapError):
        code = error.errno if isinstance(error, OSError) else None
        return {"kind": type(error).__name__, "message": error.message, "errno": code}
    if isinstance(error, OSError) and error.errno is not None:
        return describe_error(error_for(-error.errno, str(error.strerror)))
    return {"kind": "BlocksnapError", "message": f"{type(error).__name__}: {error}", "errno": None}


def error_from(described: dict[str, Any]) -> BlocksnapError:
    """Return the exception that `describe_error` described."""
    kind = getattr(errors, str(described["kind"]), BlocksnapError)
    message, code = str(described["message"]), described["errno"]
    if kind is DeviceIOError:
        return DeviceIOError(message, code)
    return (
        kind(message)
        if isinstance(kind, type) and issubclass(kind, BlocksnapError)
        else BlocksnapError(message)
    )
