"""Damage to the superblock, and oddities of it that are legal."""

import random
from collections.abc import Callable, Sequence

import numpy as np

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

__all__: list[str] = []

LEGAL, WARN, REPAIR, LOSS, REFUSE = Verdict
U32, U64 = 1 << 32, 1 << 64

Values = Sequence[int] | Callable[[random.Random], int]


def _field(
    name: str,
    offset: int,
    form: str,
    values: Values,
    verdict: Verdict,
    finding: str = "",
    accepted: bool | None = None,
    *,
    alone: bool = True,
) -> None:
    """Add a kind that sets one field."""

    def apply(place: Place) -> None:
        chosen = values(place.rng) if callable(values) else place.rng.choice(values)
        place.put(0, offset, form, chosen)

    KINDS.append(Damage(name, apply, verdict, finding, accepted, alone=alone))


def _between(low: int, high: int) -> Callable[[random.Random], int]:
    return lambda rng: rng.randrange(low, high)


def _bit(width: int, lowest: int = 0) -> Callable[[random.Random], int]:
    return lambda rng: 1 << rng.randrange(lowest, width)


# ---- what it is

_field("magic", 32, "Q", _between(0, U32 // 2), REPAIR, "fatal: magic number", ACCEPTED)
_field("version_of_later", 40, "I", _between(3, U32), REFUSE, "fatal: version is", ACCEPTED)
_field("version_zero", 40, "I", [0], REFUSE, "fatal: version is 0", ACCEPTED)
_field("version_one", 40, "I", [1], WARN, "warning: version is 1", ACCEPTED)
_field("superblock_number", 8, "Q", _between(1, U64), REPAIR, "fatal: it says that it is block", ACCEPTED)
_field("uuid", 16, "Q", _between(1, U64), LEGAL, "", ACCEPTED)
_field("unknown_flag", 4, "I", _bit(32, 1), REFUSE, "fatal: unknown flags", ACCEPTED)
_field("needs_check", 4, "I", [1], WARN, "warning: needs_check is set", ACCEPTED)
_field("compat_flags", 352, "I", _bit(32), WARN, "warning: compatible features 0x", ACCEPTED)
_field("compat_ro_flags", 356, "I", _bit(32), REFUSE, "fatal: forbid writing", ACCEPTED)
_field("incompat_flags", 360, "I", _bit(32), REFUSE, "fatal: incompatible features 0x", ACCEPTED)

# ---- sizes

_field(
    "metadata_block_size",
    340,
    "I",
    [0, 1, 7, 9, 16, U32 - 1],
    REPAIR,
    "fatal: metadata_block_size is",
    ACCEPTED,
)
_field(
    "metadata_nr_blocks_high", 344, "Q", _between(5000, U64), WARN, "warning: metadata_nr_blocks is", ACCEPTED
)
_field("metadata_nr_blocks_low", 344, "Q", _between(0, 256), LEGAL, "", ACCEPTED)
_field("data_block_size_zero", 336, "I", [0], REPAIR, "fatal: data_block_size of 0", ACCEPTED)
_field(
    "data_block_size_odd",
    336,
    "I",
    [1, 7, 9, 24, 96, 100, 127, 129, 192],
    REPAIR,
    "fatal: data_block_size",
    ACCEPTED,
)
_field(
    "data_block_size_huge",
    336,
    "I",
    [(1 << 21) + 128, 1 << 22, U32 - 128, U32 - 1],
    REPAIR,
    "fatal: data_block_size of",
    ACCEPTED,
)
_field("data_block_size_small", 336, "I", [8, 16, 32, 64], LEGAL, "", ACCEPTED)
_field(
    "data_blocks_more_than_bitmaps",
    DATA_MAP,
    "Q",
    _between(1 << 17, 1 << 21),
    REPAIR,
    r"fatal: no entries for bitmaps 1..\d+",
    ACCEPTED,
)
_field(
    "data_blocks_absurd",
    DATA_MAP,
    "Q",
    _bit(64, 41),
    REPAIR,
    "fatal: possible are up to",
    ACCEPTED,
    alone=False,
)
_field(
    "data_blocks_too_few",
    DATA_MAP,
    "Q",
    _between(0, 500),
    REPAIR,
    "fatal: data blocks? beyond the pool",
    ACCEPTED,
    alone=False,
)
_field(
    "metadata_blocks_beyond_file",
    METADATA_MAP,
    "Q",
    _between(2049, 16320),
    REPAIR,
    "fatal: it is truncated",
    ACCEPTED,
)
_field("metadata_blocks_none", METADATA_MAP, "Q", [0], REPAIR, "fatal: 0 metadata blocks")
_field("metadata_blocks_absurd", METADATA_MAP, "Q", _bit(64, 23), REPAIR, "fatal: metadata blocks, possible")
_field(
    "metadata_blocks_too_few",
    METADATA_MAP,
    "Q",
    _between(2, 60),
    REPAIR,
    "fatal: pointer to block .* is outside",
    alone=False,
)
_field("data_nr_allocated", DATA_MAP + 8, "Q", _between(0, 500), WARN, "warning: nr_allocated is", ACCEPTED)
_field(
    "metadata_nr_allocated",
    METADATA_MAP + 8,
    "Q",
    _between(0, 50),
    WARN,
    "warning: nr_allocated is",
    ACCEPTED,
)

# ---- time and transaction id

_field("time_too_large", 44, "I", _between(1 << 24, U32), REPAIR, "fatal: time .* is larger", ACCEPTED)
_field("time_too_small", 44, "I", [0, 1, 2, 3], REPAIR, "fatal: later than the pool's time", ACCEPTED)
_field("time_later", 44, "I", _between(300, 1 << 24), LEGAL, "", ACCEPTED)
_field(
    "transaction_id_set_back", 48, "Q", [0, 1, 2, 3, 4], WARN, "warning: transaction id .* is later", ACCEPTED
)
_field("transaction_id_large", 48, "Q", _bit(64, 10), LEGAL, "", ACCEPTED)

# ---- roots

_OUTSIDE = "fatal: pointer to block .* is outside"
_field("details_root_zero", DETAILS_ROOT, "Q", [0], REPAIR, _OUTSIDE, REFUSED)
_field("details_root_beyond", DETAILS_ROOT, "Q", _between(2048, U64), REPAIR, _OUTSIDE, REFUSED)
_field("mapping_root_zero", MAPPING_ROOT, "Q", [0], REPAIR, _OUTSIDE, REFUSED)
_field("mapping_root_beyond", MAPPING_ROOT, "Q", _between(2048, U64), REPAIR, _OUTSIDE, REFUSED)
_field("data_index_root_beyond", DATA_MAP + 16, "Q", _between(2048, U64), REPAIR, _OUTSIDE)
_field("data_overflow_root_beyond", DATA_MAP + 24, "Q", _between(2048, U64), REPAIR, _OUTSIDE)
_field("metadata_index_zero", METADATA_MAP + 16, "Q", [0], REPAIR, _OUTSIDE, REFUSED)
_field(
    "metadata_overflow_root_beyond", METADATA_MAP + 24, "Q", _between(2048, U64), REPAIR, _OUTSIDE, REFUSED
)


@damage(REPAIR, "fatal: in use as node of the details tree already", REFUSED)
def one_root_for_details_and_mappings(place: Place) -> None:
    place.put(0, MAPPING_ROOT, "Q", place.get(0, DETAILS_ROOT, "Q"))


@damage(REPAIR, "fatal: details tree.*: node", None, alone=False)
def roots_exchanged(place: Place) -> None:
    details, mapping = place.get(0, DETAILS_ROOT, "Q"), place.get(0, MAPPING_ROOT, "Q")
    place.put(0, MAPPING_ROOT, "Q", details)
    place.put(0, DETAILS_ROOT, "Q", mapping)


@damage(REPAIR, "fatal: in use as data bitmap already", REFUSED)
def bitmap_as_details_root(place: Place) -> None:
    place.put(0, DETAILS_ROOT, "Q", place.data_bitmap())


@damage(REPAIR, "fatal: details tree.*: node .*: value size", REFUSED, alone=False)
def mapping_leaf_as_details_root(place: Place) -> None:
    place.put(0, DETAILS_ROOT, "Q", place.own_leaf().block)


@damage(REPAIR, "fatal: data space map, overflow tree: node .* in use as metadata index block already")
def index_block_as_overflow_root(place: Place) -> None:
    place.put(0, DATA_MAP + 24, "Q", place.metadata_index())


# ---- the block as a whole


@damage(WARN, "warning: bytes behind the last field", ACCEPTED)
def stale_bytes_behind_superblock(place: Place) -> None:
    place.put(0, place.rng.randrange(364, 4092), "I", place.rng.randrange(1, U32))


@damage(LEGAL, "", ACCEPTED)
def stale_bytes_behind_space_map_roots(place: Place) -> None:
    for root in (DATA_MAP, METADATA_MAP):
        place.put(0, root + place.rng.randrange(32, 124), "I", place.rng.randrange(1, U32))


@damage(REPAIR, "fatal: superblock: checksum is", REFUSED, sealed=False)
def superblock_checksum(place: Place) -> None:
    place.put(0, 0, "I", place.get(0, 0, "I") ^ 1 << place.rng.randrange(32))


@damage(REPAIR, "fatal: superblock: checksum is", REFUSED, sealed=False, alone=False)
def superblock_bit_flip(place: Place) -> None:
    place.image.blocks[0, place.rng.randrange(64, 364)] ^= np.uint8(1 << place.rng.randrange(8))


@damage(REPAIR, "error: the first block is empty", REFUSED, sealed=False)
def superblock_zeroed(place: Place) -> None:
    place.image.blocks[0] = 0
    place.block_size = 65536


@damage(REPAIR, "error: not the metadata of a thin pool", REFUSED, sealed=False)
def superblock_overwritten(place: Place) -> None:
    place.image.blocks[0] = np.frombuffer(place.rng.randbytes(4096), np.uint8)
    place.block_size = 65536
