"""Write a synthetic block trace of any length to standard output, in pieces.

    python -m bench.trace_stream --requests 100000000 | blocksnap analyze -

Skewed writes in sequential runs on one 64 GiB device, a third of the runs reads, ten thousand requests a
second, as `vscsi` records (version 1) or as `alibaba` lines.
"""

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

PIECE = 1 << 18
DEVICE_BLOCKS = 1 << 24  # of 4 KiB
MICROSECONDS = 100  # between two requests

VSCSI = np.dtype(
    [
        ("serial", "<u4"),
        ("length", "<u4"),
        ("segments", "<u4"),
        ("command", "<u2"),
        ("version", "<u2"),
        ("sector", "<u8"),
        ("time", "<u8"),
    ]
)


def pieces(requests: int, seed: int = 1) -> Iterator[npt.NDArray[np.void]]:
    """Yield arrays of VSCSI: runs of 1 to 64 requests of 4 to 64 KiB, starts skewed to low sectors."""
    random = np.random.default_rng(seed)
    for first in range(0, requests, PIECE):
        count = min(PIECE, requests - first)
        starts = (random.random(count) ** 3 * DEVICE_BLOCKS).astype(np.uint64)
        run = random.integers(1, 65, count)
        heads = np.zeros(count, bool)
        heads[np.minimum(np.cumsum(run), count - 1)] = heads[0] = True
        place = np.maximum.accumulate(np.where(heads, np.arange(count), 0))
        blocks = random.integers(1, 17, count).astype(np.uint64)[place]
        piece = np.zeros(count, VSCSI)
        piece["serial"] = np.arange(first, first + count)
        piece["length"] = blocks * 4096
        piece["segments"] = blocks
        piece["command"] = np.where(random.random(count)[place] < 0.33, 0x28, 0x2A)
        piece["version"] = 0x100
        piece["sector"] = (
            (starts[place] + (np.arange(count) - place).astype(np.uint64) * blocks) % DEVICE_BLOCKS * 8
        )
        piece["time"] = np.arange(first, first + count) * MICROSECONDS
        yield piece


def alibaba_lines(piece: npt.NDArray[np.void]) -> bytes:
    """Return a piece as lines of device_id, opcode, offset, length, microseconds."""
    letters = np.where(piece["command"] == 0x28, "R", "W").tolist()
    columns = zip(
        letters,
        (piece["sector"] * 512).tolist(),
        piece["length"].tolist(),
        piece["time"].tolist(),
        strict=True,
    )
    return "".join(
        f"0,{letter},{offset},{length},{time}\n" for letter, offset, length, time in columns
    ).encode()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--format", choices=["vscsi", "alibaba"], default="vscsi")
    arguments = parser.parse_args()
    for piece in pieces(arguments.requests):
        sys.stdout.buffer.write(piece.tobytes() if arguments.format == "vscsi" else alibaba_lines(piece))


if __name__ == "__main__":
    main()
