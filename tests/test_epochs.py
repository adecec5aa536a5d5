"""Epochs and repeats, measured for real: what snapshots cost, and several runs as one row."""

import dataclasses
import os
from pathlib import Path

import pytest

from blocksnap import drivers
from blocksnap.amplification.measure import compare
from blocksnap.amplification.result import Comparison, Measurement, Target
from blocksnap.amplification.targets import targets_for
from blocksnap.amplification.workloads import from_command, parse_workload

MIB = 1 << 20

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/loop-control", os.W_OK), reason="needs root and loop devices"
)
needs_thin = pytest.mark.skipif(
    dict(drivers.available("/var/tmp")).get("thin", "not registered") is not None,
    reason="needs the driver thin",
)


def by_driver(comparison: Comparison) -> dict[str, Measurement]:
    for row in comparison.results:
        assert row.error is None, f"{row.label}: {row.error}"
    return {row.target.driver: row for row in comparison.results}


@needs_root
def test_epochs_sum_to_the_row_and_a_snapshot_makes_the_file_copied_again(tmp_path: Path) -> None:
    workload = parse_workload("touch-byte:large_file_bytes=8M,offset=1M,small_files=50")
    targets = targets_for(["overlay", "volume"], [])
    rows = by_driver(compare(workload, targets, snapshots=2, work_dir=tmp_path))
    overlay, volume = rows["overlay"], rows["volume"]
    names = ["base image", "first epoch", "after snapshot 1", "after snapshot 2"]
    assert [phase.name for phase in overlay.phases] == names
    assert [phase.copy_bytes for phase in overlay.epochs] == [8 * MIB] * 3
    assert overlay.backing_bytes == sum(phase.backing_bytes or 0 for phase in overlay.epochs)
    assert overlay.copy_bytes == 24 * MIB
    assert (overlay.application_bytes, overlay.changed_bytes, overlay.operations) == (3, 3, 3)
    assert (overlay.phases[0].backing_bytes or 0) > 8 * MIB
    assert overlay.phases[0].application_bytes is None
    assert volume.copy_bytes == 0
    assert (volume.backing_bytes or 0) < MIB


@needs_root
@needs_thin
def test_snapshot_makes_thin_break_sharing_again(tmp_path: Path) -> None:
    workload = parse_workload("touch-byte:large_file_bytes=8M,offset=1M,small_files=50")
    comparison = compare(workload, [Target("thin", 65536)], snapshots=2, work_dir=tmp_path)
    row = by_driver(comparison)["thin"]
    copied = [phase.copy_bytes or 0 for phase in row.epochs]
    assert all(65536 <= each < MIB for each in copied)
    for phase in row.epochs:
        assert phase.parts is not None
        assert sum(phase.parts.values()) == phase.backing_bytes
    assert row.parts is not None
    assert sum(row.parts.values()) == row.backing_bytes


@needs_root
def test_repeats_give_the_row_of_the_median_run_and_the_spread(tmp_path: Path) -> None:
    workload = parse_workload("sqlite:database_bytes=2M,transactions=5,small_files=50")
    comparison = compare(workload, targets_for(["overlay", "volume"], []), repeats=3, work_dir=tmp_path)
    row = by_driver(comparison)["overlay"]
    assert comparison.repeats == len(row.runs) == 3
    written = sorted(run.backing_bytes or 0 for run in row.runs)
    assert row.backing_bytes == written[1]
    assert row.spread is not None
    assert (row.spread["backing_bytes"].min, row.spread["backing_bytes"].max) == (written[0], written[2])
    assert row.seconds == sorted(run.seconds or 0 for run in row.runs)[1]


@needs_root
def test_run_that_fails_ends_the_repeats_of_its_target(tmp_path: Path) -> None:
    once, work_dir = tmp_path / "once", tmp_path / "work"
    work = from_command(("sh", "-c", f"test ! -e {once} && touch {once} && echo new > {{root}}/file"))
    base = dataclasses.replace(work.base, database_bytes=MIB, large_file_bytes=MIB, small_files=10)
    workload = dataclasses.replace(work, base=base)
    (row,) = compare(workload, [Target("volume")], repeats=3, work_dir=work_dir).results
    assert row.error is not None
    assert row.error.startswith("run 2: command")
