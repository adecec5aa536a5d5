"""The catalog of a pool: names, sizes, origins and labels of its thin devices, and the operation under way.

One truth out of two stores. The table `device` is the state at `transaction_id`; the table `intent` holds the
operations that lead to `transaction_id + 1`. A change is

1. `intend`: the operations are written down and synced;
2. the pool does them and commits them together with transaction id + 1, in one superblock write;
3. `finish`: the operations are applied to `device` and the number moves.

So on open the pool's number says which of the two states it holds: equal to `transaction_id`, step 2 did not
happen and the intent is dropped; one more, it did and the intent is applied. Any other number comes from
outside and is refused.

SQLite runs in WAL mode: a commit is one append and one fsync, and no file must be unlinked durably. (With a
rollback journal, synchronous=FULL does not sync the directory after the unlink: the journal of an intent may
come back after a power cut and undo it although the pool has gone on.) `intend` syncs (synchronous=FULL).
`finish` does not (NORMAL): when it is lost, the next open repeats it, and the log keeps the order. The lock
is exclusive: the pool's own lock lets one process in, and SQLite then needs no shared-memory file.
"""

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from reprlib import repr as shown
from typing import Self

from .database import UnfitRowError, database_errors, look_through
from .device_record import (
    COLUMNS,
    MAX_DEVICE_ID,
    Action,
    DeviceRecord,
    Operation,
    labels_text,
    operation_of,
    record_of,
    row_of,
)
from .errors import PoolFormatError, system_errors

__all__ = ["ADOPT", "Catalog", "sync_directory"]

