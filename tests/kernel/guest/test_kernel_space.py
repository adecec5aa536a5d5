"""A file system on a thin device whose pool runs full: the pool grows, or fails writes and recovers."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from blocksnap import mount
from blocksnap.device_mapper import Control, ThinPoolStatus
from blocksnap.errors import NoSpaceError
from blocksnap.pool import Pool
from blocksnap.space_policy import ExtendPolicy, PoolEvent, PoolExtended
from blocksnap.thin_device import ThinDevice
from tests.kernel.devices import leftovers
from tests.pool_servers import wait_until

MIB = 1 << 20
BLOCK = 64 << 10


@contextmanager
def mounted(device: ThinDevice, target: Path) -> Iterator[None]:
    """Mount a new ext4 whose own blocks are all written to: only data need new ones."""
    target.mkdir()
    with device.hold() as handle:
        node = str(handle.path)  # type: ignore[union-attr]
        options = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
        subprocess.run(["mkfs.ext4", "-q", "-E", options, node], check=True)
        mount.mount(node, target, "ext4")
        try:
            yield
        finally:
            mount.unmount(target)
        subprocess.run(["e2fsck", "-fn", node], check=True, stdout=subprocess.DEVNULL)


def write_file(path: Path, begin: int, end: int) -> None:
    """Write and sync a file MiB by MiB."""
    with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
        for number in range(begin, end):
            file.seek(number * MIB)
            file.write(bytes([number]) * MIB)
            os.fsync(file.fileno())


def assert_content(path: Path, end: int) -> None:
    with path.open("rb") as file:
        for number in range(end):
            assert file.read(MIB) == bytes([number]) * MIB


def pool_mode() -> str:
    with Control.open() as control:
        (pool,) = [device for device in leftovers(control) if device.uuid.endswith("-pool")]
        (status,) = pool.status()
        assert isinstance(status, ThinPoolStatus)
        return status.when_full


def test_a_file_system_does_not_notice_that_its_pool_grows(path: Path, tmp_path: Path) -> None:
    events: list[PoolEvent] = []
    policy = ExtendPolicy(0.5, "8M", "128M")
    with Pool.create(path, size="24M", engine="kernel", auto_extend=policy, on_event=events.append) as pool:
        assert pool_mode() == "queue_if_no_space"
        device = pool.create_device("a", "96M")
        with mounted(device, tmp_path / "mounted"):
            write_file(tmp_path / "mounted/file", 0, 60)
            snap = device.snapshot("snap")
            write_file(tmp_path / "mounted/file", 0, 10)
            assert_content(tmp_path / "mounted/file", 60)
        with snap.hold() as handle:
            subprocess.run(["e2fsck", "-fn", handle.path], check=True)  # type: ignore[union-attr]
        assert pool.status().data_bytes > 64 * MIB
        assert any(isinstance(event, PoolExtended) for event in events)
        assert not pool.check().findings


def test_without_a_policy_the_writer_fails_at_once_and_goes_on_after_extend(
    path: Path, tmp_path: Path
) -> None:
    with Pool.create(path, size="24M", engine="kernel") as pool:
        assert pool_mode() == "error_if_no_space"
        device = pool.create_device("a", "96M")
        with mounted(device, tmp_path / "mounted"):
            with pytest.raises(OSError, match=r"No space|Input/output") as caught:
                write_file(tmp_path / "mounted/file", 0, 60)
            assert caught.value.errno in (errno.ENOSPC, errno.EIO)
            assert pool.status().out_of_space
            pool.extend(size="96M")
            assert not pool.status().out_of_space
            write_file(tmp_path / "mounted/file", 0, 60)
            assert_content(tmp_path / "mounted/file", 60)


def test_a_pool_at_its_maximum_goes_back_to_failing_at_once(path: Path) -> None:
    policy = ExtendPolicy(0.5, "8M", "32M")
    with Pool.create(path, size="24M", engine="kernel", auto_extend=policy) as pool:
        device = pool.create_device("a", "96M")
        with pytest.raises(OSError, match="full"):
            device.write(0, b"x" * (64 * MIB))
        assert pool_mode() == "error_if_no_space"
        assert pool.status().data_bytes == 32 * MIB
        pool.extend(size="96M")
        device.write(0, b"x" * (40 * MIB))


def test_a_pool_on_devices_grows_into_the_rest_of_its_data_device(path: Path) -> None:
    path.mkdir()
    for name, size in (("m", 4), ("d", 64)):
        with (path / name).open("wb") as file:
            file.truncate(size * MIB)
    with (
        mount.LoopDevice.attach(path / "m") as m,
        mount.LoopDevice.attach(path / "d") as d,
        Pool.create(
            metadata=m.path,
            data=d.path,
            catalog=path / "catalog.db",
            size="16M",
            engine="kernel",
            auto_extend=ExtendPolicy(0.5, "16M"),
        ) as pool,
    ):
        device = pool.create_device("a", "96M")
        device.write(0, b"x" * (40 * MIB))
        wait_until(lambda: pool.status().data_bytes == 64 * MIB)
        with pytest.raises(OSError, match="full"):
            device.write(0, b"x" * (96 * MIB))
        assert pool.status().data_bytes == 64 * MIB


def share_much(pool: Pool) -> list[ThinDevice]:
    """Return many snapshots of a device of several leaves, as many as the metadata take."""
    base = pool.create_device("base", "64M")
    for number in range(500):
        base.write(number * BLOCK, b"x")
    snapshots = []
    with suppress(NoSpaceError):
        for number in range(50):
            snapshots.append(base.snapshot(f"s{number}"))
    return snapshots


def break_all_sharing(snapshots: list[ThinDevice]) -> None:
    for snapshot in snapshots:
        for number in range(0, 500, 100):
            snapshot.write(number * BLOCK, b"y" * BLOCK)


def test_writes_that_would_fill_the_metadata_fail_and_go_on_after_extend(path: Path) -> None:
    with Pool.create(path, size="384M", metadata_size="256K", engine="kernel") as pool:
        snapshots = share_much(pool)
        with pytest.raises(NoSpaceError, match=r'the metadata of .* are full: .*"blocksnap pool extend'):
            break_all_sharing(snapshots)
        status = pool.status()
        assert (status.read_only, status.needs_check, status.failed) == (False, False, False)
        pool.extend(metadata_size="2M")
        break_all_sharing(snapshots)
        pool.commit()
        assert not pool.check().findings


def test_metadata_grow_before_writes_have_filled_them(path: Path) -> None:
    with Pool.create(
        path, size="384M", metadata_size="256K", engine="kernel", auto_extend=ExtendPolicy()
    ) as pool:
        snapshots = share_much(pool)
        break_all_sharing(snapshots)
        pool.commit()
        assert pool.status().metadata_bytes > 256 << 10
        assert not pool.check().findings
