"""Finding and packing changes: what is told, and that a packed layer makes the tree it was packed from."""

import io
import os
import shutil
import socket
import stat
import tarfile
from pathlib import Path

import pytest

from blocksnap.archive import Change, apply_layer, changes, diff_size, pack_diff
from blocksnap.errors import BusyError, UnsafeLayerError
from tests.images import change_odd_tree, make_odd_tree, require_root, require_tools, run
from tests.layer_roots import as_ordinary_user, needs_root
from tests.trees import compare_trees


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A small tree and a copy of it to change."""
    old = tmp_path / "old"
    for name in ("etc/hosts", "etc/passwd", "usr/bin/tool", "var/log/a", "var/log/b", "srv/data"):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(f"{name}\n")
        os.utime(old / name, ns=(0, 1_600_000_000_000_000_001))
    shutil.copytree(old, tmp_path / "new", symlinks=True)
    return old, tmp_path / "new"


@pytest.fixture
def odd_pair(tmp_path: Path) -> tuple[Path, Path]:
    """A tree with every kind of file, and the same with every kind of change."""
    require_root()
    require_tools("setcap", "cp")
    make_odd_tree(tmp_path / "old")
    run("cp", "-a", tmp_path / "old", tmp_path / "new")
    change_odd_tree(tmp_path / "new")
    return tmp_path / "old", tmp_path / "new"


def packed(old: Path | None, new: Path) -> bytes:
    out = io.BytesIO()
    assert pack_diff(old, new, out) == len(out.getvalue())
    return out.getvalue()


def members(layer: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        return archive.getnames()


# ---- changes -----------------------------------------------------------------------------------------------


def test_equal_trees_have_no_changes(pair: tuple[Path, Path]) -> None:
    assert changes(*pair) == []
    assert diff_size(*pair) == 0
    assert members(packed(*pair)) in ([], ["."])


def test_changes_are_told_as_docker_tells_them(pair: tuple[Path, Path]) -> None:
    old, new = pair
    (new / "etc/hosts").write_text("other\n")
    (new / "etc/new").write_text("new\n")
    (new / "usr/bin/tool").chmod(0o700)
    shutil.rmtree(new / "var/log")
    (new / "opt/deep").mkdir(parents=True)
    assert changes(old, new) == [
        Change("/etc", "C"),
        Change("/etc/hosts", "C"),
        Change("/etc/new", "A"),
        Change("/opt", "A"),
        Change("/opt/deep", "A"),
        Change("/usr", "C"),
        Change("/usr/bin", "C"),
        Change("/usr/bin/tool", "C"),
        Change("/var", "C"),
        Change("/var/log", "D"),
    ]


def test_a_change_of_type_hides_what_was_below(pair: tuple[Path, Path]) -> None:
    old, new = pair
    shutil.rmtree(new / "var/log")
    (new / "var/log").write_text("a file\n")
    (new / "srv/data").unlink()
    (new / "srv/data").mkdir()
    (new / "srv/data/inside").touch()
    assert changes(old, new) == [
        Change("/srv", "C"),
        Change("/srv/data", "C"),
        Change("/srv/data/inside", "A"),
        Change("/var", "C"),
        Change("/var/log", "C"),
    ]


def test_a_changed_time_attribute_or_owner_is_a_change_and_a_directorys_time_is_none(
    pair: tuple[Path, Path],
) -> None:
    old, new = pair
    os.utime(new / "etc/hosts", ns=(0, 1_600_000_000_000_000_002))
    os.setxattr(new / "etc/passwd", "user.a", b"1")
    os.utime(new / "var/log", ns=(0, 1))
    assert changes(old, new) == [
        Change("/etc", "C"),
        Change("/etc/hosts", "C"),
        Change("/etc/passwd", "C"),
    ]


def test_names_sort_by_component_not_by_character(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for root in (old, new):
        for name in ("a/b", "a-b/c", "a.b", "a0"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
            os.utime(root / name, ns=(0, 0))
    assert changes(old, new) == []
    (new / "a/b").unlink()
    assert changes(old, new) == [Change("/a", "C"), Change("/a/b", "D")]


def test_without_an_old_tree_all_is_added(pair: tuple[Path, Path]) -> None:
    found = changes(None, pair[0])
    assert {change.kind for change in found} == {"A"}
    assert len(found) == len(list(pair[0].rglob("*")))


def test_the_size_of_a_difference_counts_hard_links_once(pair: tuple[Path, Path]) -> None:
    old, new = pair
    (new / "srv/big").write_bytes(bytes(5000))
    os.link(new / "srv/big", new / "srv/same")
    (new / "etc/hosts").unlink()
    assert diff_size(old, new) == 5000


# ---- packing -----------------------------------------------------------------------------------------------


def test_a_packed_difference_makes_the_old_tree_the_new_one(odd_pair: tuple[Path, Path]) -> None:
    old, new = odd_pair
    layer = packed(old, new)
    assert len(layer) < 1 << 20, "the 64 MiB file did not change"
    apply_layer(io.BytesIO(layer), old)
    assert compare_trees(old, new) == []
    assert changes(old, new) == []


def test_a_packed_tree_makes_the_same_tree_again(odd_pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    apply_layer(io.BytesIO(packed(None, odd_pair[0])), tmp_path / "again")
    assert compare_trees(odd_pair[0], tmp_path / "again") == []


def test_tar_reads_what_is_packed(odd_pair: tuple[Path, Path], tmp_path: Path) -> None:
    require_tools("tar")
    (tmp_path / "layer.tar").write_bytes(packed(None, odd_pair[1]))
    (tmp_path / "tar").mkdir()
    run("tar", "--xattrs", "--xattrs-include=*", "-C", tmp_path / "tar", "-xpf", tmp_path / "layer.tar")
    assert compare_trees(odd_pair[1], tmp_path / "tar") == []


def test_deletions_become_whiteouts(pair: tuple[Path, Path]) -> None:
    old, new = pair
    shutil.rmtree(new / "var")
    (new / "etc/hosts").unlink()
    os.utime(new, ns=(old.stat().st_atime_ns, old.stat().st_mtime_ns))
    assert members(packed(old, new)) == ["etc", "etc/.wh.hosts", ".wh.var"]


def test_a_new_link_to_an_old_file_stays_a_link(pair: tuple[Path, Path]) -> None:
    old, new = pair
    os.link(new / "usr/bin/tool", new / "srv/tool")
    layer = packed(old, new)
    assert "usr/bin/tool" in members(layer)
    assert changes(old, new) == [Change("/srv", "C"), Change("/srv/tool", "A")]
    apply_layer(io.BytesIO(layer), old)
    assert (old / "srv/tool").stat().st_ino == (old / "usr/bin/tool").stat().st_ino


def test_packing_twice_gives_the_same_bytes(pair: tuple[Path, Path]) -> None:
    (pair[1] / "new").write_text("x\n")
    assert packed(*pair) == packed(*pair)


def test_sockets_are_left_out(pair: tuple[Path, Path]) -> None:
    old, new = pair
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(new / "srv/socket"))
    layer = packed(old, new)
    assert "srv/socket" not in members(layer)


def test_a_name_that_is_a_whiteout_cannot_be_packed(pair: tuple[Path, Path]) -> None:
    (pair[1] / "srv/.wh.data").touch()
    with pytest.raises(UnsafeLayerError, match="rename it"):
        packed(*pair)


@needs_root
def test_a_whiteout_of_overlay_cannot_be_packed(pair: tuple[Path, Path]) -> None:
    os.mknod(pair[1] / "srv/gone", stat.S_IFCHR, os.makedev(0, 0))
    with pytest.raises(UnsafeLayerError, match="merged tree"):
        packed(*pair)


def test_a_file_that_shrinks_while_it_is_packed_is_an_error(pair: tuple[Path, Path]) -> None:
    old, new = pair
    (new / "srv/log").write_bytes(bytes(8 << 20))

    class Shrinking(io.BytesIO):
        def write(self, data: bytes, /) -> int:  # type: ignore[override]
            if b"srv/log" in data:
                os.truncate(new / "srv/log", 2 << 20)
            return super().write(data)

    with pytest.raises(BusyError, match="changed while it was packed"):
        pack_diff(old, new, Shrinking())


def test_a_symlink_in_a_tree_is_never_followed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = pair
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("secret\n")
    (new / "srv/out").symlink_to(tmp_path / "secret")
    layer = packed(old, new)
    assert b"secret\n" not in layer
    assert "srv/out/key" not in members(layer)


@needs_root
def test_an_ordinary_user_packs_what_they_may_read(tmp_path: Path, users_root: Path) -> None:
    (users_root / "a").write_text("x\n")

    def work() -> None:
        assert members(packed(None, users_root)) == [".", "a"]

    as_ordinary_user(work)
    assert tmp_path.is_dir()
