"""The epochs of an analysed trace in bytes: what each copied, wrote as metadata, took and holds alone."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from .model import METADATA_BLOCK

__all__ = ["EPOCH_BYTES", "bytes_of_epochs", "epoch_rows", "epoch_summaries", "median_and_most"]

Records = Mapping[int, NDArray[np.void]]
"""Arrays of model.EPOCH by block size."""

EPOCH_BYTES = ("copy_bytes", "metadata_bytes", "space_bytes", "exclusive_bytes")
"""exclusive: what the deletion of the snapshot at the end of the epoch would free."""

Figures = NDArray[np.uint64]


def bytes_of_epochs(records: NDArray[np.void], block_size: int) -> dict[str, Figures]:
    """Return the figures of EPOCH_BYTES, one of each an epoch, of exclusive_bytes one a snapshot.

    What the devices alone hold in the running epoch, the last one, is no snapshot's.
    """
    figures = _all_bytes(records, block_size)
    figures["exclusive_bytes"] = figures["exclusive_bytes"][:-1]
    return figures


def _all_bytes(records: NDArray[np.void], block_size: int) -> dict[str, Figures]:
    size = np.uint64(block_size)
    return {
        "copy_bytes": records["blocks_copied"] * size,
        "metadata_bytes": records["metadata_blocks"] * np.uint64(METADATA_BLOCK),
        "space_bytes": (records["blocks_allocated"] - records["blocks_freed"]) * size,
        "exclusive_bytes": records["blocks_exclusive"] * size,
    }


def median_and_most(values: Figures) -> tuple[int, int]:
    """Return zeros if there are no values."""
    return (int(np.median(values)), int(values.max())) if len(values) else (0, 0)


def epoch_rows(epochs: Records, epochs_a_record: int) -> Iterator[dict[str, int]]:
    """Yield a row for each record: counts of blocks, then bytes."""
    for size, records in epochs.items():
        figures = {name: values.tolist() for name, values in _all_bytes(records, size).items()}
        for number, counts in enumerate(records.tolist()):
            yield {
                "block_size": size,
                "epoch": number * epochs_a_record,
                **dict(zip(records.dtype.names or (), counts, strict=True)),
                **{name: values[number] for name, values in figures.items()},
            }


def epoch_summaries(epochs: Records) -> list[dict[str, object]]:
    """Return, by block size, the median and the most that a record has of each figure."""
    return [
        {
            "block_size": size,
            "records": len(records),
            **{
                name: dict(zip(("median", "max"), median_and_most(values), strict=True))
                for name, values in bytes_of_epochs(records, size).items()
            },
        }
        for size, records in epochs.items()
    ]
