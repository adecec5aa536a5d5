"""A driver's root that is not as blocksnap left it: the graph's database, the notes beside the layers."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from blocksnap import BlocksnapError, drivers, errors
from blocksnap.drivers import Driver
from blocksnap.drivers.loop_counter import LoopCounter
from blocksnap.drivers.snapshot_device import Figures
from blocksnap.graph import ImageGraph
from tests.layouts import Layout

DRIVERS = [name for name in ("vfs", "overlay", "unionfs") if dict(drivers.available()).get(name) is None]

DATABASE = [
    "UPDATE layers SET parent = id",
    "UPDATE layers SET parent = NULL",
    "UPDATE layers SET parent = '../../x' WHERE parent IS NOT NULL",
    "UPDATE layers SET parent = (SELECT id FROM layers other WHERE other.rowid = 3 - layers.rowid)",
    "UPDATE layers SET id = '../../x' WHERE rowid = 1",
    "UPDATE layers SET state = 'removing'",
    "UPDATE layers SET state = 'removing' WHERE parent IS NULL",
    "UPDATE layers SET state = 'creating' WHERE parent IS NULL",
    "UPDATE layers SET chain_id = diff_id || 'x'",
    "UPDATE layers SET diff_id = 'y'",
    "UPDATE layers SET size = -1",
    "DELETE FROM layers WHERE parent IS NULL",
    "DELETE FROM images",
    "UPDATE images SET config = x'7b7d'",
    "UPDATE images SET config = x'ff'",
    "UPDATE images SET layer = 'none'",
    "UPDATE images SET id = 'sha256:0'",
    "UPDATE image_names SET name = 'a' || char(10)",
    "UPDATE image_names SET image = 'none'",
    "UPDATE containers SET id = '../../x'",
    "UPDATE containers SET name = '../x'",
    "UPDATE containers SET image = 'none'",
    "DROP TABLE image_names",
    "CREATE TRIGGER t AFTER UPDATE ON containers BEGIN DELETE FROM images; END",
]
NOTES: dict[str, Callable[[str], bytes]] = {
    "no text": lambda _: b"\xff\xfe\n",
    "a path": lambda _: b"../../../victim\n",
    "options": lambda _: b"x,upperdir=/,lowerdir=/",
    "nothing": lambda _: b"",
    "several lines": lambda _: b"a\nb\nc\n",
    "a negative number": lambda _: b"-1\n",
    "too large a number": lambda _: b"9" * 30,
    "too much": lambda _: b"a" * 100_000,
    "its own id": str.encode,
}


def import_image(directory: Path, name: str) -> Path:
    """Make a root with an image of two layers and a container that wrote a file."""
    layout = Layout(directory / "layout")
    layout.write(layout.manifest())
    with drivers.open(name, directory / "root") as driver, ImageGraph(driver) as graph:
        graph.import_image(directory / "layout", name="app:1")
        graph.create_container("db", "app:1")
        with graph.container("db") as path:
            (path / "new").write_text("x")
    return directory / "root"


def look(driver: Driver) -> None:
    """Ask everything of every layer, and mount it."""
    driver.status()
    for id in driver.layers():
        driver.parent(id)
        driver.metadata(id)
        driver.accounting(id)
        with driver.mounted(id):
            pass


def use(driver: Driver) -> None:
    """Write to the container, and remove it and the image."""
    look(driver)
    with ImageGraph(driver) as graph:
        graph.tree()
        graph.containers()
        with graph.container("db") as path:
            (path / "newer").write_text("y")
        graph.diff_container("db")
        graph.remove_container("db")
        graph.remove_image("app:1")


@pytest.fixture(params=DRIVERS)
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Such a root, with something beside it that nobody may touch."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "parent").write_text("\n")
    yield import_image(tmp_path, request.param)
    assert (victim / "parent").read_text() == "\n"
    assert [path.name for path in victim.iterdir()] == ["parent"]


def name_of(root: Path) -> str:
    return (root / "driver").read_text().strip()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_image(tmp_path_factory.mktemp("sound"), "vfs")


@pytest.mark.parametrize("statement", DATABASE)
def test_a_graph_that_cannot_be_is_refused_and_nothing_is_removed(
    sound: Path, tmp_path: Path, statement: str
) -> None:
    root = tmp_path / "root"
    shutil.copytree(sound, root, symlinks=True)
    with closing(sqlite3.connect(root / "graph.db")) as database, database:
        database.execute("PRAGMA foreign_keys = OFF")
        database.execute(statement)
    with drivers.open("vfs", root) as driver:
        layers = driver.layers()
        with pytest.raises(errors.DamagedMetadataError) as caught:
            ImageGraph(driver)
        assert driver.layers() == layers
    message = str(caught.value)
    assert message.startswith(f"{root / 'graph.db'}: ")
    assert message.endswith("restore it, or choose another root")
    assert message.isprintable()


@pytest.mark.parametrize("kind", NOTES)
def test_a_note_that_no_driver_wrote_is_an_error_in_one_line_or_harmless(root: Path, kind: str) -> None:
    name = name_of(root)
    notes = [path for path in (root / name).glob("*/*") if path.is_file()]
    assert "parent" in {path.name for path in notes}
    refused = 0
    for note in [root / "driver", *notes]:
        before = note.read_bytes()
        note.write_bytes(NOTES[kind](note.parent.name))
        try:
            with drivers.open(name, root) as driver:
                look(driver)
        except BlocksnapError as error:
            refused += 1
            assert str(error).isprintable(), note  # noqa: PT017 - not the only way it may end
        note.write_bytes(before)
    assert refused
    with drivers.open(name, root) as driver:
        use(driver)
        assert driver.layers() == []


def test_notes_that_are_gone_are_named(root: Path) -> None:
    name = name_of(root)
    notes = [path for path in (root / name).glob("*/*") if path.is_file() and path.name != "parent"]
    for note in notes:
        before = note.read_bytes()
        note.unlink()
        missing = pytest.raises(errors.DamagedMetadataError, match=f"{note} is missing: restore it")
        with drivers.open(name, root) as driver, missing:
            look(driver)
        note.write_bytes(before)


def test_parents_that_go_round_in_a_circle_are_refused(root: Path) -> None:
    name = name_of(root)
    with drivers.open(name, root) as driver:
        base = next(id for id in driver.layers() if driver.parent(id) is None)
        (child,) = driver.children(base)
    (root / name / base / "parent").write_text(f"{child}\n")
    with drivers.open(name, root) as driver:
        assert driver.parent(base) == child
        with suppress(errors.DamagedMetadataError):
            driver.metadata(base)
        if name != "vfs":
            with pytest.raises(errors.DamagedMetadataError, match="which no driver wrote"):
                driver.metadata(base)


def test_references_of_nobody_hold_no_layer(root: Path) -> None:
    with drivers.open(name_of(root), root) as driver:
        for id in driver.layers():
            (root / "references" / id).write_bytes(b"\xff\0 1 2\nx y z\n1 2\n" + b"\0" * 100)
            assert driver.holders(id) == []
        use(driver)


@pytest.mark.parametrize("text", [b"", b"\0" * 20, b"\xff", b"12 13", b"-5", "²".encode()])
def test_a_sum_that_no_counter_wrote_is_unknown(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "written").write_bytes(text)
    counter = LoopCounter(tmp_path / "written")
    assert counter.total() is None
    (tmp_path / "written.since").write_bytes(text)
    with counter.ending([]):
        pass
    assert not (tmp_path / "written.since").exists()
    assert counter.total() is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 4000,
        "[]",
        "{}",
        '{"size": 4096}',
        '{"size": 4096, "chunk_size": 0, "writable": true}',
        '{"size": "4096", "chunk_size": 4096, "writable": true}',
        '{"size": 4096, "chunk_size": 4096, "writable": 1}',
        '{"size": 4096, "chunk_size": 4096, "writable": true, "before": -1}',
        '{"size": 4096, "chunk_size": 4096, "writable": true, "more": 1}',
    ],
)
def test_figures_that_no_driver_wrote_are_refused(tmp_path: Path, text: str) -> None:
    Figures(4096, 4096, writable=True).save(tmp_path / "figures")
    assert Figures.load(tmp_path / "figures") == Figures(4096, 4096, writable=True)
    (tmp_path / "figures").write_text(text)
    with pytest.raises(errors.DamagedMetadataError, match="which no driver wrote"):
        Figures.load(tmp_path / "figures")
