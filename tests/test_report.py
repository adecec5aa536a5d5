"""What people read of a comparison, from figures made up to be checked by hand."""

import base64
import csv
import io
import json
import re
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from rich.console import Console

from blocksnap.amplification.baseline import changes, differences
from blocksnap.amplification.figures import format_bytes, format_ratio, format_seconds
from blocksnap.amplification.latency import QUANTILES, Latency, Samples, Steady, latency_of
from blocksnap.amplification.phases import Phase
from blocksnap.amplification.pictures import new_figure, write_pictures
from blocksnap.amplification.plot import draw_write_amplification
from blocksnap.amplification.plot_labels import spread
from blocksnap.amplification.raw_data import has_parquet, write_csv
from blocksnap.amplification.repeats import combined
from blocksnap.amplification.report import write_report
from blocksnap.amplification.result import (
    PARTS,
    Comparison,
    Measurement,
    Skipped,
    Spread,
    Target,
)
from blocksnap.amplification.study import read_study, study_as_dict
from blocksnap.amplification.tables import change_texts, comparison_table, notes
from blocksnap.amplification.verdict import verdict
from blocksnap.errors import ArgumentError

MIB = 1 << 20
QUANTILE_NAMES = [f"p{100 * share:g}" for share in QUANTILES]


LATENCY = Latency(0.05, 0.001, 0.002, 0.05, Steady(0.001, 0.002, 0.04), dict.fromkeys(QUANTILE_NAMES, 0.001))


def row(driver: str, amplification: float, block_size: int | None = None, *, copied: int = 0) -> Measurement:
    return Measurement(
        target=Target(driver, block_size),
        engine="user" if block_size else None,
        application_bytes=MIB,
        changed_bytes=MIB,
        changed_bytes_source="workload",
        backing_bytes=int(amplification * MIB),
        copy_bytes=copied,
        allocated_bytes=2 * MIB,
        allocated_bytes_source="driver",
        write_amplification_source="loop device",
        create_seconds=0.01,
        seconds=1.5,
        sync_seconds=0.1,
        operations=100,
        latency=LATENCY,
    )


def comparison(*rows: Measurement, skipped: tuple[Skipped, ...] = ()) -> Comparison:
    base = {
        "layers": 2,
        "database_bytes": 64 * MIB,
        "large_file_bytes": 0,
        "small_files": 4000,
        "small_file_bytes": 4096,
        "tree_bytes": 0,
    }
    workload = {
        "name": "sqlite",
        "summary": "random rows of a SQLite database are updated",
        "parameters": {"transactions": 100},
        "command": None,
        "versions": {},
        "counted": {"source": "wchar", "inside": "writes", "outside": "names"},
        "base_image": base,
    }
    machine = {"kernel": "6.1", "processor": "<fast & good>", "memory_bytes": 8 << 30, "system": None}
    return Comparison(machine, workload, rows, skipped, 12.0)


THIN = (
    row("thin", 9, 4096),
    row("thin", 5, 16384, copied=MIB),
    row("thin", 12, 65536, copied=3 * MIB),
    row("thin", 60, MIB, copied=40 * MIB),
)
OVERLAY = row("overlay", 20, copied=64 * MIB)
VFS = replace(row("vfs", 40, copied=80 * MIB), create_seconds=0.5)
VOLUME = row("volume", 2)
PARTS_OF_THIN = {
    "data": 3 * MIB,
    "copied": 1 * MIB,
    "zero_filled": 0,
    "pool_metadata": MIB // 2,
    "outside": MIB // 2,
}


def test_verdict_names_the_winner_with_its_block_size_and_all_figures() -> None:
    text = verdict(comparison(*THIN, OVERLAY, VFS, VOLUME))
    assert text.startswith("thin with 16K blocks wins: 5.00 bytes reach the disk")
    assert "20.0 with overlay and 40.0 with vfs" in text
    assert "a volume, without any copy-on-write, writes 2.00" in text
    assert "1 MiB by thin with 16K blocks, 64 MiB by overlay and 80 MiB by vfs" in text


def test_verdict_says_at_which_block_sizes_block_level_wins() -> None:
    assert "writes less than overlay at 4K, 16K and 64K and more than overlay at 1M." in verdict(
        comparison(*THIN, OVERLAY)
    )


