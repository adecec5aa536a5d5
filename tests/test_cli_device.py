"""blocksnap device ... as people and scripts use it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from blocksnap.pool import Pool
from tests.command_line import CommandLine, command_line

__all__ = ["command_line"]

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Pool.create(tmp_path / "pool", size="16M") as pool:
        pool.create_device("base", SIZE).write(1000, b"content")
    return tmp_path / "pool"


def test_create_snapshot_resize_and_remove_show_in_list(path: Path, command_line: CommandLine) -> None:
    made = command_line.json("device", "create", path, "new", "--size", "2M")
    assert (made["name"], made["size"], made["origin"], made["labels"]) == ("new", 2 << 20, None, {})
    assert command_line.json("device", "snapshot", path, "base", "snap")["origin"] == "base"
    command_line.text("device", "resize", path, "snap", "--size", "3M")
    command_line.text("device", "remove", path, "new")
    listed = command_line.json("device", "list", path)
    assert [(device["name"], device["size"]) for device in listed] == [("base", SIZE), ("snap", 3 << 20)]
    table = command_line.text("device", "list", path)
    assert "base" in table
    assert "3M" in table


def test_read_gives_the_bytes_on_stdout(path: Path, command_line: CommandLine) -> None:
    assert command_line("device", "read", path, "base", "--offset", 1000, "--length", 7) == 0
    assert command_line.out == b"content"
    assert command_line("device", "read", path, "base") == 0
    assert command_line.out == bytes(1000) + b"content" + bytes(SIZE - 1007)


def test_write_and_read_files(path: Path, tmp_path: Path, command_line: CommandLine) -> None:
    content = np.random.default_rng(1).bytes(700_001)
    (tmp_path / "in").write_bytes(content)
    command_line.text("device", "write", path, "base", "--input", tmp_path / "in", "--offset", "4K")
    where = ["--offset", "4K", "--length", len(content)]
    command_line.text("device", "read", path, "base", "--output", tmp_path / "out", *where)
    assert (tmp_path / "out").read_bytes() == content


def test_write_takes_stdin(path: Path, command_line: CommandLine) -> None:
    program = "from blocksnap.cli import main; main()"
    command = [sys.executable, "-c", program, "device", "write", str(path), "base", "--offset", "512"]
    subprocess.run(command, input=b"from a pipe", check=True)
    assert command_line("device", "read", path, "base", "--offset", 512, "--length", 11) == 0
    assert command_line.out == b"from a pipe"


def test_a_reader_that_leaves_ends_read_quietly(path: Path) -> None:
    program = "from blocksnap.cli import main; main()"
    command = [sys.executable, "-c", program, "device", "read", str(path), "base"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 1


def test_a_write_beyond_the_end_fails_with_one_line(
    path: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    (tmp_path / "in").write_bytes(bytes(SIZE + 1))
    error = command_line.fails(2, "device", "write", path, "base", "--input", tmp_path / "in")
    assert "beyond the device's end" in error


def test_a_missing_input_file_is_named(path: Path, tmp_path: Path, command_line: CommandLine) -> None:
    error = command_line.fails(1, "device", "write", path, "base", "--input", tmp_path / "none")
    assert str(tmp_path / "none") in error


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["create", "base", "--size", "1M"], "exists already"),
        (["snapshot", "base", "base"], "exists already"),
        (["snapshot", "nix", "new"], 'no thin device "nix"'),
        (["remove", "nix"], 'no thin device "nix"'),
        (["resize", "nix", "--size", "1M"], 'no thin device "nix"'),
        (["read", "nix"], 'no thin device "nix"'),
        (["write", "nix"], 'no thin device "nix"'),
    ],
)
def test_wrong_names_fail_with_one_line(
    path: Path, words: list[str], part: str, command_line: CommandLine
) -> None:
    assert part in command_line.fails(1, "device", words[0], path, *words[1:])
    assert [device["name"] for device in command_line.json("device", "list", path)] == ["base"]


@pytest.mark.parametrize("words", [["create", "a/b", "--size", "1M"], ["create", "a", "--size", "100"]])
def test_impossible_names_and_sizes_exit_2(path: Path, words: list[str], command_line: CommandLine) -> None:
    command_line.fails(2, "device", words[0], path, *words[1:])


@pytest.mark.parametrize("verb", ["create", "snapshot", "list", "remove", "resize", "read", "write"])
def test_every_verb_has_help_and_wants_a_path(verb: str, command_line: CommandLine) -> None:
    assert f"blocksnap device {verb}" in command_line.text("device", verb, "--help")
    needs_size = ["--size", "1M"] if verb in ("create", "resize") else []
    assert "PATH" in command_line.fails(2, "device", verb, *needs_size)
