"""The tables that people read of a comparison, and the notes below them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from rich.table import Table

from ..units import format_size
from .baseline import FIGURES, Change, changes
from .figures import format_bytes, format_ratio, format_seconds
from .result import Comparison, Measurement

__all__ = [
    "COLUMNS",
    "DETAILS",
    "NOT_KNOWN",
    "PHASE_COLUMNS",
    "Column",
    "change_texts",
    "changes_table",
    "columns_of",
    "comparison_table",
    "notes",
]

NOT_KNOWN = "-"


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its head, its meaning in one line, a row's figure and how it is written, long and short.

    The mark of a footnote stands behind the long form where marked says so.
    """

    head: str
    meaning: str
    value: Callable[[Any], Any]
    form: Callable[[Any], str] = str
    short: Callable[[Any], str] | None = None
    mark: str = ""
    marked: Callable[[Any], bool] = lambda row: False  # noqa: ARG005 - few columns have footnotes

    def text(self, row: Any) -> str:
        """Return the figure with its unit, a dash where the driver cannot give it."""
        value = self.value(row)
        if value is None:
            return NOT_KNOWN
        return self.form(value) + (self.mark if self.marked(row) else "")

    def short_text(self, row: Any) -> str:
        value = self.value(row)
        return NOT_KNOWN if value is None else (self.short or self.form)(value)


def _ratio(head: str, name: str, meaning: str = "") -> Column:
    return Column(head, meaning, attrgetter(name), format_ratio)


def _bytes(head: str, name: str, meaning: str = "") -> Column:
    return Column(head, meaning, attrgetter(name), format_bytes, format_size)


def _seconds(head: str, name: str, meaning: str = "") -> Column:
    return Column(head, meaning, attrgetter(name), format_seconds, lambda value: format_seconds(value, ""))


def _latency(head: str, name: str, meaning: str = "", *, steady: bool = False) -> Column:
    """Return a column of latencies; in the steady state where that is known."""

    def value(row: Any) -> float | None:
        latency = row.latency
        if latency is not None and steady and latency.steady is not None:
            latency = latency.steady
        return None if latency is None else getattr(latency, name)

    return Column(head, meaning, value, format_seconds, lambda value: format_seconds(value, ""))


def _range(row: Measurement) -> tuple[float, float] | None:
    over = (row.spread or {}).get("write_amplification")
    return None if over is None else (over.min, over.max)


def _range_text(ends: tuple[float, float]) -> str:
    return "-".join(map(format_ratio, ends))


_DRIVER = Column("driver", "storage driver, with the block size where it has one", attrgetter("label"))
_RANGE = Column("range", "least and greatest write amplification of the runs", _range, _range_text)
_NEW_SPACE = _bytes("new space", "allocated_bytes", "space newly allocated on the backing device")

COLUMNS = (
    _DRIVER,
    _ratio("write amp", "write_amplification", "bytes to the disk / bytes the application wrote"),
    _bytes("to disk", "backing_bytes", "bytes written to the backing device, its own counter"),
    _bytes("copied", "copy_bytes", "bytes copied only because of the granularity of copy-on-write"),
    _NEW_SPACE,
    _seconds("create", "create_seconds", "time to create and mount the container"),
    _latency("first op", "first", "time of the first operation: a copy-up happens there"),
    _latency("p50", "p50", "median time of the operations after the first", steady=True),
    _latency("p99", "p99", "their 99th percentile", steady=True),
    _seconds("run", "seconds", "time of the whole workload"),
)

DETAILS = (
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

PHASE_COLUMNS = (
    Column("phase", "", attrgetter("name")),
    _bytes("application wrote", "application_bytes"),
    _bytes("to disk", "backing_bytes"),
    _ratio("write amp", "write_amplification"),
    _bytes("copied", "copy_bytes"),
    _bytes("new space", "allocated_bytes"),
    _seconds("create", "create_seconds"),
    _latency("first op", "first"),
    _latency("p50", "p50", steady=True),
    _latency("p99", "p99", steady=True),
    _seconds("run", "seconds"),
)


def columns_of(comparison: Comparison) -> list[Column]:
    """Return the columns of the first table; the range where there were several runs."""
    columns = list(COLUMNS)
    if any(row.spread is not None for row in comparison.results):
        columns.insert(2, _RANGE)
    return columns


def comparison_table(comparison: Comparison) -> Table:
    """Return the table of the terminal; with short units and two-line heads it fits into 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = columns_of(comparison)
    for column in columns:
        head = column.head.replace(" ", "\n")
        table.add_column(head, justify="left" if column is _DRIVER else "right", no_wrap=True)
    for row in comparison.results:
        if row.error is None:
            table.add_row(*(column.short_text(row) for column in columns))
    return table


def notes(comparison: Comparison) -> list[str]:
    """Return a sentence for each driver that failed or was left out, and for figures that mislead."""
    said = [f"{row.label} failed: {row.error}" for row in comparison.results if row.error]
    said += [f"{skipped.driver} skipped: {skipped.reason}" for skipped in comparison.skipped]
    if comparison.repeats > 1:
        said.append(
            f"Of {comparison.repeats} runs: the bytes of a row are those of the one with the median write "
            "amplification, times are medians."
        )
    if any(row.write_amplification_source == "pool counters" for row in comparison.results):
        said.append(
            "thin counted its own writes here, without what the file system below adds: "
            "as root there is a loop device whose counter tells."
        )
    uncounted = [row.label for row in comparison.results if not row.error and row.copy_bytes is None]
    if uncounted:
        said.append(
            f"Nobody counts what {', '.join(uncounted)} copied (qemu tells neither copies nor tables): "
            'it is in "to disk".'
        )
    written = [row.application_bytes for row in comparison.results if row.application_bytes]
    if written and max(written) > 1.05 * min(written):
        least, most = format_bytes(min(written)), format_bytes(max(written))
        said.append(
            f"The application wrote {least} to {most}, not the same on every driver "
            '(overlay counts copy_file_range twice): compare "to disk" too.'
        )
    return said


# ---- against a baseline ------------------------------------------------------------------------------------

_MANYFOLD = 2.0  # from there on a factor says more than percents
_FORMS: Mapping[str, Callable[[Any], str]] = {
    "write_amplification": format_ratio,
    "backing_bytes": lambda value: format_size(int(value)),
}


def change_texts(name: str, change: Change) -> tuple[str, str]:
    """Return a figure before; and now with its change in percent, a star where the change is certain."""
    form = _FORMS.get(name, lambda value: format_seconds(value, ""))
    before, after = (NOT_KNOWN if each is None else form(each) for each in (change.before, change.after))
    if change.ratio is None:
        return before, after
    size = f"x{change.ratio:.1f}" if change.ratio >= _MANYFOLD else f"{100 * (change.ratio - 1):+.0f}%"
    return before, f"{after} {size}{'*' if change.certain else ''}"


def changes_table(before: Sequence[Comparison], after: Sequence[Comparison]) -> Table:
    """Return the rows of two studies, two lines each: the baseline, and now.

    "to disk" is left to the page: beside the write amplification it says little.
    """
    figures = {name: head for name, head in FIGURES.items() if name != "backing_bytes"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for head in figures.values():
        table.add_column(head, justify="right", no_wrap=True)
    workload = None
    for name, label, found in changes(before, after):
        if name != workload:
            table.add_row(f"workload {name}")
        workload = name
        if isinstance(found, str):
            table.add_row(label, found)
            continue
        pairs = [change_texts(figure, found[figure]) for figure in figures]
        table.add_row(label, *(old for old, _ in pairs))
        table.add_row("", *(new for _, new in pairs))
    return table
