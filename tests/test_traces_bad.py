"""Bad input: cut, damaged, absurd; the file, the record and the reason, and what was before."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from blocksnap.errors import TraceError
from blocksnap.traces import DISCARD, WRITE, Trace
from tests.trace_files import TEXTS, Row, blktrace_event, read, vscsi

ROWS = [(k * 1000, k * 8192, 4096, k % 2, 0) for k in range(12)]


def keep_going(path: Path) -> tuple[list[Row], int]:
    """Return the requests that can be read and how many records were left out."""
    with Trace([path], keep_going=True) as trace:
        rows = [row for batch in trace for row in batch.tolist()]
        return rows, trace.complaints.records


BINARY: dict[str, tuple[list[bytes], str]] = {
    "blktrace": ([blktrace_event(row, pdu=b"x" * (k % 5)) for k, row in enumerate(ROWS)], "blktrace"),
    "vscsi 1": ([vscsi([row]) for row in ROWS], "vscsi"),
    "vscsi 2": ([vscsi([row], version=2) for row in ROWS], "vscsi"),
}


@pytest.mark.parametrize("name", BINARY)
def test_binary_trace_cut_at_any_byte_gives_the_whole_records_before(name: str, tmp_path: Path) -> None:
    records, _ = BINARY[name]
    data, path = b"".join(records), tmp_path / "trace"
    ends = [sum(map(len, records[: k + 1])) for k in range(len(records))]
    for cut in range(ends[0], len(data) + 1):
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        if cut in ends:
            assert read(path).tolist() == ROWS[:whole]
            continue
        with pytest.raises(TraceError, match=f"trace: record {whole + 1}: the file ends within it"):
            read(path)
        assert keep_going(path) == (ROWS[:whole], 1)


@pytest.mark.parametrize("name", TEXTS)
def test_text_trace_cut_at_any_byte_never_gives_what_was_not_written(name: str, tmp_path: Path) -> None:
    write = TEXTS[name][0]
    rows = [(10**17 + k * 10**9, k * 8192, 8192, k % 2, 0) for k in range(6)]
    data, path = write(rows), tmp_path / "trace"
    for cut in range(len(write(rows[:1])), len(data)):
        path.write_bytes(data[:cut])
        found, _ = keep_going(path)
        places = [row[1:] for row in found]
        assert places == [row[1:] for row in rows[: len(found)]], data[:cut]
        assert len(found) >= data[:cut].count(b"\n") - data.count(b"\n") + len(rows)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("name", COMPRESS)
def test_compressed_trace_cut_at_any_byte_is_told_and_gives_what_was_before(
    name: str, tmp_path: Path
) -> None:
    rows = [(k * 1000, k * 4096 * (k % 7), 4096, k % 2, 0) for k in range(40)]
    packed, path = COMPRESS[name](b"".join(map(blktrace_event, rows))), tmp_path / "trace"
    for cut in range(20, len(packed), 3):
        path.write_bytes(packed[:cut])
        with pytest.raises(TraceError, match=f"trace: .*{name} data end early"):
            read(path, format="blktrace")
        with Trace([path], format="blktrace", keep_going=True) as trace:
            found = [row for batch in trace for row in batch.tolist()]
            assert trace.complaints.records == 1
        assert found == rows[: len(found)]


def test_long_compressed_text_that_ends_early_gives_almost_all_of_it(tmp_path: Path) -> None:
    rows = [(k * 1000, k * 4096, 4096, WRITE, 0) for k in range(100_000)]
    for name, compress in COMPRESS.items():
        packed, path = compress(TEXTS["alibaba"][0](rows)), tmp_path / name
        path.write_bytes(packed[: len(packed) * 9 // 10])
        found, left_out = keep_going(path)
        assert left_out == 1
        assert found == rows[: len(found)]
        assert name in ("bz2", "xz", "zstd") or len(found) > 50_000


def test_damaged_compressed_trace_is_told(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(TEXTS["alibaba"][0](ROWS * 50)))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "trace").write_bytes(packed)
    with pytest.raises(TraceError, match=r"trace: record \d+: the gzip data are damaged"):
        read(tmp_path / "trace", format="alibaba", sort=True)


def test_damage_in_the_middle_of_blktrace_ends_it_there(tmp_path: Path) -> None:
    events = [blktrace_event(row) for row in ROWS]
    events[5] = bytes(48)
    (tmp_path / "trace").write_bytes(b"".join(events))
    with pytest.raises(TraceError, match="record 6: has magic 0x00000000 instead of 0x65617407"):
        read(tmp_path / "trace")
    with Trace([tmp_path / "trace"], keep_going=True) as trace:
        assert [row for batch in trace for row in batch.tolist()] == ROWS[:5]
        assert trace.complaints.unread == [str(tmp_path / "trace")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0,W,-4096,512,5", 'offset "-4096" is negative'),
        ("0,W,9223372036854775807,512,5", "is absurd: no device has 2\\^63 bytes"),
        ("0,W,99999999999999999999999,512,5", "is absurd: beyond 64 bits of bytes"),
        ("0,W,4096,4294967296,5", 'length "4294967296" is absurd: no request has 4 GiB'),
        ("0,W,4096,-1,5", 'length "-1" is negative'),
        ("0,W,4096,12x,5", 'length "12x" is not a whole number'),
        ("0,W,4096,,5", 'length "" is not a whole number'),
        ("0,X,4096,512,5", 'operation "X" is unknown'),
        ("0,W,4096", "has 3 fields, needs 5: cut, or of another format"),
        ("0,W,4096,512,-5", 'time "-5" is negative'),
        ("0,W,4096,512,noon", 'time "noon" is not a number'),
        ("0,W,4096,512,99999999999999999999", "is absurd: beyond 64 bits of nanoseconds"),
        ("\x01\x02,W,4096,512,1\x7f", 'time "1\\?" is not a number'),
    ],
)
def test_bad_line_is_named_with_its_reason_and_left_out(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    good = "".join(f"0,W,{k * 512},512,4\n" for k in range(10))
    path.write_text(f"{good}{line}\n0,W,0,512,9\n")
    with pytest.raises(TraceError, match=f"trace: record 11: line 11: .*{reason}") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    rows, left_out = keep_going(path)
    assert len(rows) == 11
    assert left_out == 1


def test_absurd_records_of_vscsi_are_left_out(tmp_path: Path) -> None:
    rows = list(ROWS)
    rows[4] = (4000, 2**63 + 2**40, 4096, 1, 0)
    (tmp_path / "trace").write_bytes(vscsi(rows))
    with pytest.raises(TraceError, match=r"record 5: sector \d+ is absurd"):
        read(tmp_path / "trace")
    assert keep_going(tmp_path / "trace") == ([*rows[:4], *rows[5:]], 1)


def test_line_that_never_ends_is_told(tmp_path: Path) -> None:
    (tmp_path / "trace").write_bytes(b"0,W,0,512,1\n" * 70 + b"0" * (9 << 20))
    with pytest.raises(TraceError, match="record 71: does not end within 4 MiB"):
        read(tmp_path / "trace")


def test_discard_may_be_as_long_as_a_device(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("op,offset,length\ndiscard,0,1099511627776\n")
    assert read(tmp_path / "trace").tolist() == [(0, 0, 1 << 40, DISCARD, 0)]
