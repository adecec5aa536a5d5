"""Power cuts of the kernel engine, each write a point to cut at: what log-writes recorded, opened again here.

    python -m tests.kernel.log_states [STATES [SEED]]
    python -m tests.kernel.log_states replay RECORDING POSITION CUT SEED

A guest runs a workload (log_load.py) on a disk that holds metadata, data and the file system of the catalog;
the log of the disk tells all that happened to it, in order. Two runs of a workload differ in their timing:
the recording of one with a wrong state is kept, and the second command looks at that state again.
"""

import pickle
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from blocksnap.pool import Pool
from tests.crash.catalog_workload import BUSY
from tests.crash.pool_states import expectation, judge
from tests.kernel.log_writes import Cut, DiskLog, Flag, Region, read_entries
from tests.kernel.power_state import is_block_lost_by_kernel
from tests.kernel.user_mode import Guest

__all__ = [
    "CATALOG",
    "DATA",
    "DISK",
    "FIRST_DATA",
    "METADATA",
    "PIECE",
    "STATES_A_WORKLOAD",
    "WrongStateError",
    "explore",
    "record",
    "replay",
]

PIECE = 16 << 10
METADATA = Region(0, 2 << 20)
DATA = Region(METADATA.end, METADATA.end + (8 << 20))
FIRST_DATA = 4 << 20
CATALOG = Region(DATA.end, DATA.end + (4 << 20))
DISK = CATALOG.end
LOG_SIZE = 512 << 20
STEPS = 40
STATES_A_WORKLOAD, BETWEEN = 500, 200
THIN_CHECK_EACH = 20
SECONDS = 120


class WrongStateError(AssertionError):
    """It tells what is wrong, and the words that show it again."""


@contextmanager
def memory_directory() -> Iterator[Path]:
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="blocksnap-log-states-", dir=shared) as directory:
        yield Path(directory)


def _make_disk(directory: Path) -> bytes:
    """Return a disk with a pool whose only device is the busy one."""
    path = directory / "pool"
    with Pool.create(path, size=FIRST_DATA, metadata_size=METADATA.end) as pool:
        pool.create_device(BUSY, PIECE)
    metadata, data = (path / "metadata").read_bytes(), (path / "data").read_bytes()
    for part in ("metadata", "data"):
        (path / part).unlink()
    image = directory / "catalog"
    with image.open("wb") as file:
        file.truncate(CATALOG.end - CATALOG.begin)
    subprocess.run(["mkfs.ext4", "-q", "-b", "1024", "-J", "size=1", "-d", path, image], check=True)
    return metadata + data.ljust(DATA.end - DATA.begin, b"\0") + image.read_bytes()


def record(directory: Path, seed: int, steps: int = STEPS) -> DiskLog:
    """Run a workload in a guest and return what it did to its disk."""
    disk, log = directory / "disk", directory / "log"
    start = _make_disk(directory)
    disk.write_bytes(start)
    with log.open("wb") as file:
        file.truncate(LOG_SIZE)
    command = [sys.executable, "-m", "tests.kernel.log_load", str(seed), str(steps)]
    with Guest(
        command,
        disks=[disk, log],
        memory=192 << 20,
        environment={"PYTHONPATH": ":".join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
    ) as guest:
        assert guest.wait(SECONDS) == 0, guest.output() + guest.console()
        texts = [line for line in guest.output().encode().split(b"\n") if line.startswith(b"{")]
    entries = [
        entry._replace(content=texts[int(entry.content)]) if entry.flags & Flag.MARK else entry
        for entry in read_entries(log)
    ]
    return DiskLog(start, entries, whole=CATALOG)


def _put_catalog(image: bytearray, directory: Path) -> str:
    """Recover the file system as a mount does, and take the catalog from it; return what is wrong with it."""
    path = directory / "image"
    path.write_bytes(image)
    if (status := _status_of("e2fsck", "-fp", path)) > 1:
        return f"e2fsck ends with {status}"
    if status := _status_of("debugfs", "-R", f"rdump / {directory}", path):
        return f"debugfs ends with {status}"
    path.unlink()
    if any((directory / "lost+found").iterdir()):
        return "e2fsck has found files that were lost"
    (directory / "lost+found").rmdir()
    return ""


def _status_of(*command: str | Path) -> int:
    return subprocess.run(command, capture_output=True, check=False).returncode


def judge_state(directory: Path, log: DiskLog, position: int, cut: Cut, seed: int) -> str:
    """Return what is wrong with a state, nothing if it is right."""
    disk = log.state(position, cut, seed)
    with tempfile.TemporaryDirectory(dir=directory) as name:
        state = Path(name)
        if wrong := _put_catalog(disk[CATALOG.begin : CATALOG.end], state):
            return wrong
        (state / "metadata").write_bytes(disk[METADATA.begin : METADATA.end])
        (state / "data").write_bytes(disk[DATA.begin : DATA.end])
        if seed % THIN_CHECK_EACH == 0 and (status := _status_of("thin_check", "-q", state / "metadata")):
            return f"thin_check ends with {status}"
        return judge(state, expectation(log.marks(position)), PIECE, is_block_lost_by_kernel)


def explore(directory: Path, log: DiskLog, seed: int) -> int:
    """Judge cuts of a recording at each flush and FUA write, and at random between; return how many."""
    rng = random.Random(seed)
    chosen = [at + 1 for at, entry in enumerate(log.entries) if entry.flags & (Flag.FLUSH | Flag.FUA)]
    between = max(BETWEEN, STATES_A_WORKLOAD - len(chosen))
    chosen += [rng.randint(1, len(log.entries)) for _ in range(between)]
    for number, position in enumerate(sorted(chosen)):
        cut, state_seed = Cut(number % 3), rng.randrange(1 << 32)
        if wrong := judge_state(directory, log, position, cut, state_seed):
            raise WrongStateError(f"{wrong}: replay {keep(log)} {position} {cut.name} {state_seed}")
    return len(chosen)


def keep(log: DiskLog) -> str:
    with tempfile.NamedTemporaryFile(prefix="blocksnap-recording-", delete=False) as file:
        pickle.dump(replace(log), file)
    return file.name


def replay(kept: str, position: str, cut: str, seed: str) -> None:
    log = pickle.loads(Path(kept).read_bytes())
    with memory_directory() as directory:
        print(judge_state(directory, log, int(position), Cut[cut], int(seed)) or "nothing is wrong")


def main(states: int = 1000, seed: int = 1) -> None:
    done = 0
    while done < states:
        with memory_directory() as directory:
            done += explore(directory, record(directory, seed), seed)
        seed += 1
    print(f"{done} crash states of the kernel engine, all recovered")


if __name__ == "__main__":
    if sys.argv[1:2] == ["replay"]:
        replay(*sys.argv[2:])
    else:
        main(*map(int, sys.argv[1:]))
