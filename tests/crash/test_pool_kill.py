"""kill -9 at random moments: what was acknowledged is there, pool and catalog agree, nothing leaks."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from blocksnap.pool import Pool
from tests.thin_tools import assert_sound, needs_thin_tools

SIZE = 1 << 20
LENGTH = 100_000

# Each line is an acknowledgement: the operation before it has returned.
PROGRAM = """
import sys, threading
import numpy as np
from blocksnap.pool import Pool

pool = Pool.open(sys.argv[1])
writing = pool.create_device("busy", 1 << 20)

def write_for_ever():
    while True:
        writing.write(0, np.random.bytes(200_000))
        writing.flush()

threading.Thread(target=write_for_ever, daemon=True).start()
for number in range(10_000):
    device = pool.create_device(f"d{number}", 1 << 20)
    device.write(number * 7 % 5000, np.random.default_rng(number).bytes(100_000))
    device.flush()
    print(number, flush=True)
    device.snapshot(f"s{number}")
    if number >= 8:
        with pool.transaction():
            pool.device(f"d{number - 8}").delete()
            pool.device(f"s{number - 8}").delete()
"""


def run_and_kill(path: Path, seconds: float) -> int:
    """Run the program until it was killed; return the number of its last acknowledged round, -1 if none."""
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        lines = [child.stdout.readline()]
        time.sleep(seconds)
    finally:
        child.kill()
    lines += child.stdout.readlines()
    child.stdout.close()
    assert child.wait() == -9
    return int(lines[-1]) if lines[-1].strip() else int(lines[-2])


def expected_content(number: int) -> bytes:
    begin = number * 7 % 5000
    return bytes(begin) + np.random.default_rng(number).bytes(LENGTH)


@needs_thin_tools
@pytest.mark.parametrize("seed", range(8))
def test_a_killed_process_loses_nothing_that_was_acknowledged(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "pool"
    Pool.create(path, size="64M", block_size="4K" if seed % 2 else "64K").close()
    last = run_and_kill(path, random.Random(seed).uniform(0, 0.4))
    with Pool.open(path) as pool:
        names = {device.name for device in pool.devices()}
        assert {info.id for info in pool._engine.devices()} == {device.id for device in pool.devices()}
        for number in range(max(0, last - 7), last + 1):
            content = expected_content(number)
            assert pool.device(f"d{number}").read(0, len(content)) == content
            if number < last:
                assert pool.device(f"s{number}").read(0, len(content)) == content
        for number in range(last - 8):
            assert not names & {f"d{number}", f"s{number}"}
        assert (f"d{last - 8}" in names) == (f"s{last - 8}" in names)
        for device in pool.devices():
            device.delete()
        pool.commit()
        status = pool.status()
        assert status.data_free_bytes == status.data_bytes
    assert_sound(path / "metadata")
