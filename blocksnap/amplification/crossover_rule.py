"""The rule that a crossover map comes to, in sentences with its numbers."""

import math
from collections.abc import Sequence
from itertools import pairwise

from ..units import format_size
from .crossover import Cell, Crossover
from .figures import format_bytes

__all__ = ["deviation_sentence", "overhead_sentence", "rule"]

_HALF = 0.5


def rule(crossover: Crossover) -> list[str]:
    """Return a sentence for each write size: from which file size on, up to which share block-level wins."""
    return [_of_write_size(crossover, size) for size in crossover.sweep.write_sizes]


def _of_write_size(crossover: Crossover, write_size: int) -> str:
    clauses = []
    for block_size in crossover.sweep.block_sizes:
        cells = [
            cell
            for cell in crossover.cells
            if cell.block_size == block_size and cell.work.write_size == write_size
        ]
        clauses.append(f"with {format_size(block_size)} blocks {_of_block_size(cells)}")
    start = (
        f"Random writes of {format_size(write_size)} to a file of the image, a sync every "
        f"{crossover.sweep.sync_every}: block-level copy-on-write writes less than file-level "
    )
    return start + "; ".join(clauses) + "."


def _of_block_size(cells: Sequence[Cell]) -> str:
    least = _least_file_size(cells)
    if least is None:
        return "at no file size"
    largest = max(cell.work.file_size for cell in cells)
    over = sorted(
        (cell for cell in cells if cell.work.file_size == largest), key=lambda cell: cell.work.fraction
    )
    even, half = _fraction_at(over, 1.0), _fraction_at(over, _HALF)
    text = f"from files of {format_size(least)} on, "
    text += "whatever share is touched" if even is None else f"while less than {_percent(even)} is touched"
    return text if half is None else f"{text} (less than half while less than {_percent(half)} is)"


def _least_file_size(cells: Sequence[Cell]) -> int | None:
    """Return the file size from which on a single write costs less at block level."""
    single: dict[int, float] = {}
    for cell in sorted(cells, key=lambda cell: cell.work.writes):
        single.setdefault(cell.work.file_size, cell.ratio)
    least = None
    for size in sorted(single, reverse=True):
        if single[size] >= 1:
            break
        least = size
    return least


def _fraction_at(over: Sequence[Cell], ratio: float) -> float | None:
    """Return the share at which the ratio is first reached, between two cells by their logarithms."""
    for lower, upper in pairwise(over):
        if lower.ratio < ratio <= upper.ratio:
            part = math.log(ratio / lower.ratio) / math.log(upper.ratio / lower.ratio)
            return float(lower.work.fraction * (upper.work.fraction / lower.work.fraction) ** part)
    return None


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def deviation_sentence(crossover: Crossover) -> str:
    """Say how far the measured points lie from the model."""
    if not crossover.points:
        return "Nothing was measured: the map is the model's, without what file systems write of their own."
    deviations = sorted(abs(point.deviation) for point in crossover.points)
    middle, worst = deviations[len(deviations) // 2], deviations[-1]
    agree = sum((point.ratio < 1) == (point.cell.ratio < 1) for point in crossover.points)
    return (
        f"Of {len(deviations)} measured points the ratio lies {_percent(middle)} (median) and at most "
        f"{_percent(worst)} from the model's; model and measurement name the same winner at {agree}."
    )


def overhead_sentence(crossover: Crossover) -> str:
    """Say what was fitted."""
    if not crossover.overheads:
        return ""
    parts = [
        f"{label} {format_bytes(round(over.bytes))} and {format_bytes(round(over.bytes_a_sync))} a sync"
        for label, over in crossover.overheads.items()
    ]
    return (
        "What file systems write of their own, with the copies that this causes, is not modelled but fitted "
        f"to the measured points: {'; '.join(parts)}."
    )