ADOPT = 'take over the pool as it is with "blocksnap pool adopt"'
_MOVE_AWAY = 'move it away to open the pool with devices named "thin-<id>"'
_VERSION = 2
_APPLICATION_ID = 0x62736E70
_PLACES = ", ".join("?" * len(COLUMNS.split(",")))
_TO_VERSION_2 = """
ALTER TABLE pool ADD COLUMN holding INTEGER NOT NULL DEFAULT 0;
ALTER TABLE device ADD COLUMN external_origin TEXT;
ALTER TABLE device ADD COLUMN condemned INTEGER NOT NULL DEFAULT 0;
ALTER TABLE intent ADD COLUMN external_origin TEXT;
ALTER TABLE intent ADD COLUMN condemned INTEGER NOT NULL DEFAULT 0;
PRAGMA user_version = 2;
"""
_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = 1;
CREATE TABLE pool (transaction_id INTEGER NOT NULL);
CREATE TABLE device (
    id INTEGER PRIMARY KEY CHECK (id BETWEEN 0 AND {MAX_DEVICE_ID}),
    name TEXT NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    origin INTEGER,
    created INTEGER NOT NULL,
    labels TEXT NOT NULL
);
CREATE TABLE intent (
    sequence INTEGER PRIMARY KEY,
    action TEXT NOT NULL,
    id INTEGER NOT NULL,
    name TEXT NOT NULL,
    size INTEGER NOT NULL,
    origin INTEGER,
    created INTEGER NOT NULL,
    labels TEXT NOT NULL,
    completing_id INTEGER NOT NULL
);
{_TO_VERSION_2}
"""


class Catalog:
    """An open catalog; the caller holds the pool's lock."""

    def __init__(self, database: sqlite3.Connection, path: Path | None) -> None:
        self._database = database
        self._name = str(path) if path else "the catalog"
        self.path = path

    @classmethod
    def create(cls, path: Path | None, transaction_id: int, records: Sequence[DeviceRecord] = ()) -> Self:
        """Make the catalog of a pool that is at that transaction; without a path it lives in memory.

        It appears under its name only when it is complete.
        """
        if path is None:
            return cls._fill(_connect(":memory:"), None, transaction_id, records)
        unfinished = path.with_name(path.name + ".new")
        with system_errors(str(path)):
            unfinished.unlink(missing_ok=True)
            os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
            with _errors(str(unfinished)):
                cls._fill(_connect(str(unfinished)), unfinished, transaction_id, records).close()
            unfinished.rename(path)
            sync_directory(path.parent)
        return cls.open(path)

    @classmethod
    def _fill(
        cls,
        database: sqlite3.Connection,
        path: Path | None,
        transaction_id: int,
        records: Sequence[DeviceRecord],
    ) -> Self:
        with _closed_on_failure(database):
            database.executescript(_SCHEMA)
            database.execute("INSERT INTO pool (transaction_id) VALUES (0)")
            catalog = cls(database, path)
            catalog.adopt(records, transaction_id)
        return catalog

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Self:
        """Open an existing catalog; read-only works on a copy in memory: recovery changes nothing on disk."""
        with _errors(str(path)):
            database = _connect_copy(path) if read_only else _connect(str(path))
            with _closed_on_failure(database):
                catalog = cls(database, path)
                catalog._verify()
        return catalog

    def close(self) -> None:
        with _errors(self._name):
            self._database.close()

    @property
    def transaction_id(self) -> int:
        """The transaction id of the pool state that the device table describes."""
        with _errors(self._name):
            return int(self._database.execute("SELECT transaction_id FROM pool").fetchone()[0])

    @property
    def holding(self) -> bool:
        """Whether the metadata snapshot that the pool may hold is ours."""
        with _errors(self._name):
            return bool(self._database.execute("SELECT holding FROM pool").fetchone()[0])

    def note_holding(self, holding: bool) -> None:
        """Write down that we are about to hold a metadata snapshot, or have released it."""
        with self._change(durable=holding):
            self._database.execute("UPDATE pool SET holding = ?", (holding,))

    def records(self) -> list[DeviceRecord]:
        """Return every device by ascending id."""
        with _errors(self._name):
            return [
                record_of(row) for row in self._database.execute(f"SELECT {COLUMNS} FROM device ORDER BY id")
            ]

    def intent(self) -> list[Operation]:
        """Return the operations that were intended and neither finished nor undone."""
        with _errors(self._name):
            rows = self._database.execute(
                f"SELECT action, {COLUMNS} FROM intent ORDER BY sequence"
            ).fetchall()
            return [operation_of(row[0], row[1:]) for row in rows]

    def intend(self, operations: Sequence[Operation], *, again: bool = False) -> int:
        """Write operations down durably; return the transaction id that completes them.

        An earlier intent must have been finished in the pool or undone: what is left of it is applied first.
        With `again` it is that of the same transaction, and replaced.
        """
        with self._change(durable=True):
            if again:
                self._database.execute("DELETE FROM intent")
            self._apply_intent()
            completing_id = self._database.execute("SELECT transaction_id + 1 FROM pool").fetchone()[0]
            self._database.executemany(
                f"INSERT INTO intent (action, {COLUMNS}, completing_id) VALUES (?, {_PLACES}, ?)",
                [(operation.action, *row_of(operation.record), completing_id) for operation in operations],
            )
        return int(completing_id)

    def finish(self) -> None:
        """Apply the intent: the pool has committed it."""
        with self._change(durable=False):
            self._apply_intent()

    def undo(self) -> None:
        """Drop the intent: the pool has not committed it and never will."""
        with self._change(durable=True):
            self._database.execute("DELETE FROM intent")

    def recover(self, pool_transaction_id: int) -> None:
        """Finish or undo what a crash interrupted; PoolFormatError if the numbers do not belong together."""
        own = self.transaction_id
        intended = self.intent()
        if pool_transaction_id == own and not intended:
            return
        if pool_transaction_id == own:
            self.undo()
        elif pool_transaction_id == own + 1 and intended:
            self.finish()
        else:
            raise PoolFormatError(
                f"{self._name} describes transaction {own}, but the pool is at {pool_transaction_id}:"
                f" put back the catalog that belongs to it, or {ADOPT}"
            )

    def adopt(self, records: Sequence[DeviceRecord], transaction_id: int) -> None:
        """Replace everything by what the pool was found to hold."""
        with self._change(durable=True):
            self._database.execute("DELETE FROM intent")
            self._database.execute("DELETE FROM device")
            self._database.executemany(
                f"INSERT INTO device ({COLUMNS}) VALUES ({_PLACES})",
                [row_of(record) for record in records],
            )
            self._database.execute("UPDATE pool SET transaction_id = ?", (transaction_id,))

    def _apply_intent(self) -> None:
        operations = self.intent()
        for operation in operations:
            self._apply(operation)
        if operations:
            self._database.execute("UPDATE pool SET transaction_id = (SELECT max(completing_id) FROM intent)")
            self._database.execute("DELETE FROM intent")

    def _apply(self, operation: Operation) -> None:
        record = operation.record
        match operation.action:
            case Action.CREATE:
                self._database.execute(f"INSERT INTO device ({COLUMNS}) VALUES ({_PLACES})", row_of(record))
            case Action.DELETE:
                self._database.execute("DELETE FROM device WHERE id = ?", (record.id,))
                self._database.execute("UPDATE device SET origin = NULL WHERE origin = ?", (record.id,))
            case Action.RESIZE | Action.SHRINK:
                self._database.execute("UPDATE device SET size = ? WHERE id = ?", (record.size, record.id))
            case Action.RELABEL:
                self._database.execute(
                    "UPDATE device SET labels = ? WHERE id = ?", (labels_text(record), record.id)
                )
            case Action.UNMAKE:
                pass
            case Action.CONDEMN:
                self._database.execute(
                    "UPDATE device SET name = ?, condemned = 1 WHERE id = ?", (record.name, record.id)
                )
                self._database.execute("UPDATE device SET origin = NULL WHERE origin = ?", (record.id,))

    @contextmanager
    def _change(self, *, durable: bool) -> Iterator[None]:
        with _errors(self._name):
            self._database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                yield

    def _verify(self) -> None:
        application = self._database.execute("PRAGMA application_id").fetchone()[0]
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if application != _APPLICATION_ID:
            raise PoolFormatError(
                f"{self._name} is not a catalog of blocksnap: put the right one there, or {_MOVE_AWAY}"
            )
        look_through(self._database)
        if version == 1:
            self._database.executescript(f"BEGIN; {_TO_VERSION_2} COMMIT;")
            version = _VERSION
        if version != _VERSION:
            raise PoolFormatError(
                f"{self._name} has version {version}, this blocksnap reads {_VERSION}: use a newer one"
            )
        self._verify_rows()

    def _verify_rows(self) -> None:
        rows = self._database.execute("SELECT transaction_id, holding FROM pool").fetchall()
        if len(rows) != 1 or not all(isinstance(value, int) and value >= 0 for value in rows[0]):
            raise UnfitRowError(f"it describes the state of a pool as {shown(rows)}")
        self.records()
        self.intent()
        completing = self._database.execute("SELECT DISTINCT completing_id FROM intent").fetchall()
        if completing not in ([], [(rows[0][0] + 1,)]):
            raise UnfitRowError(
                f"its intent leads from transaction {rows[0][0]} to {shown(completing[0][0])}"
            )


def _connect(database: str) -> sqlite3.Connection:
    connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    with _closed_on_failure(connection):
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    return connection


@contextmanager
def _closed_on_failure(database: sqlite3.Connection) -> Iterator[None]:
    """Close a connection when the body fails: it holds its file, and with it the file system."""
    try:
        yield
    except BaseException:
        database.close()
        raise


def _connect_copy(path: Path) -> sqlite3.Connection:
    """Open a copy of the database and its log; a read-only connection could not replay the log."""
    memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    log = path.with_name(path.name + "-wal")
    if not log.exists():  # closed in order: nothing but memory is needed
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(uri, uri=True)) as database:
            database.backup(memory)
        return memory
    with tempfile.TemporaryDirectory(prefix="blocksnap-catalog-") as folder:
        shutil.copyfile(path, Path(folder, "catalog"))
        shutil.copyfile(log, Path(folder, "catalog-wal"))
        copy = _connect(str(Path(folder, "catalog")))
        copy.backup(memory)
        copy.close()
    return memory


def sync_directory(path: Path) -> None:
    """Make creations, renames and removals in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _errors(name: str) -> AbstractContextManager[None]:
    return database_errors(name, f"restore it, or {_MOVE_AWAY}")
