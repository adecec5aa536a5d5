"""blocksnap pool ... as people and scripts use it."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from blocksnap.pool import Pool
from tests.command_line import CommandLine, command_line
from tests.thin_image import seal_file
from tests.thin_tools import needs_thin_tools, thin_tool

__all__ = ["command_line"]

SIZE = 1 << 20
BLOCK = 64 << 10
GHOST = "VALUES (9, 'ghost', 1048576, 1, '{}')"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A pool with a device, a snapshot of it, and a difference."""
    path = tmp_path / "pool"
    with Pool.create(path, size="16M") as pool:
        base = pool.create_device("base", SIZE)
        base.write(0, b"x" * 5 * BLOCK)
        base.snapshot("snap").write(BLOCK, b"y")
    return path


def test_create_makes_a_pool_and_says_nothing(tmp_path: Path, command_line: CommandLine) -> None:
    assert command_line.text("pool", "create", tmp_path / "pool", "--size", "10M", "--block-size", "4K") == ""
    with Pool.open(tmp_path / "pool") as pool:
        assert (pool.status().data_bytes, pool.status().block_size) == (10 << 20, 4096)


def test_create_preallocates_and_reports_as_json(tmp_path: Path, command_line: CommandLine) -> None:
    found = command_line.json("pool", "create", tmp_path / "pool", "--size", "5M", "--preallocate")
    assert (found["data_bytes"], found["block_size"], found["devices"]) == (5 << 20, BLOCK, 0)
    assert (tmp_path / "pool" / "data").stat().st_blocks * 512 >= 5 << 20


def test_create_twice_fails_with_one_line(path: Path, command_line: CommandLine) -> None:
    assert "exists already" in command_line.fails(1, "pool", "create", path, "--size", "1M")


@pytest.mark.parametrize(
    "words", [["--size", "5X"], ["--size"], ["--sise", "5M"], ["extra", "--size", "5M"], ["--data", "d"]]
)
def test_wrong_usage_exits_2(tmp_path: Path, words: list[str], command_line: CommandLine) -> None:
    command_line.fails(2, "pool", "create", tmp_path / "pool", *words)
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize(
    "verb",
    ["status", "check", "repair", "scrub", "dump", "delta", "rmap", "usage", "extend", "adopt", "create"],
)
def test_every_verb_has_help_and_wants_a_path(verb: str, command_line: CommandLine) -> None:
    assert f"blocksnap pool {verb}" in command_line.text("pool", verb, "--help")
    assert "PATH" in command_line.fails(2, "pool", verb)


@pytest.mark.parametrize("verb", ["status", "check", "dump", "rmap", "usage", "adopt"])
def test_every_verb_names_a_missing_pool(tmp_path: Path, verb: str, command_line: CommandLine) -> None:
    assert f"no pool at {tmp_path}/none" in command_line.fails(1, "pool", verb, tmp_path / "none")


@pytest.mark.parametrize("verb", ["status", "check", "dump", "rmap", "usage", "adopt"])
def test_every_verb_names_a_pool_in_use(path: Path, verb: str, command_line: CommandLine) -> None:
    with Pool.open(path):
        assert "in use by" in command_line.fails(1, "pool", verb, path)


def test_status_shows_space_and_state(path: Path, command_line: CommandLine) -> None:
    text = command_line.text("pool", "status", path)
    assert "384K of 16M used" in text
    assert "fine" in text
    found = command_line.json("pool", "status", path)
    assert (found["devices"], found["transaction_id"], found["read_only"]) == (2, 2, False)
    assert found["data_bytes"] - found["data_free_bytes"] == 6 * BLOCK
    assert found["counters"]["application_bytes"] == 0


def test_check_of_a_sound_pool_says_so(path: Path, command_line: CommandLine) -> None:
    assert command_line.text("pool", "check", path) == "2 thin devices, 10 mappings: no damage\n"
    found = command_line.json("pool", "check", path)
    assert (found["fatal"], found["leaks"], found["findings"]) == (0, 0, [])
    assert (found["devices"], found["mappings"]) == (2, 10)


