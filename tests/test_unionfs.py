"""What is particular to the unionfs driver: a server for each mount, marks of copies, two programs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap import drivers, errors, mount
from blocksnap.drivers.unionfs import UnionfsDriver
from blocksnap.file_system import find_program
from tests.layer_roots import as_ordinary_user
from tests.processes import kill_processes, processes_below

reason = UnionfsDriver.missing(Path("/tmp"))
pytestmark = pytest.mark.skipif(reason is not None, reason=f"unionfs: {reason}")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PROGRAMS = {"fuse-overlayfs": "fuse-overlayfs", "unionfs": "unionfs-fuse"}


def require(program: str) -> None:
    if find_program(program) is None:
        pytest.skip(f"needs {program} (apt install {PROGRAMS[program]})")


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> str:
    require(str(request.param))
    return str(request.param)


@pytest.fixture
def driver(tmp_path: Path, program: str) -> Iterator[UnionfsDriver]:
    driver = UnionfsDriver(tmp_path / "root", program=program)
    yield driver
    driver.cleanup()
    assert processes_below(driver.root) == []


@pytest.fixture
def marking(tmp_path: Path) -> Iterator[UnionfsDriver]:
    """A driver over the program that marks what it copied up."""
    require("fuse-overlayfs")
    driver = UnionfsDriver(tmp_path / "root", program="fuse-overlayfs")
    yield driver
    driver.cleanup()


def make(driver: drivers.Driver, id: str, parent: str | None = None, **files: str) -> None:
    driver.create(id, parent)
    with driver.mounted(id) as root:
        for name, text in files.items():
            (root / name).write_text(text)


def test_each_mount_has_a_server_that_ends_with_it(driver: UnionfsDriver) -> None:
    make(driver, "base", file="text")
    make(driver, "child", "base")
    with driver.mounted("child"):
        assert len(processes_below(driver.root)) == 1
        with driver.mounted("base"):
            assert len(processes_below(driver.root)) == 2
    assert processes_below(driver.root) == []


def test_layers_go_through_both_programs_alike(driver: UnionfsDriver) -> None:
    make(driver, "base", kept="kept", gone="gone", changed="before")
    driver.create_read_write("child", "base")
    with driver.mounted("child") as root:
        (root / "gone").unlink()
        (root / "changed").write_text("after")
    with driver.mounted("child") as root:
        assert sorted(os.listdir(root)) == ["changed", "kept"]
        assert (root / "changed").read_text() == "after"
    with driver.mounted("base") as root:
        assert (root / "changed").read_text() == "before"
        assert (root / "gone").read_text() == "gone"


def test_layer_with_children_is_mounted_read_only(driver: UnionfsDriver) -> None:
    make(driver, "base", file="text")
    driver.create("child", "base")
    with driver.mounted("base") as root, pytest.raises(OSError, match=r"Read-only|denied"):
        (root / "file").write_text("changed")


def test_killed_server_is_followed_by_another(driver: UnionfsDriver) -> None:
    make(driver, "base", file="text")
    path = driver.get("base")
    kill_processes(driver.root)
    with pytest.raises(OSError, match=r"not connected|abort"):
        os.listdir(path)
    assert (driver.get("base") / "file").read_text() == "text"
    driver.put("base")
    driver.put("base")
    assert not mount.is_mounted(path)


def test_put_and_remove_end_the_mount_of_a_killed_server(driver: UnionfsDriver) -> None:
    make(driver, "base", file="text")
    path = driver.get("base")
    kill_processes(driver.root)
    driver.put("base")
    assert not mount.is_mounted(path)
    driver.remove("base")
    assert driver.layers() == []


def test_mounts_of_a_killed_process_are_ended_by_the_next_open(driver: UnionfsDriver) -> None:
    make(driver, "base", file="text")
    program = "import os, sys; from blocksnap import drivers; "
    program += "drivers.open('unionfs', sys.argv[1]).get('base'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program, driver.root], check=False)
    assert len(processes_below(driver.root)) == 1
    UnionfsDriver(driver.root)
    assert processes_below(driver.root) == []
    assert [entry for entry in mount.mount_table() if entry.target.startswith(f"{driver.root}/")] == []


@pytest.mark.parametrize("name", ["comma,equals=back\\slash", "x" * 200, "bytes\udcff\udcfe", "ünï cödé"])
def test_root_of_any_name_is_mounted(tmp_path: Path, program: str, name: str) -> None:
    driver = UnionfsDriver(tmp_path / name, program=program)
    make(driver, "base", file="text")
    driver.create_read_write("child", "base")
    with driver.mounted("child") as root:
        (root / "file").write_text("changed")
    with driver.mounted("child") as root:
        assert (root / "file").read_text() == "changed"


def test_root_with_a_colon_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ArgumentError, match="takes no root with a colon"):
        UnionfsDriver(tmp_path / "a:b")


def test_root_of_one_program_is_refused_to_the_other(marking: UnionfsDriver) -> None:
    with pytest.raises(errors.ArgumentError, match="were written by fuse-overlayfs: open it without program"):
        UnionfsDriver(marking.root, program="unionfs")
    with pytest.raises(errors.ArgumentError, match='"cat" serves no union'):
        UnionfsDriver(marking.root, program="cat")


def test_copy_up_counts_the_whole_file_once_whatever_its_name_is_now(marking: UnionfsDriver) -> None:
    make(marking, "base", first="x" * 100_000, second="y" * 5000, third="z" * 70)
    marking.create_read_write("child", "base")
    with marking.mounted("child") as root:
        for _ in range(3):
            with (root / "first").open("a") as file:
                file.write("!")
        (root / "first").rename(root / "moved")
        (root / "again").hardlink_to(root / "moved")
        (root / "new").write_text("n" * 1_000_000)
        (root / "second").chmod(0o600)
    assert marking.accounting("child").copy_bytes == 105_000


def test_files_that_nothing_marks_have_no_count(tmp_path: Path) -> None:
    require("unionfs")
    driver = UnionfsDriver(tmp_path / "root", program="unionfs")
    make(driver, "base", file="x" * 4321)
    driver.create_read_write("child", "base")
    with driver.mounted("child") as root, (root / "file").open("a") as file:
        file.write("!")
    assert driver.accounting("child").copy_bytes is None
    assert (driver.accounting("child").allocated_bytes or 0) >= 4322


@needs_root
@pytest.mark.skipif(not os.stat("/dev/fuse").st_mode & 2, reason="needs a /dev/fuse that is open to all")
def test_ordinary_user_has_layers_too(users_root: Path, program: str) -> None:
    def work() -> None:
        driver = UnionfsDriver(users_root / "layers", program=program)
        make(driver, "base", kept="kept", gone="gone", changed="before")
        driver.create_read_write("child", "base")
        with driver.mounted("child") as root:
            (root / "gone").unlink()
            (root / "changed").write_text("after")
        with driver.mounted("child") as root:
            assert sorted(os.listdir(root)) == ["changed", "kept"]
        assert driver.changes("child", "base") == [("/changed", "C"), ("/gone", "D")]
        assert processes_below(driver.root) == []

    as_ordinary_user(work)
