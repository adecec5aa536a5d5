"""Damage to devices and mappings, and what is odd about them but legal."""

from tests.thin_damage import (
    ACCEPTED,
    DETAILS_ROOT,
    Place,
    Verdict,
    damage,
)

__all__: list[str] = []

LEGAL, WARN, REPAIR, LOSS, REFUSE = Verdict
LATEST = (1 << 24) - 1

# ---- details


@damage(REPAIR, r"fatal: device \d+: mapped_blocks is \d+, the mapping tree has \d+", ACCEPTED)
def mapped_blocks_low(place: Place) -> None:
    block, at = place.details(place.device())
    place.put(block, at, "Q", place.rng.randrange(place.get(block, at, "Q")))


@damage(LOSS, r"fatal: device \d+: mapped_blocks is \d+, the mapping tree has \d+", ACCEPTED)
def mapped_blocks_high(place: Place) -> None:
    block, at = place.details(place.device())
    place.put(block, at, "Q", place.get(block, at, "Q") + place.rng.randrange(1, 1 << 40))


@damage(WARN, r"warning: transaction id \d+ is later", ACCEPTED)
def device_of_the_future(place: Place) -> None:
    block, at = place.details(place.device())
    place.put(block, at + 8, "Q", place.base.pool.transaction_id + place.rng.randrange(1, 1 << 40))


@damage(REPAIR, r"fatal: creation_time \d+ is later", ACCEPTED, alone=False)
def creation_time_ahead(place: Place) -> None:
    block, at = place.details(place.device())
    place.put(block, at + 16, "I", place.base.pool.time + place.rng.randrange(1, 1 << 31))


@damage(REPAIR, r"fatal: snapshotted_time \d+ is later than the pool", ACCEPTED)
def snapshotted_time_ahead(place: Place) -> None:
    block, at = place.details(place.device())
    place.put(block, at + 20, "I", place.base.pool.time + place.rng.randrange(1, 1 << 31))


@damage(REPAIR, r"fatal: creation_time \d+ is later than snapshotted_time \d+", ACCEPTED, alone=False)
def created_after_snapshot(place: Place) -> None:
    block, at = place.details(place.rng.randrange(1, len(place.base.roots)))
    place.put(block, at + 20, "I", place.rng.randrange(place.get(block, at + 16, "I")))


@damage(REPAIR, "fatal: look unshared", ACCEPTED, alone=False)
def shared_looks_unshared(place: Place) -> None:
    block, at = place.details(place.device())
    place.put(block, at + 16, "I", 0)
    place.put(block, at + 20, "I", 0)


@damage(LEGAL, "", ACCEPTED)
def snapshotted_time_raised(place: Place) -> None:
    # It costs needless copies, nothing else.
    block, at = place.details(place.device())
    place.put(block, at + 20, "I", place.base.pool.time)


@damage(LOSS, r"fatal: device \d+: it has details but no mapping tree", ACCEPTED, alone=False)
def details_of_another_id(place: Place) -> None:
    block, index = place.base.details[-1]
    place.put(block, 32 + 8 * index, "Q", place.rng.randrange(1000, 1 << 24))


@damage(REPAIR, r"fatal: device \d+: it has a mapping tree but no details")
def tree_without_details(place: Place) -> None:
    block, index = place.base.details[-1]
    place.put(block, 16, "I", index)


@damage(LOSS, r"fatal: device \d+: it has details but no mapping tree", None, alone=False)
def details_without_tree(place: Place) -> None:
    block, index = place.base.top_level[-1]
    place.put(block, 16, "I", index)


def _rename_last(place: Place, device_id: int) -> None:
    for block, index in (place.base.details[-1], place.base.top_level[-1]):
        place.put(block, 32 + 8 * index, "Q", device_id)


@damage(LOSS, r"fatal: device \d+: the id is larger", ACCEPTED)
def device_id_too_large(place: Place) -> None:
    place.forged.add(len(place.base.roots) - 1)
    _rename_last(place, place.rng.randrange(1 << 24, 1 << 64))


@damage(LEGAL, "", ACCEPTED)
def largest_device_id(place: Place) -> None:
    _rename_last(place, LATEST)
    place.forged.add(len(place.base.roots) - 1)


@damage(LEGAL, "", ACCEPTED, bases=["six", "scattered", "ten"])
def smallest_device_id(place: Place) -> None:
    for block, index in (place.base.details[0], place.base.top_level[0]):
        place.put(block, 32 + 8 * index, "Q", 0)
    place.forged.add(0)


# ---- roots of devices


@damage(LOSS, "fatal: pointer to block .* is outside", alone=False)
def device_root_beyond(place: Place) -> None:
    block, index = place.base.top_level[place.own_root()]
    place.put(block, place.image.value_offset(block, index), "Q", place.rng.randrange(1 << 13, 1 << 64))


