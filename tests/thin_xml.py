"""Generate pools with a plausible history of snapshots: XML for thin_restore, arrays for thin_image."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

__all__ = ["U64", "Device", "Pool", "history", "mapping_runs", "restore", "to_xml"]


@dataclass(slots=True)
class Device:
    """One thin device: parallel arrays, ascending by thin block."""

    id: int
    transaction_id: int
    creation_time: int
    snapshotted_time: int
    thin_blocks: U64
    data_blocks: U64
    times: U64

    def copy(self, device_id: int, transaction_id: int, time: int) -> "Device":
        """Return a snapshot of the device."""
        arrays = (self.thin_blocks.copy(), self.data_blocks.copy(), self.times.copy())
        return Device(device_id, transaction_id, time, time, *arrays)


@dataclass(slots=True)
class Pool:
    """Devices by ascending id; `origin_blocks` are the first device's thin blocks before any snapshot."""

    devices: list[Device]
    data_block_size: int
    nr_data_blocks: int
    time: int
    transaction_id: int
    origin_blocks: U64


def _first_device(rng: np.random.Generator, mappings: int, longest_run: int, gaps: float) -> Device:
    """Return a device of runs of up to longest_run blocks, scattered over the data, with holes between."""
    lengths = rng.integers(1, longest_run + 1, mappings)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), mappings)) + 1]
    lengths[-1:] -= lengths.sum() - mappings
    lengths = lengths[lengths > 0]
    holes = np.where(rng.random(len(lengths)) < gaps, rng.integers(1, 100, len(lengths)), 0)
    thin_begins = np.cumsum(lengths + holes) - lengths
    order = rng.permutation(len(lengths))
    data_begins = np.empty(len(lengths), dtype=np.int64)
    data_begins[order] = np.cumsum(lengths[order]) - lengths[order]
    within = np.arange(mappings) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    thin = (np.repeat(thin_begins, lengths) + within).astype(np.uint64)
    data = (np.repeat(data_begins, lengths) + within).astype(np.uint64)
    return Device(0, 0, 0, 0, thin, data, np.zeros(mappings, dtype=np.uint64))


def _overwrite(rng: np.random.Generator, device: Device, share: float, next_block: int, time: int) -> int:
    """Give a share of the mappings, in short stretches, new data blocks; return the next free data block."""
    count = len(device.thin_blocks)
    starts = rng.integers(0, max(count, 1), max(1, int(count * share / 8)))
    places = (
        np.unique(np.minimum(np.add.outer(starts, np.arange(8)).ravel(), count - 1)) if count else starts[:0]
    )
    device.data_blocks[places] = np.arange(next_block, next_block + len(places), dtype=np.uint64)
    device.times[places] = time
    return next_block + len(places)


def history(
    seed: int,
    *,
    snapshots: int,
    mappings: int,
    longest_run: int = 32,
    gaps: float = 0.1,
    change: float = 0.02,
    first_id: int = 1,
    spare_blocks: int = 1000,
) -> Pool:
    """Return a pool with one device of `mappings` blocks and snapshots of random earlier devices.

    After each snapshot a share `change` of the origin's and of the snapshot's blocks is overwritten.
    """
    rng = np.random.default_rng(seed)
    origin = _first_device(rng, mappings, longest_run, gaps)
    origin.id = first_id
    devices, next_block = [origin], mappings
    for time in range(1, snapshots + 1):
        source = devices[int(rng.integers(0, len(devices)))]
        source.snapshotted_time = time
        devices.append(source.copy(first_id + time, time, time))
        for device in (source, devices[-1]):
            next_block = _overwrite(rng, device, change, next_block, time)
    first = origin.thin_blocks.copy()
    return Pool(devices, 128, next_block + spare_blocks, snapshots, snapshots, first)


def mapping_runs(device: Device) -> Iterator[tuple[int, int, int, int]]:
    """Yield (thin begin, data begin, length, time) of each maximal run."""
    thin, data, times = (a.astype(np.int64) for a in (device.thin_blocks, device.data_blocks, device.times))
    if len(thin) == 0:
        return
    breaks = (np.diff(thin) != 1) | (np.diff(data) != 1) | (np.diff(times) != 0)
    begins = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    lengths = np.diff(np.concatenate((begins, [len(thin)])))
    yield from zip(
        thin[begins].tolist(), data[begins].tolist(), lengths.tolist(), times[begins].tolist(), strict=True
    )


def _device_lines(device: Device) -> Iterator[str]:
    yield (
        f'  <device dev_id="{device.id}" mapped_blocks="{len(device.thin_blocks)}"'
        f' transaction="{device.transaction_id}" creation_time="{device.creation_time}"'
        f' snap_time="{device.snapshotted_time}">'
    )
    for thin, data, length, time in mapping_runs(device):
        if length == 1:
            yield f'    <single_mapping origin_block="{thin}" data_block="{data}" time="{time}"/>'
        else:
            place = f'origin_begin="{thin}" data_begin="{data}"'
            yield f'    <range_mapping {place} length="{length}" time="{time}"/>'
    yield "  </device>"


def to_xml(pool: Pool) -> str:
    """Return the pool as thin_dump prints it."""
    lines = [
        f'<superblock uuid="" time="{pool.time}" transaction="{pool.transaction_id}" flags="0" version="2"'
        f' data_block_size="{pool.data_block_size}" nr_data_blocks="{pool.nr_data_blocks}">'
    ]
    for device in pool.devices:
        lines.extend(_device_lines(device))
    lines.append("</superblock>\n")
    return "\n".join(lines)


def restore(xml: str, directory: Path, *, metadata_bytes: int = 4 << 20) -> Path:
    """Return a metadata file that thin_restore made from XML."""
    source, image = directory / "pool.xml", directory / "metadata"
    source.write_text(xml)
    with image.open("wb") as file:
        file.truncate(metadata_bytes)
    subprocess.run(["thin_restore", "-i", source, "-o", image], check=True, capture_output=True)
    return image
