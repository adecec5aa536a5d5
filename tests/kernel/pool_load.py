"""A load on a pool's device "base", in a thread, until an error ends it or it is told to end."""

import threading
import time

from blocksnap.errors import BlocksnapError
from blocksnap.pool import Pool
from tests.kernel.devices import BLOCK, MIB

__all__ = ["Load"]


class Load:
    """Writes letters over the first blocks of "base", each made safe by a flush.

    Each time a block of "scratch" comes and goes: the metadata change. `error` is what ended it.
    """

    def __init__(self, pool: Pool, blocks: int) -> None:
        self.error: BlocksnapError | None = None
        self.rounds = 0
        self._pool, self._blocks = pool, blocks
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            scratch = self._pool.create_device("scratch", MIB)
            while not self._stop.is_set():
                self._write(self.rounds % self._blocks * BLOCK)
                scratch.write(0, b"y" * BLOCK)
                self._pool.device("base").flush()
                scratch.discard(0, BLOCK)
                self.rounds += 1
        except BlocksnapError as error:
            self.error = error

    def _write(self, offset: int) -> None:
        self._pool.device("base").write(offset + 4096, b"y" * 8192)

    def goes_on(self) -> None:
        """Wait until it has done some more."""
        enough, deadline = self.rounds + 3, time.monotonic() + 60
        while self.rounds < enough and self.error is None:
            assert time.monotonic() < deadline, "the load hangs"
            time.sleep(0.01)

    def ends(self) -> BlocksnapError:
        """Wait for the error."""
        self._thread.join(60)
        assert not self._thread.is_alive(), "the load hangs"
        assert self.error is not None
        return self.error

    def end(self) -> BlocksnapError | None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the load hangs"
        return self.error
