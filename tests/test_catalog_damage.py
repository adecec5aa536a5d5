"""A catalog that is not as blocksnap wrote it: one clear error, whoever asks, and nothing is changed."""

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from blocksnap import BlocksnapError, Pool, errors

SIZE = 1 << 20
FLIPS = 300

INTENT = "INSERT INTO intent (action, id, name, size, created, labels, completing_id) VALUES"
DAMAGE = [
    "UPDATE device SET id = -1 WHERE id = 1",
    "UPDATE device SET name = '../../etc/passwd' WHERE id = 1",
    "UPDATE device SET name = '' WHERE id = 1",
    "UPDATE device SET name = x'ff' WHERE id = 1",
    "UPDATE device SET name = CAST(x'ff' AS TEXT) WHERE id = 1",
    "UPDATE device SET name = 'a' || char(10) || 'b' WHERE id = 1",
    "UPDATE device SET name = '2/a', condemned = 1 WHERE id = 1",
    "UPDATE device SET size = 'abc' WHERE id = 1",
    "UPDATE device SET size = 0 WHERE id = 1",
    "UPDATE device SET size = -512 WHERE id = 1",
    "UPDATE device SET size = 513 WHERE id = 1",
    "UPDATE device SET size = 1.5 WHERE id = 1",
    "UPDATE device SET size = 9223372036854775296 WHERE id = 1",
    "UPDATE device SET origin = 'x' WHERE id = 1",
    "UPDATE device SET origin = 16777216 WHERE id = 1",
    "UPDATE device SET created = 'yesterday' WHERE id = 1",
    "UPDATE device SET created = -9e30 WHERE id = 1",
    "UPDATE device SET labels = '{' WHERE id = 1",
    "UPDATE device SET labels = '[1]' WHERE id = 1",
    "UPDATE device SET labels = '{\"a\": 1}' WHERE id = 1",
    "UPDATE device SET labels = x'00ff' WHERE id = 1",
    f"UPDATE device SET labels = '{'[' * 100_000}' WHERE id = 1",
    "UPDATE device SET condemned = 'yes' WHERE id = 1",
    "UPDATE device SET external_origin = x'2f' WHERE id = 1",
    "UPDATE device SET external_origin = '../base' WHERE id = 1",
    "DELETE FROM pool",
    "INSERT INTO pool (transaction_id, holding) VALUES (5, 0)",
    "UPDATE pool SET transaction_id = 'x'",
    "UPDATE pool SET transaction_id = -1",
    "UPDATE pool SET holding = 'x'",
    "DROP TABLE device",
    "DROP TABLE pool",
    "DROP TABLE intent",
    "ALTER TABLE device DROP COLUMN labels",
    f"{INTENT} ('melt', 9, 'q', 4096, 1, '{{}}', 4)",
    f"{INTENT} ('create', 9, 'q', 4096, 1, '{{}}', 99)",
    f"{INTENT} ('create', 9, 'q', -1, 1, '{{}}', 4)",
    "CREATE TRIGGER t AFTER INSERT ON device BEGIN DELETE FROM device; END",
    "CREATE VIEW v AS SELECT 1",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalog of a closed pool with a device."""
    path = tmp_path_factory.mktemp("whole") / "pool"
    with Pool.create(path, size="16M", block_size="64K") as pool:
        pool.create_device("base", SIZE, labels={"a": "b"}).write(0, b"x" * 4096)
        pool.device("base").snapshot("copy")
        pool.device("copy").delete()
    return path / "catalog.db"


@pytest.fixture
def catalog(whole: Path) -> Iterator[Path]:
    """That catalog, as good as new; nothing else of the pool is changed."""
    before = {path.name: path.read_bytes() for path in whole.parent.iterdir()}
    yield whole
    assert all((whole.parent / name).read_bytes() == before[name] for name in ("metadata", "data"))
    for path in whole.parent.iterdir():
        path.unlink()
    for name, content in before.items():
        (whole.parent / name).write_bytes(content)


def refuse(catalog: Path) -> list[str]:
    """Open the pool in every way there is; return what the errors say."""
    said = []
    for read_only, adopt in ((True, False), (False, False), (False, True)):
        before = catalog.read_bytes()
        with pytest.raises(errors.DamagedMetadataError) as caught:
            Pool.open(catalog.parent, read_only=read_only, adopt=adopt)
        assert catalog.read_bytes() == before
        said.append(str(caught.value))
    return said


@pytest.mark.parametrize("statement", DAMAGE, ids=[statement[:50] for statement in DAMAGE])
def test_what_cannot_be_in_a_catalog_is_refused_in_one_line(catalog: Path, statement: str) -> None:
    with closing(sqlite3.connect(catalog)) as database, database:
        database.execute("PRAGMA ignore_check_constraints = ON")
        database.execute(statement)
    for message in refuse(catalog):
        assert message.startswith(f"{catalog}: ")
        assert message.endswith('move it away to open the pool with devices named "thin-<id>"')
        assert message.isprintable()
        assert len(message) < 500


def test_moving_a_damaged_catalog_away_opens_the_pool(catalog: Path) -> None:
    catalog.write_bytes(b"\0" * 8192)
    with pytest.raises(errors.DamagedMetadataError, match="move it away"):
        Pool.open(catalog.parent)
    catalog.rename(catalog.with_name("damaged"))
    with Pool.open(catalog.parent, read_only=True) as pool:
        assert [device.read(0, 1) for device in pool.devices()] == [b"x"]


def test_flipped_bytes_are_an_error_or_harmless(catalog: Path) -> None:
    sound = catalog.read_bytes()
    said = []
    for seed in range(FLIPS):
        rng = random.Random(seed)
        damaged = bytearray(sound)
        for _ in range(rng.choice((1, 1, 3, 20))):
            page = rng.randrange(len(sound) // 4096) * 4096
            damaged[page + rng.choice((rng.randrange(100), rng.randrange(4096)))] = rng.randrange(256)
        catalog.write_bytes(damaged[: rng.randrange(len(sound))] if seed % 10 == 0 else damaged)
        try:
            with Pool.open(catalog.parent, read_only=True) as pool:
                shown = [(d.name, d.size, d.created, dict(d.labels), d.origin) for d in pool.devices()]
                assert len(shown) == 1
        except BlocksnapError as error:
            said.append(str(error))
    assert all(message.isprintable() for message in said)
    assert 0 < len(said) < FLIPS


def test_labels_that_are_no_strings_are_refused_when_they_are_given(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "pool", size="16M") as pool:
        with pytest.raises(errors.ArgumentError, match="label 'a': 1"):
            pool.create_device("base", SIZE, labels={"a": 1})  # type: ignore[dict-item]
        assert pool.devices() == []
