"""What every engine must do, asked through Pool."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blocksnap import errors
from blocksnap.pool import Pool
from blocksnap.thin_device import ThinDevice

BLOCK = 64 << 10
SIZE = 1 << 20


pytestmark = pytest.mark.usefixtures("nothing_left")

# What was copied and overwritten only the user engine tells: the kernel has no such figures.
counts_copies = pytest.mark.parametrize("engine", ["user"], indirect=True)


def pattern(seed: int, length: int) -> bytes:
    return np.random.default_rng(seed).bytes(length)


def fill(device: ThinDevice) -> None:
    """Write blocks until the pool is full."""
    for offset in range(0, device.size, BLOCK):
        device.write(offset, pattern(offset, BLOCK))


def create_many(pool: Pool) -> None:
    for number in range(1000):
        pool.create_device(f"d{number}", SIZE).write(0, b"x")


def test_new_device_reads_as_zeros(pool: Pool) -> None:
    assert pool.create_device("a", SIZE).read(0, SIZE) == bytes(SIZE)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 512), (0, BLOCK), (1, 1), (BLOCK - 1, 2), (100, 3 * BLOCK), (BLOCK, 2 * BLOCK), (SIZE - 7, 7)],
)
def test_what_was_written_is_read_and_the_rest_stays_zero(pool: Pool, offset: int, length: int) -> None:
    device = pool.create_device("a", SIZE)
    content = pattern(length, length)
    assert device.write(offset, content) == length
    expected = bytearray(SIZE)
    expected[offset : offset + length] = content
    assert device.read(0, SIZE) == expected


def test_write_of_nothing_is_allowed(pool: Pool) -> None:
    device = pool.create_device("a", SIZE)
    assert device.write(SIZE, b"") == 0
    assert device.read(SIZE, 0) == b""


@pytest.mark.parametrize(
    ("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (1 << 62, 512), (-1, 1), (-512, 512)]
)
def test_io_beyond_the_end_is_refused(pool: Pool, offset: int, length: int) -> None:
    device = pool.create_device("a", SIZE)
    with pytest.raises(errors.ArgumentError):
        device.read(offset, length)
    with pytest.raises(errors.ArgumentError):
        device.write(offset, bytes(length))
    with pytest.raises(errors.ArgumentError):
        device.discard(offset, length)


def test_snapshot_has_the_content_of_its_origin(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    content = pattern(1, SIZE)
    base.write(0, content)
    snap = base.snapshot("snap")
    assert snap.read(0, SIZE) == content
    assert (snap.size, snap.origin) == (SIZE, "base")


def test_write_to_snapshot_leaves_origin_unchanged(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    content = pattern(2, SIZE)
    base.write(0, content)
    snap = base.snapshot("snap")
    snap.write(BLOCK + 100, b"changed")
    assert base.read(0, SIZE) == content
    assert snap.read(BLOCK + 100, 7) == b"changed"
    assert snap.read(BLOCK, 100) == content[BLOCK : BLOCK + 100]


def test_write_to_origin_leaves_snapshot_unchanged(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    content = pattern(3, SIZE)
    base.write(0, content)
    snap = base.snapshot("snap")
    base.write(0, bytes(SIZE))
    assert snap.read(0, SIZE) == content


def test_each_snapshot_of_a_chain_keeps_its_own_round(pool: Pool) -> None:
    device = pool.create_device("round-0", SIZE)
    expected = [bytearray(SIZE)]
    for number in range(1, 13):
        device = device.snapshot(f"round-{number}")
        content = bytearray(expected[-1])
        where = number * 7919 * 512 % (SIZE - 4096)
        content[where : where + 4096] = pattern(number, 4096)
        device.write(where, content[where : where + 4096])
        expected.append(content)
    for number, content in enumerate(expected):
        assert pool.device(f"round-{number}").read(0, SIZE) == content


def test_snapshot_survives_its_origin(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    content = pattern(4, SIZE)
    base.write(0, content)
    snap = base.snapshot("snap")
    base.delete()
    assert snap.origin is None
    assert snap.read(0, SIZE) == content


@counts_copies
def test_survivor_of_its_origin_copies_nothing(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    base.write(0, pattern(4, SIZE))
    snap = base.snapshot("snap")
    base.delete()
    before = pool.status().counters.copied_bytes
    snap.write(512, b"x" * 512)
    assert pool.status().counters.copied_bytes == before


@counts_copies
def test_whole_block_overwrite_of_a_shared_block_copies_nothing(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    base.write(0, pattern(5, SIZE))
    snap = base.snapshot("snap")
    snap.write(0, bytes(BLOCK))
    counters = pool.status().counters
    assert (counters.blocks_copied, counters.blocks_overwritten, counters.copied_bytes) == (0, 1, 0)


@counts_copies
def test_part_of_a_shared_block_costs_one_copy(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    base.write(0, pattern(6, SIZE))
    snap = base.snapshot("snap")
    snap.write(0, bytes(4096))
    snap.write(8192, bytes(4096))
    counters = pool.status().counters
    assert counters.blocks_copied == 1
    assert counters.copied_bytes == BLOCK - 4096
    assert counters.application_bytes == SIZE + 2 * 4096


def test_discard_reads_as_zeros_and_frees_whole_blocks(pool: Pool) -> None:
    device = pool.create_device("a", SIZE)
    content = bytearray(pattern(7, SIZE))
    device.write(0, content)
    device.discard(100, 3 * BLOCK)
    content[100 : 100 + 3 * BLOCK] = bytes(3 * BLOCK)
    assert device.read(0, SIZE) == content
    assert pool.usage()[0].mapped_bytes == SIZE - 2 * BLOCK


def test_discard_of_shared_blocks_leaves_the_snapshot(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    content = pattern(8, SIZE)
    base.write(0, content)
    snap = base.snapshot("snap")
    base.discard(0, SIZE)
    assert base.read(0, SIZE) == bytes(SIZE)
    assert snap.read(0, SIZE) == content


def test_growing_adds_zeros_and_shrinking_frees_for_good(pool: Pool) -> None:
    device = pool.create_device("a", SIZE)
    content = pattern(9, SIZE)
    device.write(0, content)
    device.resize(2 * SIZE)
    assert device.read(SIZE, SIZE) == bytes(SIZE)
    device.write(SIZE, content)
    device.resize(SIZE // 2)
    assert device.size == SIZE // 2
    assert pool.usage()[0].mapped_bytes == SIZE // 2
    device.resize(2 * SIZE)
    assert device.read(0, 2 * SIZE) == content[: SIZE // 2] + bytes(2 * SIZE - SIZE // 2)


def test_everything_is_there_after_close_and_open(pool: Pool, reopen: Callable[[], Pool]) -> None:
    base = pool.create_device("base", SIZE, labels={"a": "b"})
    base.write(0, b"first")
    snap = base.snapshot("snap")
    snap.write(0, b"other")
    snap.resize(3 * SIZE)
    pool.close()
    with reopen() as again:
        assert [(d.name, d.size, d.origin) for d in again.devices()] == [
            ("base", SIZE, None),
            ("snap", 3 * SIZE, "base"),
        ]
        assert again.device("base").labels == {"a": "b"}
        assert again.device("base").created == base.created
        assert again.device("base").read(0, 5) == b"first"
        assert again.device("snap").read(0, 5) == b"other"


def test_what_was_flushed_survives_a_crash(pool: Pool, reopen: Callable[[], Pool]) -> None:
    device = pool.create_device("a", SIZE)
    device.write(0, pattern(10, SIZE))
    device.flush()
    pool.abandon()
    with reopen() as again:
        assert again.device("a").read(0, SIZE) == pattern(10, SIZE)


def test_created_devices_survive_a_crash_without_a_flush(pool: Pool, reopen: Callable[[], Pool]) -> None:
    pool.create_device("a", SIZE).snapshot("b")
    pool.device("a").delete()
    pool.device("b").resize(2 * SIZE)
    pool.abandon()
    with reopen() as again:
        assert [(d.name, d.size) for d in again.devices()] == [("b", 2 * SIZE)]


def test_names_must_be_new_and_known(pool: Pool) -> None:
    device = pool.create_device("a", SIZE)
    with pytest.raises(errors.DeviceExistsError, match='"a"'):
        pool.create_device("a", SIZE)
    with pytest.raises(errors.DeviceExistsError):
        device.snapshot("a")
    with pytest.raises(errors.DeviceNotFoundError, match='"b"'):
        pool.device("b")


def test_a_deleted_device_cannot_be_used(pool: Pool) -> None:
    device = pool.create_device("a", SIZE)
    device.write(0, b"x")
    device.delete()
    for use in (lambda: device.read(0, 1), lambda: device.snapshot("b"), device.delete, lambda: device.size):
        with pytest.raises(errors.DeviceNotFoundError, match="deleted"):
            use()
    replacement = pool.create_device("a", SIZE)
    assert replacement.read(0, 1) == b"\0"


def test_a_held_device_is_busy(pool: Pool) -> None:
    device = pool.create_device("a", SIZE)
    with device.hold() as handle:
        handle.write(0, b"through the handle")
        with pytest.raises(errors.BusyError, match="in use"):
            device.delete()
        with pytest.raises(errors.BusyError, match="in use"):
            pool.close()
    assert device.read(0, 18) == b"through the handle"
    device.delete()


def test_a_transaction_moves_the_transaction_id_once(pool: Pool) -> None:
    before = pool.status().transaction_id
    with pool.transaction():
        base = pool.create_device("base", SIZE)
        base.write(0, b"content")
        base.snapshot("one").snapshot("two")
        base.resize(2 * SIZE)
    assert pool.status().transaction_id == before + 1
    assert [device.name for device in pool.devices()] == ["base", "one", "two"]


def test_an_exception_undoes_a_transaction(pool: Pool) -> None:
    kept = pool.create_device("kept", SIZE)
    kept.write(0, b"content")
    before = pool.status()

    def fail() -> None:
        with pool.transaction():
            made = pool.create_device("made", SIZE)
            made.write(0, pattern(1, SIZE))
            made.snapshot("snap")
            kept.resize(4 * SIZE)
            kept.set_labels({"a": "b"})
            kept.delete()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [device.name for device in pool.devices()] == ["kept"]
    assert (kept.size, kept.labels, kept.read(0, 7)) == (SIZE, {}, b"content")
    pool.commit()
    after = pool.status()
    assert (after.transaction_id, after.data_free_bytes) == (before.transaction_id, before.data_free_bytes)
    kept.delete()


def test_deletion_in_a_transaction_frees_the_name_at_once(pool: Pool, reopen: Callable[[], Pool]) -> None:
    pool.create_device("a", SIZE).write(0, b"old")
    with pool.transaction():
        pool.device("a").delete()
        pool.create_device("a", 2 * SIZE).write(0, b"new")
        pool.create_device("passing", SIZE).delete()
    pool.close()
    with reopen() as again:
        assert [(device.name, device.size) for device in again.devices()] == [("a", 2 * SIZE)]
        assert again.device("a").read(0, 3) == b"new"


def test_shrinking_in_a_transaction_waits_for_its_end(pool: Pool) -> None:
    device = pool.create_device("a", SIZE)
    device.write(0, pattern(1, SIZE))
    with pool.transaction():
        device.resize(BLOCK)
        with pytest.raises(errors.ArgumentError, match="shrinks"):
            device.snapshot("b")
        device.resize(2 * BLOCK)
    assert device.size == 2 * BLOCK
    assert device.read(0, 2 * BLOCK) == pattern(1, SIZE)[:BLOCK] + bytes(BLOCK)


def test_flush_and_commit_inside_a_transaction_are_refused(pool: Pool) -> None:
    device = pool.create_device("a", SIZE)
    with pool.transaction():
        for use in (device.flush, pool.commit, pool.close, pool.usage):
            with pytest.raises(errors.BusyError, match="inside a transaction"):
                use()
        with pytest.raises(errors.ArgumentError, match="nest"), pool.transaction():
            pass
    device.flush()


def test_usage_tells_exclusive_from_shared(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    base.write(0, pattern(1, 4 * BLOCK))
    snap = base.snapshot("snap")
    snap.write(0, bytes(BLOCK))
    snap.write(8 * BLOCK, b"x")
    found = {use.name: (use.mapped_bytes, use.exclusive_bytes, use.shared_bytes) for use in pool.usage()}
    assert found == {"base": (4 * BLOCK, BLOCK, 3 * BLOCK), "snap": (5 * BLOCK, 2 * BLOCK, 3 * BLOCK)}


def test_delta_gives_ranges_and_kinds(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    base.write(0, pattern(1, 4 * BLOCK))
    snap = base.snapshot("snap")
    snap.write(BLOCK, b"x")
    snap.discard(2 * BLOCK, BLOCK)
    snap.write(8 * BLOCK, pattern(2, 2 * BLOCK))
    found = pool.delta(base, "snap")
    assert found.dtype.names == ("thin_begin", "length", "kind")
    assert found.tolist() == [(1, 1, 3), (2, 1, 1), (8, 2, 2)]


def test_reverse_mappings_name_every_user_of_a_data_block(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    base.write(0, pattern(1, 4 * BLOCK))
    snap = base.snapshot("snap")
    runs = pool.reverse_mappings()
    assert runs.tolist() == [(0, 4, base.id, 0), (0, 4, snap.id, 0)]
    assert pool.reverse_mappings(1, 3).tolist() == [(1, 2, base.id, 1), (1, 2, snap.id, 1)]


def test_a_full_pool_fails_at_once_and_goes_on_after_extend(pool: Pool) -> None:
    device = pool.create_device("a", "64M")
    with pytest.raises(errors.NoSpaceError):
        fill(device)
    assert pool.status().out_of_space
    assert device.read(0, BLOCK) == pattern(0, BLOCK)
    pool.extend(size="32M")
    assert not pool.status().out_of_space
    device.write(20 << 20, pattern(1, BLOCK))
    device.flush()
    assert device.read(20 << 20, BLOCK) == pattern(1, BLOCK)


def test_a_full_pool_goes_on_after_a_deletion(pool: Pool) -> None:
    device = pool.create_device("a", "64M")
    with pytest.raises(errors.NoSpaceError):
        fill(device)
    other = pool.create_device("b", SIZE)
    device.delete()
    other.write(0, pattern(1, SIZE))
    assert other.read(0, SIZE) == pattern(1, SIZE)


def test_numpy_arrays_are_buffers(pool: Pool) -> None:
    device = pool.create_device("a", SIZE)
    numbers = np.arange(1000, dtype=np.int64)
    assert device.write(4, numbers) == 8000
    back = np.zeros((10, 100), dtype=np.int64)
    assert device.read_into(4, back) == 8000
    assert (back.ravel() == numbers).all()


def test_threads_share_a_pool(pool: Pool) -> None:
    device = pool.create_device("a", 8 * SIZE)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                content = pattern(number * 100 + turn, 3000)
                offset = number * SIZE + turn * 3001
                device.write(offset, content)
                device.snapshot(f"{number}-{turn}")
                assert device.read(offset, 3000) == content
                device.flush()
        except BaseException as failure:
            failures.append(failure)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(pool.devices()) == 81


def test_flushes_of_other_threads_wait_for_a_transaction(pool: Pool) -> None:
    device = pool.create_device("a", SIZE)
    done = threading.Event()

    def work() -> None:
        device.write(0, b"written while a transaction runs")
        device.flush()
        done.set()

    thread = threading.Thread(target=work)
    with pool.transaction():
        thread.start()
        pool.create_device("b", SIZE)
        assert not done.wait(0.2)
    thread.join()
    assert done.is_set()
    assert device.read(0, 7) == b"written"


def test_metadata_that_are_full_refuse_new_devices_and_go_on_after_extend(
    tmp_path: Path, engine: str
) -> None:
    path = tmp_path / "small"
    with Pool.create(path, size="64M", metadata_size="512K", engine=engine) as pool:
        with pytest.raises(errors.NoSpaceError, match="metadata"):
            create_many(pool)
        made = sum(device.read(0, 1) == b"x" for device in pool.devices())
        assert made > 5
        assert pool.status().devices in (made, made + 1)
        pool.device("d0").delete()
        pool.create_device("again", SIZE)
        pool.extend(metadata_size="1M")
        pool.create_device("more", SIZE).write(0, b"y")
    with Pool.open(path, engine=engine) as pool:
        assert pool.device("more").read(0, 1) == b"y"
        assert pool.device(f"d{made - 1}").read(0, 1) == b"x"
