"""Deliberate damage to sound pools: the registry of kinds, and what they need.

All checksums are right unless the damage is the checksum. Each kind can be done at many places: a seed
chooses the pool, the block and the values. Each says which verdict our check and our repair must give, and
whether thin_check 0.9.0 accepts the image (None: of no interest).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache

import numpy as np

from tests.thin_image import Image, build, checksum
from tests.thin_xml import Pool, history

__all__ = [
    "BASES",
    "KINDS",
    "Base",
    "Damage",
    "Leaf",
    "Place",
    "Verdict",
    "base",
    "damage",
    "place",
    "sound_image",
]

MAPPING_ROOT, DETAILS_ROOT = 320, 328
DATA_MAP, METADATA_MAP = 64, 192
ACCEPTED, REFUSED = True, False


class Verdict(StrEnum):
    LEGAL = "legal"
    """The format allows it: nothing is found."""
    WARN = "warn"
    """Odd, but the pool may be used: warnings only."""
    REPAIR = "repair"
    """Damage: the pool must not be used; repair keeps every mapping."""
    LOSS = "repair with losses"
    """Damage; repair keeps what can be read and tells the rest."""
    REFUSE = "refuse"
    """Damage, or another format: repair refuses too."""


@dataclass(frozen=True, slots=True)
class Damage:
    """finding: "severity: part of its text", or "error: ..." if check itself must refuse the file.

    alone: nothing else of severity fatal or leak is found.
    """

    name: str
    apply: Callable[["Place"], None]
    verdict: Verdict
    finding: str
    accepted: bool | None
    sealed: bool = True
    alone: bool = True
    bases: Sequence[str] = ()

    def __str__(self) -> str:
        return self.name


KINDS: list[Damage] = []


def damage(
    verdict: Verdict,
    finding: str = "",
    accepted: bool | None = None,
    *,
    sealed: bool = True,
    alone: bool = True,
    bases: Sequence[str] = (),
) -> Callable[[Callable[["Place"], None]], Callable[["Place"], None]]:
    """Add a function that damages an image to the list of kinds."""

    def add(apply: Callable[["Place"], None]) -> Callable[["Place"], None]:
        KINDS.append(Damage(apply.__name__, apply, verdict, finding, accepted, sealed, alone, bases))
        return apply

    return add


# ---- the pools that are damaged


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf of a mapping tree in one of its places: entry `index` of node `parent` of device `device`."""

    block: int
    parent: int
    index: int
    device: int


@dataclass(frozen=True, slots=True)
class Base:
    """A sound image and where what lies."""

    pool: Pool
    image: Image
    roots: list[int]
    leaves: list[list[Leaf]]
    users: dict[int, int]
    details: list[tuple[int, int]]
    top_level: list[tuple[int, int]]


def _leaves(image: Image, root: int, device: int) -> list[Leaf]:
    if image.get(root, 4, "I") == 2:
        return [Leaf(root, 0, 0, device)]
    return [Leaf(block, root, i, device) for i, block in enumerate(image.children(root))]


def _entries(image: Image, root: int) -> list[tuple[int, int]]:
    """Return the leaf and the place in it of every entry of a tree."""
    return [(leaf, i) for leaf in image.leaves(root) for i in range(image.get(leaf, 16, "I"))]


def _base(pool: Pool, metadata_blocks: int) -> Base:
    image = build(pool, metadata_blocks=metadata_blocks)
    top_level = _entries(image, image.get(0, MAPPING_ROOT, "Q"))
    roots = [image.get(leaf, image.value_offset(leaf, i), "Q") for leaf, i in top_level]
    leaves = [_leaves(image, root, device) for device, root in enumerate(roots)]
    users: dict[int, int] = {}
    for leaf in (leaf for each in leaves for leaf in each):
        users[leaf.block] = users.get(leaf.block, 0) + 1
    return Base(
        pool, image, roots, leaves, users, _entries(image, image.get(0, DETAILS_ROOT, "Q")), top_level
    )


BASES: dict[str, Callable[[], Base]] = {
    # Six devices that share leaves three ways and more, in two-level trees.
    "six": lambda: _base(_sound_pool(), 256),
    "scattered": lambda: _base(
        history(12, snapshots=5, mappings=4000, longest_run=1, gaps=0.5, change=0.02), 256
    ),
    "ten": lambda: _base(
        history(13, snapshots=9, mappings=2500, longest_run=30, change=0.01, first_id=7), 256
    ),
    # Trees of one leaf.
    "small": lambda: _base(history(15, snapshots=4, mappings=150, change=0.1), 256),
    # Details and top-level trees of two levels.
    "wide": lambda: _base(history(14, snapshots=279, mappings=800, longest_run=4, change=0.001), 1024),
}


_MOST = "six", "scattered", "ten", "wide"


@cache
def base(name: str) -> Base:
    """Return a sound pool; its image is not to be changed."""
    return BASES[name]()


def _sound_pool() -> Pool:
    return history(11, snapshots=5, mappings=3000, longest_run=4, change=0.015)


def sound_image() -> Image:
    """Return six devices that share leaves three ways and more, in two-level trees."""
    return build(_sound_pool(), metadata_blocks=1024)


