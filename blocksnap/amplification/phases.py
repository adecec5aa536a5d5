"""The phases of a run: the base image is written, the workload runs, and runs again after each snapshot.

The figures of a phase are differences of counters that are read when the device is quiet. An epoch begins
before its layer is created, because that is where a driver that copies whole trees pays; the layer of the
next epoch has the one before as its parent, so that a driver must copy again what it shares again.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..drivers import Accounting
from .latency import Latency, Samples, latency_of
from .workload import Outcome

if TYPE_CHECKING:
    from .testbed import Testbed

__all__ = [
    "BASE",
    "Counters",
    "Figures",
    "Phase",
    "epoch_name",
    "epoch_of",
    "latency_over",
    "sum_of",
    "summed_parts",
]

BASE = "base image"


def epoch_name(snapshots: int) -> str:
    """Return the name of the epoch after that many snapshots."""
    return f"after snapshot {snapshots}" if snapshots else "first epoch"


@dataclass(frozen=True, slots=True)
class Counters:
    """What a testbed's device and file system count; None where it has no device of its own."""

    backing: int | None
    used: int | None

    @classmethod
    def of(cls, bed: "Testbed") -> "Counters":
        bed.settle()
        return cls(bed.written_bytes(), bed.used_bytes())

    def since(self, before: "Counters") -> "Counters":
        return Counters(_difference(before.backing, self.backing), _difference(before.used, self.used))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was counted and timed, bytes and seconds; None where a driver cannot give one."""

    application_bytes: int | None = None
    filesystem_bytes: int | None = None
    backing_bytes: int | None = None
    copy_bytes: int | None = None
    metadata_bytes: int | None = None
    allocated_bytes: int | None = None
    allocated_bytes_source: str | None = None
    parts: Mapping[str, int] | None = None
    create_seconds: float | None = None
    seconds: float | None = None
    sync_seconds: float | None = None
    operations: int | None = None
    latency: Latency | None = None

    @property
    def written_bytes(self) -> int | None:
        """Bytes that reached the backing device: its own counter, else what the pool counted."""
        if self.backing_bytes is not None or self.parts is None:
            return self.backing_bytes
        return sum(self.parts.values())

    @property
    def write_amplification(self) -> float | None:
        written = self.written_bytes
        return None if written is None or not self.application_bytes else written / self.application_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase(Figures):
    """The figures of one phase. Of the base image nobody but the device's counter tells anything."""

    name: str
    samples: Samples | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the object of a phase in the JSON result; single samples are in files of their own."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del own["samples"], own["name"]
        latency = dataclasses.asdict(self.latency) if self.latency else None
        parts = dict(self.parts) if self.parts is not None else None
        figures = {"write_amplification": self.write_amplification, "latency": latency, "parts": parts}
        return {"phase": self.name, **own, **figures}


def epoch_of(snapshots: int, outcome: Outcome, accounting: Accounting, counted: Counters) -> Phase:
    """Return the figures of an epoch from what the application, the driver and the device counted."""
    by_driver = accounting.allocated_bytes is not None
    return Phase(
        name=epoch_name(snapshots),
        application_bytes=outcome.application_bytes,
        filesystem_bytes=accounting.filesystem_bytes,
        backing_bytes=counted.backing,
        copy_bytes=accounting.copy_bytes,
        metadata_bytes=accounting.metadata_bytes,
        allocated_bytes=accounting.allocated_bytes if by_driver else counted.used,
        allocated_bytes_source="driver" if by_driver else None if counted.used is None else "statvfs",
        parts=_parts(accounting, counted.backing),
        seconds=outcome.seconds,
        operations=outcome.operations,
        samples=outcome.samples,
        latency=latency_of([outcome.samples] if outcome.samples else []),
    )


def _parts(accounting: Accounting, backing: int | None) -> dict[str, int] | None:
    """Split what reached the backing device; `outside` is what nobody above the device's own counter has
    counted. None for a driver that does not count all parts.
    """
    counted = {
        "data": accounting.data_bytes,
        "copied": accounting.copy_bytes,
        "zero_filled": accounting.zero_filled_bytes,
        "pool_metadata": accounting.metadata_bytes,
    }
    known = {name: value for name, value in counted.items() if value is not None}
    if len(known) < len(counted):
        return None
    if backing is not None:
        known["outside"] = backing - sum(known.values())
    return known


def summed_parts(phases: Sequence[Phase]) -> dict[str, int] | None:
    split = [phase.parts for phase in phases if phase.parts is not None]
    if len(split) < len(phases) or not split:
        return None
    return {name: sum(parts[name] for parts in split) for name in split[0]}


def sum_of(values: Iterable[Any]) -> Any:
    """Return the sum of ints or floats, None if one is unknown or there are none."""
    known = list(values)
    return None if not known or None in known else sum(known)


def latency_over(phases: Sequence[Phase]) -> Latency | None:
    return latency_of([phase.samples for phase in phases if phase.samples is not None])


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before
