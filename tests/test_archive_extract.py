"""Applying layers: what is made, what is refused, and that nothing outside the root changes."""

import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from blocksnap.archive import apply_layer
from blocksnap.errors import PrivilegeError
from tests.hostile_tars import (
    CHARACTER,
    HARD_LINK,
    directory,
    file,
    header,
    link,
    pax,
    records,
    tar,
)
from tests.images import require_tools, run
from tests.layer_roots import apply, as_ordinary_user, needs_root
from tests.trees import compare_trees

# ---- what is made ------------------------------------------------------------------------------------------


def test_layers_of_umoci_make_the_tree_that_umoci_makes(
    small_oci_layout: Path, small_unpacked: Path, layer_root: Path
) -> None:
    from blocksnap import oci

    with oci.open_image(small_oci_layout) as image:
        assert len(image.layers) == 5
        for layer in image.layers:
            with layer.open() as stream:
                apply_layer(stream, layer_root)
    assert compare_trees(layer_root, small_unpacked) == []


def test_holes_stay_holes(layer_root: Path, tmp_path: Path) -> None:
    require_tools("tar")
    source = tmp_path / "source"
    source.mkdir()
    with (source / "sparse").open("wb") as sparse:
        for at in range(0, 32 << 20, 1 << 20):
            sparse.seek(at)
            sparse.write(b"x" * 4096)
        sparse.truncate(64 << 20)
    for form in ("--format=gnu", "--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"):
        archive = tmp_path / "sparse.tar"
        run("tar", "--sparse", "--format=pax", form, "-C", source, "-cf", archive, "sparse")
        assert archive.stat().st_size < 4 << 20
        with archive.open("rb") as stream:
            apply_layer(stream, layer_root)
        assert (layer_root / "sparse").read_bytes() == (source / "sparse").read_bytes(), form
        assert (layer_root / "sparse").stat().st_blocks * 512 < 4 << 20, form


def test_times_are_exact_to_the_nanosecond(layer_root: Path) -> None:
    for text, expected in (
        (b"1700000000.123456789", 1_700_000_000_123_456_789),
        (b"1700000000.1", 1_700_000_000_100_000_000),
        (b"4000000000.000000001", 4_000_000_000_000_000_001),
        (b"0.9999999999", 999_999_999),
        (b"-1.5", -1_500_000_000),
        (b"12.", 12_000_000_000),
    ):
        apply(layer_root, pax(records((b"mtime", text))), file(b"a", b"x"))
        assert (layer_root / "a").stat().st_mtime_ns == expected


def test_a_directory_keeps_the_time_of_its_entry_though_files_follow(layer_root: Path) -> None:
    apply(
        layer_root,
        pax(records((b"mtime", b"1000000000.5"))),
        directory(b"d"),
        file(b"d/a", b"x"),
        file(b"d/b"),
    )
    assert (layer_root / "d").stat().st_mtime_ns == 1_000_000_000_500_000_000


def test_a_directory_of_a_lower_layer_keeps_its_time_when_something_is_added_or_hidden(
    layer_root: Path,
) -> None:
    apply(layer_root, directory(b"d"), file(b"d/a", b"x"))
    before = (layer_root / "d").stat().st_mtime_ns
    apply(layer_root, file(b"d/b", b"x"), file(b"d/.wh.a"))
    assert os.listdir(layer_root / "d") == ["b"]
    assert (layer_root / "d").stat().st_mtime_ns == before


def test_missing_parents_are_made_with_mode_0755_whatever_the_umask(layer_root: Path) -> None:
    old = os.umask(0o077)
    try:
        apply(layer_root, file(b"a/b/c", b"x"))
    finally:
        os.umask(old)
    assert (
        stat.S_IMODE((layer_root / "a").stat().st_mode)
        == stat.S_IMODE((layer_root / "a/b").stat().st_mode)
        == 0o755
    )
    assert (layer_root / "a/b/c").read_bytes() == b"x"


def test_absolute_names_and_dots_are_taken_inside_the_root(layer_root: Path) -> None:
    apply(layer_root, file(b"/etc/x", b"1"), file(b"./a/../b", b"2"), file(b"//c///d", b"3"))
    assert (layer_root / "etc/x").read_bytes() == b"1"
    assert (layer_root / "b").read_bytes() == b"2"
    assert (layer_root / "c/d").read_bytes() == b"3"
    assert not (layer_root / "a").exists()


@pytest.mark.parametrize("name", [b"/", b".", b"./", b"/./"])
def test_the_root_entry_describes_the_root(layer_root: Path, name: bytes) -> None:
    apply(layer_root, header(name, b"5", mode=b"0000711\0"), file(b"a", b"x"))
    assert stat.S_IMODE(layer_root.stat().st_mode) == 0o711
    assert layer_root.stat().st_mtime_ns == 0o14000000000 * 1_000_000_000


