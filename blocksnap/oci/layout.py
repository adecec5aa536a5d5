"""Reading an OCI image layout (a folder or a tar of one): index, manifest, config, layers.

Source: the OCI image specification 1.1, image-layout.md, image-index.md, manifest.md; Docker's schema 2.
"""

from functools import partial

from ..errors import DigestError, ImageError, MediaTypeError
from .digest import new_hash, short
from .document import Descriptor, Document, parse_document
from .layer import LayerSource, compression_of
from .source import ImageSource, check_name, host_architecture, matches, read_config
from .store import Store

__all__ = ["LAYOUT_FILE", "blob_path", "is_layout", "read_layout"]

LAYOUT_FILE = "oci-layout"
INDEX_FILE = "index.json"
NAME_ANNOTATION = "org.opencontainers.image.ref.name"
_FULL_NAME_ANNOTATION = "io.containerd.image.name"  # docker save 25 and newer
_MAX_INDEXES = 4

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
CONFIG_TYPES = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)


def is_layout(store: Store) -> bool:
    """Tell whether there is an OCI layout."""
    return store.size(LAYOUT_FILE) is not None and store.size(INDEX_FILE) is not None


def blob_path(digest: str) -> str:
    """Return where a layout keeps a blob; the digest was checked."""
    algorithm, _, digits = digest.partition(":")
    return f"blobs/{algorithm}/{digits}"


def read_layout(store: Store, reference: str | None = None) -> ImageSource:
    """Return the image of a layout that reference names; without one, the only image.

    Of an index for several platforms, this machine's is taken.
    """
    version = parse_document(store.read(LAYOUT_FILE), f"{store.name}: {LAYOUT_FILE}").text(
        "imageLayoutVersion"
    )
    if not version.startswith("1."):
        raise MediaTypeError(f"{store.name}: layout version {version[:20]!r} is unknown")
    index = parse_document(store.read(INDEX_FILE), f"{store.name}: {INDEX_FILE}")
    descriptors = [section.descriptor() for section in index.sections("manifests")]
    wanted = [each for each in descriptors if reference is None or _is_named(each, reference)]
    digests = {each.digest for each in wanted}
    if len(digests) > 1 and len({_names(each) for each in wanted}) == 1:
        wanted = [_for_this_machine(wanted, store.name)]  # one name, several platforms
        digests = {wanted[0].digest}
    check_name(reference, (name for each in descriptors for name in _names(each)), len(digests), store.name)
    names = tuple(name for each in descriptors if each.digest in digests for name in _names(each))
    return _read_image(store, _manifest(store, wanted[0]), names)


def _names(descriptor: Descriptor) -> tuple[str, ...]:
    found = (descriptor.annotations.get(key) for key in (_FULL_NAME_ANNOTATION, NAME_ANNOTATION))
    return tuple(name for name in found if name)


def _is_named(descriptor: Descriptor, reference: str) -> bool:
    return descriptor.digest == reference or any(matches(name, reference) for name in _names(descriptor))


def _manifest(store: Store, descriptor: Descriptor) -> Descriptor:
    """Follow indexes down to the manifest for this machine."""
    for _ in range(_MAX_INDEXES):
        if descriptor.media_type in MANIFEST_TYPES:
            return descriptor
        if descriptor.media_type not in INDEX_TYPES:
            raise MediaTypeError(
                f"{store.name}: media type {descriptor.media_type[:200]!r} is no image's manifest or index"
            )
        index = _read_document(store, descriptor, "index", forbidden="layers")
        below = [section.descriptor() for section in index.sections("manifests")]
        descriptor = _for_this_machine(below, store.name)
    raise ImageError(f"{store.name}: more than {_MAX_INDEXES} indexes lead to the image")


def _for_this_machine(descriptors: list[Descriptor], what: str) -> Descriptor:
    here = f"linux/{host_architecture()}"
    platforms = [_platform(each) for each in descriptors]
    for wanted in (here, ""):
        for descriptor, found in zip(descriptors, platforms, strict=True):
            if found == wanted:
                return descriptor
    known = ", ".join(sorted({found for found in platforms if not found.startswith("unknown")}))
    raise ImageError(f"{what}: there is no image for {here}; there is {known or 'none at all'}")


def _platform(descriptor: Descriptor) -> str:
    if descriptor.platform is None:
        return ""
    return f"{descriptor.platform.get('os')}/{descriptor.platform.get('architecture')}"


def _read_image(store: Store, descriptor: Descriptor, names: tuple[str, ...]) -> ImageSource:
    manifest = _read_document(store, descriptor, "manifest", forbidden="manifests")
    config = manifest.section("config").descriptor()
    if config.media_type not in CONFIG_TYPES:
        raise MediaTypeError(f"{store.name}: media type {config.media_type[:200]!r} is not an image's config")
    data = _read_blob(store, config, "config")
    blobs = [section.descriptor() for section in manifest.sections("layers")]
    values, diff_ids = read_config(data, len(blobs), store.name)
    return ImageSource(
        names=names,
        digest=descriptor.digest,
        config_digest=config.digest,
        config_bytes=data,
        config=values,
        layers=tuple(_layer(store, blob, diff_id) for blob, diff_id in zip(blobs, diff_ids, strict=True)),
        _store=store,
    )


def _layer(store: Store, blob: Descriptor, diff_id: str) -> LayerSource:
    what = f"{store.name}: layer {short(blob.digest)}"
    compression = compression_of(blob.media_type, what)
    _check_size(store, blob, what)
    return LayerSource(
        digest=blob.digest,
        diff_id=diff_id,
        media_type=blob.media_type,
        size=blob.size,
        compression=compression,
        name=what,
        _open_blob=partial(store.open, blob_path(blob.digest)),
        _blob_digest=blob.digest,
    )


def _read_document(store: Store, descriptor: Descriptor, kind: str, *, forbidden: str) -> Document:
    """Return a manifest or index; one that could be read as the other too is refused (CVE-2021-41190)."""
    what = f"{store.name}: the {kind} {short(descriptor.digest)}"
    document = parse_document(_read_blob(store, descriptor, kind), what)
    if document.value.get("schemaVersion") != 2:
        raise MediaTypeError(f"{what} has not schema version 2")
    if (
        document.text("mediaType", descriptor.media_type) != descriptor.media_type
        or forbidden in document.value
    ):
        raise MediaTypeError(f"{what} is not what its media type {descriptor.media_type!r} says")
    return document


def _read_blob(store: Store, descriptor: Descriptor, kind: str) -> bytes:
    what = f"{store.name}: the {kind} {short(descriptor.digest)}"
    _check_size(store, descriptor, what)
    data = store.read(blob_path(descriptor.digest))
    hashed = new_hash(descriptor.digest)
    hashed.update(data)
    if hashed.hexdigest() != descriptor.digest.partition(":")[2]:
        raise DigestError(f"{what} does not have its digest {descriptor.digest}: fetch it again")
    return data


def _check_size(store: Store, descriptor: Descriptor, what: str) -> None:
    path = blob_path(descriptor.digest)
    size = store.size(path)
    if size is None:
        raise store.missing(path)
    if size != descriptor.size:
        raise DigestError(f"{what} has {size} bytes instead of {descriptor.size}: fetch it again")
