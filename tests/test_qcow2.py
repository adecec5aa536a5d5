"""What is particular to the qcow2 driver: images on images, a daemon for each mount, limits, counts."""

import json
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blocksnap import errors, mount
from blocksnap.drivers.qcow2 import Qcow2Driver
from tests.processes import kill_processes, processes_below
from tests.trees import compare_trees

reason = Qcow2Driver.missing(Path("/tmp"))
pytestmark = pytest.mark.skipif(reason is not None, reason=f"qcow2: {reason}")

MIB = 1 << 20


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Qcow2Driver]:
    driver = Qcow2Driver(tmp_path / "root", base_size="1G")
    yield driver
    driver.cleanup()
    assert left_below(driver.root) == []


def left_below(root: Path) -> list[object]:
    mounts = [entry.target for entry in mount.mount_table() if entry.target.startswith(f"{root}/")]
    loops = [loop.path for loop in mount.loop_devices() if loop.backing_path.startswith(f"{root}/")]
    return [*mounts, *loops, *processes_below(root)]


def make(driver: Qcow2Driver, id: str, parent: str | None = None, **files: bytes) -> None:
    driver.create(id, parent)
    with driver.mounted(id) as root:
        for name, content in files.items():
            (root / name).write_bytes(content)


def check_image(driver: Qcow2Driver, id: str, directory: Path) -> None:
    """Let qemu-img and e2fsck look at a layer."""
    image = driver.metadata(id)["File"]
    subprocess.run(["qemu-img", "check", "-q", image], check=True)
    raw = directory / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    checked = subprocess.run(["/usr/sbin/e2fsck", "-fn", raw], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_layers_are_images_backed_by_their_parents(driver: Qcow2Driver) -> None:
    make(driver, "base", file=b"text")
    make(driver, "child", "base")
    image = driver.metadata("child")["File"]
    said = subprocess.run(
        ["qemu-img", "info", "--output=json", "--backing-chain", image],
        capture_output=True,
        check=True,
    )
    chain = [os.path.realpath(one["filename"]) for one in json.loads(said.stdout)]
    assert chain == [image, driver.metadata("base")["File"], str(driver.root / "base.qcow2")]


def test_writes_that_come_at_once_all_arrive(driver: Qcow2Driver, tmp_path: Path) -> None:
    size, piece = 24 * MIB, 4096
    make(driver, "base", file=bytes(size))
    driver.create_read_write("child", "base")
    choose = random.Random(7)
    places = choose.sample(range(size // piece), 1000)
    with driver.mounted("child") as root:
        descriptor = os.open(root / "file", os.O_RDWR | os.O_DIRECT)

        def write(part: int) -> None:
            buffer = mmap.mmap(-1, piece)
            for place in places[part::8]:
                buffer[:8] = place.to_bytes(8, "little")
                os.pwritev(descriptor, [buffer], place * piece)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(8)))
        os.close(descriptor)
    with driver.mounted("child") as root, (root / "file").open("rb") as file:
        for place in places:
            file.seek(place * piece)
            assert file.read(8) == place.to_bytes(8, "little")
    check_image(driver, "child", tmp_path)


@pytest.mark.parametrize("name", ["comma,colon:back\\slash", "x" * 200, "bytes\udcff\udcfe", "ünï cödé"])
def test_root_of_any_name_is_mounted(tmp_path: Path, name: str) -> None:
    driver = Qcow2Driver(tmp_path / name, base_size="256M")
    make(driver, "base", file=b"text")
    driver.create_read_write("child", "base")
    with driver.mounted("child") as root:
        assert (root / "file").read_bytes() == b"text"
    assert left_below(driver.root) == []


def test_export_says_that_it_punches_no_holes(driver: Qcow2Driver) -> None:
    driver.create("base")
    with driver.mounted("base") as root:
        punch = ["fallocate", "-p", "-o", "4096", "-l", "4096", str(root.parent / "export")]
        done = subprocess.run(punch, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "supported" in done.stderr


def test_layer_with_children_is_mounted_read_only(driver: Qcow2Driver) -> None:
    make(driver, "base", file=b"text")
    driver.create("child", "base")
    with driver.mounted("base") as root, pytest.raises(OSError, match="Read-only"):
        (root / "file").write_text("changed")


def test_layer_that_is_written_to_gets_no_child(driver: Qcow2Driver) -> None:
    driver.create("base")
    with driver.mounted("base"), pytest.raises(errors.BusyError, match="mounted for writing by process"):
        driver.create("child", "base")
    driver.create("child", "base")


def test_snapshot_is_as_its_origin(driver: Qcow2Driver) -> None:
    make(driver, "base", file=b"text")
    make(driver, "origin", "base", new=os.urandom(3 * MIB))
    driver.snapshot("copy", "origin")
    with driver.mounted("origin") as origin, driver.mounted("copy") as copy:
        assert compare_trees(origin, copy) == []


def test_killed_daemon_is_followed_by_another(driver: Qcow2Driver) -> None:
    make(driver, "base", file=b"text")
    driver.get("base")
    kill_processes(driver.root)
    assert (driver.get("base") / "file").read_text() == "text"
    driver.put("base")
    driver.put("base")
    assert left_below(driver.root) == []


def test_put_takes_down_what_a_killed_daemon_left(driver: Qcow2Driver) -> None:
    make(driver, "base", file=b"text")
    driver.get("base")
    kill_processes(driver.root)
    driver.put("base")
    assert left_below(driver.root) == []


def test_what_a_killed_process_mounted_is_taken_down_by_the_next_open(driver: Qcow2Driver) -> None:
    make(driver, "base", file=b"text")
    program = "import os, sys; from blocksnap import drivers; "
    program += "drivers.open('qcow2', sys.argv[1]).get('base'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program, driver.root], check=False)
    assert len(left_below(driver.root)) == 4
    Qcow2Driver(driver.root)
    assert left_below(driver.root) == []


def test_limit_is_the_size_of_the_file_system_and_goes_over_to_children(driver: Qcow2Driver) -> None:
    make(driver, "base", file=b"text")
    driver.create_read_write("large", "base", storage_opt={"size": "2G"})
    driver.create("child", "large")
    driver.snapshot("copy", "large")
    for id in ("large", "child", "copy"):
        with driver.mounted(id) as root:
            info = os.statvfs(root)
            assert 1800 * MIB < info.f_blocks * info.f_frsize <= 2048 * MIB
            assert (root / "file").read_bytes() == b"text"
    assert driver.metadata("child")["DeviceSize"] == str(2048 * MIB)


def test_limit_below_what_a_layer_begins_with_is_refused(driver: Qcow2Driver) -> None:
    with pytest.raises(errors.ArgumentError, match="begins with 1073741824 bytes and cannot be limited to"):
        driver.create("small", storage_opt={"size": "512M"})
    assert driver.layers() == []


@pytest.mark.parametrize(("size", "extended"), [("3K", False), ("256", False), ("4M", False), ("8K", True)])
def test_clusters_that_qcow2_does_not_have_are_refused(tmp_path: Path, size: str, extended: bool) -> None:
    with pytest.raises(errors.ArgumentError, match="take a power of two from"):
        Qcow2Driver(tmp_path / "root", block_size=size, extended_l2=extended)


def test_file_system_bytes_are_counted_over_all_mounts(driver: Qcow2Driver) -> None:
    driver.create("layer")
    for number in (1, 2):
        with driver.mounted("layer") as root:
            (root / f"file-{number}").write_bytes(os.urandom(2 * MIB))
        written = driver.accounting("layer").filesystem_bytes
        assert written is not None
        assert 2 * MIB * number <= written < 2 * MIB * number + MIB


def test_file_system_bytes_are_unknown_once_a_daemon_was_killed(driver: Qcow2Driver) -> None:
    driver.create("layer")
    driver.get("layer")
    kill_processes(driver.root)
    driver.put("layer")
    assert driver.accounting("layer").filesystem_bytes is None
    assert driver.accounting("layer").copy_bytes is None


def test_smaller_clusters_take_less_for_a_small_change(tmp_path: Path) -> None:
    taken = {}
    for size, extended in (("1M", False), ("64K", False), ("64K", True)):
        driver = Qcow2Driver(
            tmp_path / f"{size}-{extended}", block_size=size, extended_l2=extended, base_size="1G"
        )
        make(driver, "base", file=bytes(8 * MIB))
        driver.create_read_write("child", "base")
        with driver.mounted("child") as root, (root / "file").open("r+b") as file:
            file.seek(4 * MIB)
            file.write(b"!")
        taken[size, extended] = driver.accounting("child").allocated_bytes or 0
    assert 0 < taken["64K", True] < taken["64K", False] < taken["1M", False]
