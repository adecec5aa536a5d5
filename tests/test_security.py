"""What SECURITY.md says of other users: modes, whose directories are taken, who may talk to a server."""

import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from blocksnap import drivers, errors, pool_client, pool_repair
from blocksnap.pool import Pool
from blocksnap.pool_server import PoolServer
from tests.driver_params import driver_root
from tests.layer_roots import as_ordinary_user, needs_root, users_root
from tests.pool_servers import device_mounted, engine, needs_mounts, pool_path, served
from tests.trees import describe_tree

__all__ = ["device_mounted", "engine", "pool_path", "served", "users_root"]

NOBODY = 65534


@contextmanager
def permissive_umask() -> Iterator[None]:
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def umask() -> Iterator[None]:
    with permissive_umask():
        yield


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def assert_closed(pool: Path) -> None:
    """Assert that nobody but the owner can look into a pool's directory or open one of its files."""
    assert mode(pool) == 0o700
    for entry in pool.iterdir():
        if entry.name != "export":  # a file system of its own, for its server alone
            assert mode(entry) == 0o600, entry


# ---- modes


@pytest.mark.usefixtures("umask")
def test_pool_is_its_owners_alone_whatever_the_umask_allows(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "pool", size="1M") as pool:
        assert_closed(tmp_path / "pool")
        pool.create_device("base", "1M").snapshot("snap")
        pool.extend(size="2M")
        assert_closed(tmp_path / "pool")
    pool_repair.repair(tmp_path / "pool", swap=True)
    assert_closed(tmp_path / "pool")
    assert (tmp_path / "pool" / "metadata.damaged").exists()


@needs_mounts
@pytest.mark.usefixtures("umask", "device_mounted")
def test_served_pool_is_its_owners_alone_whatever_the_umask_allows(pool_path: Path) -> None:
    assert {"socket", "server.log", "catalog.db-wal"} <= set(os.listdir(pool_path))
    assert_closed(pool_path)


@needs_root
@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("driver", ["vfs", "overlay", "btrfs", "thin", "unionfs", "qcow2"])
def test_layer_lies_in_a_directory_that_only_its_owner_enters(tmp_path: Path, driver: str) -> None:
    with driver_root(tmp_path, driver) as root, drivers.open(driver, root) as opened:
        opened.create("base")
        with opened.mounted("base") as mounted:
            above = [place for place in mounted.parents if place.is_relative_to(root)]
            assert any(mode(place) == 0o700 for place in above)
        opened.cleanup()


# ---- another user's pool


def refused(work: Callable[[], object], match: str) -> None:
    with pytest.raises(errors.PrivilegeError, match=match) as caught:
        work()
    assert "\n" not in str(caught.value)


@needs_root
def test_ordinary_user_cannot_open_read_or_repair_the_pool_of_another(users_root: Path) -> None:
    pool = users_root.parent / "pool"
    with Pool.create(pool, size="1M") as opened:
        opened.create_device("base", "1M")
    before = describe_tree(pool)

    def work() -> None:
        for attempt in (Pool.open, pool_repair.repair, pool_client.serve):
            refused(partial(attempt, pool), f"{pool}.*belongs to user 0, not {NOBODY}")
        for name in ("metadata", "data", "catalog.db"):
            with pytest.raises(PermissionError):
                (pool / name).open("rb")
        refused(lambda: Pool.open(metadata=pool / "metadata", data=pool / "data"), "Permission denied")

    as_ordinary_user(work)
    assert describe_tree(pool) == before


@needs_root
def test_root_takes_over_no_directory_of_another_user(users_root: Path) -> None:
    """Who owns it could put symbolic links to anything in the place of its files."""
    refused(lambda: Pool.create(users_root, size="1M"), f"{users_root} belongs to user {NOBODY}, not 0")
    refused(lambda: drivers.open("vfs", users_root), f"{users_root} belongs to user {NOBODY}, not 0")
    assert list(users_root.iterdir()) == []
    assert users_root.stat().st_uid == NOBODY
    as_ordinary_user(lambda: Pool.create(users_root / "pool", size="1M").close())
    secret = users_root.parent / "secret"
    secret.write_bytes(b"secret" * 1000)
    (users_root / "pool" / "data").unlink()
    (users_root / "pool" / "data").symlink_to(secret)
    for attempt in (Pool.open, pool_repair.repair, pool_client.serve):
        refused(partial(attempt, users_root / "pool"), f"belongs to user {NOBODY}, not 0")
    assert secret.read_bytes() == b"secret" * 1000


@pytest.mark.parametrize("name", ["metadata", "data", "catalog.db", "catalog.db.creating"])
def test_link_in_the_way_of_a_new_pool_is_not_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / name).symlink_to(tmp_path / "target")
    with pytest.raises(errors.BlocksnapError, match="pool"):
        Pool.create(tmp_path / "pool", size="1M")
    assert not (tmp_path / "target").exists()
    assert (tmp_path / "pool" / name).is_symlink()


def test_link_in_the_way_of_a_servers_log_is_not_followed(tmp_path: Path) -> None:
    Pool.create(tmp_path / "pool", size="1M").close()
    (tmp_path / "pool" / "server.log").symlink_to(tmp_path / "target")
    with pytest.raises(errors.BlocksnapError, match=r"server\.log"):
        pool_client.serve(tmp_path / "pool")
    assert not (tmp_path / "target").exists()


# ---- another user's server


@needs_root
def test_root_may_talk_to_a_users_server(users_root: Path) -> None:
    pool = users_root / "pool"
    end, other = socket.socketpair()
    child = os.fork()
    if child == 0:
        end.close()
        try:
            as_ordinary_user(lambda: serve_own(pool, other))
        finally:
            os._exit(0)
    other.close()
    with end:
        assert end.recv(4096), "no greeting"
        client = pool_client.connect(pool)
        assert client is not None
        with client:
            assert [device.name for device in client.devices()] == ["base"]
    os.waitpid(child, 0)
    assert not (pool / "socket").exists()


def serve_own(pool: Path, first: socket.socket) -> None:
    """Serve a new pool until the first connection ends."""
    made = Pool.create(pool, size="1M")
    made.create_device("base", "1M")
    PoolServer(pool, made).run(first)
