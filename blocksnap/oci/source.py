"""An image that can be read: its config and its layers, wherever they lie."""

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError, ImageError, MediaTypeError
from .digest import check_digest
from .document import parse_document
from .layer import LayerSource
from .store import Store

__all__ = ["ImageSource", "check_name", "host_architecture", "read_config"]

_ARCHITECTURES = {  # what the kernel calls a machine, what Go (and so every image) calls it
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i686": "386",
    "loongarch64": "loong64",
}


@dataclass(frozen=True, slots=True)
class ImageSource:
    """One image; layers are ordered from the lowest up. Close it when its layers were read.

    digest is the manifest's, "" for an archive of docker save, which has none.
    """

    names: tuple[str, ...]
    digest: str
    config_digest: str
    config_bytes: bytes
    config: dict[str, Any]
    layers: tuple[LayerSource, ...]
    _store: Store

    def __enter__(self) -> "ImageSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what the image is read from; streams that are open stay usable."""
        self._store.close()


def host_architecture() -> str:
    """Return this machine's architecture as images name it."""
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def read_config(data: bytes, layers: int, what: str) -> tuple[dict[str, Any], list[str]]:
    """Return an image's config and its diff ids, of which there must be as many as layers."""
    config = parse_document(data, f"{what}: the config")
    system = config.text("os", "linux")
    if system not in ("", "linux"):
        raise MediaTypeError(f"{what}: the image is for {system[:50]!r}, not for linux")
    found = config.section("rootfs").texts("diff_ids")
    diff_ids = [check_digest(diff_id, f"{what}: the config's diff ids") for diff_id in found]
    if len(diff_ids) != layers:
        raise ImageError(f"{what}: the manifest has {layers} layers, the config {len(diff_ids)} diff ids")
    return config.value, diff_ids


def check_name(reference: str | None, known: Iterable[str], found: int, what: str) -> None:
    """Refuse a reference that fits no image, or none where there are several."""
    if found == 1:
        return
    names = ", ".join(sorted(set(known))) or "images without a name"
    if reference is not None:
        raise ArgumentError(f'{what} has no image "{reference}"; it has {names}')
    if found:
        raise ArgumentError(f"{what} has several images: name one of {names}")
    raise ImageError(f"{what} has no image")


def matches(name: str, reference: str) -> bool:
    """Tell whether people mean an image's name: all of it, or all behind its registry."""
    return name == reference or name.endswith("/" + reference)
