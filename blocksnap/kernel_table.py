"""The table of a live pool's device: how long it is, when it tells that space is low, what a full pool does.

Whoever changes the table or suspends the device holds the table's own lock and needs none of the pool's: a
thread that waits for space in a full pool may hold those.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from .device_mapper import Device, ThinPoolTarget
from .errors import ArgumentError
from .kernel_backing import Backing

__all__ = ["PoolTable"]


class PoolTable:
    """The device of a pool and its present table."""

    def __init__(self, device: Device, target: ThinPoolTarget, metadata: Backing, data: Backing) -> None:
        self.device = device
        self._target = target
        self._metadata, self._data = metadata, data
        self._changed = threading.Condition()
        self._ended = False

    @property
    def block_size(self) -> int:
        return self._target.block_size

    @property
    def waits_when_full(self) -> bool:
        return not self._target.error_if_no_space

    def extend(self, data_bytes: int) -> None:
        """Grow to the present sizes of the backing, of the data at most data_bytes (0 = all)."""
        with self._changing():
            for part in (self._metadata, self._data):
                part.refresh()
            length = min(data_bytes or self._data.size, self._data.size)
            length = max(length - length % self.block_size, self._target.length)
            self._replace(replace(self._target, length=length))

    def set_low_water(self, data_bytes: int, *, wait_when_full: bool) -> None:
        """Raise an event when the free data fall to data_bytes; a full pool has its writers wait, or fail."""
        with self._changing():
            target = replace(
                self._target,
                low_water_blocks=data_bytes // self.block_size,
                error_if_no_space=not wait_when_full,
            )
            if target != self._target:
                self._replace(target)

    def _replace(self, target: ThinPoolTarget) -> None:
        self.device.replace([target])
        self._target = target
        self._changed.notify_all()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._changed:
            if self._ended:
                raise ArgumentError(f"{self.device.name} is not live any more: open the pool again")
            yield

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait for changes of the table until a condition holds; return whether it does."""
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Hold the pool suspended; it is resumed however the block or the process ends."""
        with self._changing(), self.device.suspended():
            yield

    def end(self) -> None:
        """Let nobody change the table any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
