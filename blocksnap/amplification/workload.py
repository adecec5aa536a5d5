"""A workload: what an application does in a container, and the base image that it finds there.

A workload is a frozen description and runs unchanged on every driver. `stage` makes once what all drivers
get alike, `prepare` writes one layer of the base image, `run` executes it in processes of its own and returns
what the application did. Seeds are fixed: two runs issue the same writes. Each epoch, the time between two
snapshots, adds its number to the seed.
"""

import os
import sqlite3
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple, Self

from . import operations
from .base_image import BaseImage
from .child_process import WorkloadError, run_script
from .latency import Samples

__all__ = ["SEED", "Check", "CommandWorkload", "Counted", "OperationWorkload", "Outcome", "Workload"]

SEED = 20_190_521
_MIB = 1 << 20
_LEAST_FILE = 64 << 10

Check = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the application did, as the processes that ran it saw it. None: cannot be told."""

    seconds: float
    application_bytes: int | None
    samples: Samples | None

    @property
    def operations(self) -> int | None:
        return None if self.samples is None else self.samples.operations


class Counted(NamedTuple):
    """Where a workload's application bytes come from, and what is inside and outside of them."""

    source: str
    inside: str
    outside: str


@dataclass(frozen=True, slots=True)
class Workload(ABC):
    """A workload and its parameters; `command` is empty for the built-in ones."""

    name: str
    summary: str
    parameters: Mapping[str, int | str] = field(default_factory=dict)
    base: BaseImage = field(default_factory=BaseImage)
    command: tuple[str, ...] = ()

    ROOM: ClassVar[int] = 256 * _MIB
    """Bytes that one epoch may add to the image."""
    COUNTED: ClassVar[Counted] = Counted(
        "what the workload's process and its children handed to write calls (wchar of /proc/self/io)",
        "a database's journal; copy_file_range, on overlay twice",
        "its start-up; stores into mapped files (the -shm index of SQLite's WAL mode), names, truncation, "
        "sendfile",
    )

    @property
    def changed_bytes(self) -> int | None:
        """Bytes of the image that one epoch makes different or new, where the workload knows; else None."""
        return None

    def problem(self) -> str | None:
        """Return why these parameters cannot be, None when they can."""
        return None

    def missing(self) -> str | None:
        """Return what this machine lacks and how to get it, None when the workload can run."""
        return None

    def versions(self) -> dict[str, str]:
        """Return the versions of the programs that do the work."""
        return {}

    def stage(self, directory: Path, *, check: Check = lambda: None) -> Self:  # noqa: ARG002
        """Make, in an empty directory that outlives the runs, what every driver gets alike."""
        return self

    def prepare(self, root: Path, layer: int) -> None:
        """Write one layer of the base image (0 is the lowest) below root."""
        self.base.prepare(root, layer)

    @abstractmethod
    def run(self, root: Path, *, epoch: int = 0, check: Check = lambda: None) -> Outcome:
        """Run on the container mounted at root.

        `check` is called ten times a second and may raise, which ends the processes. Raises WorkloadError
        when the application fails.
        """

    def with_parameter(self, name: str, value: int | str) -> Self:
        return replace(self, parameters={**self.parameters, name: value})

    def number(self, name: str) -> int:
        """Return a parameter that is a number."""
        return int(self.parameters[name])

    def describe(self) -> dict[str, object]:
        """Return the object "workload" of the JSON result."""
        return {
            "name": self.name,
            "summary": self.summary,
            "parameters": dict(self.parameters),
            "command": list(self.command) or None,
            "versions": self.versions(),
            "counted": self.COUNTED._asdict(),
            "base_image": {
                "layers": BaseImage.LAYERS,
                "database_bytes": self.base.database_bytes,
                "large_file_bytes": self.base.large_file_bytes,
                "small_files": self.base.small_files,
                "small_file_bytes": self.base.small_file_bytes,
                "tree_bytes": self.base.tree_bytes,
            },
        }


