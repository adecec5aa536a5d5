"""The driver thin beyond what all drivers do: its pool, its figures, its server, real images."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap import drivers, errors, metadata, mount, pool_client
from blocksnap.amplification.testbed import Testbed, open_testbed
from blocksnap.drivers.devicemapper import DeviceMapperDriver
from blocksnap.drivers.thin import ThinDriver
from blocksnap.graph import ImageGraph
from blocksnap.pool import Pool
from tests.pool_servers import loops_below, mounts_below, needs_mounts
from tests.thin_tools import assert_sound, needs_thin_tools
from tests.trees import compare_trees

pytestmark = needs_mounts

MIB = 1 << 20


both_engines = pytest.mark.parametrize(
    "kind", [ThinDriver, pytest.param(DeviceMapperDriver, marks=pytest.mark.kernel)], indirect=True
)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> type[ThinDriver]:
    """The user engine's driver, unless the test is parametrized with `both_engines`."""
    found: type[ThinDriver] = getattr(request, "param", ThinDriver)
    return found


@pytest.fixture
def root(tmp_path: Path, kind: type[ThinDriver]) -> Iterator[Path]:
    """Where a driver's root is made; nothing may stay mounted, and its pool must be sound and free."""
    root = tmp_path / "root"
    yield root
    if (root / "pool").exists():
        with kind(root) as driver:
            driver.cleanup()
        assert not metadata.check(root / "pool" / "metadata").findings
        if shutil.which("thin_check") and kind is ThinDriver:  # it opens no files in a guest's memory
            assert_sound(root / "pool" / "metadata")
    assert (mounts_below(tmp_path), loops_below(tmp_path)) == ([], [])


@pytest.fixture
def driver(root: Path, kind: type[ThinDriver]) -> Iterator[ThinDriver]:
    with kind(root, size="1G") as opened:
        yield opened


def fill(driver: drivers.Driver, id: str, name: str, content: bytes) -> None:
    with driver.mounted(id) as path:
        (path / name).write_bytes(content)


def write_synced(path: Path, megabytes: int) -> None:
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(MIB))
            os.fsync(file.fileno())


# ---- the pool ----------------------------------------------------------------------------------------------


def test_options_make_the_pool_and_the_base(root: Path) -> None:
    with ThinDriver(root, size="256M", block_size="16K", base_size="2G", preallocate=True) as driver:
        driver.create("layer")
        pool = pool_client.connect(root / "pool")
        assert pool is not None
        with pool:
            assert (pool.status().block_size, pool.status().data_bytes) == (16 << 10, 256 * MIB)
            assert (pool.device("layer").size, pool.device("layer").origin) == (2 << 30, ".base")
        with driver.mounted("layer") as path:
            space = os.statvfs(path)
            assert 1.8 * (1 << 30) < space.f_blocks * space.f_frsize <= 2 << 30
    assert (root / "pool" / "data").stat().st_blocks * 512 >= 256 * MIB


def test_pool_with_other_blocks_is_refused(driver: ThinDriver) -> None:
    with pytest.raises(errors.ArgumentError, match="blocks of 64K"):
        ThinDriver(driver.root, block_size="16K")
    ThinDriver(driver.root, block_size="64K").close()


def test_unknown_options_are_refused(root: Path) -> None:
    with pytest.raises(errors.ArgumentError, match="ext4 or xfs"):
        drivers.open("thin", root, filesystem="vfat")
    with pytest.raises(errors.ArgumentError, match="block_size"):
        drivers.open("thin", root, sizes="1G")


def test_pool_whose_making_was_interrupted_is_made_again(root: Path) -> None:
    (root / "pool").mkdir(parents=True)
    for name in ("metadata", "data", "catalog.db", "catalog.db.creating"):
        (root / "pool" / name).touch()
    with ThinDriver(root, size="64M") as driver:
        driver.create("layer")
        assert driver.layers() == ["layer"]


def test_base_whose_making_was_interrupted_is_made_again(driver: ThinDriver) -> None:
    with pool_client.serve(driver.root / "pool") as pool:
        pool.create_device(".base", "1M")
    driver.create("layer")
    with driver.mounted("layer") as path:
        assert os.listdir(path) == []


def test_devices_that_are_no_layers_are_left_alone(driver: ThinDriver) -> None:
    driver.create("layer")
    with pool_client.serve(driver.root / "pool") as pool:
        pool.create_device("mine", "1M")
    assert driver.layers() == ["layer"]
    assert not driver.exists("mine")
    with pytest.raises(errors.DeviceExistsError, match="mine"):
        driver.create("mine")
    driver.cleanup()
    with Pool.open(driver.root / "pool") as pool:
        assert [device.name for device in pool.devices()] == [".base", "layer", "mine"]


