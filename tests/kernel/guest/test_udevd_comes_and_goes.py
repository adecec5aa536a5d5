"""udevd that starts, stops and hangs under a live pool: every device has its node, and no cookie is left."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.device_mapper import Control
from blocksnap.dm_target import DeviceNumber
from blocksnap.kernel_device import KernelDevice
from blocksnap.pool import Pool
from blocksnap.udev import left_cookies, udev_runs
from tests.kernel.devices import MIB, leftovers
from tests.kernel.udevd import running_udevd

pytestmark = pytest.mark.skipif(udev_runs(), reason="udevd runs on this machine")


@pytest.fixture(autouse=True)
def stale_links() -> Iterator[None]:
    """Remove the links that udevd made for devices which were removed without it."""
    yield
    for link in Path("/dev/mapper").iterdir():
        if not link.exists():
            link.unlink()


@pytest.fixture
def pool(control: Control, tmp_path: Path) -> Iterator[Pool]:
    with Pool.create(tmp_path / "pool", size=16 * MIB, engine="kernel") as made:
        yield made
    assert leftovers(control) == []
    assert left_cookies() == []
    assert list(Path("/dev").glob("dm-*")) == []


def use(pool: Pool, name: str) -> None:
    """Make a device and a snapshot, which both get nodes, and delete the device."""
    device = pool.create_device(name, MIB)
    device.write(0, name.encode())
    with device.snapshot(f"snapshot of {name}").hold() as handle:
        assert isinstance(handle, KernelDevice)
        assert DeviceNumber.of(handle.path)
    device.delete()


def test_udevd_may_start_and_stop_under_a_live_pool(pool: Pool) -> None:
    pool.create_device("open all the time", MIB).write(0, b"x")
    use(pool, "before")
    with running_udevd():
        use(pool, "while it runs")
    use(pool, "after")
    assert pool.device("open all the time").read(0, 1) == b"x"


def test_a_pool_opened_while_udevd_ran_is_closed_without_it(control: Control, tmp_path: Path) -> None:
    with running_udevd():
        pool = Pool.create(tmp_path / "pool", size=16 * MIB, engine="kernel")
        pool.create_device("device", MIB).write(0, b"x")
    pool.close()
    assert leftovers(control) == []
    assert left_cookies() == []


def test_a_hanging_udevd_delays_a_change_but_does_not_stop_it(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blocksnap.dm_cookie._TIMEOUT_SECONDS", 1.0)
    with running_udevd():
        processes = udevd_processes()
        try:
            for process in processes:
                os.kill(process, signal.SIGSTOP)
            begun = time.monotonic()
            pool.create_device("device", MIB).write(0, b"x")
            assert time.monotonic() - begun >= 1
            assert left_cookies() == []
        finally:
            for process in processes:
                os.kill(process, signal.SIGCONT)
        pool.device("device").delete()


def udevd_processes() -> list[int]:
    found = [path for path in Path("/proc").glob("[0-9]*/comm") if "udevd" in path.read_text()]
    assert found
    return [int(path.parent.name) for path in found]
