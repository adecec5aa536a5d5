"""Digests: "sha256:" or "sha512:" and lower-case hexadecimal digits, nothing else."""

import hashlib
import re
from typing import Any, Protocol

from ..errors import DigestError

__all__ = ["Hash", "check_digest", "digest_of", "new_hash", "short"]

_PATTERN = re.compile(r"(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})\Z", re.ASCII)


class Hash(Protocol):
    """What hashlib's objects can do."""

    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def check_digest(value: Any, what: str) -> str:
    """Return a digest that has the right form; what names its place in the error.

    Only after this may a digest become a part of a path.
    """
    if isinstance(value, str) and _PATTERN.match(value):
        return value
    raise DigestError(f"{what}: {str(value)[:100]!r} is not a sha256 or sha512 digest")


def new_hash(digest: str) -> Hash:
    """Return an empty hash of the algorithm of a digest."""
    return hashlib.new(digest.partition(":")[0])


def digest_of(data: bytes) -> str:
    """Return the sha256 digest of bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def short(digest: str) -> str:
    """Return a digest as people read it: the first twelve digits."""
    return digest.partition(":")[2][:12]
