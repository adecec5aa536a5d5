"""Workloads: what an application does in a container, and the base image that it finds there.

A workload is a frozen description. `prepare` writes one layer of its base image; `run` executes it in a
process of its own and returns what the application did. Sizes are parameters (`patch:stride=16K`), seeds are
fixed: two runs issue the same writes.
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import ArgumentError, BlocksnapError
from ..units import parse_size
from . import operations

__all__ = ["BUILT_IN", "BaseImage", "Outcome", "Workload", "WorkloadError", "from_command", "parse_workload"]

_SEED = 20_190_521
_BASE_SEED = 20_190_522  # another one, lest a workload writes what the image holds already
_MIB = 1 << 20
_LINGER_SECONDS = 2.0
_ROW_BYTES = 217  # 200 of payload, the rest of a row, its share of the page header and of the inner pages


class WorkloadError(BlocksnapError):
    """The workload itself failed: an operation raised, or the command of the user ended with a status."""


@dataclass(frozen=True, slots=True)
class BaseImage:
    """The two layers below the container: one large thing, above it a directory of many small files."""

    database_bytes: int = 64 * _MIB
    large_file_bytes: int = 0
    small_files: int = 4000
    small_file_bytes: int = 4096

    LAYERS = 2

    @property
    def total_bytes(self) -> int:
        return self.database_bytes + self.large_file_bytes + self.small_files * self.small_file_bytes

    def prepare(self, root: Path, layer: int) -> None:
        """Write layer 0 (database and large file) or layer 1 (small files) below root."""
        if layer == 0:
            if self.database_bytes:
                _write_database(root / operations.DATABASE, self.database_bytes)
            if self.large_file_bytes:
                _write_large_file(root / operations.LARGE_FILE, self.large_file_bytes)
        else:
            _write_small_files(root / operations.SMALL_FILES, self.small_files, self.small_file_bytes)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the application did, as the process that ran it saw it. None: cannot be told."""

    seconds: float
    application_bytes: int | None
    latencies: tuple[float, ...] | None

    @property
    def operations(self) -> int | None:
        return None if self.latencies is None else len(self.latencies)


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload and its parameters; `command` is empty for the built-in ones."""

    name: str
    summary: str
    parameters: Mapping[str, int | str] = field(default_factory=dict)
    base: BaseImage = field(default_factory=BaseImage)
    command: tuple[str, ...] = ()

    @property
    def changed_bytes(self) -> int | None:
        """Bytes of the image that end up different or new, where the workload knows; else None."""
        count = _CHANGED_BYTES.get(self.name)
        return None if count is None else count(self)

    def prepare(self, root: Path, layer: int) -> None:
        """Write one layer of the base image (0 is the lowest) below root."""
        self.base.prepare(root, layer)

    def run(self, root: Path, *, check: Callable[[], None] = lambda: None) -> Outcome:
        """Run in a process of its own on the container mounted at root.

        `check` is called ten times a second and may raise, which ends the process. Raises WorkloadError when
        an operation fails or the command ends with a status other than 0.
        """
        with tempfile.TemporaryDirectory(prefix="blocksnap-output-") as directory:
            output = Path(directory) / "output"
            reply = json.loads(_run_child(self._request(root, output), check))
            if "error" in reply:
                raise WorkloadError(f"workload {self.name}: {reply['error']}")
            if reply["exit_status"] != 0:
                raise WorkloadError(_exit_sentence(self.command, reply["exit_status"], output))
        latencies = reply["latencies"]
        return Outcome(
            seconds=reply["seconds"],
            application_bytes=reply["application_bytes"],
            latencies=None if latencies is None else tuple(latencies),
        )

    def _request(self, root: Path, output: Path) -> dict[str, object]:
        if self.command:
            words = [word.replace("{root}", str(root)) for word in self.command]
            return {"command": words, "output": str(output)}
        return {"operation": _operation(self.name), "root": str(root), "parameters": dict(self.parameters)}

    def describe(self) -> dict[str, object]:
        """Return the object "workload" of the JSON result."""
        return {
            "name": self.name,
            "summary": self.summary,
            "parameters": dict(self.parameters),
            "command": list(self.command) or None,
            "base_image": {
                "layers": BaseImage.LAYERS,
                "database_bytes": self.base.database_bytes,
                "large_file_bytes": self.base.large_file_bytes,
                "small_files": self.base.small_files,
                "small_file_bytes": self.base.small_file_bytes,
            },
        }


def _sqlite(name: str, journal: str, summary: str, transactions: int) -> Workload:
    parameters: dict[str, int | str] = {
        "journal": journal,
        "transactions": transactions,
        "rows": 1,
        "seed": _SEED,
    }
    return Workload(name, summary, parameters)


_LARGE_FILE = BaseImage(database_bytes=0, large_file_bytes=64 * _MIB)

BUILT_IN: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        _sqlite(
            "sqlite",
            "rollback+wal",
            "random rows of a SQLite database are updated, one row and one fsync'ed commit a transaction, "
            "first with a rollback journal, then with a write-ahead log",
            150,
        ),
        _sqlite(
            "sqlite-rollback",
            "rollback",
            "random rows of a SQLite database are updated, rollback journal",
            300,
        ),
        _sqlite("sqlite-wal", "wal", "random rows of a SQLite database are updated, write-ahead log", 300),
        Workload(
            "append",
            "records are appended to a log that is in the image",
            {"records": 2048, "record_bytes": 512, "sync_every": 16, "seed": _SEED},
            _LARGE_FILE,
        ),
        Workload(
            "patch",
            "an existing file is written to at regular distances, in order",
            {"stride": 64 << 10, "write_bytes": 4096, "sync_every": 32, "seed": _SEED},
            _LARGE_FILE,
        ),
        Workload(
            "touch-small",
            "a few bytes are appended to each of thousands of small files",
            {"append_bytes": 64, "seed": _SEED},
        ),
        Workload(
            "touch-byte",
            "one byte of a large file is changed and synced",
            {"offset": 32 * _MIB, "seed": _SEED},
            _LARGE_FILE,
        ),
    )
}

_BASE_PARAMETERS = ("database_bytes", "large_file_bytes", "small_files", "small_file_bytes")

_CHANGED_BYTES: dict[str, Callable[[Workload], int]] = {
    "append": lambda w: int(w.parameters["records"]) * int(w.parameters["record_bytes"]),
    "patch": lambda w: (
        len(
            range(
                0, w.base.large_file_bytes - int(w.parameters["write_bytes"]) + 1, int(w.parameters["stride"])
            )
        )
        * min(int(w.parameters["write_bytes"]), int(w.parameters["stride"]))
    ),
    "touch-small": lambda w: w.base.small_files * int(w.parameters["append_bytes"]),
    "touch-byte": lambda _: 1,
}


def from_command(command: tuple[str, ...]) -> Workload:
    """Return the workload of a user's command; "{root}" in its words is the mounted container."""
    base = replace(_LARGE_FILE, database_bytes=64 * _MIB)
    return Workload("command", "a command of the user, run on the host", {}, base, command)


