"""Pools whose server was killed while devices were in use: these work on, and the next server takes over."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap import drivers, metadata, mount, pool_client
from blocksnap.device_mapper import Control
from blocksnap.errors import BusyError
from blocksnap.pool import Pool
from blocksnap.pool_client import PoolClient
from tests.kernel.devices import leftovers, sweep
from tests.pool_servers import end_server, mounts_below, wait_until


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A pool whose device "base" is mounted at "mounted", with its server killed."""
    path = tmp_path / "pool"
    Pool.create(path, size="256M", engine="kernel").close()
    (tmp_path / "mounted").mkdir()
    with serve(path) as client:
        client.create_device("base", "128M")
        client.create_device("idle", "16M").write(0, b"idle")
        client.make_file_system("base")
        client.mount("base", tmp_path / "mounted")
        (tmp_path / "mounted" / "file").write_text("before")
        kill(client)
    yield path
    end_server(path)
    with Control.open() as control:
        assert sweep(control) == []
    assert mount.loop_devices(below=tmp_path) == []
    assert mounts_below(tmp_path) == []
    assert not metadata.check(path / "metadata").findings


def serve(path: Path) -> PoolClient:
    return pool_client.serve(path, engine="kernel")


def kill(client: PoolClient, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(client.server_pid, number)
    wait_for_end(client.server_pid)


def wait_for_end(server_pid: int) -> None:
    wait_until(lambda: not Path(f"/proc/{server_pid}").exists())


def live() -> list[str]:
    with Control.open() as control:
        return [device.uuid for device in leftovers(control)]


def test_a_mount_works_on_without_its_server_and_is_taken_over(path: Path, tmp_path: Path) -> None:
    mounted = tmp_path / "mounted"
    (mounted / "later").write_text("after")
    mount.sync_filesystem(mounted)
    with serve(path) as client:
        [entry] = client.mounts()
        assert (entry.device, entry.target, entry.filesystem) == ("base", str(mounted), "ext4")
        (mounted / "now").write_text("with a server again")
        snap = client.device("base").snapshot("snap")
        assert client.device("idle").read(0, 4) == b"idle"
        client.umount("base")
        client.mount("snap", mounted)
        assert sorted(os.listdir(mounted)) == ["file", "later", "now"]
        client.umount("snap")
        snap.delete()
    assert live() == []


def test_a_server_that_took_over_ends_with_the_mount(path: Path, tmp_path: Path) -> None:
    serve(path).close()
    client = pool_client.connect(path)
    assert client is not None
    client.close()
    mount.unmount(tmp_path / "mounted")
    wait_for_end(client.server_pid)
    assert live() == []
    with Pool.open(path) as pool:
        assert [device.name for device in pool.devices()] == ["base", "idle"]


def test_the_user_engine_names_who_uses_a_pool_that_is_live(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BusyError, match=f"killed, is in use .*mounted at {tmp_path}/mounted"):
        Pool.open(path)
    with pytest.raises(BusyError, match="mounted at"):
        Pool.open(path, engine="kernel", read_only=True)
    assert (tmp_path / "mounted" / "file").read_text() == "before"
    mount.unmount(tmp_path / "mounted")
    with Pool.open(path) as pool:
        assert pool.device("idle").read(0, 4) == b"idle"


def test_a_pool_that_is_opened_for_a_moment_leaves_what_is_in_use_as_it_was(
    path: Path, tmp_path: Path
) -> None:
    with Pool.open(path, engine="kernel") as pool:
        assert [device.name for device in pool.taken_over()] == ["base"]
        pool.create_device("new", "1M").write(0, b"new")
        with pytest.raises(BusyError, match="mounted at"):
            pool.device("base").delete()
    (tmp_path / "mounted" / "file").write_text("written")
    mount.sync_filesystem(tmp_path / "mounted")
    with serve(path) as client:
        assert client.device("new").read(0, 3) == b"new"
        client.umount("base")


def test_a_terminated_server_leaves_a_mount_in_use_to_the_kernel(path: Path, tmp_path: Path) -> None:
    user = subprocess.Popen(["sleep", "60"], cwd=tmp_path / "mounted")
    try:
        with serve(path) as client:
            kill(client, signal.SIGTERM)
        assert mounts_below(tmp_path) == [str(tmp_path / "mounted")]
        (tmp_path / "mounted" / "file").write_text("after")
    finally:
        user.kill()
        user.wait()
    with serve(path) as client:
        client.umount("base")
    assert live() == []


def test_a_driver_goes_on_after_its_server_was_killed(tmp_path: Path) -> None:
    with drivers.open("devicemapper", tmp_path / "root", size="256M") as driver:
        driver.create("base")
        root = driver.get("base")
        (root / "file").write_text("kept")
        client = pool_client.connect(tmp_path / "root" / "pool")
        assert client is not None
        kill(client)
        client.close()
        driver.close()
        driver.create("child", "base")
        (root / "file").write_text("goes on")
        with driver.mounted("child") as child:
            assert (child / "file").read_text() == "kept"
        driver.put("base")
        driver.cleanup()
    assert live() == []
    assert mounts_below(tmp_path) == []


def test_the_mount_of_a_killed_holder_and_server_is_ended_by_the_next_driver(tmp_path: Path) -> None:
    program = (
        "import os, sys; from blocksnap import drivers, pool_client\n"
        "driver = drivers.open('devicemapper', sys.argv[1], size='256M')\n"
        "driver.create('base'); driver.get('base')\n"
        "os.kill(pool_client.connect(sys.argv[1] + '/pool').server_pid, 9); os.kill(os.getpid(), 9)"
    )
    root = tmp_path / "root"
    subprocess.run([sys.executable, "-c", program, root], check=False)
    assert mounts_below(root) == [str(root / "mnt" / "base")]
    drivers.open("devicemapper", root).close()
    assert mounts_below(root) == []
    assert live() == []
