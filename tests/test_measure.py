"""Real measurements, small: real file systems on real loop devices, and nothing left of them."""

import dataclasses
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap import drivers, mount
from blocksnap.amplification.interrupts import deferred_interrupts
from blocksnap.amplification.measure import compare, targets_for
from blocksnap.amplification.result import Comparison, Measurement, Target
from blocksnap.amplification.testbed import (
    Testbed,
    check_space,
    clear_below,
    open_testbed,
    owner_is_alive,
    work_directory,
)
from blocksnap.amplification.workload import Workload
from blocksnap.amplification.workloads import from_command, parse_workload
from blocksnap.errors import ArgumentError, NoSpaceError

MIB = 1 << 20
SMALL = "small_files=50"

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/loop-control", os.W_OK), reason="needs root and loop devices"
)
needs_thin = pytest.mark.skipif(
    dict(drivers.available("/var/tmp")).get("thin", "not registered") is not None,
    reason="needs the driver thin",
)


def small(text: str) -> Workload:
    return parse_workload(f"{text}{',' if ':' in text else ':'}{SMALL}")


def command(*words: str) -> Workload:
    workload = from_command(words)
    base = dataclasses.replace(workload.base, database_bytes=MIB, large_file_bytes=MIB, small_files=10)
    return dataclasses.replace(workload, base=base)


def by_driver(comparison: Comparison) -> dict[str, Measurement]:
    for row in comparison.results:
        assert row.error is None, f"{row.label}: {row.error}"
    return {row.target.driver: row for row in comparison.results}


def places_below(directory: Path) -> list[str]:
    mounts = [entry.target for entry in mount.mount_table() if str(directory) in entry.target]
    return mounts + [
        loop.backing_path for loop in mount.loop_devices() if str(directory) in loop.backing_path
    ]


@pytest.fixture(name="work_dir")
def clean_work_dir(tmp_path: Path) -> Iterator[Path]:
    """A work directory that must be as empty afterwards as it was before."""
    directory = tmp_path / "work"
    directory.mkdir()
    yield directory
    assert places_below(directory) == []
    assert list(directory.iterdir()) == []


@needs_root
def test_changing_one_byte_costs_overlay_and_vfs_the_whole_file_and_a_volume_a_few_blocks(
    work_dir: Path,
) -> None:
    workload = small("touch-byte:large_file_bytes=16M,offset=1M")
    rows = by_driver(compare(workload, targets_for(["overlay", "vfs", "volume"], []), work_dir=work_dir))
    overlay, vfs, volume = (rows[name] for name in ("overlay", "vfs", "volume"))
    assert overlay.application_bytes == 1
    assert overlay.backing_bytes is not None
    assert overlay.backing_bytes >= 16 * MIB
    assert overlay.copy_bytes == 16 * MIB
    assert vfs.copy_bytes == 16 * MIB + 50 * 4096
    assert vfs.backing_bytes is not None
    assert vfs.backing_bytes >= vfs.copy_bytes
    assert volume.backing_bytes is not None
    assert 0 < volume.backing_bytes < MIB
    assert volume.copy_bytes == 0


@needs_root
def test_every_figure_of_a_measured_row_is_there_or_null_for_a_reason(work_dir: Path) -> None:
    workload = small("sqlite:database_bytes=2M,transactions=5")
    row = by_driver(compare(workload, [Target("overlay")], work_dir=work_dir))["overlay"].as_dict()
    assert {name for name, value in row.items() if value is None} == {
        "engine",
        "block_size",
        "filesystem_bytes",
        "metadata_bytes",
        "parts",
        "spread",
        "error",
    }
    assert row["operations"] == 10
    assert row["allocated_bytes_source"] == "driver"
    assert row["changed_bytes_source"] == "application_bytes"


@needs_root
def test_tree_that_is_copied_when_the_container_is_created_counts(work_dir: Path) -> None:
    workload = small("touch-small:database_bytes=8M")
    rows = by_driver(compare(workload, targets_for(["vfs", "volume"], []), work_dir=work_dir))
    vfs, volume = rows["vfs"].backing_bytes, rows["volume"].backing_bytes
    assert vfs is not None
    assert volume is not None
    assert vfs - volume >= 8 * MIB


@needs_root
def test_failing_command_is_a_row_with_an_error_and_the_others_go_on(work_dir: Path) -> None:
    workload = command(
        "sh", "-c", "case {root} in */merged) exit 7;; esac; echo new > {root}/file; sync {root}/file"
    )
    comparison = compare(workload, targets_for(["overlay", "vfs"], []), work_dir=work_dir)
    overlay, vfs = comparison.results
    assert overlay.error is not None
    assert "ended with status 7" in overlay.error
    assert overlay.backing_bytes is None
    assert vfs.error is None
    assert vfs.backing_bytes is not None
    assert (vfs.operations, vfs.latency) == (None, None)
    assert vfs.application_bytes == 4


