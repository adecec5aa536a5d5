"""What people read of a comparison: a table in the terminal, and files (JSON, CSV, plots, one self-contained
HTML page).
"""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from ..units import format_size
from .plot import write_plots
from .result import PARTS, Comparison, Measurement
from .verdict import format_bytes, format_ratio, format_seconds, verdict

__all__ = ["Column", "comparison_table", "notes", "write_csv", "write_report"]

_TEMPLATE = "report.html.j2"
_NOT_KNOWN = "-"


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its head, its meaning in one line, a row's figure and how it is written, long and short.

    The mark of a footnote stands behind the long form where marked says so.
    """

    head: str
    meaning: str
    value: Callable[[Measurement], Any]
    form: Callable[[Any], str] = str
    short: Callable[[Any], str] | None = None
    mark: str = ""
    marked: Callable[[Measurement], bool] = lambda row: False  # noqa: ARG005 - few columns have footnotes

    def text(self, row: Measurement) -> str:
        """Return the figure with its unit, a dash where the driver cannot give it."""
        value = self.value(row)
        if value is None:
            return _NOT_KNOWN
        return self.form(value) + (self.mark if self.marked(row) else "")

    def short_text(self, row: Measurement) -> str:
        value = self.value(row)
        return _NOT_KNOWN if value is None else (self.short or self.form)(value)


def _ratio(head: str, name: str, meaning: str = "") -> Column:
    return Column(head, meaning, attrgetter(name), format_ratio)


def _bytes(head: str, name: str, meaning: str = "") -> Column:
    return Column(head, meaning, attrgetter(name), format_bytes, format_size)


def _seconds(head: str, name: str, meaning: str = "") -> Column:
    return Column(head, meaning, attrgetter(name), format_seconds, lambda value: format_seconds(value, ""))


def _latency(head: str, name: str, meaning: str = "") -> Column:
    def value(row: Measurement) -> float | None:
        return None if row.latency is None else float(getattr(row.latency, name))

    return Column(head, meaning, value, format_seconds, lambda value: format_seconds(value, ""))


_DRIVER = Column("driver", "storage driver, for thin with the block size of its pool", attrgetter("label"))
_NEW_SPACE = _bytes("new space", "allocated_bytes", "space newly allocated on the backing device")

COLUMNS = (
    _DRIVER,
    _ratio("write amp", "write_amplification", "bytes to the disk / bytes the application wrote"),
    _bytes("to disk", "backing_bytes", "bytes written to the backing device, its own counter"),
    _bytes("copied", "copy_bytes", "bytes copied only because of the granularity of copy-on-write"),
    _NEW_SPACE,
    _seconds("create", "create_seconds", "time to create and mount the container"),
    _latency("first op", "first", "time of the first operation: a copy-up happens there"),
    _latency("p50", "p50", "median time of an operation"),
    _latency("p99", "p99", "99th percentile"),
    _seconds("run", "seconds", "time of the whole workload"),
)

_DETAILS = (
    _DRIVER,
    _bytes("application wrote", "application_bytes"),
    _bytes("file system wrote", "filesystem_bytes"),
    _bytes("driver's metadata", "metadata_bytes"),
    replace(
        _bytes(
            "changed", "changed_bytes", "what the application wrote, since the workload does not know more"
        ),
        mark="*",
        marked=lambda row: row.changed_bytes_source == "application_bytes",
    ),
    replace(
        _NEW_SPACE,
        meaning="difference of free space (statvfs), elsewhere the driver's own count",
        mark="†",
        marked=lambda row: row.allocated_bytes_source == "statvfs",
    ),
    _ratio("space amp", "space_amplification"),
    Column("operations", "", attrgetter("operations"), "{:,}".format),
    _latency("slowest", "max"),
    _seconds("final sync", "sync_seconds"),
)


def comparison_table(comparison: Comparison) -> Table:
    """Return the table of the terminal; with short units and two-line heads it fits into 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in COLUMNS:
        head = column.head.replace(" ", "\n")
        table.add_column(head, justify="left" if column is _DRIVER else "right", no_wrap=True)
    for row in comparison.results:
        if row.error is None:
            table.add_row(*(column.short_text(row) for column in COLUMNS))
    return table


def notes(comparison: Comparison) -> list[str]:
    """Return a sentence for each driver that failed or was left out, and for figures that mislead."""
    said = [f"{row.label} failed: {row.error}" for row in comparison.results if row.error]
    said += [f"{skipped.driver} skipped: {skipped.reason}" for skipped in comparison.skipped]
    if any(row.write_amplification_source == "pool counters" for row in comparison.results):
        said.append(
            "thin counted its own writes here, without what the file system below adds: "
            "as root there is a loop device whose counter tells."
        )
    written = [row.application_bytes for row in comparison.results if row.application_bytes]
    if written and max(written) > 1.05 * min(written):
        least, most = format_bytes(min(written)), format_bytes(max(written))
        said.append(
            f"The application wrote {least} to {most}, not the same on every driver "
            '(overlay counts copy_file_range twice): compare "to disk" too.'
        )
    return said


def write_report(comparison: Comparison, directory: Path) -> list[Path]:
    """Write results.json, results.csv, the plots and report.html; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    json_path, csv_path, html_path = (
        directory / f"{n}" for n in ("results.json", "results.csv", "report.html")
    )
    json_path.write_text(json.dumps(comparison.as_dict(), indent=2) + "\n")
    with csv_path.open("w", newline="") as file:
        write_csv(comparison.results, file)
    plots = write_plots(comparison, directory)
    svg = next((path.read_text() for path in plots if path.suffix == ".svg"), "")
    html_path.write_text(_render(comparison, svg))
    return [json_path, csv_path, *plots, html_path]


def write_csv(rows: Sequence[Measurement], file: TextIO) -> None:
    """Write one line a row, nested objects flattened (latency_p50); unknown figures are empty."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for line in flat for name in line))
    writer = csv.DictWriter(file, names, restval="")
    writer.writeheader()
    writer.writerows(flat)


def _flat(row: Measurement) -> dict[str, object]:
    nested = {"latency": ("first", "p50", "p99", "max"), "parts": tuple(PARTS)}
    flat: dict[str, object] = {}
    for name, value in row.as_dict().items():
        if name in nested:
            inner = value if isinstance(value, dict) else {}
            flat |= {f"{name}_{key}": inner.get(key) for key in nested[name]}
        else:
            flat[name] = value
    return {name: "" if value is None else value for name, value in flat.items()}


def _render(comparison: Comparison, svg: str) -> str:
    from jinja2 import Environment

    source = resources.files(__package__).joinpath(_TEMPLATE).read_text()
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    return template.render(
        comparison=comparison,
        verdict=verdict(comparison),
        svg=svg[svg.find("<svg") :],
        columns=COLUMNS,
        details=_DETAILS,
        footnotes=[column for column in _DETAILS if any(map(column.marked, comparison.results))],
        parts=PARTS,
        split=[row for row in comparison.results if row.parts is not None],
        bytes=lambda value: _NOT_KNOWN if value is None else format_bytes(value),
        percent=lambda part, whole: f"{100 * part / whole:.1f} %" if whole else _NOT_KNOWN,
        seconds=format_seconds,
        notes=notes(comparison),
        when=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
