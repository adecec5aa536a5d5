"""The image graph's database: images, their names, layers, containers.

A row of `layers` or `containers` is written before the driver makes the layer it names, and turned `ready`
after; before the driver removes one its row is turned `removing`, and deleted after. So whatever the driver
holds has a row, and rows that are not ready, of which nobody alive is the author, tell what a crash left
behind.

What is read from disk is not believed: a chain id must be that of the diff ids below it, an image's id the
digest of its config, a layer that is needed must be ready. That is looked at when a graph is opened, before
anything that seems to be left over is removed.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .database import UnfitRowError, database_errors, look_through
from .drivers.base import check_id
from .errors import BlocksnapError, NotSupportedError, PoolFormatError
from .graph_names import chain_id, check_container_name, check_image_name
from .oci.digest import check_digest, new_hash

__all__ = ["ContainerRow", "GraphStore", "ImageRow", "LayerRow"]

_APPLICATION_ID = 0x62736772
_VERSION = 1
_SCHEMA = """
CREATE TABLE layers (
    id       TEXT PRIMARY KEY,
    chain_id TEXT NOT NULL,
    diff_id  TEXT NOT NULL,
    parent   TEXT REFERENCES layers (id),
    size     INTEGER NOT NULL DEFAULT 0,
    state    TEXT NOT NULL DEFAULT 'creating' CHECK (state IN ('creating', 'ready', 'removing'))
) STRICT;
CREATE UNIQUE INDEX ready_layers ON layers (chain_id) WHERE state = 'ready';
CREATE INDEX layer_parents ON layers (parent);
CREATE TABLE images (
    id      TEXT PRIMARY KEY,
    config  BLOB NOT NULL,
    layer   TEXT REFERENCES layers (id)
) STRICT;
CREATE INDEX image_layers ON images (layer);
CREATE TABLE image_names (
    name  TEXT PRIMARY KEY,
    image TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE
) STRICT;
CREATE TABLE containers (
    id      TEXT PRIMARY KEY,
    name    TEXT NOT NULL UNIQUE,
    image   TEXT NOT NULL REFERENCES images (id),
    state   TEXT NOT NULL DEFAULT 'creating' CHECK (state IN ('creating', 'ready', 'removing'))
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class LayerRow:
    """id and parent are the driver's; size is of file contents in bytes."""

    id: str
    chain_id: str
    diff_id: str
    parent: str | None
    size: int
    state: str


@dataclass(frozen=True, slots=True)
class ImageRow:
    id: str
    config: bytes
    layer: str | None


@dataclass(frozen=True, slots=True)
class ContainerRow:
    id: str
    name: str
    image: str
    state: str


class GraphStore:
    """One connection; each method is its own transaction unless it runs inside `transaction`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        with self._errors():
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            with self._errors():
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit at the end or, after an exception, change nothing; an inner one belongs to the outer."""
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            self._execute("BEGIN IMMEDIATE")
            try:
                yield
                self._execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # some errors have ended it already
                    self._db.execute("ROLLBACK")
                raise

    # ---- layers ----------------------------------------------------------------------------------

    def layer(self, id: str) -> LayerRow:
        return self._layers("WHERE id = ?", id)[0]

    def ready_layer(self, chain_id: str) -> LayerRow | None:
        found = self._layers("WHERE chain_id = ? AND state = 'ready'", chain_id)
        return found[0] if found else None

    def ready_layers(self) -> list[LayerRow]:
        return self._layers("WHERE state = 'ready' ORDER BY rowid")

    def unfinished_layers(self) -> list[LayerRow]:
        """Return the layers that are not ready, children before their parents."""
        return self._layers("WHERE state != 'ready' ORDER BY rowid DESC")

    def chain(self, layer: str | None) -> list[LayerRow]:
        """Return a layer and its ancestors, the base first."""
        found: list[LayerRow] = []
        while layer is not None:
            found.append(self.layer(layer))
            layer = found[-1].parent
        return found[::-1]

    def add_layer(self, id: str, chain_id: str, diff_id: str, parent: str | None) -> None:
        columns = (id, chain_id, diff_id, parent)
        self._run("INSERT INTO layers (id, chain_id, diff_id, parent) VALUES (?, ?, ?, ?)", *columns)

    def finish_layer(self, id: str, size: int) -> None:
        self._run("UPDATE layers SET state = 'ready', size = ? WHERE id = ?", size, id)

    def delete_layer(self, id: str) -> None:
        self._run("DELETE FROM layers WHERE id = ?", id)

    def release_layers(self, layer: str | None) -> list[LayerRow]:
        """Mark a layer and its ancestors for removal, down to the first that is still needed; return them."""
        released: list[LayerRow] = []
        with self.transaction():
            for row in reversed(self.chain(layer)):
                if self._is_needed(row.id):
                    break
                self._run("UPDATE layers SET state = 'removing' WHERE id = ?", row.id)
                released.append(row)
        return released

    def _is_needed(self, layer: str) -> bool:
        needed = """SELECT EXISTS (SELECT 1 FROM images WHERE layer = ?1)
                        OR EXISTS (SELECT 1 FROM layers WHERE parent = ?1 AND state != 'removing')"""
        return bool(self._rows(needed, layer)[0][0])

    def _layers(self, where: str, *values: str) -> list[LayerRow]:
        columns = "id, chain_id, diff_id, parent, size, state"
        return [LayerRow(*row) for row in self._rows(f"SELECT {columns} FROM layers {where}", *values)]

    # ---- images ----------------------------------------------------------------------------------

    def images(self) -> list[ImageRow]:
        return [ImageRow(*row) for row in self._rows("SELECT id, config, layer FROM images ORDER BY rowid")]

    def image(self, id: str) -> ImageRow | None:
        rows = self._rows("SELECT id, config, layer FROM images WHERE id = ?", id)
        return ImageRow(*rows[0]) if rows else None

    def names(self) -> dict[str, str]:
        """Return the image id that each name stands for."""
        return dict(self._rows("SELECT name, image FROM image_names ORDER BY name"))

    def add_image(self, id: str, config: bytes, layer: str | None) -> None:
        self._run("INSERT OR IGNORE INTO images (id, config, layer) VALUES (?, ?, ?)", id, config, layer)

    def delete_image(self, id: str) -> None:
        self._run("DELETE FROM images WHERE id = ?", id)

    def set_name(self, name: str, image: str) -> None:
        self._run("INSERT OR REPLACE INTO image_names (name, image) VALUES (?, ?)", name, image)

    def delete_name(self, name: str) -> None:
        self._run("DELETE FROM image_names WHERE name = ?", name)

    # ---- containers ------------------------------------------------------------------------------

    def containers(self) -> list[ContainerRow]:
        return self._containers("WHERE state = 'ready' ORDER BY name")

    def container(self, name: str) -> ContainerRow | None:
        found = self._containers("WHERE name = ?", name)
        return found[0] if found else None

    def containers_of(self, image: str) -> list[ContainerRow]:
        return self._containers("WHERE image = ? ORDER BY name", image)

    def unfinished_containers(self) -> list[ContainerRow]:
        return self._containers("WHERE state != 'ready'")

    def add_container(self, id: str, name: str, image: str) -> None:
        self._run("INSERT INTO containers (id, name, image) VALUES (?, ?, ?)", id, name, image)

    def set_container_state(self, id: str, state: str) -> None:
        self._run("UPDATE containers SET state = ? WHERE id = ?", state, id)

    def delete_container(self, id: str) -> None:
        self._run("DELETE FROM containers WHERE id = ?", id)

    def _containers(self, where: str, *values: str) -> list[ContainerRow]:
        rows = self._rows(f"SELECT id, name, image, state FROM containers {where}", *values)
        return [ContainerRow(*row) for row in rows]

    # ---- the database ----------------------------------------------------------------------------

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        # What a killed process wrote and did not sync says what is to be removed: it must last.
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        with self.transaction():
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            application = self._db.execute("PRAGMA application_id").fetchone()[0]
            if version == 0 and application == 0:
                self._create()
            elif application != _APPLICATION_ID:
                raise PoolFormatError(f"{self._path} is not an image graph: choose another root")
            elif version != _VERSION:
                raise NotSupportedError(
                    f"{self._path} has version {version}, this blocksnap knows {_VERSION}: use a newer one"
                )
            look_through(self._db)
            self._verify()

    def _create(self) -> None:
        for statement in _SCHEMA.split(";"):
            self._db.execute(statement)
        self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self._db.execute(f"PRAGMA user_version = {_VERSION}")

    def _verify(self) -> None:
        if broken := self._db.execute("PRAGMA foreign_key_check").fetchone():
            raise UnfitRowError(f"a row of {broken[0]} refers to one of {broken[2]} that is not there")
        try:
            layers = self._verified_layers()
            for image in self.images():
                digest = new_hash(check_digest(image.id, "an image's id"))
                digest.update(image.config)
                _require(image.id.endswith(f":{digest.hexdigest()}"), f"image {image.id} has another config")
                top = image.layer and layers[image.layer]
                _require(not top or top.state == "ready", f"image {image.id} has an unfinished layer")
            for name in self.names():
                check_image_name(name)
            for container in self._containers(""):
                check_id(container.id)
                check_container_name(container.name)
        except BlocksnapError as error:
            raise UnfitRowError(str(error)) from error

    def _verified_layers(self) -> dict[str, LayerRow]:
        """Return the layers by id; parents were written before their children, so a chain has an end."""
        found: dict[str, LayerRow] = {}
        for row in self._layers("ORDER BY rowid"):
            name = f"layer {check_id(row.id)}"
            check_digest(row.diff_id, name)
            parent = found.get(row.parent or "")
            _require(row.parent is None or parent is not None, f"{name} is older than its parent")
            chain = chain_id(parent.chain_id if parent else None, row.diff_id)
            _require(row.chain_id == chain, f"{name} has the wrong chain id")
            _require(row.size >= 0, f"{name} has {row.size} bytes")
            kept = row.state == "removing" or parent is None or parent.state != "removing"
            _require(kept, f"{name} lies on a layer that is being removed")
            whole = row.state != "ready" or parent is None or parent.state == "ready"
            _require(whole, f"{name} lies on a layer that is unfinished")
            found[row.id] = row
        return found

    def _rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._execute(statement, *values)

    def _run(self, statement: str, *values: object) -> None:
        with self.transaction():
            self._execute(statement, *values)

    def _execute(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self._errors():
            return self._db.execute(statement, values).fetchall()

    def _errors(self) -> AbstractContextManager[None]:
        return database_errors(str(self._path), "restore it, or choose another root")


def _require(fits: bool, otherwise: str) -> None:
    if not fits:
        raise UnfitRowError(otherwise)
