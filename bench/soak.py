"""Long load on one pool: threads that read, write, discard, snapshot and delete, every content checked.

    python bench/soak.py [--minutes 30] [--threads 32] [--block-size 64K] [--out DIR] [--directory /dev/shm]

Each sector of 4 KiB says which device it was written for, where, and in which version; a table in memory says
what must be found. A row is printed every ten seconds: operations a second, latency percentiles, memory of
this process without the table: what is resident, and what is allocated of it (the C library's count; the rest
is what it keeps free in the arenas of the threads). At the end everything is read once more, `thin_check` and
our own check look at the pool, and the memory of the last quarter is set against that of the second, when the
load is warm. The first error ends the run with status 1.
"""

import argparse
import ctypes
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

import blocksnap
from blocksnap.thin_device import ThinDevice

SECTOR = 4096
SECTORS = 8192  # of a device: 32 MiB
REGION = 64  # sectors that one thread has at a time
DEVICES = 24
INTERVAL = 10.0
KINDS = ("read", "write", "discard", "snapshot", "delete", "commit")


class Turnstile:
    """Many users of a device, or one who changes it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._users = 0
        self._closed = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._closed)
            self._users += 1
        try:
            yield
        finally:
            with self._condition:
                self._users -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._closed)
            self._closed = True
            self._condition.wait_for(lambda: self._users == 0)
        try:
            yield
        finally:
            with self._condition:
                self._closed = False
                self._condition.notify_all()


@dataclass
class Volume:
    """A device and what must be on it: the tag and the version of each sector, 0 for zeros."""

    device: ThinDevice
    tags: NDArray[np.uint32]
    versions: NDArray[np.uint32]
    tag: int
    turnstile: Turnstile = field(default_factory=Turnstile)
    regions: list[threading.Lock] = field(
        default_factory=lambda: [threading.Lock() for _ in range(SECTORS // REGION)]
    )
    gone: bool = False

    def expected(self, first: int, count: int) -> NDArray[np.uint32]:
        """Return the contents of sectors, as words: tag, sector, version, zero, over and over."""
        words = np.zeros((count, SECTOR // 16, 4), np.uint32)
        versions = self.versions[first : first + count]
        words[:, :, 0] = self.tags[first : first + count, None]
        words[:, :, 1] = np.where(versions, np.arange(first, first + count), 0)[:, None]
        words[:, :, 2] = versions[:, None]
        return words.reshape(-1)

    def verify(self, first: int, count: int) -> None:
        found = np.frombuffer(self.device.read(first * SECTOR, count * SECTOR), np.uint32)
        wrong = np.flatnonzero(found != self.expected(first, count))
        if len(wrong):
            sector = first + int(wrong[0]) * 4 // SECTOR
            raise AssertionError(f"{self.device.name}: sector {sector} is not what was written to it")


class Soak:
    """The pool, its volumes, and what was measured."""

    def __init__(self, pool: blocksnap.Pool, seconds: float) -> None:
        self.pool = pool
        self.end = time.monotonic() + seconds
        self.error: BaseException | None = None
        self.rows: list[dict[str, float]] = []
        self._volumes: list[Volume] = []
        self._lock = threading.Lock()
        self._latencies: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self._next_tag = 1

    def add(self, device: ThinDevice, like: Volume | None = None) -> None:
        empty = np.zeros(SECTORS, np.uint32)
        tags, versions = (empty, empty) if like is None else (like.tags, like.versions)
        with self._lock:
            self._volumes.append(Volume(device, tags.copy(), versions.copy(), self._next_tag))
            self._next_tag += 1

    def work(self, seed: int) -> None:
        """Do what a thread does until the time is over or somebody met an error."""
        rng = random.Random(seed)
        try:
            while self.error is None and time.monotonic() < self.end:
                kind = rng.choices(KINDS, (400, 400, 40, 1, 1, 4))[0]
                begin = time.perf_counter()
                getattr(self, f"_{kind}")(rng)
                with self._lock:
                    self._latencies[kind].append(time.perf_counter() - begin)
        except BaseException as error:  # noqa: BLE001 - whatever it is ends the run and is printed
            self.error = error

    @contextmanager
    def _region(self, rng: random.Random) -> Iterator[tuple[Volume, int, int] | None]:
        with self._lock:
            volume = rng.choice(self._volumes)
        index = rng.randrange(SECTORS // REGION)
        first = rng.randrange(REGION)
        with volume.turnstile.shared(), volume.regions[index]:
            count = rng.randint(1, REGION - first)
            yield None if volume.gone else (volume, index * REGION + first, count)

    def _read(self, rng: random.Random) -> None:
        with self._region(rng) as chosen:
            if chosen:
                chosen[0].verify(*chosen[1:])

    def _write(self, rng: random.Random) -> None:
        with self._region(rng) as chosen:
            if chosen:
                volume, first, count = chosen
                volume.tags[first : first + count] = volume.tag
                volume.versions[first : first + count] += 1
                volume.device.write(first * SECTOR, volume.expected(first, count))

    def _discard(self, rng: random.Random) -> None:
        with self._region(rng) as chosen:
            if chosen:
                volume, first, count = chosen
                volume.tags[first : first + count] = 0
                volume.versions[first : first + count] = 0
                volume.device.discard(first * SECTOR, count * SECTOR)

    def _snapshot(self, rng: random.Random) -> None:
        with self._lock:
            volume = rng.choice(self._volumes)
            if len(self._volumes) >= DEVICES:
                return
            name = f"volume-{self._next_tag}-{rng.randrange(1 << 30)}"
        with volume.turnstile.alone():
            if not volume.gone:
                self.add(volume.device.snapshot(name), volume)

    def _delete(self, rng: random.Random) -> None:
        with self._lock:
            if len(self._volumes) < DEVICES // 2:
                return
            volume = self._volumes.pop(rng.randrange(len(self._volumes)))
        with volume.turnstile.alone():
            volume.gone = True
            volume.device.delete()

    def _commit(self, rng: random.Random) -> None:  # noqa: ARG002 - as the other kinds
        self.pool.commit()

    def report(self, since: float, start: float) -> None:
        """Print and keep a row of what was measured since a time."""
        now = time.monotonic()
        with self._lock:
            taken, self._latencies = self._latencies, {kind: [] for kind in KINDS}
            tables = len(self._volumes) * SECTORS * 8
        row = {"seconds": now - start, "resident": _resident() - tables, "allocated": _allocated() - tables}
        row["operations"] = sum(map(len, taken.values())) / (now - since)
        for kind in ("read", "write"):
            milliseconds = np.array(taken[kind] or [0.0]) * 1e3
            row |= {f"{kind} p{p}": float(np.percentile(milliseconds, p)) for p in (50, 99)}
        self.rows.append(row)
        print(
            f"{row['seconds']:7.0f} s {row['operations']:8.0f} ops/s"
            f"   read {row['read p50']:6.2f} {row['read p99']:7.2f} ms"
            f"   write {row['write p50']:6.2f} {row['write p99']:7.2f} ms"
            f"   {row['resident'] / 2**20:6.1f} MiB, {row['allocated'] / 2**20:5.1f} allocated",
            flush=True,
        )

    def verify_all(self) -> None:
        for volume in self._volumes:
            volume.verify(0, SECTORS)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2 (mallinfo(3)), bytes."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


def _allocated() -> float:
    """Return the bytes that the C library has given out, its mappings included."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _MallInfo
    found = mallinfo()
    return float(found.uordblks + found.hblkhd)


