"""Pools under test, by either engine; drivers under test, each on a file system of its own kind."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blocksnap import drivers, mount
from blocksnap.device_mapper import Control
from blocksnap.pool import Pool
from tests.driver_params import driver_params
from tests.file_systems import can_mount, fresh_file_system
from tests.kernel.devices import sweep

OpenDriver = Callable[[], drivers.Driver]


# ---- pools


@pytest.fixture(params=["user", pytest.param("kernel", marks=pytest.mark.kernel)])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def nothing_left(engine: str) -> Iterator[None]:
    """Nothing of a pool may stay in the kernel; what a failed test left is swept."""
    yield
    if engine == "kernel":
        with Control.open() as control:
            assert sweep(control) == []
        assert [loop.backing_path for loop in mount.loop_devices() if "/pool/" in loop.backing_path] == []


@pytest.fixture
def reopen(tmp_path: Path, engine: str) -> Callable[[], Pool]:
    return lambda: Pool.open(tmp_path / "pool", engine=engine)


@pytest.fixture
def pool(tmp_path: Path, engine: str, nothing_left: None) -> Iterator[Pool]:  # noqa: ARG001 - it looks last
    with Pool.create(tmp_path / "pool", size="16M", block_size="64K", engine=engine) as made:
        yield made


# ---- drivers

SIZE = 4 << 30


@pytest.fixture(params=driver_params())
def registered_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def root(tmp_path: Path, registered_name: str) -> Iterator[Path]:
    """A directory on a fresh file system; an ordinary user gets a plain one."""
    kind = drivers.driver_class(registered_name).file_system
    if not can_mount(kind):
        yield tmp_path / "root"
        return
    with fresh_file_system(tmp_path, kind, SIZE) as target:
        yield target / "root"


@pytest.fixture
def driver_name(registered_name: str, root: Path) -> str:
    if reason := dict(drivers.available(root))[registered_name]:
        pytest.skip(f"{registered_name}: {reason}")
    return registered_name


@pytest.fixture
def open_driver(root: Path, driver_name: str) -> Iterator[OpenDriver]:
    """Open the driver anew, the one before being closed; afterwards nothing may stay mounted."""
    opened: list[drivers.Driver] = []

    def open_again() -> drivers.Driver:
        for driver in opened:
            driver.close()
        opened.append(drivers.open(driver_name, root))
        return opened[-1]

    yield open_again
    driver = open_again()
    driver.cleanup()
    driver.close()
    assert mounts_below(root) == []


@pytest.fixture
def driver(open_driver: OpenDriver) -> drivers.Driver:
    return open_driver()


def mounts_below(root: Path) -> list[str]:
    return [entry.target for entry in mount.mount_table() if entry.target.startswith(f"{root}/")]
