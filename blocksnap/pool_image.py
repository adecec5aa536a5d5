"""A pool that nobody has open, as its files tell: for checking and dumping what may be damaged."""

import fcntl
import os
from dataclasses import replace
from typing import Self

from . import metadata as metadata_walks
from .catalog import Catalog
from .errors import BlocksnapError, BusyError, system_errors
from .kernel_leftovers import remove_leftovers
from .pool_files import PoolFiles
from .pool_recovery import require_agreement
from .user_pool import UserPool

__all__ = ["PoolImage"]


class PoolImage:
    """The metadata of a pool, locked against whoever would write them."""

    def __init__(self, files: PoolFiles) -> None:
        files.require()
        remove_leftovers(files.metadata)
        self._files = files
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
        """Prove every invariant of the metadata and recompute all counts, going on past damage.

        A catalog that cannot be read, or that does not belong to undamaged metadata, is one more finding.
        """
        report = metadata_walks.check(self._files.metadata)
        try:
            self._look_at_catalog(alone=report.damaged)
        except BlocksnapError as error:
            finding = metadata_walks.Finding("fatal", error.message)
            return replace(report, fatal=report.fatal + 1, findings=(*report.findings, finding))
        return report

    def _look_at_catalog(self, *, alone: bool) -> None:
        if not alone:
            engine = UserPool.open(self._files.metadata, self._files.data, read_only=True)
            try:
                require_agreement(self._files, engine)
            finally:
                engine.abandon()
        elif self._files.catalog.exists():
            Catalog.open(self._files.catalog, read_only=True).close()

    def dump(self, output: int) -> None:
        """Write to a file descriptor what `thin_dump` prints."""
        metadata_walks.dump(self._files.metadata, output)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
