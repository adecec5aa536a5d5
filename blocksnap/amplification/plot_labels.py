"""Names beside the ends of lines, pushed apart where they would overlap, so that no plot needs a legend."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DASHES", "MARKERS", "Label", "spread", "write_labels"]

DASHES: tuple[Any, ...] = (
    (0, (7, 3)),
    (0, (7, 2, 1.5, 2)),
    (0, (1.5, 2)),
    (0, (7, 2, 1.5, 2, 1.5, 2)),
    (0, (3, 3)),
    (0, (1, 1)),
    (0, (3, 1.5, 1, 1.5)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_POINTS = 11.5  # what one line of text needs, in points


class Label(NamedTuple):
    """The name of a line and the point, in data coordinates, that it belongs to."""

    x: float
    y: float
    text: str


def write_labels(axes: "Axes", labels: Sequence[Label]) -> None:
    """Name the lines at the right edge, in order of height."""
    ordered = sorted(labels, key=lambda label: label.y)
    points = axes.transData.transform([(label.x, label.y) for label in ordered])
    heights = [float(height) for height in axes.transAxes.inverted().transform(points)[:, 1]]
    # A little of the height goes to the title and the axis below before the layout is final.
    inches = axes.get_window_extent().height / axes.get_figure(root=True).dpi * 0.9  # type: ignore[union-attr]
    for label, height in zip(ordered, spread(heights, _POINTS / 72 / inches), strict=True):
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": "0.5",
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0.0, 0.5),
            },
        )


def spread(heights: Sequence[float], distance: float) -> list[float]:
    """Move ascending heights apart to at least a distance, as little as a pass up and one down can."""
    placed = list(heights)
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + distance)
    if placed and placed[-1] > 1.0:
        placed[-1] = 1.0
        for index in range(len(placed) - 2, -1, -1):
            placed[index] = min(placed[index], placed[index + 1] - distance)
    return placed
