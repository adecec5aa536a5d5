"""What every driver must do: the cases of Docker's graphtest, and what the image graph relies on besides."""

import io
import os
import random
import signal
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blocksnap import drivers, errors, mount
from blocksnap.archive import Change
from blocksnap.drivers import Driver
from tests.conformance.conftest import OpenDriver, mounts_below
from tests.trees import compare_trees

IS_ROOT = os.geteuid() == 0


def own(path: Path, uid: int, gid: int) -> None:
    """Give a file to somebody else, where we may."""
    if IS_ROOT:
        os.chown(path, uid, gid, follow_symlinks=False)


def fill_base(root: Path) -> None:
    (root / "directory").mkdir()
    own(root / "directory", 1, 2)
    (root / "directory").chmod(0o1705)
    (root / "file").write_text("base")
    own(root / "file", 3, 4)
    (root / "file").chmod(0o4751)
    (root / "directory" / "inner").write_text("inner")


def check_base(root: Path) -> None:
    directory, file = (root / "directory").stat(), (root / "file").stat()
    assert (stat.S_IMODE(directory.st_mode), stat.S_IMODE(file.st_mode)) == (0o1705, 0o4751)
    if IS_ROOT:
        assert (directory.st_uid, directory.st_gid, file.st_uid, file.st_gid) == (1, 2, 3, 4)
    assert (root / "file").read_text() == "base"
    assert sorted(os.listdir(root)) == ["directory", "file"]


def make_base(driver: Driver, id: str = "base") -> None:
    driver.create(id)
    with driver.mounted(id) as root:
        fill_base(root)


def make_layer(driver: Driver, id: str, parent: str | None, change: Callable[[Path], object]) -> None:
    driver.create(id, parent)
    with driver.mounted(id) as root:
        change(root)


def layer_tar(members: dict[str, bytes | tarfile.TarInfo]) -> io.BytesIO:
    """Return a tar of files with these contents, or of the members as they are."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name) if isinstance(content, bytes) else content
            member.name = name
            data = content if isinstance(content, bytes) else b""
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    out.seek(0)
    return out


def link(kind: bytes, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo()
    member.type, member.linkname = kind, target
    return member


def run_elsewhere(driver: Driver, code: str, *, kill: bool = False) -> str:
    """Run code in another process that has opened the driver; it is killed at the end instead of closing."""
    end = f"os.kill(os.getpid(), {int(signal.SIGKILL)})" if kill else "driver.close()"
    program = f"""import os, pathlib
from blocksnap import drivers
driver = drivers.open({driver.name!r}, {str(driver.root)!r})
{code}
{end}"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr
    return done.stdout


# ---- Docker's cases ----------------------------------------------------------------------------------------


def test_new_layer_is_an_empty_directory_of_its_maker(driver: Driver) -> None:
    driver.create("empty")
    assert driver.exists("empty")
    assert driver.layers() == ["empty"]
    assert driver.parent("empty") is None
    with driver.mounted("empty") as root:
        info = root.stat()
        assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o755, os.getuid(), os.getgid())
        assert os.listdir(root) == []


def test_layer_keeps_modes_and_owners_over_unmounting(driver: Driver) -> None:
    make_base(driver)
    with driver.mounted("base") as root:
        check_base(root)


def test_child_begins_as_its_parent_and_leaves_it_unchanged(driver: Driver) -> None:
    make_base(driver)
    driver.create_read_write("child", "base")
    assert driver.parent("child") == "base"
    with driver.mounted("child") as root:
        check_base(root)
        (root / "file").write_text("changed")
        (root / "new").write_text("new")
        (root / "directory" / "inner").unlink()
    with driver.mounted("base") as root:
        check_base(root)
        assert (root / "directory" / "inner").read_text() == "inner"
    with driver.mounted("child") as root:
        assert (root / "file").read_text() == "changed"
        assert not (root / "directory" / "inner").exists()


def test_root_directory_of_a_child_has_the_attributes_of_its_parents(driver: Driver) -> None:
    driver.create("base")
    with driver.mounted("base") as root:
        own(root, 5, 6)
        root.chmod(0o1750)
    driver.create("child", "base")
    with driver.mounted("child") as root:
        assert stat.S_IMODE(root.stat().st_mode) == 0o1750
        assert not IS_ROOT or (root.stat().st_uid, root.stat().st_gid) == (5, 6)


