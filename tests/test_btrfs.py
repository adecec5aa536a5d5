"""What is particular to the btrfs driver: subvolumes by ioctl, quotas, subvolumes that a container makes."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap import drivers, errors
from blocksnap.drivers.btrfs import BtrfsDriver
from blocksnap.drivers.subvolume import create_subvolume, destroy_subvolume, snapshot_subvolume
from tests.file_systems import fresh_file_system, used_bytes
from tests.layer_roots import as_ordinary_user
from tests.trees import compare_trees

MIB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with fresh_file_system(tmp_path, "btrfs", 1 << 30) as target:
        yield target


@pytest.fixture
def driver(place: Path) -> BtrfsDriver:
    return BtrfsDriver(place / "root")


def make_large(driver: BtrfsDriver, size: int = 16 * MIB) -> None:
    driver.create("base")
    with driver.mounted("base") as root:
        (root / "large").write_bytes(os.urandom(size))
    driver.sync()


def write_durably(path: Path, size: int) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
            os.fsync(file.fileno())


def subvolumes(place: Path) -> list[str]:
    """Return the paths that the btrfs program lists."""
    if shutil.which("btrfs") is None:
        pytest.skip("needs btrfs (apt install btrfs-progs)")
    listed = subprocess.run(["btrfs", "subvolume", "list", place], capture_output=True, text=True, check=True)
    return sorted(line.rpartition(" path ")[2] for line in listed.stdout.splitlines())


def test_layers_are_subvolumes_and_gone_when_removed(driver: BtrfsDriver, place: Path) -> None:
    driver.create("base")
    driver.create("child", "base")
    assert subvolumes(place) == ["root/btrfs/base/tree", "root/btrfs/child/tree"]
    driver.remove("child")
    assert subvolumes(place) == ["root/btrfs/base/tree"]


def test_child_shares_all_blocks_until_it_is_written_to(driver: BtrfsDriver, place: Path) -> None:
    make_large(driver)
    before = used_bytes(place)
    driver.create_read_write("child", "base")
    assert used_bytes(place) - before < MIB
    assert driver.accounting("child").allocated_bytes == 0
    with driver.mounted("child") as root, (root / "large").open("r+b") as file:
        file.seek(8 * MIB + 1)
        file.write(b"!")
    driver.sync()
    assert driver.accounting("child").allocated_bytes == 4096
    assert driver.accounting("child").copy_bytes == 0


def test_mounted_layer_is_snapshotted_in_one_step(driver: BtrfsDriver) -> None:
    make_large(driver)
    with driver.mounted("base") as root, (root / "large").open("r+b") as file:
        file.write(b"unsynced")
        file.flush()
        driver.snapshot("copy", "base")
        with driver.mounted("copy") as copy:
            assert compare_trees(root, copy) == []


def test_limited_layer_takes_no_more_than_its_size(driver: BtrfsDriver) -> None:
    make_large(driver)
    driver.create_read_write("small", "base", storage_opt={"size": "24M"})
    with driver.mounted("small") as root:
        (root / "fits").write_bytes(bytes(4 * MIB))
        with pytest.raises(OSError, match="quota") as raised:
            write_durably(root / "too-much", 8 * MIB)
    assert raised.value.errno == errno.EDQUOT
    assert driver.metadata("small")["Size"] == str(24 * MIB)


def test_limit_goes_over_to_a_snapshot(driver: BtrfsDriver) -> None:
    driver.create_read_write("small", storage_opt={"size": "8M"})
    driver.snapshot("copy", "small")
    with driver.mounted("copy") as root, pytest.raises(OSError, match="quota"):
        write_durably(root / "too-much", 16 * MIB)
    driver.remove("small")
    driver.remove("copy")
    assert driver.layers() == []


def test_layer_goes_with_the_subvolumes_that_a_container_made_in_it(driver: BtrfsDriver, place: Path) -> None:
    driver.create_read_write("layer")
    with driver.mounted("layer") as root:
        (root / "directory").mkdir()
        create_subvolume(root / "directory" / "inner")
        (root / "directory" / "inner" / "file").write_text("text")
        snapshot_subvolume(root / "directory" / "inner", root / "directory" / "inner" / "innermost")
        make_read_only(root / "directory" / "inner" / "innermost")
    driver.remove("layer")
    assert subvolumes(place) == []


def make_read_only(subvolume: Path) -> None:
    subprocess.run(["btrfs", "property", "set", "-ts", subvolume, "ro", "true"], check=True)


def test_leftovers_of_a_crash_are_swept_at_the_next_open(driver: BtrfsDriver, place: Path) -> None:
    driver.create("base")
    for name in (".new-half", ".old-half"):
        (driver.root / "btrfs" / name).mkdir()
        snapshot_subvolume(driver.root / "btrfs" / "base" / "tree", driver.root / "btrfs" / name / "tree")
    (driver.root / "btrfs" / ".new-empty").mkdir()
    assert BtrfsDriver(driver.root).layers() == ["base"]
    assert os.listdir(driver.root / "btrfs") == ["base"]
    assert subvolumes(place) == ["root/btrfs/base/tree"]


def test_subvolume_that_is_not_there_is_destroyed_already(place: Path) -> None:
    destroy_subvolume(place / "nothing")


def test_root_elsewhere_is_refused_with_the_way_to_get_one(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: it is asked for first")
    with pytest.raises(errors.NotSupportedError, match=r"take one on btrfs \(apt install btrfs-progs"):
        drivers.open("btrfs", tmp_path / "root")


def test_ordinary_user_is_told_that_it_needs_root(tmp_path: Path) -> None:
    def work() -> None:
        assert BtrfsDriver.missing(tmp_path) == "needs root"

    as_ordinary_user(work)
