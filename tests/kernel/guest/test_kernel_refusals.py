"""Pools of the kernel engine that cannot be opened or fail: one line that names the thing and the mend."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blocksnap import mount
from blocksnap.device_mapper import Control, Device, DeviceNumber, OtherTarget, ThinPoolTarget
from blocksnap.errors import (
    BlocksnapError,
    BusyError,
    DamagedMetadataError,
    DeviceIOError,
    DeviceNotFoundError,
    NeedsCheckError,
    NoSpaceError,
    PoolFormatError,
)
from blocksnap.pool import Pool
from blocksnap.user_pool import UserPool
from tests.kernel.devices import BLOCK, MIB, Disks, linear
from tests.thin_image import seal_file


def make(path: Path) -> None:
    with Pool.create(path, size="16M", engine="kernel") as pool:
        pool.create_device("a", MIB).write(0, b"content")


def open_kernel(path: Path) -> Pool:
    return Pool.open(path, engine="kernel")


@contextmanager
def refusal(kind: type[BlocksnapError], match: str) -> Iterator[None]:
    with pytest.raises(kind, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


# ---- what cannot be opened for writing, or at all


def test_a_pool_that_needs_a_check_is_read_and_names_the_repair(path: Path) -> None:
    make(path)
    with (path / "metadata").open("r+b") as file:
        file.seek(4)
        file.write(struct.pack("<I", 1))
    seal_file(path / "metadata", 0, "superblock")
    with open_kernel(path) as pool:
        assert (pool.read_only, pool.status().needs_check) == (True, True)
        assert pool.device("a").read(0, 7) == b"content"
        assert len(pool.usage()) == 1
        with refusal(NeedsCheckError, "pool check --clear-needs-check"):
            pool.create_device("b", MIB)
    UserPool.clear_needs_check(path / "metadata")
    with open_kernel(path) as pool:
        pool.device("a").write(0, b"changed")


def test_a_transaction_id_that_nobody_can_explain_is_refused_with_both(path: Path) -> None:
    make(path)
    pool = open_kernel(path)
    pool._engine.begin()
    pool._engine.end(1, 9)
    pool.close()
    with refusal(PoolFormatError, "describes transaction 1, but the pool is at 9: .*pool adopt"):
        open_kernel(path)
    with Pool.open(path, engine="kernel", adopt=True) as pool:
        assert pool.device("a").read(0, 7) == b"content"


def test_metadata_that_another_pool_uses_are_busy(control: Control, path: Path) -> None:
    make(path)
    with mount.LoopDevice.attach(path / "metadata") as m, mount.LoopDevice.attach(path / "data") as d:
        where: dict[str, Any] = {"metadata": m.path, "data": d.path, "catalog": path / "catalog.db"}
        target = ThinPoolTarget(16 * MIB, DeviceNumber.of(m.path), DeviceNumber.of(d.path), BLOCK)
        other = Device.create(control, "other", [target])
        with refusal(BusyError, "belongs to another pool"):
            Pool.open(engine="kernel", **where)
        other.remove()
        Pool.open(engine="kernel", **where).close()


@pytest.mark.parametrize("size", ["4K", "16K", "32K"])
def test_metadata_that_are_too_small_are_refused_and_leave_nothing(path: Path, size: str) -> None:
    with refusal(BlocksnapError, "metadata|too small"):
        Pool.create(path, size="16M", metadata_size=size, engine="kernel")
    assert not path.exists()


def test_truncated_parts_are_named(path: Path) -> None:
    make(path)
    for name, kind in (("data", PoolFormatError), ("metadata", DamagedMetadataError)):
        size = (path / name).stat().st_size
        with (path / name).open("r+b") as file:
            file.truncate(size // 2)
        with refusal(kind, rf"{name}.*(restore its size|truncated|metadata blocks)"):
            open_kernel(path)
        with (path / name).open("r+b") as file:
            file.truncate(size)
    open_kernel(path).close()


def test_a_device_that_is_not_there_is_named(path: Path) -> None:
    with refusal(DeviceNotFoundError, "/dev/nothing"):
        Pool.open(metadata="/dev/nothing", data="/dev/nothing2", catalog=path, engine="kernel")


# ---- devices that fail below a live pool


@pytest.fixture
def parts(control: Control, disks: Disks) -> dict[str, Device]:
    """Devices for metadata and data that can be made to fail."""
    sizes = {"metadata": 4 * MIB, "data": 16 * MIB}
    return {name: linear(control, name, disks.attach(name, size), size) for name, size in sizes.items()}


def fail(part: Device) -> None:
    (target,) = part.table()
    part.replace([OtherTarget(target.length, "error", "")])


def test_a_pool_whose_metadata_fail_says_so_in_one_line(parts: dict[str, Device], tmp_path: Path) -> None:
    where: dict[str, Any] = {name: part.path for name, part in parts.items()}
    where["catalog"] = tmp_path / "catalog.db"
    pool = Pool.create(engine="kernel", **where)
    device = pool.create_device("a", MIB)
    device.write(0, b"content")
    pool.commit()
    below = parts["metadata"].table()
    fail(parts["metadata"])
    with refusal(DeviceIOError, "failed|not committed|could not commit"):
        pool.create_device("b", MIB)
    with refusal(BlocksnapError, "failed|could not commit|could not complete"):
        device.write(0, b"more")
    assert pool.status().failed or pool.status().needs_check
    pool.abandon()
    parts["metadata"].replace(below)
    UserPool.clear_needs_check(parts["metadata"].path)
    with Pool.open(engine="kernel", **where) as pool:
        assert [each.name for each in pool.devices()] == ["a"]
        assert pool.device("a").read(0, 7) == b"content"
        assert not pool.check().findings


def test_data_that_fail_are_an_error_of_the_device_and_come_back(
    parts: dict[str, Device], tmp_path: Path
) -> None:
    where: dict[str, Any] = {name: part.path for name, part in parts.items()}
    with Pool.create(engine="kernel", catalog=tmp_path / "catalog.db", **where) as pool:
        device = pool.create_device("a", MIB)
        device.write(0, b"content")
        below = parts["data"].table()
        fail(parts["data"])
        with refusal(DeviceIOError, "thin device .*Input/output error: .*pool status"):
            device.read(0, 7)
        with refusal(DeviceIOError, "thin device"):
            device.write(0, b"x" * BLOCK)
        parts["data"].replace(below)
        assert device.read(0, 7) == b"content"
        device.write(0, b"changed")
        device.flush()


def test_a_loop_device_that_is_detached_below_stays_until_the_pool_is_closed(path: Path) -> None:
    """The kernel puts the detaching off: who forces it makes no open pool fail."""
    make(path)
    with open_kernel(path) as pool:
        (loop,) = mount.backing_loops(path / "data")
        with pytest.raises(BusyError):
            loop.detach(timeout=0)
        pool.device("a").write(MIB - 4, b"tail")
        pool.device("a").flush()
        assert pool.device("a").read(0, 7) == b"content"
    assert mount.backing_loops(path / "data") == []


def test_no_space_is_told_as_such(path: Path) -> None:
    with Pool.create(path, size="1M", engine="kernel") as pool:
        device = pool.create_device("a", "4M")
        with refusal(NoSpaceError, "its pool is full: delete devices, or .*pool extend"):
            device.write(0, b"x" * (2 * MIB))
