"""A server that is stopped (SIGSTOP): nobody waits for it in vain, and once it goes on all is well."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap import errors, mount, pool_client
from blocksnap.pool_client import PoolClient
from tests.pool_servers import (
    device_mounted,
    engine,
    needs_mounts,
    pool_path,
    run_command,
    served,
    wait_until,
)
from tests.thin_tools import assert_sound, needs_thin_tools

__all__ = ["device_mounted", "engine", "pool_path", "served"]

pytestmark = [needs_mounts, needs_thin_tools]


@contextmanager
def stopped(client: PoolClient) -> Iterator[None]:
    os.kill(client.server_pid, signal.SIGSTOP)
    try:
        wait_until(lambda: "T (stopped)" in Path(f"/proc/{client.server_pid}/status").read_text())
        yield
    finally:
        os.kill(client.server_pid, signal.SIGCONT)


def silent_below(path: Path) -> list[str]:
    told = json.loads(run_command("doctor", "--json"))
    assert not [line for line in told["leftovers"] if str(path) in line]
    return [line for line in told["silent"] if str(path) in line]


@pytest.mark.usefixtures("device_mounted")
def test_doctor_names_a_stopped_server_and_its_mend(served: PoolClient, pool_path: Path) -> None:
    with stopped(served):
        (line,) = silent_below(pool_path)
    pid = served.server_pid
    assert line == (
        f"FUSE export at {pool_path}/export does not answer; its server is"
        f" process {pid}, which is stopped: kill -CONT {pid}"
    )
    assert silent_below(pool_path) == []


def test_verb_for_a_stopped_server_names_it_and_its_mend(served: PoolClient, pool_path: Path) -> None:
    told = f"process {served.server_pid}, which is stopped: kill -CONT {served.server_pid}"
    with stopped(served):
        with pytest.raises(errors.BusyError, match=told):
            pool_client.connect(pool_path)
        said = run_command("pool", "status", pool_path, status=1)
        assert said.endswith(f"{told}\n")
        assert said.count("\n") == 1
    run_command("pool", "status", pool_path)


def test_write_to_a_stopped_server_is_whole_once_it_goes_on(
    served: PoolClient, device_mounted: Path, pool_path: Path
) -> None:
    content = os.urandom(4 << 20)

    def write() -> None:
        with (device_mounted / "new").open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())

    writer = threading.Thread(target=write)
    with stopped(served):
        writer.start()
        writer.join(1)
        assert writer.is_alive()
    writer.join()
    served.umount("base")
    served.mount("base", device_mounted)
    assert (device_mounted / "new").read_bytes() == content
    served.umount("base")
    served.close()
    assert_sound(pool_path / "metadata")


def test_probe_of_what_is_not_there_says_so(tmp_path: Path) -> None:
    assert mount.probe(tmp_path, 3) == 0
    assert os.strerror(mount.probe(tmp_path / "none", 3)) == "No such file or directory"
