"""OCI layouts made by hand, for what no tool would make, and images unpacked to look at them."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from blocksnap import oci
from blocksnap.archive import apply_layer
from tests.hostile_tars import directory, file, tar

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"

Json = dict[str, Any]


def unpack(path: Path, target: Path, reference: str | None = None) -> oci.ImageSource:
    """Apply all layers of an image to a new directory."""
    target.mkdir()
    with oci.open_image(path, reference) as image:
        for layer in image.layers:
            with layer.open() as stream:
                apply_layer(stream, target)
        return image


class Layout:
    """A small OCI layout made by hand, for what no tool would make."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        self.layers = [tar(directory(b"d"), file(b"d/a", b"one")), tar(file(b"d/b", b"two"))]
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (self.path / "blobs/sha256" / digest).write_bytes(data)
        return f"sha256:{digest}"

    def describe(self, media_type: str, data: bytes, **more: Any) -> Json:
        return {"mediaType": media_type, "digest": self.blob(data), "size": len(data), **more}

    def config(self, **more: Any) -> Json:
        diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in self.layers]
        base = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        return {**base, **more}

    def manifest(self, config: Json | None = None, **more: Any) -> Json:
        blobs = [self.describe(f"{LAYER}+gzip", gzip.compress(layer)) for layer in self.layers]
        described = self.describe(CONFIG, dump(config or self.config()))
        return {"schemaVersion": 2, "config": described, "layers": blobs, **more}

    def write(self, *manifests: Json) -> Path:
        named = [
            self.describe(
                MANIFEST, dump(manifest), annotations={"org.opencontainers.image.ref.name": f"v{at}"}
            )
            for at, manifest in enumerate(manifests)
        ]
        return self.write_index(named)

    def write_index(self, manifests: list[Json]) -> Path:
        (self.path / "index.json").write_bytes(dump({"schemaVersion": 2, "manifests": manifests}))
        return self.path

    def blob_file(self, digest: str) -> Path:
        return self.path / "blobs/sha256" / digest.removeprefix("sha256:")


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """An empty layout to be filled."""
    return Layout(tmp_path / "layout")


def damaged_at(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def platform(layout: Layout, architecture: str, system: str = "linux") -> Json:
    config = layout.config(architecture=architecture)
    about = {"os": system, "architecture": architecture}
    return layout.describe(MANIFEST, dump(layout.manifest(config)), platform=about)
