"""Damage to the superblock, to nodes, devices and mappings."""

from collections.abc import Callable

from tests.thin_damage import (
    ACCEPTED,
    CLEAN,
    DATA_MAP,
    DETAILS_ROOT,
    KINDS,
    MAPPING_ROOT,
    METADATA_MAP,
    REFUSED,
    Damage,
    damage,
    data_bitmap,
    data_count,
    field,
    shared_leaf,
)
from tests.thin_image import Image

__all__: list[str] = []

# ---- superblock

field("magic", 32, "Q", 7, "fatal: magic number", ACCEPTED)
field("version", 40, "I", 3, "fatal: version is 3", ACCEPTED)
field("superblock_number", 8, "Q", 5, "fatal: it says that it is block 5", ACCEPTED)
field("uuid", 16, "Q", 0x1234, CLEAN, ACCEPTED)
field("unknown_flag", 4, "I", 2, "fatal: unknown flags", ACCEPTED)
field("needs_check", 4, "I", 1, "warning: needs_check is set", ACCEPTED)
field("compat_flags", 352, "I", 1, "warning: compatible features 0x1", ACCEPTED)
field("compat_ro_flags", 356, "I", 1, "fatal: forbid writing", ACCEPTED)
field("incompat_flags", 360, "I", 1, "fatal: incompatible features 0x1", ACCEPTED)
field("metadata_block_size", 340, "I", 16, "fatal: metadata_block_size is 16", ACCEPTED)
field("metadata_nr_blocks_high", 344, "Q", 99999, "warning: metadata_nr_blocks is 99999", ACCEPTED)
field("metadata_nr_blocks_low", 344, "Q", 16, CLEAN, ACCEPTED)
field("data_block_size_zero", 336, "I", 0, "fatal: data_block_size of 0", ACCEPTED)
field("data_block_size_odd", 336, "I", 100, "fatal: data_block_size of 100", ACCEPTED)
field("data_block_size_huge", 336, "I", (1 << 21) + 128, "fatal: data_block_size of", ACCEPTED)
field("data_block_size_24", 336, "I", 24, "fatal: data_block_size of 24", ACCEPTED)
field("data_block_size_4k", 336, "I", 8, CLEAN, ACCEPTED)
field("data_block_size_32k", 336, "I", 64, CLEAN, ACCEPTED)
field(
    "data_blocks_more_than_bitmaps", DATA_MAP, "Q", 1 << 20, "fatal: no entries for bitmaps 1..64", ACCEPTED
)
field("data_blocks_absurd", DATA_MAP, "Q", 1 << 63, "fatal: possible are up to", ACCEPTED, alone=False)
field("data_blocks_too_few", DATA_MAP, "Q", 100, "fatal: data blocks beyond the pool", ACCEPTED, alone=False)
field("metadata_blocks_beyond_file", METADATA_MAP, "Q", 2048, "fatal: it is truncated", ACCEPTED)
field("metadata_blocks_none", METADATA_MAP, "Q", 0, "fatal: 0 metadata blocks", None)
field("metadata_blocks_absurd", METADATA_MAP, "Q", 1 << 40, "fatal: metadata blocks, possible", None)
field("data_nr_allocated", DATA_MAP + 8, "Q", 3, "warning: nr_allocated is 3", ACCEPTED)
field("metadata_nr_allocated", METADATA_MAP + 8, "Q", 3, "warning: nr_allocated is 3", ACCEPTED)
field("stale_bytes_behind_superblock", 3000, "I", 1, "warning: bytes behind the last field", ACCEPTED)
field("time_too_large", 44, "I", 1 << 24, "fatal: time 16777216 is larger", ACCEPTED)
field("time_too_small", 44, "I", 1, "fatal: later than the pool's time", ACCEPTED)
field("transaction_id_set_back", 48, "Q", 1, "warning: transaction id 5 is later", ACCEPTED)
field("details_root_zero", DETAILS_ROOT, "Q", 0, "fatal: pointer to block 0 is outside", REFUSED)
field("mapping_root_beyond", MAPPING_ROOT, "Q", 1 << 50, "fatal: is outside 1..1023", REFUSED)
field("data_index_root_beyond", DATA_MAP + 16, "Q", 1024, "fatal: pointer to block 1024 is outside", None)
field("metadata_index_zero", METADATA_MAP + 16, "Q", 0, "fatal: pointer to block 0", REFUSED)


