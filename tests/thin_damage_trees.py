"""Damage to nodes of B-trees, and shapes of them that are legal."""

from collections.abc import Callable

import numpy as np

from tests.thin_damage import (
    ACCEPTED,
    DETAILS_ROOT,
    KINDS,
    MAPPING_ROOT,
    REFUSED,
    Damage,
    Leaf,
    Place,
    Verdict,
    damage,
)

__all__: list[str] = []

LEGAL, WARN, REPAIR, LOSS, REFUSE = Verdict

# ---- checksums and headers


def _flip(place: Place, block: int) -> None:
    """Change one bit of a block, its checksum included."""
    place.image.blocks[block, place.rng.randrange(4096)] ^= np.uint8(1 << place.rng.randrange(8))


@damage(
    LOSS,
    r"fatal: device \d+, thin blocks \d+..\d+: node \d+ -> \d+: checksum .*: \d+ mappings lost",
    REFUSED,
    sealed=False,
)
def leaf_checksum(place: Place) -> None:
    _flip(place, place.own_leaf().block)


@damage(
    LOSS,
    r"fatal: device \d+, thin blocks .*: block \d+ is shared and .* damaged",
    REFUSED,
    sealed=False,
    alone=False,
)
def shared_leaf_checksum(place: Place) -> None:
    _flip(place, place.shared_leaf().block)


@damage(LOSS, "fatal: checksum of block", REFUSED, sealed=False)
def device_root_checksum(place: Place) -> None:
    _flip(place, place.base.roots[place.own_root()])


@damage(REPAIR, "fatal: details tree.*: node", REFUSED, sealed=False)
def details_checksum(place: Place) -> None:
    _flip(place, place.base.details[place.device()][0])


@damage(REPAIR, "fatal: details tree: node", REFUSED, sealed=False, bases=["wide"])
def details_root_checksum(place: Place) -> None:
    _flip(place, place.get(0, DETAILS_ROOT, "Q"))


@damage(REFUSE, "fatal: top-level tree: node", REFUSED, sealed=False, alone=False, bases=["six", "ten"])
def only_top_level_node_checksum(place: Place) -> None:
    _flip(place, place.get(0, MAPPING_ROOT, "Q"))


@damage(LOSS, "fatal: top-level tree, devices .*: node", REFUSED, sealed=False, alone=False, bases=["wide"])
def top_level_leaf_checksum(place: Place) -> None:
    _flip(place, place.base.top_level[place.device()][0])


@damage(LOSS, "fatal: says that it is block .*: ", REFUSED)
def leaf_of_another_place(place: Place) -> None:
    leaf = place.own_leaf().block
    place.put(leaf, 8, "Q", leaf ^ 1 << place.rng.randrange(64))


@damage(LOSS, "fatal: says that it is block", REFUSED)
def older_leaf_in_place(place: Place) -> None:
    leaf, other = place.own_leaf().block, place.shared_leaf().block
    place.image.blocks[leaf] = place.image.blocks[other]


def _leaf_field(
    name: str, offset: int, values: list[int], finding: str, accepted: bool, verdict: Verdict = LOSS
) -> None:
    def apply(place: Place) -> None:
        place.put(place.own_leaf().block, offset, "I", place.rng.choice(values))

    KINDS.append(Damage(name, apply, verdict, finding, accepted))


_leaf_field("node_flags_none", 4, [0], "fatal: neither internal", REFUSED)
_leaf_field("node_flags_both", 4, [3], "fatal: neither internal", REFUSED)
_leaf_field("node_flags_more", 4, [6, 10, 0x80000002], "fatal: neither internal", ACCEPTED)
_leaf_field("node_value_size", 24, [0, 4, 7, 9, 16, 24, 1 << 31], "fatal: value size", REFUSED)
_leaf_field("node_max_entries_large", 20, [253, 255, 300, 336], "fatal: maximum of block", REFUSED)
_leaf_field("node_max_entries_absurd", 20, [0x7FFFFFFF, 0xFFFFFFFF], "fatal: maximum of block", REFUSED)
_leaf_field("node_nr_entries_above_max", 16, [253, 254, 300], r"fatal: has \d+ entries", REFUSED)
_leaf_field(
    "node_nr_entries_absurd", 16, [0x7FFFFFFF, 0xFFFFFFFF], "fatal: entries, possible are 252", REFUSED
)
_leaf_field("node_padding", 28, [1, 0xFFFFFFFF], "warning: padding is 0x", ACCEPTED, WARN)


