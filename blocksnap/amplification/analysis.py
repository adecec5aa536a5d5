"""Analysing a trace: its requests through the copy-on-write model, costs by part of the trace, advice."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..traces import WRITE, Requests, Trace
from .advice import Advice, Costs, Prices, advise
from .epoch_figures import epoch_summaries
from .model import DEFAULT_MODEL_BLOCK_SIZES, BlockSizeResult, CowModel, SnapshotEvery, TraceCounts

__all__ = ["Analysis", "analyze"]

_PARTS = 64
_FIRST_PART = 64  # requests

Progress = Callable[[int], None]
"""Called now and then with the number of requests so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What a trace does at each block size; `epochs` by block size, arrays of model.EPOCH.

    `names` are those of devices or hosts that have no numbers of their own, by the numbers they were given.
    """

    files: Sequence[Mapping[str, object]]
    counts: TraceCounts
    devices: Mapping[int, Mapping[str, int]]
    names: Sequence[str]
    left_out: Mapping[str, object]
    results: Sequence[BlockSizeResult]
    epochs: Mapping[int, NDArray[np.void]]
    epochs_a_record: int
    fresh: bool
    advice: Advice | None
    seconds: float

    @property
    def requests_per_second(self) -> float:
        return self.counts.requests / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, object]:
        """Return the JSON result of `blocksnap analyze --json`."""
        counts = asdict(self.counts)
        memory_bytes = counts.pop("memory_bytes")
        trace_seconds = (counts.pop("last_time") - counts.pop("first_time")) / 1e9
        return {
            "trace": {
                **counts,
                "seconds": trace_seconds,
                "files": list(self.files),
                "devices": [{"device": number, **figures} for number, figures in self.devices.items()],
                "names": list(self.names),
                "left_out": dict(self.left_out),
            },
            "results": [result.as_dict() for result in self.results],
            "advice": self.advice.as_dict() if self.advice else None,
            "fresh": self.fresh,
            "epochs": epoch_summaries(self.epochs),
            "epochs_a_record": self.epochs_a_record,
            "memory_bytes": memory_bytes,
            "seconds": self.seconds,
            "requests_per_second": self.requests_per_second,
        }


def analyze(
    trace: Trace,
    block_sizes: Sequence[int] = DEFAULT_MODEL_BLOCK_SIZES,
    *,
    snapshot_every: SnapshotEvery | None = None,
    fresh: bool = False,
    prices: Prices | None = None,
    progress: Progress = lambda requests: None,  # noqa: ARG005 - nobody looks
) -> Analysis:
    """Read a trace to its end and return what a thin pool would do under it."""
    if snapshot_every and snapshot_every.seconds and not trace.has_times:
        raise ArgumentError("the trace has no times: take a snapshot every so many writes or bytes")
    begin = time.monotonic()
    devices = _Devices()
    with CowModel(block_sizes, snapshot_every=snapshot_every, fresh=fresh) as model:
        parts = _Parts(model)
        for requests in _read_ahead(trace):
            devices.count(requests)
            parts.feed(requests)
            progress(parts.requests)
        return Analysis(
            files=trace.files,
            counts=model.trace(),
            devices=devices.figures,
            names=list(trace.names),
            left_out=trace.complaints.as_dict(),
            results=model.results(),
            epochs={size: model.epochs(size) for size in model.block_sizes},
            epochs_a_record=model.epochs_a_record,
            fresh=fresh,
            advice=advise(parts.costs(), model.block_sizes, prices),
            seconds=time.monotonic() - begin,
        )


def _read_ahead(trace: Trace) -> Iterator[Requests]:
    """Yield the trace's requests while the next ones are read on another thread.

    Not from a pipe: nobody could interrupt a read that waits there.
    """
    if trace.size is None:
        yield from trace
        return
    batches = iter(trace)
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(next, batches, None)
        while (requests := ahead.result()) is not None:
            ahead = reader.submit(next, batches, None)
            yield requests


class _Parts:
    """Feeds the model and notes the costs so far at equal distances: in the end 64 to 128 times."""

    def __init__(self, model: CowModel) -> None:
        self._model = model
        self._marks: list[Costs] = []
        self._distance = _FIRST_PART
        self._left = self._distance
        self.requests = 0

    def feed(self, requests: Requests) -> None:
        begin = 0
        while begin < len(requests):
            end = min(begin + self._left, len(requests))
            self._model.feed(requests[begin:end])
            self._left -= end - begin
            begin = end
            if self._left == 0:
                self._mark()
        self.requests += len(requests)

    def _mark(self) -> None:
        self._marks.append(self._costs_so_far())
        if len(self._marks) == 2 * _PARTS:
            self._marks = self._marks[1::2]
            self._distance *= 2
        self._left = self._distance

    def _costs_so_far(self) -> Costs:
        rows = [(each.copy_bytes, each.space_bytes, each.metadata_bytes) for each in self._model.results()]
        return np.array(rows, float)

    def costs(self) -> Costs:
        """Return the costs of each part, shape (parts, block sizes, 3)."""
        marks = [*self._marks, self._costs_so_far()]
        return np.diff(np.array(marks), axis=0, prepend=0)


class _Devices:
    """Requests, writes and bytes written of each device."""

    def __init__(self) -> None:
        self.figures: dict[int, dict[str, int]] = {}

    def count(self, requests: Requests) -> None:
        for number, chosen in _by_device(requests):
            figures = self.figures.setdefault(number, {"requests": 0, "writes": 0, "written_bytes": 0})
            writes = chosen["kind"] == WRITE
            figures["requests"] += len(chosen)
            figures["writes"] += int(np.count_nonzero(writes))
            figures["written_bytes"] += int(chosen["length"] @ writes)


def _by_device(requests: Requests) -> Iterator[tuple[int, Requests]]:
    if not len(requests):
        return
    devices = requests["device"]
    first = int(devices[0])
    if (devices == first).all():
        yield first, requests
        return
    order = np.argsort(devices, kind="stable")
    ordered = requests[order]
    numbers, begins = np.unique(ordered["device"], return_index=True)
    yield from zip(numbers.tolist(), np.split(ordered, begins[1:]), strict=True)
