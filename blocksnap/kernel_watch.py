"""Waiting for what a live pool's device tells: its space is low, it is full, it has failed."""

import os
from contextlib import suppress

from .device_mapper import Control
from .kernel_table import PoolTable

__all__ = ["KernelWatch"]


class KernelWatch:
    """The events of one pool from now on; one thread waits for them."""

    def __init__(self, table: PoolTable) -> None:
        self._table = table
        self._control = Control.open()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._seen = {table.device.uuid: table.device.info().event_nr}

    def arm(self, low_water: int, *, wait_when_full: bool) -> None:
        """Tell when the free data fall to low_water bytes; a full pool lets writers wait, or fails them."""
        self._table.set_low_water(low_water, wait_when_full=wait_when_full)

    def wait(self, timeout: float) -> None:
        """Return at the next event, which may have been before the call, at wake() or after the time-out."""
        self._seen = self._control.await_events(self._seen, timeout, wakeup=self._wakeup)
        with suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)

    def wake(self) -> None:
        os.eventfd_write(self._wakeup, 1)

    def close(self) -> None:
        self._control.close()
        os.close(self._wakeup)