def test_the_last_entry_of_a_name_wins_whatever_the_types(layer_root: Path) -> None:
    apply(
        layer_root,
        directory(b"a"), file(b"a/x", b"x"), file(b"a", b"a file now"),
        file(b"b", b"x"), directory(b"b"), file(b"b/y", b"y"),
        link(b"c", b"/etc"), directory(b"c"), file(b"c/z", b"z"),
        file(b"d", b"first"), file(b"d", b"second"),
    )  # fmt: skip
    assert (layer_root / "a").read_bytes() == b"a file now"
    assert (layer_root / "b/y").read_bytes() == b"y"
    assert not (layer_root / "c").is_symlink()
    assert (layer_root / "c/z").read_bytes() == b"z"
    assert (layer_root / "d").read_bytes() == b"second"


def test_replacing_a_file_leaves_its_hard_links_unchanged(layer_root: Path) -> None:
    apply(layer_root, file(b"a", b"old"), link(b"b", b"a", HARD_LINK))
    apply(layer_root, file(b"a", b"new"))
    assert (layer_root / "a").read_bytes() == b"new"
    assert (layer_root / "b").read_bytes() == b"old"


def test_a_hard_link_to_a_symlink_links_the_symlink_itself(layer_root: Path) -> None:
    apply(layer_root, file(b"target", b"x"), link(b"s", b"target"), link(b"h", b"s", HARD_LINK))
    assert (layer_root / "h").is_symlink()
    assert (layer_root / "h").lstat().st_ino == (layer_root / "s").lstat().st_ino


def test_a_hard_link_may_name_a_file_of_a_lower_layer_and_an_absolute_target(layer_root: Path) -> None:
    apply(layer_root, file(b"d/a", b"lower"))
    apply(layer_root, link(b"h", b"/d/a", HARD_LINK))
    assert (layer_root / "h").stat().st_ino == (layer_root / "d/a").stat().st_ino


def test_a_directory_entry_takes_attributes_away_that_it_does_not_have(layer_root: Path) -> None:
    apply(layer_root, pax(records((b"SCHILY.xattr.user.a", b"1"))), directory(b"d"))
    assert os.getxattr(layer_root / "d", "user.a") == b"1"
    apply(layer_root, pax(records((b"SCHILY.xattr.user.b", b"2"))), directory(b"d"))
    assert os.listxattr(layer_root / "d") == ["user.b"]


def test_host_attributes_are_not_taken_from_an_archive(layer_root: Path) -> None:
    names = (
        b"trusted.overlay.opaque",
        b"trusted.x",
        b"user.overlay.redirect",
        b"security.selinux",
        b"user.ok",
    )
    apply(layer_root, pax(records(*[(b"SCHILY.xattr." + name, b"y") for name in names])), directory(b"d"))
    assert os.listxattr(layer_root / "d") == ["user.ok"]


@needs_root
def test_setuid_bits_and_capabilities_survive_the_change_of_owner(layer_root: Path) -> None:
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    apply(
        layer_root,
        pax(records((b"SCHILY.xattr.security.capability", capability))),
        header(b"a", mode=b"0006755\0", uid=b"0001750\0"),
    )
    status = (layer_root / "a").stat()
    assert stat.S_IMODE(status.st_mode) == 0o6755
    assert status.st_uid == 0o1750
    assert os.getxattr(layer_root / "a", "security.capability") == capability


def test_leftovers_of_aufs_are_left_out(layer_root: Path) -> None:
    apply(
        layer_root,
        file(b".wh..wh.aufs"),
        directory(b".wh..wh.plnk"),
        file(b".wh..wh.plnk/1.2", b"x"),
        file(b"a"),
    )
    assert os.listdir(layer_root) == ["a"]


def test_a_layer_without_padding_and_end_mark_is_taken(layer_root: Path) -> None:
    apply_layer(io.BytesIO(file(b"a", b"as umoci insert writes it")[: 512 + 25]), layer_root)
    assert (layer_root / "a").read_bytes() == b"as umoci insert writes it"


def test_the_statistics_count_entries_and_stored_bytes(layer_root: Path) -> None:
    seen: list[int] = []
    data = tar(directory(b"d"), file(b"d/a", b"12345"), file(b"d/b", b"678"))
    stats = apply_layer(io.BytesIO(data), layer_root, progress=seen.append)
    assert (stats.entries, stats.bytes) == (3, 8)
    assert seen == sorted(seen)
    assert 0 < seen[-1] <= len(data)


