"""Pools on disks that refuse or lose writes (dm-flakey), fail whole, or have bad blocks (dm-dust).

With either engine: an error where somebody is told that data are safe, nothing wrong is read, and the mend
that the error names mends.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from blocksnap import metadata, pool_repair, pool_scrub
from blocksnap.device_mapper import Control, Device, LinearTarget, OtherTarget
from blocksnap.errors import (
    BlocksnapError,
    DamagedMetadataError,
    DeviceIOError,
    NeedsCheckError,
    PoolFormatError,
)
from blocksnap.pool import Pool
from blocksnap.pool_scrub import Unreadable
from blocksnap.user_pool import UserPool
from tests.kernel.devices import BLOCK, MIB, Disks, read_at
from tests.kernel.pool_load import Load
from tests.kernel.pools import let_go

SIZES = {"metadata": 2 * MIB, "data": 16 * MIB}
SIZE, BLOCKS = 4 * MIB, 20

both = pytest.mark.parametrize("engine", ["user", "kernel"])


class Disk:
    """A device that fails when it is told to."""

    def __init__(self, control: Control, disks: Disks, name: str) -> None:
        self._below = disks.attach(name, SIZES[name])
        self._length = SIZES[name]
        self.device = Device.create(control, name, [LinearTarget(self._length, self._below)])

    @property
    def path(self) -> str:
        return self.device.path

    def _become(self, kind: str, words: str) -> None:
        self.device.replace([OtherTarget(self._length, kind, words)], noflush=True)

    def refuse_writes(self) -> None:
        self._become("flakey", f"{self._below} 0 0 1 1 error_writes")

    def lose_writes(self) -> None:
        self._become("flakey", f"{self._below} 0 0 1 1 drop_writes")

    def fail(self) -> None:
        self._become("error", "")

    def break_sectors(self, offset: int, length: int) -> None:
        """Make sectors unreadable; who writes to one makes it good, as the disk has others to spare."""
        self._become("dust", f"{self._below} 0 512")
        for sector in range(offset // 512, (offset + length) // 512):
            self.device.message(f"addbadblock {sector}")
        self.device.message("enable")

    def heal(self) -> None:
        self.device.replace([LinearTarget(self._length, self._below)], noflush=True)


Parts = dict[str, Disk]


@pytest.fixture
def parts(control: Control, disks: Disks) -> Parts:
    return {name: Disk(control, disks, name) for name in SIZES}


@pytest.fixture
def where(parts: Parts, tmp_path: Path) -> dict[str, Any]:
    """A pool whose device "base" is shared with "snap" and lies in the first blocks of the data."""
    where: dict[str, Any] = {name: part.path for name, part in parts.items()}
    where["catalog"] = tmp_path / "catalog.db"
    with Pool.create(**where, block_size=BLOCK) as pool:
        base = pool.create_device("base", SIZE)
        base.write(0, b"x" * BLOCKS * BLOCK)
        base.snapshot("snap")
    return where


def opened(where: dict[str, Any], engine: str) -> AbstractContextManager[Pool]:
    return let_go(Pool.open(**where, engine=engine, direct_io=True))


def clear_needs_check(where: dict[str, Any]) -> None:
    """Do what "blocksnap pool check --clear-needs-check" does, which the error named."""
    with suppress(BlocksnapError):  # removes what a failed pool left in the kernel
        Pool.open(**where, read_only=True).close()
    assert not metadata.check(where["metadata"]).fatal
    if metadata.check(where["metadata"]).needs_check:
        UserPool.clear_needs_check(where["metadata"])


def assert_recovered(where: dict[str, Any], *possible: bytes) -> None:
    """Assert that the pool is sound, "snap" as it was and "base" in each sector something possible."""
    for engine in ("user", "kernel"):
        with Pool.open(**where, engine=engine, direct_io=True) as pool:
            assert pool.device("snap").read(0, BLOCKS * BLOCK) == b"x" * BLOCKS * BLOCK
            content = pool.device("base").read(0, BLOCKS * BLOCK)
            sectors = {content[at : at + 512] for at in range(0, len(content), 512)}
            assert sectors <= {letter * 512 for letter in (b"x", *possible)}
            pool.device("base").write(0, b"x")
            pool.device("base").flush()
        assert not [each for each in metadata.check(where["metadata"]).findings if each.severity == "fatal"]


def write_safely(pool: Pool, content: bytes) -> None:
    pool.device("base").write(0, content)
    pool.device("base").flush()


# ---- under load


@both
@pytest.mark.parametrize("part", ["metadata", "data"])
@pytest.mark.parametrize("way", [Disk.refuse_writes, Disk.fail])
def test_disk_that_fails_under_load_is_an_error_and_loses_nothing_that_was_flushed(
    way: Callable[[Disk], None], part: str, engine: str, parts: Parts, where: dict[str, Any]
) -> None:
    with opened(where, engine) as pool:
        load = Load(pool, BLOCKS)
        pool.create_device("other", MIB)
        way(parts[part])
        error = load.ends()
        assert isinstance(error, DeviceIOError | NeedsCheckError), error
        assert "\n" not in str(error)
        # A flush of the target "error" succeeds: without data to write a transaction may.
        with nullcontext() if (way, part) == (Disk.fail, "data") else pytest.raises(BlocksnapError):
            pool.create_device("another", MIB)
        parts[part].heal()
    clear_needs_check(where)
    assert_recovered(where, b"y")


@both
def test_disk_that_refuses_writes_can_still_be_read(engine: str, parts: Parts, where: dict[str, Any]) -> None:
    with opened(where, engine) as pool:
        parts["data"].refuse_writes()
        with pytest.raises(DeviceIOError):
            write_safely(pool, b"z" * 4096)
        assert pool.device("snap").read(0, BLOCKS * BLOCK) == b"x" * BLOCKS * BLOCK
        parts["data"].heal()
    clear_needs_check(where)
    assert_recovered(where, b"z")


# ---- disks that lie


@both
def test_data_that_a_disk_loses_harm_nobody_else(engine: str, parts: Parts, where: dict[str, Any]) -> None:
    with opened(where, engine) as pool:
        parts["data"].lose_writes()
        base = pool.device("base")
        base.write(0, b"z" * BLOCKS * BLOCK)
        base.flush()
        parts["data"].heal()
    with Pool.open(**where, engine=engine) as pool:
        assert pool.device("snap").read(0, BLOCKS * BLOCK) == b"x" * BLOCKS * BLOCK
    assert metadata.check(where["metadata"]).findings == ()


@both
def test_metadata_that_a_disk_loses_are_noticed_by_the_transaction_id(
    engine: str, parts: Parts, where: dict[str, Any]
) -> None:
    with opened(where, engine) as pool:
        parts["metadata"].lose_writes()
        pool.create_device("lost", MIB)
        pool.device("snap").read(0, 4096)
    parts["metadata"].heal()
    with pytest.raises(PoolFormatError, match="pool adopt"):
        Pool.open(**where, engine=engine).close()
    with Pool.open(**where, engine=engine, adopt=True) as pool:
        assert [device.name for device in pool.devices()] == ["base", "snap"]
        assert pool.device("snap").read(0, BLOCKS * BLOCK) == b"x" * BLOCKS * BLOCK
    assert_recovered(where)


# ---- bad blocks


@both
def test_bad_blocks_of_the_data_are_told_by_scrub_and_gone_once_written(
    engine: str, parts: Parts, where: dict[str, Any]
) -> None:
    with Pool.open(**where, engine=engine, direct_io=True) as pool:
        parts["data"].break_sectors(3 * BLOCK + 4096, 8192)
        with pytest.raises(DeviceIOError):
            pool.device("base").read(0, BLOCKS * BLOCK)
        assert pool.device("base").read(4 * BLOCK, BLOCK) == b"x" * BLOCK
        found = pool_scrub.scrub(lambda: nullcontext(pool), Path(parts["data"].path))
        assert found.unreadable == tuple(
            Unreadable(name, 3 * BLOCK + 4096, 8192, 3 * BLOCK + 4096) for name in ("base", "snap")
        )
        # What is shared cannot be copied; whole blocks need no copy.
        with pytest.raises(DeviceIOError):
            pool.device("base").write(3 * BLOCK, b"z" * 4096)
        pool.device("base").write(3 * BLOCK, b"z" * BLOCK)
        pool.device("base").flush()
        assert pool.device("base").read(3 * BLOCK, BLOCK) == b"z" * BLOCK
        pool.device("snap").write(3 * BLOCK, b"x" * BLOCK)
        assert pool_scrub.scrub(lambda: nullcontext(pool), Path(parts["data"].path)).unreadable == ()
        parts["data"].heal()
    assert_recovered(where, b"z")


@both
def test_bad_block_of_the_metadata_is_refused_and_repaired_into_another_device(
    engine: str, parts: Parts, where: dict[str, Any], disks: Disks
) -> None:
    block = bad_tree_block(where["metadata"])
    parts["metadata"].break_sectors(block * 4096, 4096)
    if engine == "kernel":
        with pytest.raises(DamagedMetadataError, match="pool repair"):
            Pool.open(**where, engine=engine)
    assert metadata.check(where["metadata"]).fatal
    disks.attach("new", SIZES["metadata"])
    repaired = pool_repair.repair(**where, output=disks.path("new"))
    assert repaired.metadata == disks.path("new")
    parts["metadata"].heal()
    again = {**where, "metadata": disks.path("new")}
    with Pool.open(**again, engine=engine, adopt=True) as pool:
        names = {device.name for device in pool.devices()}
        assert names | {lost.name for lost in repaired.lost_devices} == {"base", "snap"}
        for name in names:
            content = pool.device(name).read(0, BLOCKS * BLOCK)
            assert set(content) <= set(b"x\0")
    assert metadata.check(disks.path("new")).findings == ()


def bad_tree_block(path: str) -> int:
    """Return the root of the mapping tree: the most that one block can cost."""
    return int.from_bytes(read_at(path, 320, 8), "little")
