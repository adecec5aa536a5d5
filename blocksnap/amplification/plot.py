"""The plot: write amplification against block size, both axes logarithmic, made for black-and-white print.

Drivers with blocks are lines with markers; drivers that copy whole files have no block size and are
horizontal lines. Every line has its own dash pattern or marker and is named at its right end, so that nothing
depends on colour or on a legend.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..units import format_size
from .figures import format_ratio
from .plot_labels import DASHES, MARKERS, Label, write_labels
from .result import Comparison, Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_write_amplification"]


def draw_write_amplification(figure: "Figure", comparison: Comparison) -> bool:
    """Draw the plot; False when no row has a figure."""
    rows = [row for row in comparison.measured if (row.write_amplification or 0) > 0]
    if not rows:
        return False
    figure.set_size_inches(7.2, 4.6)
    _draw(figure.add_subplot(), rows, comparison.name)
    return True


def _draw(axes: "Axes", rows: Sequence[Measurement], workload: str) -> None:
    blocks = sorted(
        (row for row in rows if row.target.block_size), key=lambda row: row.target.block_size or 0
    )
    files = [row for row in rows if not row.target.block_size]
    _set_axes(axes, rows, blocks)
    edge = axes.get_xlim()[1]
    names = list(dict.fromkeys(row.target.driver for row in blocks))
    heights = _heights(blocks)
    labels: list[Label] = []
    for number, name in enumerate(names):
        series = [row for row in blocks if row.target.driver == name]
        labels.append(_draw_series(axes, name, series, number, heights))
    for number, row in enumerate(files):
        value = row.write_amplification or 0.0
        dash = DASHES[number % len(DASHES)]
        axes.axhline(value, color="black", linewidth=1.2, linestyle=dash)
        labels.append(Label(edge, value, f"{row.target.driver} {format_ratio(value)}"))
    write_labels(axes, labels)
    axes.set_title(f"Write amplification, workload {workload}", loc="left", fontsize=11)


def _heights(blocks: Sequence[Measurement]) -> dict[int, float]:
    """Return the highest point at each block size of the lines, which have more than one point."""
    points = Counter(row.target.driver for row in blocks)
    found: dict[int, float] = {}
    for row in blocks:
        size = row.target.block_size or 0
        if points[row.target.driver] > 1:
            found[size] = max(found.get(size, 0.0), row.write_amplification or 0.0)
    return found


def _draw_series(
    axes: "Axes", name: str, series: Sequence[Measurement], number: int, heights: dict[int, float]
) -> Label:
    """Draw one driver over its block sizes; the figures of the highest line stand above, others below."""
    sizes = [row.target.block_size or 0 for row in series]
    values = [row.write_amplification or 0.0 for row in series]
    marker = MARKERS[number % len(MARKERS)]
    axes.plot(sizes, values, color="black", linewidth=1.6, marker=marker, markersize=5, zorder=3)
    for row, size in zip(series, sizes, strict=True):
        _draw_range(axes, row, size)
    if len(series) == 1:
        return Label(sizes[-1], values[-1], f"{name} {format_ratio(values[-1])}")
    for size, value in zip(sizes, values, strict=True):
        axes.annotate(
            format_ratio(value),
            (size, value),
            xytext=(0, 8 if value >= heights[size] else -14),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    return Label(sizes[-1], values[-1], name)


def _draw_range(axes: "Axes", row: Measurement, size: int) -> None:
    if row.spread is not None and (over := row.spread.get("write_amplification")) is not None:
        axes.plot([size, size], [over.min, over.max], color="black", linewidth=0.8, marker="_", zorder=3)


def _set_axes(axes: "Axes", rows: Sequence[Measurement], blocks: Sequence[Measurement]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    sizes = sorted({row.target.block_size or 0 for row in blocks}) or [4096, 1 << 20]
    values = [row.write_amplification or 0.0 for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
    axes.set_ylim(min(1.0, *values) / 1.15, max(values) * 1.5)
    axes.set_xticks(sizes if blocks else [], [format_size(size) for size in sizes] if blocks else [])
    axes.xaxis.set_minor_locator(NullLocator())
    decades = math.log10(max(values) / min(1.0, *values))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("block size (file-level drivers have none)")
    axes.set_ylabel("bytes to the disk per byte written")
    axes.spines["right"].set_visible(False)
    axes.grid(visible=True, axis="y", color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
