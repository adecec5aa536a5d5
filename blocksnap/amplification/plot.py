"""The plot: write amplification against block size, both axes logarithmic, made for black-and-white print.

`thin` is a line with markers; drivers that copy whole files have no block size and are horizontal lines.
Every line has its own dash pattern and is named at its right end, so that nothing depends on colour or on a
legend.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..units import format_size
from .result import Comparison, Measurement
from .verdict import format_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_plots"]

_DASHES: tuple[Any, ...] = (
    (0, (7, 3)),
    (0, (7, 2, 1.5, 2)),
    (0, (1.5, 2)),
    (0, (7, 2, 1.5, 2, 1.5, 2)),
    (0, (3, 3)),
)
_LABEL_HEIGHT = 0.058  # of the height of the axes: what one line of text needs


class _Label(NamedTuple):
    """The name of a line and the point, in data coordinates, that it belongs to."""

    x: float
    y: float
    text: str


def write_plots(comparison: Comparison, directory: Path) -> list[Path]:
    """Write write-amplification.png and .svg; return their paths, none when no row has a figure."""
    rows = [row for row in comparison.measured if (row.write_amplification or 0) > 0]
    if not rows:
        return []
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "font.size": 10,
        "svg.fonttype": "none",
        "svg.hashsalt": "blocksnap",
        "axes.spines.top": False,
    }
    with rc_context(settings):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure.add_subplot(), rows, str(comparison.workload["name"]))
        paths = [directory / f"write-amplification.{suffix}" for suffix in ("png", "svg")]
        figure.savefig(paths[0], dpi=160)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _draw(axes: "Axes", rows: Sequence[Measurement], workload: str) -> None:
    blocks = sorted(
        (row for row in rows if row.target.block_size), key=lambda row: row.target.block_size or 0
    )
    files = [row for row in rows if not row.target.block_size]
    _set_axes(axes, rows, blocks)
    edge = axes.get_xlim()[1]
    labels: list[_Label] = []
    for name in dict.fromkeys(row.target.driver for row in blocks):
        series = [row for row in blocks if row.target.driver == name]
        labels.append(_draw_series(axes, name, series))
    for row, dash in zip(files, _cycle(len(files)), strict=True):
        value = row.write_amplification or 0.0
        axes.axhline(value, color="black", linewidth=1.2, linestyle=dash)
        labels.append(_Label(edge, value, f"{row.target.driver} {format_ratio(value)}"))
    _write_labels(axes, labels)
    axes.set_title(f"Write amplification, workload {workload}", loc="left", fontsize=11)


def _draw_series(axes: "Axes", name: str, series: Sequence[Measurement]) -> _Label:
    """Draw one driver over its block sizes, each point with its figure."""
    sizes = [row.target.block_size or 0 for row in series]
    values = [row.write_amplification or 0.0 for row in series]
    axes.plot(sizes, values, color="black", linewidth=1.6, marker="o", markersize=5, zorder=3)
    for size, value in zip(sizes, values, strict=True):
        axes.annotate(
            format_ratio(value),
            (size, value),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    return _Label(sizes[-1], values[-1], name)


def _cycle(count: int) -> list[Any]:
    return [_DASHES[index % len(_DASHES)] for index in range(count)]


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
    axes.set_xlabel("block size of the thin pool (file-level drivers have none)")
    axes.set_ylabel("bytes to the disk per byte written")
    axes.spines["right"].set_visible(False)
    axes.grid(visible=True, axis="y", color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)


def _write_labels(axes: "Axes", labels: Sequence[_Label]) -> None:
    """Name the lines at the right edge, in order of height, pushed apart where they would overlap."""
    ordered = sorted(labels, key=lambda label: label.y)
    points = axes.transData.transform([(label.x, label.y) for label in ordered])
    heights = [float(height) for height in axes.transAxes.inverted().transform(points)[:, 1]]
    for label, height in zip(ordered, _spread(heights), strict=True):
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0},
        )


def _spread(heights: Sequence[float]) -> list[float]:
    """Move ascending heights apart to at least the height of a label, as little as a pass up and one down
    can.
    """
    placed = list(heights)
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + _LABEL_HEIGHT)
    if placed and placed[-1] > 1.0:
        placed[-1] = 1.0
        for index in range(len(placed) - 2, -1, -1):
            placed[index] = min(placed[index], placed[index + 1] - _LABEL_HEIGHT)
    return placed
