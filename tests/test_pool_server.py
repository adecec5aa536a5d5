"""The process that serves a pool, seen from its clients."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from blocksnap import errors, mount, pool_client
from blocksnap.pool import Pool
from blocksnap.pool_client import PoolClient
from tests.layer_roots import as_ordinary_user
from tests.pool_servers import (
    command,
    device_mounted,
    loops_below,
    mounts_below,
    needs_mounts,
    pool_path,
    run_command,
    served,
    wait_until,
)
from tests.thin_tools import assert_sound

__all__ = ["device_mounted", "left_mounted", "pool_path", "served"]

BLOCK = 64 << 10


class Writer:
    """A thread that appends to a file of a mounted device, with fsync, until it is stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.slowest = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        with self.path.open("wb") as file:
            while not self._stop.is_set():
                begin = time.monotonic()
                file.write(b"%07d\n" % self.count)
                file.flush()
                os.fsync(file.fileno())
                self.slowest = max(self.slowest, time.monotonic() - begin)
                self.count += 1

    def goes_on(self) -> None:
        """Wait until it has written more."""
        before = self.count
        wait_until(lambda: self.count > before + 2)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    writer = Writer(path)
    try:
        wait_until(lambda: writer.count > 5)
        yield writer
    finally:
        writer.stop()


# ---- a container that is written to ------------------------------------------------------------------------


@needs_mounts
def test_second_process_snapshots_and_compares_a_device_that_is_written_to(
    pool_path: Path, device_mounted: Path, tmp_path: Path
) -> None:
    with writing(device_mounted / "log") as writer:
        status = json.loads(run_command("pool", "status", pool_path, "--json"))
        assert status["server"]["mounts"][0]["target"] == str(device_mounted)
        assert status["server"]["pid"] != os.getpid()
        before = writer.count
        snap = json.loads(run_command("device", "snapshot", pool_path, "base", "snap", "--json"))
        assert snap["origin"] == "base"
        after = writer.count
        writer.goes_on()
        assert "<different" in run_command("pool", "delta", pool_path, "base", "snap")
        usage = {one["name"]: one for one in json.loads(run_command("pool", "usage", pool_path, "--json"))}
        assert usage["base"]["shared_bytes"] == usage["snap"]["shared_bytes"] > 0
        assert "no damage" in run_command("pool", "check", pool_path)
        writer.goes_on()
    other = tmp_path / "other"
    other.mkdir()
    run_command("device", "mount", pool_path, "snap", other)
    assert (other / "file").read_bytes() == b"content" * 1000
    lines = (other / "log").read_text().splitlines()
    assert lines == [f"{number:07}" for number in range(len(lines))]
    assert before <= len(lines) <= after + 2
    run_command("device", "umount", pool_path, "snap")


@needs_mounts
def test_snapshot_that_fails_thaws_the_file_system(served: PoolClient, device_mounted: Path) -> None:
    served.device("base").snapshot("snap")
    with writing(device_mounted / "log") as writer:
        with pytest.raises(errors.DeviceExistsError, match="snap"):
            served.device("base").snapshot("snap")
        writer.goes_on()


@needs_mounts
def test_freeze_that_takes_too_long_is_given_up_and_thawed(served: PoolClient, device_mounted: Path) -> None:
    with writing(device_mounted / "log") as writer:
        with pytest.raises(errors.DeviceIOError, match="longer than 0 ms"):
            served.device("base").snapshot("snap", freeze_timeout=0)
        writer.goes_on()
        assert [device.name for device in served.devices()] == ["base"]


@needs_mounts
def test_snapshot_of_a_file_system_that_somebody_froze_is_refused(
    served: PoolClient, device_mounted: Path
) -> None:
    with mount.frozen(device_mounted), pytest.raises(errors.BusyError, match="already frozen"):
        served.device("base").snapshot("snap")
    (device_mounted / "after").write_text("thawed")


@needs_mounts
def test_snapshot_of_a_mounted_device_needs_no_repair(served: PoolClient, device_mounted: Path) -> None:
    (device_mounted / "unsynced").write_bytes(os.urandom(1 << 20))
    served.device("base").snapshot("snap")
    image = device_mounted.parent / "image"
    with image.open("wb") as file:
        file.write(served.device("snap").read(0, 256 << 20))
    assert subprocess.run(["e2fsck", "-fn", image], capture_output=True, check=False).returncode == 0


