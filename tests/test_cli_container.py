"""blocksnap container ... as people and scripts use it."""

import os
from pathlib import Path

import pytest

from tests.command_line import CommandLine, command_line
from tests.layouts import Layout
from tests.pool_servers import loops_below, mounts_below, needs_mounts, run_command

__all__ = ["command_line"]


@pytest.fixture
def root(tmp_path: Path, layout: Layout, command_line: CommandLine) -> Path:
    """A root of the driver vfs with the image "app:1", whose files are d/a and d/b."""
    return make_root(tmp_path, layout, command_line, "vfs")


def make_root(tmp_path: Path, layout: Layout, command_line: CommandLine, driver: str) -> Path:
    root = tmp_path / "images"
    command_line.text(
        "image",
        "import",
        layout.write(layout.manifest()),
        "--root",
        root,
        "--driver",
        driver,
        "--name",
        "app:1",
    )
    return root


def test_container_is_created_listed_and_removed(root: Path, command_line: CommandLine) -> None:
    made = command_line.json("container", "create", "c", "--image", "app:1", "--root", root)
    [image] = command_line.json("image", "list", "--root", root)
    assert (made["name"], made["image"], made["holders"]) == ("c", image["id"], [])
    assert command_line.json("container", "list", "--root", root) == [made]
    assert "app:1" in command_line.text("container", "list", "--root", root)
    command_line.text("container", "remove", "c", "--root", root)
    assert command_line.json("container", "list", "--root", root) == []


def test_size_is_refused_by_a_driver_that_has_none(root: Path, command_line: CommandLine) -> None:
    arguments = ("container", "create", "c", "--image", "app:1", "--root", root, "--size")
    assert "take thin, btrfs or qcow2" in command_line.fails(1, *arguments, "1G")
    assert "layer size" in command_line.fails(2, *arguments, "large")
    assert command_line.json("container", "list", "--root", root) == []


@needs_mounts
def test_container_has_the_size_that_it_was_given(
    tmp_path: Path, layout: Layout, command_line: CommandLine
) -> None:
    root = make_root(tmp_path, layout, command_line, "thin")
    command_line.text("container", "create", "c", "--image", "app:1", "--root", root, "--size", "12G")
    path = command_line.text("container", "mount", "c", "--root", root).strip()
    space = os.statvfs(path)
    command_line.text("container", "umount", "c", "--root", root)
    assert 11 << 30 < space.f_blocks * space.f_frsize <= 12 << 30


def test_mount_lasts_until_umount(root: Path, command_line: CommandLine) -> None:
    command_line.text("container", "create", "c", "--image", "app:1", "--root", root)
    path = Path(command_line.text("container", "mount", "c", "--root", root).strip())
    assert command_line.json("container", "mount", "c", "--root", root) == {"name": "c", "path": str(path)}
    assert (path / "d" / "a").read_bytes() == b"one"
    assert "lasting" in command_line.text("container", "list", "--root", root)
    assert "in use" in command_line.fails(1, "container", "remove", "c", "--root", root)
    command_line.text("container", "umount", "c", "--root", root)
    assert "not mounted" in command_line.fails(2, "container", "umount", "c", "--root", root)
    command_line.text("container", "remove", "c", "--root", root)


def test_diff_tells_what_was_added_changed_and_deleted(root: Path, command_line: CommandLine) -> None:
    command_line.text("container", "create", "c", "--image", "app:1", "--root", root)
    path = Path(command_line.text("container", "mount", "c", "--root", root).strip())
    (path / "new").write_text("new")
    (path / "d" / "a").unlink()
    (path / "d" / "b").write_text("changed")
    assert command_line.text("container", "diff", "c", "--root", root) == "C /d\nD /d/a\nC /d/b\nA /new\n"
    assert {"path": "/new", "kind": "A"} in command_line.json("container", "diff", "c", "--root", root)
    command_line.text("container", "umount", "c", "--root", root)


def test_commit_makes_an_image_of_the_state(root: Path, command_line: CommandLine) -> None:
    command_line.text("container", "create", "c", "--image", "app:1", "--root", root)
    path = Path(command_line.text("container", "mount", "c", "--root", root).strip())
    (path / "new").write_text("new")
    command_line.text("container", "umount", "c", "--root", root)
    made = command_line.json("container", "commit", "c", "app:2", "--comment", "a file", "--root", root)
    assert made["names"] == ["app:2"]
    taken = command_line.fails(1, "container", "commit", "c", "app:1", "--root", root)
    assert 'the name "app:1" is taken' in taken
    command_line.text("container", "create", "d", "--image", "app:2", "--root", root)
    path = Path(command_line.text("container", "mount", "d", "--root", root).strip())
    assert (path / "new").read_text() == "new"
    command_line.text("container", "umount", "d", "--root", root)


def test_snapshot_starts_with_the_present_state(root: Path, command_line: CommandLine) -> None:
    command_line.text("container", "create", "c", "--image", "app:1", "--root", root)
    path = Path(command_line.text("container", "mount", "c", "--root", root).strip())
    (path / "new").write_text("new")
    command_line.text("container", "umount", "c", "--root", root)
    assert command_line.json("container", "snapshot", "c", "copy", "--root", root)["name"] == "copy"
    path = Path(command_line.text("container", "mount", "copy", "--root", root).strip())
    assert (path / "new").read_text() == "new"
    command_line.text("container", "umount", "copy", "--root", root)


def test_errors_are_one_line(root: Path, command_line: CommandLine) -> None:
    command_line.text("container", "create", "c", "--image", "app:1", "--root", root)
    taken = command_line.fails(1, "container", "create", "c", "--image", "app:1", "--root", root)
    assert "exists already" in taken
    for verb in ("mount", "umount", "diff", "remove"):
        assert 'no container "none"' in command_line.fails(1, "container", verb, "none", "--root", root)
    assert "no image" in command_line.fails(1, "container", "create", "d", "--image", "x:1", "--root", root)
    assert "cannot be" in command_line.fails(
        2, "container", "create", "a/b", "--image", "app:1", "--root", root
    )
    assert "--image" in command_line.fails(2, "container", "create", "d", "--root", root)


@needs_mounts
def test_mounted_thin_container_is_worked_on_by_other_processes(
    tmp_path: Path, layout: Layout, command_line: CommandLine
) -> None:
    root = make_root(tmp_path, layout, command_line, "thin")
    command_line.text("container", "create", "c", "--image", "app:1", "--root", root)
    path = Path(run_command("container", "mount", "c", "--root", root).strip())
    (path / "new").write_text("written while mounted")
    status = command_line.json("pool", "status", root / "pool")
    assert [mounted["target"] for mounted in status["server"]["mounts"]] == [str(path)]
    run_command("container", "snapshot", "c", "copy", "--root", root)
    assert run_command("container", "diff", "copy", "--root", root) == "A /new\n"
    assert run_command("container", "diff", "c", "--root", root) == "A /new\n"
    run_command("container", "commit", "c", "app:2", "--root", root)
    (path / "later").write_text("still writable")
    run_command("container", "umount", "c", "--root", root)
    for name in ("c", "copy"):
        run_command("container", "remove", name, "--root", root)
    assert command_line.json("pool", "status", root / "pool")["server"] is None
    assert (mounts_below(tmp_path), loops_below(tmp_path)) == ([], [])