def parse_workload(text: str) -> Workload:
    """Return a built-in workload from "NAME" or "NAME:parameter=value,..."; sizes may be written as "16K"."""
    name, _, rest = text.partition(":")
    workload = BUILT_IN.get(name)
    if workload is None:
        raise ArgumentError(f'no workload "{name}": the built-in ones are {", ".join(BUILT_IN)}')
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        workload = _with_parameter(workload, key, value)
    return _checked(workload)


def _with_parameter(workload: Workload, key: str, value: str) -> Workload:
    if key in _BASE_PARAMETERS:
        size = parse_size(value, f"{workload.name}: {key}")
        return replace(workload, base=replace(workload.base, **{key: size}))
    if key not in workload.parameters:
        known = ", ".join((*workload.parameters, *_BASE_PARAMETERS))
        raise ArgumentError(f'workload {workload.name} has no parameter "{key}": it has {known}')
    is_number = isinstance(workload.parameters[key], int)
    parsed = parse_size(value, f"{workload.name}: {key}") if is_number else value
    return replace(workload, parameters={**workload.parameters, key: parsed})


def _checked(workload: Workload) -> Workload:
    """Refuse what would divide by zero or touch nothing."""
    numbers = {**workload.parameters, "small_files": workload.base.small_files}
    for key, value in numbers.items():
        if isinstance(value, int) and value < 1 and key not in ("offset", "seed", "small_files"):
            raise ArgumentError(f"workload {workload.name}: {key} must be at least 1")
    needs = workload.base.large_file_bytes or workload.base.database_bytes
    if needs < 64 << 10:
        raise ArgumentError(f"workload {workload.name}: its file must have at least 64K")
    if workload.name == "touch-byte" and int(workload.parameters["offset"]) >= workload.base.large_file_bytes:
        raise ArgumentError("workload touch-byte: offset lies behind the end of the file")
    if not set(str(workload.parameters.get("journal", "wal")).split("+")) <= {"rollback", "wal"}:
        raise ArgumentError(f'workload {workload.name}: journal is "rollback", "wal" or "rollback+wal"')
    return workload