def test_hundred_layers_or_all_that_can_be_are_read_through_the_uppermost(driver: Driver) -> None:
    layers = min(100, driver.deepest or 100)
    for depth in range(layers):
        parent = f"layer-{depth - 1}" if depth else None

        def change(root: Path, depth: int = depth) -> None:
            (root / f"file-{depth}").write_text(str(depth))
            (root / "shared").write_text(str(depth))

        make_layer(driver, f"layer-{depth}", parent, change)
    uppermost = f"layer-{layers - 1}"
    with driver.mounted(uppermost) as root:
        assert (root / "shared").read_text() == str(layers - 1)
        assert [int((root / f"file-{depth}").read_text()) for depth in range(layers)] == [*range(layers)]
    if layers < 100:
        with pytest.raises(errors.NotSupportedError, match="no more than"):
            driver.create("one-more", uppermost)


def test_diff_applied_elsewhere_makes_the_same_tree(driver: Driver) -> None:
    make_layer(driver, "base", None, fill_rich)
    make_layer(driver, "upper", "base", change_rich)
    driver.create("copy", "base")
    with driver.diff("upper", "base") as tar:
        applied = driver.apply_diff("copy", "base", tar)
    assert applied == driver.diff_size("upper", "base")
    with driver.mounted("upper") as upper, driver.mounted("copy") as copy:
        assert compare_trees(upper, copy) == []


def test_diff_without_a_parent_is_the_whole_layer(driver: Driver) -> None:
    make_layer(driver, "base", None, fill_rich)
    make_layer(driver, "upper", "base", change_rich)
    driver.create("copy")
    with driver.diff("upper") as tar:
        driver.apply_diff("copy", None, tar)
    with driver.mounted("upper") as upper, driver.mounted("copy") as copy:
        assert compare_trees(upper, copy) == []


def fill_rich(root: Path) -> None:
    fill_base(root)
    (root / "linked").write_text("two names")
    (root / "link").hardlink_to(root / "linked")
    (root / "symlink").symlink_to("directory")
    (root / "deep" / "er").mkdir(parents=True)
    (root / "deep" / "er" / "gone").write_text("gone")
    (root / "becomes-file").mkdir()
    (root / "becomes-file" / "inner").write_text("inner")
    (root / "becomes-directory").write_text("a file")
    with (root / "sparse").open("wb") as file:
        file.seek(3 << 20)
        file.write(b"end")
    os.utime(root / "linked", ns=(1, 1_234_567_890_123_456_789))


def change_rich(root: Path) -> None:
    with (root / "link").open("a") as file:
        file.write(" changed")
    (root / "deep" / "er" / "gone").unlink()
    (root / "becomes-file" / "inner").unlink()
    (root / "becomes-file").rmdir()
    (root / "becomes-file").write_text("a file")
    (root / "becomes-directory").unlink()
    (root / "becomes-directory").mkdir()
    (root / "directory").chmod(0o700)
    (root / "new").write_text("new")
    (root / "new-link").hardlink_to(root / "new")
    os.mkfifo(root / "fifo")
    os.setxattr(root / "file", "user.blocksnap", b"value")
    if IS_ROOT:
        os.mknod(root / "device", stat.S_IFCHR | 0o640, os.makedev(1, 3))
        os.chown(root / "symlink", 7, 8, follow_symlinks=False)
        os.setxattr(root / "new", "security.capability", bytes.fromhex("0100000202000000") + bytes(12))


def test_changes_are_told_as_docker_tells_them(driver: Driver) -> None:
    make_base(driver)

    def change(root: Path) -> None:
        (root / "file").unlink()
        (root / "directory" / "added").write_text("added")
        (root / "directory" / "inner").write_text("inner and more")
        (root / "new").mkdir()

    make_layer(driver, "upper", "base", change)
    assert driver.changes("upper", "base") == [
        Change("/directory", "C"),
        Change("/directory/added", "A"),
        Change("/directory/inner", "C"),
        Change("/file", "D"),
        Change("/new", "A"),
    ]
    assert driver.diff_size("upper", "base") == len("added") + len("inner and more")


def test_unchanged_child_has_no_changes(driver: Driver) -> None:
    make_base(driver)
    driver.create_read_write("child", "base")
    assert driver.changes("child", "base") == []
    assert driver.diff_size("child", "base") == 0


