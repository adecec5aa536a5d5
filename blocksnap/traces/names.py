"""Names of the devices and hosts of a trace; its files share them."""

from collections.abc import Iterator

from .._native import check, ffi, lib

__all__ = ["Names"]

_LONGEST = 254


class Names:
    """Numbers names from 0 in order of appearance; owns the table of the C core."""

    def __init__(self) -> None:
        slot = ffi.new("struct bs_trace_names **")
        check(lib.bs_trace_names_create(slot))
        self.handle = ffi.gc(slot[0], lib.bs_trace_names_destroy)

    def number(self, name: str) -> int:
        """Return the number of a name, a new one if it is new."""
        text = name.encode(errors="surrogateescape")
        return check(lib.bs_trace_names_number(self.handle, text, len(text)))

    def __iter__(self) -> Iterator[str]:
        """Yield the names in the order of their numbers."""
        out = ffi.new("char[]", _LONGEST + 1)
        number = 0
        while lib.bs_trace_names_name(self.handle, number, out, len(out)) > 0:
            yield ffi.string(out).decode(errors="replace")
            number += 1
