"""Damage to the space maps and to a held metadata snapshot, and what writers are known to leave there."""

from collections.abc import Callable

from tests.thin_damage import (
    ACCEPTED,
    DATA_MAP,
    DETAILS_ROOT,
    KINDS,
    MAPPING_ROOT,
    METADATA_MAP,
    REFUSED,
    Damage,
    Place,
    Verdict,
    damage,
)
from tests.thin_image import ENTRIES_PER_BITMAP

__all__: list[str] = []

LEGAL, WARN, REPAIR, LOSS, REFUSE = Verdict
FREE, ONE, TWO, MORE = 0, 2, 1, 3

# ---- counts


def _count(
    name: str, which: str, old: int, new: int, finding: str, accepted: bool | None, *, alone: bool = True
) -> None:
    """Add a kind in which an entry of a bitmap with one raw value gets another."""

    def apply(place: Place) -> None:
        data = which == "data"
        bitmap = place.data_bitmap() if data else place.metadata_bitmap()
        blocks = place.base.pool.nr_data_blocks if data else len(place.image.blocks)
        place.set_raw(bitmap, place.entry_with(bitmap, old, blocks), new)

    KINDS.append(Damage(name, apply, REPAIR, finding, accepted, alone=alone))


_count("data_count_zero", "data", ONE, FREE, "fatal: count 0, expected 1", ACCEPTED)
_count("data_count_low", "data", TWO, ONE, "fatal: count 1, expected 2", ACCEPTED)
_count("data_count_high", "data", ONE, TWO, "leak: count 2, expected 1", ACCEPTED)
_count("data_block_leaked", "data", FREE, ONE, "leak: count 1, expected 0", ACCEPTED)
_count("data_overflow_missing", "data", FREE, MORE, "fatal: but no overflow entry", None)
_count("data_overflow_needed", "data", ONE, MORE, "fatal: but no overflow entry", None)
_count(
    "data_overflow_superfluous", "data", MORE, TWO, "fatal: bitmap entry says less than 3", None, alone=False
)
_count("metadata_count_zero", "metadata", ONE, FREE, "fatal: count 0, expected 1", REFUSED)
_count("metadata_count_low", "metadata", TWO, ONE, "fatal: count 1, expected 2", REFUSED)
_count("metadata_count_high", "metadata", ONE, TWO, "leak: count 2, expected 1", REFUSED)
_count("metadata_block_leaked", "metadata", FREE, ONE, "leak: count 1, expected 0", REFUSED)
_count("metadata_overflow_missing", "metadata", FREE, MORE, "fatal: but no overflow entry", REFUSED)
_count(
    "metadata_overflow_superfluous",
    "metadata",
    MORE,
    TWO,
    "fatal: bitmap entry says less than 3",
    None,
    alone=False,
)


@damage(REPAIR, r"leak: data blocks \d+..\d+: count 1, expected 0", ACCEPTED)
def run_of_data_blocks_leaked(place: Place) -> None:
    bitmap = place.data_bitmap()
    last = place.base.pool.nr_data_blocks - 1
    for entry in range(last - place.rng.randrange(2, 500), last):
        place.set_raw(bitmap, entry, ONE)


@damage(REPAIR, "fatal: count 0, expected", ACCEPTED, alone=False)
def all_data_blocks_free(place: Place) -> None:
    # As the tables of a pool look whose space map was never written.
    place.image.blocks[place.data_bitmap(), 16:] = 0


def _overflow_leaf(place: Place, map_root: int) -> int:
    return int(place.rng.choice(place.image.leaves(place.get(0, map_root + 24, "Q"))))


def _overflow_value(
    name: str, map_root: int, change: int | None, finding: str, accepted: bool | None
) -> None:
    def apply(place: Place) -> None:
        block = _overflow_leaf(place, map_root)
        offset = place.image.value_offset(block, place.entry(block), 4)
        if change is None:
            place.put(block, offset, "I", place.rng.randrange(3))
        else:
            place.put(
                block, offset, "I", place.get(block, offset, "I") + change * place.rng.randrange(1, 1000)
            )

    KINDS.append(Damage(name, apply, REPAIR, finding, accepted, alone=change is not None))


