"""Damage to the space maps and to a held metadata snapshot."""

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
    entry_with,
    field,
    metadata_bitmap,
    set_raw,
    shared_leaf,
)
from tests.thin_image import ENTRIES_PER_BITMAP, Image

__all__: list[str] = []

# ---- space maps


def _raw_entry(
    name: str,
    which: Callable[[Image], int],
    old: int,
    new: int,
    finding: str,
    accepted: bool | None,
    *,
    alone: bool = True,
) -> None:
    """Add a kind in which the first entry with one raw value gets another."""

    def apply(image: Image) -> None:
        bitmap = which(image)
        set_raw(image, bitmap, entry_with(image, bitmap, old), new)

    KINDS.append(Damage(name, apply, finding, accepted, alone=alone))


_raw_entry("data_count_zero", data_bitmap, 2, 0, "fatal: count 0, expected 1", ACCEPTED)
_raw_entry("data_count_low", data_bitmap, 1, 2, "fatal: count 1, expected 2", ACCEPTED)
_raw_entry("data_count_high", data_bitmap, 2, 1, "leak: count 2, expected 1", ACCEPTED)
_raw_entry("data_block_leaked", data_bitmap, 0, 2, "leak: count 1, expected 0", ACCEPTED)
_raw_entry("data_overflow_missing", data_bitmap, 0, 3, "fatal: but no overflow entry", None)
_raw_entry(
    "data_overflow_superfluous", data_bitmap, 3, 1, "fatal: bitmap entry says less than 3", None, alone=False
)
_raw_entry("metadata_count_zero", metadata_bitmap, 2, 0, "fatal: count 0, expected 1", REFUSED)
_raw_entry("metadata_count_high", metadata_bitmap, 2, 1, "leak: count 2, expected 1", REFUSED)
_raw_entry("metadata_block_leaked", metadata_bitmap, 0, 2, "leak: count 1, expected 0", REFUSED)
_raw_entry("metadata_overflow_missing", metadata_bitmap, 0, 3, "fatal: but no overflow entry", REFUSED)


@damage(r"leak: data blocks \d+..\d+: count 1, expected 0", ACCEPTED)
def run_of_data_blocks_leaked(image: Image) -> None:
    bitmap = data_bitmap(image)
    last = image.get(0, DATA_MAP, "Q") - 1
    for entry in range(last - 50, last):
        set_raw(image, bitmap, entry, 2)


def _overflow_value(
    name: str, map_root: int, change: int | None, finding: str, accepted: bool | None
) -> None:
    def apply(image: Image) -> None:
        block = image.leaves(image.get(0, map_root + 24, "Q"))[0]
        offset = image.value_offset(block, 0, 4)
        image.put(block, offset, "I", 2 if change is None else image.get(block, offset, "I") + change)

    KINDS.append(Damage(name, apply, finding, accepted, alone=change is not None))


_overflow_value("data_overflow_high", DATA_MAP, 1, "leak: expected", ACCEPTED)
_overflow_value("data_overflow_small", DATA_MAP, None, "fatal: overflow entries have 3 or more", ACCEPTED)
_overflow_value("metadata_overflow_high", METADATA_MAP, 1, "leak: expected", REFUSED)
_overflow_value("metadata_overflow_low", METADATA_MAP, -1, "fatal: expected", REFUSED)


def _index_entry(name: str, offset: int, form: str, value: int, finding: str, accepted: bool | None) -> None:
    def apply(image: Image) -> None:
        image.put(image.get(0, METADATA_MAP + 16, "Q"), 16 + offset, form, value)

    KINDS.append(Damage(name, apply, finding, accepted))


_index_entry("nr_free_wrong", 8, "I", 1, "warning: nr_free is 1, expected", ACCEPTED)
_index_entry("none_free_before_high", 12, "I", 16320, "warning: none_free_before is 16320", ACCEPTED)
_index_entry("none_free_before_low", 12, "I", 0, CLEAN, ACCEPTED)
_index_entry("metadata_bitmap_beyond", 0, "Q", 5000, "fatal: pointer to block 5000", None)
_index_entry("extra_index_entry", 16, "Q", 5, "warning: entries behind the last bitmap", ACCEPTED)


