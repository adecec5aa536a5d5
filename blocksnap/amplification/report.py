"""What people keep of a study: JSON, CSV and parquet, pictures, and one self-contained HTML page."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .baseline import FIGURES, changes, differences
from .figures import format_bytes, format_seconds
from .pictures import Picture, write_pictures
from .raw_data import has_parquet, write_raw_data
from .result import PARTS, Comparison, Measurement
from .study import study_as_dict
from .tables import DETAILS, NOT_KNOWN, PHASE_COLUMNS, change_texts, columns_of, notes
from .verdict import sentences

__all__ = ["render", "write_report"]


@dataclass(frozen=True, slots=True)
class _Section:
    """What the page shows of one workload."""

    comparison: Comparison
    pictures: Sequence[Picture]

    @property
    def verdict(self) -> Sequence[str]:
        return sentences(self.comparison)

    @property
    def columns(self) -> Sequence[Any]:
        return columns_of(self.comparison)

    @property
    def notes(self) -> Sequence[str]:
        return notes(self.comparison)

    @property
    def footnotes(self) -> Sequence[Any]:
        rows = self.comparison.results
        return [column for column in DETAILS if any(map(column.marked, rows))]

    @property
    def split(self) -> Sequence[Measurement]:
        """The rows of which every part of the written bytes is known."""
        return [row for row in self.comparison.results if row.parts is not None]

    @property
    def phased(self) -> Sequence[Measurement]:
        """The rows whose phases differ from the row itself."""
        return [row for row in self.comparison.results if row.phases and self.comparison.snapshots]


def write_report(
    study: Sequence[Comparison], directory: Path, *, baseline: Sequence[Comparison] | None = None
) -> list[Path]:
    """Write results.json, the raw data, the pictures and report.html; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    stored = directory / "results.json"
    stored.write_text(json.dumps(study_as_dict(study), indent=2) + "\n")
    data = [stored, *write_raw_data(study, directory)]
    sections, pictures = [], []
    for made in study:
        drawn = write_pictures(made, directory, f"{made.name}-" if len(study) > 1 else "")
        sections.append(_Section(made, drawn))
        pictures += [path for picture in drawn for path in picture.paths]
    page = directory / "report.html"
    page.write_text(render("report.html.j2", **_content(sections, data, baseline)))
    return [*data, *pictures, page]


def _content(
    sections: Sequence[_Section], data: Sequence[Path], baseline: Sequence[Comparison] | None
) -> Mapping[str, Any]:
    study = [section.comparison for section in sections]
    return {
        "sections": sections,
        "first": study[0],
        "seconds_taken": sum(made.seconds for made in study),
        "details": DETAILS,
        "phase_columns": PHASE_COLUMNS,
        "parts": PARTS,
        "data": [(path.name, path.stat().st_size) for path in data],
        "embedded": base64.b64encode(data[0].read_bytes()).decode(),
        "has_parquet": has_parquet(),
        "heads": list(FIGURES.values()),
        "changes": [] if baseline is None else _changes(baseline, study),
        "differences": [] if baseline is None else differences(baseline, study),
        "baseline": None if baseline is None else baseline[0],
    }


def _changes(
    before: Sequence[Comparison], after: Sequence[Comparison]
) -> list[tuple[str, str, Sequence[tuple[str, str]] | str]]:
    return [
        (workload, label, found if isinstance(found, str) else [change_texts(n, found[n]) for n in FIGURES])
        for workload, label, found in changes(before, after)
    ]


def render(name: str, **content: Any) -> str:
    """Return a page of a template of this package; figures are written as everywhere else."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("blocksnap", "amplification"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = {
        "bytes": lambda value: NOT_KNOWN if value is None else format_bytes(value),
        "percent": lambda part, whole: f"{100 * part / whole:.1f} %" if whole else NOT_KNOWN,
        "seconds": format_seconds,
    }
    return environment.get_template(name).render(**written, **content)
