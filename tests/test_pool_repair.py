"""Repairing pools: what can be read is saved, the rest is told by name, and the catalog agrees."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blocksnap import metadata, mount, pool_client, pool_repair
from blocksnap.errors import ArgumentError, BusyError, DeviceExistsError, NotSupportedError
from blocksnap.pool import Pool
from tests.command_line import CommandLine, command_line
from tests.thin_image import Image, seal_file
from tests.thin_tools import assert_sound, needs_thin_tools

__all__ = ["command_line"]

BLOCK = 4096
SIZE = 1000 * BLOCK
BLOCKS = 700


def content(seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(BLOCKS * BLOCK)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A pool with a device of five leaves, a snapshot that differs in the first, and a device apart."""
    path = tmp_path / "pool"
    with Pool.create(path, size="16M", block_size=BLOCK) as pool:
        base = pool.create_device("base", SIZE)
        base.write(0, content(1))
        base.snapshot("snap").write(0, b"other" * 2000)
        pool.create_device("apart", SIZE).write(0, content(2))
    return path


def damage(file: Path, block: int, offset: int = 2000) -> None:
    """Change a byte of a metadata block; its checksum tells."""
    with file.open("r+b") as device:
        device.seek(block * 4096 + offset)
        old = device.read(1)
        device.seek(block * 4096 + offset)
        device.write(bytes([old[0] ^ 0x40]))


def image(path: Path) -> Image:
    return Image.load(path / "metadata", {})


def leaf(path: Path, device: int, index: int) -> int:
    """Return the block of a leaf of the index-th device."""
    found = image(path)
    return found.leaves(found.device_root(device))[index]


def wipe(file: Path) -> None:
    with file.open("r+b") as device:
        device.write(bytes(4096))


def contents(path: Path) -> dict[str, bytes]:
    with Pool.open(path, read_only=True) as pool:
        return {device.name: device.read(0, SIZE) for device in pool.devices()}


def dump_of(file: Path, text: Path) -> str:
    with text.open("wb") as output:
        metadata.dump(file, output)
    return text.read_text()


# ---- what comes out


def test_repair_of_a_sound_pool_makes_equal_metadata_beside_it(path: Path) -> None:
    before = (path / "metadata").read_bytes()
    found = pool_repair.repair(path)
    assert found.complete
    assert found.changes == ()
    assert (found.metadata, found.damaged) == (str(path / "metadata.repaired"), str(path / "metadata"))
    assert dump_of(path / "metadata", path / "a") == dump_of(path / "metadata.repaired", path / "b")
    assert (path / "metadata").read_bytes() == before


def test_new_metadata_are_private_and_as_large_as_the_old(path: Path) -> None:
    pool_repair.repair(path)
    found = (path / "metadata.repaired").stat()
    assert found.st_mode & 0o777 == 0o600
    assert found.st_size == (path / "metadata").stat().st_size


def test_lost_leaf_is_told_by_name_and_bytes(path: Path) -> None:
    block = leaf(path, 2, 1)
    begin = image(path).get(block, 32, "Q") * BLOCK
    end = image(path).get(leaf(path, 2, 2), 32, "Q") * BLOCK
    damage(path / "metadata", block)
    found = pool_repair.repair(path)
    assert [(lost.name, lost.offset, lost.length) for lost in found.lost_ranges] == [
        ("apart", begin, end - begin)
    ]
    assert "checksum of block" in found.lost_ranges[0].reason
    assert found.lost_devices == ()


def test_what_is_left_reads_back_equal_after_the_swap(path: Path) -> None:
    before = contents(path)
    damage(path / "metadata", leaf(path, 2, 1))
    found = pool_repair.repair(path, swap=True)
    after = contents(path)
    assert (after["base"], after["snap"]) == (before["base"], before["snap"])
    lost = found.lost_ranges[0]
    assert lost.length is not None
    kept = np.frombuffer(before["apart"], np.uint8).copy()
    kept[lost.offset : lost.offset + lost.length] = 0
    assert after["apart"] == kept.tobytes()


@needs_thin_tools
def test_swapped_in_metadata_pass_both_checks_and_can_be_written_to(path: Path) -> None:
    damage(path / "metadata", leaf(path, 0, 2))
    pool_repair.repair(path, swap=True)
    assert_sound(path / "metadata")
    with Pool.open(path) as pool:
        pool.device("base").write(0, content(3))
        pool.device("base").snapshot("later")
    assert_sound(path / "metadata")


def test_damaged_metadata_are_kept_byte_for_byte(path: Path) -> None:
    damage(path / "metadata", leaf(path, 0, 2))
    before = (path / "metadata").read_bytes()
    found = pool_repair.repair(path, swap=True)
    assert found.damaged == str(path / "metadata.damaged")
    assert (path / "metadata.damaged").read_bytes() == before
    second = pool_repair.repair(path, swap=True)
    assert second.damaged == str(path / "metadata.damaged-2")
    assert (path / "metadata.damaged").read_bytes() == before


