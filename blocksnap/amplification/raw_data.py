"""The raw data of a study: rows, phases and single latencies, as CSV and, with polars, as parquet."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from .phases import Phase
from .result import PARTS, Comparison, Measurement

__all__ = ["has_parquet", "write_csv", "write_lines", "write_raw_data"]

_NESTED: Mapping[str, Sequence[str]] = {
    "latency": ("first", "p50", "p99", "max"),
    "steady": ("p50", "p99", "max"),
    "parts": tuple(PARTS),
}


def has_parquet() -> bool:
    """Say whether the data-frame library that writes parquet is installed."""
    return find_spec("polars") is not None


def write_raw_data(study: Sequence[Comparison], directory: Path) -> list[Path]:
    """Write results, phases and latencies; return the paths, none for what has no lines."""
    tables = {
        "results": [
            {"workload": made.name, **_flat(row.as_dict())} for made in study for row in made.results
        ],
        "phases": list(_phase_lines(study)),
        "latencies": list(_latency_lines(study)),
    }
    return [path for name, lines in tables.items() for path in write_lines(lines, directory / name)]


def write_lines(lines: Sequence[Mapping[str, Any]], place: Path) -> list[Path]:
    """Write lines with named columns to PLACE.csv and, with polars, PLACE.parquet; no lines, no file."""
    if not lines:
        return []
    paths = [place.with_suffix(".csv")]
    with paths[0].open("w", newline="") as file:
        _write_csv(lines, file)
    if has_parquet():
        paths.append(place.with_suffix(".parquet"))
        _write_parquet(lines, paths[1])
    return paths


def write_csv(rows: Sequence[Measurement], file: TextIO) -> None:
    """Write one line a row, nested objects flattened (latency_p50); unknown figures are empty."""
    _write_csv([_flat(row.as_dict()) for row in rows], file)


def _write_csv(lines: Sequence[Mapping[str, Any]], file: TextIO) -> None:
    writer = csv.DictWriter(file, list(_names(lines)), restval="")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: "" if value is None else value for name, value in line.items()})


def _write_parquet(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    import polars

    columns = {name: [line.get(name) for line in lines] for name in _names(lines)}
    polars.DataFrame(columns, strict=False).write_parquet(path)


def _names(lines: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    return list(dict.fromkeys(name for line in lines for name in line))


def _flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of a row or phase, and those of its nested objects that have a fixed form."""
    flat = {name: value for name, value in figures.items() if not isinstance(value, dict | list)}
    latency = figures.get("latency") or {}
    nested = {"latency": latency, "steady": latency.get("steady"), "parts": figures.get("parts")}
    for name, keys in _NESTED.items():
        flat.pop(name, None)
        flat |= {f"{name}_{key}": (nested[name] or {}).get(key) for key in keys}
    for name, over in (figures.get("spread") or {}).items():
        flat |= {f"{name}_min": over["min"], f"{name}_max": over["max"]}
    flat.pop("spread", None)
    return flat


def _runs(study: Sequence[Comparison]) -> Iterator[tuple[dict[str, Any], Measurement]]:
    """Yield every single run, with the columns that name it."""
    for made in study:
        for row in made.results:
            for number, run in enumerate(row.runs or (row,), 1):
                yield (
                    {
                        "workload": made.name,
                        "driver": row.target.driver,
                        "block_size": row.target.block_size,
                        "run": number,
                    },
                    run,
                )


def _phase_lines(study: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
    for named, run in _runs(study):
        for phase in run.phases:
            yield named | _flat(phase.as_dict())


def _latency_lines(study: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
    for named, run in _runs(study):
        for phase in run.phases:
            yield from (named | line for line in _samples(phase))


def _samples(phase: Phase) -> Iterator[dict[str, Any]]:
    """Yield a phase's operations in order, or of a histogram how many waited how long."""
    if phase.samples is None:
        return
    ordered = phase.samples.counts is None
    for number, (seconds, count) in enumerate(phase.samples.weighted()):
        yield {
            "phase": phase.name,
            "operation": number if ordered else None,
            "seconds": seconds,
            "count": count,
        }
