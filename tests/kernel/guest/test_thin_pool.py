"""Thin pools of the kernel: messages, status lines in every mode, events."""

import errno
import os
import struct
import threading

import pytest

from blocksnap.device_mapper import (
    Control,
    Device,
    FailedStatus,
    OtherTarget,
    PoolMode,
    Status,
    ThinPoolTarget,
    ThinStatus,
    ThinTarget,
)
from blocksnap.errors import (
    ArgumentError,
    BlocksnapError,
    BusyError,
    DeviceExistsError,
    DeviceIOError,
    DeviceNotFoundError,
    NotSupportedError,
)
from tests.kernel.devices import BLOCK, MIB, Disks, leftovers, linear, read_at, write_at
from tests.kernel.pools import (
    DATA,
    METADATA,
    SIZE,
    activate,
    make_thin,
    pool_status,
    pool_target,
    start_pool,
)
from tests.thin_image import seal_file


@pytest.fixture
def pool(control: Control, disks: Disks) -> Device:
    return start_pool(control, disks)


# ---- a pool and its devices ----


def test_a_new_pool_is_empty_and_writable(pool: Device) -> None:
    status = pool_status(pool)
    assert (status.transaction_id, status.used_data_blocks) == (0, 0)
    assert (status.total_data_blocks, status.total_metadata_blocks) == (DATA // BLOCK, METADATA // 4096)
    assert (status.mode, status.held_root, status.needs_check) == (PoolMode.READ_WRITE, None, False)
    assert (status.discard, status.when_full) == ("discard_passdown", "error_if_no_space")
    assert status.metadata_low_water_blocks == METADATA // 4096 // 4
    assert status.extra == ()


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"skip_block_zeroing": True, "error_if_no_space": False},
        {"ignore_discard": True},
        {"no_discard_passdown": True, "skip_block_zeroing": True},
    ],
)
def test_the_pool_table_is_what_was_loaded(control: Control, disks: Disks, features: dict[str, bool]) -> None:
    target = pool_target(disks, low_water_blocks=7, **features)
    assert Device.create(control, "pool", [target]).table() == (target,)


def test_a_snapshot_of_a_suspended_device_stays_as_it_was(control: Control, pool: Device) -> None:
    origin = make_thin(control, pool, 1)
    write_at(origin.path, 0, b"old" * 1000)
    with origin.suspended():
        pool.create_snap(2, 1)
    snapshot = activate(control, pool, 2)
    write_at(origin.path, 0, b"new" * 1000)
    assert read_at(snapshot.path, 0, 3000) == b"old" * 1000
    assert read_at(origin.path, 0, 3000) == b"new" * 1000
    assert origin.table() == (ThinTarget(SIZE, pool.number, 1),)


def test_a_thin_status_counts_what_is_mapped(control: Control, pool: Device) -> None:
    thin = make_thin(control, pool, 1)
    assert thin.status(commit=True) == (ThinStatus(0, 0),)
    write_at(thin.path, 3 * BLOCK, b"x")
    assert thin.status(commit=True) == (ThinStatus(BLOCK, 4 * BLOCK),)
    assert pool_status(pool, commit=True).used_data_blocks == 1


def test_an_external_origin_shows_through_holes(control: Control, disks: Disks, pool: Device) -> None:
    origin = disks.attach("origin", SIZE)
    write_at(disks.path("origin"), 0, b"below")
    pool.create_thin(1)
    target = ThinTarget(SIZE, pool.number, 1, origin)
    thin = Device.create(control, "thin", [target])
    assert thin.table() == (target,)
    assert read_at(thin.path, 0, 5) == b"below"
    write_at(thin.path, 1, b"E")
    assert read_at(thin.path, 0, 5) == b"bElow"
    assert read_at(disks.path("origin"), 0, 5) == b"below"


