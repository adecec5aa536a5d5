"""Layouts that are incomplete, foreign or evil: one line each."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blocksnap import oci
from blocksnap.errors import (
    BlocksnapError,
    DigestError,
    ImageError,
    MediaTypeError,
    MissingParentError,
)
from blocksnap.oci.source import host_architecture
from tests.layouts import INDEX, LAYER, MANIFEST, Json, Layout, dump, platform

Spoil = Callable[[Layout], Path]


def _manifest(change: Callable[[Json], Any]) -> Spoil:
    def spoil(layout: Layout) -> Path:
        manifest = layout.manifest()
        change(manifest)
        return layout.write(manifest)

    return spoil


def _index(change: Callable[[Json], Any]) -> Spoil:
    def spoil(layout: Layout) -> Path:
        described = layout.describe(MANIFEST, dump(layout.manifest()))
        change(described)
        return layout.write_index([described])

    return spoil


def _config(**more: Any) -> Spoil:
    return lambda layout: layout.write(layout.manifest(layout.config(**more)))


def _without_blob(kind: str) -> Spoil:
    def spoil(layout: Layout) -> Path:
        manifest = layout.manifest()
        path = layout.write(manifest)
        digests = {
            "manifest": layout.blob(dump(manifest)),
            "config": manifest["config"]["digest"],
            "layer": manifest["layers"][1]["digest"],
        }
        layout.blob_file(digests[kind]).unlink()
        return path

    return spoil


def _symlinked_blob(layout: Layout) -> Path:
    path = layout.write(layout.manifest())
    blob = next((path / "blobs/sha256").iterdir())
    blob.rename(path / "elsewhere")
    blob.symlink_to(path / "elsewhere")
    return path


def _symlinked_blobs(layout: Layout) -> Path:
    path = layout.write(layout.manifest())
    (path / "blobs").rename(path.parent / "elsewhere")
    (path / "blobs").symlink_to(path.parent / "elsewhere")
    return path


def _file(name: str, data: bytes) -> Spoil:
    def spoil(layout: Layout) -> Path:
        path = layout.write(layout.manifest())
        (path / name).write_bytes(data)
        return path

    return spoil


def _endless_indexes(layout: Layout) -> Path:
    described = platform(layout, host_architecture())
    for _ in range(9):
        described = layout.describe(INDEX, dump({"schemaVersion": 2, "manifests": [described]}))
    return layout.write_index([described])


def _artifact(manifest: Json) -> None:
    manifest["config"]["mediaType"] = "application/vnd.oci.empty.v1+json"


def _nested(depth: int) -> bytes:
    return b'{"schemaVersion": 2, "manifests": ' + b"[" * depth + b"]" * depth + b"}"


TRAVERSAL = "sha256:../../../../../../../../etc/passwd"
REFUSED: dict[str, tuple[Spoil, type[BlocksnapError], str]] = {
    "unknown layer type": (
        _manifest(lambda m: m["layers"][0].update(mediaType=f"{LAYER}+lz4")),
        MediaTypeError,
        "lz4",
    ),
    "encrypted layer": (
        _manifest(lambda m: m["layers"][0].update(mediaType=f"{LAYER}+gzip+encrypted")),
        MediaTypeError,
        "encrypted",
    ),
    "unknown config type": (_manifest(_artifact), MediaTypeError, "empty"),
    "unknown manifest type": (
        _index(lambda d: d.update(mediaType="text/plain")),
        MediaTypeError,
        "text/plain",
    ),
    "manifest called index": (_index(lambda d: d.update(mediaType=INDEX)), MediaTypeError, "not what"),
    "ambiguous manifest": (_manifest(lambda m: m.update(manifests=[])), MediaTypeError, "not what"),
    "contradicting media type": (_manifest(lambda m: m.update(mediaType=INDEX)), MediaTypeError, "not what"),
    "schema version 1": (_manifest(lambda m: m.update(schemaVersion=1)), MediaTypeError, "schema"),
    "layout version": (_file("oci-layout", b'{"imageLayoutVersion": "9"}'), MediaTypeError, "layout version"),
    "image for windows": (_config(os="windows"), MediaTypeError, "windows"),
    "missing manifest": (_without_blob("manifest"), MissingParentError, "missing"),
    "missing config": (_without_blob("config"), MissingParentError, "missing"),
    "missing layer": (_without_blob("layer"), MissingParentError, "missing"),
    "digest with a path": (
        _manifest(lambda m: m["layers"][0].update(digest=TRAVERSAL)),
        DigestError,
        "not a",
    ),
    "digest in the index with a path": (_index(lambda d: d.update(digest=TRAVERSAL)), DigestError, "not a"),
    "digest of the config with a path": (
        _manifest(lambda m: m["config"].update(digest=TRAVERSAL)),
        DigestError,
        "not a",
    ),
    "digest of md5": (_index(lambda d: d.update(digest="md5:" + "0" * 32)), DigestError, "not a"),
    "digest in capitals": (_index(lambda d: d.update(digest="sha256:" + "A" * 64)), DigestError, "not a"),
    "digest with a line feed": (_index(lambda d: d.update(digest=d["digest"] + "\n")), DigestError, "not a"),
    "digest that is a number": (_index(lambda d: d.update(digest=5)), DigestError, "not a"),
    "diff id with a path": (
        _config(rootfs={"diff_ids": [TRAVERSAL, TRAVERSAL]}),
        DigestError,
        "not a",
    ),
    "size too large": (_index(lambda d: d.update(size=d["size"] + 1)), DigestError, "bytes instead of"),
    "size negative": (_index(lambda d: d.update(size=-1)), ImageError, "not a size"),
    "size of a layer wrong": (
        _manifest(lambda m: m["layers"][1].update(size=1 << 40)),
        DigestError,
        "bytes instead of",
    ),
    "fewer diff ids": (_config(rootfs={"diff_ids": []}), ImageError, "2 layers, the config 0"),
    "no rootfs": (_config(rootfs=None), ImageError, "rootfs"),
    "layers that are no list": (_manifest(lambda m: m.update(layers={})), ImageError, "not a list"),
    "layers that are no objects": (_manifest(lambda m: m.update(layers=[1, 2])), ImageError, "not an object"),
    "too many layers": (_manifest(lambda m: m.update(layers=m["layers"] * 5000)), ImageError, "at most"),
    "index without manifests": (_file("index.json", b'{"schemaVersion": 2}'), ImageError, "not a list"),
    "empty index": (_file("index.json", b'{"manifests": []}'), ImageError, "no image"),
    "index that is no object": (_file("index.json", b"[]"), ImageError, "not a JSON object"),
    "index that is not json": (_file("index.json", b"{"), ImageError, "not JSON"),
    "index that is not text": (_file("index.json", b"\xff\xfe\x00"), ImageError, "not JSON"),
    "index too large": (_file("index.json", b" " * (5 << 20)), ImageError, "at most"),
    "index nested deep": (_file("index.json", _nested(100)), ImageError, "nested"),
    "index nested very deep": (_file("index.json", _nested(100_000)), ImageError, "index.json"),
    "indexes without end": (_endless_indexes, ImageError, "indexes"),
    "blob that is a symlink": (_symlinked_blob, BlocksnapError, "symbolic links"),
    "blobs behind a symlink": (_symlinked_blobs, MissingParentError, "missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_layout_is_refused_in_one_line(name: str, layout: Layout) -> None:
    spoil, kind, says = REFUSED[name]
    path = spoil(layout)
    with pytest.raises(kind) as caught:
        oci.open_image(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_layout_in_a_tar_is_refused_too(name: str, layout: Layout, tmp_path: Path) -> None:
    spoil, _, _ = REFUSED[name]
    with tarfile.open(tmp_path / "layout.tar", "w") as archive:
        archive.add(spoil(layout), ".")
    with pytest.raises(BlocksnapError) as caught:
        oci.open_image(tmp_path / "layout.tar")
    assert "\n" not in str(caught.value)
