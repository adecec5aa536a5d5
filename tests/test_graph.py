"""The image graph over every driver that runs here: import, mount, commit, export, and crashes in between."""

import io
import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blocksnap import drivers, errors, oci
from blocksnap.archive import Change
from blocksnap.drivers import Driver
from blocksnap.graph import ImageGraph
from blocksnap.graph_names import find_image
from tests.driver_params import driver_params, driver_root, host_drivers
from tests.trees import compare_trees


@pytest.fixture(params=driver_params(without=["dm-snapshot"]))
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    """Any driver; most questions about the graph itself are put to vfs alone."""
    with driver_root(tmp_path, request.param) as root, drivers.open(request.param, root) as opened:
        yield opened
        opened.cleanup()


# What takes many processes is not asked of the kernel's drivers again: a guest starts them slowly.
on_the_host = pytest.mark.parametrize("driver", host_drivers(), indirect=True)
only_vfs = pytest.mark.parametrize("driver", ["vfs"], indirect=True)


@pytest.fixture
def graph(driver: Driver) -> Iterator[ImageGraph]:
    with ImageGraph(driver) as opened:
        yield opened
        assert_nothing_leaks(opened)


def assert_nothing_leaks(graph: ImageGraph) -> None:
    known = [layer.driver_id for layer in graph.layers()] + [container.id for container in graph.containers()]
    assert graph.driver.layers() == sorted(known)


def tar(**files: str) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name.replace("WH_", ".wh."))
            member.size, member.mtime = len(text), 1_600_000_000
            archive.addfile(member, io.BytesIO(text.encode()))
    out.seek(0)
    return out


BASE = {"base": "base", "shared": "from base"}
UPPER = {"upper": "upper", "WH_shared": ""}


def make_image(path: Path, *layers: dict[str, str], name: str = "app:1", cmd: str = "sh") -> Path:
    oci.write_layout(path, {"config": {"Cmd": [cmd]}}, [tar(**files) for files in layers], reference=name)
    return path


