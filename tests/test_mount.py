"""Loop devices, mounts and freezing on the real kernel."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap import errors, mount
from blocksnap.dead_mounts import end_dead_export

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/loop-control", os.W_OK),
    reason="needs root and /dev/loop-control",
)


def make_image(path: Path, size: int = 16 << 20) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def make_ext4(path: Path) -> Path:
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("needs mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", "-F", make_image(path)], check=True)
    return path


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of its own, mounted."""
    target = tmp_path / "mnt"
    target.mkdir()
    with mount.LoopDevice.attach(make_ext4(tmp_path / "image")) as loop:
        mount.mount(loop.path, target)
        try:
            yield target
        finally:
            mount.unmount(target)


def write_in_thread(path: Path) -> threading.Thread:
    thread = threading.Thread(target=path.write_bytes, args=(b"x",))
    thread.start()
    return thread


def test_attached_file_is_found_by_its_inode_under_another_name(tmp_path: Path) -> None:
    image = make_image(tmp_path / "image")
    (tmp_path / "other").hardlink_to(image)
    with mount.LoopDevice.attach(image, read_only=True) as loop:
        assert loop.path == f"/dev/loop{loop.number}"
        assert loop.backing_path == str(image)
        assert [found.number for found in mount.backing_loops(tmp_path / "other")] == [loop.number]
    assert mount.backing_loops(image) == []
    assert not loop.is_attached()


def test_detach_leaves_a_number_alone_that_was_attached_again(tmp_path: Path) -> None:
    first = mount.LoopDevice.attach(make_image(tmp_path / "first"))
    same = mount.LoopDevice(first.number)
    same.detach()
    second = mount.LoopDevice.attach(make_image(tmp_path / "second"))
    first.detach()
    assert second.is_attached()
    second.detach()


def test_detach_of_an_open_device_is_busy(tmp_path: Path) -> None:
    loop = mount.LoopDevice.attach(make_image(tmp_path / "image"))
    with open(loop.path, "rb"), pytest.raises(errors.BusyError, match=loop.path):
        loop.detach(timeout=0.05)
    loop.detach()
    assert not loop.is_attached()


def test_counters_tell_what_was_written_and_discarded(tmp_path: Path) -> None:
    with mount.LoopDevice.attach(make_image(tmp_path / "image")) as loop:
        written, discarded = loop.written_bytes(), loop.discarded_bytes()
        with open(loop.path, "r+b", buffering=0) as device:
            device.write(bytes(1 << 20))
            os.fsync(device.fileno())
        subprocess.run(["blkdiscard", "-o", "0", "-l", "65536", loop.path], check=True)
        assert loop.written_bytes() - written == 1 << 20
        assert loop.discarded_bytes() - discarded == 65536