@damage("warning: entries behind the last block are not zero", ACCEPTED)
def bits_beyond_the_end(image: Image) -> None:
    set_raw(image, data_bitmap(image), ENTRIES_PER_BITMAP - 1, 2)


@damage("fatal: metadata space map, bitmap 0: node .*: checksum", None, sealed=False)
def metadata_bitmap_checksum(image: Image) -> None:
    image.put(metadata_bitmap(image), 0, "I", 1)


@damage("fatal: data space map, bitmap 0: node .* says that it is block 9", None)
def data_bitmap_of_another_place(image: Image) -> None:
    image.put(data_bitmap(image), 8, "Q", 9)


@damage("fatal: metadata space map, index block .*: checksum", REFUSED, sealed=False)
def metadata_index_checksum(image: Image) -> None:
    image.put(image.get(0, METADATA_MAP + 16, "Q"), 0, "I", 1)


@damage("fatal: data space map, index: no entries for bitmaps 0..0", ACCEPTED, alone=False)
def index_entry_of_another_bitmap(image: Image) -> None:
    index = image.get(0, DATA_MAP + 16, "Q")
    image.put(index, 32, "Q", 7)


@damage("fatal: in use as metadata bitmap already", None)
def one_bitmap_for_both_maps(image: Image) -> None:
    index = image.get(0, DATA_MAP + 16, "Q")
    image.put(index, image.value_offset(index, 0, 16), "Q", metadata_bitmap(image))


# ---- held metadata snapshot


def _hold(image: Image) -> int:
    """Reserve a metadata snapshot as the kernel does; return the copy's block."""
    copy, bitmap = 1000, metadata_bitmap(image)
    image.blocks[copy] = image.blocks[0]
    image.kinds[copy] = "superblock"
    image.put(copy, 8, "Q", copy)
    image.blocks[copy, DATA_MAP : METADATA_MAP + 128] = 0
    image.put(0, 56, "Q", copy)
    set_raw(image, bitmap, copy, 2)
    for root in (MAPPING_ROOT, DETAILS_ROOT):
        set_raw(image, bitmap, image.get(0, root, "Q"), 1)
    image.put(0, METADATA_MAP + 8, "Q", image.get(0, METADATA_MAP + 8, "Q") + 1)
    index = image.get(0, METADATA_MAP + 16, "Q")
    image.put(index, 24, "I", image.get(index, 24, "I") - 1)
    return copy


@damage(CLEAN, None)
def held_snapshot(image: Image) -> None:
    _hold(image)


@damage("fatal: metadata snapshot: node 1000: it is no copy of a superblock", None)
def held_copy_of_another_place(image: Image) -> None:
    image.put(_hold(image), 8, "Q", 0)


@damage("fatal: it holds another one at block 1000", None)
def held_copy_that_holds_itself(image: Image) -> None:
    image.put(_hold(image), 56, "Q", 1000)


@damage("warning: space map roots are not zero", None)
def held_copy_with_space_maps(image: Image) -> None:
    image.put(_hold(image), DATA_MAP, "Q", 1)


@damage("fatal: metadata snapshot, details tree: node .* in use as node of the top-level tree already", None)
def held_copy_with_roots_exchanged(image: Image) -> None:
    copy = _hold(image)
    image.put(copy, DETAILS_ROOT, "Q", image.get(0, MAPPING_ROOT, "Q"))


field("held_root_beyond", 56, "Q", 1 << 33, "fatal: metadata snapshot: pointer to block", None)
field("held_root_unused", 56, "Q", 900, "fatal: it is no copy of a superblock", None, alone=False)


@damage("fatal: metadata snapshot: block .* is in use as node of a mapping tree already", None)
def held_root_is_a_node(image: Image) -> None:
    image.put(0, 56, "Q", shared_leaf(image))
