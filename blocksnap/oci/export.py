"""Writing an OCI layout: a folder, or a tar of one."""

import contextlib
import copy
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from ..archive.confined import named
from ..errors import ArgumentError, LayerExistsError
from .digest import digest_of
from .layer import Compression
from .layout import (
    CONFIG_TYPES,
    INDEX_FILE,
    INDEX_TYPES,
    LAYOUT_FILE,
    MANIFEST_TYPES,
    NAME_ANNOTATION,
    blob_path,
)
from .source import host_architecture

__all__ = ["LayoutWriter", "write_layout"]

_PIECE = 1 << 20
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_SUFFIXES: dict[Compression, str] = {"none": "", "gzip": "+gzip", "zstd": "+zstd"}


def write_layout(
    path: str | Path,
    config: Mapping[str, Any],
    layers: Iterable[BinaryIO],
    *,
    reference: str = "latest",
    compression: Compression = "gzip",
) -> str:
    """Write an image as an OCI layout; return the manifest's digest.

    The layout is a folder, or a tar when the name ends with .tar. layers are uncompressed tars, lowest
    first, each read before the next is asked for. What config says of diff ids is replaced. Nothing is at
    path before all is written.
    """
    with LayoutWriter.create(path, compression=compression) as writer:
        for layer in layers:
            with writer.layer() as out:
                shutil.copyfileobj(layer, out, _PIECE)
        return writer.commit(config, reference=reference)


class LayoutWriter:
    """A layout that comes into being: layers first, then commit; without a commit nothing stays."""

    def __init__(self, path: Path, work: Path, compression: Compression) -> None:
        self._path = path
        self._work = work
        self._compression = compression
        self._layers: list[dict[str, Any]] = []
        self._diff_ids: list[str] = []

    @classmethod
    def create(cls, path: str | Path, *, compression: Compression = "gzip") -> "LayoutWriter":
        """Begin a layout at a path where nothing is."""
        path = Path(path)
        if compression not in _SUFFIXES:
            raise ArgumentError(f'compression "{compression}" is unknown: give none, gzip or zstd')
        if path.exists() or path.is_symlink():
            raise LayerExistsError(f"{path} exists: remove it or choose another name")
        with named(str(path)):
            work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            (work / "blobs" / "sha256").mkdir(parents=True)
            return cls(path, work, compression)

    def __enter__(self) -> "LayoutWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was not committed."""
        shutil.rmtree(self._work, ignore_errors=True)

    @contextlib.contextmanager
    def layer(self) -> Iterator[BinaryIO]:
        """Give a stream that takes the uncompressed tar of the next layer."""
        with named(str(self._path)), (self._work / "layer").open("w+b") as file:
            blob = _Hashed(file)
            with _compressed(blob, self._compression) as packed:
                tar = _Hashed(packed)
                yield cast(BinaryIO, tar)
            file.flush()
            os.rename(self._work / "layer", self._work / blob_path(blob.digest))
        self._diff_ids.append(tar.digest)
        media_type = _LAYER_TYPE + _SUFFIXES[self._compression]
        self._layers.append({"mediaType": media_type, "digest": blob.digest, "size": blob.count})

    def commit(self, config: Mapping[str, Any], *, reference: str = "latest") -> str:
        """Write config, manifest and index and put all in place; return the manifest's digest."""
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPES[0],
            "config": self._put(CONFIG_TYPES[0], _completed(config, self._diff_ids)),
            "layers": self._layers,
        }
        described = self._put(MANIFEST_TYPES[0], manifest)
        named_manifest = {**described, "annotations": {NAME_ANNOTATION: reference}}
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPES[0], "manifests": [named_manifest]}
        with named(str(self._path)):
            (self._work / LAYOUT_FILE).write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
            (self._work / INDEX_FILE).write_bytes(_json(index))
            self._place()
        return cast(str, described["digest"])

    def _put(self, media_type: str, document: Mapping[str, Any]) -> dict[str, Any]:
        data = _json(document)
        digest = digest_of(data)
        with named(str(self._path)):
            (self._work / blob_path(digest)).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def _place(self) -> None:
        if self._path.suffix == ".tar":
            packed = self._work / "packed"
            _pack(self._work, packed)
            os.rename(packed, self._path)
        else:
            self._work.chmod(0o755)
            os.rename(self._work, self._path)


def _pack(folder: Path, target: Path) -> None:
    files = [folder / LAYOUT_FILE, folder / INDEX_FILE, *sorted((folder / "blobs" / "sha256").iterdir())]
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for file in files:
            member = tarfile.TarInfo(str(file.relative_to(folder)))
            member.size = file.stat().st_size
            with file.open("rb") as stream:
                archive.addfile(member, stream)


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def _completed(config: Mapping[str, Any], diff_ids: list[str]) -> dict[str, Any]:
    """Return a config with what every reader expects: platform, diff ids, a history that fits the layers."""
    result = copy.deepcopy(dict(config))
    result.setdefault("architecture", host_architecture())
    result.setdefault("os", "linux")
    result["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
    history = result.get("history")
    if isinstance(history, list):
        filled = sum(1 for step in history if not (isinstance(step, dict) and step.get("empty_layer")))
        if filled > len(diff_ids):
            del result["history"]
        else:
            result["history"] = history + [{"created_by": "blocksnap"}] * (len(diff_ids) - filled)
    return result


class _Hashed(io.RawIOBase):
    """A stream that counts and hashes what is written through it."""

    def __init__(self, out: Any) -> None:
        super().__init__()
        self._out = out
        self._hash = hashlib.sha256()
        self.count = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._out.write(view)
        self._hash.update(view)
        self.count += view.nbytes
        return view.nbytes

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()


@contextlib.contextmanager
def _compressed(out: _Hashed, compression: Compression) -> Iterator[Any]:
    match compression:
        case "gzip":
            with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=out, mtime=0) as packed:
                yield packed
        case "zstd":
            with zstandard.ZstdCompressor(level=3).stream_writer(
                cast(BinaryIO, out), closefd=False
            ) as packed:
                yield packed
        case _:
            yield out
