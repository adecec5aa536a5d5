"""The JSON documents of images, checked: size and depth are bounded, each field has the type asked for."""

import json
from dataclasses import dataclass
from typing import Any

from ..errors import ImageError
from .digest import check_digest

__all__ = ["MAX_DOCUMENT", "Descriptor", "Document", "parse_document", "parse_json"]

MAX_DOCUMENT = 4 << 20
MAX_DEPTH = 32
MAX_ITEMS = 4096


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A reference to a blob."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str]
    platform: dict[str, Any] | None


def parse_json(data: bytes, what: str) -> Any:
    """Return the value of a JSON text; what names it in errors."""
    if len(data) > MAX_DOCUMENT:
        raise ImageError(f"{what} has {len(data)} bytes; at most {MAX_DOCUMENT} are read")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{what} is not JSON ({str(error)[:100]})") from None
    _check_depth(value, what)
    return value


def parse_document(data: bytes, what: str) -> "Document":
    """Return a JSON text that must be an object."""
    value = parse_json(data, what)
    if not isinstance(value, dict):
        raise ImageError(f"{what} is not a JSON object")
    return Document(value, what)


def _check_depth(value: Any, what: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = [item for item in level if isinstance(item, (dict, list))]
        if not containers:
            return
        level = [
            inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)
        ]
    raise ImageError(f"{what} is nested deeper than {MAX_DEPTH} levels")


class Document:
    """A JSON object with accessors that refuse a wrong type."""

    def __init__(self, value: dict[str, Any], what: str) -> None:
        self.value = value
        self.what = what

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string; the default for a missing one, if there is a default."""
        value = self.value.get(key, default)
        if isinstance(value, str):
            return value
        raise ImageError(f"{self.what}: {key!r} is not a string")

    def number(self, key: str) -> int:
        """Return a whole number that is not negative."""
        value = self.value.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63:
            return value
        raise ImageError(f"{self.what}: {key!r} is not a size")

    def section(self, key: str) -> "Document":
        """Return an object."""
        return _object(self.value.get(key), f"{self.what}: {key!r}")

    def sections(self, key: str) -> list["Document"]:
        """Return a list of objects."""
        return [_object(item, f"{self.what}: {key}[{at}]") for at, item in enumerate(self._items(key))]

    def texts(self, key: str) -> list[str]:
        """Return a list of strings; a missing or null one is empty."""
        items = self._items(key) if self.value.get(key) is not None else []
        if all(isinstance(item, str) for item in items):
            return items
        raise ImageError(f"{self.what}: {key!r} holds something else than strings")

    def descriptor(self) -> Descriptor:
        """Return the object as a descriptor."""
        annotations = self.value.get("annotations") or {}
        platform = self.value.get("platform")
        if not isinstance(annotations, dict) or not isinstance(platform, (dict, type(None))):
            raise ImageError(f"{self.what}: annotations or platform is not an object")
        return Descriptor(
            media_type=self.text("mediaType"),
            digest=check_digest(self.value.get("digest"), self.what),
            size=self.number("size"),
            annotations={key: value for key, value in annotations.items() if isinstance(value, str)},
            platform=platform,
        )

    def _items(self, key: str) -> list[Any]:
        value = self.value.get(key)
        if not isinstance(value, list):
            raise ImageError(f"{self.what}: {key!r} is not a list")
        if len(value) > MAX_ITEMS:
            raise ImageError(f"{self.what}: {key!r} has {len(value)} items; at most {MAX_ITEMS} are taken")
        return value


def _object(value: Any, what: str) -> Document:
    if isinstance(value, dict):
        return Document(value, what)
    raise ImageError(f"{what} is not an object")