def test_damage_to_a_shared_leaf_is_told_for_each_device(path: Path) -> None:
    damage(path / "metadata", leaf(path, 1, 2))
    found = pool_repair.repair(path)
    assert {lost.name for lost in found.lost_ranges} == {"base", "snap"}


def test_wrong_counts_are_made_anew_and_nothing_is_lost(path: Path) -> None:
    found = image(path)
    index = found.get(0, 64 + 16, "Q")
    bitmap = found.get(index, found.value_offset(index, 0, 16), "Q")
    found.blocks[bitmap, 16:100] = 0
    found.blocks.tofile(path / "metadata")
    seal_file(path / "metadata", bitmap, "bitmap")
    before = contents(path)
    assert metadata.check(path / "metadata").fatal
    assert pool_repair.repair(path, swap=True).complete
    assert contents(path) == before


def test_needs_check_is_cleared(path: Path) -> None:
    found = image(path)
    found.put(0, 4, "I", 1)
    found.blocks.tofile(path / "metadata")
    seal_file(path / "metadata", 0, "superblock")
    assert "needs_check is cleared" in pool_repair.repair(path, swap=True).changes
    with Pool.open(path) as pool:
        pool.create_device("new", SIZE)


def test_held_metadata_snapshot_is_dropped_with_its_note(path: Path) -> None:
    pool = Pool.open(path)
    pool._walks._hold()
    pool.abandon()
    assert image(path).get(0, 56, "Q") != 0
    found = pool_repair.repair(path, swap=True)
    assert "the held metadata snapshot is dropped" in found.changes
    with Pool.open(path) as pool:
        assert pool.status().held_root == 0
        assert len(pool.usage()) == 3


# ---- the superblock


def test_lost_superblock_wants_the_block_size(path: Path) -> None:
    wipe(path / "metadata")
    with pytest.raises(ArgumentError, match="size of data blocks"):
        pool_repair.repair(path)


def test_lost_superblock_is_found_again_with_the_transaction_id_of_the_catalog(path: Path) -> None:
    before = contents(path)
    with Pool.open(path) as pool:
        transaction_id = pool.status().transaction_id
    wipe(path / "metadata")
    found = pool_repair.repair(path, swap=True, block_size="4K")
    assert found.complete
    assert any("roots found by searching" in change for change in found.changes)
    assert contents(path) == before
    with Pool.open(path) as pool:
        assert pool.status().transaction_id == transaction_id


def test_changed_superblock_is_believed_where_it_can_be(path: Path) -> None:
    before = contents(path)
    damage(path / "metadata", 0, 344)
    assert pool_repair.repair(path, swap=True).complete
    assert contents(path) == before


def test_later_versions_are_refused(path: Path) -> None:
    found = image(path)
    found.put(0, 360, "I", 4)
    found.blocks.tofile(path / "metadata")
    seal_file(path / "metadata", 0, "superblock")
    with pytest.raises(NotSupportedError, match="unknown features"):
        pool_repair.repair(path)
    assert not (path / "metadata.repaired").exists()


# ---- the catalog


def test_lost_device_is_named_and_forgotten(path: Path) -> None:
    damage(path / "metadata", image(path).device_root(2))
    found = pool_repair.repair(path, swap=True)
    assert [(lost.name, lost.id) for lost in found.lost_devices] == [("apart", 3)]
    assert contents(path).keys() == {"base", "snap"}
    with Pool.open(path) as pool:
        pool.create_device("apart", SIZE)


def test_devices_without_a_name_get_one(path: Path) -> None:
    before = contents(path)
    (path / "catalog.db").unlink()
    damage(path / "metadata", leaf(path, 2, 1))
    found = pool_repair.repair(path, swap=True)
    assert {device.name for device in found.devices} == {None}
    with Pool.open(path) as pool:
        assert {device.name for device in pool.devices()} == {"thin-1", "thin-2", "thin-3"}
        assert pool.device("thin-1").read(0, BLOCKS * BLOCK) == before["base"][: BLOCKS * BLOCK]


def test_names_labels_and_origins_of_saved_devices_stay(path: Path) -> None:
    with Pool.open(path) as pool:
        pool.device("snap").set_labels({"a": "b"})
    damage(path / "metadata", image(path).device_root(2))
    pool_repair.repair(path, swap=True)
    with Pool.open(path) as pool:
        assert pool.device("snap").labels == {"a": "b"}
        assert pool.device("snap").origin == "base"


def test_catalog_that_cannot_be_read_is_told(path: Path) -> None:
    (path / "catalog.db").write_bytes(b"no catalog" * 1000)
    damage(path / "metadata", leaf(path, 2, 1))
    found = pool_repair.repair(path, swap=True)
    assert any("the catalog does not agree yet" in change for change in found.changes)
    assert not metadata.check(path / "metadata").damaged


# ---- where it goes


