"""The kernel that runs a pool is killed at random moments; what was acknowledged is there afterwards."""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap.pool import Pool
from tests.kernel.power_state import SIZE, WRITERS, Told, assert_sound, read_log, verify
from tests.kernel.user_mode import Guest, missing
from tests.thin_tools import needs_thin_tools

CUTS, CHAINS = 100, 4
CUTS_IN_RECOVERY = 0.15
LINES = 80
SECONDS_TO_LOAD = 120
MEMORY = 192 << 20

pytestmark = [pytest.mark.skipif(missing() != "", reason=f"needs {missing()}"), needs_thin_tools]


class Chain:
    """A pool that lives through cuts: each boot verifies what the last one left, then loads."""

    kind = "files"

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory = directory
        self._random = random.Random(seed)
        self.cuts = 0
        directory.mkdir()
        (directory / "log").touch()
        with Pool.create(self._path, size="32M") as pool:
            for name in WRITERS:
                pool.create_device(name, SIZE)

    @property
    def _path(self) -> Path:
        return self._directory / "pool"

    def run(self, cuts: int) -> Told:
        try:
            for _ in range(cuts):
                self._boot_and_cut()
                self._verify(last=self.cuts == cuts)
        except BaseException:
            print(f"{self._directory} failed after {self.cuts} cuts")
            raise
        return self._told()

    def _told(self) -> Told:
        return read_log(self._directory / "log")

    def _verify(self, *, last: bool) -> None:
        """Recover in the user engine here each second time, and leave it to the next boot else."""
        assert_sound(self._path / "metadata")
        if self.cuts % 2 == 0 or last:
            with Pool.open(self._path) as pool:
                verify(pool, self._told())
            assert_sound(self._path / "metadata")

    def _disks(self) -> list[Path]:
        return []

    @contextmanager
    def _booted(self) -> Iterator[Guest]:
        command = [sys.executable, "-m", "tests.kernel.power_load", str(self._directory), self.kind]
        with Guest(
            command,
            writable=[self._directory],
            disks=self._disks(),
            memory=MEMORY,
            environment={"PYTHONPATH": ":".join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
        ) as guest:
            yield guest
            assert guest.running, guest.output()
            guest.kill()

    def _boot_and_cut(self) -> None:
        with self._booted() as guest:
            if self._random.random() < CUTS_IN_RECOVERY:
                self._await(guest, b"opening")
                time.sleep(self._random.uniform(0, 0.7))
            else:
                self._await(guest, b"loading")
                self._await_lines(guest, self._random.randint(0, LINES))
                time.sleep(self._random.uniform(0, 0.05))
        self.cuts += 1

    def _await_lines(self, guest: Guest, more: int) -> None:
        """Wait until the load has done something that many times."""
        enough = self._lines() + more
        deadline = time.monotonic() + SECONDS_TO_LOAD
        while self._lines() < enough and guest.running and time.monotonic() < deadline:
            time.sleep(0.003)

    def _lines(self) -> int:
        return (self._directory / "log").read_bytes().count(b"\n")

    def _await(self, guest: Guest, word: bytes) -> None:
        while (line := guest.reports.get(timeout=SECONDS_TO_LOAD)) != word:
            assert line is not None, f"{self.cuts} cuts, then:\n{guest.output()}\n{guest.console()}"


class DiskChain(Chain):
    """The pool is in a file system on a disk of the guest, which verifies it, at last after all cuts."""

    kind = "disk"

    def __init__(self, directory: Path, seed: int) -> None:
        super().__init__(directory, seed)
        with self._disk.open("wb") as image:
            image.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-d", self._path, self._disk], check=True)

    @property
    def _disk(self) -> Path:
        return self._directory / "disk"

    def _disks(self) -> list[Path]:
        return [self._disk]

    def _verify(self, *, last: bool) -> None:
        if last:
            with self._booted() as guest:
                self._await(guest, b"loading")


@pytest.mark.timeout(1200)
def test_nothing_that_was_acknowledged_is_lost_in_100_power_cuts(tmp_path: Path) -> None:
    kinds = [Chain, DiskChain] * (CHAINS // 2)
    chains = [kind(tmp_path / f"{kind.kind}-{seed}", seed) for seed, kind in enumerate(kinds)]
    with ThreadPoolExecutor(CHAINS) as pool:
        told = list(pool.map(lambda chain: chain.run(CUTS // CHAINS), chains))
    print(f"{sum(each.records for each in told)} records, {sum(each.operations for each in told)} operations")
    assert sum(chain.cuts for chain in chains) == CUTS == 100
    assert all(each.records > CUTS and each.operations > CUTS // CHAINS for each in told)
