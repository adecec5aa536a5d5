"""All formats by name, and which one a file has, told from its first bytes."""

from collections.abc import Sequence

from ..errors import ArgumentError, TraceError
from . import blktrace, srt, vscsi
from .columns import column_of, separator_of
from .stream import ByteStream
from .text_formats import TEXT_FORMATS, TextFormat

__all__ = ["FORMATS", "detect", "format_named", "header_of"]

FORMATS = {
    "blktrace": "blktrace binary, version 7, either byte order",
    **{known.name: known.summary for known in TEXT_FORMATS},
    "vscsi": "CloudPhysics vscsi, version 1 and 2",
    "srt": "HP's SRT 1, as DiskSim ships it",
    "csv": "text with a header that names its columns",
    "parquet": "parquet with named columns (needs polars)",
}
"""What `--format` takes, each with a line on what it is."""

_MAGICS = ((b"PAR1", "parquet"), (srt.MAGIC, "srt"))
_HEAD = 1 << 16
_SAMPLE = 64


def format_named(name: str) -> str:
    """Return the name if there is such a format; ArgumentError lists them."""
    if name not in FORMATS:
        raise ArgumentError(f'format "{name}" is unknown: it is one of {", ".join(FORMATS)}')
    return name


def detect(stream: ByteStream) -> str:
    """Return the name of the format of a stream; TraceError if it has none that is known."""
    head = stream.peek(_HEAD)
    if not head:
        raise TraceError(f"{stream.name}: {stream.damage or 'the file is empty'}")
    if blktrace.is_swapped(head) is not None:
        return "blktrace"
    for magic, name in _MAGICS:
        if head.startswith(magic):
            return name
    is_text = b"\0" not in head
    found = _detect_text(head) if is_text else "vscsi" if vscsi.variant_of(head) else None
    if found is None:
        kind = "text" if is_text else "binary data"
        raise TraceError(
            f"{stream.name}: {kind} in no format of block traces that is known: name one with --format"
        )
    return found


def header_of(stream: ByteStream) -> str:
    """Return the first line of a text; it stays to be read."""
    return stream.peek(_HEAD).partition(b"\n")[0].decode(errors="replace").strip()


def _detect_text(head: bytes) -> str | None:
    lines = _lines(head)
    if not lines:
        return None
    for known in TEXT_FORMATS:
        if known.header is not None and known.header.match(lines[0]):
            return known.name
    for known in TEXT_FORMATS:
        if _fits(known, lines):
            return known.name
    return "csv" if _names_columns(lines[0]) else None


def _lines(head: bytes) -> list[str]:
    """Return the first lines that are whole and no comments; an only one may lack its end."""
    text = head.decode("latin-1")
    lines = text.split("\n")
    whole = lines[:-1] or lines
    return [line.rstrip("\r") for line in whole if line.strip() and not line.lstrip().startswith("#")][
        :_SAMPLE
    ]


def _fits(known: TextFormat, lines: Sequence[str]) -> bool:
    """Say whether most lines match."""
    matching = [line for line in lines if known.line.match(line)]
    if 2 * len(matching) <= len(lines):
        return False
    return known.tell is None or known.tell([line.split() for line in matching])


def _names_columns(line: str) -> bool:
    separator = separator_of(line)
    names = line.split() if separator == " " else line.split(separator)
    return any(column_of(index, name) for index, name in enumerate(names)) and not any(
        name.strip().isdecimal() for name in names
    )
