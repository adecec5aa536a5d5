"""Scrubbing a pool over a device that cannot read some of its sectors, run by either engine."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from blocksnap import pool_scrub
from blocksnap.device_mapper import Control, Device, LinearTarget, OtherTarget
from blocksnap.pool import Pool
from blocksnap.pool_scrub import Unreadable
from tests.kernel.devices import BLOCK, MIB, Disks

DATA, SIZE = 16 * MIB, 4 * MIB


@pytest.fixture
def disk(control: Control, disks: Disks) -> Device:
    return Device.create(control, "data", [LinearTarget(DATA, disks.attach("disk", DATA))])


@pytest.fixture
def parts(disk: Device, disks: Disks, tmp_path: Path) -> dict[str, Any]:
    """A pool whose device has 20 blocks, and a snapshot with 2 of its own."""
    parts: dict[str, Any] = {
        "metadata": disks.file("metadata", 2 * MIB),
        "data": disk.path,
        "catalog": tmp_path / "catalog.db",
    }
    with Pool.create(**parts, block_size=BLOCK) as pool:
        base = pool.create_device("base", SIZE)
        base.write(0, b"x" * 20 * BLOCK)
        base.snapshot("snap").write(0, b"y" * 2 * BLOCK)
    return parts


def break_sectors(disk: Device, disks: Disks, offset: int, length: int) -> None:
    number = disks.attach("disk")
    disk.replace(
        [
            LinearTarget(offset, number),
            OtherTarget(length, "error", ""),
            LinearTarget(DATA - offset - length, number, offset + length),
        ]
    )


@pytest.mark.parametrize("engine", ["user", "kernel"])
def test_broken_sectors_are_told_by_device_and_offset(
    engine: str, parts: dict[str, Any], disk: Device, disks: Disks
) -> None:
    with Pool.open(**parts, engine=engine) as pool:
        break_sectors(disk, disks, 4 * BLOCK + 8192, 4096)
        found = pool_scrub.scrub(lambda: nullcontext(pool), Path(disk.path))
        assert found.unreadable == (
            Unreadable("base", 4 * BLOCK + 8192, 4096, 4 * BLOCK + 8192),
            Unreadable("snap", 4 * BLOCK + 8192, 4096, 4 * BLOCK + 8192),
        )
        assert found.read_bytes == 22 * BLOCK - 4096
        # What can be read still can, and the pool goes on.
        assert pool.device("base").read(0, 4 * BLOCK) == b"x" * 4 * BLOCK
        pool.device("snap").write(6 * BLOCK, b"z")


def test_broken_sectors_that_nobody_uses_are_not_read(
    parts: dict[str, Any], disk: Device, disks: Disks
) -> None:
    break_sectors(disk, disks, 100 * BLOCK, 10 * BLOCK)
    found = pool_scrub.scrub(lambda: Pool.open(**parts, read_only=True), Path(disk.path))
    assert found == pool_scrub.Scrub(22 * BLOCK, 0, ())
