"""blocksnap image ... as people and scripts use it."""

import json
from pathlib import Path

import pytest

from tests.command_line import CommandLine, command_line
from tests.layouts import Layout, damaged_at, unpack
from tests.pool_servers import loops_below, mounts_below, needs_mounts
from tests.trees import compare_trees

__all__ = ["command_line"]


@pytest.fixture
def root(tmp_path: Path, layout: Layout, command_line: CommandLine) -> Path:
    """A root of the driver vfs with the image "app:1" of two layers."""
    root = tmp_path / "images"
    command_line.text(
        "image",
        "import",
        layout.write(layout.manifest()),
        "--root",
        root,
        "--driver",
        "vfs",
        "--name",
        "app:1",
    )
    return root


def test_import_names_the_image_and_lists_it(
    tmp_path: Path, layout: Layout, command_line: CommandLine
) -> None:
    root = tmp_path / "images"
    words = (
        "image",
        "import",
        layout.write(layout.manifest()),
        "--root",
        root,
        "--driver",
        "vfs",
        "--name",
        "app:1",
    )
    made = command_line.json(*words)
    assert made["names"] == ["app:1"]
    assert [layer["size"] for layer in made["layers"]] == [3, 3]
    assert command_line.json("image", "list", "--root", root) == [made]
    assert made["id"].removeprefix("sha256:")[:12] in command_line.text(*words)
    table = command_line.text("image", "list", "--root", root)
    assert "app:1" in table
    assert made["id"].removeprefix("sha256:")[:12] in table


def test_root_may_come_from_the_environment(
    root: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKSNAP_ROOT", str(root))
    assert [image["names"] for image in command_line.json("image", "list")] == [["app:1"]]


def test_tree_shows_what_is_built_on_what(root: Path, command_line: CommandLine) -> None:
    command_line.text("container", "create", "c", "--image", "app:1", "--root", root)
    command_line.text("container", "commit", "c", "app:2", "--root", root)
    [base] = command_line.json("image", "tree", "--root", root)
    [top] = base["children"]
    assert (base["images"], top["images"]) == ([], ["app:1"])
    assert [child["images"] for child in top["children"]] == [["app:2"]]
    text = command_line.text("image", "tree", "--root", root)
    assert text.index("app:1") < text.index("app:2")


def test_remove_takes_the_layers_along_and_refuses_used_images(root: Path, command_line: CommandLine) -> None:
    command_line.text("container", "create", "c", "--image", "app:1", "--root", root)
    refused = command_line.fails(1, "image", "remove", "app:1", "--root", root)
    assert 'has the container "c"' in refused
    removed = command_line.json("image", "remove", "app:1", "--force", "--root", root)
    assert [layer["size"] for layer in removed] == [3, 3]
    assert command_line.json("image", "list", "--root", root) == []
    assert command_line.json("container", "list", "--root", root) == []


@pytest.mark.parametrize("name", ["out", "out.tar"])
def test_export_is_an_image_with_the_same_files(
    root: Path, tmp_path: Path, layout: Layout, name: str, command_line: CommandLine
) -> None:
    found = command_line.json("image", "export", "app:1", tmp_path / name, "--root", root)
    assert found["path"] == str(tmp_path / name)
    assert found["digest"].startswith("sha256:")
    unpack(layout.path, tmp_path / "expected")
    unpack(tmp_path / name, tmp_path / "exported")
    assert compare_trees(tmp_path / "expected", tmp_path / "exported", times=False) == []
    command_line.fails(1, "image", "export", "app:1", tmp_path / name, "--root", root)


def test_compression_of_an_export_is_chosen(root: Path, tmp_path: Path, command_line: CommandLine) -> None:
    words = ("image", "export", "app:1", tmp_path / "out", "--root", root, "--compression")
    command_line.fails(2, *words, "lzma")
    command_line.text(*words, "zstd")
    documents = [blob.read_bytes() for blob in (tmp_path / "out" / "blobs" / "sha256").iterdir()]
    assert any(b"tar+zstd" in document for document in documents)


def test_bad_input_is_one_line_and_leaves_nothing(
    root: Path, tmp_path: Path, layout: Layout, command_line: CommandLine
) -> None:
    assert "none: No such file" in command_line.fails(1, "image", "import", tmp_path / "none", "--root", root)
    assert "no image" in command_line.fails(1, "image", "remove", "other:1", "--root", root)
    for blob in (layout.path / "blobs" / "sha256").iterdir():
        if blob.read_bytes().startswith(b"\x1f\x8b"):
            blob.write_bytes(damaged_at(blob.read_bytes(), 4))
    words = ("image", "import", layout.path, "--root", tmp_path / "fresh", "--driver", "vfs")
    assert "digest" in command_line.fails(1, *words)
    assert command_line.json("image", "list", "--root", tmp_path / "fresh") == []


def test_wrong_usage_exits_2(root: Path, tmp_path: Path, layout: Layout, command_line: CommandLine) -> None:
    assert "--root" in command_line.fails(2, "image", "list")
    assert "no images in" in command_line.fails(2, "image", "list", "--root", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert 'belongs to driver "vfs"' in command_line.fails(
        2, "image", "list", "--root", root, "--driver", "overlay"
    )
    words = ("image", "import", layout.write(layout.manifest()), "--root", tmp_path / "new", "--driver")
    assert 'no driver "zfs"' in command_line.fails(2, *words, "zfs")
    assert "its options are" in command_line.fails(2, *words, "vfs", "--option", "size=1G")
    assert "KEY=VALUE" in command_line.fails(2, *words, "vfs", "--option", "reflink")


@needs_mounts
def test_thin_is_the_driver_of_a_new_root_and_takes_options(
    tmp_path: Path, layout: Layout, command_line: CommandLine
) -> None:
    root = tmp_path / "images"
    options = ("--option", "size=256M", "--option", "block_size=16K")
    command_line.text("image", "import", layout.write(layout.manifest()), "--root", root, *options)
    assert (root / "driver").read_text() == "thin\n"
    status = json.loads(command_line.text("pool", "status", root / "pool", "--json"))
    assert (status["data_bytes"], status["block_size"], status["server"]) == (256 << 20, 16 << 10, None)
    [image] = command_line.json("image", "list", "--root", root)
    assert len(image["layers"]) == 2
    assert (mounts_below(tmp_path), loops_below(tmp_path)) == ([], [])
