"""The Python face of the read-only walks: what they return, raise and where text goes."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from blocksnap import metadata
from blocksnap.errors import (
    BlocksnapError,
    DamagedMetadataError,
    DeviceNotFoundError,
    PoolFormatError,
)
from tests.thin_damage import sound_image
from tests.thin_image import Image, build
from tests.thin_xml import Device, Pool, history, to_xml


@pytest.fixture(scope="module")
def pool() -> Pool:
    return history(3, snapshots=6, mappings=4000, first_id=0)


@pytest.fixture(scope="module")
def image(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(pool).save(tmp_path_factory.mktemp("pool") / "metadata")


def expected_ranges(left: Device, right: Device) -> list[tuple[int, int, int]]:
    """Return the differences of two devices, block by block, then joined."""
    ours = dict(zip(left.thin_blocks.tolist(), left.data_blocks.tolist(), strict=True))
    theirs = dict(zip(right.thin_blocks.tolist(), right.data_blocks.tolist(), strict=True))
    ranges: list[tuple[int, int, int]] = []
    for block in sorted(ours.keys() | theirs.keys()):
        if block not in theirs:
            kind = metadata.DELTA_LEFT_ONLY
        elif block not in ours:
            kind = metadata.DELTA_RIGHT_ONLY
        elif ours[block] != theirs[block]:
            kind = metadata.DELTA_DIFFERENT
        else:
            continue
        if ranges and ranges[-1][2] == kind and ranges[-1][0] + ranges[-1][1] == block:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1, kind)
        else:
            ranges.append((block, 1, kind))
    return ranges


def fragmented_pool(mappings: int) -> Pool:
    """Return two devices that differ in every second block."""
    thin = np.arange(mappings, dtype=np.uint64)
    data = thin.copy()
    none = np.zeros(mappings, dtype=np.uint64)
    other, times = data.copy(), none.copy()
    other[::2] += np.uint64(mappings)
    times[::2] = 1
    devices = [Device(1, 0, 0, 1, thin, data, none), Device(2, 1, 1, 1, thin, other, times)]
    return Pool(devices, 128, 2 * mappings, 1, 1, thin)


def held_image() -> Image:
    """Return a pool whose metadata snapshot is three snapshots old."""
    options = {"mappings": 3000, "longest_run": 4, "change": 0.02}
    live, held = (history(9, snapshots=count, **options) for count in (6, 3))  # type: ignore[arg-type]
    return build(live, held=held)


def test_every_name_in_all_exists() -> None:
    assert sorted(metadata.__all__) == sorted(set(metadata.__all__))
    assert all(hasattr(metadata, name) for name in metadata.__all__)


def test_check_of_a_sound_pool_counts_and_finds_nothing(pool: Pool, image: Path) -> None:
    report = metadata.check(image)
    assert report.findings == ()
    assert not report.damaged
    assert not report.needs_check
    assert report.devices == len(pool.devices)
    assert report.mappings == sum(len(device.thin_blocks) for device in pool.devices)
    used = np.unique(np.concatenate([device.data_blocks for device in pool.devices]))
    assert report.data_blocks_used == len(used)


def test_held_metadata_snapshot_of_an_older_state_is_clean(tmp_path: Path) -> None:
    path = held_image().save(tmp_path / "metadata")
    assert metadata.check(path).findings == ()


def test_damage_that_only_the_held_metadata_snapshot_reaches_is_found(tmp_path: Path) -> None:
    image = held_image()
    top = image.get(image.get(0, 56, "Q"), 320, "Q")
    held = {leaf for root in image.children(top) for leaf in image.leaves(root)}
    live = {leaf for index in range(7) for leaf in image.leaves(image.device_root(index))}
    image.put(min(held - live), 4, "I", 3)
    report = metadata.check(image.save(tmp_path / "metadata"))
    assert report.fatal >= 1
    assert all("metadata snapshot, device" in f.text for f in report.findings if f.severity == "fatal")


def test_check_returns_findings_or_writes_them(tmp_path: Path) -> None:
    broken = sound_image()
    broken.put(0, 32, "Q", 1)
    path = broken.save(tmp_path / "metadata")
    report = metadata.check(path)
    with (tmp_path / "lines").open("w") as lines:
        written = metadata.check(path, lines)
    assert [finding.severity for finding in report.findings] == ["fatal"]
    assert (tmp_path / "lines").read_text() == "".join(f"{finding}\n" for finding in report.findings)
    assert written.findings == ()
    assert written.damaged
    assert report.fatal == written.fatal == 1


def test_leaks_are_counted_in_blocks(tmp_path: Path) -> None:
    leaky = sound_image()
    index = leaky.get(0, 80, "Q")
    bitmap = leaky.get(index, leaky.value_offset(index, 0, 16), "Q")
    last = leaky.get(0, 64, "Q") // 4 - 1
    leaky.blocks[bitmap, 16 + last - 1 : 16 + last + 1] = 0xAA
    report = metadata.check(leaky.save(tmp_path / "metadata"))
    assert report.leaks == 8
    assert report.fatal == 0
    assert report.damaged


def test_dump_goes_to_a_file_behind_what_it_buffered(pool: Pool, image: Path, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        out.write("before\n")
        metadata.dump(image, out)
    assert (tmp_path / "out").read_text() == "before\n" + to_xml(pool)


def test_dump_takes_a_descriptor_and_any_kind_of_path(pool: Pool, image: Path, tmp_path: Path) -> None:
    for path in (image, str(image), os.fsencode(image)):
        descriptor = os.open(tmp_path / "out", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        metadata.dump(path, descriptor)
        os.close(descriptor)
        assert (tmp_path / "out").read_text() == to_xml(pool)


def test_closed_pipe_is_an_error_not_a_death(image: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        metadata.dump(image, writer)
    with pytest.raises(BrokenPipeError):
        metadata.write_delta(image, 0, 1, writer)
    os.close(writer)


def test_pipe_closed_midway_ends_the_dump(tmp_path: Path) -> None:
    path = build(fragmented_pool(50_000)).save(tmp_path / "metadata")
    reader, writer = os.pipe()

    def read_a_little() -> None:
        os.read(reader, 1000)
        os.close(reader)

    thread = threading.Thread(target=read_a_little)
    thread.start()
    with pytest.raises(BrokenPipeError):
        metadata.dump(path, writer)
    thread.join()
    os.close(writer)


def test_full_output_is_no_space(image: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("wb") as full, pytest.raises(BlocksnapError) as error:
        metadata.dump(image, full.fileno())
    assert isinstance(error.value, OSError)
    assert error.value.errno == errno.ENOSPC


def test_delta_ranges_are_what_differs(pool: Pool, image: Path) -> None:
    for left, right in ((0, 6), (6, 0), (2, 3), (4, 4)):
        found = metadata.delta_ranges(image, left, right)
        assert found.dtype == metadata.DELTA_RANGE
        assert [tuple(map(int, one)) for one in found] == expected_ranges(
            pool.devices[left], pool.devices[right]
        )


def test_delta_of_more_ranges_than_one_call_takes(tmp_path: Path) -> None:
    mappings = 150_000
    path = build(fragmented_pool(mappings)).save(tmp_path / "metadata")
    found = metadata.delta_ranges(path, 1, 2)
    assert np.array_equal(found["thin_begin"], np.arange(0, mappings, 2))
    assert (found["length"] == 1).all()
    assert (found["kind"] == metadata.DELTA_DIFFERENT).all()


def test_delta_reaches_the_last_thin_block(tmp_path: Path) -> None:
    end = np.array([0, (1 << 64) - 1], dtype=np.uint64)
    zero = np.zeros(2, dtype=np.uint64)
    left = Device(1, 0, 0, 0, end, np.array([1, 2], dtype=np.uint64), zero)
    right = Device(2, 0, 0, 0, end, np.array([3, 4], dtype=np.uint64), zero)
    path = build(Pool([left, right], 128, 100, 0, 0, end)).save(tmp_path / "metadata")
    assert metadata.delta_ranges(path, 1, 2)["thin_begin"].tolist() == end.tolist()


def test_delta_of_an_absent_device_names_it(image: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceNotFoundError, match="there is no thin device 77"):
        metadata.delta_ranges(image, 0, 77)
    with (tmp_path / "out").open("wb") as out, pytest.raises(DeviceNotFoundError, match="device 78"):
        metadata.write_delta(image, 78, 0, out)
    assert (tmp_path / "out").read_bytes() == b""


def test_usage_counts_mapped_and_exclusive_blocks(pool: Pool, image: Path) -> None:
    users = np.zeros(pool.nr_data_blocks, dtype=np.int64)
    for device in pool.devices:
        users[np.unique(device.data_blocks)] += 1
    expected = tuple(
        (device.id, len(device.thin_blocks), int(np.count_nonzero(users[device.data_blocks] == 1)))
        for device in pool.devices
    )
    assert metadata.usage(image) == expected


def test_usage_of_thousands_of_devices(tmp_path: Path) -> None:
    pool = history(5, snapshots=2500, mappings=300, change=0.001)
    found = metadata.usage(build(pool).save(tmp_path / "metadata"))
    assert [one.id for one in found] == [device.id for device in pool.devices]
    assert {one.mapped_blocks for one in found} == {300}


def test_empty_pool_has_nothing(tmp_path: Path) -> None:
    empty = Pool([], 128, 0, 0, 0, np.zeros(0, dtype=np.uint64))
    path = build(empty).save(tmp_path / "metadata")
    assert metadata.usage(path) == ()
    assert metadata.check(path).findings == ()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes only"),
        (b"x" * 4095, "4095 bytes only"),
        (bytes(8192), "there is no thin pool yet"),
        (b"<superblock/>" * 1000, "the magic number is"),
        (os.urandom(16384), "the magic number is"),
    ],
    ids=["empty", "short", "unformatted", "xml", "random"],
)
def test_what_is_no_pool_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "metadata"
    path.write_bytes(content)
    with (tmp_path / "out").open("wb") as out:
        for walk in (
            lambda: metadata.check(path),
            lambda: metadata.dump(path, out),
            lambda: metadata.write_delta(path, 1, 2, out),
            lambda: metadata.delta_ranges(path, 1, 2),
            lambda: metadata.usage(path),
        ):
            with pytest.raises(PoolFormatError, match=reason) as error:
                walk()
            assert str(path) in str(error.value)
    assert (tmp_path / "out").read_bytes() == b""


def assert_refused(path: Path, error: type[BlocksnapError], reason: str) -> None:
    with Path(os.devnull).open("wb") as out, pytest.raises(error, match=reason):
        metadata.dump(path, out)
    with pytest.raises(error, match=reason):
        metadata.usage(path)
    with pytest.raises(error, match=reason):
        metadata.delta_ranges(path, 1, 2)


def save_changed(image: Image, path: Path, offset: int, form: str, value: int, *, seal: bool = True) -> Path:
    image.put(0, offset, form, value)
    return image.save(path, seal=seal)


def test_wrong_superblock_checksum_is_damage(tmp_path: Path) -> None:
    path = save_changed(sound_image(), tmp_path / "metadata", 44, "I", 3, seal=False)
    assert_refused(path, DamagedMetadataError, "checksum of the superblock is")


def test_foreign_version_and_features_are_refused(tmp_path: Path) -> None:
    path = save_changed(sound_image(), tmp_path / "metadata", 40, "I", 3)
    assert_refused(path, PoolFormatError, "version 3 of the thin pool format")
    path = save_changed(sound_image(), tmp_path / "metadata", 360, "I", 1)
    assert_refused(path, PoolFormatError, "unknown incompatible features 0x1")


def test_truncated_file_is_damage_and_says_how_long_it_should_be(tmp_path: Path) -> None:
    path = sound_image().save(tmp_path / "metadata")
    os.truncate(path, 90 * 4096)
    assert_refused(path, DamagedMetadataError, r"truncated: it holds 90 blocks, .* 1024 \(4194304 bytes\)")
    report = metadata.check(path)
    assert report.fatal == 1
    assert "the file holds 90: it is truncated" in report.findings[0].text


def test_truncated_inside_the_trees_loses_what_is_named(tmp_path: Path) -> None:
    path = sound_image().save(tmp_path / "metadata")
    os.truncate(path, 30 * 4096)
    report = metadata.check(path)
    assert report.fatal > 5
    assert any("lies behind the end of the file (30 blocks)" in finding.text for finding in report.findings)


def test_damaged_leaf_ends_a_dump_with_the_block_named(tmp_path: Path) -> None:
    image = sound_image()
    leaf = image.leaves(image.device_root(0))[3]
    image.put(leaf, 0, "I", 0)
    path = image.save(tmp_path / "metadata", seal=False)
    with (
        Path(os.devnull).open("wb") as out,
        pytest.raises(DamagedMetadataError, match=f"{path}: checksum of block {leaf} is 0x00000000"),
    ):
        metadata.dump(path, out)


def test_a_directory_and_an_absent_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(BlocksnapError, match="is neither a file nor a block device"):
        metadata.check(tmp_path)
    with pytest.raises(DeviceNotFoundError, match="absent: No such file"):
        metadata.usage(tmp_path / "absent")
