"""The crossover map: heat maps of block-level over file-level cost, a panel a block size and write size.

Light is where block-level copy-on-write writes less, dark where file-level does; the thick line is
break-even, and where the two are within 3 % is hatched. Measured points stand on the map with their ratio, in
a circle whose grey is the measured one.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..units import format_size
from .crossover import Cell, Crossover, Point
from .figures import format_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_crossover"]

_PANEL = (2.9, 2.75)  # inches
_DECADES = 2.0  # of the ratio, to each side of 1
_NEAR = 0.03  # hatched: hardly a difference
_MAP = "Greys"


def draw_crossover(figure: "Figure", crossover: Crossover) -> None:
    """Draw all panels with one scale of greys."""
    sweep = crossover.sweep
    rows, columns = len(sweep.write_sizes), len(sweep.block_sizes)
    figure.set_size_inches(_PANEL[0] * columns + 0.9, _PANEL[1] * rows + 0.5)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    image = None
    for row, write_size in enumerate(sweep.write_sizes):
        for column, block_size in enumerate(sweep.block_sizes):
            axes = panels[row][column]
            cells = _of_panel(crossover.cells, write_size, block_size)
            image = _draw_map(axes, cells)
            _draw_points(axes, crossover.points, write_size, block_size)
            title = f"{format_size(block_size)} blocks, {format_size(write_size)} writes"
            axes.set_title(title, fontsize=9, loc="left")
    _set_axes(panels, crossover)
    if image is not None:
        bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.01, aspect=35)
        ticks = [10.0**power for power in range(-int(_DECADES), int(_DECADES) + 1)]
        bar.set_ticks([math.log10(tick) for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
        bar.set_label("block-level bytes / file-level bytes to the disk")


def _of_panel(cells: Sequence[Cell], write_size: int, block_size: int) -> list[Cell]:
    return [cell for cell in cells if (cell.work.write_size, cell.block_size) == (write_size, block_size)]


def _draw_map(axes: "Axes", cells: Sequence[Cell]) -> Any:
    sizes = sorted({cell.work.file_size for cell in cells})
    fractions = sorted({cell.work.fraction for cell in cells})
    grid = np.full((len(fractions), len(sizes)), np.nan)
    for cell in cells:
        place = fractions.index(cell.work.fraction), sizes.index(cell.work.file_size)
        grid[place] = math.log10(cell.ratio)
    x, y = np.log2(sizes), np.log10(fractions)
    image = axes.pcolormesh(
        x, y, grid, shading="nearest", cmap=_MAP, vmin=-_DECADES, vmax=_DECADES, rasterized=True
    )
    if np.nanmin(grid) < 0 < np.nanmax(grid):
        near = math.log10(1 + _NEAR)
        axes.contourf(x, y, grid, levels=[-near, near], colors="none", hatches=["...."])
        axes.contour(x, y, grid, levels=[0.0], colors="black", linewidths=2.0)
    return image


def _draw_points(axes: "Axes", points: Sequence[Point], write_size: int, block_size: int) -> None:
    for point in points:
        work = point.cell.work
        if (work.write_size, point.cell.block_size) != (write_size, block_size):
            continue
        x, y = math.log2(work.file_size), math.log10(max(work.fraction, work.written_bytes / work.file_size))
        shade = min(max(math.log10(point.ratio), -_DECADES), _DECADES)
        axes.scatter(
            [x], [y], c=[shade], cmap=_MAP, vmin=-_DECADES, vmax=_DECADES, s=38, edgecolors="black", zorder=3
        )
        axes.annotate(
            format_ratio(point.ratio),
            (x, y),
            xytext=(0, -12 if y > -0.5 else 7),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
        )


def _set_axes(panels: Any, crossover: Crossover) -> None:
    sizes = crossover.sweep.file_sizes
    shown = [size for size in sizes if size in (4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20)]
    for axes in panels[-1]:
        axes.set_xlabel("file size", fontsize=9)
    for axes in panels[:, 0]:
        axes.set_ylabel("share of the file touched", fontsize=9)
    for axes in panels.flat:
        axes.set_xticks(
            [math.log2(size) for size in shown], [format_size(size) for size in shown], fontsize=8
        )
        low = math.floor(math.log10(min(crossover.sweep.fractions)))
        axes.set_yticks(range(low, 1), [f"{100 * 10.0**power:g} %" for power in range(low, 1)], fontsize=8)
        axes.spines["right"].set_visible(False)
