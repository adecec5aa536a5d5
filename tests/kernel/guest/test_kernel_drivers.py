"""The drivers of the kernel beside all others in a comparison; pools of the kernel on the command line."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blocksnap import mount
from blocksnap.amplification.result import DEFAULT_DRIVERS
from blocksnap.device_mapper import Control
from tests.kernel.devices import sweep
from tests.pool_servers import command, run_command

SMALL = "touch-byte:large_file_bytes=2M,offset=0,small_files=5"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    with Control.open() as control:
        assert sweep(control) == []
    assert [loop.path for loop in mount.loop_devices(below=tmp_path)] == []
    assert [entry.target for entry in mount.mount_table() if entry.target.startswith(str(tmp_path))] == []


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a comparison of every driver that can run here, at all block sizes."""
    work_dir = tmp_path_factory.mktemp("compare")
    wanted = [*DEFAULT_DRIVERS, "devicemapper", "dm-snapshot"]
    words = ["compare", "--workload", SMALL, "--drivers", ",".join(wanted)]
    words += ["--block-sizes", "4K,64K,256K,1M", "--work-dir", str(work_dir), "--json"]
    done = subprocess.run(command(*words), capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    found: list[dict[str, Any]] = told["results"]
    assert [(row["driver"], row["error"]) for row in found if row["error"] is not None] == []
    assert [
        each for each in told["skipped"] if each["driver"] in wanted and "apt" not in each["reason"]
    ] == []
    return found


def of(rows: list[dict[str, Any]], driver: str) -> dict[int | None, dict[str, Any]]:
    """Return the rows of a driver by block size."""
    return {row["block_size"]: row for row in rows if row["driver"] == driver}


# ---- compare


@pytest.mark.timeout(600)
def test_compare_has_the_drivers_of_the_kernel_beside_all_others(rows: list[dict[str, Any]]) -> None:
    assert set(of(rows, "devicemapper")) == {64 << 10, 256 << 10, MIB}
    assert set(of(rows, "dm-snapshot")) == {4096}
    others = {"thin", "overlay", "btrfs", "vfs", "xfs-reflink", "volume"}
    assert others <= {row["driver"] for row in rows}
    assert [row for row in rows if row["backing_bytes"] is None] == []


def test_parts_of_devicemapper_sum_to_what_reached_the_disk(rows: list[dict[str, Any]]) -> None:
    for block_size, row in of(rows, "devicemapper").items():
        parts = row["parts"]
        assert row["engine"] == "kernel"
        assert sum(parts.values()) == row["backing_bytes"]
        assert parts["data"] == row["filesystem_bytes"] > 0
        assert parts["copied"] == row["copy_bytes"] > 0
        assert block_size is not None
        assert parts["copied"] % block_size == 0
        assert parts["pool_metadata"] > 0
        assert parts["outside"] >= 0


def test_kernel_and_user_engine_copy_alike(rows: list[dict[str, Any]]) -> None:
    """The user engine does not count of a block what the request itself covers."""
    for block_size, row in of(rows, "devicemapper").items():
        other = of(rows, "thin")[block_size]
        assert row["copy_bytes"] / 4 <= other["copy_bytes"] <= row["copy_bytes"]


def test_classic_snapshots_copy_nothing_of_what_is_written_in_whole_chunks(
    rows: list[dict[str, Any]],
) -> None:
    row = of(rows, "dm-snapshot")[4096]
    assert (row["copy_bytes"], row["engine"]) == (0, "kernel")
    assert row["metadata_bytes"] > 0
    assert row["filesystem_bytes"] < row["allocated_bytes"] + row["metadata_bytes"]
    assert 0 <= row["parts"]["outside"] < row["backing_bytes"]


# ---- the command line


def test_a_pool_of_the_kernel_is_used_on_the_command_line(tmp_path: Path) -> None:
    pool, target = tmp_path / "pool", tmp_path / "mounted"
    target.mkdir()
    kernel = ("--engine", "kernel")
    run_command("pool", "create", pool, "--size", "256M", *kernel)
    made = json.loads(run_command("device", "create", pool, "base", "--size", "128M", "--json", *kernel))
    assert made["name"] == "base"
    words = ("device", "mount", pool, "base", target, "--mkfs", "ext4", "--json")
    mounted = json.loads(run_command(*words, *kernel))
    assert (mounted["loop"], mounted["target"]) == (None, str(target))
    assert mounted["node"].startswith("/dev/dm-")
    (target / "file").write_text("content")
    run_command("device", "snapshot", pool, "base", "snap")
    status = json.loads(run_command("pool", "status", pool, "--json"))
    assert (status["engine"], status["devices"]) == ("kernel", 2)
    assert status["server"]["mounts"][0]["node"] == mounted["node"]
    listed = json.loads(run_command("device", "list", pool, "--json", *kernel))
    assert [device["name"] for device in listed] == ["base", "snap"]
    other = run_command("device", "list", pool, "--engine", "user", status=1)
    assert f'process {status["server"]["pid"]} with the engine "kernel", not "user"' in other
    run_command("device", "umount", pool, "base")
    assert json.loads(run_command("pool", "status", pool, "--json", *kernel))["engine"] == "kernel"
    run_command("device", "mount", pool, "snap", target)  # now by the user engine
    assert (target / "file").read_text() == "content"
    run_command("device", "umount", pool, "snap")


def test_an_unknown_engine_is_wrong_usage(tmp_path: Path) -> None:
    error = run_command("pool", "create", tmp_path / "pool", "--size", "1M", "--engine", "steam", status=2)
    assert '"steam" is no engine' in error
