"""What people read of an analysed trace: a table in the terminal, and files (JSON, CSV, parquet, a plot)."""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from ..errors import NotSupportedError
from ..traces.parquet import polars
from ..units import format_size
from .analysis import Analysis
from .analysis_plot import write_plot
from .epoch_figures import EPOCH_BYTES, bytes_of_epochs, epoch_rows, median_and_most
from .figures import format_bytes, format_ratio
from .model import BlockSizeResult

__all__ = ["analysis_notes", "analysis_table", "epoch_table", "summary", "write_analysis"]

_MANY_DEVICES = 4


@dataclass(frozen=True, slots=True)
class _Column:
    head: str
    text: Callable[[BlockSizeResult, Analysis], str]


def _cost(row: BlockSizeResult, analysis: Analysis) -> str:
    """Return the cost as so many bytes at a price of 1."""
    return "-" if analysis.advice is None else format_size(round(analysis.advice.costs[row.block_size]))


def _mark(row: BlockSizeResult, analysis: Analysis) -> str:
    return "least" if analysis.advice and row.block_size == analysis.advice.block_size else ""


_COLUMNS = (
    _Column("block size", lambda row, _: format_size(row.block_size)),
    _Column("new blocks", lambda row, _: f"{row.blocks_written:,}"),
    _Column("blocks copied", lambda row, _: f"{row.blocks_copied:,}"),
    _Column("bytes copied", lambda row, _: format_size(row.copy_bytes)),
    _Column("write amp", lambda row, _: _ratio(row.write_amplification)),
    _Column("new space", lambda row, _: format_size(row.space_bytes)),
    _Column("metadata written", lambda row, _: format_size(row.metadata_bytes)),
    _Column("total cost", _cost),
    _Column("", _mark),
)


def _ratio(value: float | None) -> str:
    return "-" if value is None else format_ratio(value)


def summary(analysis: Analysis) -> str:
    """Return one line on the trace."""
    counts = analysis.counts
    seconds = (counts.last_time - counts.first_time) / 1e9
    snapshots = analysis.results[0].snapshot_every if analysis.results else "never"
    written = format_bytes(counts.written_bytes)
    return (
        f"{counts.requests:,} requests in {seconds:,.1f} s: {counts.writes:,} writes ({written}), "
        f"{counts.reads:,} reads, {counts.discards:,} discards, {counts.flushes:,} flushes; "
        f"snapshot every {snapshots}: {counts.snapshots:,}"
    )


def analysis_table(analysis: Analysis) -> Table:
    """Return the table of the terminal, a row a block size."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in _COLUMNS:
        table.add_column(column.head.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in analysis.results:
        table.add_row(*(column.text(row, analysis) for column in _COLUMNS))
    return table


_EPOCH_HEADS = ("bytes\ncopied", "metadata\nwritten", "new\nspace", "held by its\nsnapshot alone")


def epoch_table(analysis: Analysis) -> Table | None:
    """Return the table of epochs, "median / most" of each figure; None without a snapshot."""
    if not analysis.counts.snapshots:
        return None
    many = analysis.epochs_a_record
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        title="per epoch, median / most" if many == 1 else f"per {many} epochs, median / most",
        title_justify="left",
        title_style="",
    )
    for head in ("block\nsize", *_EPOCH_HEADS):
        table.add_column(head, justify="right", no_wrap=True)
    for size, records in analysis.epochs.items():
        figures = bytes_of_epochs(records, size)
        table.add_row(format_size(size), *(_median_and_most(figures[name]) for name in EPOCH_BYTES))
    return table


def _median_and_most(values: NDArray[np.uint64]) -> str:
    return " / ".join(map(format_size, median_and_most(values)))


def analysis_notes(analysis: Analysis) -> list[str]:
    """Return the advice in words, and what a person should know of the trace."""
    said = analysis.advice.sentences() if analysis.advice else ["Nothing was written: there is no advice."]
    if len(analysis.devices) > 1:
        said.append(_devices_note(analysis.devices))
    return said


def _devices_note(devices: Mapping[int, Mapping[str, int]]) -> str:
    busiest = sorted(devices, key=lambda number: -devices[number]["written_bytes"])[:_MANY_DEVICES]
    named = ", ".join(f"{number} ({format_bytes(devices[number]['written_bytes'])})" for number in busiest)
    return (
        f"{len(devices):,} devices, each a thin device of one pool; most is written to {named}: "
        "--device takes one."
    )


def write_analysis(analysis: Analysis, directory: Path) -> list[Path]:
    """Write results and epochs as JSON, CSV and, where polars is, parquet, and the plot; return the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    results = [dict(row.as_dict()) for row in analysis.results]
    epochs = list(epoch_rows(analysis.epochs, analysis.epochs_a_record))
    json_path = directory / "results.json"
    json_path.write_text(json.dumps(analysis.as_dict(), indent=2) + "\n")
    paths = [json_path]
    for name, rows in (("results", results), ("epochs", epochs)):
        paths += [
            _write_csv(directory / f"{name}.csv", rows),
            *_write_parquet(directory / f"{name}.parquet", rows),
        ]
    return paths + write_plot(analysis, directory)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    return path


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> list[Path]:
    try:
        frame = polars("writing parquet").DataFrame(rows)
    except NotSupportedError:
        return []
    frame.write_parquet(path)
    return [path]
