"""A study: the comparisons of one or more workloads, as one JSON result and read back from it.

With one workload the object is that of the public contract. With several, "workload" is the first of
"workloads" and every row names its own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .latency import Latency, Steady
from .phases import Phase
from .result import PARTS, Comparison, Measurement, Skipped, Spread, Target

__all__ = ["read_study", "study_as_dict"]


def study_as_dict(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return the JSON result of one or more comparisons that were made one after the other."""
    first = comparisons[0]
    rows = [{**row.as_dict(), "workload": made.name} for made in comparisons for row in made.results]
    skipped = {(left.driver, left.reason): None for made in comparisons for left in made.skipped}
    return {
        "machine": dict(first.machine),
        "workload": dict(first.workload),
        "results": rows,
        "workloads": [dict(made.workload) for made in comparisons],
        "skipped": [{"driver": driver, "reason": reason} for driver, reason in skipped],
        "parts": PARTS,
        "repeats": first.repeats,
        "snapshots": first.snapshots,
        "seconds": sum(made.seconds for made in comparisons),
        "when": first.when,
        "kept": first.kept,
    }


def read_study(path: Path) -> list[Comparison]:
    """Return the comparisons of a results.json.

    Raises ArgumentError for a file that is none: not readable, not JSON, or without the fields of a result.
    """
    try:
        stored = json.loads(path.read_text())
        return _comparisons(stored)
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ArgumentError(f"{path}: not a text: give a results.json of blocksnap compare") from None
    except json.JSONDecodeError as error:
        raise ArgumentError(f"{path}: not JSON, line {error.lineno}: {error.msg}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArgumentError(f"{path}: not a result of blocksnap compare: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _comparisons(stored: Mapping[str, Any]) -> list[Comparison]:
    """Return one comparison a workload; the first has the time that all took."""
    workloads = stored.get("workloads") or [stored["workload"]]
    read = [_comparison(stored, workload, alone=len(workloads) == 1) for workload in workloads]
    return [read[0], *(replace(made, seconds=0.0) for made in read[1:])]


def _comparison(stored: Mapping[str, Any], workload: Mapping[str, Any], *, alone: bool) -> Comparison:
    rows = [row for row in stored["results"] if alone or row["workload"] == workload["name"]]
    return Comparison(
        machine=stored["machine"],
        workload=workload,
        results=[_measurement(row) for row in rows],
        skipped=[Skipped(left["driver"], left["reason"]) for left in stored.get("skipped", [])],
        seconds=stored.get("seconds", 0.0),
        kept=None,
        repeats=stored.get("repeats", 1),
        snapshots=stored.get("snapshots", 0),
        when=stored.get("when"),
    )


def _measurement(row: Mapping[str, Any]) -> Measurement:
    target = Target(row["driver"], row["block_size"])
    runs = tuple(_run(target, run) for run in row.get("runs", []))
    spread = row.get("spread")
    return Measurement(
        target=target,
        latency=_latency(row["latency"]),
        phases=tuple(_phase(phase) for phase in row.get("phases", [])),
        runs=runs,
        spread=None if spread is None else {name: Spread(**value) for name, value in spread.items()},
        **_plain(Measurement, row),
    )


def _run(target: Target, run: Mapping[str, Any]) -> Measurement:
    """Return one of several runs, of which the result keeps the numbers alone."""
    waits = {name: run[f"latency_{name}"] for name in ("first", "p50", "p99", "max")}
    latency = None if waits["p50"] is None else Latency(**waits)
    return Measurement(target=target, latency=latency, **_plain(Measurement, run))


def _phase(phase: Mapping[str, Any]) -> Phase:
    return Phase(name=phase["phase"], latency=_latency(phase["latency"]), **_plain(Phase, phase))


def _latency(stored: Mapping[str, Any] | None) -> Latency | None:
    if stored is None:
        return None
    steady = stored.get("steady")
    return Latency(
        first=stored.get("first"),
        p50=stored["p50"],
        p99=stored["p99"],
        max=stored["max"],
        steady=None if steady is None else Steady(**steady),
        quantiles=stored.get("quantiles", {}),
    )


_NESTED = frozenset(("target", "latency", "phases", "runs", "spread", "name", "samples"))


def _plain(kind: type[Measurement] | type[Phase], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a class that are plain values and that are stored."""
    return {
        field.name: stored[field.name]
        for field in fields(kind)
        if field.name in stored and field.name not in _NESTED
    }
