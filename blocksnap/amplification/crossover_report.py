"""What people keep of a crossover map: JSON, CSV, the picture and one self-contained HTML page."""

import base64
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from ..units import format_size
from .crossover import Crossover, Point
from .crossover_plot import draw_crossover
from .crossover_rule import deviation_sentence, overhead_sentence, rule
from .figures import format_bytes, format_ratio
from .pictures import new_figure, save
from .raw_data import write_lines
from .report import render
from .tables import NOT_KNOWN, Column

__all__ = ["POINT_COLUMNS", "write_crossover"]

_CAPTION = (
    "Bytes that reach the disk with block-level copy-on-write over those with file-level: light where "
    "block-level writes less, dark where it writes more; the thick line is break-even, hatched is where "
    "the two are within 3 %. Circles are measured, with their ratio."
)


def _copy_text(copied: int | None) -> str:
    return NOT_KNOWN if copied is None else format_bytes(copied)


POINT_COLUMNS = (
    Column("file", "size of the file", lambda point: point.cell.work.file_size, format_size),
    Column(
        "touched",
        "share of the file that is overwritten",
        lambda point: point.cell.work.written_bytes / point.cell.work.file_size,
        lambda share: f"{100 * share:.3g} %",
    ),
    Column("writes of", "", lambda point: point.cell.work.write_size, format_size),
    Column("blocks", "block size of the pool", lambda point: point.cell.block_size, format_size),
    Column("copied", "by the pool", lambda point: point.copy_bytes, _copy_text),
    Column("modelled copy", "", lambda point: point.cell.copy_bytes, _copy_text),
    Column("thin to disk", "", lambda point: point.block_level_bytes, format_bytes),
    Column("overlay to disk", "", lambda point: point.file_level_bytes, format_bytes),
    Column("ratio", "thin / overlay", lambda point: point.ratio, format_ratio),
    Column(
        "modelled",
        "the ratio by the model, with what was fitted to the other points",
        lambda point: point.cell.ratio,
        format_ratio,
    ),
    Column("deviation", "", lambda point: point.deviation, lambda share: f"{100 * share:+.0f} %"),
)


def write_crossover(crossover: Crossover, directory: Path) -> list[Path]:
    """Write crossover.json, cells and points as CSV, the picture and crossover.html; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    stored = directory / "crossover.json"
    stored.write_text(json.dumps(crossover.as_dict() | {"rule": rule(crossover)}, indent=2) + "\n")
    data = [stored]
    for name, lines in (
        ("crossover-cells", [cell.as_dict() for cell in crossover.cells]),
        ("crossover-points", [point.as_dict() for point in crossover.points]),
    ):
        data += write_lines(lines, directory / name)
    with new_figure() as figure:
        draw_crossover(figure, crossover)
        picture = save(figure, directory, "crossover", _CAPTION)
    page = directory / "crossover.html"
    page.write_text(
        render(
            "crossover.html.j2",
            crossover=crossover,
            rule=rule(crossover),
            said=[deviation_sentence(crossover), overhead_sentence(crossover), *crossover.failures],
            picture=picture,
            columns=POINT_COLUMNS,
            points=_ordered(crossover.points),
            data=[(path.name, path.stat().st_size) for path in data],
            embedded=base64.b64encode(stored.read_bytes()).decode(),
            when=datetime.now().astimezone().isoformat(timespec="minutes"),
        )
    )
    return [*data, *picture.paths, page]


def _ordered(points: Sequence[Point]) -> list[Point]:
    return sorted(
        points,
        key=lambda p: (p.cell.work.write_size, p.cell.block_size, p.cell.work.file_size, p.cell.work.writes),
    )
