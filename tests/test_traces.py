"""Traces that others recorded, and what is known of them; formats, compression and order."""

import bz2
import gzip
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

from blocksnap.errors import ArgumentError, NotSupportedError, TraceError
from blocksnap.traces import DISCARD, FLUSH, READ, WRITE, Requests, Trace
from tests.trace_files import CARRIED, TEXTS, blktrace_event, read, vscsi

# Requests queued by applications, as blkparse 1.2.0 counts them ("Q" lines by their letters), bytes written:
# xz -dc NAME.blkparse.txt.xz | awk '$6 == "Q"'. A write with a preflush (FWFSM) is a flush and a write here.
RECORDED = {
    "sqlite-wal": {"reads": 147, "writes": 970 + 75, "discards": 74, "flushes": 444, "mib": 24},
    "sqlite-delete": {"reads": 147, "writes": 7047 + 519, "discards": 825, "flushes": 1244, "mib": 51},
    "pgbench": {"reads": 105, "writes": 25394 + 316, "discards": 347, "flushes": 20600, "mib": 489},
    "layers": {"reads": 75, "writes": 13034 + 8, "discards": 586, "flushes": 35, "mib": 327},
}


def counts(requests: Requests) -> dict[str, int]:
    kinds = np.bincount(requests["kind"], minlength=4)
    written = int(requests["length"][requests["kind"] == WRITE].sum())
    return {
        "reads": int(kinds[READ]),
        "writes": int(kinds[WRITE]),
        "discards": int(kinds[DISCARD]),
        "flushes": int(kinds[FLUSH]),
        "mib": round(written / 2**20),
    }


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_blktrace_has_the_requests_that_blkparse_counts(name: str) -> None:
    assert counts(read(CARRIED / f"{name}.blktrace.xz")) == RECORDED[name]


@pytest.mark.parametrize("name", ["sqlite-wal", "layers"])
def test_blkparse_text_holds_the_same_requests_as_the_binary_it_was_made_of(name: str) -> None:
    binary, text = read(CARRIED / f"{name}.blktrace.xz"), read(CARRIED / f"{name}.blkparse.txt.xz")
    assert counts(text) == RECORDED[name]
    binary["time"] -= binary["time"][0]
    assert (binary == text).all()


def test_vscsi_and_csv_of_cloudphysics_hold_the_same_requests() -> None:
    binary, text = read(CARRIED / "cloudPhysicsIO.vscsi.xz"), read(CARRIED / "cloudPhysicsIO.csv.zst")
    assert len(text) == 113_872
    assert counts(text) == {"reads": 46_974, "writes": 66_898, "discards": 0, "flushes": 0, "mib": 2297}
    for field in ("offset", "length", "kind"):
        assert (binary[field] == text[field]).all()


def test_tpcc_fragment_has_its_requests_and_devices() -> None:
    requests = read(CARRIED / "tpcc-small.trace.zst")
    assert len(requests) == 6_999
    assert counts(requests)["writes"] == 2_618
    assert len(np.unique(requests["device"])) == 16
    assert round(int(requests["length"][requests["kind"] == READ].sum()) / 2**20, 1) == 34.6


SMALL = TEXTS["alibaba"][0]([(k * 1000, k * 4096, 4096, k % 2, 0) for k in range(50_000)])


@pytest.mark.parametrize(
    "compress",
    [gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor().compress],
    ids=["gzip", "bz2", "xz", "zstd"],
)
def test_compressed_trace_reads_like_a_plain_one(tmp_path: Path, compress: object) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.write_bytes(SMALL)
    packed.write_bytes(compress(SMALL[:300_000]) + compress(SMALL[300_000:]))  # type: ignore[operator]
    assert (read(packed) == read(plain)).all()


def test_trace_is_read_from_standard_input() -> None:
    program = "from blocksnap.traces import Trace; print(sum(map(len, Trace(['-']))))"
    done = subprocess.run(
        [sys.executable, "-c", program], input=gzip.compress(SMALL), capture_output=True, check=True
    )
    assert done.stdout == b"50000\n"


