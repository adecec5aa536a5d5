"""What a pool of the kernel tells that it wrote, beside what its devices count."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap import mount
from blocksnap.block_counters import BlockCounters
from blocksnap.device_mapper import DeviceNumber
from blocksnap.file_system import make_file_system
from blocksnap.pool import Pool
from blocksnap.thin_device import ThinDevice
from blocksnap.user_pool import PoolCounters

SIZE, BLOCK = 8 << 20, 64 << 10


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.create(tmp_path / "pool", size="128M", engine="kernel") as made:
        yield made


def written_to(pool: Pool, part: str) -> int:
    """Return what the loop device over a part of the pool has counted."""
    (loop,) = mount.backing_loops(pool.path / part)
    return BlockCounters.of(DeviceNumber.of(loop.path)).written_bytes


def written(counters: PoolCounters) -> int:
    """Return the sum of all that reaches the data device."""
    kinds = (counters.application_bytes, counters.padding_bytes, counters.copied_bytes)
    return sum(kinds) + counters.zero_filled_bytes


def write_each(device: ThinDevice, length: int, stride: int) -> int:
    """Write at each stride; return how often."""
    places = range(0, device.size, stride)
    for offset in places:
        device.write(offset, os.urandom(length))
    return len(places)


def test_part_of_a_new_block_is_zero_filled_and_part_of_a_shared_one_copied(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    count = write_each(base, 4096, 2 * BLOCK)
    first = pool.status().counters
    assert (first.application_bytes, first.copied_bytes) == (count * 4096, 0)
    assert first.zero_filled_bytes == count * BLOCK
    snap = base.snapshot("snap")
    assert write_each(snap, 4096, BLOCK) == 2 * count
    second = pool.status().counters
    assert (second.blocks_copied, second.copied_bytes) == (count, count * BLOCK)
    assert second.zero_filled_bytes == 2 * count * BLOCK
    assert second.read_for_copy_bytes == count * BLOCK
    assert second.blocks_provisioned is None


def test_whole_blocks_and_blocks_of_ones_own_cost_no_more_than_themselves(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    write_each(base, BLOCK, BLOCK)
    base.snapshot("snap")
    write_each(base, BLOCK, BLOCK)
    write_each(base, 4096, BLOCK)
    counters = pool.status().counters
    assert (counters.copied_bytes, counters.zero_filled_bytes, counters.padding_bytes) == (0, 0, 0)
    assert counters.application_bytes == 2 * SIZE + SIZE // BLOCK * 4096


def test_less_than_a_sector_is_padded(pool: Pool) -> None:
    device = pool.create_device("base", SIZE)
    device.write(0, bytes(BLOCK))
    before = pool.status().counters
    device.write(100, b"x" * 10)
    after = pool.status().counters
    assert after.application_bytes - before.application_bytes == 10
    assert after.padding_bytes - before.padding_bytes == 502
    assert after.application_read_bytes == before.application_read_bytes


def test_reads_of_holes_make_no_copies_and_hide_none(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    base.write(0, bytes(BLOCK))
    snap = base.snapshot("snap")
    snap.read(BLOCK, 4 * BLOCK)
    assert pool.status().counters.copied_bytes == 0
    snap.write(4096, b"x" * 4096)
    counters = pool.status().counters
    assert (counters.copied_bytes, counters.zero_filled_bytes) == (BLOCK, 0)
    assert counters.application_read_bytes == 4 * BLOCK


@pytest.mark.parametrize("block_size", [64 << 10, 1 << 20])
def test_parts_sum_to_what_the_loop_devices_count(tmp_path: Path, block_size: int) -> None:
    (tmp_path / "mounted").mkdir()
    with Pool.create(tmp_path / "pool", size="200M", block_size=block_size, engine="kernel") as pool:
        before = written_to(pool, "data"), written_to(pool, "metadata")
        base = pool.create_device("base", "64M")
        with base.hold() as handle:
            make_file_system(Path(handle.path), "ext4")  # type: ignore[union-attr]
        snap = base.snapshot("snap")
        for device in (base, snap):
            with device.hold() as handle:
                mount.mount(handle.path, tmp_path / "mounted", "ext4")  # type: ignore[union-attr]
                (tmp_path / "mounted" / "file").write_bytes(os.urandom(5 << 20))
                mount.unmount(tmp_path / "mounted")
        pool.commit()
        counters = pool.status().counters
        assert written(counters) == written_to(pool, "data") - before[0]
        assert counters.metadata_bytes <= written_to(pool, "metadata") - before[1] + 4096
        assert counters.copied_bytes > 0
        assert counters.copied_bytes % block_size == 0
        assert counters.application_bytes > 10 << 20
