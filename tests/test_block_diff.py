"""Diffs that start from the blocks in which two thin devices differ: they equal a walk through both trees."""

import io
import os
import random
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap import archive
from blocksnap.drivers.thin import ThinDriver

reason = ThinDriver.missing(Path("/tmp"))
pytestmark = pytest.mark.skipif(
    reason is not None or os.geteuid() != 0, reason=f"thin as root: {reason or 'needs root'}"
)


@pytest.fixture(params=[("ext4", "64K"), ("ext4", "4K"), ("xfs", "64K")], ids=lambda param: "-".join(param))
def driver(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ThinDriver]:
    kind, block_size = request.param
    if kind == "xfs" and shutil.which("mkfs.xfs") is None:
        pytest.skip("needs mkfs.xfs (apt install xfsprogs)")
    root = tmp_path / "root"
    driver = ThinDriver(root, size="2G", block_size=block_size, base_size="512M", filesystem=kind)
    yield driver
    driver.cleanup()


class Scribbler:
    """Changes a tree at random, by everything that a tree can have done to it."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        self.choose = random.Random(seed)
        self.made = 0

    def scribble(self, times: int) -> None:
        for _ in range(times):
            action = self.choose.choice(
                [
                    self.make,
                    self.make,
                    self.make_directory,
                    self.write,
                    self.remove,
                    self.move,
                    self.link,
                    self.change_mode,
                    self.own,
                    self.mark,
                    self.point,
                    self.back_date,
                    self.replace,
                ]
            )
            action()

    def everything(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*"))

    def some(self, wanted: str) -> Path | None:
        kinds = {"file": [stat.S_IFREG], "any": [stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK]}[wanted]
        found = [path for path in self.everything() if stat.S_IFMT(path.lstat().st_mode) in kinds]
        return self.choose.choice(found) if found else None

    def place(self) -> Path:
        self.made += 1
        directories = [self.root, *(path for path in self.everything() if stat.S_ISDIR(path.lstat().st_mode))]
        return self.choose.choice(directories) / f"name-{self.seed}-{self.made}"

    def make(self) -> None:
        self.place().write_bytes(self.choose.randbytes(self.choose.choice([0, 10, 5000, 70_000])))

    def make_directory(self) -> None:
        self.place().mkdir()

    def write(self) -> None:
        if path := self.some("file"):
            with path.open("ab") as file:
                file.write(self.choose.randbytes(self.choose.choice([1, 5000])))

    def remove(self) -> None:
        if path := self.some("any"):
            shutil.rmtree(path) if stat.S_ISDIR(path.lstat().st_mode) else path.unlink()

    def move(self) -> None:
        path, place = self.some("any"), self.place()
        if path and path not in place.parents:
            path.rename(place)

    def link(self) -> None:
        if path := self.some("file"):
            self.place().hardlink_to(path)

    def change_mode(self) -> None:
        if (path := self.some("any")) and not path.is_symlink():
            path.chmod(self.choose.choice([0o700, 0o755, 0o640, 0o4711]))

    def own(self) -> None:
        if path := self.some("any"):
            os.lchown(path, self.choose.randrange(1000), self.choose.randrange(1000))

    def mark(self) -> None:
        if path := self.some("file"):
            os.setxattr(path, f"user.{self.choose.choice('abc')}", self.choose.randbytes(300))

    def point(self) -> None:
        self.place().symlink_to(self.choose.choice(["nowhere", "/" + "long" * 30]))

    def back_date(self) -> None:
        if path := self.some("file"):
            os.utime(path, ns=(1, self.choose.randrange(1 << 60)))

    def replace(self) -> None:
        """Put a directory where a file was, or a file where a directory was."""
        if path := self.some("any"):
            if stat.S_ISDIR(path.lstat().st_mode):
                shutil.rmtree(path)
                path.write_text("file")
            else:
                path.unlink()
                path.mkdir()
                (path / "inner").write_text("inner")


def make_base(driver: ThinDriver, seed: int) -> None:
    driver.create("base")
    with driver.mounted("base") as root:
        Scribbler(root, seed).scribble(150)


def packed(old: Path, new: Path, unchanged: archive.Unchanged | None) -> bytes:
    out = io.BytesIO()
    archive.pack_diff(old, new, out, unchanged=unchanged)
    return out.getvalue()


def check_equal_to_a_walk(driver: ThinDriver, id: str, parent: str) -> None:
    """Compare every answer that a driver gives about a layer with what a walk through both trees says."""
    with driver.diff(id, parent) as tar, driver.mounted(parent) as old, driver.mounted(id) as new:
        assert driver.changes(id, parent) == archive.changes(old, new)
        assert driver.diff_size(id, parent) == archive.diff_size(old, new)
        assert tar.read() == packed(old, new, None)


@pytest.mark.parametrize("seed", range(4))
def test_diff_of_a_random_tree_equals_a_walk_through_both(driver: ThinDriver, seed: int) -> None:
    make_base(driver, seed)
    parent = "base"
    for generation in range(3):
        id = f"layer-{generation}"
        driver.create(id, parent)
        with driver.mounted(id) as root:
            Scribbler(root, 1000 * seed + generation).scribble(12)
        check_equal_to_a_walk(driver, id, parent)
        parent = id
    check_equal_to_a_walk(driver, "layer-2", "base")


def test_diff_of_a_mounted_layer_sees_what_was_just_written(driver: ThinDriver) -> None:
    make_base(driver, 1)
    driver.create_read_write("child", "base")
    with driver.mounted("child") as root:
        for number in range(3):
            Scribbler(root, number).scribble(5)
            check_equal_to_a_walk(driver, "child", "base")


def test_moved_directory_is_packed_whole(driver: ThinDriver) -> None:
    driver.create("base")
    with driver.mounted("base") as root:
        (root / "a" / "b" / "c").mkdir(parents=True)
        (root / "a" / "b" / "c" / "deep").write_text("deep")
    driver.create_read_write("child", "base")
    with driver.mounted("child") as root:
        (root / "a" / "b").rename(root / "moved")
    assert driver.changes("child", "base") == [
        ("/a", "C"),
        ("/a/b", "D"),
        ("/moved", "A"),
        ("/moved/c", "A"),
        ("/moved/c/deep", "A"),
    ]
    check_equal_to_a_walk(driver, "child", "base")


def test_siblings_are_compared_by_their_blocks_too(driver: ThinDriver) -> None:
    make_base(driver, 5)
    for seed, id in enumerate(("left", "right")):
        driver.create(id, "base")
        with driver.mounted(id) as root:
            Scribbler(root, seed).scribble(8)
    check_equal_to_a_walk(driver, "right", "left")


def test_layer_of_another_size_is_compared_by_a_walk(driver: ThinDriver) -> None:
    make_base(driver, 6)
    driver.create_read_write("large", "base", storage_opt={"size": "1G"})
    with driver.mounted("large") as root:
        Scribbler(root, 6).scribble(10)
    check_equal_to_a_walk(driver, "large", "base")


def test_only_what_shares_a_block_with_a_change_is_looked_at(driver: ThinDriver) -> None:
    files = 3000
    driver.create("base")
    with driver.mounted("base") as root:
        for number in range(files):
            (root / f"directory-{number % 30}").mkdir(exist_ok=True)
            (root / f"directory-{number % 30}" / f"file-{number}").write_text("text")
    driver.create_read_write("child", "base")
    with driver.mounted("child") as root:
        (root / "directory-7" / "file-7").write_text("changed")
    with driver.mounted("base"), driver.mounted("child") as root:
        unchanged = driver._unchanged("child", "base")
        assert unchanged is not None
        inodes = [entry.inode() for place in root.iterdir() if place.is_dir() for entry in os.scandir(place)]
        looked_at = sum(not unchanged(inode) for inode in inodes)
    in_a_block = driver._pool().status().block_size // 256
    assert 0 < looked_at <= 4 * in_a_block
    assert looked_at < files // 2
    assert driver.changes("child", "base") == [("/directory-7", "C"), ("/directory-7/file-7", "C")]