@both_engines
def test_full_pool_is_an_error_and_serves_on_when_extended(root: Path, kind: type[ThinDriver]) -> None:
    with kind(root, size="64M", base_size="256M") as driver:
        driver.create("layer")
        with driver.mounted("layer") as path, pytest.raises(OSError, match=r"Input/output error|No space"):
            write_synced(path / "large", 96)
        with pool_client.serve(root / "pool") as pool:
            pool.extend(size="192M")
        driver.create("other")
        fill(driver, "other", "file", os.urandom(40 * MIB))


@pytest.mark.skipif(
    shutil.which("mkfs.xfs") is None or "xfs" not in Path("/proc/filesystems").read_text(),
    reason="needs xfs and mkfs.xfs",
)
def test_layers_on_xfs(root: Path) -> None:
    with ThinDriver(root, size="1G", filesystem="xfs") as driver:
        driver.create("base")
        fill(driver, "base", "file", b"base")
        driver.create_read_write("child", "base")
        with driver.mounted("base") as base, driver.mounted("child") as child:
            assert (child / "file").read_bytes() == b"base"
            (child / "new").write_text("new")
            assert os.listdir(base) == ["file"]
        assert [(change.path, change.kind) for change in driver.changes("child", "base")] == [("/new", "A")]


# ---- layers ------------------------------------------------------------------------------------------------


def test_child_of_a_parent_that_is_written_to_is_whole(driver: ThinDriver) -> None:
    driver.create("parent")
    with driver.mounted("parent") as path:
        for number in range(50):
            (path / f"file {number}").write_bytes(os.urandom(20_000))
        driver.create("child", "parent")
    with driver.mounted("parent") as parent, driver.mounted("child") as child:
        assert compare_trees(parent, child) == []


@both_engines
def test_container_is_snapshotted_while_it_is_written_to(driver: ThinDriver) -> None:
    driver.create("base")
    driver.create_read_write("container", "base")
    with driver.mounted("container") as path, (path / "log").open("wb", buffering=0) as log:
        log.write(b"before")
        driver.snapshot("copy", "container")
        log.write(b"after")
        assert driver.parent("copy") == "base"
        with driver.mounted("copy") as copy:
            assert (copy / "log").read_bytes() == b"before"
            (copy / "log").write_bytes(b"its own way")
        assert (path / "log").read_bytes() == b"beforeafter"
    driver.remove("container")
    with driver.mounted("copy") as copy:
        assert (copy / "log").read_bytes() == b"its own way"


@both_engines
def test_layer_that_had_children_is_written_to_again(driver: ThinDriver) -> None:
    driver.create("parent")
    driver.create("child", "parent")
    with driver.mounted("parent") as path:
        with pytest.raises(OSError, match="Read-only"):
            (path / "file").write_text("x")
        driver.remove("child")
        with driver.mounted("parent"):
            pass
    fill(driver, "parent", "file", b"x")


def test_metadata_and_status_tell_what_docker_tells(driver: ThinDriver) -> None:
    driver.create("layer")
    with driver.mounted("layer") as path:
        found = driver.metadata("layer")
        assert (found["DeviceName"], found["DeviceSize"]) == ("layer", str(10 << 30))
        assert found["MountPoint"] == str(path)
        assert found["LoopDevice"].startswith("/dev/loop")
    assert "MountPoint" not in driver.metadata("layer")
    rows = dict(driver.status())
    assert (rows["Pool Blocksize"], rows["Backing Filesystem"], rows["Layers"]) == ("64K", "ext4", "1")
    assert int(rows["Data Space Total (bytes)"]) == 1 << 30
    assert int(rows["Data Space Used (bytes)"]) + int(rows["Data Space Available (bytes)"]) == 1 << 30


def test_two_processes_share_a_root_and_its_server(driver: ThinDriver) -> None:
    driver.create("base")
    with driver.mounted("base") as path:
        (path / "file").write_text("seen by both")
        program = (
            "import sys; from blocksnap import drivers\n"
            "with drivers.open('thin', sys.argv[1]) as driver:\n"
            "    with driver.mounted('base') as path: print((path / 'file').read_text())\n"
            "    driver.create_read_write('theirs', 'base')\n"
            "    print(dict(driver.status())['Server'])\n"
        )
        words = [sys.executable, "-c", program, str(driver.root)]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
        assert (path / "file").exists()
    assert text == ["seen by both", dict(driver.status())["Server"]]
    assert driver.layers() == ["base", "theirs"]


def test_driver_works_in_a_forked_process(driver: ThinDriver) -> None:
    driver.create("base")
    child = os.fork()
    if child == 0:
        try:
            driver.create("theirs", "base")
            driver.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    driver.create("ours", "base")
    assert driver.layers() == ["base", "ours", "theirs"]


