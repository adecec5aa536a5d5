"""Text traces: each format there and back, columns by name, and fio's logs by fio itself."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap.errors import TraceError
from blocksnap.traces import DISCARD, FLUSH, READ, WRITE, Trace
from tests.trace_files import TEXTS, Row, read

SECTOR = 512
WITHOUT_DEVICE = {"libcachesim"}

needs_fio = pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio (Debian package fio)")


@st.composite
def rows_of(draw: st.DrawFn, name: str) -> list[Row]:
    """Draw requests that a format can tell."""
    _, unit, kinds = TEXTS[name]
    count = draw(st.integers(1, 30))
    times = sorted(draw(st.lists(st.integers(0, 10**18 // unit), min_size=count, max_size=count)))
    if name == "msr":
        times = [10**15 + time for time in times]
    rows = []
    for time in times:
        kind = draw(st.sampled_from(kinds))
        offset, length = draw(st.integers(0, 2**50)) * SECTOR, draw(st.integers(1, 2**22)) * SECTOR
        device = 0 if name in WITHOUT_DEVICE else draw(st.integers(0, 4095))
        rows.append((time * unit, offset, length, kind, device))
    return rows


@pytest.mark.parametrize("name", TEXTS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_written_in_a_format_is_read_from_it(name: str, data: st.DataObject) -> None:
    rows = data.draw(rows_of(name))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace"
        path.write_bytes(TEXTS[name][0](rows))
        found = read(path, format=name).tolist()
    assert [row[3] for row in found] == [row[3] for row in rows]
    for one, other in zip(found, rows, strict=True):
        assert one[0] == other[0]
        assert one[4] == other[4]
        assert other[3] == FLUSH or one[1:3] == other[1:3]


@pytest.mark.parametrize("name", sorted(set(TEXTS) - {"csv"}))
def test_format_is_told_from_the_content(name: str, tmp_path: Path) -> None:
    device = 0 if name in WITHOUT_DEVICE else 3
    rows = [(10**17 + k * 10**9, k * 8192, 4096, k % 2, device) for k in range(10)]
    (tmp_path / "trace").write_bytes(TEXTS[name][0](rows))
    assert read(tmp_path / "trace").tolist() == rows


def trace(directory: Path, text: str) -> Path:
    path = directory / "trace"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "header", ["timestamp,offset,size,op", "Time_s\tSector\tNSectors\tRW", '"ts";"lba";"sectors";"is_write"']
)
def test_columns_are_known_by_their_names_and_units(header: str, tmp_path: Path) -> None:
    separator = next(mark for mark in ",\t;" if mark in header)
    in_bytes = "offset" in header
    line = separator.join(
        ["1.5", "4096" if in_bytes else "8", "512" if in_bytes else "1", "1" if ";" in header else "w"]
    )
    requests = read(trace(tmp_path, f"{header}\n{line}\n"))
    assert requests.tolist() == [(1_500_000_000, 4096, 512, WRITE, 0)]


def test_columns_option_names_the_columns_of_a_table_without_header(tmp_path: Path) -> None:
    path = trace(tmp_path, "17,sdb,W,8,2\n18,sda,R,16,1\n")
    requests = read(path, columns="time_ms,device,op,sector,sectors")
    assert requests.tolist() == [(17_000_000, 4096, 1024, WRITE, 0), (18_000_000, 8192, 512, READ, 1)]


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = trace(tmp_path, "time,offset,latency,op\n1,2,3,w\n")
    with pytest.raises(
        TraceError, match=r'no column holds the length: name one "length" or "sectors".*latency'
    ):
        read(path)


def test_comments_blank_lines_and_a_lacking_newline_are_no_harm(tmp_path: Path) -> None:
    path = trace(tmp_path, "# by hand\n\n0,W,4096,512,10\n   \n0,R,4096,512,11")
    assert read(path)["kind"].tolist() == [WRITE, READ]


def test_hosts_tell_disks_of_one_number_apart(tmp_path: Path) -> None:
    lines = [
        f"12816637200306162{k},{host},{disk},Write,0,512,1\n"
        for k, (host, disk) in enumerate([("hm", 0), ("web", 0), ("hm", 1), ("web", 2)])
    ]
    assert read(trace(tmp_path, "".join(lines)))["device"].tolist() == [0, 1 << 16, 1, (1 << 16) + 2]


def test_names_of_devices_mean_the_same_in_all_files(tmp_path: Path) -> None:
    for number, letters in enumerate(["ab", "ba", "cb"]):
        lines = [f"{k + number} /dev/sd{name} write 0 4096" for k, name in enumerate(letters)]
        (tmp_path / str(number)).write_text("\n".join(["fio version 3 iolog", *lines, ""]))
    with Trace(sorted(tmp_path.iterdir())) as trace_:
        devices = [int(device) for batch in trace_ for device in batch["device"]]
        names = list(trace_.names)
    assert [names[device][-1] for device in devices] == ["a", "b", "b", "a", "c", "b"]


def test_files_without_times_follow_one_another(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / str(number)).write_text("".join(f"{number}, {k}, 512\n" for k in range(100)))
    assert read(*sorted(tmp_path.iterdir()))["kind"].tolist() == [READ] * 100 + [WRITE] * 100


def test_iolog_2_takes_its_times_from_waits(tmp_path: Path) -> None:
    actions = ["add", "open", "write 0 4096", "wait 250", "sync 0 0", "trim 8192 4096", "close"]
    text = "\n".join(["fio version 2 iolog", *[f"/dev/sda {action}" for action in actions], ""])
    assert read(trace(tmp_path, text)).tolist() == [
        (0, 0, 4096, WRITE, 0),
        (250_000, 0, 0, FLUSH, 0),
        (250_000, 8192, 4096, DISCARD, 0),
    ]


def test_iolog_1_has_no_times(tmp_path: Path) -> None:
    assert read(trace(tmp_path, "0, 4096, 512\n1, 8192, 1024\n")).tolist() == [
        (0, 4096, 512, READ, 0),
        (0, 8192, 1024, WRITE, 0),
    ]


def fio(*arguments: str) -> dict[str, dict[str, int]]:
    """Run a job and return its figures by direction."""
    done = subprocess.run(
        ["fio", "--name=job", "--output-format=json", *arguments], capture_output=True, text=True, check=True
    )
    job: dict[str, dict[str, int]] = json.loads(done.stdout)["jobs"][0]
    return job


@needs_fio
def test_log_that_fio_writes_holds_what_fio_says_it_did(tmp_path: Path) -> None:
    files = f"--filename={tmp_path}/a:{tmp_path}/b"
    log = tmp_path / "log"
    job = fio(
        files,
        "--size=8m",
        "--rw=randrw",
        "--bsrange=4k-64k",
        "--fsync=8",
        "--number_ios=300",
        f"--write_iolog={log}",
    )
    requests = read(log)
    for kind, direction in ((READ, "read"), (WRITE, "write")):
        chosen = requests[requests["kind"] == kind]
        assert len(chosen) == job[direction]["total_ios"]
        assert int(chosen["length"].sum()) == job[direction]["io_bytes"]
    assert (requests["kind"] == FLUSH).any()
    assert set(requests["device"].tolist()) == {0, 1}


@needs_fio
def test_fio_replays_from_a_log_of_version_2_what_is_read_from_it(tmp_path: Path) -> None:
    target, log = tmp_path / "disk", tmp_path / "log"
    target.write_bytes(bytes(1 << 20))
    lines = [f"{target} {'write' if k % 3 else 'read'} {k * 8192} 4096" for k in range(100)]
    log.write_text(
        "\n".join(["fio version 2 iolog", f"{target} add", f"{target} open", *lines, f"{target} close", ""])
    )
    job = fio(f"--read_iolog={log}", "--ioengine=psync")
    requests = read(log)
    assert int((requests["kind"] == READ).sum()) == job["read"]["total_ios"]
    assert int(requests["length"][requests["kind"] == WRITE].sum()) == job["write"]["io_bytes"]
