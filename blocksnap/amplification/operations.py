"""The operations of the built-in workloads, run by a process of their own.

This file is run as a script (`python -I operations.py REQUEST`, one JSON object) and imports the standard
library alone, so that the process does nothing but the workload: its write bytes are then the kernel's count,
`wchar` of /proc/self/io, which includes children that were waited for. Outside of that count are stores into
a mapped file (the -shm index of SQLite's WAL mode), fallocate, truncate and names; what a process writes into
pipes is inside.

Each workload is a generator that yields after every operation, the bytes to take off the count or None; the
time between two yields is its latency. Opening the file belongs to the first operation: that is where
overlayfs copies it up. `epoch` is the number of snapshots taken so far.
"""

import json
import os
import random
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence

DATABASE = "database.sqlite"
LARGE_FILE = "large-file"
SMALL_FILES = "small-files"


def sqlite(root: str, *, epoch: int, journal: str, transactions: int, rows: int, seed: int) -> Iterator[None]:
    """Update seeded random rows, synchronous=FULL; `transactions` in each journal mode of "rollback+wal"."""
    source = random.Random(seed + epoch)
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


def bulk_load(root: str, *, epoch: int, rows: int, batch: int, seed: int) -> Iterator[None]:
    """Load rows into a new table with an index, one synchronous transaction a batch, rollback journal."""
    source = random.Random(seed + epoch)
    database = sqlite3.connect(os.path.join(root, DATABASE), isolation_level=None)
    database.execute("PRAGMA synchronous = FULL")
    table = f"loaded_{epoch}"
    database.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, key INTEGER, payload BLOB NOT NULL)")
    database.execute(f"CREATE INDEX {table}_key ON {table} (key)")
    for begin in range(0, rows, batch):
        lines = [(source.getrandbits(31), source.randbytes(200)) for _ in range(min(batch, rows - begin))]
        database.execute("BEGIN IMMEDIATE")
        database.executemany(f"INSERT INTO {table} (key, payload) VALUES (?, ?)", lines)
        database.execute("COMMIT")
        yield
    database.close()


def append(
    root: str, *, epoch: int, records: int, record_bytes: int, sync_every: int, seed: int
) -> Iterator[None]:
    """Append records to an existing log, fsync after each `sync_every`."""
    record = random.Random(seed + epoch).randbytes(record_bytes)
    log = os.open(os.path.join(root, LARGE_FILE), os.O_WRONLY | os.O_APPEND)
    for number in range(1, records + 1):
        os.write(log, record)
        if number % sync_every == 0 or number == records:
            os.fsync(log)
        yield
    os.close(log)


def patch(
    root: str, *, epoch: int, stride: int, write_bytes: int, sync_every: int, seed: int
) -> Iterator[None]:
    """Write `write_bytes` at every `stride` bytes of an existing file, in order, fsync after each
    `sync_every`.
    """
    size = os.stat(os.path.join(root, LARGE_FILE)).st_size
    piece = random.Random(seed + epoch).randbytes(write_bytes)
    return _overwrite(root, range(0, size - write_bytes + 1, stride), piece, sync_every)


def scatter(
    root: str, *, epoch: int, writes: int, write_bytes: int, sync_every: int, seed: int
) -> Iterator[None]:
    """Write at random places of an existing file, each a multiple of `write_bytes` and none twice."""
    size = os.stat(os.path.join(root, LARGE_FILE)).st_size
    piece = random.Random(seed + epoch).randbytes(write_bytes)
    return _overwrite(root, scattered_offsets(size, writes, write_bytes, seed + epoch), piece, sync_every)


def scattered_offsets(size: int, writes: int, write_bytes: int, seed: int) -> list[int]:
    """Return where `scatter` writes, in order."""
    return [slot * write_bytes for slot in random.Random(seed).sample(range(size // write_bytes), writes)]


def _overwrite(root: str, offsets: Sequence[int], piece: bytes, sync_every: int) -> Iterator[None]:
    file = os.open(os.path.join(root, LARGE_FILE), os.O_WRONLY)
    for number, offset in enumerate(offsets, 1):
        os.pwrite(file, piece, offset)
        if number % sync_every == 0 or number == len(offsets):
            os.fsync(file)
        yield
    os.close(file)


def touch_small(root: str, *, epoch: int, append_bytes: int, seed: int) -> Iterator[None]:
    """Append to each of thousands of small files; nothing is synced before the end of the run."""
    piece = random.Random(seed + epoch).randbytes(append_bytes)
    for directory, directories, names in os.walk(os.path.join(root, SMALL_FILES)):
        directories.sort()
        for name in sorted(names):
            with open(os.path.join(directory, name), "ab", buffering=0) as file:
                file.write(piece)
            yield


def touch_byte(root: str, *, epoch: int, offset: int, seed: int) -> Iterator[None]:
    """Change one byte in the middle of an existing file and fsync it."""
    file = os.open(os.path.join(root, LARGE_FILE), os.O_RDWR)
    before = os.pread(file, 1, offset)
    os.pwrite(file, bytes([before[0] ^ (1 + random.Random(seed + epoch).randrange(255))]), offset)
    os.fsync(file)
    os.close(file)
    yield


def untar(root: str, *, epoch: int, files: int, archive: str) -> Iterator[None]:  # noqa: ARG001
    """Unpack a tar into a new directory, an operation a member; nothing is synced before the end."""
    target = os.path.join(root, f"unpacked-{epoch}")
    with tarfile.open(archive) as members:
        for member in members:
            members.extract(member, target)
            yield


def package(
    root: str,
    *,
    epoch: int,  # noqa: ARG001
    files: int,  # noqa: ARG001
    packages: int,  # noqa: ARG001
    debs: Sequence[tuple[str, int]],
) -> Iterator[int]:
    """Install packages over their older versions in the root's own dpkg database, an operation a package.

    What dpkg's processes hand each other through pipes comes with each package and is taken off.
    """
    for deb, piped in debs:
        install_package(root, deb)
        yield piped


def install_package(root: str, deb: str) -> None:
    """Have dpkg unpack and configure a package below root, as it does everywhere: each file is synced."""
    command = ["dpkg", f"--root={root}", "--log=/dev/null", "--no-triggers", "--install", deb]
    environment = {**os.environ, "LC_ALL": "C"}
    environment["PATH"] = f"/usr/sbin:/sbin:{environment.get('PATH', '/usr/bin:/bin')}"
    done = subprocess.run(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise OSError(f"dpkg on {os.path.basename(deb)}: {last[0]}")


WORKLOADS: dict[str, Callable[..., Iterator[int | None]]] = {
    "sqlite": sqlite,
    "bulk_load": bulk_load,
    "append": append,
    "patch": patch,
    "scatter": scatter,
    "touch_small": touch_small,
    "touch_byte": touch_byte,
    "untar": untar,
    "package": package,
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
    latencies, piped = [], 0
    before, start = written_bytes(), time.perf_counter()
    last = start
    for off in workload(str(request["root"]), **parameters):
        now = time.perf_counter()
        latencies.append(now - last)
        piped += off or 0
        last = now
    seconds = time.perf_counter() - start
    written = _difference(before, written_bytes())
    return {
        "exit_status": 0,
        "seconds": seconds,
        "application_bytes": None if written is None else written - piped,
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
