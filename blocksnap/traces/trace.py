"""The front door: the requests of one or several files of one trace, in order of time."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from types import TracebackType

from ..errors import ArgumentError
from .blktrace import EVENTS, read_blktrace
from .columns import layout_of, separator_of
from .complaints import Complaints
from .formats import detect, format_named, header_of
from .names import Names
from .order import WINDOW, merged, sorted_within
from .parquet import read_parquet
from .request import Requests
from .srt import read_srt
from .stream import ByteStream
from .text import Layout, read_text
from .text_formats import TEXT_FORMATS
from .vscsi import read_vscsi

__all__ = ["Trace"]

_LAYOUTS = {known.name: known.layout for known in TEXT_FORMATS}
_HEADERS = {known.name: known.header for known in TEXT_FORMATS if known.header is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    format: str | None
    columns: str | None
    event: str
    sort: bool


class Trace:
    """Files of one trace, read once: per-processor or per-volume files are merged by time.

    Compression (gzip, bz2, xz, zstd) and format are told from the content unless `format` names one.
    `columns` names the columns of CSV or parquet, in place of names of their own. `event` says which events
    of blktrace are the requests. A time that goes back is an error; with `sort` requests are sorted within a
    window. `device` keeps only the requests of one device. With `keep_going` bad records are left out: see
    `complaints`.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        format: str | None = None,
        columns: str | None = None,
        event: str = "queue",
        device: int | None = None,
        sort: bool = False,
        keep_going: bool = False,
    ) -> None:
        if event not in EVENTS:
            raise ArgumentError(f'event "{event}" is unknown: it is one of {", ".join(EVENTS)}')
        if not paths:
            raise ArgumentError("no trace: name at least one file")
        if columns is not None and format is None:
            format = "csv"
        options = _Options(format=format and format_named(format), columns=columns, event=event, sort=sort)
        self.complaints = Complaints(keep_going=keep_going)
        self.names = Names()
        self.has_times = True
        self.files: list[dict[str, object]] = []
        self._device = device
        self._streams: list[ByteStream] = []
        self._window = max(1 << 14, WINDOW // max(1, len(paths)))
        with ExitStack() as stack:
            for path in paths:
                self._streams.append(stack.enter_context(closing(ByteStream(path))))
            self._sources = [self._source(stream, options) for stream in self._streams]
            self._open_files = stack.pop_all()

    def _source(self, stream: ByteStream, options: _Options) -> Iterator[Requests]:
        name = options.format or detect(stream)
        self.files.append({"path": stream.name, "format": name, "compression": stream.compression})
        ordered = not options.sort
        if name == "blktrace":
            source = read_blktrace(stream, self.complaints, event=options.event)
            ordered = False
        elif name == "vscsi":
            source = read_vscsi(stream, self.complaints, ordered=ordered)
        elif name == "srt":
            source = read_srt(stream, self.complaints, ordered=ordered)
        elif name == "parquet":
            source = read_parquet(stream, self.names, self.complaints, ordered=ordered, names=options.columns)
        else:
            source = self._text(stream, _layout(stream, name, options), ordered=ordered)
        return source if ordered else sorted_within(source, stream.name, self.complaints, window=self._window)

    def _text(self, stream: ByteStream, layout: Layout, *, ordered: bool) -> Iterator[Requests]:
        self.has_times &= layout.has_times
        return read_text(stream, layout, self.names, self.complaints, ordered=ordered)

    def __iter__(self) -> Iterator[Requests]:
        """Yield the requests, some ten thousand in an array."""
        one_by_one = len(self._sources) == 1 or not self.has_times
        requests = chain.from_iterable(self._sources) if one_by_one else merged(self._sources)
        if self._device is None:
            return requests
        return (batch[batch["device"] == self._device] for batch in requests)

    @property
    def position(self) -> int:
        """Bytes of the files read so far."""
        return sum(stream.position for stream in self._streams)

    @property
    def size(self) -> int | None:
        """Bytes of the files; None if one is a pipe."""
        sizes = [stream.size for stream in self._streams]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def close(self) -> None:
        self._open_files.close()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _layout(stream: ByteStream, name: str, options: _Options) -> Layout:
    """Return the layout of a text; a header line that only some files of a format have is skipped."""
    header = header_of(stream)
    if name == "csv" and options.columns is not None:
        return layout_of(options.columns, stream.name, separator=separator_of(header), skip=0)
    if name == "csv":
        return layout_of(header, stream.name)
    layout, pattern = _LAYOUTS[name], _HEADERS.get(name)
    if pattern is None:
        return layout
    return dataclasses.replace(layout, skip=1 if pattern.match(header) else 0)
