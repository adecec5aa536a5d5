"""Archives of docker save: read, and refused when they are no such thing."""

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blocksnap import oci
from blocksnap.errors import (
    ArgumentError,
    BlocksnapError,
    DigestError,
    ImageError,
    MissingParentError,
)
from tests.hostile_tars import directory, file, tar
from tests.layouts import Json, Layout, damaged_at, dump, unpack
from tests.trees import describe_tree


def docker_archive(path: Path, members: dict[str, bytes | str], manifest: Any) -> Path:
    """Write an archive of docker save; a member that is text is a symlink to it."""
    with tarfile.open(path, "w") as archive:
        for name, data in {**members, "manifest.json": dump(manifest)}.items():
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname = tarfile.SYMTYPE, data
                archive.addfile(member)
            else:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def saved() -> tuple[dict[str, bytes | str], list[Json]]:
    """The members and the manifest of an archive as docker save writes them."""
    layers = [tar(directory(b"d"), file(b"d/a", b"one")), tar(file(b"d/b", b"two"))]
    diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    config = dump({"os": "linux", "rootfs": {"diff_ids": diff_ids}})
    name = hashlib.sha256(config).hexdigest() + ".json"
    members: dict[str, bytes | str] = {
        "real/layer.tar": layers[0],
        "linked/layer.tar": "../real/layer.tar",
        "zipped/layer.tar": gzip.compress(layers[1]),
        name: config,
    }
    files = ["linked/layer.tar", "zipped/layer.tar"]
    return members, [{"Config": name, "RepoTags": ["busybox:latest", "busybox:1"], "Layers": files}]


Saved = tuple[dict[str, bytes | str], list[Json]]


def test_docker_saves_linked_and_compressed_layers_are_read(saved: Saved, tmp_path: Path) -> None:
    image = unpack(docker_archive(tmp_path / "image.tar", *saved), tmp_path / "root")
    assert (tmp_path / "root/d/a").read_text() + (tmp_path / "root/d/b").read_text() == "onetwo"
    assert image.names == ("busybox:latest", "busybox:1")
    assert image.config_digest == "sha256:" + saved[1][0]["Config"].removesuffix(".json")


def test_no_member_name_of_an_archive_becomes_a_host_path(saved: Saved, tmp_path: Path) -> None:
    members, manifest = saved
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    before = describe_tree(tmp_path)
    for evil in (str(secret), f"../{secret.name}", "linked/../../secret", "link"):
        evil_members = {**members, "link": str(secret)}
        path = docker_archive(tmp_path / "image.tar", evil_members, [{**manifest[0], "Layers": [evil, evil]}])
        with pytest.raises(MissingParentError):
            oci.open_image(path)
        path = docker_archive(tmp_path / "image.tar", evil_members, [{**manifest[0], "Config": evil}])
        with pytest.raises(MissingParentError):
            oci.open_image(path)
        path.unlink()
    after = describe_tree(tmp_path)
    assert {key: value for key, value in after.items() if key != "."} == {
        key: value for key, value in before.items() if key != "."
    }


def _spoiled(saved: Saved) -> Iterator[tuple[Any, Any, type[BlocksnapError]]]:
    members, manifest = saved
    name = manifest[0]["Config"]
    yield {**members, name: dump({"os": "linux", "rootfs": {"diff_ids": []}})}, manifest, DigestError
    yield {**members, "real/layer.tar": b""}, manifest, ImageError
    yield {**members, "linked/layer.tar": "layer.tar"}, manifest, ImageError
    yield members, [{**manifest[0], "Layers": ["real/layer.tar"]}], ImageError
    yield members, [{**manifest[0], "Layers": ["nothing", "nothing"]}], MissingParentError
    yield members, [{**manifest[0], "Layers": ["real", "real"]}], MissingParentError
    yield members, [{**manifest[0], "Layers": "x"}], ImageError
    yield members, [{**manifest[0], "Config": None}], ImageError
    yield members, {"Config": name}, ImageError
    yield members, [], ImageError
    yield members, [1], ImageError
    yield members, [manifest[0], manifest[0]], ArgumentError


def test_a_bad_archive_of_docker_save_is_refused_in_one_line(saved: Saved, tmp_path: Path) -> None:
    for members, manifest, kind in _spoiled(saved):
        path = docker_archive(tmp_path / "image.tar", members, manifest)
        with pytest.raises(kind) as caught:
            oci.open_image(path)
        assert "\n" not in str(caught.value)


def test_a_damaged_layer_of_docker_save_is_a_digest_error(saved: Saved, tmp_path: Path) -> None:
    members, manifest = saved
    whole = members["real/layer.tar"]
    assert isinstance(whole, bytes)
    for at, damaged in enumerate((damaged_at(whole, 3), damaged_at(whole, 1030), whole[:-512])):
        path = docker_archive(tmp_path / "image.tar", {**members, "real/layer.tar": damaged}, manifest)
        with pytest.raises(DigestError):
            unpack(path, tmp_path / str(at))


NO_IMAGES = {
    "empty": b"",
    "text": b"not an archive\n" * 100,
    "tar of something": tar(file(b"a", b"x")),
    "gzip of something": gzip.compress(b"x"),
    "damaged gzip": b"\x1f\x8bxx",
    "damaged zstd": b"\x28\xb5\x2f\xfdxx",
    "end mark": bytes(2048),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(NO_IMAGES[name])
    with pytest.raises(ImageError) as caught:
        oci.open_image(tmp_path / "image")
    assert "\n" not in str(caught.value)


def test_a_truncated_archive_is_refused(small_docker_archive: Path, tmp_path: Path) -> None:
    data = small_docker_archive.read_bytes()
    (tmp_path / "image").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match="truncated"):
        oci.open_image(tmp_path / "image")


def test_a_path_where_nothing_is_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BlocksnapError, match="No such file"):
        oci.open_image(tmp_path / "nothing")


def test_opening_and_failing_leaves_no_descriptor_open(layout: Layout, tmp_path: Path) -> None:
    layout.write(layout.manifest())
    before = set(os.listdir("/proc/self/fd"))
    for path in (layout.path, tmp_path):
        try:
            with oci.open_image(path) as image, image.layers[0].open() as stream:
                stream.read(10)
        except ImageError:
            pass
    assert set(os.listdir("/proc/self/fd")) == before