def test_verdict_calls_a_difference_of_two_percent_none() -> None:
    text = verdict(comparison(*THIN[:2], row("thin", 12.1, 65536), row("overlay", 12), VOLUME))
    assert "writes less than overlay at 4K and 16K and about as much as overlay at 64K." in text
    assert "(too near to call from one run)" not in text
    near = verdict(comparison(row("overlay", 12), row("vfs", 12.2)))
    assert "12.2 with vfs (too near to call from one run)" in near


def test_verdict_of_several_runs_goes_by_whether_their_ranges_meet() -> None:
    def runs(each: Measurement, *written: int) -> Measurement:
        return combined([replace(each, backing_bytes=n * MIB) for n in written])

    near = [runs(row("thin", 0, 4096), 10, 11, 15), runs(row("overlay", 0), 14, 16, 20)]
    text = verdict(comparison(*near))
    assert "16.0 with overlay (too near to call)" in text
    assert "about as much as overlay at every block size measured" in text
    apart = [runs(row("thin", 0, 4096), 10, 10, 10), runs(row("overlay", 0), 11, 11, 11)]
    assert "less than overlay at every block size measured" in verdict(comparison(*apart))


def test_verdict_says_what_the_work_costs_after_a_snapshot() -> None:
    text = verdict(comparison(replace(OVERLAY, phases=phases_of(OVERLAY))))
    assert text.endswith("writes, for each byte, 1.00 with overlay (at first 20.0).")


def test_verdict_says_when_the_file_level_driver_wins() -> None:
    text = verdict(comparison(*THIN, row("overlay", 3), VOLUME))
    assert text.startswith("overlay wins: 3.00")
    assert "Block-level copy-on-write writes more than overlay at every block size measured." in text


def test_verdict_says_who_waits_when_the_container_is_created() -> None:
    slow = replace(VFS, create_seconds=0.5, latency=Latency(0.002, 0.001, 0.002, 0.05))
    text = verdict(comparison(OVERLAY, slow))
    assert "50 ms on overlay and 2 ms on vfs (after 500 ms to create the container)" in text


def test_baseline_never_wins() -> None:
    assert verdict(comparison(OVERLAY, VOLUME)).startswith("overlay wins")
    assert verdict(comparison(VOLUME)).startswith("Nobody wins")


def test_verdict_of_drivers_without_figures_is_honest() -> None:
    failed = Measurement(target=Target("overlay"), error="disk on fire")
    assert verdict(comparison(failed)) == "Nobody wins: no driver has a write amplification here."


def test_unknown_figures_are_null_in_json_and_never_left_out() -> None:
    known, unknown = row("overlay", 3).as_dict(), Measurement(target=Target("vfs")).as_dict()
    assert known.keys() == unknown.keys()
    assert {name for name, value in unknown.items() if value is not None} == {
        "driver",
        "phases",
        "runs",
    }
    assert unknown["phases"] == unknown["runs"] == []