# ---- applying layers ---------------------------------------------------------------------------------------


def test_whiteouts_and_opaque_directories_hide_names_of_parents(driver: Driver) -> None:
    make_layer(driver, "base", None, fill_rich)
    driver.create("upper", "base")
    tar = layer_tar({".wh.file": b"", "deep/er/.wh..wh..opq": b"", "deep/er/new": b"new", ".wh.symlink": b""})
    assert driver.apply_diff("upper", "base", tar) == 3
    with driver.mounted("upper") as root:
        assert not (root / "file").exists()
        assert not os.path.lexists(root / "symlink")
        assert os.listdir(root / "deep" / "er") == ["new"]
        assert not [name for name in os.listdir(root) if name.startswith(".wh.")]
    with driver.mounted("base") as root:
        assert (root / "file").read_text() == "base"
        assert os.listdir(root / "deep" / "er") == ["gone"]


def test_directory_made_again_over_a_whiteout_is_empty(driver: Driver) -> None:
    make_layer(driver, "base", None, fill_rich)
    make_layer(driver, "without", "base", lambda root: (root / "becomes-file" / "inner").unlink())
    driver.create("upper", "without")
    driver.apply_diff("upper", "without", layer_tar({".wh.deep": b"", "deep/new": b"new"}))
    driver.create("top", "upper")
    with driver.mounted("top") as root:
        assert os.listdir(root / "deep") == ["new"]
        assert os.listdir(root / "becomes-file") == []


def test_layer_links_to_a_file_of_its_parents(driver: Driver) -> None:
    make_base(driver)
    driver.create("upper", "base")
    driver.apply_diff("upper", "base", layer_tar({"name": link(tarfile.LNKTYPE, "file")}))
    with driver.mounted("upper") as root:
        assert (root / "name").read_text() == "base"
        assert (root / "name").samefile(root / "file")


def test_layer_is_applied_through_symlinks_of_its_parents(driver: Driver) -> None:
    make_layer(driver, "base", None, fill_rich)
    driver.create("upper", "base")
    driver.apply_diff("upper", "base", layer_tar({"symlink/through": b"through"}))
    with driver.mounted("upper") as root:
        assert (root / "symlink").is_symlink()
        assert (root / "directory" / "through").read_text() == "through"


def test_directory_that_a_layer_only_passes_keeps_its_attributes(driver: Driver) -> None:
    make_base(driver)
    driver.create("upper", "base")
    driver.apply_diff("upper", "base", layer_tar({"directory/added": b"added"}))
    with driver.mounted("upper") as root:
        assert stat.S_IMODE((root / "directory").stat().st_mode) == 0o1705
        assert not IS_ROOT or (root / "directory").stat().st_uid == 1


def test_layer_with_children_takes_no_diff(driver: Driver) -> None:
    make_base(driver)
    driver.create("child", "base")
    with pytest.raises(errors.BusyError, match='has the child "child"'):
        driver.apply_diff("base", None, layer_tar({"new": b""}))


def test_diff_is_applied_on_the_real_parent_only(driver: Driver) -> None:
    make_base(driver)
    driver.create("child", "base")
    with pytest.raises(errors.ArgumentError, match="has the parent 'base'"):
        driver.apply_diff("child", None, layer_tar({"new": b""}))


# ---- mounts ------------------------------------------------------------------------------------------------


def test_layer_stays_mounted_until_its_last_put(driver: Driver) -> None:
    make_base(driver)
    first, second = driver.get("base"), driver.get("base")
    assert first == second
    driver.put("base")
    check_base(first)
    with pytest.raises(errors.BusyError, match="in use by process"):
        driver.remove("base")
    driver.put("base")
    assert not mount.is_mounted(first)
    assert driver.holders("base") == []
    driver.remove("base")


def test_put_of_what_nobody_got_is_no_error(driver: Driver) -> None:
    driver.create("layer")
    driver.put("layer")
    driver.put("unknown")


def test_cleanup_unmounts_everything(driver: Driver) -> None:
    make_base(driver)
    driver.create_read_write("child", "base")
    driver.get("base")
    driver.get("child")
    driver.get("child", lasting=True)
    driver.cleanup()
    assert mounts_below(driver.root) == []
    driver.remove("child")
    driver.remove("base")


