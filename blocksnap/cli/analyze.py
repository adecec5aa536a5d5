"""`blocksnap analyze`: what a thin pool would do under a block trace."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from ..errors import ArgumentError
from ..traces import FORMATS, Trace
from ..units import parse_size
from .console import JsonOption, print_json, stderr, stdout

if TYPE_CHECKING:
    from ..amplification.analysis import Analysis

__all__ = ["analyze"]

_LINE_EVERY = 10.0  # seconds, where stderr is no terminal


def analyze(
    traces: Annotated[
        list[str],
        typer.Argument(metavar="TRACE...", help='Files of one trace, merged by time; "-" is stdin.'),
    ],
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="F", help=f"{', '.join(FORMATS)}; told from the content."),
    ] = None,
    block_sizes: Annotated[str, typer.Option(help="Block sizes, powers of two.")] = "4K..4M",
    snapshot_every: Annotated[
        str | None,
        typer.Option(
            metavar="N|SECONDS|BYTES", help="10000 (writes), 60s or 1GiB (written); never if not given."
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start with holes, not with blocks shared with a parent.")
    ] = False,
    device: Annotated[int | None, typer.Option(metavar="N", help="Only the requests of this device.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help='Names of CSV or parquet columns without such names: "time_us,op,sector,bytes".',
        ),
    ] = None,
    event: Annotated[
        str, typer.Option(help="Which events of blktrace are the requests: queue, issue or complete.")
    ] = "queue",
    sort: Annotated[bool, typer.Option("--sort", help="Sort requests by time within a million.")] = False,
    prices: Annotated[
        str, typer.Option(metavar="C:S:M", help="Price of a byte copied, of space, of metadata written.")
    ] = "1:1:1",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write JSON, CSV, parquet and the plot there.")
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave bad records out and say how many.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Predict what a thin pool would copy, allocate and write as metadata under a block trace.

    All block sizes are modelled in one pass. Files may be compressed (gzip, bz2, xz, zstd).
    """
    from ..amplification.advice import Prices
    from ..amplification.analysis import analyze as analyze_trace
    from ..amplification.model import SnapshotEvery

    sizes = _block_sizes(block_sizes)
    every = SnapshotEvery.parse(snapshot_every) if snapshot_every else None
    chosen = Prices.parse(prices)
    with (
        Trace(
            traces,
            format=format,
            columns=columns,
            event=event,
            device=device,
            sort=sort,
            keep_going=keep_going,
        ) as trace,
        _progress(trace) as show,
    ):
        analysis = analyze_trace(
            trace, sizes, snapshot_every=every, fresh=fresh, prices=chosen, progress=show
        )
    _report(analysis, trace, out, json)


def _block_sizes(text: str) -> list[int]:
    """Return the sizes of "4K,64K,1M" or of a range like "4K..4M", doubling."""
    first, dots, last = text.partition("..")
    if not dots:
        return [parse_size(part, "block size") for part in text.split(",") if part.strip()]
    low, high = parse_size(first, "block size"), parse_size(last, "block size")
    if not 0 < low <= high:
        raise ArgumentError(f'block sizes "{text}": give the smaller one first, like "4K..4M"')
    return [low << step for step in range((high // low).bit_length())]


class _Show:
    """Shows how far the reading is and its rate: a bar in a terminal, elsewhere now and then a line."""

    def __init__(self, trace: Trace, progress: Progress) -> None:
        self._trace = trace
        self._progress = progress
        self._task = progress.add_task("", total=trace.size)
        self._begin = self._said = time.monotonic()

    def __call__(self, requests: int) -> None:
        now = time.monotonic()
        text = f"{requests:,} requests, {requests / max(now - self._begin, 1e-3) / 1e6:.1f} M/s"
        self._progress.update(self._task, completed=self._trace.position, description=text)
        if now - self._said >= _LINE_EVERY and self._progress.disable:
            self._said = now
            stderr.print(f"{text}, {self._share()}", soft_wrap=True)

    def _share(self) -> str:
        position, size = self._trace.position, self._trace.size
        return f"{100 * position / size:.0f} %" if size else f"{position:,} bytes"


@contextmanager
def _progress(trace: Trace) -> Iterator[_Show]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:40}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        yield _Show(trace, progress)


def _report(analysis: "Analysis", trace: Trace, out: Path | None, as_json: bool) -> None:
    from ..amplification.analysis_report import (
        analysis_notes,
        analysis_table,
        epoch_table,
        summary,
        write_analysis,
    )

    paths = write_analysis(analysis, out) if out is not None else []
    if as_json:
        print_json(analysis.as_dict())
    else:
        stdout.print(summary(analysis), soft_wrap=True)
        stdout.print()
        stdout.print(analysis_table(analysis))
        stdout.print()
        epochs = epoch_table(analysis)
        if epochs:
            stdout.print(epochs)
            stdout.print()
        for sentence in analysis_notes(analysis):
            stdout.print(sentence, soft_wrap=True)
    rate = analysis.requests_per_second / 1e6
    stderr.print(
        f"read {analysis.counts.requests:,} requests in {analysis.seconds:.1f} s: {rate:.1f} M/s",
        soft_wrap=True,
    )
    for path in paths:
        stderr.print(f"wrote {path}", soft_wrap=True)
    _report_left_out(trace)


def _report_left_out(trace: Trace) -> None:
    complaints = trace.complaints
    if not complaints.records:
        return
    for message in complaints.messages:
        stderr.print(f"left out: {message}", soft_wrap=True, markup=False)
    unread = f"; not read to the end: {', '.join(complaints.unread)}" if complaints.unread else ""
    count = f"{complaints.records:,} records were" if complaints.records > 1 else "1 record was"
    stderr.print(f"{count} left out{unread}", soft_wrap=True, markup=False)