def _run(soak: Soak, threads: int) -> None:
    workers = [threading.Thread(target=soak.work, args=(seed,)) for seed in range(threads)]
    start = last = time.monotonic()
    for worker in workers:
        worker.start()
    while time.monotonic() < soak.end and any(worker.is_alive() for worker in workers):
        time.sleep(min(INTERVAL, max(0.1, soak.end - time.monotonic())))
        soak.report(last, start)
        last = time.monotonic()
    for worker in workers:
        worker.join()
    if soak.error is not None:
        raise soak.error


def _plot(rows: list[dict[str, float]], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    minutes = [row["seconds"] / 60 for row in rows]
    figure, (speed, latency, memory) = plt.subplots(3, 1, figsize=(8, 9), sharex=True)
    speed.plot(minutes, [row["operations"] for row in rows])
    speed.set_ylabel("operations/s")
    for name in ("read p50", "read p99", "write p50", "write p99"):
        latency.plot(minutes, [row[name] for row in rows], label=name)
    latency.set_ylabel("latency, ms")
    latency.set_yscale("log")
    latency.legend(ncols=2)
    for kind in ("resident", "allocated"):
        memory.plot(minutes, [row[kind] / 2**20 for row in rows], label=kind)
    memory.set_ylabel("memory, MiB")
    memory.legend()
    memory.set_xlabel("minutes")
    for axes in (speed, memory):
        axes.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _growth(rows: list[dict[str, float]], kind: str) -> float:
    """Return the memory of the last quarter over that of the second."""
    quarter = max(1, len(rows) // 4)
    memory = [row[kind] for row in rows]
    return float(np.median(memory[-quarter:]) / np.median(memory[quarter : 2 * quarter] or memory))


def main() -> int:
    parser = argparse.ArgumentParser(description="Long load on one pool, every content checked.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--block-size", default="64K")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where the pool is made")
    parser.add_argument("--out", type=Path, help="write soak.png there")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="blocksnap-soak-", dir=options.directory))
    try:
        with blocksnap.Pool.create(home / "pool", size="3G", block_size=options.block_size) as pool:
            soak = Soak(pool, options.minutes * 60)
            for number in range(4):
                soak.add(pool.create_device(f"base-{number}", SECTORS * SECTOR))
            _run(soak, options.threads)
            soak.verify_all()
            report = pool.check()
        print(f"contents right; check: {len(report.findings)} findings; last quarter's memory / second's:")
        print(
            f"resident {_growth(soak.rows, 'resident'):.3f}, allocated {_growth(soak.rows, 'allocated'):.3f}"
        )
        subprocess.run(["thin_check", home / "pool" / "metadata"], check=True)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            _plot(soak.rows, options.out / "soak.png")
        return 0 if not report.findings else 1
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    sys.exit(main())
