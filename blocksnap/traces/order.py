"""Requests in the order of their times: of one file that is nearly so, and of several files merged."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from .complaints import Complaints
from .request import Requests

__all__ = ["WINDOW", "merged", "sorted_within"]

WINDOW = 1 << 20
"""How many requests too late one may come and still be sorted in."""


def sorted_within(
    batches: Iterator[Requests], name: str, complaints: Complaints, *, window: int = WINDOW
) -> Iterator[Requests]:
    """Yield requests by time, those of one time in their order; complain of what comes too late for that."""
    output = _Ordered(name, complaints, window)
    held: list[Requests] = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) >= 2 * window:
            ready, held = _split(_in_order(held), window)
            yield from map(output.accept, ready)
    yield from map(output.accept, _in_order(held))


def _in_order(batches: list[Requests]) -> list[Requests]:
    """Return the arrays themselves if their requests are in order, else one that is sorted."""
    filled = [batch for batch in batches if len(batch)]
    follows = all(a["time"][-1] <= b["time"][0] for a, b in pairwise(filled))
    if follows and all(map(_is_sorted, filled)):
        return filled
    return [_sorted(filled)]


def _split(batches: list[Requests], kept: int) -> tuple[list[Requests], list[Requests]]:
    """Return arrays with all but the last `kept` requests, and those."""
    ready: list[Requests] = []
    left = sum(map(len, batches)) - kept
    for number, batch in enumerate(batches):
        if len(batch) > left:
            return [*ready, batch[:left]], [batch[left:], *batches[number + 1 :]]
        ready.append(batch)
        left -= len(batch)
    return ready, []


def _is_sorted(requests: Requests) -> bool:
    times = requests["time"]
    return bool((times[1:] >= times[:-1]).all())


def _sorted(batches: Sequence[Requests]) -> Requests:
    requests = np.concatenate(batches)
    if _is_sorted(requests):
        return requests
    return requests[np.argsort(requests["time"], kind="stable")]


class _Ordered:
    """Takes sorted arrays and drops from their front what is before the end of the last one."""

    def __init__(self, name: str, complaints: Complaints, window: int) -> None:
        self._name = name
        self._complaints = complaints
        self._window = window
        self._clock = 0
        self._count = 0

    def accept(self, requests: Requests) -> Requests:
        late = int(np.searchsorted(requests["time"], self._clock))
        if late:
            reason = f"its time is before that of a record more than {self._window:,} before it"
            self._complaints.bad_record(self._name, self._count + 1, reason, count=late)
        self._count += len(requests)
        if late < len(requests):
            self._clock = int(requests["time"][-1])
        return requests[late:]


def merged(sources: Sequence[Iterator[Requests]]) -> Iterator[Requests]:
    """Yield the requests of several files, each in order, in one order of time."""
    heads = {
        number: batch for number, source in enumerate(sources) if (batch := _next_batch(source)) is not None
    }
    while heads:
        until = min(batch["time"][-1] for batch in heads.values())
        parts = []
        for number, batch in list(heads.items()):
            end = int(np.searchsorted(batch["time"], until, side="right"))
            parts.append(batch[:end])
            rest = batch[end:] if end < len(batch) else _next_batch(sources[number])
            if rest is None:
                del heads[number]
            else:
                heads[number] = rest
        yield _sorted(parts)


def _next_batch(source: Iterator[Requests]) -> Requests | None:
    return next((batch for batch in source if len(batch)), None)
