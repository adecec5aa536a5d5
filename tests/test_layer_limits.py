"""How much fits into a layer: the storage option `size` of the driver thin, and who refuses it."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap import drivers, errors, pool_client
from blocksnap.drivers.thin import ThinDriver

reason = ThinDriver.missing(Path("/tmp"))
needs_thin = pytest.mark.skipif(reason is not None, reason=f"thin: {reason}")

MIB = 1 << 20


@pytest.fixture(params=["ext4", "xfs"])
def driver(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ThinDriver]:
    kind = str(request.param)
    if reason is not None:
        pytest.skip(f"thin: {reason}")
    if kind == "xfs" and (os.geteuid() != 0 or shutil.which("mkfs.xfs") is None):
        pytest.skip("needs root and mkfs.xfs")
    driver = ThinDriver(tmp_path / "root", size="4G", base_size="512M", filesystem=kind)
    yield driver
    driver.cleanup()


def capacity(path: Path) -> int:
    info = os.statvfs(path)
    return info.f_blocks * info.f_frsize


def test_layer_has_the_size_that_was_asked_for_and_its_children_too(driver: ThinDriver) -> None:
    driver.create("base")
    with driver.mounted("base") as root:
        (root / "file").write_text("text")
    driver.create_read_write("large", "base", storage_opt={"size": "1G"})
    driver.create("child", "large")
    driver.snapshot("copy", "large")
    for id in ("large", "child", "copy"):
        assert driver.metadata(id)["DeviceSize"] == str(1024 * MIB)
        with driver.mounted(id) as root:
            assert 900 * MIB < capacity(root) <= 1024 * MIB
            assert (root / "file").read_text() == "text"
    with driver.mounted("base") as root:
        assert capacity(root) <= 512 * MIB
    assert driver.changes("large", "base") == []


def test_layer_on_a_mounted_parent_is_grown_too(driver: ThinDriver) -> None:
    driver.create("base")
    with driver.mounted("base") as root:
        (root / "file").write_text("text")
        driver.create_read_write("large", "base", storage_opt={"size": "1G"})
    with driver.mounted("large") as root:
        assert capacity(root) > 900 * MIB
        assert (root / "file").read_text() == "text"


def test_full_layer_says_so_at_its_size(driver: ThinDriver) -> None:
    driver.create_read_write("layer", storage_opt={"size": "640M"})
    with driver.mounted("layer") as root, (root / "file").open("wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space") as raised:
            os.posix_fallocate(file.fileno(), 0, 640 * MIB)
        assert raised.value.errno == errno.ENOSPC
        os.posix_fallocate(file.fileno(), 0, 450 * MIB)


def test_size_below_that_of_the_parent_is_refused(driver: ThinDriver) -> None:
    with pytest.raises(errors.ArgumentError, match="begins with 536870912 bytes and cannot be limited to"):
        driver.create_read_write("small", storage_opt={"size": "100M"})
    assert driver.layers() == []


def kill_while_it_grows(root: Path, id: str) -> None:
    program = f"""import os, pathlib
from blocksnap.drivers.thin import ThinDriver
ThinDriver._grow_file_system = lambda *_: os.kill(os.getpid(), {int(signal.SIGKILL)})
with ThinDriver(pathlib.Path({str(root)!r})) as driver:
    driver.create_read_write({id!r}, "base", storage_opt={{"size": "1G"}})
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL


def test_device_that_a_killed_process_did_not_finish_is_no_layer_and_in_nobodys_way(
    driver: ThinDriver,
) -> None:
    driver.create("base")
    for id in ("limited", "plain"):
        kill_while_it_grows(driver.root, id)
    assert driver.layers() == ["base"]
    pool = pool_client.serve(driver.root / "pool")
    assert {"limited", "plain"} <= {device.name for device in pool.devices()}
    pool.close()
    driver.create_read_write("limited", "base", storage_opt={"size": "1G"})
    driver.create_read_write("plain", "base")
    assert driver.layers() == ["base", "limited", "plain"]


@pytest.mark.parametrize("name", ["vfs", "overlay"])
def test_driver_that_cannot_limit_says_so(tmp_path: Path, name: str) -> None:
    if lack := dict(drivers.available(tmp_path))[name]:
        pytest.skip(f"{name}: {lack}")
    with (
        drivers.open(name, tmp_path / "root") as driver,
        pytest.raises(errors.NotSupportedError, match=f'"{name}" cannot limit layer "layer" to a size'),
    ):
        driver.create("layer", storage_opt={"size": "1G"})
