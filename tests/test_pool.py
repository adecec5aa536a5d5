"""Pools on disk: making them whole or not at all, opening what others left, refusing what does not belong."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import blocksnap
from blocksnap import errors
from blocksnap.mount import LoopDevice
from blocksnap.pool import Pool
from blocksnap.user_pool import UserPool
from tests.thin_tools import assert_sound, needs_thin_tools, restore

SIZE = 1 << 20

XML = """<superblock uuid="" time="1" transaction="9" version="2" data_block_size="128" nr_data_blocks="256">
  <device dev_id="3" mapped_blocks="3" transaction="1" creation_time="0" snap_time="1">
    <range_mapping origin_begin="0" data_begin="10" length="2" time="0"/>
    <single_mapping origin_block="99" data_block="200" time="1"/>
  </device>
  <device dev_id="7" mapped_blocks="0" transaction="2" creation_time="1" snap_time="1">
  </device>
</superblock>
"""


def entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def small_file_system(folder: Path, size: int) -> Path:
    """Mount a tmpfs of a size; the caller unmounts it."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "blocksnap-test", str(folder)], check=True)
    return folder


needs_loop = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/loop-control").exists(), reason="needs root and /dev/loop-control"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")


@pytest.fixture
def tight(tmp_path: Path) -> Iterator[Path]:
    folder = small_file_system(tmp_path / "tight", 8 << 20)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_public_names_are_sorted_and_there() -> None:
    assert list(blocksnap.__all__) == sorted(blocksnap.__all__)
    assert all(hasattr(blocksnap, name) for name in blocksnap.__all__)
    assert {"Pool", "ThinDevice", "BlocksnapError"} <= set(blocksnap.__all__)


