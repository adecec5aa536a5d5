"""The driver dm-snapshot beyond what all drivers do: its devices, its figures, and what it cannot."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from blocksnap import drivers, mount
from blocksnap.device_mapper import Control, Device, LinearTarget, SnapshotTarget
from blocksnap.drivers import Driver
from blocksnap.errors import ArgumentError, BusyError, DeviceIOError
from tests.file_systems import fresh_file_system
from tests.kernel.devices import leftovers, sweep

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "root"
    with Control.open() as control:
        assert sweep(control) == []
    assert mount.loop_devices(below=tmp_path) == []


@pytest.fixture
def driver(root: Path) -> Iterator[Driver]:
    with drivers.open("dm-snapshot", root, base_size="256M") as opened:
        yield opened
        opened.cleanup()


def active() -> dict[str, Device]:
    """Return the mapped devices by node."""
    with Control.open() as control:
        return {device.path: device for device in leftovers(control)}


def rewrite(driver: Driver, id: str, content: bytes) -> None:
    with driver.mounted(id) as path, (path / "file").open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())


def test_chain_of_layers_is_a_chain_of_snapshots(driver: Driver) -> None:
    driver.create("base")
    driver.create("middle", "base")
    driver.create_read_write("top", "middle")
    driver.get("top")
    nodes = {id: driver.metadata(id)["Node"] for id in ("base", "middle", "top")}
    with Control.open() as control:
        tables = {
            device.path: Device(control, device.name, device.uuid, device.number).table()[0]
            for device in leftovers(control)
        }
        numbers = {device.path: device.number for device in leftovers(control)}
    assert isinstance(tables[nodes["base"]], LinearTarget)
    for upper, lower in (("top", "middle"), ("middle", "base")):
        target = tables[nodes[upper]]
        assert isinstance(target, SnapshotTarget)
        assert (target.origin, target.block_size, target.persistent) == (numbers[nodes[lower]], 4096, True)
    driver.put("top")
    assert nodes["top"] not in active()
    driver.close()
    assert active() == {}


def test_no_child_is_made_of_a_layer_that_is_written_to(driver: Driver) -> None:
    driver.create("base")
    driver.get("base")
    with pytest.raises(BusyError, match="classic snapshot wants an origin that nobody writes to"):
        driver.create("child", "base")
    with pytest.raises(BusyError, match="in use by process"):
        driver.snapshot("copy", "base")
    driver.put("base")
    driver.create("child", "base")
    driver.get("base")
    driver.create("other", "base")  # it is mounted for reading only by now
    assert driver.layers() == ["base", "child", "other"]


def test_figures_are_kept_while_a_layer_is_not_active(driver: Driver) -> None:
    driver.create("base")
    driver.create_read_write("child", "base")
    rewrite(driver, "child", os.urandom(2 * MIB))
    first = driver.accounting("child")
    assert first.filesystem_bytes is not None
    assert first.allocated_bytes is not None
    assert 2 * MIB < first.filesystem_bytes < 4 * MIB
    assert 2 * MIB < first.allocated_bytes < 4 * MIB
    assert first.copy_bytes == 0
    assert first.metadata_bytes is not None
    assert 0 < first.metadata_bytes < MIB
    rewrite(driver, "child", os.urandom(2 * MIB))
    second = driver.accounting("child")
    assert second.filesystem_bytes is not None
    assert second.filesystem_bytes > first.filesystem_bytes + 2 * MIB


def test_what_larger_chunks_copy_is_not_told(root: Path) -> None:
    with drivers.open("dm-snapshot", root, base_size="256M", block_size="64K") as driver:
        driver.create("base")
        driver.create_read_write("child", "base")
        rewrite(driver, "child", b"x")
        found = driver.accounting("child")
        assert (found.copy_bytes, found.metadata_bytes) == (None, None)
        assert (found.allocated_bytes or 0) >= 64 << 10
        assert driver.metadata("child")["ChunkSize"] == str(64 << 10)


def test_chunks_that_cannot_be_are_refused(root: Path) -> None:
    for size in ("2K", "12K", "2M"):
        with pytest.raises(ArgumentError, match="power of two from 4K to 1M"):
            drivers.open("dm-snapshot", root, block_size=size)


def test_what_a_killed_process_left_active_is_gone_after_the_next_open(driver: Driver, root: Path) -> None:
    driver.create("base")
    driver.create("child", "base")
    with driver.mounted("child"):
        pass
    assert active() != {}
    drivers.open("dm-snapshot", root).close()
    assert active() == {}


def test_layer_whose_store_found_no_space_is_lost_and_says_so(tmp_path: Path) -> None:
    with fresh_file_system(tmp_path, "ext4", 64 * MIB) as disk:
        with drivers.open("dm-snapshot", disk / "root", base_size="256M") as driver:
            driver.create("base")
            driver.create_read_write("child", "base")
            with suppress(OSError), driver.mounted("child") as path:
                (path / "large").write_bytes(os.urandom(100 * MIB))
                mount.sync_filesystem(path)
            with pytest.raises(DeviceIOError, match='layer "child" is lost'):
                driver.get("child")
            driver.cleanup()
            driver.remove("child")
            with driver.mounted("base") as path:
                assert os.listdir(path) == []
            driver.cleanup()
        with Control.open() as control:
            assert sweep(control) == []