def test_files_of_several_processors_are_merged_by_time(tmp_path: Path) -> None:
    rows = [(k * 7 % 1000 + k, k * 4096, 4096, WRITE, 0) for k in range(1000)]
    rows.sort()
    for processor in range(3):
        (tmp_path / f"sda.blktrace.{processor}").write_bytes(
            b"".join(map(blktrace_event, rows[processor::3]))
        )
    merged = read(*sorted(tmp_path.iterdir()))
    assert sorted(merged.tolist()) == rows
    assert (np.diff(merged["time"].astype(np.int64)) >= 0).all()


def test_pieces_of_several_processors_in_one_file_are_sorted(tmp_path: Path) -> None:
    rows = [(k, k * 4096, 4096, WRITE, 0) for k in range(1000)]
    (tmp_path / "trace").write_bytes(b"".join(map(blktrace_event, [*rows[500:], *rows[:500]])))
    assert read(tmp_path / "trace").tolist() == rows


def test_times_that_go_back_are_an_error_unless_they_are_to_be_sorted(tmp_path: Path) -> None:
    rows = [(3000, 0, 4096, WRITE, 0), (1000, 4096, 4096, WRITE, 0), (4000, 8192, 4096, WRITE, 0)]
    (tmp_path / "trace").write_bytes(TEXTS["alibaba"][0](rows))
    with pytest.raises(TraceError, match='record 2: line 2: time "1" is before that of the record before'):
        read(tmp_path / "trace")
    assert read(tmp_path / "trace", sort=True)["time"].tolist() == [1000, 3000, 4000]
    assert read(tmp_path / "trace", keep_going=True)["time"].tolist() == [3000, 4000]


def test_only_the_chosen_device_is_read(tmp_path: Path) -> None:
    rows = [(k * 1000, k * 4096, 4096, WRITE, k % 3) for k in range(30)]
    (tmp_path / "trace").write_bytes(TEXTS["alibaba"][0](rows))
    assert read(tmp_path / "trace", device=2).tolist() == rows[2::3]


def test_format_option_overrides_what_the_content_looks_like(tmp_path: Path) -> None:
    (tmp_path / "trace").write_bytes(b"5 0 8 16 0\n6 0 16 16 1\n")
    assert read(tmp_path / "trace").tolist() == [(5, 4096, 8192, WRITE, 0), (6, 8192, 8192, READ, 0)]
    assert read(tmp_path / "trace", format="heimdall").tolist() == [
        (5_000_000, 8, 16, WRITE, 0),
        (6_000_000, 16, 16, READ, 0),
    ]


def test_unknown_format_names_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"format .xyz. is unknown: it is one of blktrace, blkparse"):
        Trace([tmp_path], format="xyz")


@pytest.mark.parametrize(
    "content", [b"Dear reader,\nthis is a letter.\n", bytes(range(256)) * 40, b"\x7fELF" + bytes(99)]
)
def test_foreign_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "letter").write_bytes(content)
    with pytest.raises(TraceError, match=r"letter: .* in no format of block traces that is known"):
        read(tmp_path / "letter")


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nothing").touch()
    with pytest.raises(TraceError, match="nothing: the file is empty"):
        read(tmp_path / "nothing")


def test_parquet_without_polars_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trace").write_bytes(b"PAR1" + bytes(100))
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(NotSupportedError, match=r"pip install 'blocksnap\[traces\]'"):
        read(tmp_path / "trace")


def test_vscsi_is_known_by_its_versions_in_either_byte_order(tmp_path: Path) -> None:
    rows = [(k * 1000, k * 4096, 4096, k % 2, 0) for k in range(100)]
    for version in (1, 2):
        for order in "<>":
            (tmp_path / "trace").write_bytes(vscsi(rows, version=version, order=order))
            assert read(tmp_path / "trace").tolist() == rows
