"""Lines of tables and of status, as kernels old, present and to come print them."""

import dataclasses
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksnap.device_mapper import (
    DeviceNumber,
    FailedStatus,
    LinearTarget,
    OtherStatus,
    OtherTarget,
    PoolMode,
    SnapshotOriginTarget,
    SnapshotStatus,
    SnapshotTarget,
    Target,
    ThinPoolStatus,
    ThinPoolTarget,
    ThinStatus,
    ThinTarget,
)
from blocksnap.dm_target import SECTOR, parse_status, parse_target
from blocksnap.errors import ArgumentError, BlocksnapError, NotSupportedError

MIB = 1 << 20
DISK, OTHER = DeviceNumber(7, 0), DeviceNumber(254, 300)


def pool_status(text: str) -> ThinPoolStatus:
    status = parse_status(f"0 2048 thin-pool {text}")
    assert isinstance(status, ThinPoolStatus)
    return status


# Lines of a kernel 6.1, printed by dmsetup status.
FRESH = "0 112/1024 0/16384 - rw discard_passdown queue_if_no_space - 256 "
HELD = "1 117/1024 12/16384 75 rw no_discard_passdown queue_if_no_space - 256 "
FULL = "0 147/1024 4000/4000 - out_of_data_space ignore_discard error_if_no_space - 256 "
DAMAGED = "0 466/4096 6586/8000 - ro discard_passdown error_if_no_space needs_check 1024 "


def test_a_pool_status_has_every_field() -> None:
    assert pool_status(HELD) == ThinPoolStatus(
        transaction_id=1,
        used_metadata_blocks=117,
        total_metadata_blocks=1024,
        used_data_blocks=12,
        total_data_blocks=16384,
        held_root=75,
        mode=PoolMode.READ_WRITE,
        discard="no_discard_passdown",
        when_full="queue_if_no_space",
        needs_check=False,
        metadata_low_water_blocks=256,
    )
    assert (pool_status(HELD).free_data_blocks, pool_status(HELD).free_metadata_blocks) == (16372, 907)


@pytest.mark.parametrize(
    ("line", "mode", "needs_check"),
    [
        (FRESH, PoolMode.READ_WRITE, False),
        (FULL, PoolMode.OUT_OF_DATA_SPACE, False),
        (DAMAGED, PoolMode.READ_ONLY, True),
        (DAMAGED.replace(" ro ", " some_later_mode "), PoolMode.UNKNOWN, True),
    ],
)
def test_a_pool_is_in_one_of_its_modes(line: str, mode: PoolMode, needs_check: bool) -> None:
    status = pool_status(line)
    assert (status.mode, status.needs_check, status.held_root) == (mode, needs_check, None)


@pytest.mark.parametrize("word", ["Fail", "Error"])
def test_a_pool_or_a_device_that_failed_says_one_word(word: str) -> None:
    assert parse_status(f"0 2048 thin-pool {word}") == FailedStatus(word)
    assert parse_status(f"0 2048 thin {word}") == FailedStatus(word)


def test_an_older_kernel_leaves_the_tail_out() -> None:
    words = DAMAGED.split()
    whole = pool_status(DAMAGED)
    absent = {
        8: {"metadata_low_water_blocks": None},
        7: {"needs_check": False},
        6: {"when_full": ""},
        5: {"discard": ""},
        4: {"mode": PoolMode.UNKNOWN},
    }
    for count, fields in absent.items():
        whole = dataclasses.replace(whole, **fields)  # type: ignore[arg-type]
        assert pool_status(" ".join(words[:count])) == whole
    assert pool_status(" ".join(words[:3])) == whole


def test_what_a_later_kernel_adds_is_kept() -> None:
    assert pool_status(FRESH + "new 17").extra == ("new", "17")
    assert dataclasses.replace(pool_status(FRESH + "new 17"), extra=()) == pool_status(FRESH)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0 1/2",
        "x 1/2 3/4",
        "0 12 3/4",
        "0 1/ 3/4",
        "0 -1/2 3/4",
        "0 1/2 3/4 root rw",
        "+1 1/2 3/4",
        "1_0 1/2 3/4",
        "Fail Fail",
        "9" * 30 + " 1/2 3/4",
        "٣ 1/2 3/4",
    ],
)
def test_a_pool_status_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(NotSupportedError, match="is not understood"):
        pool_status(text)


