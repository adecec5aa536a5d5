"""`blocksnap analyze` as people run it: a process, its streams, its exit status and its files."""

import csv
import gzip
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blocksnap.traces import DISCARD, WRITE
from tests.trace_files import CARRIED, TEXTS, Row, blktrace_event, vscsi

MAIN = [sys.executable, "-c", "from blocksnap.cli import main; main()"]
ROWS = [(k * 10**9, k * 4096, 4096, WRITE, 0) for k in range(64)]

CONTRACT = {
    "block_size",
    "snapshot_every",
    "blocks_written",
    "blocks_copied",
    "copy_bytes",
    "write_amplification",
    "space_bytes",
}


def run(
    *arguments: str | Path, status: int = 0, data: bytes | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*MAIN, "analyze", *map(str, arguments)], capture_output=True, input=data, check=False, timeout=120
    )
    assert done.returncode == status, done.stderr
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def analyze(*arguments: str | Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return result


def trace(directory: Path, rows: list[Row] = ROWS) -> Path:
    path = directory / "trace"
    path.write_bytes(TEXTS["alibaba"][0](rows))
    return path


def test_json_has_the_fields_of_the_contract_for_eleven_block_sizes() -> None:
    result = analyze(CARRIED / "sqlite-wal.blktrace.xz", "--snapshot-every", "100")
    assert {"requests", "writes", "written_bytes"} <= result["trace"].keys()
    assert result["trace"]["writes"] == 1045
    assert [row["block_size"] for row in result["results"]] == [4096 << step for step in range(11)]
    for row in result["results"]:
        assert row.keys() >= CONTRACT
        assert row["copy_bytes"] == row["blocks_copied"] * row["block_size"]
        written = result["trace"]["written_bytes"]
        assert row["write_amplification"] == (row["copy_bytes"] + written) / written


def test_aligned_writes_to_a_shared_device_copy_only_larger_blocks(tmp_path: Path) -> None:
    result = analyze(trace(tmp_path), "--block-sizes", "4K,64K")
    small, large = result["results"]
    assert (small["blocks_written"], small["blocks_copied"], small["space_bytes"]) == (64, 0, 64 * 4096)
    assert (large["blocks_written"], large["blocks_copied"], large["copy_bytes"]) == (4, 4, 4 * 65536)
    assert large["write_amplification"] == 2.0


def test_fresh_devices_provision_instead_of_copying(tmp_path: Path) -> None:
    (row,) = analyze(trace(tmp_path), "--block-sizes", "64K", "--fresh")["results"]
    assert (row["blocks_written"], row["blocks_copied"], row["blocks_provisioned"]) == (4, 0, 4)


@pytest.mark.parametrize(("every", "snapshots"), [("16", 4), ("16s", 3), ("64K", 4)])
def test_snapshots_come_by_writes_seconds_and_bytes(every: str, snapshots: int, tmp_path: Path) -> None:
    result = analyze(trace(tmp_path), "--snapshot-every", every)
    assert result["trace"]["snapshots"] == snapshots


def test_snapshots_by_time_need_times(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("1, 0, 4096\n1, 4096, 4096\n")
    done = run(tmp_path / "trace", "--snapshot-every", "60s", status=2)
    assert "has no times" in done.stderr


def test_only_one_device_is_analysed(tmp_path: Path) -> None:
    rows = [(t, o, n, k, number % 3) for number, (t, o, n, k, _) in enumerate(ROWS)]
    result = analyze(trace(tmp_path, rows), "--device", "1")
    assert result["trace"]["writes"] == 21
    assert [each["device"] for each in result["trace"]["devices"]] == [1]


def test_table_and_advice_go_to_stdout_and_the_files_to_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(CARRIED / "sqlite-wal.blktrace.xz", "--snapshot-every", "100", "--out", out)
    assert "block" in done.stdout
    assert "blocks cost least" in done.stdout
    assert "M/s" in done.stderr
    names = {path.name for path in out.iterdir()}
    assert names >= {"results.json", "results.csv", "epochs.csv", "analysis.png", "analysis.svg"}
    assert (out / "analysis.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())["results"]
    with (out / "results.csv").open() as file:
        assert [int(row["copy_bytes"]) for row in csv.DictReader(file)] == [
            row["copy_bytes"] for row in results
        ]
    with (out / "epochs.csv").open() as file:
        epochs = list(csv.DictReader(file))
    for row in results:
        own = [each for each in epochs if int(each["block_size"]) == row["block_size"]]
        for name in ("space_bytes", "copy_bytes", "metadata_bytes"):
            assert sum(int(each[name]) for each in own) == row[name]


def test_epochs_are_told_in_the_table_and_in_json(tmp_path: Path) -> None:
    assert "per epoch" in run(trace(tmp_path), "--snapshot-every", "16").stdout
    assert "per epoch" not in run(trace(tmp_path)).stdout
    result = analyze(trace(tmp_path), "--snapshot-every", "16", "--block-sizes", "64K")
    (epochs,) = result["epochs"]
    assert epochs["records"] == result["trace"]["snapshots"] + 1
    assert epochs["copy_bytes"]["max"] <= result["results"][0]["copy_bytes"]


def test_files_have_parquet_too_where_polars_is(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars", reason="needs polars: pip install 'blocksnap[traces]'")
    run(trace(tmp_path), "--out", tmp_path / "out")
    assert polars.read_parquet(tmp_path / "out" / "results.parquet").height == 11


def test_prices_decide_the_advice(tmp_path: Path) -> None:
    path = trace(tmp_path)
    assert analyze(path, "--prices", "1:1:0")["advice"]["block_size"] == 4096
    assert analyze(path, "--prices", "0:0:1")["advice"]["block_size"] > 4096
    assert "not three numbers" in run(path, "--prices", "cheap", status=2).stderr


def test_trace_without_writes_has_no_amplification_and_no_advice(tmp_path: Path) -> None:
    result = analyze(trace(tmp_path, [(1000, 0, 4096, 0, 0)]))
    assert result["results"][0]["write_amplification"] is None
    assert result["advice"] is None


def test_standard_input_is_read_as_a_stream() -> None:
    data = gzip.compress(b"".join(map(blktrace_event, ROWS)))
    assert json.loads(run("-", "--json", data=data).stdout)["trace"]["writes"] == 64


def test_processors_of_one_trace_are_merged(tmp_path: Path) -> None:
    paths = [tmp_path / f"sda.blktrace.{number}" for number in range(2)]
    for number, path in enumerate(paths):
        path.write_bytes(b"".join(map(blktrace_event, ROWS[number::2])))
    result = analyze(*paths, "--snapshot-every", "16s")
    assert result["trace"]["writes"] == 64
    assert result["trace"]["snapshots"] == 3


def test_bad_record_is_one_line_and_nothing_on_stdout(tmp_path: Path) -> None:
    path = trace(tmp_path)
    path.write_bytes(path.read_bytes() + b"0,W,-4096,4096,99000000\n")
    done = run(path, status=1)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f'blocksnap: {path}: record 65: line 65: offset "-4096" is negative')


def test_keep_going_reports_what_was_read_and_how_much_was_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(vscsi(ROWS)[:-10])
    assert "record 64: the file ends within it" in run(path, status=1).stderr
    done = run(path, "--keep-going", "--json")
    result = json.loads(done.stdout)
    assert result["trace"]["writes"] == 63
    assert result["trace"]["left_out"]["records"] == 1
    assert "1 record was left out; not read to the end" in done.stderr


def test_missing_file_and_wrong_usage_are_told(tmp_path: Path) -> None:
    assert "No such file" in run(tmp_path / "none", status=1).stderr
    assert "unknown" in run(trace(tmp_path), "--format", "foo", status=2).stderr
    assert "not a size" in run(trace(tmp_path), "--block-sizes", "x", status=2).stderr
    assert "give writes" in run(trace(tmp_path), "--snapshot-every", "often", status=2).stderr
    assert "unknown" in run(trace(tmp_path), "--event", "sleep", status=2).stderr


def test_discards_of_a_fresh_device_free_its_space(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    rows = [*ROWS, (99 * 10**9, 0, 1 << 20, DISCARD, 0)]
    path.write_bytes(b"".join(map(blktrace_event, rows)))
    (row,) = analyze(path, "--fresh", "--block-sizes", "4K")["results"]
    assert row["space_bytes"] == 0


def test_progress_shows_in_a_terminal() -> None:
    ours, theirs = pty.openpty()
    try:
        command = [*MAIN, "analyze", str(CARRIED / "cloudPhysicsIO.csv.zst"), "--json"]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=theirs, check=True, timeout=120)
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:
                break
    finally:
        os.close(ours)
    assert b"requests, " in shown
    assert b"M/s" in shown
