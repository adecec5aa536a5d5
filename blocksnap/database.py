"""What is the same for every SQLite database: its errors in our words, and the look at one before it is used.

A database is read from disk, so nothing in it is believed. SQLite finds pages that do not hang together; it
has no checksums, so whoever reads rows still checks what is in them.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import (
    ArgumentError,
    BlocksnapError,
    BusyError,
    DamagedMetadataError,
    DeviceIOError,
    NoSpaceError,
    PrivilegeError,
    system_errors,
)

__all__ = ["UnfitRowError", "database_errors", "look_through"]

_ERRORS: dict[int, tuple[type[BlocksnapError], str]] = {
    sqlite3.SQLITE_FULL: (NoSpaceError, "free space on its file system"),
    sqlite3.SQLITE_BUSY: (BusyError, "another program has it open: end it"),
    sqlite3.SQLITE_LOCKED: (BusyError, "another program has it open: end it"),
    sqlite3.SQLITE_PROTOCOL: (BusyError, "another program has it open: end it"),
    sqlite3.SQLITE_PERM: (PrivilegeError, "its owner must be able to write it"),
    sqlite3.SQLITE_READONLY: (PrivilegeError, "its owner must be able to write it"),
    sqlite3.SQLITE_CANTOPEN: (DeviceIOError, "see that its directory is there and files can be opened"),
}
_DAMAGE = (
    sqlite3.SQLITE_ERROR,  # a table or a column lacks
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_MISMATCH,
)


class UnfitRowError(ValueError):
    """A row, named by the message, that we cannot have written."""


@contextmanager
def database_errors(name: str, mend: str) -> Iterator[None]:
    """Turn what goes wrong with a database into the fitting error; mend is what to do with a damaged one."""
    try:
        with system_errors(name):
            yield
    except sqlite3.ProgrammingError as error:  # it was closed
        raise ArgumentError(f"{name}: {error}") from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        kind, cure = _ERRORS.get(code, (DeviceIOError, "see the system's log"))
        if code in _DAMAGE:
            kind, cure = DamagedMetadataError, mend
        raise kind(f"{name}: {_one_line(str(error))}: {cure}") from error
    except MemoryError as error:  # what a page says of itself can ask for any amount
        raise DamagedMetadataError(f"{name}: reading it takes more memory than there is: {mend}") from error
    except UnicodeDecodeError as error:
        raise DamagedMetadataError(f"{name}: text in it is not UTF-8: {mend}") from error
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{name} keeps no text that is not UTF-8: {error.object!r}") from error
    except UnfitRowError as error:
        raise DamagedMetadataError(f"{name}: {_one_line(str(error))}: {mend}") from error


def look_through(database: sqlite3.Connection) -> None:
    """Raise UnfitRowError unless the database hangs together and nothing in it acts by itself."""
    database.execute("PRAGMA trusted_schema = OFF")
    found = database.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise UnfitRowError(found)
    active = "SELECT type, name FROM sqlite_schema WHERE type NOT IN ('table', 'index')"
    if added := database.execute(active).fetchone():
        raise UnfitRowError(f"it has a {added[0]}, {added[1]!r}")


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
