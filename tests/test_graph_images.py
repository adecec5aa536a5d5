"""Images made by umoci and skopeo: every driver mounts the tree that umoci unpacks."""

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap import drivers
from blocksnap.graph import ImageGraph
from tests.driver_params import driver_root, host_drivers
from tests.trees import compare_trees

missing_tools = [tool for tool in ("umoci", "skopeo") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for owners and devices"),
    pytest.mark.skipif(bool(missing_tools), reason=f"needs {' and '.join(missing_tools)}"),
]

CAPABILITY = bytes.fromhex("0100000200200000") + bytes(12)


def umoci(*arguments: str | Path) -> None:
    subprocess.run(["umoci", *arguments], check=True, capture_output=True)


def first_layer(root: Path) -> None:
    """Parts of this machine, and what a root file system has of everything."""
    shutil.copytree("/etc", root / "etc", symlinks=True, ignore_dangling_symlinks=True)
    (root / "usr" / "lib").mkdir(parents=True)
    (root / "lib").symlink_to("usr/lib")
    for number in range(200):
        (root / "usr" / "lib" / f"lib{number}.so").write_bytes(os.urandom(number * 37))
    (root / "usr" / "bin").mkdir()
    (root / "usr" / "bin" / "perl").write_bytes(os.urandom(100_000))
    (root / "usr" / "bin" / "perl5").hardlink_to(root / "usr" / "bin" / "perl")
    (root / "usr" / "bin" / "ping").write_text("ping")
    os.setxattr(
        root / "usr" / "bin" / "ping", "security.capability", bytes.fromhex("0100000200200000") + bytes(12)
    )
    (root / "usr" / "bin" / "su").write_text("su")
    (root / "usr" / "bin" / "su").chmod(0o4755)
    (root / "dev").mkdir()
    os.mknod(root / "dev" / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mkfifo(root / "dev" / "fifo")
    (root / "var" / "mail").mkdir(parents=True)
    os.chown(root / "var" / "mail", 0, 8)
    (root / "var" / "mail").chmod(0o2775)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)


def second_layer(root: Path) -> None:
    shutil.rmtree(root / "etc" / "default", ignore_errors=True)
    (root / "usr" / "lib" / "lib7.so").unlink()
    with (root / "usr" / "bin" / "perl").open("ab") as file:
        file.write(b"patched")
    (root / "lib" / "new.so").write_text("through a symlink")
    (root / "tmp" / "file with blanks ünd more").write_text("x")


def third_layer(root: Path) -> None:
    (root / "etc" / "default").mkdir(exist_ok=True)
    (root / "etc" / "default" / "again").write_text("again")
    (root / "dev" / "null").unlink()
    (root / "dev" / "null").mkdir()
    shutil.rmtree(root / "var")
    (root / "var").symlink_to("usr")
    with (root / "sparse").open("wb") as file:
        file.truncate(5 << 20)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with three layers, beside it the tree that umoci unpacks, and a docker archive of it."""
    folder = tmp_path_factory.mktemp("image")
    layout, work = folder / "layout", folder / "work"
    umoci("init", "--layout", layout)
    umoci("new", "--image", f"{layout}:app")
    for change in (first_layer, second_layer, third_layer):
        umoci("unpack", "--image", f"{layout}:app", work)
        change(work / "rootfs")
        umoci("repack", "--image", f"{layout}:app", work)
        shutil.rmtree(work)
    umoci("unpack", "--image", f"{layout}:app", folder / "unpacked")
    archive = f"docker-archive:{folder / 'docker.tar'}:app:1"
    subprocess.run(["skopeo", "copy", "-q", f"oci:{layout}:app", archive], check=True, capture_output=True)
    return layout


@pytest.fixture(params=host_drivers())  # umoci takes minutes in a guest
def graph(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ImageGraph]:
    with (
        driver_root(tmp_path, request.param) as root,
        drivers.open(request.param, root) as driver,
        ImageGraph(driver) as graph,
    ):
        yield graph
        driver.cleanup()


def test_mounted_tree_is_the_one_that_umoci_unpacks(graph: ImageGraph, layout: Path) -> None:
    image = graph.import_image(layout)
    assert len(image.layers) == 3
    with graph.container("db1", image) as root:
        assert compare_trees(layout.parent / "unpacked" / "rootfs", root) == []


def test_debian_image_is_mounted_as_umoci_unpacks_it(
    graph: ImageGraph, debian_oci_layout: Path, debian_unpacked: Path
) -> None:
    image = graph.import_image(debian_oci_layout)
    assert len(image.layers) == 3
    with graph.container("debian", image) as root:
        assert compare_trees(debian_unpacked, root) == []


def test_debian_docker_archive_is_mounted_as_umoci_unpacks_it(
    graph: ImageGraph, debian_docker_archive: Path, debian_unpacked: Path
) -> None:
    image = graph.import_image(debian_docker_archive)
    with graph.container("debian", image) as root:
        assert compare_trees(debian_unpacked, root) == []


def test_docker_archive_is_the_same_image(graph: ImageGraph, layout: Path) -> None:
    first = graph.import_image(layout)
    second = graph.import_image(layout.parent / "docker.tar")
    assert [layer.chain_id for layer in first.layers] == [layer.chain_id for layer in second.layers]
    assert len(graph.layers()) == 3
    with graph.container("db1", "app:1") as root:
        assert compare_trees(layout.parent / "unpacked" / "rootfs", root) == []


def test_umoci_unpacks_what_was_committed_and_exported(
    graph: ImageGraph, layout: Path, tmp_path: Path
) -> None:
    graph.import_image(layout)
    with graph.container("db1", "app") as root:
        second_layer_again(root)
        graph.commit("db1", "app:2")
        graph.export_image("app:2", tmp_path / "export")
        umoci("unpack", "--image", f"{tmp_path / 'export'}:app:2", tmp_path / "unpacked")
        assert compare_trees(tmp_path / "unpacked" / "rootfs", root) == []


def second_layer_again(root: Path) -> None:
    (root / "usr" / "lib" / "lib8.so").unlink()
    with (root / "usr" / "bin" / "perl5").open("ab") as file:
        file.write(b"patched again")
    (root / "dev" / "null").rmdir()
    (root / "usr" / "bin" / "su").chmod(0o755)
    (root / "new").mkdir()
    (root / "new" / "file").write_text("new")
