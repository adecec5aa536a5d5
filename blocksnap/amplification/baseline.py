"""Two studies side by side: what differs between their machines, and what changed in each row."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .result import Comparison, Measurement

__all__ = ["FIGURES", "Change", "changes", "differences"]

FIGURES = {
    "write_amplification": "write amp",
    "backing_bytes": "to disk",
    "seconds": "run",
    "latency_first": "first op",
    "latency_p50": "p50",
    "latency_p99": "p99",
}
"""What is compared, and its head in a table."""

_NOISE = 0.05  # what two single runs of the same easily differ by


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of one row, before and now; None where one of the two does not have it."""

    before: float | None
    after: float | None
    certain: bool
    """The ranges of the runs do not overlap; of single runs, the difference is above 5 %."""

    @property
    def ratio(self) -> float | None:
        return None if self.after is None or not self.before else self.after / self.before


def changes(
    before: Sequence[Comparison], after: Sequence[Comparison]
) -> Iterator[tuple[str, str, Mapping[str, Change] | str]]:
    """Yield the workload, the label and the changes of each row, or in words why there are none."""
    old, new = _rows(before), _rows(after)
    for key in dict.fromkeys([*new, *old]):
        if key not in new or key not in old:
            yield (*key, "only now" if key in new else "only in the baseline")
        elif (error := new[key].error or old[key].error) is not None:
            yield (*key, error)
        else:
            yield (*key, {name: _change(name, old[key], new[key]) for name in FIGURES})


def _rows(study: Sequence[Comparison]) -> dict[tuple[str, str], Measurement]:
    return {(made.name, row.label): row for made in study for row in made.results}


def _change(name: str, old: Measurement, new: Measurement) -> Change:
    before, after = old.figures()[name], new.figures()[name]
    if before is None or after is None:
        return Change(before, after, certain=False)
    if old.spread is not None and new.spread is not None:
        earlier, later = old.spread[name], new.spread[name]
        return Change(before, after, certain=later.min > earlier.max or later.max < earlier.min)
    return Change(before, after, certain=abs(after - before) > _NOISE * abs(before))


def differences(before: Sequence[Comparison], after: Sequence[Comparison]) -> list[str]:
    """Return a sentence for each thing that is not the same in both: machine, versions, workload, method."""
    old, new = before[0], after[0]
    said = list(_differing("", _machine(old), _machine(new)))
    earlier = {made.name: made for made in before}
    for made in after:
        if made.name in earlier:
            said += _differing(f"workload {made.name}: ", _work(earlier[made.name]), _work(made))
    said += _differing("", _method(old), _method(new))
    return said


def _differing(prefix: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name) and (old.get(name) or new.get(name)):
            yield f"{prefix}{name.replace('_', ' ')}: {_said(old.get(name))} -> {_said(new.get(name))}"


def _said(value: object) -> str:
    return "nothing" if value is None or value == "" else str(value)


def _machine(study: Comparison) -> dict[str, Any]:
    return dict(study.machine)


def _method(study: Comparison) -> dict[str, Any]:
    return {"repeats": study.repeats, "snapshots": study.snapshots}


def _work(study: Comparison) -> dict[str, Any]:
    """Return what a workload is made of, one level deep."""
    workload = study.workload
    flat: dict[str, Any] = {"command": workload.get("command")}
    for group in ("parameters", "versions", "base_image"):
        inner = workload.get(group) or {}
        assert isinstance(inner, Mapping)
        flat |= inner
    return flat
