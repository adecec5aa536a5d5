"""What the copy-on-write model predicts is what the kernel's status tells, block for block."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blocksnap.amplification.model import CowModel
from blocksnap.device_mapper import Control
from blocksnap.pool import Pool
from blocksnap.thin_device import ThinDevice
from blocksnap.traces import REQUEST, Requests
from blocksnap.traces.request import DISCARD, WRITE
from tests.golden_traces import TRACES
from tests.kernel.devices import sweep
from tests.kernel.pools import discard, kernel_counts
from tests.trace_files import CARRIED, read

KIB, MIB = 1 << 10, 1 << 20
SECTOR = 512
DEVICE = 8 * MIB
BLOCK_SIZES = [64 * KIB, 256 * KIB, MIB]
EPOCHS, REQUESTS = 4, 320


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where a pool may lie; afterwards nothing of it takes memory in the guest."""
    yield tmp_path / "pool"
    with Control.open() as control:
        left = sweep(control)
    shutil.rmtree(tmp_path / "pool")
    assert left == []


def in_sectors(requests: Requests) -> Requests:
    """Return requests within the device, all of whole sectors."""
    offset = requests["offset"] % DEVICE // SECTOR * SECTOR
    requests["offset"] = offset
    requests["length"] = np.minimum(-(-requests["length"].astype(int) // SECTOR) * SECTOR, DEVICE - offset)
    return requests


def drawn(seed: int) -> Requests:
    """Return random requests of two devices, odd and large ones among them."""
    rng = np.random.default_rng(seed)
    requests = np.zeros(REQUESTS, REQUEST)
    requests["kind"] = rng.choice([WRITE, WRITE, WRITE, DISCARD], len(requests))
    requests["offset"] = rng.integers(0, DEVICE, len(requests))
    requests["length"] = rng.geometric(1 / 60_000, len(requests))
    requests["length"][::20] = 2 * MIB
    requests["device"] = rng.integers(0, 2, len(requests))
    return in_sectors(requests)


def carried(name: str) -> Requests:
    """Return writes and discards of a trace, taken evenly, folded onto a small device."""
    requests = read(CARRIED / name)
    changing = requests[np.isin(requests["kind"], (WRITE, DISCARD)) & (requests["length"] > 0)]
    kept = changing[:: max(1, len(changing) // REQUESTS)].copy()
    kept["device"] = 0
    return in_sectors(kept)


@contextmanager
def held(devices: list[ThinDevice]) -> Iterator[list[Any]]:
    """Keep devices active: the kernel tells nothing of others."""
    with ExitStack() as stack:
        handles = [device.hold() for device in devices]
        for handle in handles:
            stack.callback(handle.close)
        yield handles


def replay(handles: list[Any], requests: Requests) -> None:
    content = memoryview(bytes(DEVICE))
    for request in requests:
        device, offset, length = int(request["device"]), int(request["offset"]), int(request["length"])
        if request["kind"] == DISCARD:
            discard(str(handles[device].path), offset, length)
        else:
            handles[device].write(offset, content[:length])


def made(pool: Pool, count: int, *, fresh: bool) -> list[ThinDevice]:
    """Return devices of holes, or containers of images that are written from end to end."""
    devices = [pool.create_device(f"device-{n}", DEVICE) for n in range(count)]
    if fresh:
        return devices
    for device in devices:
        device.write(0, bytes(DEVICE))
    return [device.snapshot(f"container-{n}") for n, device in enumerate(devices)]


def assert_equal(path: Path, requests: Requests, block_size: int, *, fresh: bool) -> None:
    count = int(requests["device"].max()) + 1
    with (
        Pool.create(path, size="128M", block_size=block_size, engine="kernel") as pool,
        CowModel(BLOCK_SIZES, fresh=fresh, keep_parts=True) as model,
    ):
        devices = made(pool, count, fresh=fresh)
        begun_with = 0 if fresh else count * (DEVICE // block_size)
        for number, epoch in enumerate(np.array_split(requests, EPOCHS)):
            model.feed(epoch)
            with held(devices) as handles:
                replay(handles, epoch)
                mapped, used = kernel_counts(pool)
            result = next(each for each in model.results() if each.block_size == block_size)
            ours = sum(mapped[device.name] for device in devices) // block_size
            assert ours == begun_with + result.blocks_provisioned - result.blocks_discarded
            assert used == begun_with + result.blocks_written - result.blocks_freed
            for device in devices:
                device.snapshot(f"{device.name}-{number}")
            model.snapshot()
        exclusive = {each.name: each.exclusive_bytes // block_size for each in pool.usage()}
        alone = [sum(exclusive[f"{device.name}-{n}"] for device in devices) for n in range(EPOCHS)]
        assert alone == model.epochs(block_size)["blocks_exclusive"].tolist()[:-1]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("fresh", [False, True], ids=["on-images", "fresh"])
def test_random_requests_map_in_the_kernel_what_the_model_says(
    path: Path, block_size: int, fresh: bool
) -> None:
    assert_equal(path, drawn(block_size), block_size, fresh=fresh)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", TRACES)
def test_carried_traces_map_in_the_kernel_what_the_model_says(path: Path, name: str, block_size: int) -> None:
    assert_equal(path, carried(name), block_size, fresh=name.startswith("sqlite"))
