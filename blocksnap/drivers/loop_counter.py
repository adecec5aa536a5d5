"""How many bytes the file system of a layer wrote to its loop devices, over all the times it was mounted.

The file FILE holds the sum, `FILE.since` the device and its counter while the layer is mounted. Whoever was
killed meanwhile has left that: the sum is not known from then on. Neither is it when what a file holds is no
number: the files are not synced, and a power cut may leave anything in them.
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
        return None if self._since.exists() else self._noted()

    def _noted(self) -> int | None:
        numbers = _numbers(self._sum, 1) if self._sum.exists() else [0]
        return numbers[0] if numbers else None

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
        since = _numbers(self._since, 2)
        counted = [loop.written_bytes() - since[1] for loop in loops if since and loop.number == since[0]]
        noted = self._noted()
        self._sum.write_text(_UNKNOWN if noted is None or not counted else str(noted + counted[0]))
        self._since.unlink()

    def lose(self) -> None:
        """Note that something was written that nobody counted, if the layer was mounted."""
        if self._since.exists():
            self._sum.write_text(_UNKNOWN)
            self._since.unlink()


def _numbers(path: Path, count: int) -> list[int]:
    """Return the numbers in a file, none unless there are just so many and nothing else."""
    words = path.read_text(errors="replace").split()
    fits = len(words) == count and all(word.isdecimal() and word.isascii() for word in words)
    return [int(word) for word in words] if fits else []