def test_lasting_mount_outlives_its_process(driver: Driver) -> None:
    make_base(driver)
    driver.close()
    path = Path(run_elsewhere(driver, "print(driver.get('base', lasting=True), end='')"))
    check_base(path)
    again = drivers.open(driver.name, driver.root)
    try:
        assert again.is_lasting("base")
        again.put("base")
        assert not again.is_lasting("base")
        assert not mount.is_mounted(path)
    finally:
        again.close()


def test_mount_of_a_killed_process_is_taken_over_by_get(open_driver: OpenDriver) -> None:
    driver = open_driver()
    make_base(driver)
    driver.close()
    run_elsewhere(driver, "driver.get('base')", kill=True)
    driver = open_driver()
    with driver.mounted("base") as root:
        check_base(root)
    assert not mount.is_mounted(root)
    driver.remove("base")


def test_mount_of_a_killed_process_is_ended_by_cleanup(open_driver: OpenDriver) -> None:
    driver = open_driver()
    make_base(driver)
    driver.close()
    run_elsewhere(driver, "driver.get('base')", kill=True)
    driver = open_driver()
    driver.cleanup()
    assert mounts_below(driver.root) == []


# ---- restart -----------------------------------------------------------------------------------------------


def test_layers_are_there_after_a_restart(open_driver: OpenDriver) -> None:
    driver = open_driver()
    make_base(driver)
    make_layer(driver, "child", "base", lambda root: (root / "new").write_text("new"))
    driver.get("child")
    driver = open_driver()
    assert driver.layers() == ["base", "child"]
    assert driver.parent("child") == "base"
    with driver.mounted("child") as root:
        assert (root / "new").read_text() == "new"
        assert (root / "file").read_text() == "base"


def test_layers_are_there_in_another_process(driver: Driver) -> None:
    make_base(driver)
    make_layer(driver, "child", "base", lambda root: (root / "new").write_text("new"))
    driver.close()
    code = """print(driver.parent("child"))
with driver.mounted("child") as root:
    print(*sorted(os.listdir(root)), (root / "new").read_text())"""
    assert run_elsewhere(driver, code) == "base\ndirectory file new new\n"


# ---- removal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_layers_are_removed_in_any_legal_order(driver: Driver, seed: int) -> None:
    choose = random.Random(seed)
    parents: dict[str, str | None] = {"n0": None}
    make_layer(driver, "n0", None, lambda root: (root / "n0").write_text("n0"))
    for number in range(1, 7):
        parent = choose.choice(sorted(parents))
        parents[f"n{number}"] = parent

        def change(root: Path, id: str = f"n{number}") -> None:
            (root / id).write_text(id)

        make_layer(driver, f"n{number}", parent, change)
    while parents:
        leaf = choose.choice(sorted(set(parents) - set(parents.values())))
        driver.remove(leaf)
        parents.pop(leaf)
        assert driver.layers() == sorted(parents)
        if parents:
            with driver.mounted(survivor := choose.choice(sorted(parents))) as root:
                assert (root / survivor).read_text() == survivor


def test_layer_with_children_is_not_removed(driver: Driver) -> None:
    make_base(driver)
    driver.create("child", "base")
    with pytest.raises(errors.BusyError, match='has the child "child"'):
        driver.remove("base")
    assert driver.exists("base")


def test_removal_of_an_unknown_layer_is_no_error(driver: Driver) -> None:
    driver.remove("unknown")


def test_removed_id_can_be_used_again(driver: Driver) -> None:
    make_base(driver, "layer")
    driver.remove("layer")
    assert not driver.exists("layer")
    driver.create("layer")
    with driver.mounted("layer") as root:
        assert os.listdir(root) == []


# ---- snapshots ---------------------------------------------------------------------------------------------


def test_snapshot_goes_its_own_way_and_survives_its_origin(driver: Driver) -> None:
    make_base(driver)
    driver.create_read_write("origin", "base")
    with driver.mounted("origin") as root:
        (root / "file").write_text("before")
        (root / "directory" / "inner").unlink()
    driver.snapshot("snapshot", "origin")
    with driver.mounted("origin") as root:
        (root / "file").write_text("after")
    assert driver.parent("snapshot") == "base"
    driver.remove("origin")
    with driver.mounted("snapshot") as root:
        assert (root / "file").read_text() == "before"
        assert not (root / "directory" / "inner").exists()
    assert Change("/directory/inner", "D") in driver.changes("snapshot", "base")


