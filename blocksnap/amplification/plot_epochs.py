"""The plot of the epochs: what each driver writes before the first snapshot and after each."""

from typing import TYPE_CHECKING

from .figures import format_ratio
from .plot_labels import DASHES, MARKERS, Label, write_labels
from .result import Comparison, Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_epochs"]

_LINE_INCHES = 0.2


def draw_epochs(figure: "Figure", comparison: Comparison) -> bool:
    """Draw write amplification over the epochs; False when there was no snapshot."""
    rows = [row for row in comparison.measured if len(row.epochs) > 1 and all(_values(row))]
    if not rows:
        return False
    figure.set_size_inches(7.2, max(3.6, 1.4 + _LINE_INCHES * len(rows)))
    axes = figure.add_subplot()
    count = max(len(row.epochs) for row in rows)
    _set_axes(axes, count)
    for number, row in enumerate(rows):
        values = _values(row)
        axes.plot(
            range(len(values)),
            values,
            color="black",
            linewidth=1.2,
            linestyle=("-", *DASHES)[number % (len(DASHES) + 1)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4.5,
        )
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.1, high * 1.1)
    write_labels(axes, [_label(row) for row in rows])
    axes.set_title(f"Write amplification of each epoch, workload {comparison.name}", loc="left", fontsize=11)
    return True


def _label(row: Measurement) -> Label:
    *earlier, last = _values(row)
    return Label(len(earlier), last, f"{row.label} {format_ratio(last)}")


def _values(row: Measurement) -> list[float]:
    return [epoch.write_amplification or 0.0 for epoch in row.epochs]


def _set_axes(axes: "Axes", count: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_xticks(range(count), ["first epoch", *(f"after\nsnapshot {n}" for n in range(1, count))])
    axes.set_xlim(-0.2, count - 1 + 0.1)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("bytes to the disk per byte written")
    axes.spines["right"].set_visible(False)
    axes.grid(visible=True, axis="y", color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