def test_amplifications_are_ratios_of_the_bytes() -> None:
    measured = replace(row("overlay", 3), changed_bytes=MIB // 2)
    assert measured.write_amplification == 3
    assert measured.space_amplification == 4


def test_row_of_several_runs_has_the_bytes_of_one_and_the_median_seconds() -> None:
    runs = [
        replace(row("thin", amplification, 4096), seconds=seconds)
        for amplification, seconds in ((9, 1.0), (5, 3.0), (7, 2.5))
    ]
    whole = combined(runs)
    assert (whole.write_amplification, whole.seconds) == (7, 2.5)
    assert whole.spread is not None
    assert whole.spread["write_amplification"] == Spread(5, 7, 9)
    assert whole.spread["latency_first"] == Spread(0.05, 0.05, 0.05)
    written = whole.as_dict()
    assert [run["backing_bytes"] for run in written["runs"]] == [9 * MIB, 5 * MIB, 7 * MIB]
    assert combined(runs[:1]) is runs[0]
    broken = [runs[0], Measurement(target=Target("thin", 4096), error="pool on fire")]
    assert combined(broken).error == "run 2: pool on fire"


def test_counters_of_the_pool_stand_in_where_there_is_no_device() -> None:
    parts = {name: value for name, value in PARTS_OF_THIN.items() if name != "outside"}
    measured = replace(row("thin", 9, 4096), backing_bytes=None, parts=parts)
    assert measured.write_amplification == 4.5
    assert measured.as_dict()["backing_bytes"] is None


def test_percentiles_are_nearest_rank_and_the_first_is_kept_apart() -> None:
    latency = latency_of([Samples((9.0, *(float(n) for n in range(1, 100))))])
    assert latency is not None
    assert (latency.first, latency.max) == (9.0, 99.0)
    assert (latency.p50, latency.p99) == (49.0, 98.0)
    assert latency_of([]) is latency_of([Samples(())]) is None


def test_steady_state_leaves_out_the_first_operation_of_each_epoch() -> None:
    latency = latency_of([Samples((9.0, 1.0, 2.0)), Samples((8.0, 3.0))])
    assert latency is not None
    assert (latency.first, latency.max) == (9.0, 9.0)
    assert latency.steady == Steady(p50=2.0, p99=3.0, max=3.0)
    alone = latency_of([Samples((0.5,))])
    assert alone is not None
    assert (alone.p99, alone.steady) == (0.5, None)


def test_latency_of_a_histogram_has_no_first() -> None:
    latency = latency_of([Samples((0.3, 0.1, 0.2), counts=(1, 90, 9))])
    assert latency is not None
    assert (latency.first, latency.p50, latency.p99, latency.max) == (None, 0.1, 0.2, 0.3)
    assert latency.quantiles["p99.9"] == 0.3


def test_table_of_the_default_run_fits_into_eighty_columns() -> None:
    output = io.StringIO()
    Console(file=output, width=80).print(comparison_table(comparison(*THIN, OVERLAY, VFS, VOLUME)))
    lines = output.getvalue().splitlines()
    assert "…" not in output.getvalue()
    assert len(lines) == 2 + 7
    assert lines[2].split() == ["thin", "4K", "9.00", "9M", "0", "2M", "10ms", "50ms", "1ms", "2ms", "1.50s"]


def test_notes_tell_of_failed_and_skipped_drivers() -> None:
    failed = Measurement(target=Target("thin", 4096), error="pool on fire")
    said = notes(comparison(OVERLAY, failed, skipped=(Skipped("aufs", "not in this kernel"),)))
    assert said == ["thin 4K failed: pool on fire", "aufs skipped: not in this kernel"]


def test_notes_warn_when_the_application_did_not_write_the_same_everywhere() -> None:
    more = replace(OVERLAY, application_bytes=2 * MIB)
    (said,) = notes(comparison(VFS, more))
    assert said.startswith("The application wrote 1 MiB to 2 MiB, not the same on every driver")


def test_csv_has_a_line_a_row_with_nested_objects_flattened() -> None:
    output = io.StringIO()
    write_csv([replace(THIN[0], parts=PARTS_OF_THIN), OVERLAY], output)
    lines = list(csv.DictReader(io.StringIO(output.getvalue())))
    assert [line["driver"] for line in lines] == ["thin", "overlay"]
    assert lines[0]["parts_copied"] == str(MIB)
    assert lines[0]["latency_first"] == "0.05"
    assert lines[1]["parts_copied"] == lines[1]["block_size"] == ""


PICTURES = ("write-amplification", "space-amplification", "latency")


def test_report_writes_all_files_and_results_json_is_the_result(tmp_path: Path) -> None:
    measured = comparison(*THIN, OVERLAY, VFS, VOLUME)
    written = {path.name for path in write_report([measured], tmp_path / "new" / "out")}
    pictures = {f"{name}.{suffix}" for name in PICTURES for suffix in ("png", "svg")}
    data = {"results.csv", *(["results.parquet"] if has_parquet() else [])}
    assert written == {"results.json", "report.html"} | data | pictures
    stored = json.loads((tmp_path / "new" / "out" / "results.json").read_text())
    assert stored == json.loads(json.dumps(study_as_dict([measured])))
    assert stored["parts"] == PARTS


def test_report_of_several_workloads_has_a_section_and_pictures_for_each(tmp_path: Path) -> None:
    one, other = comparison(*THIN, OVERLAY), comparison(VFS, VOLUME)
    other = replace(other, workload={**other.workload, "name": "pgbench"})
    written = {path.name for path in write_report([one, other], tmp_path)}
    assert {"sqlite-latency.svg", "pgbench-latency.svg"} <= written
    page = (tmp_path / "report.html").read_text()
    assert "<h2>sqlite: Results</h2>" in page
    assert "<h2>pgbench: Results</h2>" in page
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["workload"]["name"] == "sqlite"
    assert [row["workload"] for row in stored["results"]] == ["sqlite"] * 5 + ["pgbench"] * 2


def test_study_is_read_back_as_it_was(tmp_path: Path) -> None:
    runs = [replace(OVERLAY, backing_bytes=n * MIB, phases=phases_of(OVERLAY)) for n in (20, 21, 25)]
    one = comparison(*THIN, combined(runs), skipped=(Skipped("aufs", "not in this kernel"),))
    other = comparison(Measurement(target=Target("vfs"), error="disk on fire"))
    study = [one, replace(other, workload={**other.workload, "name": "pgbench"})]
    write_report(study, tmp_path)
    read = read_study(tmp_path / "results.json")
    assert [made.name for made in read] == ["sqlite", "pgbench"]
    again = json.loads(json.dumps(study_as_dict(read)))
    assert again == json.loads((tmp_path / "results.json").read_text())
    assert verdict(read[0]) == verdict(one)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        (b"{", "not JSON, line 1"),
        (b"\xff\xfe", "not a text"),
        (b"[]", "not a result of blocksnap compare"),
        (b"{}", "it has no 'workload'"),
        (b'{"machine": {}, "workload": {"name": "x"}, "results": [{"driver": "vfs"}]}', "'block_size'"),
    ],
)
def test_file_that_is_no_result_is_one_line(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArgumentError, match=complaint) as refusal:
        read_study(path)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_report_page_is_self_contained_and_escapes_what_it_shows(tmp_path: Path) -> None:
    written = write_report([comparison(replace(THIN[0], parts=PARTS_OF_THIN), OVERLAY)], tmp_path)
    page = (tmp_path / "report.html").read_text()
    links = re.findall(r"(?:src|href)=[\"']?(?!#)([^\"'\s>]+)", page.replace("xlink:href", "href"))
    files = {link for link in links if not link.startswith("data:")}
    assert files == {path.name for path in written if path.suffix in (".json", ".csv", ".parquet")}
    (embedded,) = (link for link in links if link.startswith("data:"))
    stored = base64.b64decode(embedded.removeprefix("data:application/json;base64,"))
    assert stored == (tmp_path / "results.json").read_bytes()
    assert "&lt;fast &amp; good&gt;" in page
    assert page.count("<svg") == 3
    assert "journal and metadata of the ext4 below the pool" in page
    assert "10.0 %" not in page
    assert "5.6 %" in page  # half a MiB outside of 9