# ---- names, errors, figures --------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["", ".", "..", ".hidden", "a/b", "/a", "a b", "a\n", "é", "x" * 129, "a\0"])
def test_unfit_ids_are_refused_everywhere(driver: Driver, id: str) -> None:
    calls: list[Callable[[str], object]] = [
        driver.create,
        driver.create_read_write,
        lambda id: driver.create("child", id),
        driver.remove,
        driver.get,
        driver.put,
        driver.exists,
        driver.metadata,
    ]
    for call in calls:
        with pytest.raises(errors.ArgumentError, match="cannot be a layer id"):
            call(id)
    assert driver.layers() == []


def test_longest_and_oddest_ids_are_taken(driver: Driver) -> None:
    ids = sorted(["x" * 128, "a.b_c-D9", "-", "_"])
    for id in ids:
        driver.create(id)
        with driver.mounted(id) as root:
            (root / "file").write_text(id)
    assert driver.layers() == ids


def test_taken_id_and_unknown_parent_are_refused(driver: Driver) -> None:
    driver.create("layer")
    with pytest.raises(errors.LayerExistsError, match='layer "layer" exists'):
        driver.create_read_write("layer")
    with pytest.raises(errors.LayerNotFoundError, match='parent "nobody"'):
        driver.create("child", "nobody")
    assert driver.layers() == ["layer"]


def test_unknown_storage_option_is_refused(driver: Driver) -> None:
    with pytest.raises(errors.ArgumentError, match='no storage option "colour"'):
        driver.create_read_write("layer", storage_opt={"colour": "red"})
    with pytest.raises(errors.ArgumentError, match="is not a size"):
        driver.create("layer", storage_opt={"size": "large"})
    assert driver.layers() == []


def test_limit_of_a_layer_is_kept_or_refused(driver: Driver) -> None:
    try:
        driver.create_read_write("layer", storage_opt={"size": "20G"})
    except errors.NotSupportedError:
        assert driver.layers() == []
        return
    with driver.mounted("layer") as root:
        (root / "file").write_text("text")
    assert driver.layers() == ["layer"]


def test_unknown_layer_is_named(driver: Driver) -> None:
    calls: list[Callable[[str], object]] = [
        driver.get,
        driver.metadata,
        driver.accounting,
        driver.parent,
        driver.diff,
        driver.changes,
    ]
    for call in calls:
        with pytest.raises(errors.LayerNotFoundError, match='layer "nobody"'):
            call("nobody")


def test_root_of_one_driver_is_refused_to_another(driver: Driver) -> None:
    names = [name for name, reason in drivers.available(driver.root) if reason is None]
    for other in set(names) - {driver.name}:
        with pytest.raises(errors.ArgumentError, match=f'belongs to driver "{driver.name}"'):
            drivers.open(other, driver.root)


def test_driver_tells_its_name_status_and_metadata(driver: Driver) -> None:
    make_base(driver)
    assert str(driver) == driver.name
    rows = driver.status()
    assert rows
    assert all(isinstance(text, str) for row in rows for text in row)
    with driver.mounted("base"):
        values = driver.metadata("base")
    assert values
    assert all(isinstance(text, str) for item in values.items() for text in item)


def test_accounting_counts_the_copy_of_a_small_change(driver: Driver) -> None:
    size = 8 << 20
    make_layer(driver, "base", None, lambda root: (root / "large").write_bytes(os.urandom(size)))
    driver.create_read_write("child", "base")
    with driver.mounted("child") as root, (root / "large").open("r+b") as file:
        file.seek(size // 2)
        file.write(b"!")
    driver.sync()
    figures = driver.accounting("child")
    whole = figures.copy_bytes == size
    assert whole or figures.copy_bytes is None or 0 <= figures.copy_bytes < size // 8
    assert figures.allocated_bytes is not None
    assert figures.allocated_bytes >= (size if whole else 1)


def test_threads_share_a_driver(driver: Driver) -> None:
    make_base(driver)

    def work(number: int) -> str:
        id = f"child-{number}"
        driver.create_read_write(id, "base")
        with driver.mounted(id) as root:
            (root / "file").write_text(id)
        with driver.mounted(id) as root:
            return (root / "file").read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(12))) == [f"child-{number}" for number in range(12)]
    with driver.mounted("base") as root:
        check_base(root)