_overflow_value("data_overflow_high", DATA_MAP, 1, "leak: expected", ACCEPTED)
_overflow_value("data_overflow_small", DATA_MAP, None, "fatal: overflow entries have 3 or more", ACCEPTED)
_overflow_value("metadata_overflow_high", METADATA_MAP, 1, "leak: expected", REFUSED)
_overflow_value(
    "metadata_overflow_small", METADATA_MAP, None, "fatal: overflow entries have 3 or more", REFUSED
)


@damage(REPAIR, "fatal: but no overflow entry", None, alone=False)
def overflow_entry_of_another_block(place: Place) -> None:
    block = place.image.leaves(place.get(0, DATA_MAP + 24, "Q"))[-1]
    at = 32 + 8 * (place.entries(block) - 1)
    place.put(block, at, "Q", place.get(block, at, "Q") + place.rng.randrange(1, 100))


@damage(REPAIR, r"fatal: counts of data blocks that the map of \d+ does not have", None, alone=False)
def overflow_entry_beyond(place: Place) -> None:
    block = place.image.leaves(place.get(0, DATA_MAP + 24, "Q"))[-1]
    place.put(block, 32 + 8 * (place.entries(block) - 1), "Q", place.rng.randrange(1 << 20, 1 << 64))


@damage(REPAIR, "fatal: data space map, overflow tree.*: node .*: checksum", None, sealed=False, alone=False)
def data_overflow_checksum(place: Place) -> None:
    place.image.blocks[_overflow_leaf(place, DATA_MAP), place.rng.randrange(4096)] ^= 1


# ---- index entries and hints


def _index_entry(
    name: str,
    offset: int,
    form: str,
    values: list[int],
    verdict: Verdict,
    finding: str,
    accepted: bool | None,
) -> None:
    def apply(place: Place) -> None:
        place.put(place.metadata_index(), 16 + offset, form, place.rng.choice(values))

    KINDS.append(Damage(name, apply, verdict, finding, accepted))


_index_entry(
    "nr_free_wrong", 8, "I", [0, 1, 16320, 1 << 31], WARN, "warning: nr_free is .*, expected", ACCEPTED
)
_index_entry(
    "none_free_before_high", 12, "I", [16319, 16320, 1 << 31], WARN, "warning: none_free_before is", ACCEPTED
)
_index_entry("none_free_before_low", 12, "I", [0, 1, 2, 3], LEGAL, "", ACCEPTED)
_index_entry(
    "metadata_bitmap_beyond",
    0,
    "Q",
    [0, 5000, 1 << 40],
    REPAIR,
    "fatal: pointer to block .* is outside",
    None,
)


@damage(WARN, "warning: nr_free is", ACCEPTED)
def nr_free_of_the_last_bitmap_as_thin_restore_writes_it(place: Place) -> None:
    index = place.get(0, DATA_MAP + 16, "Q")
    at = place.image.value_offset(index, 0, 16) + 8
    beyond = ENTRIES_PER_BITMAP - place.base.pool.nr_data_blocks
    place.put(index, at, "I", place.get(index, at, "I") - beyond)


@damage(WARN, "warning: entries behind the last bitmap", ACCEPTED)
def garbage_in_unused_index_entries(place: Place) -> None:
    place.put(
        place.metadata_index(), 32 + 16 * place.rng.randrange(254), "Q", place.rng.randrange(1, 1 << 64)
    )


@damage(WARN, "warning: padding is", ACCEPTED)
def padding_of_bitmap_and_index(place: Place) -> None:
    place.put(place.data_bitmap(), 4, "I", place.rng.randrange(1, 1 << 32))


@damage(WARN, "warning: entries behind the last block are not zero", ACCEPTED)
def bits_beyond_the_end(place: Place) -> None:
    first = place.base.pool.nr_data_blocks
    place.set_raw(
        place.data_bitmap(), place.rng.randrange(first, ENTRIES_PER_BITMAP), place.rng.randrange(1, 4)
    )


# ---- blocks of the maps


@damage(REPAIR, "fatal: metadata space map, bitmap 0: node .*: checksum", None, sealed=False)
def metadata_bitmap_checksum(place: Place) -> None:
    place.image.blocks[place.metadata_bitmap(), place.rng.randrange(4096)] ^= 1


@damage(REPAIR, "fatal: data space map, bitmap 0: node .*: checksum", None, sealed=False)
def data_bitmap_checksum(place: Place) -> None:
    place.image.blocks[place.data_bitmap(), place.rng.randrange(4096)] ^= 1


