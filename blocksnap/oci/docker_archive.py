"""Reading what `docker save` and skopeo's docker-archive write: manifest.json, a config, layer tars.

Source: moby's image/tarexport, the "v1.2" form.
"""

import re
from functools import partial

from ..errors import DigestError, ImageError
from .digest import digest_of
from .document import Document, parse_json
from .layer import LayerSource, guess_compression
from .source import ImageSource, check_name, matches, read_config
from .store import Store

__all__ = ["is_docker_archive", "read_docker_archive"]

MANIFEST_FILE = "manifest.json"
_LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar"
_HEX_NAME = re.compile(r"(?:.*/)?([0-9a-f]{64})(?:\.json)?\Z")


def is_docker_archive(store: Store) -> bool:
    """Tell whether there is an archive of docker save."""
    return store.size(MANIFEST_FILE) is not None


def read_docker_archive(store: Store, reference: str | None = None) -> ImageSource:
    """Return the image of an archive that reference names; without one, the only image."""
    what = f"{store.name}: {MANIFEST_FILE}"
    images = Document({"images": parse_json(store.read(MANIFEST_FILE), what)}, what).sections("images")
    wanted = [image for image in images if reference is None or _is_named(image, reference)]
    check_name(
        reference, (tag for image in images for tag in image.texts("RepoTags")), len(wanted), store.name
    )
    return _read_image(store, wanted[0])


def _is_named(image: Document, reference: str) -> bool:
    return any(matches(tag, reference) for tag in image.texts("RepoTags"))


def _read_image(store: Store, image: Document) -> ImageSource:
    files = image.texts("Layers")
    name = image.text("Config")
    data = store.read(name)
    digest = digest_of(data)
    promised = _HEX_NAME.match(name)
    if promised and "sha256:" + promised[1] != digest:
        raise DigestError(
            f"{store.name}: the config {name} does not have the digest in its name: save it again"
        )
    config, diff_ids = read_config(data, len(files), store.name)
    return ImageSource(
        names=tuple(image.texts("RepoTags")),
        digest="",
        config_digest=digest,
        config_bytes=data,
        config=config,
        layers=tuple(_layer(store, file, diff_id) for file, diff_id in zip(files, diff_ids, strict=True)),
        _store=store,
    )


def _layer(store: Store, file: str, diff_id: str) -> LayerSource:
    size = store.size(file)
    if size is None:
        raise store.missing(file)
    with store.open(file) as stream:
        compression = guess_compression(stream.read(4))
    if not size:
        raise ImageError(f"{store.name}: {file} is empty: save it again")
    return LayerSource(
        digest=diff_id,
        diff_id=diff_id,
        media_type=_LAYER_TYPE if compression == "none" else f"{_LAYER_TYPE}.{compression}",
        size=size,
        compression=compression,
        name=f"{store.name}: {file}",
        _open_blob=partial(store.open, file),
        _blob_digest=None,
    )
