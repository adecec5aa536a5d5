"""The kernel that runs a pool is killed at random moments; what was acknowledged is there afterwards."""

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blocksnap import metadata
from blocksnap.pool import Pool
from tests.kernel.power_state import SIZE, WRITERS, Told, read_log, verify
from tests.kernel.user_mode import Guest, missing
from tests.thin_tools import needs_thin_tools, thin_tool

CUTS, CHAINS = 100, 4
CUTS_IN_RECOVERY = 0.15
LINES = 80
SECONDS_TO_LOAD = 120
MEMORY = 192 << 20

pytestmark = [pytest.mark.skipif(missing() != "", reason=f"needs {missing()}"), needs_thin_tools]


class Chain:
    """A pool that lives through cuts: each boot verifies what the last one left, then loads."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory = directory
        self._random = random.Random(seed)
        self.cuts = 0
        directory.mkdir()
        (directory / "log").touch()
        with Pool.create(self.path, size="32M") as pool:
            for name in WRITERS:
                pool.create_device(name, SIZE)

    @property
    def path(self) -> Path:
        return self._directory / "pool"

    def run(self, cuts: int) -> Told:
        try:
            return self._run(cuts)
        except BaseException:
            print(f"{self._directory} failed after {self.cuts} cuts")
            raise

    def _run(self, cuts: int) -> Told:
        for _ in range(cuts):
            self._boot_and_cut()
            self._assert_sound()
            # What recovers is in turn the user engine here and the kernel engine in the next boot.
            if self.cuts % 2 == 0 or self.cuts == cuts:
                with Pool.open(self.path) as pool:
                    verify(pool, read_log(self._directory / "log"))
                self._assert_sound()
        return read_log(self._directory / "log")

    def _assert_sound(self) -> None:
        """Assert that thin_check and our own check find nothing but blocks that the kernel loses.

        It takes a data block, zeroes it, then maps it; a commit may come between.
        """
        path = self.path / "metadata"
        thin_tool("thin_check", "-q", path)
        for finding in metadata.check(path).findings:
            assert finding.severity == "leak"
            assert finding.text.startswith("data space map")

    def _boot_and_cut(self) -> None:
        command = [sys.executable, "-m", "tests.kernel.power_load", str(self._directory)]
        environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
        with Guest(command, writable=[self._directory], memory=MEMORY, environment=environment) as guest:
            if self._random.random() < CUTS_IN_RECOVERY:
                self._await(guest, b"opening")
                time.sleep(self._random.uniform(0, 0.7))
            else:
                self._await(guest, b"loading")
                self._await_lines(guest, self._random.randint(0, LINES))
                time.sleep(self._random.uniform(0, 0.05))
            assert guest.running, guest.output()
            guest.kill()
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


@pytest.mark.timeout(1200)
def test_nothing_that_was_acknowledged_is_lost_in_100_power_cuts(tmp_path: Path) -> None:
    chains = [Chain(tmp_path / str(seed), seed) for seed in range(CHAINS)]
    with ThreadPoolExecutor(CHAINS) as pool:
        told = list(pool.map(lambda chain: chain.run(CUTS // CHAINS), chains))
    print(f"{sum(each.records for each in told)} records, {sum(each.operations for each in told)} operations")
    assert sum(chain.cuts for chain in chains) == CUTS == 100
    assert all(each.records > CUTS and each.operations > CUTS // CHAINS for each in told)