def test_create_makes_a_private_directory_with_three_files(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with Pool.create(path, size="10M", block_size="64K") as pool:
        assert pool.path == path
        status = pool.status()
    assert entries(path) == ["catalog.db", "data", "metadata"]
    assert path.stat().st_mode & 0o777 == 0o700
    assert {(path / name).stat().st_mode & 0o777 for name in entries(path)} == {0o600}
    assert (status.data_bytes, status.block_size, status.metadata_bytes) == (10 << 20, 65536, 2 << 20)
    assert (path / "data").stat().st_blocks == 0
    assert_sound(path / "metadata")


def test_metadata_get_48_bytes_a_block(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "pool", size="1G", block_size="4K") as pool:
        assert pool.status().metadata_bytes == 48 << 18
    with Pool.create(tmp_path / "other", size="1M", metadata_size="3M") as pool:
        assert pool.status().metadata_bytes == 3 << 20


def test_size_is_rounded_down_to_whole_blocks(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "pool", size=1_000_000, block_size="64K") as pool:
        assert pool.status().data_bytes == 15 * 65536


def test_preallocate_allocates_every_block(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    path = tmp_path / "pool"
    report = lambda done, total: calls.append((done, total))  # noqa: E731
    with Pool.create(path, size="9M", preallocate=True, progress=report) as pool:
        device = pool.create_device("a", SIZE)
        device.write(0, b"x" * SIZE)
        before = (path / "data").stat().st_blocks
        device.delete()
        pool.commit()
    assert before * 512 >= 9 << 20
    assert (path / "data").stat().st_blocks == before
    assert calls[-1] == (9 << 20, 9 << 20)


def test_space_of_freed_blocks_goes_back_to_the_file_system(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with Pool.create(path, size="64M") as pool:
        device = pool.create_device("a", 8 * SIZE)
        device.write(0, b"x" * 8 * SIZE)
        device.flush()
        full = (path / "data").stat().st_blocks
        device.delete()
    assert full * 512 >= 8 * SIZE
    assert (path / "data").stat().st_blocks * 512 < SIZE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "1K"}, "holds no block"),
        ({"size": "lots"}, "is not a size"),
        ({"size": -1}, "negative"),
        ({}, "give the size"),
        ({"size": "1M", "block_size": "5K"}, "block size"),
        ({"size": "1M", "block_size": 0}, "holds no block"),
        ({"size": "1M", "engine": "qcow2"}, "no engine"),
        ({"size": "1M", "metadata_size": "8K"}, "metadata"),
        ({"size": "1M", "metadata": "x", "data": "y"}, "not both"),
    ],
)
def test_create_with_wrong_arguments_leaves_nothing(
    tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(errors.BlocksnapError, match=words):
        Pool.create(tmp_path / "pool", **options)  # type: ignore[arg-type]
    assert entries(tmp_path) == []


def test_create_refuses_what_is_there_and_does_not_touch_it(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with Pool.create(path, size="1M") as pool:
        pool.create_device("a", SIZE)
    with pytest.raises(errors.DeviceExistsError, match="exists already"):
        Pool.create(path, size="1M")
    with Pool.open(path) as pool:
        assert pool.device("a").size == SIZE
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(errors.ArgumentError, match="not empty"):
        Pool.create(tmp_path / "used", size="1M")
    assert entries(tmp_path / "used") == ["file"]


def test_create_fills_an_empty_directory(tmp_path: Path) -> None:
    Pool.create(tmp_path, size="1M").close()
    assert tmp_path.stat().st_mode & 0o777 == 0o700


@needs_root
def test_create_on_a_full_file_system_leaves_nothing(tight: Path) -> None:
    with pytest.raises(errors.NoSpaceError, match="data: No space"):
        Pool.create(tight / "pool", size="16M", preallocate=True)
    assert entries(tight) == []


@needs_root
def test_a_full_file_system_for_the_catalog_leaves_nothing(tight: Path) -> None:
    (tight / "ballast").write_bytes(bytes((8 << 20) - 80000))
    with pytest.raises(errors.NoSpaceError):
        Pool.create(tight / "pool", size="1M")
    assert entries(tight) == ["ballast"]


@needs_root
def test_a_full_file_system_under_a_pool_is_enospc_and_passes(tight: Path) -> None:
    with Pool.create(tight / "pool", size="64M") as pool:
        device = pool.create_device("a", "64M")
        ballast = tight / "ballast"
        with pytest.raises(errors.NoSpaceError):
            device.write(0, os.urandom(10 << 20))
        ballast.touch()
        free = os.statvfs(tight)
        assert free.f_bavail * free.f_bsize < 1 << 20
        device.discard(0, 64 << 20)
    with Pool.open(tight / "pool") as pool:
        pool.device("a").write(0, b"works again")
        pool.create_device("b", SIZE)
    assert_sound(tight / "pool" / "metadata")


def start_and_kill(program: str, *arguments: object, when: Callable[[], bool]) -> None:
    child = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)])
    try:
        deadline = time.monotonic() + 60
        while not when():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def test_a_killed_creation_is_named_by_open_and_replaced_by_create(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    program = (
        "import sys; from blocksnap.pool import Pool; Pool.create(sys.argv[1], size='4G', preallocate=True)"
    )
    start_and_kill(
        program, path, when=lambda: (path / "data").exists() and (path / "data").stat().st_size > 0
    )
    assert "catalog.db.creating" in entries(path)
    with pytest.raises(errors.PoolFormatError, match=r"never completed.*remove .*pool and create it again"):
        Pool.open(path)
    Pool.create(path, size="1M").close()
    assert entries(path) == ["catalog.db", "data", "metadata"]


def test_a_creation_under_way_is_busy(tmp_path: Path) -> None:
    path = tmp_path / "pool"

    def look(done: int, _total: int) -> None:
        if done <= 4 << 20:
            with pytest.raises(errors.BusyError, match="creating"):
                Pool.open(path)
            with pytest.raises(errors.BusyError, match="creating"):
                Pool.create(path, size="1M")

    Pool.create(path, size="8M", preallocate=True, progress=look).close()


def test_an_interrupted_creation_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pool.create(tmp_path / "pool", size="8M", preallocate=True, progress=interrupt)
    assert entries(tmp_path) == []


def test_open_of_nothing_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(errors.DeviceNotFoundError, match=r"no pool at .*pool create"):
        Pool.open(tmp_path / "pool")
    Pool.create(tmp_path / "pool", size="1M").close()
    (tmp_path / "pool" / "data").unlink()
    with pytest.raises(errors.DeviceNotFoundError, match="data does not exist"):
        Pool.open(tmp_path / "pool")


@pytest.mark.parametrize("what", [b"", b"text" * 2000, bytes(1 << 20)])
def test_open_of_foreign_metadata_is_refused_and_changes_nothing(tmp_path: Path, what: bytes) -> None:
    path = tmp_path / "pool"
    Pool.create(path, size="1M").close()
    (path / "metadata").write_bytes(what)
    with pytest.raises(errors.BlocksnapError, match="metadata"):
        Pool.open(path)
    assert (path / "metadata").read_bytes() == what


def test_a_data_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    Pool.create(path, size="2M").close()
    os.truncate(path / "data", SIZE)
    with pytest.raises(errors.BlocksnapError, match="data is shorter"):
        Pool.open(path)


def test_a_pool_in_use_is_busy(tmp_path: Path) -> None:
    with (
        Pool.create(tmp_path / "pool", size="1M"),
        pytest.raises(errors.BusyError, match="in use by process"),
    ):
        Pool.open(tmp_path / "pool")


def test_an_unknown_engine_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(errors.ArgumentError, match="'user' or 'kernel'"):
        Pool.create(tmp_path / "pool", size="1M", engine="steam")


@needs_thin_tools
def test_a_pool_of_others_opens_with_numbered_names(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    path.mkdir()
    restore(XML, path / "metadata")
    content = os.urandom(256 * 65536)
    (path / "data").write_bytes(content)
    with Pool.open(path, read_only=True) as pool:
        assert [(d.name, d.size) for d in pool.devices()] == [("thin-3", 100 * 65536), ("thin-7", 65536)]
    assert not (path / "catalog.db").exists()
    with Pool.open(path) as pool:
        device = pool.device("thin-3")
        assert device.read(0, 131072) == content[10 * 65536 : 12 * 65536]
        assert device.read(99 * 65536, 65536) == content[200 * 65536 : 201 * 65536]
        assert device.read(131072, 65536) == bytes(65536)
        made = device.snapshot("named")
        assert made.id not in (3, 7)
    with Pool.open(path) as pool:
        assert [device.name for device in pool.devices()] == ["named", "thin-3", "thin-7"]
        assert pool.status().transaction_id == 10


def test_two_files_make_a_pool_with_a_catalog_beside_them(tmp_path: Path) -> None:
    metadata, data = tmp_path / "m", tmp_path / "d"
    for part, size in ((metadata, 2 << 20), (data, 8 << 20)):
        with part.open("wb") as made:
            made.truncate(size)
    with Pool.create(metadata=metadata, data=data) as pool:
        pool.create_device("a", SIZE)
        assert pool.status().data_bytes == 8 << 20
    assert entries(tmp_path) == ["d", "m", "m.catalog.db"]
    with Pool.open(metadata=metadata, data=data) as pool:
        assert [device.name for device in pool.devices()] == ["a"]
        os.truncate(data, 16 << 20)
        pool.extend()
        assert pool.status().data_bytes == 16 << 20
    with pytest.raises(errors.DeviceExistsError):
        Pool.create(metadata=metadata, data=data)
    with pytest.raises(errors.DeviceExistsError):
        Pool.create(metadata=metadata, data=data, catalog=tmp_path / "other.db")
    assert entries(tmp_path) == ["d", "m", "m.catalog.db"]
    with pytest.raises(errors.ArgumentError, match="two devices"):
        Pool.open(metadata=metadata, data=metadata)


@needs_loop
def test_two_block_devices_make_a_pool(tmp_path: Path) -> None:
    for name, size in (("m", 4 << 20), ("d", 32 << 20)):
        with (tmp_path / name).open("wb") as made:
            made.truncate(size)
    with LoopDevice.attach(tmp_path / "m") as metadata, LoopDevice.attach(tmp_path / "d") as data:
        where: dict[str, Any] = {"metadata": metadata.path, "data": data.path, "catalog": tmp_path / "c"}
        with Pool.create(**where) as pool:
            pool.create_device("a", SIZE).write(12345, b"on block devices")
            assert (pool.status().data_bytes, pool.status().metadata_bytes) == (32 << 20, 4 << 20)
        with pytest.raises(errors.DeviceExistsError, match="exists already"):
            Pool.create(**where)
        with Pool.open(**where, direct_io=True) as pool:
            assert pool.status().direct_io
            assert pool.device("a").read(12345, 16) == b"on block devices"
            pool.device("a").write(12345, b"ON")
            with pytest.raises(errors.BusyError):
                Pool.open(**where)
    assert_sound(tmp_path / "m")


def test_read_only_reads_and_refuses_changes(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with Pool.create(path, size="1M") as pool:
        pool.create_device("a", SIZE).write(0, b"content")
    before = {name: (path / name).read_bytes() for name in entries(path)}
    with Pool.open(path, read_only=True) as pool, Pool.open(path, read_only=True) as second:
        assert second.device("a").read(0, 7) == b"content"
        assert pool.read_only
        assert pool.usage()[0].mapped_bytes == 65536
        for change in (
            lambda: pool.create_device("b", SIZE),
            pool.device("a").delete,
            lambda: pool.device("a").resize(512),
            lambda: pool.extend(size="2M"),
            lambda: pool.device("a").write(0, b"x"),
        ):
            with pytest.raises(errors.BlocksnapError, match="read-only"):
                change()
    assert {name: (path / name).read_bytes() for name in entries(path)} == before


def test_a_catalog_of_another_time_is_refused_until_adopted(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with Pool.create(path, size="4M") as pool:
        pool.create_device("early", SIZE)
    old = (path / "catalog.db").read_bytes()
    with Pool.open(path) as pool:
        pool.create_device("late", SIZE).write(0, b"late")
        pool.create_device("later", SIZE)
    (path / "catalog.db").write_bytes(old)
    with pytest.raises(errors.PoolFormatError, match=r"transaction 1, but the pool is at 3: .*pool adopt"):
        Pool.open(path)
    with Pool.open(path, adopt=True) as pool:
        assert [device.name for device in pool.devices()] == ["early", "thin-2", "thin-3"]
        assert pool.device("thin-2").read(0, 4) == b"late"
    Pool.open(path).close()


def test_devices_made_or_deleted_behind_the_catalog_are_refused_by_id(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with Pool.create(path, size="4M") as pool:
        pool.create_device("a", SIZE)
    engine = UserPool.open(path / "metadata", path / "data")
    engine.create_device(5)
    engine.close()
    with pytest.raises(errors.PoolFormatError, match=r"does not know \(ids 5\).*pool adopt"):
        Pool.open(path)
    engine = UserPool.open(path / "metadata", path / "data")
    engine.delete_device(5)
    engine.delete_device(1)
    engine.close()
    with pytest.raises(errors.PoolFormatError, match=r'does not hold: "a" \(id 1\).*pool adopt'):
        Pool.open(path)
    with Pool.open(path, adopt=True) as pool:
        assert pool.devices() == []


def test_extend_grows_data_and_metadata_and_never_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with Pool.create(path, size="1M") as pool:
        pool.extend(metadata_size="4M")
        status = pool.status()
        assert (status.data_bytes, status.metadata_bytes) == (1 << 20, 4 << 20)
        pool.extend(size="3M", preallocate=True)
        assert pool.status().data_bytes == 3 << 20
        with pytest.raises(errors.ArgumentError, match="cannot shrink"):
            pool.extend(size="2M")
    with Pool.open(path) as pool:
        assert pool.status().data_bytes == 3 << 20
    assert_sound(path / "metadata")


def test_ids_are_used_again_only_when_all_others_were(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "pool", size="1M") as pool:
        first = pool.create_device("a", SIZE).id
        pool.device("a").delete()
        assert pool.create_device("b", SIZE).id == first + 1
    with Pool.open(tmp_path / "pool") as pool:
        assert pool.create_device("c", SIZE).id == first + 2


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb", "a\0b", "x" * 256])
def test_names_that_are_no_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with Pool.create(tmp_path / "pool", size="1M") as pool:
        with pytest.raises(errors.ArgumentError, match="cannot name"):
            pool.create_device(name, SIZE)
        device = pool.create_device("fine ünïcode: name", SIZE)
        with pytest.raises(errors.ArgumentError, match="cannot name"):
            device.snapshot(name)


@pytest.mark.parametrize("size", [0, 1, 513, "0.5K", 1 << 63])
def test_device_sizes_are_whole_sectors(tmp_path: Path, size: int | str) -> None:
    with Pool.create(tmp_path / "pool", size="1M") as pool:
        if size == "0.5K":
            assert pool.create_device("a", size).size == 512
        else:
            with pytest.raises(errors.ArgumentError):
                pool.create_device("a", size)
            assert pool.devices() == []


def test_a_catalog_that_cannot_be_written_aborts_the_operation(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "pool", size="1M") as pool:
        pool.create_device("a", SIZE)
        pool._catalog._database.execute("PRAGMA max_page_count = 1")
        labels = {"long": "x" * 100000}
        with pytest.raises(errors.NoSpaceError):
            pool.create_device("b", SIZE, labels=labels)
        pool._catalog._database.execute("PRAGMA max_page_count = 100000")
        assert [device.name for device in pool.devices()] == ["a"]
        pool.create_device("b", SIZE, labels=labels)
    with Pool.open(tmp_path / "pool") as pool:
        assert pool.device("b").labels == labels
        assert len(pool._engine.devices()) == 2


def test_a_deletion_that_fails_at_the_end_undoes_the_rest_and_keeps_what_is_gone(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "pool", size="4M") as pool:
        first, second = pool.create_device("first", SIZE), pool.create_device("second", SIZE)

        def replace_both() -> None:
            with ExitStack() as secret, pool.transaction():
                pool.create_device("new", SIZE).write(0, b"x")
                first.delete()
                second.delete()
                secret.enter_context(pool._engine.open_device(second.id, SIZE))

        with pytest.raises(errors.BusyError):
            replace_both()
        assert [device.name for device in pool.devices()] == ["second"]
        second.write(0, b"usable")
    with Pool.open(tmp_path / "pool") as pool:
        assert [device.name for device in pool.devices()] == ["second"]
    assert_sound(tmp_path / "pool" / "metadata")


def test_a_pool_is_never_opened_under_another_type_of_file(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    Pool.create(path, size="1M").close()
    (path / "metadata").rename(tmp_path / "metadata")
    (path / "metadata").mkdir()
    with pytest.raises(errors.BlocksnapError, match="metadata"):
        Pool.open(path)
