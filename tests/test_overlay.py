"""What is particular to the overlay driver: copy-up, lower directories, mount data, leftovers."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap import drivers, errors, mount
from blocksnap.drivers.overlay import OverlayDriver
from tests.file_systems import fresh_file_system

reason = OverlayDriver.missing(Path("/tmp"))
pytestmark = pytest.mark.skipif(reason is not None, reason=f"overlay: {reason}")


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[OverlayDriver]:
    driver = OverlayDriver(tmp_path / "root")
    yield driver
    driver.cleanup()


def make(driver: drivers.Driver, id: str, parent: str | None = None, **files: str) -> None:
    driver.create(id, parent)
    with driver.mounted(id) as root:
        for name, text in files.items():
            (root / name).write_text(text)


def test_copy_up_counts_the_whole_file_once(driver: OverlayDriver) -> None:
    make(driver, "base", first="x" * 100_000, second="y" * 5000, third="z" * 70)
    driver.create_read_write("child", "base")
    with driver.mounted("child") as root:
        for _ in range(3):
            with (root / "first").open("r+") as file:
                file.write("!")
        (root / "new").write_text("n" * 1_000_000)
        (root / "second").chmod(0o600)
    assert driver.accounting("child").copy_bytes == 105_000


def test_copy_up_counts_without_a_changed_byte(driver: OverlayDriver) -> None:
    make(driver, "base", file="x" * 4321)
    driver.create_read_write("child", "base")
    with driver.mounted("child") as root, (root / "file").open("r+"):
        pass
    assert driver.accounting("child").copy_bytes == 4321


def test_copy_up_copies_nothing_where_files_share_blocks(tmp_path: Path) -> None:
    with fresh_file_system(tmp_path, "xfs") as place:
        driver = OverlayDriver(place / "root")
        make(driver, "base", file="x" * 4_000_000)
        driver.create_read_write("child", "base")
        with driver.mounted("child") as root, (root / "file").open("r+") as file:
            file.write("!")
        driver.sync()
        figures = driver.accounting("child")
        driver.cleanup()
    assert figures.copy_bytes == 0
    assert 4096 <= (figures.allocated_bytes or 0) < 1_000_000


def test_file_replaced_by_another_is_not_copied_up(driver: OverlayDriver) -> None:
    make(driver, "base", file="x" * 4321)
    driver.create_read_write("child", "base")
    with driver.mounted("child") as root:
        (root / "new").write_text("new")
        (root / "new").rename(root / "file")
    assert driver.accounting("child").copy_bytes == 0


def test_copy_up_counts_the_size_in_the_nearest_parent(driver: OverlayDriver) -> None:
    make(driver, "base", file="x" * 10_000)
    make(driver, "middle", "base", file="y" * 200)
    driver.create_read_write("child", "middle")
    with driver.mounted("child") as root:
        with (root / "file").open("a") as file:
            file.write("z" * 1000)
        (root / "file").rename(root / "moved")
        (root / "moved").rename(root / "file")
    assert driver.accounting("child").copy_bytes == 200


def test_128_parents_are_mounted_and_the_next_is_refused(driver: OverlayDriver) -> None:
    make(driver, "l0", file="text")
    for depth in range(1, 129):
        driver.create(f"l{depth}", f"l{depth - 1}")
    with driver.mounted("l128") as root:
        assert (root / "file").read_text() == "text"
    assert len(driver.metadata("l128")["LowerDir"].split(":")) == 128
    with pytest.raises(errors.NotSupportedError, match="would have 129 parents"):
        driver.create("l129", "l128")
    assert not driver.exists("l129")


@pytest.mark.parametrize("name", ["comma,colon:back\\slash", "x" * 200, "bytes\udcff\udcfe", "ünï cödé"])
def test_root_of_any_name_is_mounted(tmp_path: Path, name: str) -> None:
    driver = OverlayDriver(tmp_path / name)
    make(driver, "l0", file="text")
    for depth in range(1, 20):
        driver.create(f"l{depth}", f"l{depth - 1}")
    with driver.mounted("l19") as root:
        assert (root / "file").read_text() == "text"
        (root / "file").write_text("changed")
    with driver.mounted("l19") as root:
        assert (root / "file").read_text() == "changed"


def test_layer_with_children_is_mounted_read_only(driver: OverlayDriver) -> None:
    make(driver, "base", file="text")
    driver.create("child", "base")
    with driver.mounted("base") as root, pytest.raises(OSError, match="Read-only"):
        (root / "file").write_text("changed")


def test_layer_that_is_written_to_gets_no_child(driver: OverlayDriver) -> None:
    driver.create("base")
    with driver.mounted("base"), pytest.raises(errors.BusyError, match="mounted for writing by process"):
        driver.create("child", "base")
    driver.create("child", "base")


def test_whiteouts_hide_names_in_the_base_layer_too(driver: OverlayDriver) -> None:
    make(driver, "base", file="text")
    driver.create("child", "base")
    with driver.mounted("child") as root:
        (root / "file").unlink()
    upper = Path(driver.metadata("child")["UpperDir"])
    assert os.listdir(upper) == ["file"]
    driver.snapshot("copy", "child")
    with driver.mounted("copy") as root:
        assert os.listdir(root) == []


def test_leftovers_of_a_crash_are_swept_at_the_next_open(driver: OverlayDriver) -> None:
    make(driver, "base", file="text")
    for name in (".new-half", ".old-half"):
        (driver.root / "overlay" / name / "diff").mkdir(parents=True)
    (driver.root / "l" / "abcdef").symlink_to("../overlay/half/diff")
    again = OverlayDriver(driver.root)
    assert again.layers() == ["base"]
    assert sorted(os.listdir(driver.root / "overlay")) == ["base"]
    assert len(os.listdir(driver.root / "l")) == 2
    with again.mounted("base") as root:
        assert (root / "file").read_text() == "text"


def test_two_processes_share_a_root(driver: OverlayDriver) -> None:
    make(driver, "base", file="text")
    program = """import sys
from blocksnap import drivers
driver = drivers.open("overlay", sys.argv[1])
for number in range(20):
    id = f"{sys.argv[2]}-{number}"
    driver.create_read_write(id, "base")
    with driver.mounted(id) as root:
        assert (root / "file").read_text() == "text"
    if number % 2:
        driver.remove(id)
"""
    running = [
        subprocess.Popen([sys.executable, "-c", program, driver.root, name]) for name in ("a", "b", "c")
    ]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    expected = [f"{name}-{number}" for name in ("a", "b", "c") for number in range(0, 20, 2)]
    assert driver.layers() == sorted([*expected, "base"])
    assert len(os.listdir(driver.root / "l")) == len(expected) + 2


def test_root_on_an_overlay_is_refused_with_the_reason(driver: OverlayDriver) -> None:
    driver.create("base")
    with driver.mounted("base") as root:
        assert "is on overlay" in str(OverlayDriver.missing(root / "new"))
        with pytest.raises(errors.NotSupportedError, match="is on overlay"):
            drivers.open("overlay", root / "new")


def test_remove_unmounts_what_a_killed_process_left(driver: OverlayDriver) -> None:
    make(driver, "base", file="text")
    program = "import os, sys; from blocksnap import drivers; "
    program += "drivers.open('overlay', sys.argv[1]).get('base'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program, driver.root], check=False)
    assert mount.is_mounted(driver.metadata("base")["MergedDir"])
    driver.remove("base")
    assert not driver.exists("base")
