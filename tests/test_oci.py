"""Images of umoci, skopeo, buildah and mmdebstrap read; damaged layers refused; one of several chosen."""

import gzip
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from blocksnap import oci
from blocksnap.archive import Limits, apply_layer
from blocksnap.errors import (
    ArgumentError,
    DigestError,
    ImageError,
    UnsafeLayerError,
)
from blocksnap.oci.source import host_architecture
from tests.hostile_tars import file, tar
from tests.images import require_tools, run
from tests.layouts import INDEX, LAYER, Layout, damaged_at, dump, platform, unpack
from tests.trees import compare_trees

# ---- real images -------------------------------------------------------------------------------------------


def test_the_small_image_equals_umocis_tree_in_all_three_forms(
    small_oci_layout: Path,
    small_oci_archive: Path,
    small_docker_archive: Path,
    small_unpacked: Path,
    tmp_path: Path,
) -> None:
    images = [
        unpack(path, tmp_path / str(at))
        for at, path in enumerate((small_oci_layout, small_oci_archive, small_docker_archive))
    ]
    for at in range(3):
        assert compare_trees(tmp_path / str(at), small_unpacked) == []
    assert len({tuple(layer.diff_id for layer in image.layers) for image in images}) == 1
    assert images[0].names == images[1].names == ("latest",)
    assert images[2].names == ("example.org/small:latest",)
    assert {len(image.layers) for image in images} == {5}


def test_a_debian_image_equals_umocis_tree(
    debian_oci_layout: Path, debian_docker_archive: Path, debian_unpacked: Path, tmp_path: Path
) -> None:
    for path, name in ((debian_oci_layout, "layout"), (debian_docker_archive, "docker")):
        image = unpack(path, tmp_path / name)
        assert len(image.layers) >= 3
        assert compare_trees(tmp_path / name, debian_unpacked) == []
        shutil.rmtree(tmp_path / name)


def test_an_image_of_buildah_is_read(tmp_path: Path) -> None:
    require_tools("buildah")
    storage = ("buildah", f"--root={tmp_path}/storage", f"--runroot={tmp_path}/run", "--storage-driver=vfs")
    (tmp_path / "content").mkdir()
    (tmp_path / "content/hello").write_text("hello\n")
    made = subprocess.run([*storage, "from", "scratch"], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"needs a working buildah: {made.stderr.strip()[-200:]}")
    container = made.stdout.strip()
    run(*storage, "copy", container, tmp_path / "content", "/data")
    run(*storage, "commit", "-q", container, f"oci-archive:{tmp_path}/image.tar:latest")
    unpack(tmp_path / "image.tar", tmp_path / "root")
    assert (tmp_path / "root/data/hello").read_text() == "hello\n"


@pytest.mark.parametrize(
    "compress", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gzip", "zstd"]
)
def test_an_archive_compressed_as_a_whole_is_read(
    small_docker_archive: Path, small_unpacked: Path, tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "image").write_bytes(compress(small_docker_archive.read_bytes()))
    unpack(tmp_path / "image", tmp_path / "root")
    assert compare_trees(tmp_path / "root", small_unpacked) == []