def phases_of(whole: Measurement) -> tuple[Phase, ...]:
    first = Phase(
        name="first epoch",
        application_bytes=MIB,
        backing_bytes=whole.backing_bytes,
        latency=LATENCY,
        samples=Samples((0.05, 0.001)),
    )
    base = Phase(name="base image", backing_bytes=4 * MIB, seconds=1.0)
    return base, first, replace(first, name="after snapshot 1", backing_bytes=MIB)


def test_phases_are_a_table_and_a_picture_when_there_were_snapshots(tmp_path: Path) -> None:
    rows = [replace(each, phases=phases_of(each)) for each in (OVERLAY, VOLUME)]
    measured = replace(comparison(*rows), snapshots=1)
    written = {path.name: path for path in write_report([measured], tmp_path)}
    assert ">after<" in written["epochs.svg"].read_text().replace("&#10;", "<")
    page = written["report.html"].read_text()
    assert page.count("after snapshot 1") == 2
    lines = list(csv.DictReader(written["phases.csv"].open()))
    assert [line["phase"] for line in lines] == ["base image", "first epoch", "after snapshot 1"] * 2
    assert lines[1]["backing_bytes"] == str(20 * MIB)
    latencies = list(csv.DictReader(written["latencies.csv"].open()))
    assert len(latencies) == 2 * 2 * 2
    assert latencies[0] | {"driver": "overlay", "run": "1", "operation": "0"} == latencies[0]


@pytest.mark.skipif(not has_parquet(), reason="needs polars")
def test_parquet_files_hold_what_the_csv_files_hold(tmp_path: Path) -> None:
    import polars

    write_report([comparison(*THIN, OVERLAY)], tmp_path)
    frame = polars.read_parquet(tmp_path / "results.parquet")
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert frame.columns == list(lines[0])
    assert frame["backing_bytes"].to_list() == [int(line["backing_bytes"]) for line in lines]
    assert frame["block_size"].to_list() == [4096, 16384, 65536, MIB, None]


