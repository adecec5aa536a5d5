"""Sizes in bytes: integers, or strings like "64K", "10GiB" (powers of 1024)."""

import re

from .errors import ArgumentError

__all__ = ["Size", "format_size", "parse_size"]

Size = int | str

_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTPE]?)(?:i?B)?\s*\Z", re.IGNORECASE)
_LETTERS = "KMGTPE"


def parse_size(size: Size, what: str = "size") -> int:
    """Return a size in bytes.

    Raises ArgumentError for anything but a whole, non-negative number of bytes; `what` names it there.
    """
    if isinstance(size, int):
        if size < 0:
            raise ArgumentError(f"{what} {size} is negative")
        return size
    match = _PATTERN.match(size)
    if match is None:
        raise ArgumentError(
            f'{what} "{size}" is not a size: give bytes or a number with K, M, G or T, like "64K"'
        )
    number, letter = match.groups()
    unit = 1024 ** (_LETTERS.index(letter.upper()) + 1) if letter else 1
    value = float(number) * unit if "." in number else int(number) * unit
    if value != int(value):
        raise ArgumentError(f'{what} "{size}" is not a whole number of bytes')
    return int(value)


def format_size(size: int) -> str:
    """Return the shortest spelling with a binary unit: "64K", "10G", or with a decimal: "1.5M"."""
    value, letter = float(size), ""
    for step in _LETTERS:
        if abs(value) < 1024:
            break
        value, letter = value / 1024, step
    text = f"{value:.1f}".rstrip("0").rstrip(".") if value < 100 else f"{value:.0f}"
    return text + letter