@damage("fatal: superblock: checksum is", REFUSED, sealed=False)
def superblock_checksum(image: Image) -> None:
    image.put(0, 0, "I", image.get(0, 0, "I") ^ 1)


@damage("fatal: in use as node of the details tree already", REFUSED)
def one_root_for_details_and_mappings(image: Image) -> None:
    image.put(0, MAPPING_ROOT, "Q", image.get(0, DETAILS_ROOT, "Q"))


@damage("fatal: in use as data bitmap already", REFUSED)
def bitmap_as_details_root(image: Image) -> None:
    image.put(0, DETAILS_ROOT, "Q", data_bitmap(image))


# ---- nodes


def _last_device_leaf(image: Image, index: int = 2) -> int:
    """Return a leaf that only the last device has, with at least two neighbours."""
    mine = image.leaves(image.device_root(5))
    others = {leaf for device in range(5) for leaf in image.leaves(image.device_root(device))}
    return [leaf for leaf in mine[1:-1] if leaf not in others][index % 2]


def _parent_of(image: Image, leaf: int) -> tuple[int, int]:
    """Return the last device's root and the place of a leaf in it."""
    root = image.device_root(5)
    return root, image.children(root).index(leaf)


@damage(
    r"fatal: device 6, thin blocks \d+..\d+: node \d+ -> \d+: checksum .*: \d+ mappings lost",
    REFUSED,
    sealed=False,
)
def leaf_checksum(image: Image) -> None:
    leaf = _last_device_leaf(image)
    image.put(leaf, 0, "I", image.get(leaf, 0, "I") ^ 1)


@damage(
    r"fatal: device 6, thin blocks .*: block \d+ is shared and .* damaged", REFUSED, sealed=False, alone=False
)
def shared_leaf_checksum(image: Image) -> None:
    leaf = shared_leaf(image)
    image.put(leaf, 0, "I", image.get(leaf, 0, "I") ^ 1)


@damage("fatal: checksum of block", REFUSED, sealed=False)
def internal_node_checksum(image: Image) -> None:
    root = image.device_root(5)
    image.put(root, 100, "I", 99)


@damage("fatal: details tree: node", REFUSED, sealed=False)
def details_checksum(image: Image) -> None:
    image.put(image.get(0, DETAILS_ROOT, "Q"), 0, "I", 1)


@damage("fatal: says that it is block 77: ", REFUSED)
def leaf_of_another_place(image: Image) -> None:
    image.put(_last_device_leaf(image), 8, "Q", 77)


def _leaf_field(name: str, offset: int, value: int, finding: str, accepted: bool | None) -> None:
    def apply(image: Image) -> None:
        image.put(_last_device_leaf(image), offset, "I", value)

    KINDS.append(Damage(name, apply, finding, accepted))


_leaf_field("node_flags_none", 4, 0, "fatal: neither internal", REFUSED)
_leaf_field("node_flags_both", 4, 3, "fatal: neither internal", REFUSED)
_leaf_field("node_flags_more", 4, 6, "fatal: neither internal", ACCEPTED)
_leaf_field("node_value_size", 24, 16, "fatal: value size", REFUSED)
_leaf_field("node_max_entries_large", 20, 255, "fatal: maximum of block", REFUSED)
_leaf_field("node_max_entries_absurd", 20, 0xFFFFFFFF, "fatal: maximum of block", REFUSED)
_leaf_field("node_nr_entries_above_max", 16, 253, "fatal: has 253 entries", REFUSED)
_leaf_field("node_nr_entries_absurd", 16, 0xFFFFFFFF, "fatal: entries, possible are 252", REFUSED)
_leaf_field("node_padding", 28, 1, "warning: padding is 0x1", ACCEPTED)


@damage("fatal: room for 249 entries, expected 252", ACCEPTED)
def smaller_max_entries(image: Image) -> None:
    leaf = _last_device_leaf(image)
    values = image.blocks[leaf, 2048:4096].copy()
    image.blocks[leaf, 2024:4072] = values
    image.put(leaf, 20, "I", 249)