def test_output_takes_the_new_metadata_and_the_pool_stays_as_it_is(path: Path, tmp_path: Path) -> None:
    damage(path / "metadata", leaf(path, 2, 1))
    found = pool_repair.repair(path, output=tmp_path / "elsewhere")
    assert found.metadata == str(tmp_path / "elsewhere")
    assert not metadata.check(tmp_path / "elsewhere").damaged
    assert metadata.check(path / "metadata").damaged
    assert not (path / "metadata.repaired").exists()


def test_output_that_is_not_empty_is_left_alone(path: Path, tmp_path: Path) -> None:
    output = tmp_path / "precious"
    output.write_bytes(b"precious" * 100000)
    with pytest.raises(DeviceExistsError, match="is not empty"):
        pool_repair.repair(path, output=output)
    assert output.read_bytes() == b"precious" * 100000


def test_damaged_metadata_are_no_output(path: Path) -> None:
    wipe(path / "metadata")
    before = (path / "metadata").read_bytes()
    with pytest.raises(ArgumentError, match="holds the damaged metadata"):
        pool_repair.repair(path, output=path / "metadata", block_size="4K")
    assert (path / "metadata").read_bytes() == before


def test_output_may_be_a_block_device(path: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0 or not os.access("/dev/loop-control", os.W_OK):
        pytest.skip("needs root and /dev/loop-control")
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(4 << 20)
    damage(path / "metadata", leaf(path, 2, 1))
    with mount.LoopDevice.attach(disk) as loop:
        pool_repair.repair(path, output=loop.path)
        assert not metadata.check(loop.path).damaged


def test_metadata_that_were_cut_off_get_a_file_with_room(path: Path) -> None:
    last = int(np.flatnonzero(image(path).blocks.any(axis=1))[-1])
    before = contents(path)
    os.truncate(path / "metadata", (last + 1) * 4096)
    assert pool_repair.repair(path, swap=True).complete
    assert (path / "metadata").stat().st_size > (last + 1) * 4096
    assert contents(path) == before


def test_pool_on_two_devices_keeps_its_catalog(path: Path, tmp_path: Path) -> None:
    parts: dict[str, Any] = {"metadata": tmp_path / "m", "data": tmp_path / "d", "catalog": tmp_path / "c"}
    for name, part in parts.items():
        (path / {"catalog": "catalog.db"}.get(name, name)).rename(part)
    damage(parts["metadata"], image_root(parts["metadata"], 2))
    assert not pool_repair.repair(**parts, swap=True).complete
    with Pool.open(**parts) as pool:
        assert {device.name for device in pool.devices()} == {"base", "snap"}


def image_root(file: Path, device: int) -> int:
    return Image.load(file, {}).device_root(device)


# ---- who may


def test_pool_in_use_is_not_repaired(path: Path) -> None:
    with Pool.open(path), pytest.raises(BusyError, match="in use"):
        pool_repair.repair(path)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda path: pool_repair.repair(path, swap=True, output=path / "x"),
        lambda path: pool_repair.repair(path, output=path / "no" / "such"),
        lambda path: pool_repair.repair(path / "none"),
        lambda path: pool_repair.repair(path, block_size="5K"),
        lambda path: pool_repair.repair(path, block_size="64K"),
    ],
)
def test_wrong_wishes_are_refused_and_leave_nothing(
    path: Path, wrong: Callable[[Path], pool_repair.PoolRepair]
) -> None:
    before = sorted(path.iterdir())
    with pytest.raises((ArgumentError, FileNotFoundError)):
        wrong(path)
    assert sorted(path.iterdir()) == before


# ---- on the command line


def test_verb_exits_0_when_nothing_is_lost(path: Path, command_line: CommandLine) -> None:
    found = command_line.json("pool", "repair", path)
    assert found["complete"] is True
    assert [device["name"] for device in found["devices"]] == ["base", "snap", "apart"]
    assert found["devices"][0]["mapped_bytes"] == BLOCKS * BLOCK
    assert found["devices"][0]["mapped_bytes_before"] == BLOCKS * BLOCK


def test_verb_exits_3_and_names_what_is_lost(path: Path, command_line: CommandLine) -> None:
    damage(path / "metadata", leaf(path, 2, 1))
    assert command_line("pool", "repair", path, "--swap") == 3
    text = command_line.out.decode()
    assert "apart" in text
    assert "checksum of block" in text
    assert f"damaged metadata: {path / 'metadata.damaged'}" in text.replace("\n", "")
    assert command_line("pool", "check", path) == 0


def test_verb_tells_what_it_wants_in_one_line(path: Path, command_line: CommandLine) -> None:
    wipe(path / "metadata")
    assert "size of data blocks" in command_line.fails(2, "pool", "repair", path)
    assert command_line("pool", "repair", path, "--block-size", "4K") == 0


def test_served_pool_is_refused(path: Path, command_line: CommandLine) -> None:
    with pool_client.serve(path) as client:
        line = command_line.fails(1, "pool", "repair", path)
        assert f"process {client.server_pid} serves pool" in line
