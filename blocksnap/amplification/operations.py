"""The operations of the built-in workloads, run by a process of their own.

This file is run as a script (`python -I operations.py REQUEST`, one JSON object) and imports the standard
library alone, so that the process does nothing but the workload: its write bytes are then the kernel's count,
`wchar` of /proc/self/io, which includes children that were waited for. Outside of that count are stores into
a mapped file (the -shm index of SQLite's WAL mode), fallocate, truncate and names; what a process writes into
pipes is inside.

Each workload is a generator that yields after every operation; the time between two yields is its latency.
Opening the file belongs to the first operation: that is where overlayfs copies it up.
"""

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

DATABASE = "database.sqlite"
LARGE_FILE = "large-file"
SMALL_FILES = "small-files"


def sqlite(root: str, *, journal: str, transactions: int, rows: int, seed: int) -> Iterator[None]:
    """Update seeded random rows, synchronous=FULL; `transactions` in each journal mode of "rollback+wal"."""
    source = random.Random(seed)
    for mode in journal.split("+"):
        database = sqlite3.connect(os.path.join(root, DATABASE), isolation_level=None)
        database.execute("PRAGMA synchronous = FULL")
        database.execute(f"PRAGMA journal_mode = {'DELETE' if mode == 'rollback' else 'WAL'}")
        (count,) = database.execute("SELECT max(id) FROM record").fetchone()
        for _ in range(transactions):
            changes = [(source.randbytes(200), source.randint(1, count)) for _ in range(rows)]
            database.execute("BEGIN IMMEDIATE")
            database.executemany("UPDATE record SET payload = ? WHERE id = ?", changes)
            database.execute("COMMIT")
            yield
        database.close()


def append(root: str, *, records: int, record_bytes: int, sync_every: int, seed: int) -> Iterator[None]:
    """Append records to an existing log, fsync after each `sync_every`."""
    record = random.Random(seed).randbytes(record_bytes)
    log = os.open(os.path.join(root, LARGE_FILE), os.O_WRONLY | os.O_APPEND)
    for number in range(1, records + 1):
        os.write(log, record)
        if number % sync_every == 0 or number == records:
            os.fsync(log)
        yield
    os.close(log)


def patch(root: str, *, stride: int, write_bytes: int, sync_every: int, seed: int) -> Iterator[None]:
    """Write `write_bytes` at every `stride` bytes of an existing file, in order, fsync after each
    `sync_every`.
    """
    piece = random.Random(seed).randbytes(write_bytes)
    file = os.open(os.path.join(root, LARGE_FILE), os.O_WRONLY)
    offsets = range(0, os.fstat(file).st_size - write_bytes + 1, stride)
    for number, offset in enumerate(offsets, 1):
        os.pwrite(file, piece, offset)
        if number % sync_every == 0 or number == len(offsets):
            os.fsync(file)
        yield
    os.close(file)


def touch_small(root: str, *, append_bytes: int, seed: int) -> Iterator[None]:
    """Append to each of thousands of small files; nothing is synced before the end of the run."""
    piece = random.Random(seed).randbytes(append_bytes)
    for directory, directories, names in os.walk(os.path.join(root, SMALL_FILES)):
        directories.sort()
        for name in sorted(names):
            with open(os.path.join(directory, name), "ab", buffering=0) as file:
                file.write(piece)
            yield


def touch_byte(root: str, *, offset: int, seed: int) -> Iterator[None]:
    """Change one byte in the middle of an existing file and fsync it."""
    file = os.open(os.path.join(root, LARGE_FILE), os.O_RDWR)
    before = os.pread(file, 1, offset)
    os.pwrite(file, bytes([before[0] ^ (1 + random.Random(seed).randrange(255))]), offset)
    os.fsync(file)
    os.close(file)
    yield


WORKLOADS: dict[str, Callable[..., Iterator[None]]] = {
    "sqlite": sqlite,
    "append": append,
    "patch": patch,
    "touch-small": touch_small,
    "touch-byte": touch_byte,
}


def written_bytes() -> int | None:
    """Return what this process and its waited-for children handed to write calls so far; None without
    /proc/self/io.
    """
    try:
        with open("/proc/self/io", encoding="ascii") as counters:
            return int(dict(line.split(": ") for line in counters)["wchar"])
    except (OSError, KeyError, ValueError):
        return None


def run_operations(request: dict[str, object]) -> dict[str, object]:
    """Run a built-in workload: every operation with its latency in seconds."""
    workload = WORKLOADS[str(request["operation"])]
    parameters = request["parameters"]
    assert isinstance(parameters, dict)
    latencies = []
    before, start = written_bytes(), time.perf_counter()
    last = start
    for _ in workload(str(request["root"]), **parameters):
        now = time.perf_counter()
        latencies.append(now - last)
        last = now
    return {
        "exit_status": 0,
        "seconds": time.perf_counter() - start,
        "application_bytes": _difference(before, written_bytes()),
        "latencies": latencies,
    }


def run_command(request: dict[str, object]) -> dict[str, object]:
    """Run a command of the user; what it prints goes to a file and is taken off its write bytes."""
    command = request["command"]
    assert isinstance(command, list)
    with open(str(request["output"]), "wb") as output:
        before, start = written_bytes(), time.perf_counter()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False)
        seconds = time.perf_counter() - start
        written = _difference(before, written_bytes())
        printed = os.fstat(output.fileno()).st_size
    return {
        "exit_status": done.returncode,
        "seconds": seconds,
        "application_bytes": None if written is None else max(0, written - printed),
        "latencies": None,
    }


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def main() -> int:
    """Read the request, run it, print the reply as JSON; a failure is a reply with "error"."""
    request = json.loads(sys.argv[1])
    try:
        reply = run_command(request) if "command" in request else run_operations(request)
    except (OSError, sqlite3.Error, UnicodeError) as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(reply))
    return 0


if __name__ == "__main__":
    sys.exit(main())