@dataclass(frozen=True, slots=True)
class OperationWorkload(Workload):
    """A workload of operations.py; its parameters are those of the function there."""

    operation: str = ""
    material: Mapping[str, Any] = field(default_factory=dict)
    """What staging adds to the parameters."""

    @property
    def changed_bytes(self) -> int | None:
        count = _CHANGED_BYTES.get(self.operation)
        return None if count is None else count(self)

    def problem(self) -> str | None:
        if self.operation != "package" and self._file_bytes < _LEAST_FILE:
            return "its file must have at least 64K"
        if self.operation == "touch_byte" and self.number("offset") >= self.base.large_file_bytes:
            return "offset lies behind the end of the file"
        if not set(str(self.parameters.get("journal", "wal")).split("+")) <= {"rollback", "wal"}:
            return 'journal is "rollback", "wal" or "rollback+wal"'
        if self.operation == "scatter":
            room = self._file_bytes // self.number("write_bytes")
            return None if self.number("writes") <= room else f"the file has room for {room} writes"
        return None

    def versions(self) -> dict[str, str]:
        return {"sqlite": sqlite3.sqlite_version} if self.operation in ("sqlite", "bulk_load") else {}

    @property
    def _file_bytes(self) -> int:
        return self.base.large_file_bytes or self.base.database_bytes

    def run(self, root: Path, *, epoch: int = 0, check: Check = lambda: None) -> Outcome:
        parameters = {**self.parameters, **self.material, "epoch": epoch}
        request = {"operation": self.operation, "root": str(root), "parameters": parameters}
        return _outcome(self.name, run_script(operations.__file__, request, check))


@dataclass(frozen=True, slots=True)
class CommandWorkload(Workload):
    """A command of the user, run on the host; "{root}" in its words is the mounted container."""

    ROOM: ClassVar[int] = 1024 * _MIB
    COUNTED: ClassVar[Counted] = Counted(
        "what the command and its children handed to write calls (wchar of /proc/self/io), less what it "
        "printed",
        "writes to pipes and outside of the container; copy_file_range, on overlay twice",
        "stores into mapped files, names, truncation, sendfile",
    )

    def run(self, root: Path, *, epoch: int = 0, check: Check = lambda: None) -> Outcome:  # noqa: ARG002
        words = [word.replace("{root}", str(root)) for word in self.command]
        with tempfile.TemporaryFile() as output:  # it has no name: none is left if this process is killed
            place = f"/proc/{os.getpid()}/fd/{output.fileno()}"
            reply = run_script(operations.__file__, {"command": words, "output": place}, check)
            outcome = _outcome(self.name, reply)
            if reply["exit_status"] != 0:
                raise WorkloadError(self._exit_sentence(reply["exit_status"], output))
        return outcome

    def _exit_sentence(self, status: int, output: IO[bytes]) -> str:
        ending = f"signal {-status}" if status < 0 else f"status {status}"
        last = output.read().decode(errors="replace").strip().splitlines()[-1:]
        return f'command "{" ".join(self.command)}" ended with {ending}' + (f": {last[0]}" if last else "")


def _outcome(name: str, reply: Mapping[str, Any]) -> Outcome:
    if "error" in reply:
        raise WorkloadError(f"workload {name}: {reply['error']}")
    latencies = reply["latencies"]
    samples = None if latencies is None else Samples(tuple(latencies))
    return Outcome(reply["seconds"], reply["application_bytes"], samples)


def _patched_bytes(workload: Workload) -> int:
    write, stride = workload.number("write_bytes"), workload.number("stride")
    return len(range(0, workload.base.large_file_bytes - write + 1, stride)) * min(write, stride)


_CHANGED_BYTES: dict[str, Callable[[Workload], int]] = {
    "append": lambda w: w.number("records") * w.number("record_bytes"),
    "patch": _patched_bytes,
    "scatter": lambda w: w.number("writes") * w.number("write_bytes"),
    "touch_small": lambda w: w.base.small_files * w.number("append_bytes"),
    "touch_byte": lambda _: 1,
}
