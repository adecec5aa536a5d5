"""`blocksnap compare` as people run it: a process, its streams and its exit status."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blocksnap import drivers, mount

MAIN = [sys.executable, "-c", "from blocksnap.cli import main; main()"]
SMALL = "touch-byte:large_file_bytes=1M,offset=0,small_files=5"

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/loop-control", os.W_OK), reason="needs root and loop devices"
)


def run(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*MAIN, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == status, done.stderr
    return done


def places_below(directory: Path) -> list[str]:
    mounts = [entry.target for entry in mount.mount_table() if str(directory) in entry.target]
    return mounts + [
        loop.backing_path for loop in mount.loop_devices() if str(directory) in loop.backing_path
    ]


@needs_root
def test_json_is_alone_on_stdout_and_has_the_fields_of_the_contract(tmp_path: Path) -> None:
    done = run(
        "compare", "--workload", SMALL, "--drivers", "overlay,volume", "--work-dir", tmp_path, "--json"
    )
    result = json.loads(done.stdout)
    assert {"machine", "workload", "results"} <= result.keys()
    assert [row["driver"] for row in result["results"]] == ["overlay", "volume"]
    for row in result["results"]:
        assert {
            "driver",
            "engine",
            "block_size",
            "application_bytes",
            "filesystem_bytes",
            "backing_bytes",
            "copy_bytes",
            "metadata_bytes",
            "allocated_bytes",
            "write_amplification",
            "space_amplification",
            "seconds",
            "operations",
            "latency",
        } <= row.keys()
        assert {"p50", "p99", "max"} <= row["latency"].keys()
        assert row["write_amplification"] == row["backing_bytes"] / row["application_bytes"]


@needs_root
@pytest.mark.skipif(
    "device-mapper" in Path("/proc/misc").read_text(), reason="needs a kernel without device-mapper"
)
def test_driver_that_the_kernel_lacks_is_left_out_with_its_reason(tmp_path: Path) -> None:
    words = ["--workload", SMALL, "--drivers", "devicemapper,dm-snapshot,volume", "--block-sizes", "4K,64K"]
    result = json.loads(run("compare", *words, "--work-dir", tmp_path, "--json").stdout)
    assert [row["driver"] for row in result["results"]] == ["volume"]
    left_out = {each["driver"]: each["reason"] for each in result["skipped"]}
    assert left_out.keys() == {"devicemapper", "dm-snapshot"}
    assert all("no device-mapper here" in reason for reason in left_out.values())


@needs_root
def test_table_and_verdict_go_to_stdout_and_the_files_to_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(
        "compare", "--workload", SMALL, "--drivers", "overlay,vfs", "--work-dir", tmp_path, "--out", out
    )
    assert "overlay" in done.stdout
    assert " wins: " in done.stdout
    names = {path.name for path in out.iterdir()}
    assert {"report.html", "results.csv", "results.json", "write-amplification.png", "latency.svg"} <= names
    assert all(name in done.stderr for name in names)


@needs_root
def test_several_workloads_repeats_and_snapshots_are_one_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    append = "append:large_file_bytes=1M,records=5,small_files=5"
    arguments = ["--workload", SMALL, "--workload", append, "--drivers", "overlay", "--json"]
    arguments += ["--repeat", "2", "--snapshots", "1"]
    done = run("compare", *arguments, "--work-dir", tmp_path, "--out", out)
    result = json.loads(done.stdout)
    assert [row["workload"] for row in result["results"]] == ["touch-byte", "append"]
    assert (result["repeats"], result["snapshots"]) == (2, 1)
    for row in result["results"]:
        names = [phase["phase"] for phase in row["phases"]]
        assert names == ["base image", "first epoch", "after snapshot 1"]
        assert len(row["runs"]) == 2
        assert row["spread"]["backing_bytes"]["max"] >= row["backing_bytes"]
    assert (out / "append-epochs.svg").exists()


@needs_root
def test_baseline_is_compared_with_and_a_result_is_shown_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("compare", "--workload", SMALL, "--drivers", "overlay", "--work-dir", tmp_path, "--out", out)
    stored = out / "results.json"
    again = tmp_path / "again"
    done = run("compare", "--results", stored, "--baseline", stored, "--out", again)
    assert "against the baseline" in done.stdout
    assert "+0%" in done.stdout
    assert "Against the baseline" in (again / "report.html").read_text()
    assert json.loads((again / "results.json").read_text()) == json.loads(stored.read_text())


@needs_root
def test_command_after_two_dashes_runs_in_the_container(tmp_path: Path) -> None:
    command = ["sh", "-c", "test -s {root}/database.sqlite && head -c 4096 /dev/zero >> {root}/large-file"]
    done = run("compare", "--drivers", "overlay", "--work-dir", tmp_path, "--json", "--", *command)
    result = json.loads(done.stdout)
    assert result["workload"]["command"] == command
    assert result["results"][0]["application_bytes"] == 4096
    assert result["results"][0]["copy_bytes"] == 64 << 20


@needs_root
def test_failing_command_is_told_and_ends_with_status_one(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo out of cheese >&2; exit 9"]
    done = run("compare", "--drivers", "overlay", "--work-dir", tmp_path, "--", *command, status=1)
    assert "overlay failed" in done.stdout
    assert "ended with status 9: out of cheese" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["compare", "--workload", "knitting"], 'no workload "knitting"'),
        (["compare", "--workload", "patch:stride=0"], "at least 1"),
        (["compare", "--drivers", "floppy"], 'no driver "floppy"'),
        (["compare", "--drivers", ""], "nothing to compare"),
        (["compare", "--block-sizes", "4Q"], "is not a size"),
        (
            ["compare", "--drivers", "devicemapper", "--block-sizes", "4K,16K"],
            "devicemapper cannot have blocks of 4K, 16K: leave --block-sizes out",
        ),
        (["compare", "--workload", "append", "--", "true"], "exclude each other"),
        (["compare", "--workload", "append", "--workload", "append:records=1"], "given twice"),
        (["compare", "--repeat", "0"], "--repeat"),
        (["compare", "--baseline", "/nonexistent.json"], "/nonexistent.json: No such file"),
        (["compare", "--results", "/dev/null"], "/dev/null: not JSON"),
        (["compare", "--workload", "fio"], "fio:job=PATH"),
        (["compare", "--no-such-option"], "No such option"),
        (["no-such-verb"], "No such command"),
    ],
)
def test_wrong_usage_is_one_line_and_status_two(arguments: list[str], complaint: str) -> None:
    done = run(*arguments, status=2)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("blocksnap: ")
    assert complaint in line


def test_work_directory_that_cannot_be_is_one_line_and_status_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("compare", "--drivers", "vfs", "--work-dir", tmp_path / "file" / "below", status=1)
    (line,) = done.stderr.splitlines()
    assert line == f"blocksnap: {tmp_path}/file/below: Not a directory"


def test_debug_shows_the_traceback_before_the_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = ["--debug", "compare", "--drivers", "vfs", "--work-dir", str(tmp_path / "file" / "below")]
    lines = run(*arguments, status=1).stderr.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("blocksnap: ")


def test_no_verb_prints_help_and_is_wrong_usage() -> None:
    assert "compare" in run(status=2).stdout
    assert "compare" in run("--help").stdout


def test_version_is_printed() -> None:
    assert run("--version").stdout.startswith("blocksnap ")


def test_closed_pipe_ends_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*MAIN, "doctor"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1


def interrupted(arguments: list[str], started: Path, number: int) -> tuple[str, str, int]:
    """Send a signal to a comparison once a path is there; return what it prints and its status."""
    process = subprocess.Popen(
        [*MAIN, "compare", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert places_below(started.parent) != []
    os.killpg(process.pid, number)  # as a terminal does: every process of the group gets it
    out, complaint = process.communicate(timeout=60)
    return out, complaint, process.returncode


@needs_root
@pytest.mark.parametrize("driver", ["overlay", "thin"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_leaves_nothing_behind(tmp_path: Path, driver: str, number: int, status: int) -> None:
    if (reason := dict(drivers.available(tmp_path)).get(driver)) is not None:
        pytest.skip(f"needs the driver {driver}: {reason}")
    started = tmp_path / "started"
    command = ["sh", "-c", f"touch {started}; sleep 1000"]
    arguments = ["--drivers", driver, "--work-dir", str(tmp_path), "--", *command]
    assert interrupted(arguments, started, number) == ("", "", status)
    assert places_below(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["started"]


@needs_root
def test_interrupted_it_reports_what_was_measured_before(tmp_path: Path) -> None:
    ran, again = tmp_path / "ran", tmp_path / "again"
    command = ["sh", "-c", f"test -e {ran} && touch {again} && sleep 1000; touch {ran}; echo > {{root}}/new"]
    drivers = ["--drivers", "vfs,overlay", "--work-dir", str(tmp_path)]
    out, complaint, status = interrupted(["--json", *drivers, "--", *command], again, signal.SIGINT)
    assert (status, complaint) == (130, "")
    study = json.loads(out)
    assert [(row["driver"], row["error"]) for row in study["results"]] == [("vfs", None)]
    assert study["skipped"] == [{"driver": "overlay", "reason": "interrupted before it"}]
    assert places_below(tmp_path) == []
