"""A layer of an image: its blob, read as an uncompressed tar and checked against both its digests."""

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol, cast

import zstandard

from ..errors import DigestError, MediaTypeError, UnsafeLayerError
from ..units import format_size
from .digest import new_hash

__all__ = ["Compression", "LayerSource", "LayerStream", "compression_of", "guess_compression"]

_PIECE = 1 << 18
_MAX_RATIO = 200  # far above what files of an image come to, far below a bomb of gzip's 1000 or zstd's 10000
_ALWAYS_BYTES = 1 << 30  # whatever the ratio: small layers may hold much emptiness
_MAX_WINDOW = 1 << 27  # of zstd, in bytes: what its command line takes without being asked

Compression = Literal["none", "gzip", "zstd"]

_OCI = "application/vnd.oci.image.layer.v1.tar"
_OCI_FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"
_DOCKER = "application/vnd.docker.image.rootfs.diff.tar"
_DOCKER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"

_COMPRESSED: tuple[Compression, ...] = ("gzip", "zstd")
_MEDIA_TYPES: dict[str, Compression] = {
    **dict.fromkeys((_OCI, _OCI_FOREIGN, _DOCKER, _DOCKER_FOREIGN), "none"),
    **{f"{base}+{kind}": kind for base in (_OCI, _OCI_FOREIGN) for kind in _COMPRESSED},
    **{f"{base}.{kind}": kind for base in (_DOCKER, _DOCKER_FOREIGN) for kind in _COMPRESSED},
}
_MAGIC: dict[Compression, bytes] = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}


def compression_of(media_type: str, what: str) -> Compression:
    """Return how blobs of a media type are compressed; MediaTypeError for a type that is no layer's."""
    try:
        return _MEDIA_TYPES[media_type]
    except KeyError:
        raise MediaTypeError(
            f"{what}: media type {media_type[:200]!r} is not a layer's: tar, gzip and zstd layers can be read"
        ) from None


def guess_compression(head: bytes) -> Compression:
    """Return how a blob is compressed by its first bytes."""
    return next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), "none")


@dataclass(frozen=True, slots=True)
class LayerSource:
    """One layer of an image: size and digest are the blob's, diff_id is that of the uncompressed tar."""

    digest: str
    diff_id: str
    media_type: str
    size: int
    compression: Compression
    name: str
    _open_blob: Callable[[], BinaryIO]
    _blob_digest: str | None  # None where the archive keeps blobs under no digest

    def open(self, *, max_bytes: int | None = None) -> BinaryIO:
        """Open the uncompressed tar; the read that reaches its end raises DigestError unless all is right.

        UnsafeLayerError when it inflates to more than max_bytes; by default to more than 200 times what was
        read of the blob, of which 1 GiB may always be.
        """
        return cast(BinaryIO, LayerStream(self, max_bytes))


class LayerStream(io.RawIOBase):
    """The uncompressed tar of a layer: nothing of it counts before its end was read without an error."""

    def __init__(self, layer: LayerSource, max_bytes: int | None = None) -> None:
        super().__init__()
        self._layer = layer
        self._max_bytes = max_bytes
        self._count = 0
        self._blob = _HashingReader(layer._open_blob(), layer._blob_digest)
        self._source = _decompressed(self._blob, layer.compression)
        self._hash = new_hash(layer.diff_id)
        self.verified = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer)).cast("B")
        data = self._read(len(view))
        view[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        """Return at most size bytes; b"" only at the end, when all digests were right."""
        if size is None or size < 0:
            return b"".join(iter(lambda: self._read(_PIECE), b""))
        return self._read(size)

    def close(self) -> None:
        if not self.closed:
            self._blob.close()
        super().close()

    def _read(self, size: int) -> bytes:
        if self.verified or not size:
            return b""
        try:
            data = self._source.read(size)
        except (zlib.error, zstandard.ZstdError, EOFError) as error:
            raise DigestError(f"{self._layer.name} is damaged ({error}): fetch it again") from None
        self._hash.update(data)
        self._count += len(data)
        if not data:
            self._verify()
        elif self._count > self._limit():
            raise UnsafeLayerError(
                f"{self._layer.name} inflates to more than {format_size(self._limit())}: "
                "raise the limit if it is meant"
            )
        return data

    def _limit(self) -> int:
        if self._max_bytes is not None:
            return self._max_bytes
        return max(_ALWAYS_BYTES, _MAX_RATIO * self._blob.count)

    def _verify(self) -> None:
        layer, name = self._layer, self._layer.name
        self._blob.drain()
        if self._blob.count != layer.size:
            raise DigestError(f"{name} has {self._blob.count} bytes instead of {layer.size}: fetch it again")
        if layer._blob_digest and self._blob.hexdigest() != layer._blob_digest.partition(":")[2]:
            raise DigestError(f"{name} does not have its digest {layer.digest}: fetch it again")
        if self._hash.hexdigest() != layer.diff_id.partition(":")[2]:
            raise DigestError(f"{name} does not have its diff id {layer.diff_id}: fetch it again")
        self.verified = True


class _HashingReader:
    """A blob that is counted and hashed while it is read."""

    def __init__(self, raw: BinaryIO, digest: str | None) -> None:
        self._raw = raw
        self._hash = new_hash(digest) if digest else None
        self.count = 0

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        self.count += len(data)
        if self._hash:
            self._hash.update(data)
        return data

    def drain(self) -> None:
        while self.read(_PIECE):
            pass

    def hexdigest(self) -> str:
        return self._hash.hexdigest() if self._hash else ""

    def close(self) -> None:
        self._raw.close()


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _decompressed(blob: _HashingReader, compression: Compression) -> _Readable:
    match compression:
        case "gzip":
            return _GzipReader(blob)
        case "zstd":
            decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
            return decompressor.stream_reader(cast(BinaryIO, blob), read_across_frames=True)
        case _:
            return blob


class _GzipReader:
    """Inflates at most what is asked for, whatever the ratio; several members may follow each other."""

    def __init__(self, source: _HashingReader) -> None:
        self._source = source
        self._inflate = zlib.decompressobj(wbits=31)
        self._input = b""

    def read(self, size: int, /) -> bytes:
        while True:
            if self._inflate.eof and not self._next_member():
                return b""
            if not self._input:
                self._input = self._source.read(_PIECE)
                if not self._input:
                    raise EOFError("its gzip stream is truncated")
            data = self._inflate.decompress(self._input, size)
            self._input = self._inflate.unconsumed_tail
            if data:
                return data

    def _next_member(self) -> bool:
        rest = self._inflate.unused_data.lstrip(b"\0")  # zeros pad what was on a tape
        while not rest:
            piece = self._source.read(_PIECE)
            if not piece:
                return False
            rest = piece.lstrip(b"\0")
        self._inflate, self._input = zlib.decompressobj(wbits=31), rest
        return True
