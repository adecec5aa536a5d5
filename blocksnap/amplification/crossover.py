"""Where block-level copy-on-write writes less than file-level: a sweep, modelled and in part measured.

A cell is a file of an image, a share of it that is overwritten at random places by writes of one size with a
sync after every few, and a block size. In bytes that reach the disk:

    file-level     N + W + F        N: the file is copied once; W: what is written
    block-level    C + W + M + F    C: copies of shared blocks, about B (k - Kf) for k blocks touched, Kf of
                                    them wholly by one request; M: the pool's metadata; both from model.py

F is what the file systems write of their own, journal and inodes, and what that makes a pool copy. It is not
modelled: it is fitted to the measured points as a constant and so much for each sync, and is told. A measured
point is held against a fit of the others.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..traces.request import FLUSH, REQUEST, WRITE, Requests
from .base_image import BaseImage
from .machine import describe_machine
from .measure import compare
from .model import CowModel
from .operations import scattered_offsets
from .result import Comparison, Target
from .targets import targets_for
from .workload import SEED, OperationWorkload

__all__ = [
    "BLOCK_LEVEL",
    "FILE_LEVEL",
    "Cell",
    "Crossover",
    "Overhead",
    "Point",
    "Sweep",
    "Work",
    "fitted",
    "make_crossover",
    "model_cells",
]

FILE_LEVEL = "overlay"
BLOCK_LEVEL = "thin"

_KIB, _MIB = 1 << 10, 1 << 20
_DEVICE_BYTES = 2048 * _MIB  # the least that a testbed's thin device has

Progress = Callable[[Target, str], None]


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is varied. Sizes in bytes, powers of two; fractions are of the file's bytes."""

    file_sizes: Sequence[int] = tuple(4 * _KIB << level for level in range(19))
    fractions: Sequence[float] = tuple(10 ** (-level / 4) for level in range(16, -1, -1))
    write_sizes: Sequence[int] = (4 * _KIB, 64 * _KIB)
    block_sizes: Sequence[int] = (16 * _KIB, 64 * _KIB, 256 * _KIB, 1 * _MIB)
    measured_file_sizes: Sequence[int] = (64 * _KIB, 1 * _MIB, 16 * _MIB)
    measured_fractions: Sequence[float] = (0.001, 0.1, 1.0)
    sync_every: int = 32
    seed: int = SEED

    def works(self) -> Iterator["Work"]:
        """Yield what is modelled, without the block sizes: the model takes all at once."""
        for write, size, fraction in product(self.write_sizes, self.file_sizes, self.fractions):
            if write <= size:
                yield Work(size, fraction, write, self.sync_every, self.seed)

    def measured_works(self) -> Iterator["Work"]:
        """Yield the chosen subset that is measured; of fractions below one write, one is enough."""
        seen = set()
        for write, size in product(self.write_sizes, self.measured_file_sizes):
            for fraction in self.measured_fractions:
                work = Work(size, fraction, write, self.sync_every, self.seed)
                if write <= size and (key := (write, size, work.writes)) not in seen:
                    seen.add(key)
                    yield work


