"""Pools that are served, for tests: made in a temporary directory, and nothing left of them afterwards."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from blocksnap import errors, mount, pool_client
from blocksnap.dead_mounts import end_dead_export
from blocksnap.pool import Pool
from blocksnap.pool_client import PoolClient

__all__ = [
    "both_engines",
    "command",
    "device_mounted",
    "end_server",
    "engine",
    "loops_below",
    "mounts_below",
    "needs_mounts",
    "pool_path",
    "run_command",
    "served",
    "wait_until",
    "wait_until_free",
]

needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0
    or not os.access("/dev/loop-control", os.W_OK)
    or not os.access("/dev/fuse", os.W_OK)
    or (shutil.which("mke2fs") or shutil.which("mke2fs", path="/usr/sbin:/sbin")) is None,
    reason="needs root, /dev/loop-control, /dev/fuse and mke2fs",
)

both_engines = pytest.mark.parametrize(
    "engine", ["user", pytest.param("kernel", marks=pytest.mark.kernel)], indirect=True
)


def mounts_below(path: Path) -> list[str]:
    return [entry.target for entry in mount.mount_table() if Path(entry.target).is_relative_to(path)]


def loops_below(path: Path) -> list[str]:
    return [loop.path for loop in mount.loop_devices() if Path(loop.backing_path).is_relative_to(path)]


def wait_until(true: Callable[[], object], seconds: float = 20) -> None:
    """Wait for something that other processes do; fail when it takes far too long."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def wait_until_free(pool: Path) -> None:
    """Wait until a server that was killed has let go of its pool."""

    def is_free() -> bool:
        try:
            Pool.open(pool, read_only=True).close()
        except errors.BusyError:
            return False
        return True

    wait_until(is_free)


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", "from blocksnap.cli import main; main()", *map(str, words)]


def run_command(*words: object, status: int = 0) -> str:
    """Run the command line in a process of its own; return what it prints, on stderr if it must fail."""
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """The engine that serves the pool: "user", unless the test is parametrized with `both_engines`."""
    return str(getattr(request, "param", "user"))


@pytest.fixture
def pool_path(tmp_path: Path, engine: str) -> Iterator[Path]:
    """The directory of a new pool; whoever serves it at the end is ended, and may leave nothing."""
    path = tmp_path / "pool"
    Pool.create(path, size="512M", engine=engine).close()
    yield path
    end_server(path)
    end_dead_export(path / "export")
    assert mounts_below(tmp_path) == []
    assert loops_below(tmp_path) == []


def end_server(path: Path) -> None:
    """Unmount what a server has mounted, so that it ends."""
    client = pool_client.connect(path)
    if client is None:
        return
    with client:
        for mounted in client.mounts():
            with suppress(errors.BlocksnapError):
                client.umount(mounted.device)
        if client.mounts():
            os.kill(client.server_pid, signal.SIGKILL)


@pytest.fixture
def served(pool_path: Path, engine: str) -> Iterator[PoolClient]:
    """A connection to the server of a new pool."""
    with pool_client.serve(pool_path, engine=engine) as client:
        yield client


@pytest.fixture
def device_mounted(served: PoolClient, tmp_path: Path) -> Path:
    """The mount of a device named "base", with a file on it."""
    target = tmp_path / "mounted"
    target.mkdir()
    served.create_device("base", "256M")
    served.make_file_system("base")
    served.mount("base", target)
    (target / "file").write_bytes(b"content" * 1000)
    return target
