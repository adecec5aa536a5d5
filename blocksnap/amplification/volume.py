# ruff: noqa: ARG002 - the signatures are those of a driver
"""The baseline: a volume, that is a host directory bind-mounted where a container would see it. No copy-on-
write.

It answers the questions that a measurement asks a driver, and is none: all layers are the one directory.
"""

from contextlib import ExitStack
from pathlib import Path

from .. import mount
from ..drivers import Accounting

__all__ = ["Volume"]


class Volume:
    """A host directory that is bind-mounted while someone holds it."""

    def __init__(self, root: Path) -> None:
        self._source, self._target = root / "volume", root / "mounted"
        self._held = ExitStack()

    def create(self, id: str, parent: str | None = None) -> None:
        for directory in (self._source, self._target):
            directory.mkdir(exist_ok=True)

    def create_read_write(self, id: str, parent: str | None = None) -> None:
        self.create(id, parent)

    def get(self, id: str) -> Path:
        mount.mount(self._source, self._target, bind=True)
        self._held.callback(mount.unmount, self._target)
        return self._target

    def put(self, id: str) -> None:
        self._held.close()

    def accounting(self, id: str) -> Accounting:
        """Nothing is copied, and there is no metadata but the file system's."""
        return Accounting(copy_bytes=0, metadata_bytes=0)

    def sync(self) -> None:
        mount.sync_filesystem(self._source)

    def cleanup(self) -> None:
        self._held.close()

    def close(self) -> None:
        self._held.close()
