"""What is particular to the vfs driver: full copies of everything a tree can hold."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap import drivers, errors
from blocksnap.drivers.vfs import VfsDriver
from tests.file_systems import fresh_file_system, used_bytes
from tests.trees import compare_trees

SIZE = 16 << 20


@pytest.fixture
def driver(tmp_path: Path) -> VfsDriver:
    return VfsDriver(tmp_path / "root")


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    with fresh_file_system(tmp_path, "xfs") as target:
        yield target


def make_large(driver: VfsDriver) -> None:
    driver.create("base")
    with driver.mounted("base") as root:
        (root / "large").write_bytes(os.urandom(SIZE))


def test_copies_are_full_when_reflinks_are_turned_off(xfs: Path) -> None:
    driver = VfsDriver(xfs / "root", reflink=False)
    make_large(driver)
    before = used_bytes(xfs)
    driver.create("child", "base")
    assert used_bytes(xfs) - before >= SIZE
    assert driver.accounting("child").copy_bytes == SIZE


def test_reflinks_share_blocks(xfs: Path) -> None:
    driver = VfsDriver(xfs / "root")
    make_large(driver)
    before = used_bytes(xfs)
    driver.create("child", "base")
    assert used_bytes(xfs) - before < SIZE // 4
    assert driver.accounting("child").copy_bytes == 0
    assert (driver.accounting("child").allocated_bytes or 0) < SIZE // 4
    with driver.mounted("base") as base, driver.mounted("child") as child:
        assert compare_trees(base, child) == []


def test_change_to_a_reflinked_file_takes_its_blocks_alone(xfs: Path) -> None:
    driver = VfsDriver(xfs / "root")
    make_large(driver)
    driver.create("child", "base")
    before = driver.accounting("child").allocated_bytes
    with driver.mounted("child") as root, (root / "large").open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(bytes(5000))
    driver.sync()
    after = driver.accounting("child").allocated_bytes
    assert before is not None
    assert after is not None
    assert after - before == 8192


def test_reflinks_fall_back_to_copies(tmp_path: Path) -> None:
    # ext4 and tmpfs have no reflinks; where /tmp can, nothing is copied.
    driver = VfsDriver(tmp_path / "root")
    make_large(driver)
    driver.create("child", "base")
    assert driver.accounting("child").copy_bytes in (0, SIZE)
    with driver.mounted("base") as base, driver.mounted("child") as child:
        assert compare_trees(base, child) == []


def test_copy_keeps_everything(driver: VfsDriver) -> None:
    driver.create("base")
    with driver.mounted("base") as root:
        fill(root)
    driver.create("child", "base")
    with driver.mounted("base") as base, driver.mounted("child") as child:
        assert compare_trees(base, child) == []


def fill(root: Path) -> None:
    (root / "first").write_text("text")
    (root / "one").mkdir()
    (root / "one" / "second").hardlink_to(root / "first")
    (root / "dangling").symlink_to("/nowhere/at/all")
    (root / "to-itself").symlink_to("to-itself")
    os.mkfifo(root / "fifo")
    (root / "unreadable").write_text("secret")
    (root / "odd\udcff\n name").write_text("odd")
    os.setxattr(root / "first", "user.name", b"\0\xff")
    (root / "setuid").write_text("x")
    if os.geteuid() == 0:
        os.mknod(root / "device", stat.S_IFBLK | 0o660, os.makedev(7, 200))
        os.chown(root / "setuid", 12, 34)
        os.setxattr(root / "setuid", "security.capability", bytes.fromhex("0100000202000000") + bytes(12))
        os.lchown(root / "dangling", 56, 78)
    (root / "setuid").chmod(0o6755)
    os.utime(root / "first", ns=(1_000_000_001, 2_000_000_002))
    os.utime(root / "dangling", ns=(5, 6), follow_symlinks=False)
    os.utime(root / "one", ns=(7, 8_000_000_009))
    os.utime(root, ns=(3, 4_000_000_004))


def test_holes_stay_holes(driver: VfsDriver) -> None:
    driver.create("base")
    with driver.mounted("base") as root, (root / "sparse").open("wb") as file:
        file.truncate(1 << 30)
        for offset in (0, 300 << 20, (1 << 30) - 10):
            file.seek(offset)
            file.write(b"0123456789")
    driver.create("child", "base")
    with driver.mounted("base") as base, driver.mounted("child") as child:
        assert (child / "sparse").stat().st_blocks * 512 < 1 << 20
        assert compare_trees(base, child) == []
    assert (driver.accounting("child").copy_bytes or 0) < 1 << 20


def test_directories_that_are_not_writable_are_removed(driver: VfsDriver) -> None:
    driver.create("base")
    with driver.mounted("base") as root:
        (root / "a" / "b").mkdir(parents=True)
        (root / "a" / "b" / "c").write_text("c")
        (root / "a" / "b").chmod(0o500)
        (root / "a").chmod(0)
    driver.remove("base")
    assert os.listdir(driver.root / "vfs") == []


def test_mounted_origin_is_not_copied(driver: VfsDriver) -> None:
    driver.create("origin")
    with driver.mounted("origin"), pytest.raises(errors.BusyError, match="in use by process"):
        driver.snapshot("copy", "origin")
    assert driver.layers() == ["origin"]


def test_full_file_system_leaves_no_layer(xfs: Path) -> None:
    driver = VfsDriver(xfs / "root", reflink=False)
    driver.create("base")
    with driver.mounted("base") as root:
        free = os.statvfs(xfs).f_bavail * os.statvfs(xfs).f_frsize
        with (root / "large").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free * 2 // 3)
            file.write(b"x" * (free * 2 // 3))
    with pytest.raises(errors.NoSpaceError):
        driver.create("child", "base")
    assert driver.layers() == ["base"]
    assert os.listdir(driver.root / "vfs") == ["base"]
    assert isinstance(drivers.open("vfs", driver.root), VfsDriver)


def test_tree_deeper_than_any_path_is_copied_counted_and_removed(driver: VfsDriver) -> None:
    driver.create("base")
    with driver.mounted("base") as root:
        descriptor = os.open(root, os.O_RDONLY)
        for _ in range(1500):
            os.mkdir("x" * 90, dir_fd=descriptor)
            below = os.open("x" * 90, os.O_RDONLY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        os.close(descriptor)
    driver.create("child", "base")
    assert (driver.accounting("child").allocated_bytes or 0) >= 1500 * 4096
    driver.remove("child")
    driver.remove("base")
    assert os.listdir(driver.root / "vfs") == []


def test_file_that_its_owner_may_not_read_is_copied(driver: VfsDriver) -> None:
    driver.create("base")
    with driver.mounted("base") as root:
        (root / "shadow").write_text("secret")
        (root / "shadow").chmod(0)
    driver.create("child", "base")
    with driver.mounted("child") as root:
        assert stat.S_IMODE((root / "shadow").stat().st_mode) == 0
        (root / "shadow").chmod(0o600)
        assert (root / "shadow").read_text() == "secret"
