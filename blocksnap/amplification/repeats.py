"""Several runs of one target as one row: whose bytes, which seconds, and how far the runs lie apart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from .latency import Latency, Steady
from .result import Measurement, Spread

__all__ = ["combined"]


def combined(runs: Sequence[Measurement]) -> Measurement:
    """Return the row of one or more runs of a target; the first error of a run is the row's."""
    for number, run in enumerate(runs, 1):
        if run.error is not None:
            which = f"run {number}: " if len(runs) > 1 or number > 1 else ""
            return Measurement(target=run.target, error=which + run.error)
    if len(runs) == 1:
        return runs[0]
    middle = _median_run(runs)
    return replace(
        middle,
        create_seconds=_median([run.create_seconds for run in runs]),
        seconds=_median([run.seconds for run in runs]),
        sync_seconds=_median([run.sync_seconds for run in runs]),
        latency=_median_latency([run.latency for run in runs if run.latency is not None]),
        runs=tuple(runs),
        spread=_spread(runs),
    )


def _median_run(runs: Sequence[Measurement]) -> Measurement:
    """Return the run in the middle by write amplification, or by time where there is none."""

    def order(run: Measurement) -> tuple[float, float]:
        return run.write_amplification or 0.0, run.seconds or 0.0

    return sorted(runs, key=order)[(len(runs) - 1) // 2]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _median_latency(latencies: Sequence[Latency]) -> Latency | None:
    if not latencies:
        return None
    steady = [latency.steady for latency in latencies if latency.steady is not None]
    return Latency(
        first=_median([latency.first for latency in latencies]),
        p50=median(latency.p50 for latency in latencies),
        p99=median(latency.p99 for latency in latencies),
        max=median(latency.max for latency in latencies),
        steady=_median_steady(steady) if steady else None,
        quantiles={
            name: median(latency.quantiles[name] for latency in latencies) for name in latencies[0].quantiles
        },
    )


def _median_steady(steady: Sequence[Steady]) -> Steady:
    def over(figure: Callable[[Steady], float]) -> float:
        return median(map(figure, steady))

    return Steady(over(lambda s: s.p50), over(lambda s: s.p99), over(lambda s: s.max))


def _spread(runs: Sequence[Measurement]) -> Mapping[str, Spread]:
    tables = [run.figures() for run in runs]
    spreads = {}
    for name in tables[0]:
        values = [value for table in tables if (value := table[name]) is not None]
        if values:
            spreads[name] = Spread(min(values), median(values), max(values))
    return spreads
