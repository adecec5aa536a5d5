"""The process that serves a pool, seen from its clients."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from blocksnap import errors, mount, pool_client
from blocksnap.pool import Pool
from blocksnap.pool_client import PoolClient
from tests.layer_roots import as_ordinary_user
from tests.pool_servers import (
    both_engines,
    command,
    device_mounted,
    engine,
    loops_below,
    needs_mounts,
    pool_path,
    run_command,
    served,
    wait_until,
    wait_until_free,
)
from tests.thin_tools import assert_sound

__all__ = ["device_mounted", "engine", "left_mounted", "pool_path", "served"]


class Writer:
    """A thread that appends to a file of a mounted device, with fsync, until it is stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        with self.path.open("wb") as file:
            while not self._stop.is_set():
                file.write(b"%07d\n" % self.count)
                file.flush()
                os.fsync(file.fileno())
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
@both_engines
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
@both_engines
def test_freeze_that_takes_too_long_is_given_up_and_thawed(served: PoolClient, device_mounted: Path) -> None:
    with writing(device_mounted / "log") as writer:
        with pytest.raises(errors.DeviceIOError, match="longer than 0 ms"):
            served.device("base").snapshot("snap", freeze_timeout=0)
        writer.goes_on()
        assert [device.name for device in served.devices()] == ["base"]


@needs_mounts
@both_engines
def test_snapshot_of_a_file_system_that_somebody_froze_is_refused(
    served: PoolClient, device_mounted: Path
) -> None:
    refused = pytest.raises(errors.BusyError, match=r"already frozen|resource busy")
    with mount.frozen(device_mounted), refused:
        served.device("base").snapshot("snap")
    (device_mounted / "after").write_text("thawed")


@needs_mounts
@both_engines
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
def left_mounted(pool_path: Path, tmp_path: Path, engine: str) -> Path:
    """A device named "base" that is mounted while no client is connected."""
    target = tmp_path / "mounted"
    target.mkdir()
    with pool_client.serve(pool_path, engine=engine) as client:
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
@both_engines
def test_server_waits_for_the_last_user_of_a_lazy_unmount(pool_path: Path, left_mounted: Path) -> None:
    user = subprocess.Popen(["sleep", "60"], cwd=left_mounted)
    mount.unmount(left_mounted, lazy=True)
    time.sleep(0.2)
    assert loops_below(pool_path)
    user.kill()
    user.wait()
    wait_until(lambda: pool_client.connect(pool_path) is None)
    wait_until(lambda: not loops_below(pool_path))


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
    wait_until_free(pool_path)
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


def test_nonsense_on_the_socket_harms_nobody(pool_path: Path, served: PoolClient) -> None:
    header = b"\0\0\0\2" + bytes(8)
    for nonsense in (
        b"\xff" * 64,
        header + b"{}",
        header + b"[]",
        header + b"}{",
        header + b"\xff\xff",
        header,
        b"\0",
    ):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(pool_path / "socket"))
            stranger.sendall(nonsense)
            stranger.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass
    assert "Traceback" not in (pool_path / "server.log").read_text()
    with pytest.raises(errors.ArgumentError, match="knows no"):
        served.ask("close")
    with pytest.raises(errors.BlocksnapError, match="TypeError"):
        served.ask("status", unknown=1)
    assert served.devices() == []