@damage(REPAIR, r"fatal: room for \d+ entries, expected 252", ACCEPTED)
def smaller_max_entries(place: Place) -> None:
    leaf = place.own_leaf().block
    room = place.rng.choice(range(-(-place.entries(leaf) // 3) * 3, 252, 3))
    values = place.image.blocks[leaf, 2048:4096].copy()
    place.image.blocks[leaf, 32 + 8 * room : 32 + 8 * room + 2048] = values
    place.put(leaf, 20, "I", room)


@damage(LEGAL, "", ACCEPTED)
def garbage_in_unused_entries(place: Place) -> None:
    leaf = place.own_leaf().block
    free = place.entries(leaf)
    for array in (32, 2048):
        place.put(leaf, array + 8 * place.rng.randrange(free, 252), "Q", place.rng.randrange(1 << 64))


@damage(LEGAL, "", ACCEPTED)
def garbage_in_unused_blocks(place: Place) -> None:
    block = place.unused_block()
    place.image.blocks[block] = place.image.blocks[place.own_leaf().block]
    place.put(block, 100, "Q", place.rng.randrange(1 << 64))


# ---- keys


@damage(LOSS, "fatal: are not ascending", REFUSED)
def equal_keys(place: Place) -> None:
    leaf = place.own_leaf().block
    at = 32 + 8 * place.rng.randrange(place.entries(leaf) - 1)
    place.put(leaf, at + 8, "Q", place.get(leaf, at, "Q"))


@damage(LOSS, "fatal: are not ascending", REFUSED)
def descending_keys(place: Place) -> None:
    leaf = place.own_leaf().block
    at = 32 + 8 * place.rng.randrange(place.entries(leaf) - 1)
    first, second = place.get(leaf, at, "Q"), place.get(leaf, at + 8, "Q")
    place.put(leaf, at, "Q", second)
    place.put(leaf, at + 8, "Q", first)


@damage(LOSS, "fatal: entries, at least 84 expected", REFUSED, alone=False)
def too_few_entries(place: Place) -> None:
    place.put(place.own_leaf().block, 16, "I", place.rng.randrange(1, 84))


@damage(LOSS, "fatal: 0 entries, at least 84 expected", None, alone=False)
def empty_leaf(place: Place) -> None:
    place.put(place.own_leaf().block, 16, "I", 0)


@damage(LOSS, "fatal: has no entries", REFUSED)
def empty_internal_node(place: Place) -> None:
    place.put(place.base.roots[place.own_root()], 16, "I", 0)


@damage(REPAIR, "fatal: leave the range of the parent", REFUSED)
def parent_key_above_first_key(place: Place) -> None:
    leaf = place.own_leaf()
    last = place.get(leaf.block, 32 + 8 * (place.entries(leaf.block) - 1), "Q")
    key = place.rng.randint(place.get(leaf.block, 32, "Q") + 1, last)
    place.put(leaf.parent, 32 + 8 * leaf.index, "Q", key)


@damage(LOSS, "fatal: leave the range of the parent", REFUSED)
def last_key_in_the_next_leaf(place: Place) -> None:
    leaf = place.own_leaf()
    following = place.get(leaf.parent, 32 + 8 * (leaf.index + 1), "Q")
    place.put(leaf.block, 32 + 8 * (place.entries(leaf.block) - 1), "Q", following)


@damage(LEGAL, "", ACCEPTED)
def parent_key_below_first_key(place: Place) -> None:
    # What removals leave behind: only a lower bound is demanded.
    leaf = place.own_leaf()
    before = place.base.leaves[leaf.device][leaf.index - 1].block
    last = place.get(before, 32 + 8 * (place.entries(before) - 1), "Q")
    key = place.rng.randint(last + 1, place.get(leaf.block, 32, "Q"))
    place.put(leaf.parent, 32 + 8 * leaf.index, "Q", key)


# ---- children


def _child(
    name: str,
    pick: Callable[[Place, Leaf], int],
    finding: str,
    verdict: Verdict = LOSS,
    *,
    alone: bool = True,
    forges: bool = False,
    accepted: bool | None = REFUSED,
) -> None:
    """Add a kind in which a device's root points elsewhere instead of to a leaf of its own."""

    def apply(place: Place) -> None:
        leaf = place.own_leaf()
        place.set_child(leaf, pick(place, leaf))
        if forges:
            place.forged.add(leaf.device)

    KINDS.append(Damage(name, apply, verdict, finding, accepted, alone=alone))


_child(
    "child_beyond",
    lambda place, _: len(place.image.blocks) + place.rng.randrange(1000),
    r"fatal: pointer to block \d+ is outside 1..\d+: \d+ mappings lost",
)
_child("child_absurd", lambda place, _: place.rng.randrange(1 << 40, 1 << 64), "fatal: is outside 1..")
_child("child_zero", lambda *_: 0, "fatal: pointer to block 0 is outside")
_child("child_bitmap", lambda place, _: place.data_bitmap(), "fatal: in use as data bitmap already")
_child(
    "child_index", lambda place, _: place.metadata_index(), "fatal: in use as metadata index block already"
)
_child(
    "child_details",
    lambda place, _: place.base.details[place.device()][0],
    "fatal: as node of the details tree already",
)
_child(
    "child_top_level",
    lambda place, _: place.base.top_level[place.device()][0],
    "fatal: as node of the top-level tree already",
)
_child("child_itself", lambda _, leaf: leaf.parent, "fatal: lies below itself")
_child(
    "child_unused_block",
    lambda place, _: place.unused_block(),
    r"fatal: checksum of block \d+ is 0x00000000",
    alone=False,
)
_child(
    "child_other_root",
    lambda place, leaf: place.base.roots[leaf.device - 1],
    "fatal: leave the range of the parent",
    alone=False,
    forges=True,
    accepted=None,
)
_child(
    "child_sibling",
    lambda place, leaf: place.base.leaves[leaf.device][leaf.index + 1].block,
    "fatal: leave the range of the parent",
    alone=False,
)


@damage(REPAIR, "fatal: its leaves lie .* levels below it, those of its siblings", alone=False)
def unequal_depth(place: Place) -> None:
    # A leaf gets a one-child node above it.
    leaf, fresh = place.own_leaf(), place.unused_block()
    place.image.blocks[fresh] = place.image.blocks[leaf.parent]
    place.node(fresh)
    place.put(fresh, 16, "I", 1)
    place.put(fresh, 32, "Q", place.get(leaf.parent, 32 + 8 * leaf.index, "Q"))
    place.put(fresh, place.image.value_offset(fresh, 0), "Q", leaf.block)
    place.set_child(leaf, fresh)


@damage(LOSS, "fatal: deeper than 12 nodes", alone=False)
def bottomless_tree(place: Place) -> None:
    leaf = place.own_leaf()
    first = max(place.image.kinds) + 1
    for fresh in range(first, first + 15):
        place.image.blocks[fresh] = place.image.blocks[leaf.parent]
        place.node(fresh)
        place.put(fresh, 16, "I", 1)
        place.put(fresh, 32, "Q", place.get(leaf.parent, 32 + 8 * leaf.index, "Q"))
        place.put(fresh, place.image.value_offset(fresh, 0), "Q", fresh + 1)
    place.set_child(leaf, first)


@damage(LEGAL, "", ACCEPTED, bases=["small"])
def root_with_one_child(place: Place) -> None:
    # What removals leave behind in the kernel.
    block, index = place.base.top_level[place.device()]
    at = place.image.value_offset(block, index)
    root, fresh = place.get(block, at, "Q"), max(place.image.kinds) + 1
    place.image.blocks[fresh] = place.image.blocks[root]
    place.node(fresh)
    place.put(fresh, 4, "I", 1)
    place.put(fresh, 16, "I", 1)
    place.put(fresh, place.image.value_offset(fresh, 0), "Q", root)
    place.put(block, at, "Q", fresh)
    place.count_one_more(fresh)