def _operation(name: str) -> str:
    return "sqlite" if name.startswith("sqlite") else name


def _run_child(request: dict[str, object], check: Callable[[], None]) -> str:
    """Run operations.py with a request and return its reply; nothing of its session outlives the call."""
    command = [sys.executable, "-I", operations.__file__, json.dumps(request)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        reply, complaint = _communicate(child, check)
    finally:
        _end_session(child)
    if child.returncode != 0 or not reply:
        last = complaint.strip().splitlines()[-1:] or [f"status {child.returncode}"]
        raise WorkloadError(f"the process of the workload failed: {last[0]}")
    return reply


def _communicate(child: subprocess.Popen[str], check: Callable[[], None]) -> tuple[str, str]:
    while True:
        check()
        try:
            return child.communicate(timeout=0.1)
        except subprocess.TimeoutExpired:
            continue


def _end_session(child: subprocess.Popen[str]) -> None:
    """Kill what is left of the child's session: a process that lingers would keep the container mounted."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        deadline = time.monotonic() + _LINGER_SECONDS
        while time.monotonic() < deadline:
            os.killpg(child.pid, 0)
            time.sleep(0.01)
    child.wait()


def _exit_sentence(command: tuple[str, ...], status: int, output: Path) -> str:
    ending = f"signal {-status}" if status < 0 else f"status {status}"
    last = output.read_text(errors="replace").strip().splitlines()[-1:]
    return f'command "{" ".join(command)}" ended with {ending}' + (f": {last[0]}" if last else "")


def _write_database(path: Path, size: int) -> None:
    """Write a SQLite database of about `size` bytes (within 2 %), in rollback-journal mode."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA synchronous = OFF")
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("CREATE TABLE record (id INTEGER PRIMARY KEY, payload BLOB NOT NULL)")
    database.execute("BEGIN")
    database.executemany("INSERT INTO record (payload) VALUES (?)", _payloads(size // _ROW_BYTES))
    database.execute("COMMIT")
    database.execute("PRAGMA journal_mode = DELETE")
    database.close()


def _payloads(rows: int) -> Iterator[tuple[bytes]]:
    source = random.Random(_BASE_SEED)
    return ((source.randbytes(200),) for _ in range(rows))


def _write_large_file(path: Path, size: int) -> None:
    source = random.Random(_BASE_SEED)
    with path.open("wb") as file:
        for begin in range(0, size, _MIB):
            file.write(source.randbytes(min(_MIB, size - begin)))


def _write_small_files(directory: Path, count: int, size: int) -> None:
    source = random.Random(_BASE_SEED)
    for number in range(count):
        parent = directory / f"{number // 100:03}"
        parent.mkdir(parents=True, exist_ok=True)
        (parent / f"{number:06}").write_bytes(source.randbytes(size))
