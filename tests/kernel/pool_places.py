"""Where a test's pool lies: files in a directory, or two block devices; and the same pool again and again."""

import os
import shutil
from pathlib import Path
from typing import Any

from blocksnap.mount import LoopDevice
from blocksnap.pool_files import wipe_superblock
from tests.kernel.devices import BLOCK

__all__ = ["Places"]


def _used(content: bytes) -> bytes:
    """Return a file up to its last data block that is not zero."""
    length = len(content.rstrip(b"\0"))
    return content[: -(-length // BLOCK) * BLOCK]


class Places:
    """The parts of one pool after another; `options` are what Pool.create and Pool.open take."""

    def __init__(self, folder: Path, *, devices: bool, metadata_size: int = 2 << 20, data_size: int) -> None:
        self._folder = folder
        self._loops: list[LoopDevice] = []
        self._kept: dict[Path, tuple[bytes, int]] = {}
        if devices:
            (folder / "pool").mkdir()
            for name, size in (("metadata", metadata_size), ("data", data_size)):
                with self._part(name).open("wb") as file:
                    file.truncate(size)
                self._loops.append(LoopDevice.attach(self._part(name)))

    def _part(self, name: str) -> Path:
        return self._folder / "pool" / name

    @property
    def options(self) -> dict[str, Any]:
        if not self._loops:
            return {"path": self._folder / "pool"}
        metadata, data = (loop.path for loop in self._loops)
        return {"metadata": metadata, "data": data, "catalog": self._part("catalog.db")}

    @property
    def metadata(self) -> str:
        return self._loops[0].path if self._loops else str(self._part("metadata"))

    @property
    def on_devices(self) -> bool:
        return bool(self._loops)

    def clear(self) -> None:
        """Take away the pool."""
        if not self._loops:
            shutil.rmtree(self._folder / "pool", ignore_errors=True)
            return
        wipe_superblock(Path(self.metadata))
        self._remove_catalog()

    def _remove_catalog(self) -> None:
        for part in self._part("").glob("catalog.db*"):
            part.unlink()

    def keep(self) -> None:
        """Remember the pool, which nobody has open, for `restore`."""
        parts = self._part("").iterdir()
        self._kept = {part: (_used(part.read_bytes()), part.stat().st_size) for part in parts}

    def restore(self) -> None:
        """Put back what was kept. What lies behind it in metadata and data nothing leads to."""
        self._remove_catalog()
        for part, (content, size) in self._kept.items():
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT)
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, size)
            os.close(descriptor)

    def close(self) -> None:
        for loop in self._loops:
            loop.detach()
