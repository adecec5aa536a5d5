"""Pools of the kernel engine: what a killed process leaves, who holds a device, what cannot be opened."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blocksnap import mount
from blocksnap.device_mapper import Control
from blocksnap.errors import (
    BlocksnapError,
    BusyError,
    DamagedMetadataError,
    NotSupportedError,
    PoolFormatError,
    PrivilegeError,
)
from blocksnap.pool import Pool
from tests.kernel.devices import leftovers
from tests.kernel.kills import killed

SIZE = 1 << 20
BLOCK = 64 << 10


def pool_loops() -> list[str]:
    return [loop.backing_path for loop in mount.loop_devices() if "/pool/" in loop.backing_path]


def open_kernel(path: Path, *, read_only: bool = False) -> Pool:
    return Pool.open(path, engine="kernel", read_only=read_only)


def make(path: Path) -> None:
    with Pool.create(path, size="16M", engine="kernel") as pool:
        pool.create_device("base", SIZE).write(0, b"base")
        pool.device("base").snapshot("snap")


def live() -> list[str]:
    with Control.open() as control:
        return [device.uuid for device in leftovers(control)]


# ---- two engines, one pool


def test_each_engine_reads_what_the_other_wrote(path: Path) -> None:
    make(path)
    for engine in ("user", "kernel", "user"):
        with Pool.open(path, engine=engine) as pool:
            assert pool.status().engine == engine
            device = pool.device("snap")
            count = int(device.read(100, 1)[0])
            device.write(100, bytes([count + 1]))
            assert device.read(0, 4) == b"base"
    with Pool.open(path) as pool:
        assert pool.device("snap").read(100, 1) == b"\x03"
        assert not pool.check().damaged


@pytest.mark.parametrize("engine", ["user", "kernel"])
def test_what_a_killed_process_left_live_is_taken_out_by_the_next_open(path: Path, engine: str) -> None:
    make(path)

    def die() -> None:
        pool = open_kernel(path)
        pool.device("base").write(0, b"more")
        pool.device("base").flush()
        os.kill(os.getpid(), signal.SIGKILL)

    assert killed(die)
    assert len(live()) == 2
    with Pool.open(path, engine=engine) as pool:
        assert pool.device("base").read(0, 4) == b"more"


def test_a_pool_that_another_process_runs_is_busy(path: Path) -> None:
    make(path)
    with open_kernel(path) as pool:
        for engine in ("user", "kernel"):
            with pytest.raises(BusyError, match="in use by another process"):
                Pool.open(path, engine=engine)
        assert pool.device("base").read(0, 4) == b"base"


def test_a_pool_on_block_devices_is_used_as_it_is(path: Path) -> None:
    path.mkdir()
    for name in ("m", "d"):
        with (path / name).open("wb") as file:
            file.truncate(16 << 20)
    with mount.LoopDevice.attach(path / "m") as m, mount.LoopDevice.attach(path / "d") as d:
        where: dict[str, Any] = {"metadata": m.path, "data": d.path, "catalog": path / "catalog.db"}
        with Pool.create(**where, engine="kernel") as pool:
            pool.create_device("a", SIZE).write(0, b"x" * BLOCK)
            assert [each.mapped_bytes for each in pool.usage()] == [BLOCK]
            pool.device("a").write(BLOCK, b"y")
            assert [each.mapped_bytes for each in pool.usage()] == [2 * BLOCK]
            assert len(pool_loops()) == 2
        with Pool.open(**where) as pool:
            assert pool.device("a").read(BLOCK, 1) == b"y"


# ---- devices in use


def test_deleting_a_mounted_device_names_its_mount(path: Path, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    with Pool.create(path, size="64M", engine="kernel") as pool:
        device = pool.create_device("a", "32M")
        with device.hold() as handle:
            node = str(handle.path)  # type: ignore[union-attr]
            subprocess.run(["mkfs.ext4", "-q", node], check=True)
        mounted = device.hold()
        mount.mount(mounted.path, tmp_path / "mounted", "ext4")  # type: ignore[union-attr]
        mounted.close()
        try:
            (tmp_path / "mounted/file").write_text("kept by the freeze")
            snap = device.snapshot("snap")
            with pytest.raises(BusyError, match=f"mounted at {tmp_path}/mounted"):
                device.delete()
            with pytest.raises(BusyError, match="mounted at"):
                pool.close()
        finally:
            mount.unmount(tmp_path / "mounted")
        device.delete()
        with snap.hold() as handle:
            subprocess.run(["e2fsck", "-fn", handle.path], check=True)  # type: ignore[union-attr]


# ---- what cannot be opened


def test_blocks_that_only_the_user_engine_has_are_refused(path: Path) -> None:
    with pytest.raises(NotSupportedError, match="64 KiB to 1 GiB"):
        Pool.create(path, size="16M", block_size="4K", engine="kernel")
    assert not path.exists()
    Pool.create(path, size="16M", block_size="4K").close()
    with pytest.raises(NotSupportedError, match='engine="user"'):
        open_kernel(path)


def test_damaged_metadata_never_reach_the_kernel(path: Path) -> None:
    make(path)
    with (path / "metadata").open("r+b") as file:
        for block in range(1, 40):
            file.seek(block * 4096)
            if any(content := file.read(4096)):
                file.seek(block * 4096)
                file.write(bytes([content[0] ^ 1]))
    with pytest.raises((DamagedMetadataError, PoolFormatError)):
        open_kernel(path)
    assert live() == []


def test_a_read_only_pool_is_read_and_refuses_changes(path: Path) -> None:
    make(path)
    with open_kernel(path, read_only=True) as pool:
        assert pool.status().read_only
        assert pool.device("base").read(0, 4) == b"base"
        with pytest.raises(PrivilegeError, match="read-only"):
            pool.device("base").write(0, b"x")
        with pytest.raises(PrivilegeError, match="read-only"):
            pool.create_device("b", SIZE)


def test_an_error_is_one_line(path: Path) -> None:
    make(path)
    (path / "metadata").write_bytes(bytes(4096))
    with pytest.raises(BlocksnapError) as caught:
        open_kernel(path)
    assert "\n" not in str(caught.value)
