"""Thin pools of the kernel for tests."""

import dataclasses
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from blocksnap.device_mapper import Control, Device, ThinPoolStatus, ThinPoolTarget, ThinStatus, ThinTarget
from blocksnap.errors import BlocksnapError
from blocksnap.pool import Pool
from tests.kernel.devices import BLOCK, MIB, Disks, leftovers

__all__ = [
    "DATA",
    "METADATA",
    "SIZE",
    "activate",
    "discard",
    "kernel_counts",
    "let_go",
    "make_thin",
    "pool_status",
    "pool_target",
    "start_pool",
]

METADATA, DATA, SIZE = 4 * MIB, 32 * MIB, 8 * MIB
BLKDISCARD = 0x1277


def pool_target(
    disks: Disks, data: int = DATA, low_water_blocks: int = 0, **features: bool
) -> ThinPoolTarget:
    target = ThinPoolTarget(
        data,
        disks.attach("metadata", METADATA),
        disks.attach("data", data),
        BLOCK,
        low_water_blocks,
        error_if_no_space=True,
    )
    return dataclasses.replace(target, **features)  # type: ignore[arg-type]


def start_pool(control: Control, disks: Disks, data: int = DATA, **options: bool) -> Device:
    return Device.create(control, "pool", [pool_target(disks, data, **options)])


def activate(control: Control, pool: Device, device_id: int, size: int = SIZE) -> Device:
    return Device.create(control, f"thin-{device_id}", [ThinTarget(size, pool.number, device_id)])


def make_thin(control: Control, pool: Device, device_id: int) -> Device:
    pool.create_thin(device_id)
    return activate(control, pool, device_id)


def pool_status(pool: Device, *, commit: bool = False) -> ThinPoolStatus:
    (status,) = pool.status(commit=commit)
    assert isinstance(status, ThinPoolStatus), status
    return status


def discard(path: str, offset: int, length: int) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        fcntl.ioctl(descriptor, BLKDISCARD, struct.pack("QQ", offset, length))
    finally:
        os.close(descriptor)


def kernel_counts(pool: Pool) -> tuple[dict[str, int], int]:
    """Return the mapped bytes of each active device, and the used blocks of the pool, as the kernel tells."""
    names = {device.id: device.name for device in pool.devices()}
    mapped, used = {}, -1
    with Control.open() as control:
        for device in leftovers(control):
            (status,) = device.status(commit=True)
            if isinstance(status, ThinPoolStatus):
                used = status.used_data_blocks
            else:
                assert isinstance(status, ThinStatus), status
                mapped[names[int(device.uuid.rsplit("-", 1)[1])]] = status.mapped_bytes
    return mapped, used


@contextmanager
def let_go(pool: Pool) -> Iterator[Pool]:
    """Close a pool at the end; if it cannot be closed, let go of it as a killed process does."""
    try:
        yield pool
    finally:
        with suppress(BlocksnapError):
            pool.close()
        pool.abandon()