@needs_mounts
def test_reader_that_does_not_read_stops_nobody(pool_path: Path, device_mounted: Path) -> None:
    served = pool_client.serve(pool_path)
    for number in range(60):
        served.create_device(f"device {number}", "1M").write(0, b"x")
    reader = subprocess.Popen(command("pool", "dump", pool_path), stdout=subprocess.PIPE)
    with writing(device_mounted / "log") as writer:
        time.sleep(0.5)
        writer.goes_on()
        served.device("base").snapshot("snap")
    served.close()
    assert b"</superblock>" in reader.communicate()[0]


# ---- what a mounted device refuses -------------------------------------------------------------------------


@needs_mounts
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
def test_mounted_device_grows_and_the_kernel_sees_it(served: PoolClient, device_mounted: Path) -> None:
    assert device_mounted.is_mount()
    served.device("base").resize("300M")
    [mounted] = served.mounts()
    assert mounted.loop is not None
    assert int(Path(f"/sys/block/{Path(mounted.loop).name}/size").read_text()) * 512 == 300 << 20


@needs_mounts
def test_mount_again_at_the_same_place_changes_nothing(served: PoolClient, device_mounted: Path) -> None:
    assert served.mount("base", device_mounted) == served.mounts()[0]
    assert len(mounts_below(device_mounted)) == 1


@needs_mounts
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


# ---- coming and going --------------------------------------------------------------------------------------


def test_server_ends_with_its_last_client_and_leaves_nothing(pool_path: Path) -> None:
    with pool_client.serve(pool_path) as first, pool_client.serve(pool_path) as second:
        assert first.server_pid == second.server_pid
        first.create_device("base", "1M").write(0, b"kept")
    with Pool.open(pool_path) as pool:
        assert pool.device("base").read(0, 4) == b"kept"
    assert pool_client.connect(pool_path) is None
    assert not (pool_path / "socket").exists()


@pytest.fixture
def left_mounted(pool_path: Path, tmp_path: Path) -> Path:
    """A device named "base" that is mounted while no client is connected."""
    target = tmp_path / "mounted"
    target.mkdir()
    with pool_client.serve(pool_path) as client:
        client.create_device("base", "100M")
        client.make_file_system("base")
        client.mount("base", target)
    return target


@needs_mounts
def test_server_stays_for_a_mount_and_ends_with_it(pool_path: Path, left_mounted: Path) -> None:
    pid = json.loads(run_command("pool", "status", pool_path, "--json"))["server"]["pid"]
    with pytest.raises(errors.BusyError, match=str(pid)):
        Pool.open(pool_path)
    (left_mounted / "file").write_text("kept")
    run_command("device", "umount", pool_path, "base")
    assert pool_client.connect(pool_path) is None
    Pool.open(pool_path).close()


@needs_mounts
def test_server_ends_when_its_mount_is_unmounted_behind_its_back(pool_path: Path, left_mounted: Path) -> None:
    mount.unmount(left_mounted)
    wait_until(lambda: pool_client.connect(pool_path) is None)
    wait_until(lambda: not loops_below(pool_path))
    run_command("pool", "status", pool_path)


@needs_mounts
def test_server_waits_for_the_last_user_of_a_lazy_unmount(pool_path: Path, left_mounted: Path) -> None:
    user = subprocess.Popen(["sleep", "60"], cwd=left_mounted)
    mount.unmount(left_mounted, lazy=True)
    time.sleep(0.2)
    assert loops_below(pool_path)
    user.kill()
    user.wait()
    wait_until(lambda: pool_client.connect(pool_path) is None)
    assert not loops_below(pool_path)


@needs_mounts
def test_terminated_server_unmounts_and_keeps_everything(pool_path: Path, left_mounted: Path) -> None:
    (left_mounted / "file").write_text("unsynced")
    client = pool_client.connect(pool_path)
    assert client is not None
    user = subprocess.Popen(["sleep", "60"], cwd=left_mounted)
    os.kill(client.server_pid, signal.SIGTERM)
    wait_until(lambda: not mount.is_mounted(left_mounted))
    with pytest.raises(errors.DeviceIOError, match=f"process {client.server_pid}.*server.log"):
        client.status()
    user.kill()
    user.wait()
    wait_until(lambda: not loops_below(pool_path))
    run_command("device", "mount", pool_path, "base", left_mounted)
    assert (left_mounted / "file").read_text() == "unsynced"
    run_command("device", "umount", pool_path, "base")