@damage("fatal: are not ascending", REFUSED)
def equal_keys(image: Image) -> None:
    leaf = _last_device_leaf(image)
    image.put(leaf, 40, "Q", image.get(leaf, 32, "Q"))


@damage("fatal: are not ascending", REFUSED)
def descending_keys(image: Image) -> None:
    leaf = _last_device_leaf(image)
    first, second = image.get(leaf, 32, "Q"), image.get(leaf, 40, "Q")
    image.put(leaf, 32, "Q", second)
    image.put(leaf, 40, "Q", first)


@damage("fatal: 83 entries, at least 84 expected", REFUSED, alone=False)
def too_few_entries(image: Image) -> None:
    image.put(_last_device_leaf(image), 16, "I", 83)


@damage("fatal: has no entries", REFUSED)
def empty_internal_node(image: Image) -> None:
    image.put(image.device_root(5), 16, "I", 0)


@damage("fatal: leave the range of the parent", REFUSED)
def parent_key_above_first_key(image: Image) -> None:
    leaf = _last_device_leaf(image)
    root, place = _parent_of(image, leaf)
    image.put(root, 32 + 8 * place, "Q", image.get(leaf, 32, "Q") + 1)


@damage("fatal: leave the range of the parent", REFUSED)
def last_key_in_the_next_leaf(image: Image) -> None:
    leaf = _last_device_leaf(image)
    root, place = _parent_of(image, leaf)
    following = image.get(root, 32 + 8 * (place + 1), "Q")
    count = image.get(leaf, 16, "I")
    image.put(leaf, 32 + 8 * (count - 1), "Q", following)


def _child(name: str, pick: Callable[[Image], int], finding: str, *, alone: bool = True) -> None:
    """Add a kind in which the last device's root points elsewhere instead of to a leaf of its own."""

    def apply(image: Image) -> None:
        root, place = _parent_of(image, _last_device_leaf(image))
        image.put(root, image.value_offset(root, place), "Q", pick(image))

    KINDS.append(Damage(name, apply, finding, REFUSED, alone=alone))


_child("child_beyond", lambda _: 1024, r"fatal: pointer to block 1024 is outside 1..1023: \d+ mappings lost")
_child("child_absurd", lambda _: (1 << 64) - 1, "fatal: is outside 1..1023")
_child("child_zero", lambda _: 0, "fatal: pointer to block 0 is outside")
_child("child_bitmap", lambda image: data_bitmap(image), "fatal: in use as data bitmap already")
_child("child_index", lambda image: image.get(0, 208, "Q"), "fatal: in use as metadata index block already")
_child(
    "child_details",
    lambda image: image.get(0, DETAILS_ROOT, "Q"),
    "fatal: as node of the details tree already",
)
_child(
    "child_top_level",
    lambda image: image.get(0, MAPPING_ROOT, "Q"),
    "fatal: as node of the top-level tree already",
)
_child("child_itself", lambda image: image.device_root(5), "fatal: lies below itself")
_child("child_unused_block", lambda _: 1000, "fatal: checksum of block 1000 is 0x00000000", alone=False)
_child(
    "child_other_root",
    lambda image: image.device_root(0),
    "fatal: leave the range of the parent",
    alone=False,
)


@damage("fatal: its leaves lie 1 levels below it, those of its siblings 0", None, alone=False)
def unequal_depth(image: Image) -> None:
    # The second leaf of the last device gets a one-child node above it.
    root = image.device_root(5)
    leaf = image.children(root)[1]
    fresh = 1000
    image.blocks[fresh] = image.blocks[root]
    image.kinds[fresh] = "node"
    image.put(fresh, 8, "Q", fresh)
    image.put(fresh, 16, "I", 1)
    image.put(fresh, 32, "Q", image.get(root, 40, "Q"))
    image.put(fresh, image.value_offset(fresh, 0), "Q", leaf)
    image.put(root, image.value_offset(root, 1), "Q", fresh)


