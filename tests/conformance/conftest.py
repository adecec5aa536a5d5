"""Drivers under test, each with an ext4 file system of its own."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blocksnap import drivers, errors, mount

OpenDriver = Callable[[], drivers.Driver]


def can_loop() -> bool:
    return os.geteuid() == 0 and os.access("/dev/loop-control", os.W_OK) and bool(shutil.which("mkfs.ext4"))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A directory on a fresh ext4; an ordinary user gets a plain one."""
    if not can_loop():
        yield tmp_path / "root"
        return
    image, target = tmp_path / "image", tmp_path / "mounted"
    target.mkdir()
    with image.open("wb") as file:
        file.truncate(4 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    with mount.LoopDevice.attach(image) as loop:
        mount.mount(loop.path, target, "ext4")
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


@pytest.fixture(params=[name for name, _ in drivers.available()])
def driver_name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = str(request.param)
    if reason := dict(drivers.available(tmp_path))[name]:
        pytest.skip(f"{name}: {reason}")
    return name


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
