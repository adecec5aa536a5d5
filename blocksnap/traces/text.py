"""Text traces: a layout says which field of a line holds what; the C core reads the lines."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .._native import check, ffi, lib
from .complaints import Complaints
from .names import Names
from .records import Piece, native_piece, read_records
from .request import Requests
from .stream import ByteStream

__all__ = ["NOTHING", "WAIT", "Layout", "read_text"]

WAIT = 4
"""The kind of a line that lets time pass: microseconds in the field of the offset."""
NOTHING = 5
"""The kind of a line that is no request."""

_SHORTEST_LINE = 6
_LINE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Fields of a line from 0 on (None: there is none); units are nanoseconds and bytes.

    A blank as separator stands for any run of blanks. `words` gives the kind for what an operation is called;
    without them the operation is in blkparse's letters. Only lines with `only` = (field, word) are requests.
    `host` numbers hosts from bit 16 of the device on. `skip` lines at the beginning are no records.
    """

    offset: int
    length: int
    kind: int
    time: int | None = None
    device: int | None = None
    host: int | None = None
    separator: str = ","
    time_unit: int = 1_000_000_000
    offset_unit: int = 1
    length_unit: int = 1
    words: Mapping[str, int] = field(default_factory=dict)
    only: tuple[int, str] | None = None
    skip: int = 0

    @property
    def has_times(self) -> bool:
        """Say whether the lines tell times, or how much of it passes."""
        return self.time is not None or WAIT in self.words.values()


class _Parser:
    """Owns the parser of the C core."""

    def __init__(self, layout: Layout, names: Names, *, ordered: bool) -> None:
        words = [{"text": word.encode()[:8], "kind": kind} for word, kind in layout.words.items()]
        slot = ffi.new("struct bs_trace_parser **")
        native = _native_layout(layout, ordered=ordered)
        forms = ffi.new("struct bs_trace_word[]", words)
        check(lib.bs_trace_parser_create(native, forms, len(words), names.handle, slot))
        self._names = names  # must outlive the handle
        self._handle = ffi.gc(slot[0], lib.bs_trace_parser_destroy)
        self._progress = ffi.new("struct bs_trace_progress *")
        self._skipped = layout.skip

    def read(self, view: memoryview) -> Piece:
        """Read whole lines."""

        def parse(text: Any, length: int, out: Any, capacity: int) -> int:
            code: int = lib.bs_trace_parser_parse(self._handle, text, length, out, capacity, self._progress)
            return code

        piece = native_piece(parse, view, self._progress, _SHORTEST_LINE)
        if piece.reason is None:
            return piece
        return piece._replace(reason=f"line {self._progress.line + self._skipped}: {piece.reason}")


def _native_layout(layout: Layout, *, ordered: bool) -> Any:
    def place(number: int | None) -> int:
        return -1 if number is None else number

    filter_field, filter_word = layout.only or (None, "")
    return ffi.new(
        "struct bs_trace_layout *",
        {
            "separator": layout.separator.encode(),
            "letters": not layout.words,
            "ordered": ordered,
            "time": place(layout.time),
            "offset": layout.offset,
            "length": layout.length,
            "kind": layout.kind,
            "device": place(layout.device),
            "host": place(layout.host),
            "filter": place(filter_field),
            "filter_word": filter_word.encode(),
            "time_unit": layout.time_unit,
            "offset_unit": layout.offset_unit,
            "length_unit": layout.length_unit,
        },
    )


def read_text(
    stream: ByteStream, layout: Layout, names: Names, complaints: Complaints, *, ordered: bool = True
) -> Iterator[Requests]:
    """Return the requests of a text trace, some ten thousand at a time.

    A last line without a newline counts as cut if its end matters: nothing tells whether a number is whole.
    """
    _skip_lines(stream, layout.skip)
    first = _first_line(stream.peek(_LINE))

    def ending(rest: bytes) -> bytes:
        line = rest.rpartition(b"\n")[2]
        return b"\n" if line and _is_whole(line, first, layout) else b""

    return read_records(stream, _Parser(layout, names, ordered=ordered).read, complaints, ending=ending)


def _first_line(head: bytes) -> bytes:
    lines = (line.strip() for line in head.split(b"\n"))
    return next((line for line in lines if line and not line.startswith(b"#")), b"")


def _is_whole(line: bytes, first: bytes, layout: Layout) -> bool:
    """Say whether a line without an end has all fields of the first, the last of them no offset or length.

    A time that was cut shows by going back.
    """
    separator = None if layout.separator == " " else layout.separator.encode()
    count = len(line.split(separator))
    return count == len(first.split(separator)) and count > max(layout.offset, layout.length) + 1


def _skip_lines(stream: ByteStream, count: int) -> None:
    for _ in range(count):
        length = stream.peek(_LINE).find(b"\n") + 1
        stream.fill(memoryview(bytearray(length)))
