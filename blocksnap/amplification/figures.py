"""How figures are written for people."""

from ..units import format_size

__all__ = ["format_bytes", "format_ratio", "format_seconds"]


def format_ratio(value: float) -> str:
    """Return three significant digits without an exponent: 1.42, 17.3, 1,240."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def format_bytes(value: int) -> str:
    """Return a size as people say it: 64 MiB, 7.3 MiB, 512 bytes."""
    text = format_size(value)
    return f"{text[:-1]} {text[-1]}iB" if text[-1:].isalpha() else f"{value} byte{'' if value == 1 else 's'}"


def format_seconds(value: float, space: str = " ") -> str:
    """Return a duration with a unit that fits it: 85 ms, 1.24 s, 310 us."""
    if value >= 1:
        return f"{value:.2f}{space}s"
    return f"{value * 1e3:.3g}{space}ms" if value >= 1e-3 else f"{value * 1e6:.0f}{space}us"
