"""How fast the copy-on-write model is, at 11 block sizes in one pass, on one core.

    python -m bench.bench_model [--requests 10000000] [--long 1000000000]

Beside it, on the same requests in the same run: one pass for each block size, and a straightforward numpy
version, whose counts must be the same. Seconds are of user CPU time, the median of some runs: the machine
may be shared. Before that --long writes spread over a device of 1 TiB, and what memory they took.
"""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bench.trace_stream import pieces
from blocksnap.amplification.model import DEFAULT_MODEL_BLOCK_SIZES, CowModel, SnapshotEvery
from blocksnap.traces import REQUEST, WRITE, Requests

REPEATS = 5
EVERY = 100_000  # writes between two snapshots
TIB = 1 << 40
PIECE = 1 << 18

Counts = list[tuple[int, int]]
"""Blocks written and blocks copied, by block size."""


def local_trace(count: int) -> Requests:
    """Return requests in sequential runs, their starts skewed, on 64 GiB; a third of the runs reads."""
    out = np.zeros(count, REQUEST)
    first = 0
    for piece in pieces(count):
        part = out[first : first + len(piece)]
        part["time"], part["offset"] = piece["time"] * 1000, piece["sector"] * 512
        part["length"], part["kind"] = piece["length"], piece["command"] == 0x2A
        first += len(piece)
    return out


def model(requests: Requests, sizes: Sequence[int] = DEFAULT_MODEL_BLOCK_SIZES) -> Counts:
    with CowModel(sizes, snapshot_every=SnapshotEvery(writes=EVERY)) as cow:
        cow.feed(requests)
        return [(row.blocks_written, row.blocks_copied) for row in cow.results()]


def separate_passes(requests: Requests) -> Counts:
    return [model(requests, [size])[0] for size in DEFAULT_MODEL_BLOCK_SIZES]


def with_numpy(requests: Requests) -> Counts:
    """Count, epoch by epoch, the blocks that writes touch, and those not covered by the first piece."""
    writes = requests[requests["kind"] == WRITE]
    epochs = [writes[begin : begin + EVERY] for begin in range(0, len(writes), EVERY)]
    return [_numpy_counts(epochs, size) for size in DEFAULT_MODEL_BLOCK_SIZES]


def _numpy_counts(epochs: Sequence[Requests], size: int) -> tuple[int, int]:
    written = copied = 0
    for writes in epochs:
        begin, end = writes["offset"], writes["offset"] + writes["length"]
        first = begin // size
        touched = (end - 1) // size - first + 1
        of = np.repeat(np.arange(len(writes)), touched.astype(np.int64))
        place = np.arange(len(of)) - np.repeat(np.cumsum(touched) - touched, touched.astype(np.int64))
        block = first[of] + place.astype(np.uint64)
        blocks, pieces_that_touch = np.unique(block, return_index=True)
        of = of[pieces_that_touch]
        whole = (begin[of] <= blocks * size) & (end[of] >= (blocks + 1) * size)
        written += len(blocks)
        copied += int(np.count_nonzero(~whole))
    return written, copied


def user_seconds(count_blocks: Callable[[Requests], Counts], requests: Requests) -> float:
    begin = os.times().user
    count_blocks(requests)
    return os.times().user - begin


def show(name: str, count_blocks: Callable[[Requests], Counts], requests: Requests) -> float:
    seconds = [user_seconds(count_blocks, requests) for _ in range(REPEATS)]
    median = statistics.median(seconds)
    rate = len(requests) / median / 1e6
    print(f"{name:32} {rate:8.1f} M requests/s, {min(seconds):.2f} to {max(seconds):.2f} s")
    return median


def compare(count: int) -> None:
    requests = local_trace(count)
    expected = model(requests)
    assert separate_passes(requests) == expected == with_numpy(requests)
    one = show("one pass, 11 block sizes", model, requests)
    for name, other in (("11 passes", separate_passes), ("numpy", with_numpy)):
        print(f"    the one pass is {show(name, other, requests) / one:.1f} times as fast")


def spread_writes(count: int) -> Iterator[Requests]:
    """Yield writes of 4 KiB at random places of 1 TiB: nothing that could be kept small."""
    random = np.random.default_rng(1)
    for first in range(0, count, PIECE):
        piece = np.zeros(min(PIECE, count - first), REQUEST)
        piece["offset"] = random.integers(0, TIB >> 12, len(piece), np.uint64) << np.uint64(12)
        piece["time"] = np.arange(first, first + len(piece)) * 100_000
        piece["length"], piece["kind"] = 4096, WRITE
        yield piece


def measure_memory(count: int) -> None:
    begin = time.monotonic()
    with CowModel(snapshot_every=SnapshotEvery(writes=count // 10)) as cow:
        for piece in spread_writes(count):
            cow.feed(piece)
        held = cow.trace().memory_bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.monotonic() - begin
    print(
        f"{count:,} random writes of 4 KiB on 1 TiB: {held / 2**30:.2f} GiB held by the model, "
        f"{peak / 2**30:.2f} GiB at the peak of the process; {seconds:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000_000)
    parser.add_argument("--long", type=int, default=1_000_000_000)
    arguments = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.2f}")
    if arguments.long:
        measure_memory(arguments.long)
    if arguments.requests:
        compare(arguments.requests)


if __name__ == "__main__":
    main()