def test_changes_against_a_baseline_are_certain_beyond_the_spread() -> None:
    before = comparison(*THIN, OVERLAY, VFS)
    after = comparison(row("thin", 4, 4096), replace(OVERLAY, seconds=1.55), VOLUME)
    found = {label: each for _, label, each in changes([before], [after])}
    thin, overlay = found["thin 4K"], found["overlay"]
    assert not isinstance(thin, str)
    assert not isinstance(overlay, str)
    assert change_texts("write_amplification", thin["write_amplification"]) == ("9.00", "4.00 -56%*")
    assert change_texts("seconds", overlay["seconds"]) == ("1.50s", "1.55s +3%")
    assert (found["volume"], found["vfs"]) == ("only now", "only in the baseline")
    old = combined([replace(OVERLAY, backing_bytes=n * MIB) for n in (18, 20, 30)])
    new = combined([replace(OVERLAY, backing_bytes=n * MIB) for n in (28, 29, 40)])
    ((_, _, overlapping),) = changes([comparison(old)], [comparison(new)])
    assert not isinstance(overlapping, str)
    assert not overlapping["backing_bytes"].certain


def test_baseline_page_names_what_is_not_the_same(tmp_path: Path) -> None:
    before = comparison(*THIN, OVERLAY)
    after = replace(before, machine={**before.machine, "kernel": "6.18"}, repeats=3)
    after = replace(after, workload={**after.workload, "parameters": {"transactions": 200}})
    assert differences([before], [after]) == [
        "kernel: 6.1 -> 6.18",
        "workload sqlite: transactions: 100 -> 200",
        "repeats: 1 -> 3",
    ]
    write_report([after], tmp_path, baseline=[before])
    page = (tmp_path / "report.html").read_text()
    assert "kernel: 6.1 → 6.18" in page
    assert "<h2>Against the baseline</h2>" in page


def test_pictures_are_png_and_svg_that_name_every_line(tmp_path: Path) -> None:
    drawn = {each.name: each for each in write_pictures(comparison(*THIN, OVERLAY, VFS, VOLUME), tmp_path)}
    assert list(drawn) == list(PICTURES)
    for picture in drawn.values():
        png, svg = picture.paths
        assert png.read_bytes().startswith(b"\x89PNG")
        assert svg.read_text().endswith(picture.svg)
    for name in ("thin", "overlay 20.0", "vfs 40.0", "volume 2.00", "16K", "1M"):
        assert f">{name}<" in drawn["write-amplification"].svg
    for name in ("thin 16K", "overlay", "volume"):
        assert f">{name}<" in drawn["space-amplification"].svg
        assert f">{name}<" in drawn["latency"].svg


def test_figures_of_two_lines_that_are_close_do_not_overlap() -> None:
    single = row("dm-snapshot", 8, 4096)
    close = [row("devicemapper", 12.5, 65536), row("devicemapper", 62, MIB)]
    with new_figure() as figure:
        draw_write_amplification(figure, comparison(single, *THIN, *close))
        boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_fontsize() == 8]
    assert len(boxes) == len(THIN) + len(close)
    assert [one for one, other in combinations(boxes, 2) if one.overlaps(other)] == []


def test_picture_of_nothing_is_no_file(tmp_path: Path) -> None:
    assert write_pictures(comparison(Measurement(target=Target("vfs"))), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "heights", [[0.5, 0.5, 0.5], [0.0, 0.01, 0.99, 1.0], [0.2], [], [0.97, 0.98, 0.99, 1.0]]
)
def test_labels_of_near_lines_do_not_overlap(heights: list[float]) -> None:
    placed = spread(heights, 0.058)
    gaps = [upper - lower for lower, upper in pairwise(placed)]
    assert all(gap >= 0.058 - 1e-9 for gap in gaps)
    assert all(height <= 1.0 for height in placed)


def test_figures_are_written_as_people_say_them() -> None:
    assert [format_ratio(value) for value in (0.5, 1.416, 17.31, 1240.4)] == ["0.50", "1.42", "17.3", "1,240"]
    assert [format_bytes(value) for value in (1, 512, 65536, 64 * MIB)] == [
        "1 byte",
        "512 bytes",
        "64 KiB",
        "64 MiB",
    ]
    assert [format_seconds(value) for value in (0.00031, 0.085, 1.24)] == ["310 us", "85 ms", "1.24 s"]
