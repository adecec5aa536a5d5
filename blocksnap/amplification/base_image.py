"""The image that a workload finds: two layers, one with a large thing, above it one with many small files.

The large thing is a SQLite database, a file, or a tree that was made beforehand (a database cluster, the
files of fio jobs) and is copied, so that every driver gets the same bytes.
"""

import random
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..drivers.directory import allocated_bytes
from ..drivers.tree_copy import copy_tree
from . import operations

__all__ = ["BaseImage"]

_SEED = 20_190_522  # not that of the workloads, lest one writes what the image holds already
_MIB = 1 << 20
_ROW_BYTES = 217  # 200 of payload, the rest of a row, its share of the page header and of the inner pages


@dataclass(frozen=True, slots=True)
class BaseImage:
    """What is below the container. `tree` is a directory that goes into the lower layer as it is."""

    database_bytes: int = 64 * _MIB
    large_file_bytes: int = 0
    small_files: int = 4000
    small_file_bytes: int = 4096
    tree: Path | None = None

    LAYERS = 2

    @property
    def tree_bytes(self) -> int:
        return 0 if self.tree is None else allocated_bytes(self.tree)

    @property
    def total_bytes(self) -> int:
        small = self.small_files * self.small_file_bytes
        return self.database_bytes + self.large_file_bytes + self.tree_bytes + small

    def prepare(self, root: Path, layer: int) -> None:
        """Write layer 0 (the large thing) or layer 1 (small files) below root, which is empty for layer 0."""
        if layer != 0:
            _write_small_files(root / operations.SMALL_FILES, self.small_files, self.small_file_bytes)
            return
        if self.tree is not None:
            copy_tree(self.tree, root, reflink=False)
        if self.database_bytes:
            _write_database(root / operations.DATABASE, self.database_bytes)
        if self.large_file_bytes:
            _write_large_file(root / operations.LARGE_FILE, self.large_file_bytes)


def _write_database(path: Path, size: int) -> None:
    """Write a SQLite database of about `size` bytes (within 2 %), in rollback-journal mode."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA synchronous = OFF")
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("CREATE TABLE record (id INTEGER PRIMARY KEY, payload BLOB NOT NULL)")
    database.execute("BEGIN")
    database.executemany("INSERT INTO record (payload) VALUES (?)", _payloads(size // _ROW_BYTES))
    database.execute("COMMIT")
    database.execute("PRAGMA journal_mode = DELETE")
    database.close()


def _payloads(rows: int) -> Iterator[tuple[bytes]]:
    source = random.Random(_SEED)
    return ((source.randbytes(200),) for _ in range(rows))


def _write_large_file(path: Path, size: int) -> None:
    source = random.Random(_SEED)
    with path.open("wb") as file:
        for begin in range(0, size, _MIB):
            file.write(source.randbytes(min(_MIB, size - begin)))


def _write_small_files(directory: Path, count: int, size: int) -> None:
    source = random.Random(_SEED)
    for number in range(count):
        parent = directory / f"{number // 100:03}"
        parent.mkdir(parents=True, exist_ok=True)
        (parent / f"{number:06}").write_bytes(source.randbytes(size))
