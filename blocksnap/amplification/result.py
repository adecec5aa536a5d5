"""What a comparison yields: one Measurement a row, and the JSON of the public contract.

A figure that a driver cannot give is None (null in JSON), never 0 and never left out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..units import format_size
from .phases import BASE, Figures, Phase

__all__ = [
    "BASELINE",
    "BASELINES",
    "DEFAULT_BLOCK_SIZES",
    "DEFAULT_DRIVERS",
    "PARTS",
    "Comparison",
    "Measurement",
    "Skipped",
    "Spread",
    "Target",
]

BASELINE = "volume"
BASELINES = (BASELINE, f"{BASELINE}@xfs", f"{BASELINE}@btrfs")
"""Without any copy-on-write, on each file system that a driver is measured on."""
DEFAULT_DRIVERS = ("thin", "overlay", "unionfs", "btrfs", "vfs", "xfs-reflink", "qcow2", *BASELINES)
DEFAULT_BLOCK_SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)

PARTS: dict[str, str] = {
    "data": "written by the file system of the container",
    "copied": "written again only because a shared block was broken",
    "zero_filled": "zeros around a write that covers a new block in part",
    "pool_metadata": "metadata blocks and superblocks of the pool",
    "outside": "backing file system: journal and metadata of the ext4 below the pool",
}


@dataclass(frozen=True, slots=True)
class Target:
    """One column of the comparison: a driver, and for `thin` a block size in bytes."""

    driver: str
    block_size: int | None = None

    @property
    def is_baseline(self) -> bool:
        return self.driver.partition("@")[0] == BASELINE

    @property
    def label(self) -> str:
        return self.driver if self.block_size is None else f"{self.driver} {format_size(self.block_size)}"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A driver that this machine cannot run, and why."""

    driver: str
    reason: str


@dataclass(frozen=True, slots=True)
class Spread:
    """The least, the middle and the greatest value of a figure over the runs."""

    min: float
    median: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement(Figures):
    """The figures of one target, summed over all epochs.

    write_amplification = backing_bytes / application_bytes; where there is no loop device to count (not
    root), the bytes that the pool counted itself stand in, and write_amplification_source says so.
    space_amplification = allocated_bytes / changed_bytes. changed_bytes_source: "workload" knows it, or
    "application_bytes" stands in (too high when the same place is written twice). Of several runs the bytes
    are those of the one with the median write amplification, so that they add up; seconds are medians.
    """

    target: Target
    engine: str | None = None
    changed_bytes: int | None = None
    changed_bytes_source: str | None = None
    write_amplification_source: str | None = None
    phases: tuple[Phase, ...] = ()
    runs: tuple["Measurement", ...] = ()
    """Each run, when there were several."""
    spread: Mapping[str, Spread] | None = None
    error: str | None = None

    @property
    def label(self) -> str:
        return self.target.label

    @property
    def epochs(self) -> tuple[Phase, ...]:
        """The phases in which the workload ran."""
        return tuple(phase for phase in self.phases if phase.name != BASE)

    @property
    def space_amplification(self) -> float | None:
        return _ratio(self.allocated_bytes, self.changed_bytes)

    def figures(self) -> dict[str, float | int | None]:
        """Return the numbers that differ from run to run, flat."""
        latency = self.latency
        return {name: getattr(self, name) for name in _FIGURES} | {
            f"latency_{name}": getattr(latency, name) if latency else None for name in _WAITS
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the row of the JSON result: contract fields first, additions behind them."""
        return {
            "driver": self.target.driver,
            "engine": self.engine,
            "block_size": self.target.block_size,
            "application_bytes": self.application_bytes,
            "filesystem_bytes": self.filesystem_bytes,
            "backing_bytes": self.backing_bytes,
            "copy_bytes": self.copy_bytes,
            "metadata_bytes": self.metadata_bytes,
            "allocated_bytes": self.allocated_bytes,
            "write_amplification": self.write_amplification,
            "space_amplification": self.space_amplification,
            "seconds": self.seconds,
            "operations": self.operations,
            "latency": dataclasses.asdict(self.latency) if self.latency else None,
            "create_seconds": self.create_seconds,
            "sync_seconds": self.sync_seconds,
            "changed_bytes": self.changed_bytes,
            "changed_bytes_source": self.changed_bytes_source,
            "allocated_bytes_source": self.allocated_bytes_source,
            "write_amplification_source": self.write_amplification_source,
            "parts": dict(self.parts) if self.parts is not None else None,
            "phases": [phase.as_dict() for phase in self.phases],
            "spread": _plain_spread(self.spread),
            "runs": [run.figures() for run in self.runs],
            "error": self.error,
        }


_FIGURES = (
    "application_bytes",
    "changed_bytes",
    "backing_bytes",
    "copy_bytes",
    "metadata_bytes",
    "allocated_bytes",
    "write_amplification",
    "space_amplification",
    "create_seconds",
    "seconds",
    "sync_seconds",
)
_WAITS = ("first", "p50", "p99", "max")


def _plain_spread(spread: Mapping[str, Spread] | None) -> dict[str, object] | None:
    return None if spread is None else {name: dataclasses.asdict(value) for name, value in spread.items()}


def _ratio(numerator: int | None, denominator: int | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows of one workload, what ran them, what was left out, where backing files were kept."""

    machine: Mapping[str, object]
    workload: Mapping[str, object]
    results: Sequence[Measurement]
    skipped: Sequence[Skipped] = ()
    seconds: float = 0.0
    kept: str | None = None
    repeats: int = 1
    snapshots: int = 0
    when: str | None = None
    """Local time with its zone, to the minute."""

    @property
    def name(self) -> str:
        """The name of the workload."""
        return str(self.workload["name"])

    @property
    def measured(self) -> list[Measurement]:
        """The rows that have a write amplification."""
        return [row for row in self.results if row.write_amplification is not None]

    def as_dict(self) -> dict[str, object]:
        """Return the JSON result of `blocksnap compare --json`."""
        return {
            "machine": dict(self.machine),
            "workload": dict(self.workload),
            "results": [row.as_dict() for row in self.results],
            "skipped": [dataclasses.asdict(skipped) for skipped in self.skipped],
            "parts": PARTS,
            "repeats": self.repeats,
            "snapshots": self.snapshots,
            "seconds": self.seconds,
            "when": self.when,
            "kept": self.kept,
        }