@dataclass(frozen=True, slots=True)
class Work:
    """One file and what is written to it."""

    file_size: int
    fraction: float
    write_size: int
    sync_every: int
    seed: int

    @property
    def writes(self) -> int:
        return min(max(1, round(self.fraction * self.file_size / self.write_size)), self.slots)

    @property
    def slots(self) -> int:
        return self.file_size // self.write_size

    @property
    def written_bytes(self) -> int:
        return self.writes * self.write_size

    @property
    def syncs(self) -> int:
        return -(-self.writes // self.sync_every)

    def requests(self) -> Requests:
        """Return what reaches the block device: each sync writes what is pending in order of the places,
        neighbours as one request.
        """
        offsets = np.array(scattered_offsets(self.file_size, self.writes, self.write_size, self.seed), "u8")
        pieces = [
            _batch(np.sort(offsets[begin : begin + self.sync_every]), self.write_size)
            for begin in range(0, len(offsets), self.sync_every)
        ]
        return np.concatenate(pieces)

    def workload(self) -> OperationWorkload:
        """Return the same as a workload to be measured."""
        parameters: dict[str, int | str] = {
            "writes": self.writes,
            "write_bytes": self.write_size,
            "sync_every": self.sync_every,
            "seed": self.seed,
        }
        base = BaseImage(database_bytes=0, large_file_bytes=self.file_size, small_files=10)
        return OperationWorkload("scatter", "a cell of the sweep", parameters, base, operation="scatter")


def _batch(offsets: Any, length: int) -> Requests:
    """Return the requests of ascending writes, neighbours merged, and a flush."""
    first = np.concatenate(([True], np.diff(offsets) != length))
    begins = np.flatnonzero(first)
    batch = np.zeros(len(begins) + 1, REQUEST)
    batch["offset"][:-1] = offsets[begins]
    batch["length"][:-1] = np.diff(np.append(begins, len(offsets))) * length
    batch["kind"][:-1] = WRITE
    batch["kind"][-1] = FLUSH
    return batch


@dataclass(frozen=True, slots=True)
class Overhead:
    """What file systems write of their own: so many bytes, and so many more for each sync."""

    bytes: float = 0.0
    bytes_a_sync: float = 0.0

    def of(self, work: Work) -> float:
        return self.bytes + self.bytes_a_sync * work.syncs


@dataclass(frozen=True, slots=True)
class Cell:
    """The modelled cost of one work at one block size, bytes to the disk."""

    work: Work
    block_size: int
    copy_bytes: int
    metadata_bytes: int
    file_overhead: float = 0.0
    block_overhead: float = 0.0

    @property
    def file_level_bytes(self) -> float:
        return self.work.file_size + self.work.written_bytes + self.file_overhead

    @property
    def block_level_bytes(self) -> float:
        return self.copy_bytes + self.work.written_bytes + self.metadata_bytes + self.block_overhead

    @property
    def ratio(self) -> float:
        """Block-level cost over file-level cost: below 1 block-level copy-on-write writes less."""
        return self.block_level_bytes / self.file_level_bytes

    def as_dict(self) -> dict[str, Any]:
        return {
            "file_size": self.work.file_size,
            "fraction": self.work.fraction,
            "write_size": self.work.write_size,
            "block_size": self.block_size,
            "writes": self.work.writes,
            "syncs": self.work.syncs,
            "written_bytes": self.work.written_bytes,
            "copy_bytes": self.copy_bytes,
            "metadata_bytes": self.metadata_bytes,
            "file_level_bytes": self.file_level_bytes,
            "block_level_bytes": self.block_level_bytes,
            "ratio": self.ratio,
        }


@dataclass(frozen=True, slots=True)
class Point:
    """A cell that was measured: what the devices counted, and what the pool copied."""

    cell: Cell
    file_level_bytes: int
    block_level_bytes: int
    file_copy_bytes: int | None
    copy_bytes: int | None

    @property
    def ratio(self) -> float:
        return self.block_level_bytes / self.file_level_bytes

    @property
    def deviation(self) -> float:
        """How far the measured ratio lies from the model's, as a share of the model's."""
        return self.ratio / self.cell.ratio - 1

    def as_dict(self) -> dict[str, Any]:
        return self.cell.as_dict() | {
            "measured_file_level_bytes": self.file_level_bytes,
            "measured_block_level_bytes": self.block_level_bytes,
            "measured_file_copy_bytes": self.file_copy_bytes,
            "measured_copy_bytes": self.copy_bytes,
            "measured_ratio": self.ratio,
            "deviation": self.deviation,
        }


@dataclass(frozen=True, slots=True)
class Crossover:
    """The whole map."""

    sweep: Sweep
    cells: Sequence[Cell]
    points: Sequence[Point] = ()
    overheads: Mapping[str, Overhead] = field(default_factory=dict)
    """By label: overlay, thin 64K, ..."""
    machine: Mapping[str, object] = field(default_factory=dict)
    failures: Sequence[str] = ()
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": dict(self.machine),
            "sweep": asdict(self.sweep),
            "overheads": {label: asdict(overhead) for label, overhead in self.overheads.items()},
            "points": [point.as_dict() for point in self.points],
            "cells": [cell.as_dict() for cell in self.cells],
            "failures": list(self.failures),
            "seconds": self.seconds,
        }


def model_cells(works: Iterable[Work], block_sizes: Sequence[int]) -> Iterator[Cell]:
    """Yield the cells of every work at all block sizes, without what file systems write of their own."""
    for work in works:
        with CowModel(block_sizes, device_size=max(work.file_size, _DEVICE_BYTES)) as model:
            model.feed(work.requests())
            for result in model.results():
                yield Cell(work, result.block_size, result.copied_bytes, result.metadata_bytes)


