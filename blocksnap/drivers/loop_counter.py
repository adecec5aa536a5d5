"""How many bytes the file system of a layer wrote to its loop devices, over all the times it was mounted.

The file FILE holds the sum, `FILE.since` the device and its counter while the layer is mounted. Whoever was
killed meanwhile has left that: the sum is not known from then on.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..mount import LoopDevice

__all__ = ["LoopCounter"]

_UNKNOWN = "unknown"


class LoopCounter:
    """The counter of one layer, kept in files beside it."""

    def __init__(self, path: Path) -> None:
        self._sum = path
        self._since = path.with_name(f"{path.name}.since")

    def total(self) -> int | None:
        """Return the bytes written until the layer was unmounted last, None when they are not known."""
        text = self._sum.read_text() if self._sum.exists() else "0"
        return None if self._since.exists() or text == _UNKNOWN else int(text)

    def begin(self, loop: LoopDevice) -> None:
        """Count what is written to a loop device from now on."""
        if self._since.exists():
            self.lose()
        self._since.write_text(f"{loop.number} {loop.written_bytes()}")

    @contextmanager
    def ending(self, loops: Sequence[LoopDevice]) -> Iterator[None]:
        """Add what has been written until the end of the block, which unmounts the layer."""
        held = [
            os.open(loop.path, os.O_RDONLY | os.O_CLOEXEC) for loop in loops
        ]  # else they may detach at once
        try:
            yield
            self._add(loops)
        finally:
            for descriptor in held:
                os.close(descriptor)

    def _add(self, loops: Sequence[LoopDevice]) -> None:
        if not self._since.exists():
            return
        number, before = (int(word) for word in self._since.read_text().split())
        counted = [loop.written_bytes() - before for loop in loops if loop.number == number]
        text = self._sum.read_text() if self._sum.exists() else "0"
        known = counted and text != _UNKNOWN
        self._sum.write_text(str(int(text) + counted[0]) if known else _UNKNOWN)
        self._since.unlink()

    def lose(self) -> None:
        """Note that something was written that nobody counted, if the layer was mounted."""
        if self._since.exists():
            self._sum.write_text(_UNKNOWN)
            self._since.unlink()
