"""kill -9 of the process that serves a pool, while a mounted device is written to and devices come and go."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blocksnap import drivers, errors, pool_client
from blocksnap.pool_client import PoolClient
from tests.pool_servers import (
    device_mounted,
    engine,
    loops_below,
    mounts_below,
    needs_mounts,
    pool_path,
    run_command,
    served,
    wait_until,
    wait_until_free,
)
from tests.thin_tools import assert_sound, needs_thin_tools

__all__ = ["device_mounted", "engine", "pool_path", "served"]

pytestmark = [needs_mounts, needs_thin_tools]

ROUNDS = range(8)

# Writes numbered records of 4 KiB, says each number once it is synced, ends at the first error.
WRITER = """
import os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
number = 0
try:
    while True:
        os.pwrite(file, b"%08d" % number * 512, number * 4096)
        os.fsync(file)
        print(number, flush=True)
        number += 1
except OSError as error:
    print(error, file=sys.stderr)
"""


@contextmanager
def writer(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that writes until its file system fails."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@dataclass
class Changes:
    """Devices that are made and deleted through the server, as far as it has confirmed that."""

    client: PoolClient
    random: random.Random
    there: set[str] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)

    def run(self) -> None:
        number = 0
        while True:
            number += 1
            doomed = sorted(self.there)[0] if len(self.there) > 3 else None
            name = doomed or f"device {number}"
            self.unsure.add(name)
            try:
                self._change(name, delete=doomed is not None)
            except errors.BlocksnapError:
                return
            self.unsure.discard(name)

    def _change(self, name: str, *, delete: bool) -> None:
        if delete:
            self.client.device(name).delete()
            self.there.discard(name)
            return
        if self.random.random() < 0.5:
            self.client.device("base").snapshot(name)
        else:
            self.client.create_device(name, "1M").write(0, b"x" * 5000)
        self.there.add(name)


@pytest.mark.parametrize("seed", ROUNDS)
def test_killed_server_loses_nothing_that_was_synced(
    seed: int, pool_path: Path, served: PoolClient, device_mounted: Path, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    changes = Changes(pool_client.serve(pool_path), chance)
    served.create_device("other", "16M")
    served.make_file_system("other")
    (tmp_path / "other").mkdir()
    threads = [
        threading.Thread(target=changes.run),
        threading.Thread(target=mount_again_and_again, args=(pool_path, tmp_path / "other")),
    ]
    with writer(device_mounted / "records") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        for thread in threads:
            thread.start()
        time.sleep(chance.uniform(0.02, 0.8))
        os.kill(served.server_pid, signal.SIGKILL)
        synced = [0, *map(int, process.stdout.read().split())]
    for thread in threads:
        thread.join()
    recover(pool_path, seed)
    assert (mounts_below(tmp_path), loops_below(tmp_path)) == ([], [])
    assert_sound(pool_path / "metadata")
    with pool_client.serve(pool_path) as again:
        names = {device.name for device in again.devices()} - {"base", "other"}
        assert names - changes.unsure == changes.there - changes.unsure
        again.mount("base", device_mounted)
        records = (device_mounted / "records").read_bytes()
        for number in synced:
            assert records[number * 4096 : (number + 1) * 4096] == b"%08d" % number * 512
        again.umount("base")
    assert_sound(pool_path / "metadata")


def mount_again_and_again(pool: Path, target: Path) -> None:
    """Mount and unmount a device until the server is gone."""
    try:
        with pool_client.serve(pool) as client:
            while True:
                client.mount("other", target)
                client.umount("other")
    except errors.BlocksnapError:
        return


def recover(pool: Path, seed: int) -> None:
    """Take away what the dead server left, in the ways that people have for it."""
    if seed % 3 == 0:
        wait_until(lambda: is_clean_after_doctor(pool))
    elif seed % 3 == 1:
        wait_until_free(pool)
    else:
        pool_client.serve(pool).close()
    wait_until_free(pool)


def is_clean_after_doctor(pool: Path) -> bool:
    run_command("doctor", "--clean")
    return not mounts_below(pool.parent) and not loops_below(pool.parent)


def test_driver_goes_on_after_its_server_was_killed(tmp_path: Path) -> None:
    with drivers.open("thin", tmp_path / "root", size="256M") as driver:
        driver.create("base")
        root = driver.get("base")
        (root / "file").write_text("synced")
        driver.sync()
        client = pool_client.connect(tmp_path / "root" / "pool")
        assert client is not None
        os.kill(client.server_pid, signal.SIGKILL)
        client.close()
        with pytest.raises(errors.DeviceIOError, match="has ended"):
            driver.create("child", "base")
        wait_until_free(tmp_path / "root" / "pool")
        driver.create("child", "base")
        with driver.mounted("child") as child:
            assert (child / "file").read_text() == "synced"
        with driver.mounted("base") as root:
            assert (root / "file").read_text() == "synced"
        driver.cleanup()
    assert (mounts_below(tmp_path), loops_below(tmp_path)) == ([], [])


@pytest.mark.parametrize("way", ["open", "doctor"])
def test_mount_of_a_killed_holder_is_gone_after_the_next_open_or_doctor(tmp_path: Path, way: str) -> None:
    root = tmp_path / "root"
    program = (
        "import os, sys; from blocksnap import drivers\n"
        "driver = drivers.open('thin', sys.argv[1], size='256M')\n"
        "driver.create('base'); driver.create_read_write('lasting', 'base')\n"
        "driver.get('lasting', lasting=True); driver.get('base'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, root], check=False)
    assert len(mounts_below(root / "mnt")) == 2
    if way == "doctor":
        run_command("doctor", "--clean")
    else:
        drivers.open("thin", root).close()
    assert mounts_below(root / "mnt") == [str(root / "mnt" / "lasting")]
    with drivers.open("thin", root) as driver:
        driver.cleanup()
    assert (mounts_below(tmp_path), loops_below(tmp_path)) == ([], [])
