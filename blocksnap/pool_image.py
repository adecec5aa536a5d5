"""A pool that nobody has open, as its metadata alone tell: for checking and dumping what may be damaged."""

import fcntl
import os
from typing import Self

from . import metadata as metadata_walks
from .errors import BusyError, system_errors
from .kernel_leftovers import remove_leftovers
from .pool_files import PoolFiles

__all__ = ["PoolImage"]


class PoolImage:
    """The metadata of a pool, locked against whoever would write them."""

    def __init__(self, files: PoolFiles) -> None:
        files.require()
        remove_leftovers(files.metadata)
        self._metadata = files.metadata
        with system_errors(str(files.metadata)):
            self._descriptor = os.open(files.metadata, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise BusyError(
                f"{files.metadata} is in use by another process: end it or go through it"
            ) from None

    def check(self) -> metadata_walks.CheckReport:
        """Prove every invariant of the metadata and recompute all counts, going on past damage."""
        return metadata_walks.check(self._metadata)

    def dump(self, output: int) -> None:
        """Write to a file descriptor what `thin_dump` prints."""
        metadata_walks.dump(self._metadata, output)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
