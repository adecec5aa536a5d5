"""Names of layers, images and containers, and how a reference finds its image."""

import hashlib
import re
from collections.abc import Iterable, Mapping

from .errors import ArgumentError, LayerNotFoundError

__all__ = ["chain_id", "check_container_name", "check_image_name", "find_image"]

_CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/@+-]{0,254}")
_ID = re.compile(r"(?:sha256:)?([0-9a-f]{4,64})")
_DEFAULTS = ("docker.io/library/", "docker.io/")


def chain_id(parent: str | None, diff_id: str) -> str:
    """Return the key of a layer on top of a chain (OCI image spec, config.md, "Layer ChainID")."""
    if parent is None:
        return diff_id
    return "sha256:" + hashlib.sha256(f"{parent} {diff_id}".encode()).hexdigest()


def check_container_name(name: str) -> str:
    """Return a name of ASCII letters, digits, "_", ".", "-" that starts with a letter or digit."""
    if _CONTAINER.fullmatch(name) is None:
        raise ArgumentError(
            f'"{name}" cannot be a container\'s name: use up to 128 of A-Z a-z 0-9 _ . -, no sign first'
        )
    return name


def check_image_name(name: str) -> str:
    """Return an image name like "postgres:16" or "registry.example/team/app:2.1"."""
    if _IMAGE.fullmatch(name) is None:
        raise ArgumentError(
            f'"{name}" cannot be an image\'s name: use something like "app:1", up to 255 characters'
        )
    return name


def find_image(reference: str, names: Mapping[str, str], ids: Iterable[str]) -> str:
    """Return the id of the image that a reference means.

    The first that fits: the whole name; the name with ":latest" or Docker's registry left out; the id or at
    least four digits of its beginning; a repository or a tag that only one image has.
    """
    wanted = {reference} if _tag(reference) else {reference, f"{reference}:latest"}
    wanted |= {prefix + name for name in wanted for prefix in _DEFAULTS}
    by_part = {image for name, image in names.items() if reference in (_repository(name), _tag(name))}
    for found in (
        {names[reference]} if reference in names else set(),
        {image for name, image in names.items() if name in wanted},
        set(_by_id(reference, ids)),
        by_part,
    ):
        if len(found) > 1:
            raise ArgumentError(f'"{reference}" means {len(found)} images, {_listed(found)}: give more of it')
        if found:
            return found.pop()
    raise LayerNotFoundError(f'there is no image "{reference}": import it, or see the list of images')


def _by_id(reference: str, ids: Iterable[str]) -> list[str]:
    match = _ID.fullmatch(reference)
    return [id for id in ids if id.removeprefix("sha256:").startswith(match[1])] if match else []


def _tag(name: str) -> str:
    """Return what follows the last colon of the last component, "" when there is none."""
    return name.rpartition("/")[2].partition(":")[2]


def _repository(name: str) -> str:
    return name.removesuffix(":" + _tag(name)) if _tag(name) else name


def _listed(ids: set[str]) -> str:
    return ", ".join(sorted(id.removeprefix("sha256:")[:12] for id in ids)[:4])
