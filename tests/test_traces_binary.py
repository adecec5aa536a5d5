"""Binary traces: blktrace, vscsi, SRT and parquet there and back, in both byte orders."""

import struct
import tempfile
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap.errors import TraceError
from blocksnap.traces import DISCARD, FLUSH, READ, WRITE
from tests.trace_files import Row, blktrace_event, read, vscsi

polars = pytest.importorskip("polars", reason="needs polars: pip install 'blocksnap[traces]'")

SECTOR = 512
PREFLUSH, NOTE, ISSUE = 1 << 18, 1 << 26, 7


def rows_of(kinds: list[int], unit: int = 1) -> st.SearchStrategy[list[Row]]:
    row = st.tuples(
        st.integers(0, 2**60 // unit).map(lambda time: time * unit),
        st.integers(0, 2**50).map(lambda sector: sector * SECTOR),
        st.integers(1, 2**22).map(lambda sectors: sectors * SECTOR),
        st.sampled_from(kinds),
        st.integers(0, 2**32 - 1),
    )
    return st.lists(row, min_size=1, max_size=30).map(lambda rows: sorted(rows, key=lambda row: row[0]))


def read_bytes(data: bytes) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace"
        path.write_bytes(data)
        found: list[Row] = read(path).tolist()
    return found


@settings(max_examples=60, deadline=None)
@given(rows=rows_of([READ, WRITE, DISCARD, FLUSH]), order=st.sampled_from("<>"), pdu=st.binary(max_size=20))
def test_blktrace_there_and_back(rows: list[Row], order: str, pdu: bytes) -> None:
    found = read_bytes(b"".join(blktrace_event(row, order=order, pdu=pdu) for row in rows))
    assert found == [(t, 0, 0, k, d) if k == FLUSH else (t, o, n, k, d) for t, o, n, k, d in rows]


@settings(max_examples=60, deadline=None)
@given(rows=rows_of([READ, WRITE], unit=1000), order=st.sampled_from("<>"), version=st.sampled_from([1, 2]))
def test_vscsi_there_and_back(rows: list[Row], order: str, version: int) -> None:
    rows = [(t % 2**63, o, min(n, 2**31), k, 0) for t, o, n, k, _ in rows]
    assert read_bytes(vscsi(rows, order=order, version=version)) == rows


def test_notes_and_other_events_of_blktrace_are_no_requests(tmp_path: Path) -> None:
    row = (7, 4096, 512, WRITE, 0)
    note = blktrace_event(row, flags=NOTE, action=0, pdu=b"sh\0\0")
    (tmp_path / "trace").write_bytes(note + blktrace_event(row) + blktrace_event(row, action=ISSUE))
    assert read(tmp_path / "trace").tolist() == [row]
    assert read(tmp_path / "trace", event="issue").tolist() == [row]
    assert len(read(tmp_path / "trace", event="complete")) == 0


def test_write_with_a_preflush_is_a_flush_and_a_write() -> None:
    row = (7, 4096, 512, WRITE, 3)
    assert read_bytes(blktrace_event(row, flags=PREFLUSH)) == [(7, 0, 0, FLUSH, 3), row]


def test_other_version_of_blktrace_is_refused() -> None:
    event = b"\x06" + blktrace_event((7, 4096, 512, WRITE, 3))[1:]
    with pytest.raises(TraceError, match="record 1: has version 6 of the format; 7 can be read"):
        read_bytes(event)


def srt(rows: list[Row]) -> bytes:
    header = b"$$TR_IOREC-1.3\nsectorsize  = 256,\n\f"
    return header + b"".join(
        struct.pack(
            ">14I",
            56,
            4 << 16 | 1,
            t // 10**9,
            t % 10**9 // 1000,
            0,
            0,
            n,
            o // 256,
            d << 8,
            4,
            0,
            1 - k,
            0,
            1,
        )
        for t, o, n, k, d in rows
    )


def test_srt_has_times_in_microseconds_and_the_sectors_of_its_header() -> None:
    rows = [(1_500_000_000 + k * 1000, k * 256, 2048, k % 2, k % 3) for k in range(20)]
    assert read_bytes(srt(rows)) == rows


@settings(max_examples=20, deadline=None)
@given(rows=rows_of([READ, WRITE, DISCARD]))
def test_parquet_there_and_back(rows: list[Row]) -> None:
    names = ["time_ns", "offset", "length", "op", "device"]
    words = {READ: "read", WRITE: "W", DISCARD: "trim"}
    table = polars.DataFrame([(t, o, n, words[k], d) for t, o, n, k, d in rows], schema=names, orient="row")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.parquet"
        table.write_parquet(path)
        assert read(path).tolist() == rows


def test_parquet_takes_dates_sectors_and_names_of_devices(tmp_path: Path) -> None:
    begin = datetime(2026, 11, 24)
    table = polars.DataFrame(
        {
            "timestamp": [begin + timedelta(microseconds=k) for k in range(3)],
            "lba": [8, 16, 24],
            "nsectors": [1, 2, 3],
            "is_write": [True, False, True],
            "disk": ["sdb", "sda", "sdb"],
        }
    )
    table.write_parquet(tmp_path / "trace")
    requests = read(tmp_path / "trace")
    assert requests["time"].tolist() == [1795478400000000000 + 1000 * k for k in range(3)]
    assert requests["offset"].tolist() == [4096, 8192, 12288]
    assert requests["length"].tolist() == [512, 1024, 1536]
    assert requests["kind"].tolist() == [WRITE, READ, WRITE]
    assert requests["device"][0] == requests["device"][2] != requests["device"][1]


def test_parquet_rows_that_cannot_be_are_left_out_and_counted(tmp_path: Path) -> None:
    from blocksnap.traces import Trace

    table = polars.DataFrame(
        {"time_ns": [1, 2, 0, 4], "offset": [0, -5, 0, 4096], "length": [512] * 4, "op": ["w", "w", "w", "w"]}
    )
    table.write_parquet(tmp_path / "trace")
    with pytest.raises(TraceError, match="record 2: its offset is missing, negative or absurd"):
        read(tmp_path / "trace")
    with Trace([tmp_path / "trace"], keep_going=True) as trace:
        assert [len(batch) for batch in trace] == [2]
        assert trace.complaints.records == 2
