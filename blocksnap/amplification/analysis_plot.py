"""The plot of an analysed trace: what each block size costs, and what the epochs add in space, copy and hold.

Made for black-and-white print, like the plot of a comparison.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..units import format_size
from .analysis import Analysis
from .epoch_figures import bytes_of_epochs
from .figures import format_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_plot"]

_PARTS = (("copies", "0.25", ""), ("space", "0.65", ""), ("metadata", "1.0", "////"))
_DASHES: tuple[Any, ...] = ("-", (0, (7, 3)), (0, (7, 2, 1.5, 2)), (0, (1.5, 2)))
_LINES = 4


def write_plot(analysis: Analysis, directory: Path) -> list[Path]:
    """Write analysis.png and .svg; return their paths, none if nothing was written."""
    if analysis.advice is None or not analysis.counts.written_bytes:
        return []
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "blocksnap",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(settings):
        rows = 2 if analysis.counts.snapshots else 1
        figure = Figure(figsize=(10, 4.4 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, 2, squeeze=False)
        _draw_costs(axes[0][0], analysis)
        _draw_space(axes[0][1], analysis)
        if rows == 2:
            _draw_epochs(axes[1][0], analysis, "copy_bytes", "Bytes copied in each epoch")
            _draw_epochs(axes[1][1], analysis, "exclusive_bytes", "What each snapshot holds alone")
        paths = [directory / f"analysis.{suffix}" for suffix in ("png", "svg")]
        figure.savefig(paths[0], dpi=160)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _draw_costs(axes: "Axes", analysis: Analysis) -> None:
    """Draw a bar a block size, its parts at their prices, in costs per byte written."""
    assert analysis.advice is not None
    prices, written = analysis.advice.prices.as_tuple(), analysis.counts.written_bytes
    rows = analysis.results
    parts = np.array([[row.copy_bytes, row.space_bytes, row.metadata_bytes] for row in rows])
    heights = parts * prices / written
    bottom = np.zeros(len(rows))
    for part, (name, shade, hatch) in enumerate(_PARTS):
        axes.bar(
            range(len(rows)),
            heights[:, part],
            bottom=bottom,
            label=f"{name} (price {prices[part]:g})",
            color=shade,
            edgecolor="black",
            linewidth=0.5,
            hatch=hatch,
        )
        bottom += heights[:, part]
    _cut_off(axes, bottom)
    for index, row in enumerate(rows):
        best = row.block_size == analysis.advice.block_size
        axes.annotate(
            format_ratio(float(bottom[index])) + ("\nleast" if best else ""),
            (index, min(float(bottom[index]), axes.get_ylim()[1] * 0.97)),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            weight="bold" if best else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.set_xticks(range(len(rows)), [format_size(row.block_size) for row in rows], rotation=45)
    axes.set_xlabel("block size")
    axes.set_ylabel("cost per byte written")
    axes.set_title("What each block size costs", loc="left", fontsize=10)
    axes.legend(frameon=False, loc="upper left", fontsize=8)


def _cut_off(axes: "Axes", totals: Any) -> None:
    """Leave the dearest bars out of scale where they would flatten the others."""
    axes.set_ylim(0, min(float(totals.max()) * 1.25, float(np.median(totals)) * 3 + float(totals.min())))


def _draw_space(axes: "Axes", analysis: Analysis) -> None:
    """Draw the new space after each epoch for some block sizes."""
    for dash, size in zip(_DASHES, _shown(analysis), strict=False):
        kept = bytes_of_epochs(analysis.epochs[size], size)["space_bytes"]
        space = np.concatenate([[0.0], np.cumsum(kept.astype(float))])
        axes.plot(np.arange(len(space)) * analysis.epochs_a_record, space, **_line(size, dash))
    _label(axes, "new space", "Space that devices and snapshots hold")


def _draw_epochs(axes: "Axes", analysis: Analysis, name: str, title: str) -> None:
    """Draw a figure of each epoch as a step for some block sizes."""
    many = analysis.epochs_a_record
    for dash, size in zip(_DASHES, _shown(analysis), strict=False):
        values = bytes_of_epochs(analysis.epochs[size], size)[name].astype(float)
        axes.stairs(values, np.arange(len(values) + 1) * many, baseline=None, **_line(size, dash))
    _label(axes, "bytes" if many == 1 else f"bytes in {many} epochs", title)


def _line(size: int, dash: Any) -> dict[str, Any]:
    return {"color": "black", "linewidth": 1.3, "linestyle": dash, "label": format_size(size)}


def _label(axes: "Axes", ordinate: str, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

    axes.set_ylim(bottom=0)
    step = 2.0 ** math.ceil(math.log2(max(axes.get_ylim()[1], 4096) / 6))
    axes.yaxis.set_major_locator(MultipleLocator(step))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_size(int(value))))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)
    axes.set_xlabel("epoch (the time between two snapshots)")
    axes.set_ylabel(ordinate)
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, loc="upper left", fontsize=8, title="block size", title_fontsize=8)


def _shown(analysis: Analysis) -> Sequence[int]:
    """Return the advised block size and others spread over the rest, ascending."""
    sizes = [row.block_size for row in analysis.results]
    best = analysis.advice.block_size if analysis.advice else sizes[0]
    spread = [sizes[round(index * (len(sizes) - 1) / (_LINES - 1))] for index in range(_LINES)]
    return sorted({best, *[size for size in spread if size != best][: _LINES - 1]})
