"""Drivers under test, each with a file system of its own, of the kind that the driver is measured on."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blocksnap import drivers, errors, mount
from blocksnap.amplification.testbed import make_file_system, missing_for

OpenDriver = Callable[[], drivers.Driver]

SIZE = 4 << 30


def can_loop(file_system: str) -> bool:
    may = os.geteuid() == 0 and os.access("/dev/loop-control", os.W_OK)
    return may and missing_for(file_system) is None


@pytest.fixture(params=[name for name, _ in drivers.available()])
def registered_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def root(tmp_path: Path, registered_name: str) -> Iterator[Path]:
    """A directory on a fresh file system; an ordinary user gets a plain one."""
    kind = drivers.driver_class(registered_name).file_system
    if not can_loop(kind):
        yield tmp_path / "root"
        return
    image, target = tmp_path / "image", tmp_path / "mounted"
    target.mkdir()
    make_file_system(image, SIZE, kind)
    with mount.LoopDevice.attach(image) as loop:
        mount.mount(loop.path, target, kind)
        try:
            yield target / "root"
        finally:
            unmount_when_free(target)


def unmount_when_free(target: Path, seconds: float = 20) -> None:
    """Unmount; a server of the driver's may need a moment to end after its last client has left."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            mount.unmount(target)
            return
        except errors.BusyError:
            if time.monotonic() > deadline:
                mount.unmount(target, lazy=True)
                raise
            time.sleep(0.05)


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
