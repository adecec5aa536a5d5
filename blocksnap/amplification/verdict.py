"""One paragraph in plain words: who wins, by how much, why, and at which block sizes block-level copy-on-
write does.
"""

from collections.abc import Iterable, Sequence

from ..units import format_size
from .figures import format_bytes, format_ratio, format_seconds
from .result import BASELINE, Comparison, Measurement, Spread

__all__ = ["sentences", "verdict"]

_NOISE = 0.05  # what two runs of the same easily differ by
_EQUAL = "about as much as"
_FILE_LEVEL = frozenset(("overlay", "unionfs", "aufs", "vfs"))  # copy whole files


def verdict(comparison: Comparison) -> str:
    """Return the conclusion as one paragraph."""
    return " ".join(sentences(comparison))


def sentences(comparison: Comparison) -> list[str]:
    """Return the conclusion from the rows that have a write amplification; the baseline cannot win."""
    rows = sorted(
        (row for row in comparison.measured if not row.target.is_baseline),
        key=lambda row: _amplification(row),
    )
    if not rows:
        return ["Nobody wins: no driver has a write amplification here."]
    said = [
        _winner_sentence(rows, comparison),
        _block_size_sentence(rows),
        _first_write_sentence(rows, comparison),
        _snapshots_sentence(rows),
    ]
    return [sentence for sentence in said if sentence]


def _amplification(row: Measurement) -> float:
    value = row.write_amplification
    assert value is not None
    return value


def _winner_sentence(rows: Sequence[Measurement], comparison: Comparison) -> str:
    winner, others = rows[0], _best_of_each_driver(rows)[1:]
    figure = format_ratio(_amplification(winner))
    sentence = (
        f"{_name(winner)} wins: {figure} bytes reach the disk for each byte that the application writes"
    )
    if others:
        sentence += ", against " + _join(
            [f"{format_ratio(_amplification(row))} with {_name(row)}" for row in others]
        )
    if others and _relation(winner, others[0]) == _EQUAL:
        sentence += " (too near to call)" if winner.spread else " (too near to call from one run)"
    return sentence + _volume_clause(comparison) + "." + _copies_sentence([winner, *others])


def _best_of_each_driver(rows: Sequence[Measurement]) -> list[Measurement]:
    best: dict[str, Measurement] = {}
    for row in rows:
        best.setdefault(row.target.driver, row)
    return list(best.values())


def _name(row: Measurement) -> str:
    size = row.target.block_size
    return row.target.driver if size is None else f"{row.target.driver} with {format_size(size)} blocks"


def _copies_sentence(rows: Sequence[Measurement]) -> str:
    """Say why: the bytes that were copied only because of the granularity."""
    known = [row for row in rows if row.copy_bytes is not None]
    if not any(row.copy_bytes for row in known):
        return ""
    copies = [
        f"{format_bytes(row.copy_bytes)} by {_name(row)}" for row in known if row.copy_bytes is not None
    ]
    return f" Copied only for copy-on-write: {_join(copies)}."


def _volume_clause(comparison: Comparison) -> str:
    volumes = {row.target.driver: row for row in comparison.measured if row.target.is_baseline}
    volume = volumes.pop(BASELINE, None)
    if volume is None:
        return ""
    clause = f"; a volume, without any copy-on-write, writes {format_ratio(_amplification(volume))}"
    others = [
        f"{format_ratio(_amplification(row))} on {driver.partition('@')[2]}"
        for driver, row in volumes.items()
    ]
    return f"{clause} ({_join(others)})" if others else clause


def _block_size_sentence(rows: Sequence[Measurement]) -> str:
    """Say at which block sizes each block-level driver beats the best driver that copies whole files."""
    rivals = [row for row in rows if row.target.driver.partition("@")[0] in _FILE_LEVEL]
    sized: dict[str, list[Measurement]] = {}
    for row in rows:
        if row.target.block_size is not None:
            sized.setdefault(row.target.driver, []).append(row)
    if not rivals or not sized:
        return ""
    most = max(len(found) for found in sized.values())
    swept = {driver: found for driver, found in sized.items() if len(found) == most}
    return " ".join(
        f"Block-level copy-on-write{f' by {driver}' if len(swept) > 1 else ''} writes"
        f" {_relations(found, rivals[0])}."
        for driver, found in swept.items()
    )


def _relations(blocks: Sequence[Measurement], rival: Measurement) -> str:
    at: dict[str, list[int]] = {"less than": [], _EQUAL: [], "more than": []}
    for row in blocks:
        at[_relation(row, rival)].append(row.target.block_size or 0)
    found = {relation: sizes for relation, sizes in at.items() if sizes}
    if len(found) == 1:
        return f"{next(iter(found))} {rival.target.driver} at every block size measured"
    return _join(f"{relation} {rival.target.driver} at {_sizes(sizes)}" for relation, sizes in found.items())


def _relation(row: Measurement, rival: Measurement) -> str:
    """Compare two rows: of several runs by whether their ranges meet, of one by what runs differ by."""
    one, other = _range(row), _range(rival)
    if one is not None and other is not None:
        return "less than" if one.max < other.min else "more than" if one.min > other.max else _EQUAL
    ratio = _amplification(row) / _amplification(rival)
    return "less than" if ratio < 1 - _NOISE else "more than" if ratio > 1 + _NOISE else _EQUAL


def _range(row: Measurement) -> Spread | None:
    return (row.spread or {}).get("write_amplification")


def _sizes(sizes: Sequence[int]) -> str:
    return _join([format_size(size) for size in sorted(set(sizes))])


def _snapshots_sentence(rows: Sequence[Measurement]) -> str:
    """Say what the same work costs after snapshots, when all is shared again."""
    costs = []
    for row in _best_of_each_driver(rows):
        known = [each for epoch in row.epochs if (each := epoch.write_amplification) is not None]
        if len(known) > 1:
            least, most = format_ratio(min(known[1:])), format_ratio(max(known[1:]))
            later = least if least == most else f"{least} to {most}"
            costs.append(f"{later} with {_name(row)} (at first {format_ratio(known[0])})")
    return f"After a snapshot the same work writes, for each byte, {_join(costs)}." if costs else ""


def _first_write_sentence(ordered: Sequence[Measurement], comparison: Comparison) -> str:
    """Say how long the first write waits; a driver that copies when the container is made waits there."""
    baseline = [row for row in comparison.measured if row.target.driver == BASELINE]
    waits = [
        f"{format_seconds(row.latency.first)} on {_name(row)}" + _creation(row, row.latency.first)
        for row in [*_best_of_each_driver(ordered), *baseline]
        if row.latency is not None and row.latency.first is not None
    ]
    return f"The first operation takes {_join(waits)}." if len(waits) > 1 else ""


def _creation(row: Measurement, first: float) -> str:
    took = row.create_seconds
    if took is None or took <= 2 * first or took < 0.1:
        return ""
    return f" (after {format_seconds(took)} to create the container)"


def _join(parts: Iterable[str]) -> str:
    words = list(parts)
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
