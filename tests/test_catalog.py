"""The catalog, and the protocol that keeps it and the pool telling the same after a crash at any step."""

import os
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from blocksnap import errors
from blocksnap.catalog import Catalog
from blocksnap.device_record import Action, DeviceRecord, Operation
from blocksnap.pool import Pool
from tests.thin_tools import assert_sound, needs_thin_tools

SIZE = 1 << 20
CRASHED = 77


def record(device_id: int, name: str, size: int = SIZE, origin: int | None = None) -> DeviceRecord:
    return DeviceRecord(device_id, name, size, 1000 + device_id, origin, {"made": "by a test"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.db"


def kill_process_with(path: Path, steps: Callable[[Catalog], object]) -> None:
    """Run steps on the catalog in a child that ends without closing anything."""
    child = os.fork()
    if child == 0:
        try:
            steps(Catalog.open(path))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_new_catalog_has_the_mode_0600_and_nothing_in_it(path: Path) -> None:
    catalog = Catalog.create(path, 7)
    assert path.stat().st_mode & 0o777 == 0o600
    assert (catalog.transaction_id, catalog.records(), catalog.intent()) == (7, [], [])
    catalog.close()
    assert [entry.name for entry in path.parent.iterdir()] == ["catalog.db"]


def test_finish_applies_the_operations_in_order(path: Path) -> None:
    catalog = Catalog.create(path, 0)
    first, second = record(1, "first"), record(2, "second", origin=1)
    assert catalog.intend([Operation(Action.CREATE, first), Operation(Action.CREATE, second)]) == 1
    catalog.finish()
    assert catalog.records() == [first, second]
    grown = record(2, "second", 2 * SIZE)
    changes = [
        Operation(Action.DELETE, first),
        Operation(Action.CREATE, record(3, "first")),
        Operation(Action.RESIZE, grown),
    ]
    assert catalog.intend(changes) == 2
    assert catalog.records() == [first, second]
    catalog.finish()
    assert catalog.records() == [grown, record(3, "first")]
    assert (catalog.transaction_id, catalog.intent()) == (2, [])
    catalog.close()


def test_an_unfinished_intent_is_applied_by_the_next_one(path: Path) -> None:
    catalog = Catalog.create(path, 0)
    catalog.intend([Operation(Action.CREATE, record(1, "a"))])
    assert catalog.intend([Operation(Action.CREATE, record(2, "b"))]) == 2
    assert catalog.records() == [record(1, "a")]
    catalog.close()


@pytest.mark.parametrize(("pool_id", "names"), [(5, []), (6, ["a"])])
def test_the_pools_number_says_whether_to_finish_or_to_undo(
    path: Path, pool_id: int, names: list[str]
) -> None:
    Catalog.create(path, 5).close()
    operation = Operation(Action.CREATE, record(1, "a"))
    kill_process_with(path, lambda catalog: catalog.intend([operation]))
    catalog = Catalog.open(path)
    assert catalog.intent() == [operation]
    catalog.recover(pool_id)
    assert [each.name for each in catalog.records()] == names
    assert (catalog.transaction_id, catalog.intent()) == (pool_id, [])
    catalog.close()


@pytest.mark.parametrize("pool_id", [0, 4, 7, 1 << 40])
def test_other_numbers_are_refused_by_name(path: Path, pool_id: int) -> None:
    catalog = Catalog.create(path, 5)
    catalog.intend([Operation(Action.CREATE, record(1, "a"))])
    with pytest.raises(errors.PoolFormatError, match=f"transaction 5, but the pool is at {pool_id}: .*adopt"):
        catalog.recover(pool_id)
    catalog.close()


def test_one_number_ahead_without_an_intent_is_refused(path: Path) -> None:
    catalog = Catalog.create(path, 5)
    with pytest.raises(errors.PoolFormatError):
        catalog.recover(6)
    catalog.close()


def test_read_only_recovers_in_memory_and_changes_nothing(path: Path) -> None:
    Catalog.create(path, 5).close()
    operation = Operation(Action.CREATE, record(1, "a"))
    kill_process_with(path, lambda catalog: catalog.intend([operation]))
    before = {entry.name: entry.read_bytes() for entry in path.parent.iterdir()}
    catalog = Catalog.open(path, read_only=True)
    catalog.recover(6)
    assert [each.name for each in catalog.records()] == ["a"]
    catalog.close()
    assert {entry.name: entry.read_bytes() for entry in path.parent.iterdir()} == before


def test_a_foreign_database_is_refused(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE t (x)")
    database.close()
    with pytest.raises(errors.PoolFormatError, match="not a catalog of blocksnap"):
        Catalog.open(path)


def test_a_newer_catalog_is_refused(path: Path) -> None:
    Catalog.create(path, 0).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(errors.PoolFormatError, match="version 99"):
        Catalog.open(path)


VERSION_1 = """
PRAGMA application_id = 0x62736E70;
PRAGMA user_version = 1;
CREATE TABLE pool (transaction_id INTEGER NOT NULL);
CREATE TABLE device (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, size INTEGER NOT NULL,
    origin INTEGER, created INTEGER NOT NULL, labels TEXT NOT NULL);
CREATE TABLE intent (sequence INTEGER PRIMARY KEY, action TEXT NOT NULL, id INTEGER NOT NULL,
    name TEXT NOT NULL, size INTEGER NOT NULL, origin INTEGER, created INTEGER NOT NULL,
    labels TEXT NOT NULL, completing_id INTEGER NOT NULL);
INSERT INTO pool VALUES (5);
INSERT INTO device VALUES (1, 'a', 1048576, NULL, 1001, '{"made": "by a test"}');
INSERT INTO intent VALUES (1, 'create', 2, 'b', 1048576, 1, 1002, '{"made": "by a test"}', 6);
"""


def test_an_older_catalog_is_taken_over(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.executescript(VERSION_1)
    database.close()
    reading = Catalog.open(path, read_only=True)
    assert reading.records() == [record(1, "a")]
    reading.close()
    catalog = Catalog.open(path)
    catalog.recover(6)
    assert catalog.records() == [record(1, "a"), record(2, "b", origin=1)]
    assert not catalog.holding
    catalog.close()
    Catalog.open(path).close()


def test_a_damaged_file_is_named_with_the_mend(path: Path) -> None:
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(errors.DamagedMetadataError, match=r"catalog\.db.*move it away"):
        Catalog.open(path)


def test_an_intent_that_does_not_fit_the_devices_is_refused_and_nothing_changes(path: Path) -> None:
    catalog = Catalog.create(path, 0)
    catalog.intend([Operation(Action.CREATE, record(1, "a")), Operation(Action.CREATE, record(2, "a"))])
    with pytest.raises(errors.DamagedMetadataError, match="UNIQUE"):
        catalog.finish()
    assert (catalog.records(), catalog.transaction_id) == ([], 0)
    catalog.close()


# ---- a crash between every two steps of every operation


def create(pool: Pool) -> None:
    pool.create_device("new", SIZE)


def snapshot(pool: Pool) -> None:
    pool.device("base").snapshot("new")


def delete(pool: Pool) -> None:
    pool.device("base").delete()


def shrink(pool: Pool) -> None:
    pool.device("base").resize(SIZE // 2)


def grow(pool: Pool) -> None:
    pool.device("base").resize(2 * SIZE)


def several(pool: Pool) -> None:
    with pool.transaction():
        pool.device("base").snapshot("new").write(0, b"written inside")
        pool.device("base").delete()
        pool.create_device("base", 3 * SIZE)


OPERATIONS = [create, snapshot, delete, shrink, grow, several]


def crash_at_call(number: int) -> None:
    """End this process at the n-th call from now on that blocksnap makes to SQLite, the C core or other C."""
    left = number

    def count(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal left
        if event == "c_call" and frame.f_globals["__name__"].startswith("blocksnap"):
            left -= 1
            if left == 0:
                os._exit(CRASHED)

    sys.setprofile(count)


def run_and_crash(path: Path, operation: Callable[[Pool], None], number: int) -> bool:
    """Run an operation on the pool in a child that dies at the n-th call; return whether it got that far."""
    child = os.fork()
    if child == 0:
        try:
            pool = Pool.open(path)
            crash_at_call(number)
            operation(pool)
            sys.setprofile(None)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, CRASHED)
    return status == CRASHED


def state_of(pool: Pool) -> list[tuple[str, int, str | None, bytes]]:
    return [(device.name, device.size, device.origin, device.read(0, 32)) for device in pool.devices()]


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what a killed process leaves is the same."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="blocksnap-test-", dir=shared) as folder:
        yield Path(folder)


def make_pool(path: Path) -> Pool:
    pool = Pool.create(path, size="2M")
    base = pool.create_device("base", SIZE)
    base.write(0, b"content of the base device" * 20000)
    base.snapshot("other")
    return pool


def copy_pool(source: Path, target: Path) -> None:
    target.mkdir(mode=0o700)
    for part in source.iterdir():
        (target / part.name).write_bytes(part.read_bytes())


@needs_thin_tools
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_crash_at_any_call_leaves_the_state_before_or_after(
    memory_path: Path, operation: Callable[[Pool], None]
) -> None:
    with make_pool(memory_path / "origin") as pool:
        before = state_of(pool)
    copy_pool(memory_path / "origin", memory_path / "done")
    with Pool.open(memory_path / "done") as pool:
        operation(pool)
        after = state_of(pool)

    seen = []
    path = memory_path / "pool"
    number = 0
    while True:
        number += 1
        copy_pool(memory_path / "origin", path)
        crashed = run_and_crash(path, operation, number)
        with Pool.open(path) as pool:
            found = state_of(pool)
            ids = {device.id for device in pool.devices()}
            assert {info.id for info in pool._engine.devices()} == ids
            assert pool._catalog.intent() == []
            pool.create_device("one more", SIZE)
        assert found in (before, after)
        assert_sound(path / "metadata")
        seen.append(found == after)
        if not crashed:
            break
        for part in path.iterdir():
            part.unlink()
        path.rmdir()
    assert seen == sorted(seen), "once an operation has happened, a later crash must not lose it"
    assert seen[0] is False
    assert seen[-1] is True


@needs_thin_tools
def test_recovery_itself_may_crash_at_any_call(memory_path: Path) -> None:
    make_pool(memory_path / "origin").close()
    path = memory_path / "pool"
    for number in range(1, 400, 23):
        copy_pool(memory_path / "origin", path)
        run_and_crash(path, several, number)
        for again in range(1, 300, 41):
            child = os.fork()
            if child == 0:
                crash_at_call(again)
                Pool.open(path)
                os._exit(0)
            os.waitpid(child, 0)
        with Pool.open(path) as pool:
            assert {info.id for info in pool._engine.devices()} == {device.id for device in pool.devices()}
            assert len(pool.devices()) in (2, 3)
        assert_sound(path / "metadata")
        for part in path.iterdir():
            part.unlink()
        path.rmdir()
