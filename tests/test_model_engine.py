"""What the model predicts for a trace is what the user engine does, block for block."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from blocksnap import Pool
from blocksnap.amplification.model import CowModel, SnapshotEvery
from blocksnap.thin_device import ThinDevice
from blocksnap.traces import REQUEST, Requests
from blocksnap.traces.request import DISCARD, WRITE
from tests.golden_traces import TRACES
from tests.trace_files import CARRIED, read

DEVICE = 32 << 20
REQUESTS = 2500
EVERY = 300  # writes between two snapshots
BLOCK_SIZES = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20]


def folded(requests: Requests) -> Requests:
    """Return the first writes and discards of the busiest device, folded onto a small one."""
    changing = requests[np.isin(requests["kind"], (WRITE, DISCARD)) & (requests["length"] > 0)]
    devices, counts = np.unique(changing["device"], return_counts=True)
    kept: Requests = changing[changing["device"] == devices[np.argmax(counts)]][:REQUESTS].copy()
    kept["offset"] %= DEVICE
    kept["length"] = np.minimum(kept["length"], DEVICE - kept["offset"])
    kept["device"] = 0
    return kept


def drawn(seed: int) -> Requests:
    """Return random writes and discards of odd lengths at odd places."""
    rng = np.random.default_rng(seed)
    requests = np.zeros(1200, REQUEST)
    requests["kind"] = np.where(rng.random(len(requests)) < 0.85, WRITE, DISCARD)
    requests["length"] = np.minimum(rng.geometric(1 / 20000, len(requests)), 3 << 20)
    requests["offset"] = rng.integers(0, DEVICE, len(requests))
    requests["length"] = np.minimum(requests["length"], DEVICE - requests["offset"])
    return requests


def replay(pool: Pool, device: ThinDevice, requests: Requests) -> list[int]:
    """Do what the requests say, with a snapshot after every EVERY writes; return what each epoch copied."""
    content = memoryview(bytes(DEVICE))
    writes = 0
    copied = [blocks_copied(pool)]
    for request in requests:
        offset, length = int(request["offset"]), int(request["length"])
        if request["kind"] == DISCARD:
            device.discard(offset, length)
            continue
        device.write(offset, content[:length])
        writes += 1
        if writes % EVERY == 0:
            device.snapshot(f"after-{writes}")
            copied.append(blocks_copied(pool))
    copied.append(blocks_copied(pool))
    return [after - before for before, after in itertools.pairwise(copied)]


def blocks_copied(pool: Pool) -> int:
    return pool.status().counters.blocks_copied or 0


def engine_counts(path: Path, requests: Requests, block_size: int, *, fresh: bool) -> dict[str, object]:
    with Pool.create(path, size="1G", block_size=block_size) as pool:
        device = pool.create_device("traced", DEVICE)
        if not fresh:
            device.write(0, bytes(DEVICE))
            device.snapshot("parent")
        before = pool.status().counters
        by_epoch = replay(pool, device, requests)
        after = pool.status().counters
    names = ("blocks_provisioned", "blocks_copied", "blocks_overwritten", "copied_bytes", "zero_filled_bytes")
    counts = {name: (getattr(after, name) or 0) - (getattr(before, name) or 0) for name in names}
    return {**counts, "copied_by_epoch": by_epoch}


def model_counts(requests: Requests, *, fresh: bool) -> dict[int, dict[str, object]]:
    with CowModel(BLOCK_SIZES, fresh=fresh, snapshot_every=SnapshotEvery(writes=EVERY)) as model:
        model.feed(requests)
        return {
            one.block_size: {
                "blocks_provisioned": one.blocks_provisioned,
                "blocks_copied": one.blocks_copied,
                "blocks_overwritten": one.blocks_overwritten,
                "copied_bytes": one.copied_bytes,
                "zero_filled_bytes": one.zero_filled_bytes,
                "copied_by_epoch": model.epochs(one.block_size)["blocks_copied"].tolist(),
            }
            for one in model.results()
        }


@pytest.mark.parametrize("fresh", [False, True], ids=["on-a-parent", "fresh"])
@pytest.mark.parametrize("name", TRACES)
def test_model_equals_the_user_engine_on_every_carried_trace(name: str, fresh: bool, tmp_path: Path) -> None:
    requests = folded(read(CARRIED / name))
    predicted = model_counts(requests, fresh=fresh)
    for size in BLOCK_SIZES:
        assert engine_counts(tmp_path / str(size), requests, size, fresh=fresh) == predicted[size], size


@pytest.mark.parametrize("seed", range(6))
def test_model_equals_the_user_engine_on_random_requests(seed: int, tmp_path: Path) -> None:
    requests = drawn(seed)
    predicted = model_counts(requests, fresh=bool(seed % 2))
    for size in BLOCK_SIZES:
        assert engine_counts(tmp_path / str(size), requests, size, fresh=bool(seed % 2)) == predicted[size], (
            size
        )
