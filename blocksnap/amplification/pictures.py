"""The pictures of a comparison: each is drawn once and saved as PNG and, for the page, as SVG."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plot import draw_write_amplification
from .plot_epochs import draw_epochs
from .plot_rows import draw_amplifications, draw_latency
from .result import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Picture", "new_figure", "save", "write_pictures"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that was saved; `svg` is its text, for a page."""

    name: str
    caption: str
    paths: tuple[Path, ...]
    svg: str


_DRAWN: dict[str, tuple[Callable[["Figure", Comparison], bool], str]] = {
    "write-amplification": (
        draw_write_amplification,
        "Bytes written to the backing device per byte that the application wrote, against the block size; "
        "both axes logarithmic. Drivers without blocks are horizontal lines, named at their right end.",
    ),
    "space-amplification": (
        draw_amplifications,
        "Bytes to the disk per byte written, and bytes newly allocated per byte changed; both axes "
        "logarithmic. Of several runs the range is drawn.",
    ),
    "latency": (
        draw_latency,
        "How long operations waited; the first one, which pays for a copy-up, is marked apart.",
    ),
    "epochs": (
        draw_epochs,
        "What the same work costs before the first snapshot and after each.",
    ),
}


@contextmanager
def new_figure() -> Iterator["Figure"]:
    """Give a figure with the settings of all pictures: black on white, text as text."""
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
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def write_pictures(comparison: Comparison, directory: Path, prefix: str = "") -> list[Picture]:
    """Write the pictures for which there are figures."""
    pictures = []
    for name, (draw, caption) in _DRAWN.items():
        with new_figure() as figure:
            if draw(figure, comparison):
                pictures.append(save(figure, directory, f"{prefix}{name}", caption))
    return pictures


def save(figure: "Figure", directory: Path, name: str, caption: str) -> Picture:
    png, svg = directory / f"{name}.png", directory / f"{name}.svg"
    figure.savefig(png, dpi=160)
    figure.savefig(svg, metadata={"Date": None})
    text = svg.read_text()
    return Picture(name, caption, (png, svg), text[text.find("<svg") :])
