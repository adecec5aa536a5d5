"""Thin devices of the kernel engine: what lies below them, who keeps them from going."""

import os
from pathlib import Path

import pytest

from blocksnap import mount
from blocksnap.errors import ArgumentError, DeviceNotFoundError, NotSupportedError
from blocksnap.file_system import make_file_system
from blocksnap.pool import Pool

SIZE = 1 << 20
BLOCK = 64 << 10


def make(path: Path) -> Pool:
    return Pool.create(path, size="64M", engine="kernel")


# ---- external origins


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A file that begins and ends within a block."""
    path = tmp_path / "origin"
    path.write_bytes(os.urandom(SIZE - 3 * 4096))
    return path


@pytest.mark.parametrize("size", [SIZE - 3 * 4096, SIZE // 2, 2 * SIZE])
def test_holes_show_an_external_origin_of_any_size(path: Path, origin: Path, size: int) -> None:
    content = bytearray(origin.read_bytes()[:size].ljust(size, b"\0"))
    with make(path) as pool:
        device = pool.create_device("a", size, external_origin=origin)
        assert device.external_origin == str(origin)
        assert device.read(0, size) == content
        for offset in (100, size // 2 - 1, size - 5):
            device.write(offset, b"own")
            content[offset : offset + 3] = b"own"
        snap = device.snapshot("snap")
        device.write(0, b"later")
        assert snap.external_origin == str(origin)
        assert snap.read(0, size) == content
    with Pool.open(path, engine="kernel") as pool:
        assert pool.device("snap").read(0, size) == content
        assert pool.device("a").read(0, 5) == b"later"
        assert not pool.check().findings
    assert origin.read_bytes()[:size] != content[: SIZE - 3 * 4096]


def test_what_is_discarded_reads_as_zeros_above_an_external_origin(path: Path, origin: Path) -> None:
    with make(path) as pool:
        device = pool.create_device("a", 2 * SIZE, external_origin=origin)
        device.write(SIZE, b"x" * BLOCK)
        device.discard(BLOCK // 2, 2 * SIZE - BLOCK)
        assert device.read(0, BLOCK // 2) == origin.read_bytes()[: BLOCK // 2]
        assert device.read(BLOCK // 2, 2 * SIZE - BLOCK // 2) == bytes(2 * SIZE - BLOCK // 2)
        assert pool.usage()[0].mapped_bytes == SIZE


def test_a_block_device_below_must_be_read_only(path: Path, origin: Path) -> None:
    with make(path) as pool:
        with (
            mount.LoopDevice.attach(origin) as loop,
            pytest.raises(ArgumentError, match=r"can be written to.*blockdev --setro"),
        ):
            pool.create_device("a", SIZE, external_origin=loop.path)
        with mount.LoopDevice.attach(origin, read_only=True) as loop:
            device = pool.create_device("a", SIZE, external_origin=loop.path)
            assert device.read(0, 4096) == origin.read_bytes()[:4096]
            device.delete()
        with pytest.raises(DeviceNotFoundError, match="absent"):
            pool.create_device("a", SIZE, external_origin=path / "absent")


def test_an_external_origin_that_has_gone_is_named(path: Path, origin: Path) -> None:
    with make(path) as pool:
        pool.create_device("a", SIZE, external_origin=origin)
        pool.create_device("b", SIZE)
    origin.rename(origin.with_name("elsewhere"))
    with Pool.open(path, engine="kernel") as pool:
        with pytest.raises(DeviceNotFoundError, match=str(origin)):
            pool.device("a").read(0, 1)
        assert pool.device("b").read(0, 1) == b"\0"


def test_the_user_engine_refuses_devices_with_an_external_origin(path: Path, origin: Path) -> None:
    with make(path) as pool:
        pool.create_device("a", SIZE, external_origin=origin)
    with Pool.open(path) as pool:
        with pytest.raises(NotSupportedError, match='open the pool with engine="kernel"'):
            pool.device("a").read(0, 1)
        with pytest.raises(NotSupportedError, match='only engine="kernel"'):
            pool.create_device("b", SIZE, external_origin=origin)
        pool.device("a").delete()


# ---- deletion of what is in use


def test_a_mounted_device_goes_with_its_mount(path: Path, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    with make(path) as pool:
        device = pool.create_device("a", "32M")
        with device.hold() as handle:
            node = str(handle.path)  # type: ignore[union-attr]
            make_file_system(Path(node), "ext4")
            mount.mount(node, tmp_path / "mounted", "ext4")
        try:
            device.delete(deferred=True)
            assert pool.devices() == []
            (tmp_path / "mounted/file").write_text("still there")
            pool.create_device("a", SIZE).delete()
            assert pool.status().condemned_devices == 1
        finally:
            mount.unmount(tmp_path / "mounted")
        assert not Path("/sys/block", Path(node).name).exists()
        pool.create_device("b", SIZE)
        assert (pool.status().condemned_devices, pool.status().devices) == (0, 1)
