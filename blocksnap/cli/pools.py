"""Where a pool given on the command line lies, and how a verb gets at it: the one place that opens pools."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from .. import pool_client, pool_files
from ..engines import DEFAULT_ENGINE
from ..errors import ArgumentError, BusyError
from ..pool import Pool
from ..pool_client import PoolClient
from ..pool_image import PoolImage
from .console import stderr

__all__ = [
    "Location",
    "open_image",
    "open_pool",
    "progress_bar",
    "refuse_served",
    "serve_pool",
]

_TURN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Location:
    """A pool as people name it, a directory or two devices, and the engine they want for it."""

    path: Path | None
    metadata: Path | None
    data: Path | None
    catalog: Path | None
    engine: str | None = None

    @property
    def files(self) -> pool_files.PoolFiles:
        return pool_files.PoolFiles.locate(
            self.path, metadata=self.metadata, data=self.data, catalog=self.catalog
        )


def open_pool(location: Location, *, read_only: bool = False, adopt: bool = False) -> Pool | PoolClient:
    """Open the pool for one verb, or connect to the process that serves it."""
    deadline = time.monotonic() + _TURN_SECONDS
    while True:
        if (client := _connect(location)) is not None:
            return client
        try:
            return _open(location, read_only=read_only, adopt=adopt)
        except BusyError:
            # A server that starts or ends has the pool open and does not answer; a verb does not take long.
            if time.monotonic() > deadline:
                raise
        time.sleep(_TURN_SECONDS / 20)


def _open(location: Location, *, read_only: bool, adopt: bool) -> Pool:
    return Pool.open(
        location.path,
        engine=location.engine or DEFAULT_ENGINE,
        metadata=location.metadata,
        data=location.data,
        catalog=location.catalog,
        read_only=read_only,
        adopt=adopt,
    )


def open_image(location: Location) -> PoolImage | PoolClient:
    """Open what can be read of a pool even when it is damaged, or connect to the process that serves it."""
    return _connect(location) or PoolImage(location.files)


def refuse_served(location: Location) -> None:
    """Raise BusyError if a process serves the pool."""
    if (client := _connect(location)) is not None:
        with client:
            raise BusyError(
                f"process {client.server_pid} serves pool {location.files}: unmount what it has mounted"
            )


def serve_pool(location: Location) -> PoolClient:
    """Connect to the process that serves the pool; start it when there is none."""
    if location.path is None:
        raise ArgumentError("a pool on two devices cannot be served: mounting wants a pool in a directory")
    return pool_client.serve(location.path, engine=location.engine)


def _connect(location: Location) -> PoolClient | None:
    return None if location.path is None else pool_client.connect(location.path, engine=location.engine)


@contextmanager
def progress_bar(what: str) -> Iterator[pool_files.Progress]:
    """Show a bar of bytes on stderr while the block runs."""
    columns = TextColumn(what), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
