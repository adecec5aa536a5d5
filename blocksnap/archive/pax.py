"""PAX extended header records: "LENGTH KEYWORD=VALUE\\n", checked byte for byte.

Source: POSIX.1-2008, pax, "pax Extended Header"; SCHILY.xattr.* is star's, GNU.sparse.* GNU tar's.
"""

import re

from ..errors import UnsafeLayerError

__all__ = ["Records", "format_seconds", "parse_records", "parse_seconds"]

XATTR_PREFIX = "SCHILY.xattr."
_SPARSE_PAIR = ("GNU.sparse.offset", "GNU.sparse.numbytes")
_SECONDS = re.compile(r"(-?)(\d{1,20})(?:\.(\d*))?\Z", re.ASCII)
_BILLION = 1_000_000_000


class Records:
    """The records that describe one entry; an empty value takes a keyword back."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self.sparse_numbers: list[str] = []  # format 0.0 repeats its two keywords, so order matters

    def update(self, pairs: list[tuple[str, bytes]]) -> None:
        """Take over the records of one more header."""
        for keyword, value in pairs:
            if keyword in _SPARSE_PAIR:
                self.sparse_numbers.append(value.decode("ascii", "replace"))
            elif value:
                self._values[keyword] = value
            else:
                self._values.pop(keyword, None)

    def text(self, keyword: str) -> str | None:
        """Return a value as text; bytes that are not UTF-8 survive as the file system's do."""
        value = self._values.get(keyword)
        return None if value is None else value.decode("utf-8", "surrogateescape")

    def number(self, keyword: str) -> int | None:
        """Return a value that must be a decimal integer."""
        text = self.text(keyword)
        if text is None:
            return None
        if re.fullmatch(r"-?\d{1,20}", text, re.ASCII) is None:
            raise UnsafeLayerError(f"its PAX {keyword} is not a number")
        return int(text)

    def xattrs(self) -> dict[str, bytes]:
        """Return the extended attributes, named as the kernel names them."""
        found = ((key.removeprefix(XATTR_PREFIX), value) for key, value in self._values.items())
        return {name: value for name, value in found if XATTR_PREFIX + name in self._values}


def parse_records(data: bytes) -> list[tuple[str, bytes]]:
    """Return the records of one header in their order; raise UnsafeLayerError when a length is wrong."""
    records, at = [], 0
    while at < len(data):
        space = data.find(b" ", at, at + 12)
        digits = data[at:space]
        if space < 0 or not digits.isdigit():
            raise UnsafeLayerError("its PAX header has a record without a length")
        end = at + int(digits)
        if end > len(data) or end <= space + 1 or data[end - 1 : end] != b"\n":
            raise UnsafeLayerError("its PAX header has a record with a wrong length")
        keyword, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not keyword or not equals or b"\0" in keyword:
            raise UnsafeLayerError("its PAX header has a record without a proper keyword")
        records.append((keyword.decode("utf-8", "surrogateescape"), value))
        at = end
    return records


def parse_seconds(text: str) -> int:
    """Return exact nanoseconds for decimal seconds; digits past the ninth are cut towards the past."""
    match = _SECONDS.match(text)
    if match is None:
        raise UnsafeLayerError("its PAX mtime is not a decimal number")
    sign, whole, fraction = match.groups()
    digits = fraction or ""
    nanoseconds = int(whole) * _BILLION + int(digits[:9].ljust(9, "0"))
    if not sign:
        return nanoseconds
    return -nanoseconds - (1 if digits[9:].strip("0") else 0)


def format_seconds(nanoseconds: int) -> str:
    """Return the decimal number of seconds that parse_seconds reads back."""
    sign = "-" if nanoseconds < 0 else ""
    seconds, fraction = divmod(abs(nanoseconds), _BILLION)
    return f"{sign}{seconds}.{fraction:09}".rstrip("0").rstrip(".")
