"""How long operations waited: samples of a run, and the figures that are made of them."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["QUANTILES", "Latency", "Samples", "Steady", "latency_of"]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds that operations waited, in the order in which they began.

    With counts it is a histogram: `counts[i]` operations waited about `seconds[i]`, in no known order.
    """

    seconds: tuple[float, ...]
    counts: tuple[int, ...] | None = None

    @property
    def operations(self) -> int:
        return len(self.seconds) if self.counts is None else sum(self.counts)

    @property
    def first(self) -> float | None:
        return self.seconds[0] if self.counts is None and self.seconds else None

    def weighted(self, *, without_first: bool = False) -> Iterable[tuple[float, int]]:
        """Return pairs of seconds and how many waited that long."""
        seconds = self.seconds[1:] if without_first and self.counts is None else self.seconds
        return zip(seconds, self.counts or (1,) * len(seconds), strict=True)


@dataclass(frozen=True, slots=True)
class Steady:
    """Seconds of the operations after the first of each epoch; of a histogram, of all."""

    p50: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds an operation waited; p50, p99, max and quantiles are over all operations.

    `first` is the first one, which pays for a copy-up; None where no order is known.
    """

    first: float | None
    p50: float
    p99: float
    max: float
    steady: Steady | None = None
    quantiles: Mapping[str, float] = field(default_factory=dict)


def latency_of(epochs: Sequence[Samples]) -> Latency | None:
    """Return the nearest-rank percentiles over one or more epochs, None without operations."""
    everything = _ordered(pair for samples in epochs for pair in samples.weighted())
    if not everything:
        return None
    later = _ordered(pair for samples in epochs for pair in samples.weighted(without_first=True))
    return Latency(
        first=epochs[0].first,
        p50=_rank(everything, 0.50),
        p99=_rank(everything, 0.99),
        max=everything[-1][0],
        steady=Steady(_rank(later, 0.50), _rank(later, 0.99), later[-1][0]) if later else None,
        quantiles={f"p{100 * share:g}": _rank(everything, share) for share in QUANTILES},
    )


def _ordered(pairs: Iterable[tuple[float, int]]) -> list[tuple[float, int]]:
    """Return ascending seconds, each with how many waited at most that long."""
    ordered, total = [], 0
    for seconds, count in sorted(pair for pair in pairs if pair[1]):
        total += count
        ordered.append((seconds, total))
    return ordered


def _rank(ordered: Sequence[tuple[float, int]], share: float) -> float:
    wanted = max(1, math.ceil(share * ordered[-1][1]))
    return ordered[bisect_left(ordered, wanted, key=lambda pair: pair[1])][0]