@damage("fatal: deeper than 12 nodes", None, alone=False)
def bottomless_tree(image: Image) -> None:
    root = image.device_root(5)
    for fresh in range(1000, 1015):
        image.blocks[fresh] = image.blocks[root]
        image.kinds[fresh] = "node"
        image.put(fresh, 8, "Q", fresh)
        image.put(fresh, 16, "I", 1)
        image.put(fresh, image.value_offset(fresh, 0), "Q", fresh + 1)
    image.put(root, image.value_offset(root, 0), "Q", 1000)


# ---- devices


def _details(image: Image, index: int) -> tuple[int, int]:
    block = image.get(0, DETAILS_ROOT, "Q")
    return block, image.value_offset(block, index, 24)


def _details_field(
    name: str, offset: int, form: str, value: int, finding: str, *, alone: bool = True, index: int = 5
) -> None:
    def apply(image: Image) -> None:
        block, place = _details(image, index)
        image.put(block, place + offset, form, value)

    KINDS.append(Damage(name, apply, finding, ACCEPTED, alone=alone))


_details_field(
    "mapped_blocks_wrong", 0, "Q", 7, "fatal: device 6: mapped_blocks is 7, the mapping tree has 3000"
)
_details_field("device_of_the_future", 8, "Q", 99, "warning: transaction id 99 is later")
_details_field("creation_time_ahead", 16, "I", 9, "fatal: creation_time 9 is later")
_details_field("snapshotted_time_ahead", 20, "I", 9, "fatal: snapshotted_time 9 is later than the pool")
_details_field(
    "created_after_snapshot",
    20,
    "I",
    4,
    "fatal: creation_time 5 is later than snapshotted_time 4",
    alone=False,
)
_details_field("shared_looks_unshared", 20, "I", 0, "fatal: look unshared", alone=False)
_details_field(
    "shared_looks_unshared_to_first", 20, "I", 0, "fatal: look unshared there", alone=False, index=0
)


@damage("fatal: device 99: it has details but no mapping tree", ACCEPTED, alone=False)
def details_without_tree(image: Image) -> None:
    block = image.get(0, DETAILS_ROOT, "Q")
    image.put(block, 32 + 8 * 5, "Q", 99)


@damage("fatal: device 6: it has a mapping tree but no details", None)
def tree_without_details(image: Image) -> None:
    image.put(image.get(0, DETAILS_ROOT, "Q"), 16, "I", 5)


@damage("fatal: device 16777216: the id is larger", ACCEPTED)
def device_id_too_large(image: Image) -> None:
    for root in (image.get(0, DETAILS_ROOT, "Q"), image.get(0, MAPPING_ROOT, "Q")):
        image.put(root, 32 + 8 * 5, "Q", 1 << 24)


# ---- mappings


def _mapping(image: Image, place: int = 0) -> tuple[int, int]:
    leaf = _last_device_leaf(image)
    return leaf, image.value_offset(leaf, place)


@damage("fatal: 1 mapping names a data block beyond the pool", ACCEPTED, alone=False)
def mapping_beyond_the_data(image: Image) -> None:
    leaf, offset = _mapping(image)
    image.put(leaf, offset, "Q", (1 << 39) << 24)


@damage("fatal: 1 mapping is later than the pool's time", ACCEPTED, alone=False)
def mapping_of_the_future(image: Image) -> None:
    leaf, offset = _mapping(image)
    image.put(leaf, offset, "Q", image.get(leaf, offset, "Q") | 0xFFFF)


@damage(r"fatal: data block \d+: count 5, expected 6", ACCEPTED, alone=False)
def mapping_to_another_block(image: Image) -> None:
    leaf, offset = _mapping(image)
    image.put(leaf, offset, "Q", image.get(leaf, image.value_offset(leaf, 1), "Q"))


@damage("warning: shares its data block with a mapping of other thin block or time", ACCEPTED)
def shared_block_at_two_times(image: Image) -> None:
    leaf, place = next(
        (leaf, place)
        for leaf in image.leaves(image.device_root(5))
        for place in range(image.get(leaf, 16, "I"))
        if data_count(image, image.get(leaf, image.value_offset(leaf, place), "Q") >> 24) == 2
    )
    offset = image.value_offset(leaf, place)
    image.put(leaf, offset, "Q", image.get(leaf, offset, "Q") ^ 1)
