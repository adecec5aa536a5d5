"""Ctrl-C and SIGTERM as flags that are looked at where stopping is safe.

A signal that raises in the middle of "attach, then remember" leaves a loop device that nobody knows of. Here
a signal only sets a flag; `check()`, called between two steps and while a child runs, raises; the signal is
delivered again at the end.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupts", "deferred_interrupts"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """What arrived since the block began."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has arrived."""
        if self.received:
            raise KeyboardInterrupt


@contextmanager
def deferred_interrupts() -> Iterator[Interrupts]:
    """Collect SIGINT, SIGTERM and SIGHUP inside the block and deliver the first of them after it.

    Outside the main thread Python takes no signals: there the block changes nothing.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return

    def remember(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a handler
        interrupts.received.append(number)

    before = [signal.signal(number, remember) for number in _SIGNALS]
    try:
        yield interrupts
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)
        if interrupts.received:
            signal.raise_signal(interrupts.received[0])