# ---- whiteouts ---------------------------------------------------------------------------------------------


def test_a_whiteout_removes_what_lower_layers_have_in_whatever_order(layer_root: Path) -> None:
    apply(layer_root, file(b"a", b"old"), file(b"d/x", b"old"), file(b"d/y", b"old"), link(b"l", b"d"))
    apply(
        layer_root, file(b"a", b"new"), file(b".wh.a"), file(b"d/y", b"new"), file(b".wh.d"), file(b".wh.l")
    )
    assert sorted(os.listdir(layer_root)) == ["a", "d"]
    assert (layer_root / "a").read_bytes() == b"new"
    assert os.listdir(layer_root / "d") == ["y"]
    assert (layer_root / "d/y").read_bytes() == b"new"


def test_an_opaque_directory_hides_lower_content_only(layer_root: Path) -> None:
    apply(layer_root, file(b"d/x/1", b"old"), file(b"d/y", b"old"), file(b"d/z/2", b"old"))
    apply(layer_root, directory(b"d"), file(b"d/z/3", b"new"), file(b"d/.wh..wh..opq"), file(b"d/w", b"new"))
    assert sorted(os.listdir(layer_root / "d")) == ["w", "z"]
    assert os.listdir(layer_root / "d/z") == ["3"]


def test_a_whiteout_reached_through_a_symlink_spares_what_the_layer_made(layer_root: Path) -> None:
    apply(
        layer_root, directory(b"usr"), file(b"usr/a", b"old"), file(b"usr/b", b"old"), link(b"alias", b"usr")
    )
    apply(layer_root, file(b"usr/a", b"new"), file(b"alias/.wh.a"), file(b"alias/.wh.b"))
    assert os.listdir(layer_root / "usr") == ["a"]


def test_a_whiteout_of_nothing_that_is_there_makes_nothing(layer_root: Path) -> None:
    apply(layer_root, file(b"no/such/.wh.name"))
    assert os.listdir(layer_root) == []


def test_a_tree_deeper_than_any_path_is_removed(layer_root: Path) -> None:
    level = "x" * 90
    descriptor = os.open(layer_root, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir(level, dir_fd=descriptor)
        below = os.open(level, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    apply(layer_root, file(b".wh." + level.encode()))
    assert os.listdir(layer_root) == []


# ---- an ordinary user --------------------------------------------------------------------------------------


@needs_root
def test_an_ordinary_user_gets_the_tree_as_their_own(users_root: Path) -> None:
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    closed = header(b"closed", b"5", mode=b"0000000\0")
    layer = tar(
        directory(b"."), closed, file(b"closed/a", b"x"), header(b"closed/in", b"5", mode=b"0000555\0"),
        pax(records((b"SCHILY.xattr.security.capability", capability), (b"SCHILY.xattr.user.a", b"1"))),
        header(b"tool", mode=b"0004555\0"), link(b"l", b"tool"), link(b"h", b"tool", HARD_LINK),
        header(b"p", b"6"),
    )  # fmt: skip

    def work() -> None:
        apply_layer(io.BytesIO(layer), users_root)
        apply_layer(io.BytesIO(tar(file(b"closed/in/b", b"y"), file(b"closed/.wh.a"))), users_root)
        with pytest.raises(PrivilegeError, match="only root can make"):
            apply_layer(io.BytesIO(tar(header(b"n", CHARACTER, device=(1, 3)))), users_root)

    as_ordinary_user(work)
    assert stat.S_IMODE((users_root / "closed").stat().st_mode) == 0
    assert stat.S_IMODE((users_root / "closed/in").stat().st_mode) == 0o555
    assert (users_root / "closed/in/b").read_bytes() == b"y"
    assert not (users_root / "closed/a").exists()
    assert stat.S_IMODE((users_root / "tool").stat().st_mode) == 0o4555
    assert os.listxattr(users_root / "tool") == ["user.a"]
    assert {path.lstat().st_uid for path in users_root.rglob("*")} == {65534}


def test_tars_of_the_standard_library_are_taken(layer_root: Path) -> None:
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as archive:
            member = tarfile.TarInfo("x" * 90 + "/" + "y" * 90)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"data"))
            if form != tarfile.USTAR_FORMAT:
                member = tarfile.TarInfo("symlink")
                member.type, member.linkname = tarfile.SYMTYPE, "z" * 200
                archive.addfile(member)
        apply_layer(io.BytesIO(out.getvalue()), layer_root)
        assert (layer_root / ("x" * 90) / ("y" * 90)).read_bytes() == b"data"
    assert os.readlink(layer_root / "symlink") == "z" * 200
