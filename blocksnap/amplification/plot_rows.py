"""Plots with a line of the table each: space and write amplification, and how long operations waited."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from .figures import format_ratio, format_seconds
from .result import Comparison, Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_amplifications", "draw_latency"]

_ROW_INCHES = 0.26
_REST_INCHES = 1.25


def draw_amplifications(figure: "Figure", comparison: Comparison) -> bool:
    """Draw write and space amplification beside each other; False when no row has a figure."""
    rows = [
        row
        for row in comparison.results
        if row.write_amplification is not None or row.space_amplification is not None
    ]
    if not rows:
        return False
    figure.set_size_inches(7.2, _REST_INCHES + _ROW_INCHES * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_dots(left, rows, "write_amplification")
    _draw_dots(right, rows, "space_amplification")
    _name_rows(left, rows)
    right.tick_params(axis="y", length=0)
    left.set_title(f"Amplification, workload {comparison.name}", loc="left", fontsize=11)
    left.set_xlabel("bytes to the disk per byte written")
    right.set_xlabel("new bytes on the disk per byte changed")
    return True


def _draw_dots(axes: "Axes", rows: Sequence[Measurement], name: str) -> None:
    values = [getattr(row, name) for row in rows]
    _log_axis(axes, [value for value in values if value], lambda value, _: f"{value:,.10g}")
    least = axes.get_xlim()[0]
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            continue
        if row.spread is not None and (over := row.spread.get(name)) is not None:
            axes.plot([over.min, over.max], [place, place], color="black", linewidth=0.8, marker="|")
        if value:
            axes.plot(value, place, color="black", marker="o", markersize=4.5)
        axes.annotate(
            format_ratio(value) if value else "0",
            (value or least, place),
            xytext=(8 if value else 3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )


def draw_latency(figure: "Figure", comparison: Comparison) -> bool:
    """Draw the distribution of the operations' times, a line a row; False when there are none."""
    rows = [row for row in comparison.results if row.latency is not None and row.latency.quantiles]
    if not rows:
        return False
    figure.set_size_inches(7.2, _REST_INCHES + 0.35 + _ROW_INCHES * len(rows))
    axes = figure.add_subplot()
    times = [row.latency.quantiles["p1"] for row in rows if row.latency]
    times += [row.latency.max for row in rows if row.latency]
    _log_axis(axes, times, lambda value, _: format_seconds(value))
    for place, row in enumerate(rows):
        _draw_strip(axes, row, place)
    _name_rows(axes, rows)
    axes.set_title(f"Time of an operation, workload {comparison.name}", loc="left", fontsize=11)
    axes.set_xlabel(
        "thin line: 1st to 99.9th percentile; box: 25th to 75th; | median; o 99th percentile;\n"
        "x slowest; diamond: first operation"
    )
    return True


def _draw_strip(axes: "Axes", row: Measurement, place: int) -> None:
    latency = row.latency
    assert latency is not None
    at = latency.quantiles
    axes.plot([at["p1"], at["p99.9"]], [place, place], color="black", linewidth=0.8)
    axes.barh(place, at["p75"] - at["p25"], left=at["p25"], height=0.5, color="0.75", edgecolor="black",
              linewidth=0.6)  # fmt: skip
    axes.plot([at["p50"]] * 2, [place - 0.25, place + 0.25], color="black", linewidth=2.0)
    axes.plot(at["p99"], place, color="black", marker="o", markersize=4.5)
    axes.plot(latency.max, place, color="black", marker="x", markersize=5)
    if latency.first is not None:
        axes.plot(latency.first, place, color="black", marker="D", markersize=5, markerfacecolor="white")


def _log_axis(axes: "Axes", values: Iterable[float], form: Callable[[float, object], str]) -> None:
    """Let an axis run over decades, with room on the right for a figure."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    known = sorted(values) or [1.0]
    axes.set_xscale("log")
    axes.set_xlim(known[0] / 1.6, known[-1] * (known[-1] / known[0]) ** 0.22 * 1.3)
    decades = axes.get_xlim()[1] / axes.get_xlim()[0]
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if decades < 200 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(form))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def _name_rows(axes: "Axes", rows: Sequence[Measurement]) -> None:
    """Name the rows from the top down; a faint line leads from each name to its figures."""
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    for each in axes.figure.axes:
        each.grid(visible=True, axis="y", color="0.9", linewidth=0.6)
        each.spines["right"].set_visible(False)
        each.set_axisbelow(True)