@needs_root
def test_process_that_holds_the_container_does_not_keep_it_mounted(work_dir: Path) -> None:
    workload = command("sh", "-c", "cd {root} && exec 3>held && sleep 1000 >/dev/null 2>&1 &")
    comparison = compare(workload, targets_for(["overlay"], []), work_dir=work_dir)
    assert comparison.results[0].error is None


@needs_root
def test_mount_namespace_that_was_copied_meanwhile_costs_no_result(tmp_path: Path) -> None:
    workload = command("sh", "-c", "setsid unshare --mount sleep 8 >/dev/null 2>&1 & sleep 0.5")
    comparison = compare(workload, [Target("overlay")], work_dir=tmp_path)
    assert comparison.results[0].error is None
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 20
    while places_below(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert places_below(tmp_path) == []


@needs_root
def test_progress_tells_the_phases_of_each_target_in_order(work_dir: Path) -> None:
    said: list[tuple[str, str]] = []
    compare(
        small("touch-byte:large_file_bytes=1M,offset=0"),
        [Target("volume")],
        work_dir=work_dir,
        progress=lambda target, phase: said.append((target.label, phase)),
    )
    phases = ["file system", "base image", "container", "workload", "sync"]
    assert said == [("volume", phase) for phase in phases]


@needs_root
def test_kept_backing_files_hold_a_sound_file_system(tmp_path: Path) -> None:
    workload = small("touch-byte:large_file_bytes=1M,offset=0")
    comparison = compare(workload, [Target("overlay")], work_dir=tmp_path, keep=True)
    (directory,) = tmp_path.iterdir()
    assert comparison.kept == str(directory)
    assert places_below(tmp_path) == []
    checked = subprocess.run(
        ["/usr/sbin/e2fsck", "-fn", str(directory / "overlay.ext4")], capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


@needs_root
def test_interrupt_while_the_workload_runs_leaves_nothing_mounted(work_dir: Path) -> None:
    workload = command("sh", "-c", f"kill -INT {os.getpid()}; sleep 1000")
    with pytest.raises(KeyboardInterrupt):
        compare(workload, [Target("overlay")], work_dir=work_dir)


@needs_root
@needs_thin
@pytest.mark.parametrize("block_size", [4096, 65536, MIB])
def test_parts_of_thin_sum_to_the_counter_of_the_device_and_are_all_there(
    work_dir: Path, block_size: int
) -> None:
    workload = small("touch-byte:large_file_bytes=16M,offset=1M")
    row = by_driver(compare(workload, [Target("thin", block_size)], work_dir=work_dir))["thin"]
    assert row.parts is not None
    assert row.backing_bytes is not None
    assert sum(row.parts.values()) == row.backing_bytes
    assert row.parts["pool_metadata"] > 0
    assert 0 <= row.parts["outside"] < row.backing_bytes
    assert row.engine == "user"


@needs_root
@needs_thin
def test_changing_one_byte_costs_thin_under_a_mebibyte(work_dir: Path) -> None:
    workload = small("touch-byte:large_file_bytes=64M,offset=32M")
    row = by_driver(compare(workload, [Target("thin", 65536)], work_dir=work_dir))["thin"]
    assert row.backing_bytes is not None
    assert row.backing_bytes < MIB


@pytest.fixture(name="public_dir")
def directory_for_everybody() -> Iterator[Path]:
    """A work directory that every user reaches, as those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="blocksnap-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        work_dir = directory / "work"
        work_dir.mkdir()
        work_dir.chmod(0o777)
        yield work_dir
        assert places_below(directory) == []
        assert list(work_dir.iterdir()) == []


def run_without_root(work_dir: Path, drivers: str) -> list[str]:
    """Compare as the user nobody, with a /dev/fuse that is open to all; return what was printed."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    # Search and read rights alone, so that the interpreter is found wherever it lies.
    rights = "-all,+dac_read_search"
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    as_nobody += [f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    script = [*as_nobody, sys.executable, "-c", _WITHOUT_ROOT, str(work_dir), drivers]
    node = work_dir.parent / "fuse"
    os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(10, 229))
    node.chmod(0o666)
    opened = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /dev/fuse; exec "$@"', str(node), *script]
    done = subprocess.run(opened, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_vfs_is_measured_without_root_in_a_plain_directory(public_dir: Path) -> None:
    assert run_without_root(public_dir, "overlay,vfs,volume") == [
        "vfs None None True None",
        "overlay needs root",
        "volume needs root to bind-mount a directory",
    ]


@needs_thin
@pytest.mark.skipif(shutil.which("fuse2fs") is None, reason="needs fuse2fs")
def test_thin_is_measured_without_root_by_the_counters_of_its_pool(public_dir: Path) -> None:
    assert run_without_root(public_dir, "thin") == ["thin 64K None None True pool counters"]


_WITHOUT_ROOT = """
import sys
from pathlib import Path
from blocksnap.amplification.measure import compare, targets_for
from blocksnap.amplification.workloads import parse_workload
workload = parse_workload("touch-byte:large_file_bytes=1M,offset=0,small_files=5")
targets = targets_for(sys.argv[2].split(","), [65536])
comparison = compare(workload, targets, work_dir=Path(sys.argv[1]))
for row in comparison.results:
    print(row.label, row.error, row.backing_bytes, (row.copy_bytes or 0) > 0, row.write_amplification_source)
for skipped in comparison.skipped:
    print(skipped.driver, skipped.reason)
"""


def test_targets_are_one_a_driver_and_one_a_block_size_for_thin() -> None:
    targets = targets_for(["overlay", "overlay", "volume"], [4096, 65536])
    assert targets == [Target("overlay"), Target("volume")]


@needs_thin
def test_targets_of_thin_are_one_a_block_size() -> None:
    assert [target.label for target in targets_for(["thin"], [4096, 4096, MIB])] == ["thin 4K", "thin 1M"]


def test_unknown_drivers_and_nothing_at_all_are_refused() -> None:
    with pytest.raises(ArgumentError, match="no driver"):
        targets_for(["floppy"], [4096])
    with pytest.raises(ArgumentError, match="nothing to compare"):
        targets_for([], [4096])


def test_too_little_space_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError, match=r"choose another --work-dir"):
        check_space(tmp_path, 1 << 60)


# ---- testbed ----------------------------------------------------------------


@contextmanager
def fresh_testbed(work_dir: Path) -> Iterator[Testbed]:
    with work_directory(work_dir) as directory, open_testbed(directory, "b", 64 * MIB, on_loop=True) as bed:
        yield bed


@needs_root
def test_counter_of_a_settled_testbed_stands_still_and_moves_with_a_write(work_dir: Path) -> None:
    with fresh_testbed(work_dir) as bed:
        bed.settle()
        before, used = bed.written_bytes(), bed.used_bytes()
        bed.settle()
        assert bed.written_bytes() == before
        (bed.root / "file").write_bytes(bytes(3 * MIB))
        bed.settle()
        assert before is not None
        assert used is not None
        assert (bed.written_bytes() or 0) - before >= 3 * MIB
        assert (bed.used_bytes() or 0) - used == 3 * MIB


@needs_root
def test_testbed_is_cleared_although_something_is_mounted_in_it_and_in_use(work_dir: Path) -> None:
    with fresh_testbed(work_dir) as bed:
        source, target = bed.root / "source", bed.root / "target"
        source.mkdir()
        target.mkdir()
        mount.mount(source, target, bind=True)
        nested = bed.root / "nested"
        nested.write_bytes(bytes(MIB))
        mount.LoopDevice.attach(nested)


@needs_root
def test_busy_mount_is_unmounted_lazily_after_the_timeout(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    mount.mount(source, target, bind=True)
    with (target / "open").open("w"):
        clear_below(tmp_path, timeout=0.2)
    assert places_below(tmp_path) == []


def test_testbed_without_a_loop_device_has_no_figures() -> None:
    bed = Testbed(Path("/"), None)
    assert (bed.written_bytes(), bed.used_bytes()) == (None, None)


def test_work_directory_is_owned_while_its_process_lives(tmp_path: Path) -> None:
    with work_directory(tmp_path) as directory:
        assert owner_is_alive(directory)
    assert not directory.exists()
    assert not owner_is_alive(directory)


# ---- interrupts ----------------------------------------------------------------


@pytest.fixture(name="default_handlers")
def default_interrupt_handler() -> Iterator[Callable[[], object]]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield lambda: signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("default_handlers")
def test_signal_is_held_back_until_the_block_ends() -> None:
    steps = []

    def work() -> None:
        with deferred_interrupts() as interrupts:
            signal.raise_signal(signal.SIGTERM)
            steps.append(list(interrupts.received))

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == [[signal.SIGTERM]]


@pytest.mark.usefixtures("default_handlers")
def test_check_raises_once_a_signal_has_arrived() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_interrupts() as interrupts:  # noqa: PT012 - both raise
        interrupts.check()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_handlers_are_as_they_were_after_the_block(default_handlers: Callable[[], object]) -> None:
    before = default_handlers()
    with deferred_interrupts():
        assert default_handlers() != before
    assert default_handlers() == before
