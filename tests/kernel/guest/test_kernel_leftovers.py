"""What `doctor` finds of pools that the kernel runs for nobody, and what a new pool may not take."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blocksnap import mount
from blocksnap.cli.leftovers import Leftover, dead_cookies, dead_pools
from blocksnap.device_mapper import Control
from blocksnap.dm_cookie import own_left_cookies, udev_cookie
from blocksnap.errors import ArgumentError, BlocksnapError, BusyError
from blocksnap.kernel_leftovers import left_pools
from blocksnap.pool import Pool
from tests.kernel.devices import MIB, leftovers
from tests.kernel.kills import killed
from tests.kernel.udevd import udevd

__all__ = ["udevd"]


def live(*, suspended: bool = False) -> list[str]:
    with Control.open() as control:
        return [each.uuid for each in leftovers(control) if not suspended or each.info().suspended]


def make(path: Path) -> None:
    with Pool.create(path, size="16M", engine="kernel") as pool:
        pool.create_device("a", MIB).write(0, b"content")


# ---- pools of processes that died


def die_with_a_suspended_device(path: Path) -> None:
    pool = Pool.open(path, engine="kernel")
    pool.device("a").read(0, 1)
    with Control.open() as control:
        (thin,) = [each for each in leftovers(control) if not each.uuid.endswith("-pool")]
        thin.suspend()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_pool_that_is_live_for_nobody_is_found_and_taken_out(path: Path) -> None:
    make(path)
    assert killed(lambda: die_with_a_suspended_device(path))
    assert len(live(suspended=True)) == 1
    (leftover,) = dead_pools()
    assert str(path / "metadata") in leftover.description
    leftover.remove()
    assert live() == []
    with Pool.open(path) as pool:
        assert pool.device("a").read(0, 7) == b"content"


def test_a_pool_of_a_living_process_is_no_leftover(path: Path) -> None:
    make(path)
    with Pool.open(path, engine="kernel"):
        assert left_pools() == []


def test_a_pool_with_a_mounted_device_names_its_user(path: Path, tmp_path: Path) -> None:
    make(path)
    (tmp_path / "mounted").mkdir()

    def die() -> None:
        pool = Pool.open(path, engine="kernel")
        node = pool.create_device("b", "8M").hold().path  # type: ignore[union-attr]
        subprocess.run(["mkfs.ext4", "-q", node], check=True)
        mount.mount(node, tmp_path / "mounted", "ext4")
        os.kill(os.getpid(), signal.SIGKILL)

    assert killed(die)
    (leftover,) = dead_pools()
    with pytest.raises(BusyError, match=r"mounted at .*unmount or close it first"):
        leftover.remove()
    mount.unmount(tmp_path / "mounted")
    leftover.remove()
    assert live() == []


def test_semaphores_of_a_killed_process_are_found_by_their_age(udevd: bool) -> None:
    def die() -> None:
        with udev_cookie():
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed(die)
    keys = own_left_cookies(0)
    assert len(keys) == int(udevd)
    assert list[Leftover](dead_cookies()) == []  # who knows whether its maker is at work
    for leftover in dead_cookies(older_than=0):
        assert f"{keys[0]:#x}" in leftover.description
        leftover.remove()
    assert own_left_cookies(0) == []


# ---- what a new pool may not take


@pytest.fixture
def devices(path: Path) -> Iterator[dict[str, Any]]:
    path.mkdir()
    for name in ("m", "d"):
        with (path / name).open("wb") as file:
            file.truncate(16 * MIB)
    with mount.LoopDevice.attach(path / "m") as m, mount.LoopDevice.attach(path / "d") as d:
        yield {"metadata": m.path, "data": d.path, "catalog": path / "catalog.db"}


@pytest.mark.parametrize("engine", ["user", "kernel"])
def test_devices_that_carry_something_or_are_in_use_are_refused(
    devices: dict[str, Any], engine: str, tmp_path: Path
) -> None:
    subprocess.run(["mkfs.ext4", "-q", devices["data"]], check=True)
    with pytest.raises(ArgumentError, match=f"{devices['data']} carries an ext.*wipe"):
        Pool.create(**devices, engine=engine)
    (tmp_path / "mounted").mkdir()
    mount.mount(devices["data"], tmp_path / "mounted", "ext4")
    try:
        with pytest.raises(BusyError, match=f"{devices['data']} is mounted or in use"):
            Pool.create(**devices, engine=engine)
    finally:
        mount.unmount(tmp_path / "mounted")
    assert not devices["catalog"].exists()
    subprocess.run(["wipefs", "-qa", devices["data"]], check=True)
    Pool.create(**devices, engine=engine).close()
    with pytest.raises(BlocksnapError, match=r"exists already|carries the metadata of a thin pool"):
        Pool.create(**devices, engine=engine)
