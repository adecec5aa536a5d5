"""What can be compared by name: drivers, drivers on another file system, pairs with names of their own."""

import os
from pathlib import Path

import pytest

from blocksnap import mount
from blocksnap.amplification.measure import compare
from blocksnap.amplification.result import (
    BASELINES,
    DEFAULT_BLOCK_SIZES,
    DEFAULT_DRIVERS,
    Measurement,
    Target,
)
from blocksnap.amplification.targets import setting_of, targets_for
from blocksnap.amplification.testbed import KINDS, missing_for, open_testbed, work_directory
from blocksnap.amplification.workloads import parse_workload
from blocksnap.errors import ArgumentError

MIB = 1 << 20

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/loop-control", os.W_OK), reason="needs root and loop devices"
)


def test_defaults_are_all_that_can_be_measured_side_by_side() -> None:
    labels = [target.label for target in targets_for(DEFAULT_DRIVERS, DEFAULT_BLOCK_SIZES)]
    thin = [f"thin {size}" for size in ("4K", "16K", "64K", "256K", "1M")]
    assert labels == [*thin, "overlay", "unionfs", "btrfs", "vfs", "xfs-reflink", "qcow2 64K", *BASELINES]


def test_driver_is_measured_on_the_file_system_that_it_wants_or_that_is_named() -> None:
    found = [setting_of(name) for name in ("overlay", "btrfs", "overlay@xfs", "volume@btrfs", "xfs-reflink")]
    assert [(one.driver, one.file_system) for one in found] == [
        ("overlay", "ext4"),
        ("btrfs", "btrfs"),
        ("overlay", "xfs"),
        ("volume", "btrfs"),
        ("vfs", "xfs"),
    ]


def test_unknown_file_systems_and_drivers_are_refused() -> None:
    with pytest.raises(ArgumentError, match='no testbed on "fat": take ext4, xfs, btrfs'):
        targets_for(["overlay@fat"], [])
    with pytest.raises(ArgumentError, match=r'no driver "floppy".*beside .* xfs-reflink and volume'):
        targets_for(["floppy@xfs"], [])


@pytest.mark.parametrize("driver", ["thin", "devicemapper"])
def test_block_sizes_that_no_pool_can_have_are_refused_before_anything_is_measured(driver: str) -> None:
    with pytest.raises(ArgumentError, match="a block size of 5120 bytes: 4K, 8K"):
        targets_for([driver], [65536, 5120])


def test_testbed_of_its_own_wants_loop_devices() -> None:
    assert setting_of("vfs").missing(on_loop=False) is None
    for name in ("xfs-reflink", "volume@btrfs", "overlay@xfs"):
        assert "needs root" in str(setting_of(name).missing(on_loop=False))


def measured(work_dir: Path, *names: str) -> dict[str, Measurement]:
    workload = parse_workload("touch-byte:large_file_bytes=8M,offset=1M,small_files=20")
    comparison = compare(workload, targets_for(names, [65536]), work_dir=work_dir)
    for row in comparison.results:
        assert row.error is None, f"{row.label}: {row.error}"
    return {row.target.driver: row for row in comparison.results}


@needs_root
def test_every_default_is_measured_by_the_counter_of_its_device_or_skipped_with_a_reason(
    tmp_path: Path,
) -> None:
    rows = measured(tmp_path, *DEFAULT_DRIVERS)
    assert {row.label for row in rows.values() if not row.backing_bytes} == set()
    whole = {name for name, row in rows.items() if row.copy_bytes is not None and row.copy_bytes >= 8 * MIB}
    assert whole == rows.keys() & {"overlay", "unionfs", "vfs"}
    small = {name for name, row in rows.items() if (row.backing_bytes or 0) < 6 * MIB}
    assert small == rows.keys() - whole


@needs_root
@pytest.mark.parametrize("kind", KINDS)
def test_counter_of_each_kind_of_testbed_stands_still_and_moves_with_a_write(
    tmp_path: Path, kind: str
) -> None:
    if reason := missing_for(kind):
        pytest.skip(f"{kind}: {reason}")
    with (
        work_directory(tmp_path) as directory,
        open_testbed(directory, "bed", 512 * MIB, on_loop=True, file_system=kind) as bed,
    ):
        bed.settle()
        before = bed.written_bytes() or 0
        bed.settle()
        assert bed.written_bytes() == before
        (bed.root / "file").write_bytes(os.urandom(3 * MIB))
        bed.settle()
        assert 3 * MIB <= (bed.written_bytes() or 0) - before < 5 * MIB
        assert os.listdir(bed.root) == ["file"]
    assert [entry for entry in mount.mount_table() if str(tmp_path) in entry.target] == []


def test_target_keeps_the_name_that_was_asked_for() -> None:
    assert Target("overlay@xfs").label == "overlay@xfs"