@damage(REPAIR, "fatal: data space map, bitmap 0: node .* says that it is block", None)
def data_bitmap_of_another_place(place: Place) -> None:
    bitmap = place.data_bitmap()
    place.put(bitmap, 8, "Q", bitmap ^ 1 << place.rng.randrange(64))


@damage(REPAIR, "fatal: metadata space map, index block .*: checksum", REFUSED, sealed=False)
def metadata_index_checksum(place: Place) -> None:
    place.image.blocks[place.metadata_index(), place.rng.randrange(4096)] ^= 1


@damage(REPAIR, "fatal: metadata space map, index block .*: block .* says that it is block", None)
def metadata_index_of_another_place(place: Place) -> None:
    index = place.metadata_index()
    place.put(index, 8, "Q", index ^ 1 << place.rng.randrange(64))


@damage(REPAIR, "fatal: data space map, index: no entries for bitmaps 0..0", ACCEPTED, alone=False)
def index_entry_of_another_bitmap(place: Place) -> None:
    index = place.get(0, DATA_MAP + 16, "Q")
    place.put(index, 32, "Q", place.rng.randrange(1, 1 << 64))


@damage(REPAIR, "fatal: in use as metadata bitmap already", None)
def one_bitmap_for_both_maps(place: Place) -> None:
    index = place.get(0, DATA_MAP + 16, "Q")
    place.put(index, place.image.value_offset(index, 0, 16), "Q", place.metadata_bitmap())


# ---- held metadata snapshot


def _hold(place: Place) -> int:
    """Reserve a metadata snapshot as the kernel does; return the copy's block."""
    copy = place.unused_block()
    place.image.blocks[copy] = place.image.blocks[0]
    place.node(copy, "superblock")
    place.image.blocks[copy, DATA_MAP : METADATA_MAP + 128] = 0
    place.put(0, 56, "Q", copy)
    place.count_one_more(copy)
    for root in (MAPPING_ROOT, DETAILS_ROOT):
        place.set_raw(place.metadata_bitmap(), place.get(0, root, "Q"), TWO)
    return copy


@damage(LEGAL)
def held_snapshot(place: Place) -> None:
    _hold(place)


def _held(
    name: str, verdict: Verdict, finding: str, change: Callable[[Place, int], None], *, alone: bool = True
) -> None:
    def apply(place: Place) -> None:
        change(place, _hold(place))

    KINDS.append(Damage(name, apply, verdict, finding, None, alone=alone))


_held(
    "held_copy_of_another_place",
    REPAIR,
    r"fatal: metadata snapshot: node \d+: it is no copy of a superblock",
    lambda place, copy: place.put(copy, 8, "Q", copy ^ 1 << place.rng.randrange(64)),
)
_held(
    "held_copy_that_holds_itself",
    REPAIR,
    r"fatal: it holds another one at block \d+",
    lambda place, copy: place.put(copy, 56, "Q", copy),
)
_held(
    "held_copy_with_space_maps",
    WARN,
    "warning: space map roots are not zero",
    lambda place, copy: place.put(copy, DATA_MAP, "Q", place.rng.randrange(1, 1 << 64)),
)
_held(
    "held_copy_with_roots_exchanged",
    REPAIR,
    "fatal: metadata snapshot, details tree: node .* in use as node of the top-level tree already",
    lambda place, copy: place.put(copy, DETAILS_ROOT, "Q", place.get(0, MAPPING_ROOT, "Q")),
)
_held(
    "held_copy_with_a_root_beyond",
    REPAIR,
    "fatal: metadata snapshot, top-level tree: node .*: pointer to block .* is outside",
    lambda place, copy: place.put(copy, MAPPING_ROOT, "Q", place.rng.randrange(1 << 13, 1 << 64)),
)


@damage(REPAIR, "fatal: metadata snapshot: pointer to block")
def held_root_beyond(place: Place) -> None:
    place.put(0, 56, "Q", place.rng.randrange(1 << 13, 1 << 64))


@damage(REPAIR, "fatal: it is no copy of a superblock", alone=False)
def held_root_unused(place: Place) -> None:
    place.put(0, 56, "Q", place.unused_block())


@damage(REPAIR, "fatal: metadata snapshot: block .* is in use as node of a mapping tree already")
def held_root_is_a_node(place: Place) -> None:
    place.put(0, 56, "Q", place.own_leaf().block)