def test_refresh_takes_over_a_grown_file(tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", 1 << 20)
    with mount.LoopDevice.attach(image, sector_size=4096) as loop:
        os.truncate(image, 2 << 20)
        loop.refresh()
        with open(loop.path, "rb") as device:
            assert device.seek(0, os.SEEK_END) == 2 << 20


def test_directory_cannot_be_attached(tmp_path: Path) -> None:
    with pytest.raises(errors.ArgumentError, match="is a directory"):
        mount.LoopDevice.attach(tmp_path)


def test_free_loop_device_is_an_error(tmp_path: Path) -> None:
    loop = mount.LoopDevice.attach(make_image(tmp_path / "image"))
    loop.detach()
    with pytest.raises(errors.DeviceIOError) as caught:
        mount.LoopDevice(loop.number)
    assert caught.value.errno == errno.ENXIO


def test_mount_table_has_targets_with_blanks(tmp_path: Path) -> None:
    target = tmp_path / "a b\tc"
    target.mkdir()
    mount.mount(tmp_path, target, bind=True, nosuid=True)
    try:
        assert mount.is_mounted(target)
        entry = mount.mount_table()[-1]
        assert entry.target == str(target)
        assert "nosuid" in entry.options.split(",")
    finally:
        mount.unmount(target)
    assert not mount.is_mounted(target)


def test_mount_without_a_file_system_says_so(tmp_path: Path) -> None:
    image = make_image(tmp_path / "image")
    with pytest.raises(errors.ArgumentError, match="make a file system first"):
        mount.mount(image, tmp_path)


def test_unmount_of_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(errors.ArgumentError, match="is not a mount point"):
        mount.unmount(tmp_path)


def test_writers_wait_while_frozen(mounted: Path) -> None:
    with mount.frozen(mounted):
        writer = write_in_thread(mounted / "file")
        writer.join(0.1)
        assert writer.is_alive()
    writer.join(10)
    assert (mounted / "file").read_bytes() == b"x"


def test_exception_in_the_block_thaws(mounted: Path) -> None:
    with pytest.raises(RuntimeError), mount.frozen(mounted):
        raise RuntimeError
    (mounted / "file").write_bytes(b"x")
    with pytest.raises(errors.ArgumentError, match="is not frozen"):
        mount.thaw(mounted)


def test_directory_that_is_no_mount_point_is_not_frozen(tmp_path: Path) -> None:
    with pytest.raises(errors.ArgumentError, match="is not a mount point"), mount.frozen(tmp_path):
        pass


def test_sync_brings_the_file_to_the_image(mounted: Path, tmp_path: Path) -> None:
    (mounted / "file").write_bytes(b"marker-of-the-test" * 300)
    mount.sync_filesystem(mounted)
    assert b"marker-of-the-test" in (tmp_path / "image").read_bytes()


def test_autoclear_lasts_until_unmounted(tmp_path: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    loop = mount.LoopDevice.attach(make_ext4(tmp_path / "image"), autoclear=True)
    mount.mount(loop.path, target, "ext4")
    with pytest.raises(errors.BusyError):
        loop.detach(timeout=0)
    assert loop.is_attached()
    mount.unmount(target)
    deadline = time.monotonic() + 10
    while loop.is_attached() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loop.is_attached()


SERVER = """
import sys
from blocksnap._native import check, encode, ffi, lib

directory = sys.argv[1]
names = [encode(f"{directory}/{name}") for name in ("metadata", "data", "export")]
pool, device, export = (ffi.new(f"struct bs_{kind} **") for kind in ("pool", "device", "export"))
for name in names[:2]:
    with open(name, "wb") as file:
        file.truncate(64 << 20)
check(lib.bs_pool_format(names[0], names[1], 64 << 20, 65536))
check(lib.bs_pool_open(names[0], names[1], 0, pool))
check(lib.bs_pool_create_device(pool[0], 1))
check(lib.bs_device_open(pool[0], 1, 32 << 20, device))
check(lib.bs_export_start(names[2], 2, 0, export))
check(lib.bs_export_add(export[0], b"volume", device[0]))
print("ready", flush=True)
sys.stdin.read()
lib.bs_export_stop(export[0])
lib.bs_device_close(device[0])
check(lib.bs_pool_close(pool[0]))
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that exports one device of 32 MiB as tmp_path/export/volume until its stdin ends."""
    if not os.access("/dev/fuse", os.W_OK):
        pytest.skip("needs /dev/fuse")
    (tmp_path / "export").mkdir()
    command = [sys.executable, "-c", SERVER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def test_ended_server_leaves_no_mount(server: subprocess.Popen[str], tmp_path: Path) -> None:
    assert mount.is_mounted(tmp_path / "export")
    assert (tmp_path / "export" / "volume").stat().st_size == 32 << 20
    server.communicate()
    assert server.returncode == 0
    assert not mount.is_mounted(tmp_path / "export")


def test_all_that_a_killed_server_left_goes_away(server: subprocess.Popen[str], tmp_path: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    loop = mount.LoopDevice.attach(tmp_path / "export" / "volume", direct_io=True)
    subprocess.run(["mkfs.ext4", "-q", loop.path], check=True)
    mount.mount(loop.path, target)
    (target / "file").write_bytes(bytes(8 << 20))
    subprocess.run(["fsfreeze", "--freeze", target], check=True)
    server.kill()
    server.wait()
    with pytest.raises(OSError, match="not connected"):
        os.stat(tmp_path / "export")
    assert [found.number for found in mount.backing_loops(tmp_path / "export" / "volume")] == [loop.number]
    end_dead_export(tmp_path / "export")
    assert not loop.is_attached()
    assert not mount.is_mounted(target)
    assert not mount.is_mounted(tmp_path / "export")