def damage(path: Path) -> None:
    """Flip a bit in every block that a sound pool uses behind its first few."""
    metadata = path / "metadata"
    content = bytearray(metadata.read_bytes())
    for block in range(8, len(content) // 4096):
        if any(content[block * 4096 : block * 4096 + 4096]):
            content[block * 4096 + 100] ^= 1
    metadata.write_bytes(content)


def test_check_goes_on_past_damage_and_exits_3(path: Path, command_line: CommandLine) -> None:
    damage(path)
    assert command_line("pool", "check", path) == 3
    lines = command_line.out.decode().splitlines()
    assert len(lines) > 1
    assert all(line.split(":")[0] in ("fatal", "leak", "warning") for line in lines[:-1])
    assert "fatal findings" in lines[-1]
    assert command_line("pool", "check", path, "--json") == 3
    assert b'"severity": "fatal"' in command_line.out


def test_check_tells_of_a_catalog_that_is_damaged_or_another_pools(
    path: Path, command_line: CommandLine
) -> None:
    catalog = path / "catalog.db"
    before = catalog.read_bytes()
    for statement, found in (
        ("UPDATE device SET size = 5 WHERE id = 1", "thin device 1 has the size 5: restore it"),
        ("UPDATE pool SET transaction_id = 77", "describes transaction 77, but the pool is at 2"),
        ("DELETE FROM device WHERE id = 1", "holds thin devices that its catalog does not know"),
        (
            f"INSERT INTO device (id, name, size, created, labels) {GHOST}",
            "names thin devices that it does not hold",
        ),
    ):
        with closing(sqlite3.connect(catalog)) as database, database:
            database.execute(statement)
        damaged = catalog.read_bytes()
        assert command_line("pool", "check", path) == 3
        line, last = command_line.out.decode().splitlines()
        assert line.startswith("fatal: ")
        assert found in line
        assert last == "2 thin devices, 10 mappings: 1 fatal findings, 0 leaked blocks"
        assert catalog.read_bytes() == damaged
        catalog.write_bytes(before)
    catalog.unlink()
    assert command_line.text("pool", "check", path) == "2 thin devices, 10 mappings: no damage\n"
    assert not catalog.exists()


def test_check_reads_a_pool_that_cannot_be_opened(path: Path, command_line: CommandLine) -> None:
    content = bytearray((path / "metadata").read_bytes())
    content[60] ^= 1
    (path / "metadata").write_bytes(content)
    command_line.fails(1, "pool", "status", path)
    assert command_line("pool", "check", path) == 3
    assert b"fatal" in command_line.out


def test_a_pool_that_needs_a_check_is_writable_after_it(path: Path, command_line: CommandLine) -> None:
    with (path / "metadata").open("r+b") as metadata:
        metadata.seek(4)
        metadata.write(b"\1")
    seal_file(path / "metadata", 0, "superblock")
    assert "--clear-needs-check" in command_line.fails(1, "device", "create", path, "new", "--size", "1M")
    command_line.text("pool", "check", path)
    assert command_line.json("pool", "status", path)["needs_check"]
    command_line.text("pool", "check", path, "--clear-needs-check")
    command_line.text("device", "create", path, "new", "--size", "1M")


def test_a_damaged_pool_stays_in_need_of_a_check(path: Path, command_line: CommandLine) -> None:
    damage(path)
    with (path / "metadata").open("r+b") as metadata:
        metadata.seek(4)
        metadata.write(b"\1")
    seal_file(path / "metadata", 0, "superblock")
    assert command_line("pool", "check", path, "--clear-needs-check") == 3
    assert (path / "metadata").read_bytes()[4] == 1


@needs_thin_tools
def test_dump_prints_what_thin_dump_prints(path: Path, command_line: CommandLine) -> None:
    assert command_line.text("pool", "dump", path) == thin_tool("thin_dump", path / "metadata")


@needs_thin_tools
def test_delta_prints_what_thin_delta_prints(path: Path, command_line: CommandLine) -> None:
    theirs = thin_tool("thin_delta", "--thin1", 1, "--thin2", 2, path / "metadata")
    assert command_line.text("pool", "delta", path, "base", "snap") == theirs


def test_delta_as_json_gives_the_differences(path: Path, command_line: CommandLine) -> None:
    assert command_line.json("pool", "delta", path, "base", "snap") == {
        "left": "base",
        "right": "snap",
        "block_size": BLOCK,
        "ranges": [{"thin_begin": 1, "length": 1, "kind": "different"}],
    }
    assert 'no thin device "nix"' in command_line.fails(1, "pool", "delta", path, "base", "nix")


@needs_thin_tools
@pytest.mark.parametrize("region", ["0..256", "1..3", "5..6", "6..100"])
def test_rmap_prints_what_thin_rmap_prints(path: Path, region: str, command_line: CommandLine) -> None:
    theirs = thin_tool("thin_rmap", "--region", region, path / "metadata")
    assert command_line.text("pool", "rmap", path, "--region", region) == theirs


def test_rmap_as_json_and_a_wrong_region(path: Path, command_line: CommandLine) -> None:
    found = command_line.json("pool", "rmap", path, "--region", "5..")
    assert found == [{"data_begin": 5, "length": 1, "device_id": 2, "thin_begin": 1}]
    assert "no region" in command_line.fails(2, "pool", "rmap", path, "--region", "all")


def test_usage_shows_mapped_exclusive_and_shared(path: Path, command_line: CommandLine) -> None:
    assert "320K" in command_line.text("pool", "usage", path)
    assert command_line.json("pool", "usage", path)[0] == {
        "id": 1,
        "name": "base",
        "mapped_bytes": 5 * BLOCK,
        "exclusive_bytes": BLOCK,
        "shared_bytes": 4 * BLOCK,
    }


def test_extend_grows_and_refuses_to_shrink(path: Path, command_line: CommandLine) -> None:
    assert command_line.json("pool", "extend", path, "--size", "32M")["data_bytes"] == 32 << 20
    assert command_line.json("pool", "extend", path, "--metadata-size", "4M")["metadata_bytes"] == 4 << 20
    assert "cannot shrink" in command_line.fails(2, "pool", "extend", path, "--size", "1M")


def test_adopt_takes_over_what_the_pool_holds(path: Path, command_line: CommandLine) -> None:
    old = (path / "catalog.db").read_bytes()
    with Pool.open(path) as pool:
        pool.create_device("late", SIZE)
    (path / "catalog.db").write_bytes(old)
    assert "pool adopt" in command_line.fails(1, "pool", "status", path)
    assert command_line.json("pool", "adopt", path)["devices"] == ["base", "snap", "thin-3"]
    command_line.text("pool", "status", path)


def test_two_devices_instead_of_a_path(tmp_path: Path, command_line: CommandLine) -> None:
    metadata, data = tmp_path / "m", tmp_path / "d"
    for part, size in ((metadata, 2 << 20), (data, 8 << 20)):
        with part.open("wb") as made:
            made.truncate(size)
    where = ["--metadata", metadata, "--data", data]
    assert command_line.json("pool", "create", *where)["data_bytes"] == 8 << 20
    command_line.text("device", "create", "a", "--size", "1M", *where)
    assert [device["name"] for device in command_line.json("device", "list", *where)] == ["a"]
    assert command_line.text("pool", "check", *where) == "1 thin devices, 0 mappings: no damage\n"
    assert "no PATH" in command_line.fails(2, "pool", "status", tmp_path, *where)
