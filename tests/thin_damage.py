"""Deliberate damage to a sound pool: the registry of kinds, and what they need.

All checksums are right unless the damage is the checksum.

Each kind says what our check must find and whether thin_check 0.9.0 accepts the image (None: of no interest).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.thin_image import ENTRIES_PER_BITMAP, Image, build
from tests.thin_xml import history

__all__ = ["KINDS", "Damage", "sound_image"]

MAPPING_ROOT, DETAILS_ROOT = 320, 328
DATA_MAP, METADATA_MAP = 64, 192
CLEAN, ACCEPTED, REFUSED = "clean", True, False


@dataclass(frozen=True, slots=True)
class Damage:
    """finding: "severity: part of its text", or "clean"; alone: nothing else of severity fatal or leak."""

    name: str
    apply: Callable[[Image], None]
    finding: str
    accepted: bool | None
    sealed: bool = True
    alone: bool = True


KINDS: list[Damage] = []


def damage(
    finding: str, accepted: bool | None, *, sealed: bool = True, alone: bool = True
) -> Callable[[Callable[[Image], None]], Callable[[Image], None]]:
    """Add a function that damages an image to the list of kinds."""

    def add(apply: Callable[[Image], None]) -> Callable[[Image], None]:
        KINDS.append(Damage(apply.__name__, apply, finding, accepted, sealed, alone))
        return apply

    return add


def field(
    name: str, offset: int, form: str, value: int, finding: str, accepted: bool | None, *, alone: bool = True
) -> None:
    """Add a kind that sets one field of the superblock."""
    KINDS.append(
        Damage(name, lambda image: image.put(0, offset, form, value), finding, accepted, alone=alone)
    )


def sound_image() -> Image:
    """Return six devices that share leaves three ways and more, in two-level trees."""
    return build(history(11, snapshots=5, mappings=3000, longest_run=4, change=0.015), metadata_blocks=1024)


def shared_leaf(image: Image) -> int:
    """Return a leaf that the last device shares with another."""
    others = {leaf for device in range(5) for leaf in image.leaves(image.device_root(device))}
    return next(leaf for leaf in image.leaves(image.device_root(5))[1:] if leaf in others)


def data_bitmap(image: Image) -> int:
    index = image.get(0, DATA_MAP + 16, "Q")
    return image.get(index, image.value_offset(index, 0, 16), "Q")


def metadata_bitmap(image: Image) -> int:
    return image.get(image.get(0, METADATA_MAP + 16, "Q"), 16, "Q")


def raw_entry(image: Image, bitmap: int, entry: int) -> int:
    return int(image.blocks[bitmap, 16 + entry // 4]) >> 2 * (entry % 4) & 3


def set_raw(image: Image, bitmap: int, entry: int, raw: int) -> None:
    byte = int(image.blocks[bitmap, 16 + entry // 4]) & ~(3 << 2 * (entry % 4))
    image.blocks[bitmap, 16 + entry // 4] = np.uint8(byte | raw << 2 * (entry % 4))


def data_count(image: Image, data_block: int) -> int:
    return (0, 2, 1, 3)[raw_entry(image, data_bitmap(image), data_block)]


def entry_with(image: Image, bitmap: int, raw: int) -> int:
    return next(entry for entry in range(ENTRIES_PER_BITMAP) if raw_entry(image, bitmap, entry) == raw)