def test_closed_driver_leaves_its_pool_to_others(driver: ThinDriver) -> None:
    driver.create("base")
    driver.close()
    with Pool.open(driver.root / "pool") as pool:
        assert [device.name for device in pool.devices()] == [".base", "base"]


# ---- figures -----------------------------------------------------------------------------------------------


@contextmanager
def quiet_disk(directory: Path) -> Iterator[Testbed]:
    """Give one whose file system notes no times meanwhile: how often it would depends on the machine."""
    with open_testbed(directory, "disk", 512 * MIB, on_loop=True) as bed:
        subprocess.run(["mount", "-o", "remount,lazytime,commit=600", bed.root], check=True)
        yield bed


def written_by_pool(figures: drivers.Accounting) -> int:
    parts = (figures.data_bytes, figures.copy_bytes, figures.zero_filled_bytes, figures.metadata_bytes)
    assert None not in parts
    return sum(part for part in parts if part is not None)


@pytest.mark.parametrize("block_size", [16 << 10, 64 << 10, MIB])
def test_figures_add_up_to_what_the_disk_counts(tmp_path: Path, block_size: int) -> None:
    chance = random.Random(block_size)
    with (
        quiet_disk(tmp_path) as bed,
        ThinDriver(bed.root / "root", size="256M", block_size=block_size, preallocate=True) as driver,
    ):
        driver.create("base")
        fill(driver, "base", "file", chance.randbytes(48 * MIB))
        driver.create_read_write("container", "base")
        with driver.mounted("container") as path:
            driver.sync()
            bed.settle()
            before, at_first = bed.written_bytes(), driver.accounting("container")
            with (path / "file").open("r+b", buffering=0) as file:
                for _ in range(400):
                    file.seek(chance.randrange(48 * MIB // 4096) * 4096)
                    file.write(chance.randbytes(4096))
                    os.fsync(file.fileno())
            driver.sync()
            figures = driver.accounting("container")
            bed.settle()
            after = bed.written_bytes()
        driver.cleanup()
    assert before is not None
    assert after is not None
    total = written_by_pool(figures) - written_by_pool(at_first)

    assert abs(after - before - total) <= 0.01 * (after - before)
    assert figures.filesystem_bytes == figures.data_bytes
    assert figures.filesystem_bytes is not None
    assert figures.filesystem_bytes >= 400 * 4096
    assert figures.allocated_bytes is not None
    assert figures.allocated_bytes >= 300 * min(block_size, 48 * MIB // 400)


def test_changing_one_byte_of_a_large_file_costs_little(driver: ThinDriver) -> None:
    driver.create("base")
    fill(driver, "base", "file", os.urandom(64 * MIB))
    driver.create_read_write("container", "base")
    with driver.mounted("container") as path, (path / "file").open("r+b") as file:
        file.seek(30 * MIB)
        file.write(b"x")
    driver.sync()
    figures = driver.accounting("container")
    written = (figures.data_bytes, figures.copy_bytes, figures.zero_filled_bytes, figures.metadata_bytes)
    assert sum(part or 0 for part in written) < MIB
    assert (figures.allocated_bytes or 0) < MIB


def test_layer_older_than_the_server_has_no_figures_but_its_space(driver: ThinDriver) -> None:
    driver.create("base")
    fill(driver, "base", "file", os.urandom(4 * MIB))
    driver.close()
    figures = driver.accounting("base")
    assert (figures.data_bytes, figures.filesystem_bytes, figures.copy_bytes) == (None, None, None)
    assert 4 * MIB <= (figures.allocated_bytes or 0) < 6 * MIB


# ---- real images -------------------------------------------------------------------------------------------


def test_small_image_is_mounted_as_umoci_unpacks_it(
    driver: ThinDriver, small_oci_layout: Path, small_docker_archive: Path, small_unpacked: Path
) -> None:
    with ImageGraph(driver) as graph:
        image = graph.import_image(small_oci_layout)
        again = graph.import_image(small_docker_archive)
        assert image.id == again.id
        assert len(graph.layers()) == len(image.layers)
        with graph.container("c", image) as path:
            assert compare_trees(small_unpacked, path) == []


@needs_thin_tools
def test_debian_image_is_mounted_as_umoci_unpacks_it(
    driver: ThinDriver, debian_docker_archive: Path, debian_unpacked: Path
) -> None:
    with ImageGraph(driver) as graph:
        image = graph.import_image(debian_docker_archive)
        assert len(image.layers) >= 3
        with graph.container("c", image) as path:
            assert compare_trees(debian_unpacked, path) == []
            mount.sync_filesystem(path)
        assert graph.diff_container("c") == []
