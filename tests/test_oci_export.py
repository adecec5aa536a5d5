"""Layouts written: read back by us, by umoci and by skopeo."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blocksnap import oci
from blocksnap.archive import pack_diff
from blocksnap.errors import (
    LayerExistsError,
)
from tests.hostile_tars import file, tar
from tests.images import require_tools, run, umoci
from tests.layouts import Layout, unpack
from tests.trees import compare_trees


@pytest.mark.parametrize("name", ["folder", "archive.tar"])
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_what_is_written_is_read_back(layout: Layout, tmp_path: Path, name: str, compression: Any) -> None:
    config = {"config": {"Cmd": ["/bin/sh"]}, "history": [{"created_by": "somebody"}]}
    streams = [io.BytesIO(layer) for layer in layout.layers]
    digest = oci.write_layout(tmp_path / name, config, streams, reference="v1", compression=compression)
    image = unpack(tmp_path / name, tmp_path / "root", "v1")
    assert image.digest == digest
    assert image.config["config"] == {"Cmd": ["/bin/sh"]}
    assert len(image.config["history"]) == 2
    assert (tmp_path / "root/d/b").read_text() == "two"


def test_umoci_and_skopeo_take_what_is_written(small_unpacked: Path, tmp_path: Path) -> None:
    require_tools("umoci", "skopeo")
    for name in ("layout", "layout.tar"):
        with oci.LayoutWriter.create(tmp_path / name) as writer:
            with writer.layer() as out:
                pack_diff(None, small_unpacked, out)
            writer.commit({"config": {}}, reference="latest")
    run("skopeo", "copy", "-q", f"oci-archive:{tmp_path}/layout.tar:latest", f"oci:{tmp_path}/copy:latest")
    run(
        "skopeo", "copy", "-q", f"oci:{tmp_path}/layout:latest", f"docker-archive:{tmp_path}/docker.tar:a/b:c"
    )
    for name in ("layout", "copy"):
        umoci("unpack", tmp_path / name, tmp_path / f"{name}.bundle")
        assert compare_trees(tmp_path / f"{name}.bundle/rootfs", small_unpacked) == []
    unpack(tmp_path / "docker.tar", tmp_path / "root")
    assert compare_trees(tmp_path / "root", small_unpacked) == []


def test_a_layout_is_never_written_over_something(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(LayerExistsError, match="choose another name"):
        oci.write_layout(tmp_path / "there", {}, [])


@pytest.mark.parametrize("name", ["folder", "archive.tar"])
def test_an_interrupted_export_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    def layers() -> Iterator[io.BytesIO]:
        yield io.BytesIO(tar(file(b"a")))
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        oci.write_layout(tmp_path / name, {}, layers())
    assert os.listdir(tmp_path) == []
