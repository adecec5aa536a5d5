"""Reading the metadata of an open pool while it goes on: through a metadata snapshot.

A pool holds at most one, and it outlives whoever took it. So the catalog notes before that it will be ours:
one that a killed process left is released when the pool is opened next. One that somebody else holds stays;
the pool then stands still while its metadata are read.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from .catalog import Catalog
from .engines import Engine
from .errors import BlocksnapError, BusyError, NoSpaceError, NotSupportedError

__all__ = ["MetadataAtRest", "MetadataWalks", "release_left"]


class MetadataAtRest(NamedTuple):
    """What a walk reads: the path of the metadata, and whether the metadata snapshot in them."""

    path: Path
    held: bool


class MetadataWalks:
    """Gives one walk after the other metadata that stay as they are."""

    def __init__(self, path: Path, engine: Engine, catalog: Catalog, lock: threading.RLock) -> None:
        """`lock` is held by whoever has a transaction of the pool."""
        self._path = path
        self._engine = engine
        self._catalog = catalog
        self._lock = lock
        self.turn = threading.RLock()
        """Held by the walk that is under way; taken before the pool's lock."""

    @contextmanager
    def committed(self) -> Iterator[MetadataAtRest]:
        """Give what is committed now; the pool goes on meanwhile, if it can hold a metadata snapshot."""
        with self.turn, ExitStack() as stack:
            try:
                self._hold()
            except (BusyError, NoSpaceError, NotSupportedError):
                yield stack.enter_context(self.at_rest())
            else:
                stack.callback(self._release)
                yield MetadataAtRest(self._path, held=True)

    @contextmanager
    def at_rest(self) -> Iterator[MetadataAtRest]:
        """Commit, and let no commit happen within the block."""
        with self._lock, self._engine.quiescent():
            yield MetadataAtRest(self._path, held=False)

    @contextmanager
    def as_they_are(self) -> Iterator[MetadataAtRest]:
        """Give the metadata of a pool that nobody writes to."""
        with self._lock:
            yield MetadataAtRest(self._path, held=False)

    def _hold(self) -> None:
        with self._lock:
            if self._engine.status().held_root:
                raise BusyError(f"{self._path}: somebody else holds a metadata snapshot of this pool")
            self._catalog.note_holding(True)
            try:
                self._engine.hold_metadata()
            except BaseException:
                self._catalog.note_holding(False)
                raise

    def _release(self) -> None:
        with self._lock:
            self._engine.release_metadata()
            # If this fails, the next open finds nothing to release.
            with suppress(BlocksnapError):
                self._catalog.note_holding(False)


def release_left(engine: Engine, catalog: Catalog) -> None:
    """Release the metadata snapshot that a killed process of ours left; the pool is open for writing."""
    if not catalog.holding:
        return
    if engine.status().held_root:
        engine.release_metadata()
    catalog.note_holding(False)