# ---- where the damage goes


@dataclass(slots=True)
class Place:
    """A copy of a sound pool to be damaged, and the choices that a seed makes."""

    base: Base
    image: Image
    rng: random.Random
    forged: set[int] = field(default_factory=set)
    """Devices (by index) that the damage gives other mappings: no repair can know."""
    block_size: int = 0
    """What a person must tell the repair, if anything."""

    def get(self, block: int, offset: int, form: str) -> int:
        return self.image.get(block, offset, form)

    def put(self, block: int, offset: int, form: str, value: int) -> None:
        self.image.put(block, offset, form, value)

    def device(self) -> int:
        """Return the index of a device."""
        return self.rng.randrange(len(self.base.roots))

    def own_leaf(self) -> Leaf:
        """Return a leaf of one device alone, between two neighbours, with entries to spare."""
        return self.rng.choice(
            [
                leaf
                for leaves in self.base.leaves
                for leaf in leaves[1:-1]
                if self.base.users[leaf.block] == 1 and self._parent_users(leaf) == 1
            ]
        )

    def _parent_users(self, leaf: Leaf) -> int:
        return self.base.roots.count(leaf.parent)

    def shared_leaf(self) -> Leaf:
        """Return a leaf that several devices have, each in its own parent."""
        found = [
            leaf
            for leaves in self.base.leaves
            for leaf in leaves[1:-1]
            if self.base.users[leaf.block] > 1 and self._parent_users(leaf) == 1
        ]
        return self.rng.choice(found)

    def own_root(self) -> int:
        """Return the index of a device that shares its root with nobody, and whose tree has two levels."""
        roots = self.base.roots
        return self.rng.choice(
            [i for i, root in enumerate(roots) if roots.count(root) == 1 and len(self.base.leaves[i]) > 2]
        )

    def entries(self, block: int) -> int:
        return self.get(block, 16, "I")

    def entry(self, block: int) -> int:
        """Return a place in a node."""
        return self.rng.randrange(self.entries(block))

    def details(self, device: int) -> tuple[int, int]:
        """Return the block and the offset of a device's details."""
        block, index = self.base.details[device]
        return block, self.image.value_offset(block, index, 24)

    def set_child(self, leaf: Leaf, child: int) -> None:
        self.put(leaf.parent, self.image.value_offset(leaf.parent, leaf.index), "Q", child)

    def map_blocks(self, root: int) -> int:
        return self.get(0, root, "Q")

    def data_bitmap(self) -> int:
        index = self.get(0, DATA_MAP + 16, "Q")
        return self.get(index, self.image.value_offset(index, 0, 16), "Q")

    def metadata_index(self) -> int:
        return self.get(0, METADATA_MAP + 16, "Q")

    def metadata_bitmap(self) -> int:
        return self.get(self.metadata_index(), 16, "Q")

    def unused_block(self) -> int:
        """Return a block that nothing refers to."""
        return self.rng.randrange(max(self.image.kinds) + 1, len(self.image.blocks))

    def node(self, block: int, kind: str = "node") -> None:
        """Make an unused block one that is sealed."""
        self.image.kinds[block] = kind
        self.put(block, 8, "Q", block)

    def count_one_more(self, block: int) -> None:
        """Mark a metadata block that was free as used once, with all hints."""
        index = self.metadata_index()
        self.set_raw(self.metadata_bitmap(), block, 2)
        self.put(index, 24, "I", self.get(index, 24, "I") - 1)
        self.put(0, METADATA_MAP + 8, "Q", self.get(0, METADATA_MAP + 8, "Q") + 1)

    # ---- bitmaps

    def raw(self, bitmap: int, entry: int) -> int:
        return int(self.image.blocks[bitmap, 16 + entry // 4]) >> 2 * (entry % 4) & 3

    def set_raw(self, bitmap: int, entry: int, raw: int) -> None:
        byte = int(self.image.blocks[bitmap, 16 + entry // 4]) & ~(3 << 2 * (entry % 4))
        self.image.blocks[bitmap, 16 + entry // 4] = np.uint8(byte | raw << 2 * (entry % 4))

    def entry_with(self, bitmap: int, raw: int, blocks: int) -> int:
        """Return an entry with a raw value, of those that stand for blocks."""
        packed = self.image.blocks[bitmap, 16:]
        pairs = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).ravel()
        return int(self.rng.choice(np.flatnonzero(pairs[:blocks] == raw).tolist()))

    def seal(self) -> None:
        """Make the checksums of what was changed right."""
        known = self.base.image.blocks
        for block in np.flatnonzero((self.image.blocks != known).any(axis=1)).tolist():
            if block in self.image.kinds:
                self.put(block, 0, "I", checksum(self.image.blocks[block].tobytes(), self.image.kinds[block]))


def place(kind: Damage, seed: int) -> Place:
    """Return a pool with one kind of damage at the place that the seed chooses."""
    names = kind.bases or _MOST
    sound = base(names[seed % len(names)])
    image = Image(sound.image.blocks.copy(), dict(sound.image.kinds))
    found = Place(sound, image, random.Random(f"{kind.name} {seed}"))
    kind.apply(found)
    if kind.sealed:
        found.seal()
    return found