def damage_layer(image: Path) -> None:
    """Flip a byte in the contents of the largest blob."""
    blob = max((image / "blobs" / "sha256").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[-100] ^= 1
    blob.write_bytes(data)


# ---- import ------------------------------------------------------------------------------------------------


def test_image_is_imported_and_mounted(graph: ImageGraph, tmp_path: Path) -> None:
    image = graph.import_image(make_image(tmp_path / "image", BASE, UPPER))
    assert image.names == ("app:1",)
    assert image.config["config"] == {"Cmd": ["sh"]}
    assert [layer.diff_id for layer in image.layers] == image.config["rootfs"]["diff_ids"]
    with graph.container("db1", image) as root:
        assert sorted(os.listdir(root)) == ["base", "upper"]
        assert (root / "base").read_text() == "base"


def test_common_layers_are_stored_once(graph: ImageGraph, tmp_path: Path) -> None:
    first = graph.import_image(make_image(tmp_path / "first", BASE, UPPER, name="first"))
    second = graph.import_image(make_image(tmp_path / "second", BASE, {"other": "x"}, name="second"))
    assert first.layers[0] == second.layers[0]
    assert len(graph.layers()) == 3
    removed = graph.remove_image("first")
    assert removed == [first.layers[1]]
    assert graph.layers() == list(second.layers)


@only_vfs
def test_same_layer_in_another_place_is_another_layer(graph: ImageGraph, tmp_path: Path) -> None:
    graph.import_image(make_image(tmp_path / "first", BASE, UPPER, name="first"))
    graph.import_image(make_image(tmp_path / "second", UPPER, name="second"))
    assert len(graph.layers()) == 3


@only_vfs
def test_import_again_changes_nothing(graph: ImageGraph, tmp_path: Path) -> None:
    path = make_image(tmp_path / "image", BASE)
    assert graph.import_image(path) == graph.import_image(path)
    assert graph.import_image(path, name="other").names == ("app:1", "other")
    assert len(graph.images()) == 1


@only_vfs
def test_image_without_layers_has_empty_containers(graph: ImageGraph, tmp_path: Path) -> None:
    image = graph.import_image(make_image(tmp_path / "image"))
    with graph.container("empty", image) as root:
        assert os.listdir(root) == []
        (root / "file").write_text("text")
    assert graph.diff_container("empty") == [Change("/file", "A")]
    committed = graph.commit("empty", "filled")
    assert len(committed.layers) == 1


def test_damaged_layer_leaves_nothing_and_harms_nothing(graph: ImageGraph, tmp_path: Path) -> None:
    good = graph.import_image(make_image(tmp_path / "good", BASE, name="good"))
    bad = make_image(tmp_path / "bad", BASE, {"large": "x" * 100_000}, {"top": "top"}, name="bad")
    damage_layer(bad)
    with pytest.raises(errors.DigestError, match="fetch it again"):
        graph.import_image(bad)
    assert graph.images() == [good]
    assert graph.layers() == list(good.layers)
    assert_nothing_leaks(graph)


@only_vfs
def test_missing_layer_is_named_and_leaves_nothing(graph: ImageGraph, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", BASE, UPPER)
    (image / second_blob(image)).unlink()
    with pytest.raises(errors.MissingParentError, match="is missing"):
        graph.import_image(image)
    assert graph.layers() == []


def second_blob(image: Path) -> str:
    with oci.open_image(image) as source:
        return "blobs/" + source.layers[1].digest.replace(":", "/")


@only_vfs
def test_progress_tells_the_bytes_of_each_layer(graph: ImageGraph, tmp_path: Path) -> None:
    told: dict[str, int] = {}
    image = graph.import_image(make_image(tmp_path / "image", BASE, UPPER), progress=told.__setitem__)
    assert list(told) == [layer.diff_id for layer in image.layers]
    assert all(count == 10240 for count in told.values())


# ---- names -------------------------------------------------------------------------------------------------


@only_vfs
def test_references_find_their_image(graph: ImageGraph, tmp_path: Path) -> None:
    one = graph.import_image(make_image(tmp_path / "one", BASE), name="docker.io/library/app:1")
    two = graph.import_image(make_image(tmp_path / "two", UPPER), name="registry.example:5000/team/db:latest")
    for reference in ("docker.io/library/app:1", "app:1", one.id, one.id[:11], one.id[7:17], "1"):
        assert graph.image(reference).id == one.id, reference
    for reference in ("registry.example:5000/team/db", "latest", two.id[7:15]):
        assert graph.image(reference).id == two.id, reference


@only_vfs
def test_unknown_and_ambiguous_references_are_refused(graph: ImageGraph, tmp_path: Path) -> None:
    graph.import_image(make_image(tmp_path / "one", BASE), name="app:1")
    graph.import_image(make_image(tmp_path / "two", UPPER), name="app:2")
    with pytest.raises(errors.ArgumentError, match=r'"app" means 2 images, \w{12}, \w{12}'):
        graph.image("app")
    for reference in ("nothing", "", "app:3", "a" * 63, "sha256:", "%"):
        with pytest.raises(errors.LayerNotFoundError, match="there is no image"):
            graph.image(reference)


def test_ambiguous_beginnings_of_ids_are_refused() -> None:
    ids = ["sha256:abcd" + "0" * 60, "sha256:abcd" + "1" * 60]
    with pytest.raises(errors.ArgumentError, match="means 2 images"):
        find_image("abcd", {}, ids)
    assert find_image("abcd0", {}, ids) == ids[0]
    with pytest.raises(errors.LayerNotFoundError):
        find_image("abc", {}, ids)


@only_vfs
def test_name_of_another_image_is_taken_over_only_when_told(graph: ImageGraph, tmp_path: Path) -> None:
    old = graph.import_image(make_image(tmp_path / "old", BASE))
    new = make_image(tmp_path / "new", UPPER)
    with pytest.raises(errors.LayerExistsError, match='the name "app:1" is taken'):
        graph.import_image(new)
    assert graph.images() == [old]
    image = graph.import_image(new, replace=True)
    assert graph.image("app:1").id == image.id
    assert graph.image(old.id).names == ()


@only_vfs
def test_unfit_names_are_refused(graph: ImageGraph, tmp_path: Path) -> None:
    path = make_image(tmp_path / "image", BASE)
    for name in ("", "a b", "-x", "x" * 256, "a\n"):
        with pytest.raises(errors.ArgumentError, match="cannot be an image's name"):
            graph.import_image(path, name=name)
    image = graph.import_image(path)
    for name in ("", "a/b", ".x", "x" * 129, "a b"):
        with pytest.raises(errors.ArgumentError, match="cannot be a container's name"):
            graph.create_container(name, image)
    assert graph.containers() == []


@only_vfs
def test_one_of_several_names_is_removed_alone(graph: ImageGraph, tmp_path: Path) -> None:
    path = make_image(tmp_path / "image", BASE)
    graph.import_image(path, name="one")
    image = graph.import_image(path, name="two")
    assert graph.remove_image("one") == []
    assert graph.image(image.id).names == ("two",)
    assert graph.remove_image("two") == list(image.layers)
    assert graph.images() == []


@only_vfs
def test_tree_has_each_layer_below_its_parent(graph: ImageGraph, tmp_path: Path) -> None:
    one = graph.import_image(make_image(tmp_path / "one", BASE, UPPER, name="one"))
    two = graph.import_image(make_image(tmp_path / "two", BASE, name="two"))
    graph.import_image(make_image(tmp_path / "three", UPPER, name="three"))
    base, other = graph.tree()
    assert (base.layer, base.images) == (two.layers[0], ["two"])
    assert [(node.layer, node.images) for node in base.children] == [(one.layers[1], ["one"])]
    assert (other.images, other.children) == (["three"], [])


# ---- containers --------------------------------------------------------------------------------------------


def test_container_keeps_what_was_written(graph: ImageGraph, tmp_path: Path) -> None:
    image = graph.import_image(make_image(tmp_path / "image", BASE, UPPER))
    with graph.container("db1", image) as root:
        (root / "base").write_text("changed")
        (root / "upper").unlink()
    with graph.container("db1") as root:
        assert (root / "base").read_text() == "changed"
    with graph.container("db2", "app:1") as root:
        assert (root / "base").read_text() == "base"
    assert graph.diff_container("db1") == [Change("/base", "C"), Change("/upper", "D")]
    assert graph.diff_container("db2") == []
    assert [container.name for container in graph.containers()] == ["db1", "db2"]


def test_mounted_container_stays_so_until_it_is_unmounted(graph: ImageGraph, tmp_path: Path) -> None:
    graph.import_image(make_image(tmp_path / "image", BASE))
    graph.create_container("db1", "app:1")
    root = graph.mount("db1")
    assert graph.mount("db1") == root
    with graph.container("db1") as again:
        assert again == root
    assert (root / "base").read_text() == "base"
    with pytest.raises(errors.BusyError, match='"db1" is in use by a lasting mount'):
        graph.remove_container("db1")
    graph.umount("db1")
    with pytest.raises(errors.ArgumentError, match="is not mounted"):
        graph.umount("db1")
    graph.remove_container("db1")
    assert graph.containers() == []


@only_vfs
def test_container_names_are_taken_once(graph: ImageGraph, tmp_path: Path) -> None:
    one = graph.import_image(make_image(tmp_path / "one", BASE, name="one"))
    two = graph.import_image(make_image(tmp_path / "two", UPPER, name="two"))
    graph.create_container("db1", one)
    with pytest.raises(errors.LayerExistsError, match='container "db1" exists'):
        graph.create_container("db1", one)
    with pytest.raises(errors.LayerExistsError, match="of another image"), graph.container("db1", two):
        pass


@only_vfs
def test_unknown_containers_and_images_are_named(graph: ImageGraph, tmp_path: Path) -> None:
    image = graph.import_image(make_image(tmp_path / "image", BASE))
    calls: list[Callable[[str], object]] = [
        graph.get_container,
        graph.mount,
        graph.umount,
        graph.remove_container,
        graph.diff_container,
        lambda name: graph.commit(name, "new"),
        lambda name: graph.snapshot(name, "new"),
    ]
    for call in calls:
        with pytest.raises(errors.LayerNotFoundError, match='no container "nobody"'):
            call("nobody")
    with pytest.raises(errors.LayerNotFoundError, match='no image "nothing"'):
        graph.create_container("db1", "nothing")
    graph.remove_image("app:1")
    with pytest.raises(errors.LayerNotFoundError, match="was removed"):
        graph.create_container("db1", image)


def test_image_with_containers_is_removed_only_when_told(graph: ImageGraph, tmp_path: Path) -> None:
    image = graph.import_image(make_image(tmp_path / "image", BASE))
    with graph.container("db1", image):
        with pytest.raises(errors.BusyError, match='has the container "db1"'):
            graph.remove_image("app:1")
        with pytest.raises(errors.BusyError, match="in use by process"):
            graph.remove_image("app:1", force=True)
    assert graph.image("app:1") == image
    graph.remove_image("app:1", force=True)
    assert (graph.images(), graph.layers(), graph.containers()) == ([], [], [])


def test_snapshot_starts_where_its_origin_is(graph: ImageGraph, tmp_path: Path) -> None:
    graph.import_image(make_image(tmp_path / "image", BASE, UPPER))
    with graph.container("db1", "app:1") as root:
        (root / "base").write_text("before")
    copy = graph.snapshot("db1", "db2")
    with graph.container("db1") as root:
        (root / "base").write_text("after")
    graph.remove_container("db1")
    with graph.container("db2") as root:
        assert (root / "base").read_text() == "before"
    assert copy.image == graph.image("app:1").id
    assert graph.diff_container("db2") == [Change("/base", "C")]


# ---- commit and export -------------------------------------------------------------------------------------


def test_commit_makes_an_image_of_a_container(graph: ImageGraph, tmp_path: Path) -> None:
    image = graph.import_image(make_image(tmp_path / "image", BASE, UPPER))
    with graph.container("db1", image) as root:
        (root / "base").write_text("changed")
        (root / "upper").unlink()
        (root / "new").mkdir()
    committed = graph.commit("db1", "app:2", comment="why")
    assert committed.layers[:2] == image.layers
    assert committed.config["config"] == image.config["config"]
    assert committed.config["history"][-1]["comment"] == "why"
    assert len(committed.config["history"]) == len(committed.config["rootfs"]["diff_ids"]) == 3
    with graph.container("db2", "app:2") as ours, graph.container("db1") as theirs:
        assert compare_trees(ours, theirs) == []
    with graph.container("db3", "app:1") as root:
        assert (root / "base").read_text() == "base"


def test_exported_image_is_imported_as_it_was(graph: ImageGraph, tmp_path: Path) -> None:
    graph.import_image(make_image(tmp_path / "image", BASE, UPPER))
    with graph.container("db1", "app:1") as root:
        (root / "new").write_text("new")
        (root / "link").hardlink_to(root / "new")
        (root / "base").unlink()
    graph.commit("db1", "app:2")
    graph.export_image("app:2", tmp_path / "export.tar")
    with ImageGraph(drivers.open("vfs", tmp_path / "other")) as other:
        image = other.import_image(tmp_path / "export.tar")
        assert image.names == ("app:2",)
        with other.container("copy", image) as copy, graph.container("db1") as root:
            assert compare_trees(copy, root) == []


@only_vfs
def test_export_does_not_replace_a_file(graph: ImageGraph, tmp_path: Path) -> None:
    path = make_image(tmp_path / "image", BASE)
    graph.import_image(path)
    with pytest.raises(errors.LayerExistsError, match="exists"):
        graph.export_image("app:1", path)


# ---- crashes and company -----------------------------------------------------------------------------------


def run(driver: Driver, code: str, *, seconds: float | None = None) -> int:
    """Run code in another process that has opened the graph; kill it after some seconds."""
    program = f"""import os, sys
from pathlib import Path
from blocksnap import drivers
from blocksnap.graph import ImageGraph
from blocksnap.graph_names import find_image
driver = drivers.open({driver.name!r}, {str(driver.root)!r})
graph = ImageGraph(driver)
print("open", flush=True)
{code}
graph.close(); driver.close()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            return process.wait(seconds or 120)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


@on_the_host
@pytest.mark.parametrize("layer", [0, 1])
def test_import_that_is_killed_leaves_nothing(driver: Driver, tmp_path: Path, layer: int) -> None:
    image = make_image(
        tmp_path / "image", BASE | {"large": "x" * 3_000_000}, UPPER | {"big": "y" * 3_000_000}
    )
    with oci.open_image(image) as source:
        victim = source.layers[layer].diff_id
    driver.close()
    code = f"""def progress(diff_id, count):
    if diff_id == {victim!r} and count > 1_000_000:
        os.kill(os.getpid(), {int(signal.SIGKILL)})
graph.import_image({str(image)!r}, progress=progress)"""
    assert run(driver, code) == -signal.SIGKILL
    with drivers.open(driver.name, driver.root) as again, ImageGraph(again) as graph:
        assert (graph.images(), graph.layers(), again.layers()) == ([], [], [])
        graph.import_image(image)
        with graph.container("db1", "app:1") as root:
            assert (root / "big").stat().st_size == 3_000_000
        again.cleanup()


@on_the_host
@pytest.mark.parametrize("seconds", [0.05, 0.11, 0.17, 0.4])
def test_killed_work_on_containers_leaks_nothing(driver: Driver, tmp_path: Path, seconds: float) -> None:
    with ImageGraph(driver) as graph:
        graph.import_image(make_image(tmp_path / "image", *({f"f{n}": "x" * 1000} for n in range(3))))
        graph.create_container("kept", "app:1")
    driver.close()
    code = """for number in range(10_000):
    with graph.container(f"c{number}", "app:1") as root:
        (root / "file").write_text("text")
    if number % 3: graph.snapshot(f"c{number}", f"s{number}")
    if number % 2: graph.remove_container(f"c{number}")
    if number % 5 == 0: graph.commit("kept", f"image:{number}")"""
    assert run(driver, code, seconds=seconds) == -signal.SIGKILL
    with drivers.open(driver.name, driver.root) as again, ImageGraph(again) as graph:
        assert_nothing_leaks(graph)
        for container in graph.containers():
            with graph.container(container.name) as root:
                assert (root / "f0").exists()
        for image in graph.images():
            graph.remove_image(image.id, force=True)
        assert again.layers() == []
        again.cleanup()


@only_vfs
def test_two_processes_import_one_image_at_once(driver: Driver, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", *({f"f{n}": "x" * 100_000} for n in range(5)))
    with ImageGraph(driver) as graph:
        code = f"""from blocksnap import drivers, graph
graph.ImageGraph(drivers.open("vfs", {str(driver.root)!r})).import_image({str(image)!r})"""
        running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
        assert [process.wait(120) for process in running] == [0, 0, 0]
        assert len(graph.layers()) == 5
        assert_nothing_leaks(graph)


@only_vfs
def test_import_under_way_is_left_alone_by_others(driver: Driver, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", {"large": "x" * 3_000_000})
    seen: list[int] = []

    def open_another(_: str, __: int) -> None:
        if not seen:
            with ImageGraph(drivers.open("vfs", driver.root)) as other:
                seen.append(len(other.images()) + len(other.layers()))
                assert len(driver.layers()) == 1

    with ImageGraph(driver) as graph:
        graph.import_image(image, progress=open_another)
        assert seen == [0]
        assert_nothing_leaks(graph)


@only_vfs
def test_foreign_and_damaged_databases_are_refused(driver: Driver) -> None:
    database = driver.root / "graph.db"
    database.write_bytes(b"not a database at all" * 100)
    with pytest.raises(errors.DamagedMetadataError, match="choose another root"):
        ImageGraph(driver)
    database.unlink()
    with sqlite3.connect(database) as foreign:
        foreign.execute("PRAGMA application_id = 77")
        foreign.execute("CREATE TABLE t (x)")
    foreign.close()
    with pytest.raises(errors.PoolFormatError, match="is not an image graph"):
        ImageGraph(driver)