def test_client_that_dies_takes_the_server_along(pool_path: Path) -> None:
    program = (
        "import os, sys; from blocksnap import pool_client; pool = pool_client.serve(sys.argv[1]);"
        "pool.create_device('base', '1M'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([*command()[:1], "-c", program, str(pool_path)], check=False)

    def is_free() -> bool:
        try:
            Pool.open(pool_path).close()
        except errors.BusyError:
            return False
        return True

    wait_until(is_free)
    with Pool.open(pool_path) as pool:
        assert pool.device("base").size == 1 << 20


def test_many_processes_start_one_server(pool_path: Path) -> None:
    program = (
        "import sys, time; from blocksnap import pool_client; pool = pool_client.serve(sys.argv[1]);"
        "print(pool.server_pid, flush=True); sys.stdin.read(); pool.close()"
    )
    words = [*command()[:1], "-c", program, str(pool_path)]
    clients = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    pids = {client.stdout.readline() for client in clients if client.stdout}
    for client in clients:
        client.communicate("")
    assert len(pids) == 1
    assert [client.returncode for client in clients] == [0] * 4
    Pool.open(pool_path).close()


def test_pool_that_this_process_has_open_cannot_be_served(pool_path: Path) -> None:
    with Pool.open(pool_path), pytest.raises(errors.BusyError, match=f"process {os.getpid()}"):
        pool_client.serve(pool_path)


def test_server_waits_for_a_verb_that_has_the_pool_open(pool_path: Path) -> None:
    pool = Pool.open(pool_path)
    threading.Timer(0.5, pool.close).start()
    pool_client.serve(pool_path).close()


def test_error_at_the_start_is_the_one_that_opening_raises(pool_path: Path) -> None:
    with pytest.raises(errors.DeviceNotFoundError, match="no pool at"):
        pool_client.serve(pool_path.parent / "none")
    with (pool_path / "metadata").open("r+b") as metadata:
        metadata.write(b"\xff" * 4096)
    with pytest.raises(errors.BlocksnapError) as expected:
        Pool.open(pool_path)
    with pytest.raises(type(expected.value)) as caught:
        pool_client.serve(pool_path)
    assert str(caught.value) == str(expected.value)


def test_stale_socket_is_replaced(pool_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(pool_path / "socket"))
    assert pool_client.connect(pool_path) is None
    with pool_client.serve(pool_path) as client:
        assert client.devices() == []


def test_directory_with_a_long_path_is_served(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 40) / ("longer" * 30)
    path.parent.mkdir()
    Pool.create(path, size="1M").close()
    with pool_client.serve(path) as client, pool_client.serve(path) as other:
        assert client.server_pid == other.server_pid


def test_other_users_are_refused(pool_path: Path) -> None:
    with pool_client.serve(pool_path):
        assert (pool_path / "socket").stat().st_mode & 0o777 == 0o600
        assert pool_path.stat().st_mode & 0o777 == 0o700
        for directory in (pool_path, *pool_path.parents):
            if str(directory).startswith("/tmp/"):
                directory.chmod(directory.stat().st_mode | 0o755)

        def connect(match: str) -> None:
            with pytest.raises(errors.PrivilegeError, match=match):
                pool_client.connect(pool_path)

        as_ordinary_user(lambda: connect("Permission denied"))
        (pool_path / "socket").chmod(0o666)
        as_ordinary_user(lambda: connect("served for user 0, not 65534"))
        pool_path.chmod(0o700)


def test_lost_server_is_an_error_and_the_next_one_serves_on(pool_path: Path) -> None:
    client = pool_client.serve(pool_path)
    client.create_device("base", "1M")
    os.kill(client.server_pid, signal.SIGKILL)
    with pytest.raises(errors.DeviceIOError, match="has ended"):
        client.devices()
    with pytest.raises(errors.ArgumentError, match="closed"):
        client.devices()
    client.close()
    with pool_client.serve(pool_path) as again:
        assert [device.name for device in again.devices()] == ["base"]
    assert_sound(pool_path / "metadata")


# ---- the same answers as from the pool itself --------------------------------------------------------------


def fill(path: Path) -> None:
    with Pool.open(path) as pool:
        base = pool.create_device("base", "10M", labels={"kind": "test"})
        base.write(0, bytes(range(256)) * 1024)
        snap = base.snapshot("snap")
        snap.write(3 * BLOCK, b"y" * BLOCK)
        snap.discard(0, BLOCK)


def test_served_pool_tells_what_the_pool_itself_tells(pool_path: Path, tmp_path: Path) -> None:
    fill(pool_path)
    with Pool.open(pool_path) as pool:
        usage, delta, runs = pool.usage(), pool.delta("base", "snap"), pool.reverse_mappings()
        found = [(d.name, d.id, d.size, d.origin, d.created, dict(d.labels)) for d in pool.devices()]
        with (tmp_path / "dump").open("wb") as dump, (tmp_path / "delta").open("wb") as text:
            pool.dump(dump.fileno())
            pool.write_delta("base", "snap", text.fileno())
        report, status = pool.check(), pool.status()
    with pool_client.serve(pool_path) as client:
        assert client.usage() == usage
        assert np.array_equal(client.delta("base", "snap"), delta)
        assert np.array_equal(client.reverse_mappings(), runs)
        assert [
            (d.name, d.id, d.size, d.origin, d.created, dict(d.labels)) for d in client.devices()
        ] == found
        assert (client.status().transaction_id, client.status().data_free_bytes) == (
            status.transaction_id,
            status.data_free_bytes,
        )
        assert client.check() == report
        assert not client.read_only
        assert run_command("pool", "dump", pool_path).encode() == (tmp_path / "dump").read_bytes()
        assert (
            run_command("pool", "delta", pool_path, "base", "snap").encode()
            == (tmp_path / "delta").read_bytes()
        )


def test_devices_of_a_served_pool_read_and_write(served: PoolClient) -> None:
    device = served.create_device("base", "30M", labels={"a": "b"})
    content = np.random.default_rng(1).bytes(9 << 20)
    assert device.write(1000, content) == len(content)
    device.flush()
    assert device.read(0, len(content) + 2000) == bytes(1000) + content + bytes(1000)
    device.discard(BLOCK, 2 * BLOCK)
    assert device.read(BLOCK, 2 * BLOCK) == bytes(2 * BLOCK)
    device.resize("40M")
    device.set_labels({"c": "d"})
    assert (device.size, dict(device.labels)) == (40 << 20, {"c": "d"})
    snap = device.snapshot("snap")
    assert (snap.origin, snap.read(1000, 10)) == ("base", content[:10])
    snap.delete()
    served.commit()
    assert [one.name for one in served.devices()] == ["base"]
    with pytest.raises(errors.DeviceNotFoundError, match="snap"):
        snap.read(0, 1)
    with pytest.raises(errors.ArgumentError):
        device.read(40 << 20, 1)


def test_served_pool_is_extended_with_progress(served: PoolClient) -> None:
    seen: list[tuple[int, int]] = []
    served.extend(size="520M", preallocate=True, progress=lambda done, total: seen.append((done, total)))
    assert served.status().data_bytes == 520 << 20
    assert seen[-1] == (8 << 20, 8 << 20)
    with pytest.raises(errors.ArgumentError, match="shrink"):
        served.extend(size="1M")


def test_threads_of_one_client_take_turns(served: PoolClient) -> None:
    devices = [served.create_device(f"d{number}", "8M") for number in range(4)]

    def work(number: int) -> None:
        for round in range(20):
            devices[number].write(round * 4096, bytes([number]) * 4096)
            assert devices[number].read(round * 4096, 4096) == bytes([number]) * 4096

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, device in enumerate(devices):
        assert device.read(0, 20 * 4096) == bytes([number]) * (20 * 4096)


def test_nonsense_on_the_socket_harms_nobody(pool_path: Path, served: PoolClient) -> None:
    header = b"\0\0\0\2" + bytes(8)
    for nonsense in (b"\xff" * 64, header + b"{}", header + b"[]", header + b"}{", header, b"\0"):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(pool_path / "socket"))
            stranger.sendall(nonsense)
            stranger.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass
    with pytest.raises(errors.ArgumentError, match="knows no"):
        served.ask("close")
    with pytest.raises(errors.BlocksnapError, match="TypeError"):
        served.ask("status", unknown=1)
    assert served.devices() == []


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