def test_a_thin_device_grows_and_shrinks_by_its_table(control: Control, pool: Device) -> None:
    thin = make_thin(control, pool, 1)
    for size in (2 * SIZE, SIZE // 2):
        thin.replace([ThinTarget(size, pool.number, 1)])
        with open(thin.path, "rb") as device:
            assert device.seek(0, os.SEEK_END) == size


def test_suspending_a_pool_suspends_its_devices_inside(control: Control, pool: Device) -> None:
    thin = make_thin(control, pool, 1)
    with pool.suspended():
        assert thin.info().internally_suspended
        assert not thin.info().suspended
    assert not thin.info().internally_suspended


# ---- messages ----


def test_the_transaction_id_changes_only_from_the_present_one(pool: Device) -> None:
    pool.set_transaction_id(0, 7)
    assert pool_status(pool).transaction_id == 7
    with pytest.raises(ArgumentError, match='sending a message "set_transaction_id 0 8": Invalid argument'):
        pool.set_transaction_id(0, 8)
    assert pool_status(pool).transaction_id == 7


def test_a_device_id_is_taken_once(pool: Device) -> None:
    pool.create_thin(1)
    with pytest.raises(DeviceExistsError, match=r"pool-.*: sending a message .*create_thin 1") as caught:
        pool.create_thin(1)
    assert (caught.value.errno, caught.value.filename) == (errno.EEXIST, pool.name)
    pool.create_snap(2, 1)
    with pytest.raises(DeviceExistsError):
        pool.create_snap(2, 1)


def test_an_absent_device_id_is_not_found(control: Control, pool: Device) -> None:
    for act in (lambda: pool.create_snap(2, 1), lambda: pool.delete(1), lambda: activate(control, pool, 1)):
        with pytest.raises(DeviceNotFoundError, match="no thin device of that id"):
            act()
    assert [device.name for device in leftovers(control)] == [pool.name]


def test_an_active_device_is_busy_until_it_is_removed(control: Control, pool: Device) -> None:
    thin = make_thin(control, pool, 1)
    with pytest.raises(BusyError, match="is active"):
        pool.delete(1)
    thin.remove()
    pool.delete(1)


def test_messages_work_while_the_pool_is_suspended(pool: Device) -> None:
    with pool.suspended():
        pool.create_thin(1)
    pool.delete(1)


@pytest.mark.parametrize(
    "message", ["", "no_such_message", "create_thin", "create_thin x", "create_thin 99999999"]
)
def test_a_message_that_cannot_be_is_refused(pool: Device, message: str) -> None:
    with pytest.raises(ArgumentError, match=r"message"):
        pool.message(message)


def test_a_device_id_beyond_24_bits_is_refused(pool: Device) -> None:
    with pytest.raises(ArgumentError, match="device id 16777216"):
        ThinTarget(SIZE, pool.number, 1 << 24)


def test_one_metadata_snapshot_is_held_at_a_time(control: Control, disks: Disks, pool: Device) -> None:
    write_at(make_thin(control, pool, 1).path, 0, b"x" * BLOCK)
    pool.reserve_metadata_snap()
    held = pool_status(pool).held_root
    assert held is not None
    assert 0 < held < METADATA // 4096
    with pytest.raises(BusyError, match="already held"):
        pool.reserve_metadata_snap()
    pool.release_metadata_snap()
    assert pool_status(pool).held_root is None
    with pytest.raises(ArgumentError):
        pool.release_metadata_snap()
    assert disks.path("metadata")


# ---- pools that cannot be ----


def test_the_metadata_of_a_running_pool_are_busy(control: Control, disks: Disks, pool: Device) -> None:
    with pytest.raises(BusyError, match="belongs to another pool"):
        Device.create(control, "second", [pool_target(disks)])
    assert [device.name for device in leftovers(control)] == [pool.name]


@pytest.mark.parametrize("block_size", [4096, 32 << 10, BLOCK + 4096, 2 << 30])
def test_blocks_that_only_the_user_engine_has_are_refused(disks: Disks, block_size: int) -> None:
    with pytest.raises(NotSupportedError, match='engine="user"'):
        ThinPoolTarget(DATA, disks.attach("m", MIB), disks.attach("d", MIB), block_size)


def test_a_data_device_that_shrank_is_refused_and_rolled_back(
    control: Control, disks: Disks, pool: Device
) -> None:
    pool.remove()
    with pytest.raises(ArgumentError, match="resuming"):
        Device.create(control, "pool", [pool_target(disks, DATA - 16 * BLOCK)])
    assert leftovers(control) == []


def test_a_refused_resume_leaves_the_old_pool_running(control: Control, disks: Disks, pool: Device) -> None:
    thin = make_thin(control, pool, 1)
    with pytest.raises(ArgumentError, match="resuming"):
        pool.replace([pool_target(disks, DATA - 16 * BLOCK)])
    assert pool.table() == (pool_target(disks),)
    assert not pool.info().suspended
    write_at(thin.path, 0, b"goes on")
    assert read_at(thin.path, 0, 7) == b"goes on"


def test_metadata_that_are_none_are_refused(control: Control, disks: Disks) -> None:
    disks.file("metadata").write_bytes(b"no pool" * 1000)
    with pytest.raises(BlocksnapError, match="pool-"):
        start_pool(control, disks)
    assert leftovers(control) == []


# ---- modes ----


def test_a_full_pool_says_so_at_once_and_writes_again_once_extended(control: Control, disks: Disks) -> None:
    pool = start_pool(control, disks, data=MIB)
    thin = make_thin(control, pool, 1)
    write_at(thin.path, 0, b"x" * MIB)
    with pytest.raises(OSError, match=r"No space left|Input/output") as caught:
        write_at(thin.path, MIB, b"x" * BLOCK)
    assert caught.value.errno in (errno.ENOSPC, errno.EIO)
    status = pool_status(pool)
    assert (status.mode, status.free_data_blocks) == (PoolMode.OUT_OF_DATA_SPACE, 0)
    pool.replace([pool_target(disks, data=2 * MIB)])
    assert (pool_status(pool).mode, pool_status(pool).free_data_blocks) == (PoolMode.READ_WRITE, 16)
    write_at(thin.path, MIB, b"x" * BLOCK)


def test_grown_metadata_are_taken_over_by_suspend_and_resume(disks: Disks, pool: Device) -> None:
    disks.attach("metadata", 2 * METADATA)
    with pool.suspended():
        pass
    assert pool_status(pool).total_metadata_blocks == 2 * METADATA // 4096


def test_a_read_only_pool_refuses_messages(control: Control, disks: Disks, pool: Device) -> None:
    pool.create_thin(1)
    pool.remove()
    read_only = start_pool(control, disks, read_only=True)
    assert pool_status(read_only).mode == PoolMode.READ_ONLY
    with pytest.raises(NotSupportedError, match="the pool is read-only or failed"):
        read_only.create_thin(2)


def test_a_pool_that_needs_a_check_is_read_only_and_says_why(
    control: Control, disks: Disks, pool: Device
) -> None:
    pool.remove()
    with disks.file("metadata").open("r+b") as file:
        file.seek(4)
        file.write(struct.pack("<I", 1))
    seal_file(disks.file("metadata"), 0, "superblock")
    # A loop device has its own page cache.
    disks.detach()
    status = pool_status(start_pool(control, disks))
    assert (status.mode, status.needs_check) == (PoolMode.READ_ONLY, True)


def test_a_pool_without_its_metadata_device_fails(control: Control, disks: Disks) -> None:
    below = linear(control, "below", disks.attach("metadata", METADATA), METADATA)
    target = ThinPoolTarget(DATA, below.number, disks.attach("data", DATA), BLOCK)
    pool = Device.create(control, "pool", [target])
    thin = make_thin(control, pool, 1)
    below.replace([OtherTarget(METADATA, "error", "")])
    with pytest.raises(DeviceIOError, match="is not committed"):
        pool.create_thin(2)
    failed: tuple[Status, ...] = (FailedStatus("Fail"),)
    assert pool.status() == failed
    assert thin.status() == failed


# ---- events ----


def test_the_low_water_mark_is_an_event(control: Control, disks: Disks) -> None:
    pool = Device.create(control, "pool", [pool_target(disks, low_water_blocks=DATA // BLOCK - 4)])
    thin = make_thin(control, pool, 1)
    seen = {pool.uuid: pool.info().event_nr}
    write_at(thin.path, 0, b"x" * BLOCK)
    assert control.await_events(seen, timeout=0.1) == seen
    writer = threading.Timer(0.2, write_at, [thin.path, 0, b"x" * (8 * BLOCK)])
    writer.start()
    assert control.await_events(seen, timeout=10) != seen
    writer.join()
    assert pool_status(pool).mode == PoolMode.READ_WRITE
