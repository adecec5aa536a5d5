"""What a call through the Python library costs: `python -m pytest bench`."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import blocksnap

BLOCK = 4096
DEVICE = 64 << 20


@pytest.fixture
def device(tmp_path: Path) -> Iterator[blocksnap.ThinDevice]:
    with blocksnap.Pool.create(tmp_path / "pool", size="256M", block_size="64K") as pool:
        device = pool.create_device("base", DEVICE)
        device.write(0, bytes(DEVICE))
        yield device


def test_read_4k(benchmark: BenchmarkFixture, device: blocksnap.ThinDevice) -> None:
    buffer = bytearray(BLOCK)
    benchmark(device.read_into, 8 * BLOCK, buffer)


def test_write_4k_in_place(benchmark: BenchmarkFixture, device: blocksnap.ThinDevice) -> None:
    benchmark(device.write, 8 * BLOCK, bytes(BLOCK))


def test_snapshot_with_its_two_commits(benchmark: BenchmarkFixture, device: blocksnap.ThinDevice) -> None:
    numbers = count()
    benchmark(lambda: device.snapshot(f"snap{next(numbers)}"))
