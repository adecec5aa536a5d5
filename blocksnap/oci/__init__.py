"""Real images: OCI layouts (folder or tar) and archives of `docker save` read, OCI layouts written.

Sits beside the drivers and below the image graph; knows neither.
"""

from pathlib import Path

from ..errors import ImageError
from .docker_archive import is_docker_archive, read_docker_archive
from .export import LayoutWriter, write_layout
from .layer import Compression, LayerSource, LayerStream
from .layout import is_layout, read_layout
from .source import ImageSource
from .store import Store, open_store

__all__ = [
    "Compression",
    "ImageSource",
    "LayerSource",
    "LayerStream",
    "LayoutWriter",
    "open_image",
    "write_layout",
]


def open_image(path: str | Path, reference: str | None = None) -> ImageSource:
    """Open an OCI layout (a folder or a tar of one) or an archive of `docker save`; the content tells which.

    reference is a tag or name (or, in a layout, a manifest's digest); it is needed when there are several
    images. Everything but the layers is read and checked here; a layer is checked by reading it to its end.

    Raises ImageError and its kinds, ArgumentError for a reference that fits nothing.
    """
    store = open_store(Path(path))
    try:
        return _read(store, reference)
    except BaseException:
        store.close()
        raise


def _read(store: Store, reference: str | None) -> ImageSource:
    if is_layout(store):
        return read_layout(store, reference)
    if is_docker_archive(store):
        return read_docker_archive(store, reference)
    raise ImageError(f"{store.name} is neither an OCI layout nor an archive of `docker save`")
