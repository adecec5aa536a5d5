"""Thin devices that are mounted: what goes with them and what does not."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from blocksnap import errors, mount, pool_client
from blocksnap.pool_client import PoolClient
from tests.pool_servers import (
    both_engines,
    command,
    device_mounted,
    engine,
    loops_below,
    mounts_below,
    needs_mounts,
    pool_path,
    served,
    wait_until,
    wait_until_free,
)
from tests.thin_image import seal_file

__all__ = ["device_mounted", "engine", "pool_path", "served"]

BLOCK = 64 << 10


@needs_mounts
@both_engines
def test_mounted_device_is_neither_deleted_nor_written_nor_shrunk(
    served: PoolClient, device_mounted: Path
) -> None:
    device = served.device("base")
    for change in (
        device.delete,
        lambda: device.write(0, b"x"),
        lambda: device.discard(0, BLOCK),
        lambda: device.resize("1M"),
        lambda: served.make_file_system("base"),
        lambda: served.mount("base", device_mounted.parent),
    ):
        with pytest.raises(errors.BusyError, match=r'"base".* is mounted'):
            change()
    assert device.read(1080, 2) == b"\x53\xef"


@needs_mounts
@both_engines
def test_mounted_device_grows_and_the_kernel_sees_it(served: PoolClient, device_mounted: Path) -> None:
    assert device_mounted.is_mount()
    served.device("base").resize("300M")
    [mounted] = served.mounts()
    assert mounted.node is not None
    assert int(Path(f"/sys/block/{Path(mounted.node).name}/size").read_text()) * 512 == 300 << 20


@needs_mounts
def test_mount_again_at_the_same_place_changes_nothing(served: PoolClient, device_mounted: Path) -> None:
    assert served.mount("base", device_mounted) == served.mounts()[0]
    assert len(mounts_below(device_mounted)) == 1


@needs_mounts
@both_engines
def test_busy_mount_names_its_user(served: PoolClient, device_mounted: Path) -> None:
    user = subprocess.Popen(["sleep", "60"], cwd=device_mounted)
    try:
        with pytest.raises(errors.BusyError, match=rf"process {user.pid} \(sleep\)"):
            served.umount("base")
        assert (device_mounted / "file").exists()
    finally:
        user.kill()
        user.wait()
    served.umount("base")
    with pytest.raises(errors.ArgumentError, match="not mounted"):
        served.umount("base")


@needs_mounts
def test_device_without_a_file_system_cannot_be_mounted(served: PoolClient, tmp_path: Path) -> None:
    served.create_device("empty", "10M")
    (tmp_path / "there").mkdir()
    with pytest.raises(errors.ArgumentError, match="make a file system first"):
        served.mount("empty", tmp_path / "there")
    with pytest.raises(errors.ArgumentError, match="not a directory"):
        served.mount("empty", tmp_path / "nowhere")
    with pytest.raises(errors.ArgumentError, match="ext4 or xfs"):
        served.make_file_system("empty", "fat")
    assert (mounts_below(tmp_path), loops_below(tmp_path)) == ([], [])
    served.device("empty").delete()


@needs_mounts
@both_engines
@pytest.mark.skipif(
    shutil.which("mkfs.xfs") is None or "xfs" not in Path("/proc/filesystems").read_text(),
    reason="needs xfs and mkfs.xfs",
)
def test_xfs_and_its_snapshot_are_mounted_side_by_side(served: PoolClient, tmp_path: Path) -> None:
    for name in ("base", "snap"):
        (tmp_path / name).mkdir()
    served.create_device("base", "400M")
    served.make_file_system("base", "xfs")
    assert served.mount("base", tmp_path / "base").filesystem == "xfs"
    (tmp_path / "base" / "file").write_text("content")
    served.device("base").snapshot("snap")
    served.mount("snap", tmp_path / "snap", read_only=True)
    assert (tmp_path / "snap" / "file").read_text() == "content"
    for name in ("base", "snap"):
        served.umount(name)


@needs_mounts
@both_engines
def test_deleted_files_give_their_space_back(served: PoolClient, device_mounted: Path) -> None:
    (device_mounted / "large").write_bytes(os.urandom(20 << 20))
    mount.sync_filesystem(device_mounted)
    full = served.status().data_free_bytes
    (device_mounted / "large").unlink()
    mount.sync_filesystem(device_mounted)
    wait_until(lambda: served.status().data_free_bytes - full > 15 << 20)


@needs_mounts
def test_mount_for_another_mount_namespace_is_refused(pool_path: Path, device_mounted: Path) -> None:
    (device_mounted.parent / "there").mkdir()
    words = command("device", "mount", pool_path, "base", device_mounted.parent / "there")
    done = subprocess.run(["unshare", "-m", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "mount namespace" in done.stderr


@needs_mounts
def test_pool_that_needs_a_check_is_mounted_read_only(
    pool_path: Path, device_mounted: Path, served: PoolClient
) -> None:
    mount.sync_filesystem(device_mounted)
    os.kill(served.server_pid, signal.SIGKILL)
    wait_until_free(pool_path)
    with (pool_path / "metadata").open("r+b") as metadata:
        metadata.seek(4)
        metadata.write(b"\1")
    seal_file(pool_path / "metadata", 0, "superblock")
    with pool_client.serve(pool_path) as again:
        assert again.status().needs_check
        with pytest.raises(errors.NeedsCheckError, match="mount read-only"):
            again.mount("base", device_mounted)
        again.mount("base", device_mounted, read_only=True)
        assert (device_mounted / "file").read_bytes() == b"content" * 1000
        with pytest.raises(OSError, match="Read-only"):
            (device_mounted / "file").write_text("x")
        again.umount("base")


# ---- without root ------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None or shutil.which("fuse2fs") is None,
    reason="needs root (to become nobody), setpriv and fuse2fs",
)
@pytest.mark.skipif(os.stat("/dev/fuse").st_mode & 0o006 != 0o006, reason="needs a /dev/fuse open to all")
def test_ordinary_user_mounts_with_fuse2fs(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents):
        if str(directory).startswith("/tmp/"):
            directory.chmod(directory.stat().st_mode | 0o755)
    (tmp_path / "home" / "mounted").mkdir(parents=True)
    os.chown(tmp_path / "home", 65534, 65534)
    os.chown(tmp_path / "home" / "mounted", 65534, 65534)
    script = tmp_path / "script"
    script.write_text(
        """
import os, signal, sys, time
from blocksnap import errors, mount, pool_client
from blocksnap.pool import Pool
os.chdir(sys.argv[1])
Pool.create("pool", size="64M").close()
with pool_client.serve("pool") as pool:
    pool.create_device("base", "32M")
    pool.make_file_system("base")
    assert pool.mount("base", "mounted").loop is None
    open("mounted/file", "w").write("kept")
    try:
        pool.device("base").snapshot("snap")
        raise SystemExit("a snapshot that could not freeze")
    except errors.BusyError as error:
        assert "fuse2fs" in str(error)
    pool.umount("base")
    pool.device("base").snapshot("snap")
    pool.mount("snap", "mounted")
    assert open("mounted/file").read() == "kept"
    os.kill(pool.server_pid, signal.SIGKILL)
while True:
    try:
        Pool.open("pool").close()
        break
    except errors.BusyError:  # it is still ending
        time.sleep(0.01)
assert not mount.is_mounted("mounted")
"""
    )
    # The right to look into root's directories, where the interpreter may be.
    rights = "-all,+dac_read_search"
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    user += [f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    done = subprocess.run(
        [*user, *command()[:1], script, tmp_path / "home"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert mounts_below(tmp_path) == []