def make_crossover(
    sweep: Sweep,
    *,
    measuring: bool,
    work_dir: Path,
    progress: Progress = lambda target, phase: None,  # noqa: ARG005
) -> Crossover:
    """Measure the chosen subset, if asked to, and model the whole sweep."""
    start = time.monotonic()
    works = list(sweep.measured_works()) if measuring else []
    made = [compare(work.workload(), _targets(sweep), work_dir=work_dir, progress=progress) for work in works]
    failures = sorted({sentence for comparison in made for sentence in _failures(comparison)})
    points = [point for pair in zip(works, made, strict=True) for point in _points(*pair, sweep)]
    overheads = fitted(points)
    cells = [_with(overheads, cell) for cell in model_cells(sweep.works(), sweep.block_sizes)]
    return Crossover(
        sweep,
        cells,
        [replace(point, cell=_with(fitted(_others(points, point)), point.cell)) for point in points],
        overheads,
        describe_machine(work_dir),
        failures,
        time.monotonic() - start,
    )


def _others(points: Sequence[Point], point: Point) -> list[Point]:
    """Return the points of other works: no point is judged by a fit that knew it."""
    return [other for other in points if other.cell.work != point.cell.work]


def _targets(sweep: Sweep) -> list[Target]:
    return targets_for([FILE_LEVEL, BLOCK_LEVEL], sweep.block_sizes)


def _failures(comparison: Comparison) -> Iterator[str]:
    yield from (f"{row.label} failed: {row.error}" for row in comparison.results if row.error)
    yield from (f"{left.driver} skipped: {left.reason}" for left in comparison.skipped)


def _points(work: Work, comparison: Comparison, sweep: Sweep) -> Iterator[Point]:
    rows = {row.target: row for row in comparison.results if row.backing_bytes is not None}
    overlay = rows.get(Target(FILE_LEVEL))
    for cell in model_cells([work], sweep.block_sizes):
        thin = rows.get(Target(BLOCK_LEVEL, cell.block_size))
        if overlay is not None and thin is not None:
            assert overlay.backing_bytes is not None
            assert thin.backing_bytes is not None
            yield Point(cell, overlay.backing_bytes, thin.backing_bytes, overlay.copy_bytes, thin.copy_bytes)


def fitted(points: Sequence[Point]) -> dict[str, Overhead]:
    """Return what the measured points have beyond the model, for overlay and for each block size of thin.

    Least squares of the relative deviation; nothing is below 0.
    """
    if not points:
        return {}
    one_size = [point for point in points if point.cell.block_size == points[0].cell.block_size]
    found = {
        FILE_LEVEL: _fit([(p.cell.work.syncs, p.file_level_bytes, p.cell.file_level_bytes) for p in one_size])
    }
    for size in dict.fromkeys(point.cell.block_size for point in points):
        of_size = [point for point in points if point.cell.block_size == size]
        found[Target(BLOCK_LEVEL, size).label] = _fit(
            [(p.cell.work.syncs, p.block_level_bytes, p.cell.block_level_bytes) for p in of_size]
        )
    return found


def _fit(samples: Sequence[tuple[int, float, float]]) -> Overhead:
    """Fit measured = modelled + constant + slope * syncs over (syncs, measured, modelled)."""
    syncs, measured, modelled = (np.array(column, float) for column in zip(*samples, strict=True))
    rest, weight = measured - modelled, 1 / measured
    columns = np.stack([np.ones_like(syncs), syncs], axis=1)
    if len(set(syncs)) > 1:
        (constant, slope), *_ = np.linalg.lstsq(columns * weight[:, None], rest * weight, rcond=None)
        if constant >= 0 and slope >= 0:
            return Overhead(float(constant), float(slope))
    return Overhead(max(0.0, float(np.average(rest, weights=weight**2))), 0.0)


def _with(overheads: Mapping[str, Overhead], cell: Cell) -> Cell:
    block = overheads.get(Target(BLOCK_LEVEL, cell.block_size).label, Overhead())
    file = overheads.get(FILE_LEVEL, Overhead())
    return replace(cell, file_overhead=file.of(cell.work), block_overhead=block.of(cell.work))
