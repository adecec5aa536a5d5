"""Where an image graph given on the command line lies and how a verb gets at it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn

from .. import drivers
from ..drivers.root import read_note
from ..errors import ArgumentError
from ..graph import ImageGraph
from .console import stderr

__all__ = [
    "DriverOption",
    "DriverOptions",
    "RootOption",
    "layer_progress",
    "open_graph",
    "short_id",
]

_DEFAULT_DRIVER = "thin"

RootOption = Annotated[
    Path,
    typer.Option(
        "--root", metavar="DIR", envvar="BLOCKSNAP_ROOT", help="Directory of the images and containers."
    ),
]
DriverOption = Annotated[
    str | None,
    typer.Option(
        "--driver", metavar="D", help=f"Storage driver: that of DIR, {_DEFAULT_DRIVER} for a new one."
    ),
]
DriverOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help='An option of the driver, which thin takes for a new DIR: "block_size=16K", "size=50G".',
    ),
]


@contextmanager
def open_graph(
    root: Path, driver: str | None, *, options: list[str] | None = None, make: bool = False
) -> Iterator[ImageGraph]:
    """Open the graph in a directory for one verb; only with make a directory without one gets one."""
    marker = root / "driver"
    if not make and not marker.exists():
        raise ArgumentError(f'no images in {root}: take some in with "blocksnap image import"')
    name = driver or (read_note(marker) if marker.exists() else _DEFAULT_DRIVER)
    with drivers.open(name, root, **_parsed(options or [])) as opened, ImageGraph(opened) as graph:
        yield graph


def _parsed(options: list[str]) -> dict[str, object]:
    parsed: dict[str, object] = {}
    for option in options:
        key, found, value = option.partition("=")
        if not found:
            raise typer.BadParameter(f'"{option}" is no option of a driver: give KEY=VALUE')
        parsed[key] = {"true": True, "false": False}.get(value, value)
    return parsed


def short_id(digest: str) -> str:
    """Return the beginning of a digest that people read."""
    return digest.removeprefix("sha256:")[:12]


class _Layers:
    """Shows the layers of an import, a line each, and how much of each has been read."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, diff_id: str, count: int) -> None:
        if diff_id not in self._tasks:
            self._tasks[diff_id] = self._progress.add_task(f"layer {short_id(diff_id)}", total=None)
        self._progress.update(self._tasks[diff_id], completed=count)


@contextmanager
def layer_progress() -> Iterator[_Layers]:
    """Show on stderr what is read of each layer while the block runs."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), DownloadColumn(binary_units=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        yield _Layers(progress)
