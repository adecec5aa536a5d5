"""What a pool tells about itself: status, usage, reverse mappings."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import metadata as metadata_walks
from .engines import Engine
from .metadata import BlockUsage
from .user_pool import PoolCounters

__all__ = ["REVERSE_MAPPING", "DeviceUsage", "PoolStatus", "device_usage", "pool_status", "reverse_mappings"]

METADATA_BLOCK_SIZE = 4096

REVERSE_MAPPING = np.dtype(
    [("data_begin", "u8"), ("length", "u8"), ("device_id", "u8"), ("thin_begin", "u8")]
)


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """State of an open pool; sizes in bytes, counters since it was opened.

    condemned_devices of its devices are deleted once nobody uses them.
    """

    path: str
    engine: str
    transaction_id: int
    block_size: int
    data_bytes: int
    data_free_bytes: int
    metadata_bytes: int
    metadata_free_bytes: int
    devices: int
    condemned_devices: int
    time: int
    held_root: int
    read_only: bool
    needs_check: bool
    out_of_space: bool
    failed: bool
    direct_io: bool
    counters: PoolCounters


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """Data space of a thin device in bytes; exclusive: of its own alone, shared: of others too."""

    id: int
    name: str
    mapped_bytes: int
    exclusive_bytes: int
    shared_bytes: int


def pool_status(path: str, engine: Engine, condemned_devices: int) -> PoolStatus:
    now = engine.status()
    return PoolStatus(
        path=path,
        engine=engine.name,
        transaction_id=now.transaction_id,
        block_size=now.block_size,
        data_bytes=now.data_blocks * now.block_size,
        data_free_bytes=now.data_blocks_free * now.block_size,
        metadata_bytes=now.metadata_blocks * METADATA_BLOCK_SIZE,
        metadata_free_bytes=now.metadata_blocks_free * METADATA_BLOCK_SIZE,
        devices=now.nr_devices,
        condemned_devices=condemned_devices,
        time=now.time,
        held_root=now.held_root,
        read_only=now.read_only,
        needs_check=now.needs_check,
        out_of_space=now.out_of_space,
        failed=now.failed,
        direct_io=now.direct_io,
        counters=engine.counters(),
    )


def device_usage(found: Iterable[BlockUsage], names: Mapping[int, str], block_size: int) -> list[DeviceUsage]:
    """Return the usage of the devices that have names, by name."""
    usages = [
        DeviceUsage(
            id=one.id,
            name=names[one.id],
            mapped_bytes=one.mapped_blocks * block_size,
            exclusive_bytes=one.exclusive_blocks * block_size,
            shared_bytes=(one.mapped_blocks - one.exclusive_blocks) * block_size,
        )
        for one in found
        if one.id in names
    ]
    return sorted(usages, key=lambda usage: usage.name)


def reverse_mappings(metadata: Path, begin: int, end: int | None, *, held: bool) -> NDArray[np.void]:
    """Return the runs of data blocks from begin to before end by first data block, then device."""
    runs = [np.empty(0, REVERSE_MAPPING)]
    for device in metadata_walks.devices(metadata, held=held):
        mappings = metadata_walks.mappings(metadata, device.id, held=held)
        runs.extend(_runs(mappings, device.id, begin, end))
    found = np.concatenate(runs)
    return found[np.lexsort((found["thin_begin"], found["device_id"], found["data_begin"]))]


def _runs(
    mappings: Iterable[NDArray[np.void]], device_id: int, begin: int, end: int | None
) -> Iterator[NDArray[np.void]]:
    for some in _whole_runs(mappings):
        inside = some["data_block"] >= begin
        if end is not None:
            inside &= some["data_block"] < end
        chosen = some[inside]
        if len(chosen):
            yield _joined(device_id, chosen["thin_block"], chosen["data_block"])


def _whole_runs(mappings: Iterable[NDArray[np.void]]) -> Iterator[NDArray[np.void]]:
    """Yield mappings in arrays that no run of consecutive blocks crosses."""
    rest: NDArray[np.void] | None = None
    for some in mappings:
        joined = some if rest is None else np.concatenate([rest, some])
        breaks = np.flatnonzero(_breaks(joined["thin_block"], joined["data_block"]))
        last = int(breaks[-1]) + 1 if len(breaks) else 0
        if last:
            yield joined[:last]
        rest = joined[last:]
    if rest is not None:
        yield rest


def _breaks(thin: NDArray[np.uint64], data: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each pair of neighbours whether the second does not continue the first."""
    one = np.uint64(1)
    return np.asarray((thin[1:] != thin[:-1] + one) | (data[1:] != data[:-1] + one), np.bool_)


def _joined(device_id: int, thin: NDArray[np.uint64], data: NDArray[np.uint64]) -> NDArray[np.void]:
    first = np.concatenate([[0], np.flatnonzero(_breaks(thin, data)) + 1])
    runs = np.empty(len(first), REVERSE_MAPPING)
    runs["data_begin"] = data[first]
    runs["thin_begin"] = thin[first]
    runs["length"] = np.diff(np.append(first, len(thin)))
    runs["device_id"] = device_id
    return runs