def test_a_docker_archive_unpacked_into_a_folder_is_read(
    small_docker_archive: Path, small_unpacked: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    run("tar", "-C", tmp_path / "folder", "-xf", small_docker_archive)
    unpack(tmp_path / "folder", tmp_path / "root")
    assert compare_trees(tmp_path / "root", small_unpacked) == []


# ---- layers ------------------------------------------------------------------------------------------------


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def skippable(data: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        ("+gzip", gzip.compress),
        ("+gzip", lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:]) + bytes(512)),
        ("+zstd", zstd),
        ("+zstd", lambda data: skippable(b"about") + zstd(data[:700]) + zstd(data[700:]) + skippable(b"end")),
    ],
    ids=["plain", "gzip", "gzip of several members", "zstd", "zstd of several frames"],
)
def test_layers_of_every_compression_are_read(
    layout: Layout, tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    blobs = [layout.describe(LAYER + suffix, compress(layer)) for layer in layout.layers]
    unpack(layout.write(layout.manifest(layers=blobs)), tmp_path / "root")
    assert (tmp_path / "root/d/a").read_text() + (tmp_path / "root/d/b").read_text() == "onetwo"


def test_dockers_media_types_are_read(layout: Layout, tmp_path: Path) -> None:
    docker = "application/vnd.docker"
    blobs = [
        layout.describe(f"{docker}.image.rootfs.diff.tar.gzip", gzip.compress(layer))
        for layer in layout.layers
    ]
    config = layout.describe(f"{docker}.container.image.v1+json", dump(layout.config()))
    manifest = layout.manifest(
        layers=blobs, config_=None, mediaType=f"{docker}.distribution.manifest.v2+json"
    )
    manifest["config"] = config
    described = layout.describe(f"{docker}.distribution.manifest.v2+json", dump(manifest))
    image = unpack(layout.write_index([described]), tmp_path / "root")
    assert image.names == ()
    assert (tmp_path / "root/d/b").read_text() == "two"


def test_a_layer_read_in_small_pieces_is_verified_too(layout: Layout) -> None:
    with oci.open_image(layout.write(layout.manifest())) as image, image.layers[0].open() as stream:
        pieces = iter(lambda: stream.read(7), b"")
        assert b"".join(pieces) == layout.layers[0]
        assert stream.read(7) == b""


def test_layers_can_be_read_at_once_and_after_the_image_was_closed(small_docker_archive: Path) -> None:
    with oci.open_image(small_docker_archive) as image:
        streams = [layer.open() for layer in image.layers]
    digests = [hashlib.sha256() for _ in streams]
    live = list(zip(streams, digests, strict=True))
    while live:
        live = [(stream, digest) for stream, digest in live if feed(digest, stream.read(100_000))]
    assert [f"sha256:{digest.hexdigest()}" for digest in digests] == [layer.diff_id for layer in image.layers]
    for stream in streams:
        stream.close()


def feed(digest: Any, data: bytes) -> bool:
    digest.update(data)
    return bool(data)


@pytest.mark.parametrize("at", [0, 12, 40, -6])
def test_a_blob_with_a_flipped_bit_is_a_digest_error(layout: Layout, tmp_path: Path, at: int) -> None:
    path = layout.write(layout.manifest())
    with oci.open_image(path) as image:
        blob = layout.blob_file(image.layers[0].digest)
    blob.write_bytes(damaged_at(blob.read_bytes(), at % blob.stat().st_size))
    with pytest.raises(DigestError, match="fetch it again"):
        unpack(path, tmp_path / "root")


def test_a_plain_layer_with_a_flipped_bit_in_a_header_is_a_digest_error(
    layout: Layout, tmp_path: Path
) -> None:
    blobs = [layout.describe(LAYER, layer) for layer in layout.layers]
    path = layout.write(layout.manifest(layers=blobs))
    blob = layout.blob_file(blobs[0]["digest"])
    blob.write_bytes(damaged_at(blob.read_bytes(), 520))
    with pytest.raises(DigestError):
        unpack(path, tmp_path / "root")


def test_a_truncated_blob_is_a_digest_error(layout: Layout) -> None:
    path = layout.write(layout.manifest())
    with oci.open_image(path) as image:
        blob = layout.blob_file(image.layers[1].digest)
    blob.write_bytes(blob.read_bytes()[:-20])
    with pytest.raises(DigestError, match="bytes instead of"):
        oci.open_image(path)


def test_a_blob_truncated_with_its_size_is_a_digest_error_for_each_compression(
    layout: Layout, tmp_path: Path
) -> None:
    forms: list[tuple[str, Callable[[bytes], bytes]]] = [
        ("", bytes),
        ("+gzip", gzip.compress),
        ("+zstd", zstd),
    ]
    for at, (suffix, compress) in enumerate(forms):
        blobs = [layout.describe(LAYER + suffix, compress(layer)[:-9]) for layer in layout.layers]
        path = layout.write(layout.manifest(layers=blobs))
        with pytest.raises(DigestError):
            unpack(path, tmp_path / str(at))


def test_a_layer_that_is_not_what_the_config_promises_is_a_digest_error(
    layout: Layout, tmp_path: Path
) -> None:
    manifest = layout.manifest()
    manifest["layers"].reverse()
    with pytest.raises(DigestError, match="diff id"):
        unpack(layout.write(manifest), tmp_path / "root")


def test_a_bomb_inflates_no_further_than_its_limit(layout: Layout, tmp_path: Path) -> None:
    layout.layers = [tar(file(b"a")) + bytes(64 << 20)]
    for at, (suffix, compress) in enumerate((("+gzip", gzip.compress), ("+zstd", zstd))):
        blob = layout.describe(LAYER + suffix, compress(layout.layers[0]))
        assert blob["size"] < 1 << 20
        (tmp_path / str(at)).mkdir()
        image = oci.open_image(layout.write(layout.manifest(layers=[blob])))
        with image, image.layers[0].open() as stream, pytest.raises(UnsafeLayerError, match="inflates"):
            apply_layer(stream, tmp_path / str(at), limits=Limits(max_bytes=8 << 20))


# ---- choosing ----------------------------------------------------------------------------------------------


def test_one_of_several_images_must_be_named(layout: Layout) -> None:
    path = layout.write(layout.manifest(), layout.manifest(annotations={"a": "b"}))
    with pytest.raises(ArgumentError, match="several images: name one of v0, v1"):
        oci.open_image(path)
    with oci.open_image(path, "v1") as image:
        assert image.names == ("v1",)
    with oci.open_image(path, image.digest) as same:
        assert same.digest == image.digest
    with pytest.raises(ArgumentError, match='no image "v2"; it has v0, v1'):
        oci.open_image(path, "v2")


def test_an_image_of_docker_save_is_found_with_and_without_its_registry(small_docker_archive: Path) -> None:
    for name in ("example.org/small:latest", "small:latest"):
        with oci.open_image(small_docker_archive, name) as image:
            assert image.names == ("example.org/small:latest",)
    with pytest.raises(ArgumentError, match="no image"):
        oci.open_image(small_docker_archive, "all:latest")


def test_of_several_platforms_this_machines_is_taken(layout: Layout) -> None:
    here = host_architecture()
    both = [platform(layout, "vax"), platform(layout, "unknown", "unknown"), platform(layout, here)]
    nested = layout.describe(INDEX, dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": both}))
    with oci.open_image(layout.write_index([nested])) as image:
        assert image.config["architecture"] == here
    name = {"annotations": {"org.opencontainers.image.ref.name": "latest"}}
    with oci.open_image(layout.write_index([{**each, **name} for each in both])) as image:
        assert image.config["architecture"] == here


def test_an_index_without_this_platform_says_what_it_has(layout: Layout) -> None:
    both = [platform(layout, "vax"), platform(layout, "pdp11")]
    nested = layout.describe(INDEX, dump({"schemaVersion": 2, "manifests": both}))
    with pytest.raises(ImageError, match="there is linux/pdp11, linux/vax"):
        oci.open_image(layout.write_index([nested]))
