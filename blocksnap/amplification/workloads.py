"""The built-in workloads, and how a name with parameters ("patch:stride=16K") becomes one."""

from dataclasses import replace
from typing import Any

from ..errors import ArgumentError, NotSupportedError
from ..units import parse_size
from .base_image import BaseImage
from .fio import FioWorkload
from .packages import PackageWorkload, UntarWorkload
from .postgres import CopyWorkload, PgbenchWorkload
from .workload import SEED, CommandWorkload, OperationWorkload, Workload

__all__ = ["BUILT_IN", "from_command", "parse_workload"]

_MIB = 1 << 20
_LARGE_FILE = BaseImage(database_bytes=0, large_file_bytes=64 * _MIB)
_TREE = BaseImage(database_bytes=0)


def _sqlite(name: str, journal: str, summary: str, transactions: int) -> Workload:
    parameters: dict[str, int | str] = {
        "journal": journal,
        "transactions": transactions,
        "rows": 1,
        "seed": SEED,
    }
    return OperationWorkload(name, summary, parameters, operation="sqlite")


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
        PgbenchWorkload(
            "pgbench",
            "pgbench's TPC-B-like transactions on a PostgreSQL cluster that is in the image: server started, "
            "transactions, clean shutdown",
            {"clients": 2, "transactions": 500, "scale": 4, "seed": SEED, "version": ""},
            _TREE,
        ),
        CopyWorkload(
            "postgres-load",
            "rows are loaded by COPY into a new table of a PostgreSQL cluster that is in the image",
            {"rows": 100_000, "batch": 5000, "scale": 4, "seed": SEED, "version": ""},
            _TREE,
        ),
        OperationWorkload(
            "bulk-load",
            "rows are loaded into a new indexed table of a SQLite database that is in the image",
            {"rows": 50_000, "batch": 1000, "seed": SEED},
            operation="bulk_load",
        ),
        FioWorkload("fio", "a job file of fio, its files laid out in the image", {"job": ""}, _TREE),
        UntarWorkload(
            "untar",
            "a tar of many small files is unpacked into a new directory",
            {"files": 1500},
            operation="untar",
        ),
        PackageWorkload(
            "package",
            "packages of many small files are upgraded by dpkg, which syncs each file",
            {"files": 800, "packages": 8},
            _TREE,
            operation="package",
        ),
        OperationWorkload(
            "append",
            "records are appended to a log that is in the image",
            {"records": 2048, "record_bytes": 512, "sync_every": 16, "seed": SEED},
            _LARGE_FILE,
            operation="append",
        ),
        OperationWorkload(
            "patch",
            "an existing file is written to at regular distances, in order",
            {"stride": 64 << 10, "write_bytes": 4096, "sync_every": 32, "seed": SEED},
            _LARGE_FILE,
            operation="patch",
        ),
        OperationWorkload(
            "scatter",
            "an existing file is written to at random places, none twice",
            {"writes": 1024, "write_bytes": 4096, "sync_every": 64, "seed": SEED},
            _LARGE_FILE,
            operation="scatter",
        ),
        OperationWorkload(
            "touch-small",
            "a few bytes are appended to each of thousands of small files",
            {"append_bytes": 64, "seed": SEED},
            operation="touch_small",
        ),
        OperationWorkload(
            "touch-byte",
            "one byte of a large file is changed and synced",
            {"offset": 32 * _MIB, "seed": SEED},
            _LARGE_FILE,
            operation="touch_byte",
        ),
    )
}

_BASE_PARAMETERS = ("database_bytes", "large_file_bytes", "small_files", "small_file_bytes")


def from_command(command: tuple[str, ...]) -> Workload:
    """Return the workload of a user's command; "{root}" in its words is the mounted container."""
    base = replace(_LARGE_FILE, database_bytes=64 * _MIB)
    return CommandWorkload("command", "a command of the user, run on the host", {}, base, command)


def parse_workload(text: str) -> Workload:
    """Return a built-in workload from "NAME" or "NAME:parameter=value,..."; sizes may be written as "16K".

    Raises ArgumentError for parameters that cannot be, NotSupportedError when its programs are not installed.
    """
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
        base: dict[str, Any] = {key: size}
        return replace(workload, base=replace(workload.base, **base))
    if key not in workload.parameters:
        known = ", ".join((*workload.parameters, *_BASE_PARAMETERS))
        raise ArgumentError(f'workload {workload.name} has no parameter "{key}": it has {known}')
    is_number = isinstance(workload.parameters[key], int)
    return workload.with_parameter(key, parse_size(value, f"{workload.name}: {key}") if is_number else value)


def _checked(workload: Workload) -> Workload:
    """Refuse what would divide by zero or touch nothing, and what this machine has no programs for."""
    numbers = {**workload.parameters, "small_files": workload.base.small_files}
    for key, value in numbers.items():
        if isinstance(value, int) and value < 1 and key not in ("offset", "seed", "small_files"):
            raise ArgumentError(f"workload {workload.name}: {key} must be at least 1")
    if (lacks := workload.missing()) is not None:
        raise NotSupportedError(f"workload {workload.name} cannot run here: {lacks}")
    if (reason := workload.problem()) is not None:
        raise ArgumentError(f"workload {workload.name}: {reason}")
    return workload