@given(st.text(max_size=80))
def test_any_text_is_a_status_or_refused(text: str) -> None:
    for kind in ("thin-pool", "thin", "snapshot", "linear"):
        with suppress(BlocksnapError):
            parse_status(f"0 8 {kind} {text}")


@given(st.text(max_size=80))
def test_any_text_is_a_table_or_refused(text: str) -> None:
    for kind in ("thin-pool", "thin", "snapshot", "snapshot-origin", "linear", "flakey"):
        with suppress(BlocksnapError):
            parse_target(f"0 8 {kind} {text}")


def test_a_thin_status_is_in_bytes() -> None:
    assert parse_status("0 2048 thin 256 1151") == ThinStatus(256 * SECTOR, 1152 * SECTOR)
    assert parse_status("0 2048 thin 0 -") == ThinStatus(0, 0)
    assert parse_status("0 2048 thin -") == FailedStatus("-")


def test_a_classic_snapshot_counts_its_space_or_is_lost() -> None:
    assert parse_status("0 8 snapshot 32/8192 24") == SnapshotStatus(32 * 512, 8192 * 512, 24 * 512)
    for words in ("Invalid", "Overflow", "Merge failed"):
        assert parse_status(f"0 8 snapshot {words}") == FailedStatus(words)


def test_other_targets_keep_their_text() -> None:
    assert parse_status("0 8 linear ") == OtherStatus("")
    assert parse_target("0 8 flakey 7:0 0 1 1") == OtherTarget(8 * SECTOR, "flakey", "7:0 0 1 1")


TARGETS: list[Target] = [
    LinearTarget(MIB, DISK),
    LinearTarget(MIB, OTHER, 4096),
    ThinPoolTarget(MIB, DISK, OTHER, 64 << 10),
    ThinPoolTarget(MIB, DISK, OTHER, 1 << 30, 7, True, True, True, True, True),
    ThinTarget(MIB, OTHER, 0),
    ThinTarget(MIB, OTHER, (1 << 24) - 1, DISK),
    SnapshotTarget(MIB, DISK, OTHER),
    SnapshotTarget(MIB, DISK, OTHER, 64 << 10, False),
    SnapshotOriginTarget(MIB, DISK),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)
def test_a_target_is_what_its_line_says(target: Target) -> None:
    line = f"0 {target.length // SECTOR} {target.kind} {target.parameters()}"
    assert parse_target(line) == target
    assert parse_target(line + " ") == target


def test_a_pool_table_has_the_features_that_are_asked_for() -> None:
    target = ThinPoolTarget(MIB, DISK, OTHER, 64 << 10, 7, skip_block_zeroing=True, error_if_no_space=True)
    assert target.parameters() == "7:0 254:300 128 7 2 skip_block_zeroing error_if_no_space"


def test_a_persistent_snapshot_that_may_overflow_is_one() -> None:
    assert parse_target("0 8 snapshot 7:0 254:300 PO 8") == SnapshotTarget(8 * SECTOR, DISK, OTHER)


@pytest.mark.parametrize("length", [0, -512, 100, 513])
def test_a_length_is_whole_sectors(length: int) -> None:
    with pytest.raises(ArgumentError, match="length"):
        LinearTarget(length, DISK)


@pytest.mark.parametrize(
    "block_size", [512, 4096, 32 << 10, 96 << 10, (1 << 30) + (64 << 10), 0, -(64 << 10)]
)
def test_a_block_size_that_the_kernel_lacks_names_the_user_engine(block_size: int) -> None:
    with pytest.raises(NotSupportedError, match='open this pool with engine="user"'):
        ThinPoolTarget(MIB, DISK, OTHER, block_size)


def test_values_that_cannot_be_are_refused() -> None:
    for make in (
        lambda: ThinTarget(MIB, DISK, -1),
        lambda: ThinTarget(MIB, DISK, 1 << 24),
        lambda: ThinPoolTarget(MIB, DISK, OTHER, 64 << 10, -1),
        lambda: LinearTarget(MIB, DISK, 100).parameters(),
        lambda: DeviceNumber.of("/dev/null"),
        lambda: DeviceNumber.of("/dev/no-such-device"),
    ):
        with pytest.raises(ArgumentError):
            make()
