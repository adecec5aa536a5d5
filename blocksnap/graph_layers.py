"""How the graph makes and removes layers: only whole, verified ones are ever seen, and none is lost."""

import io
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from .drivers import Driver
from .errors import BlocksnapError
from .graph_names import chain_id
from .graph_store import GraphStore, LayerRow
from .oci import LayerStream

__all__ = ["LayerBuild", "Layers", "Progress", "new_id"]

_PIECE = 1 << 18

Progress = Callable[[str, int], None]
"""Called with the diff id of a layer and the bytes of its tar that were read so far."""

OpenTar = Callable[[], BinaryIO | LayerStream]


def new_id() -> str:
    """Return an id for the driver: random, since what it stands for is not verified yet."""
    return secrets.token_hex(16)


class Layers:
    """The layers of a driver and their rows. Callers of recover, building and remove hold the layer lock."""

    def __init__(self, driver: Driver, store: GraphStore) -> None:
        self._driver = driver
        self._store = store

    def recover(self) -> None:
        """Remove the layers that a crash left half made or half removed, but for what is still mounted."""
        for row in self._store.unfinished_layers():
            self._try_remove(row.id)

    def remove(self, rows: list[LayerRow]) -> None:
        """Remove layers that are marked for it, children first."""
        for row in rows:
            self._driver.remove(row.id)
            self._store.delete_layer(row.id)

    @contextmanager
    def building(self, base: LayerRow | None = None) -> Iterator["LayerBuild"]:
        """Make a chain on top of base; unless it is finished by the end, what was made is removed again."""
        build = LayerBuild(self._driver, self._store, base)
        try:
            yield build
        except BaseException:
            for id in reversed(build.made):
                self._try_remove(id)
            raise

    def _try_remove(self, id: str) -> None:
        # What cannot be removed now keeps its row, and the next recover tries again.
        try:
            self._driver.remove(id)
            self._store.delete_layer(id)
        except BlocksnapError:
            return


class LayerBuild:
    """A chain that grows layer by layer: those that are stored already are shared, the others made."""

    def __init__(self, driver: Driver, store: GraphStore, base: LayerRow | None) -> None:
        self._driver = driver
        self._store = store
        self._chain = base.chain_id if base else None
        self.top = base.id if base else None
        self.made: dict[str, int] = {}

    def add(self, diff_id: str, open_tar: OpenTar, progress: Progress | None = None) -> None:
        """Put the layer with this diff id on top; its tar is opened only if it is not stored yet.

        The tar verifies itself: reading it to the end raises DigestError when it is not what diff_id says.
        """
        self._chain = chain_id(self._chain, diff_id)
        stored = self._store.ready_layer(self._chain)
        if stored is not None:
            self.top = stored.id
            return
        id, parent = new_id(), self.top
        self._store.add_layer(id, self._chain, diff_id, parent)
        self.made[id] = 0
        self._driver.create(id, parent)
        with open_tar() as tar:
            stream = _Reported(tar, lambda count: progress(diff_id, count) if progress else None)
            self.made[id] = self._driver.apply_diff(id, parent, cast(BinaryIO, stream))
            while stream.read(_PIECE):  # the digests are told at the end, which a driver may not have reached
                pass
        self.top = id

    def finish(self) -> None:
        """Show the layers; to be called in the transaction that adds their image, after the driver's sync."""
        for id, size in self.made.items():
            self._store.finish_layer(id, size)


class _Reported(io.RawIOBase):
    """A stream that tells how much of it was read."""

    def __init__(self, stream: BinaryIO | LayerStream, report: Callable[[int], None]) -> None:
        self._stream = stream
        self._report = report
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer))
        piece = self._stream.read(len(view)) or b""
        view[: len(piece)] = piece
        self._count += len(piece)
        self._report(self._count)
        return len(piece)