@damage(LOSS, "fatal: in use as node of the details tree already", alone=False)
def device_root_in_the_details(place: Place) -> None:
    block, index = place.base.top_level[place.own_root()]
    place.put(block, place.image.value_offset(block, index), "Q", place.get(0, DETAILS_ROOT, "Q"))


@damage(REPAIR, "fatal: .*", alone=False)
def device_root_of_another(place: Place) -> None:
    # Sharing a root is what snapshots do: only times and counts tell.
    device = place.own_root()
    other = (device + place.rng.randrange(1, len(place.base.roots))) % len(place.base.roots)
    block, index = place.base.top_level[device]
    place.put(block, place.image.value_offset(block, index), "Q", place.base.roots[other])
    place.forged.add(device)


# ---- mappings


def _mapping(place: Place) -> tuple[int, int, int]:
    """Return a leaf of one device alone, the offset of one of its mappings, and the device."""
    leaf = place.own_leaf()
    return leaf.block, place.image.value_offset(leaf.block, place.entry(leaf.block)), leaf.device


@damage(LOSS, "fatal: 1 mapping names a data block beyond the pool", ACCEPTED, alone=False)
def mapping_beyond_the_data(place: Place) -> None:
    leaf, offset, _ = _mapping(place)
    place.put(leaf, offset, "Q", place.rng.randrange(1 << 20, 1 << 40) << 24)


@damage(LOSS, "fatal: mappings name data blocks beyond the pool", ACCEPTED, alone=False)
def many_mappings_beyond_the_data(place: Place) -> None:
    leaf = place.own_leaf().block
    for entry in range(0, place.entries(leaf), place.rng.randrange(1, 4)):
        place.put(
            leaf, place.image.value_offset(leaf, entry), "Q", place.rng.randrange(1 << 20, 1 << 40) << 24
        )


@damage(REPAIR, "fatal: 1 mapping is later than the pool's time", ACCEPTED, alone=False)
def mapping_of_the_future(place: Place) -> None:
    leaf, offset, _ = _mapping(place)
    time = place.rng.randrange(place.base.pool.time + 1, 1 << 24)
    place.put(leaf, offset, "Q", place.get(leaf, offset, "Q") & ~LATEST | time)


@damage(REPAIR, "fatal: mappings are later than the pool's time", ACCEPTED, alone=False)
def leaf_of_the_future(place: Place) -> None:
    leaf = place.own_leaf().block
    for entry in range(place.entries(leaf)):
        offset = place.image.value_offset(leaf, entry)
        place.put(leaf, offset, "Q", place.get(leaf, offset, "Q") & ~LATEST | LATEST)


@damage(REPAIR, r"fatal: data blocks? .*: count \d+, expected \d+", ACCEPTED, alone=False)
def mapping_to_another_block(place: Place) -> None:
    leaf, offset, device = _mapping(place)
    place.forged.add(device)
    while (other := place.image.value_offset(leaf, place.entry(leaf))) == offset:
        pass
    place.put(leaf, offset, "Q", place.get(leaf, other, "Q"))


@damage(REPAIR, r"fatal: data block \d+: count 0, expected 1", ACCEPTED, alone=False)
def mapping_to_a_free_block(place: Place) -> None:
    leaf, offset, device = _mapping(place)
    place.forged.add(device)
    free = place.entry_with(place.data_bitmap(), 0, place.base.pool.nr_data_blocks)
    place.put(leaf, offset, "Q", free << 24 | place.base.pool.time)


@damage(WARN, "warning: shares its data block with a mapping of other thin block or time", ACCEPTED)
def shared_block_at_two_times(place: Place) -> None:
    # A mapping of time 0 whose block others have in leaves of their own.
    bitmap = place.data_bitmap()
    while True:
        leaf, offset, device = _mapping(place)
        value = place.get(leaf, offset, "Q")
        shared = value & LATEST == 0 and place.raw(bitmap, value >> 24) in (1, 3)
        if shared and place.base.pool.devices[device].snapshotted_time > 1:
            break
    place.put(leaf, offset, "Q", value | 1)


@damage(REPAIR, "fatal: unshared", ACCEPTED, alone=False)
def shared_block_of_the_present(place: Place) -> None:
    # A shared block gets the time at which only unshared ones can have been written.
    bitmap = place.data_bitmap()
    while True:
        leaf, offset, _ = _mapping(place)
        if place.raw(bitmap, place.get(leaf, offset, "Q") >> 24) in (1, 3):
            break
    place.put(leaf, offset, "Q", place.get(leaf, offset, "Q") & ~LATEST | place.base.pool.time)
