"""The crossover map: the relations of its model, the rule drawn from it, real points that agree with it."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from blocksnap import drivers
from blocksnap.amplification.crossover import (
    Cell,
    Crossover,
    Overhead,
    Point,
    Sweep,
    Work,
    fitted,
    make_crossover,
    model_cells,
)
from blocksnap.amplification.crossover_report import write_crossover
from blocksnap.amplification.crossover_rule import deviation_sentence, overhead_sentence, rule
from blocksnap.traces.request import FLUSH, WRITE

KIB, MIB = 1 << 10, 1 << 20
MAIN = [sys.executable, "-c", "from blocksnap.cli import main; main()"]
SMALL = Sweep(
    file_sizes=(64 * KIB, MIB, 16 * MIB),
    fractions=(0.0001, 0.01, 0.1, 1.0),
    write_sizes=(4 * KIB,),
    block_sizes=(64 * KIB, MIB),
    measured_file_sizes=(256 * KIB, MIB),
    measured_fractions=(0.001, 0.5),
)

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/loop-control", os.W_OK), reason="needs root and loop devices"
)
needs_thin = pytest.mark.skipif(
    dict(drivers.available("/var/tmp")).get("thin", "not registered") is not None,
    reason="needs the driver thin",
)


def work(size: int, fraction: float, write: int = 4 * KIB, sync_every: int = 32) -> Work:
    return Work(size, fraction, write, sync_every, seed=1)


def cells(of: Work, *block_sizes: int) -> list[Cell]:
    return list(model_cells([of], block_sizes))


def test_one_write_costs_the_file_or_one_block() -> None:
    one = work(MIB, 0.000001)
    assert (one.writes, one.syncs, one.written_bytes) == (1, 1, 4 * KIB)
    for cell in cells(one, 16 * KIB, 64 * KIB, MIB):
        assert cell.copy_bytes + one.written_bytes == cell.block_size
        assert cell.file_level_bytes == MIB + 4 * KIB
        assert cell.block_level_bytes == cell.block_size + cell.metadata_bytes


def test_writes_that_cover_blocks_whole_copy_nothing() -> None:
    (covered, half) = cells(work(MIB, 1.0, write=64 * KIB, sync_every=1), 64 * KIB, 128 * KIB)
    assert covered.copy_bytes == 0
    assert half.copy_bytes == MIB // 2  # the first half of each block is written over a copy of the second


def test_random_writes_to_every_block_copy_what_a_copy_up_copies() -> None:
    every = work(16 * MIB, 0.25, sync_every=1)
    (cell,) = cells(every, 256 * KIB)
    assert cell.copy_bytes == 16 * MIB - 64 * 4 * KIB  # all but the piece that broke each block's sharing


def test_writes_of_one_sync_reach_the_device_in_order_and_neighbours_as_one_request() -> None:
    requests = work(64 * KIB, 1.0, sync_every=16).requests()
    assert [(int(r["offset"]), int(r["length"]), int(r["kind"])) for r in requests] == [
        (0, 64 * KIB, WRITE),
        (0, 0, FLUSH),
    ]
    scattered = work(MIB, 0.1, sync_every=8).requests()
    writes = scattered[scattered["kind"] == WRITE]
    assert int(writes["length"].sum()) == 26 * 4 * KIB
    assert int((scattered["kind"] == FLUSH).sum()) == 4


def test_sweep_measures_each_work_once() -> None:
    chosen = list(replace(SMALL, measured_fractions=(0.0001, 0.001, 0.5)).measured_works())
    assert [(each.file_size, each.writes) for each in chosen] == [
        (256 * KIB, 1),
        (256 * KIB, 32),
        (MIB, 1),
        (MIB, 128),
    ]


def points(overlay: Overhead, thin: Overhead) -> list[Point]:
    return [
        Point(
            cell,
            round(cell.file_level_bytes + overlay.of(cell.work)),
            round(cell.block_level_bytes + thin.of(cell.work)),
            None,
            None,
        )
        for size in (MIB, 4 * MIB)
        for fraction in (0.001, 0.1, 0.5)
        for cell in cells(work(size, fraction), 64 * KIB)
    ]


def test_what_the_measured_points_have_beyond_the_model_is_found_again() -> None:
    found = fitted(points(Overhead(400e3, 10e3), Overhead(600e3, 30e3)))
    assert found.keys() == {"overlay", "thin 64K"}
    assert found["overlay"].bytes == pytest.approx(400e3, rel=0.01)
    assert found["overlay"].bytes_a_sync == pytest.approx(10e3, rel=0.01)
    assert found["thin 64K"].bytes_a_sync == pytest.approx(30e3, rel=0.01)
    assert fitted([]) == {}


def test_less_than_the_model_is_no_overhead_below_zero() -> None:
    found = fitted(points(Overhead(-5e3, 0), Overhead(0, -1e3)))
    assert all(over.bytes >= 0 and over.bytes_a_sync >= 0 for over in found.values())


def crossover(**more: object) -> Crossover:
    return replace(Crossover(SMALL, list(model_cells(SMALL.works(), SMALL.block_sizes))), **more)  # type: ignore[arg-type]


def test_rule_has_a_sentence_for_each_write_size_with_its_numbers() -> None:
    (sentence,) = rule(crossover())
    assert sentence.startswith("Random writes of 4K to a file of the image, a sync every 32: block-level")
    assert "with 64K blocks from files of 1M on, while less than " in sentence
    assert "with 1M blocks from files of 16M on, while less than " in sentence


def test_rule_says_when_block_level_never_wins() -> None:
    only_small = replace(SMALL, file_sizes=(64 * KIB,), block_sizes=(MIB,))
    made = Crossover(only_small, list(model_cells(only_small.works(), only_small.block_sizes)))
    assert rule(made)[0].endswith("with 1M blocks at no file size.")


def test_deviation_is_said_and_who_agrees() -> None:
    exact = points(Overhead(), Overhead())
    off = replace(exact[0], block_level_bytes=round(1.5 * exact[0].cell.block_level_bytes))
    said = deviation_sentence(crossover(points=[*exact[1:], off]))
    assert said.startswith(
        "Of 6 measured points the ratio lies 0 % (median) and at most 50 % from the model's"
    )
    assert deviation_sentence(crossover()).startswith("Nothing was measured")
    assert overhead_sentence(crossover()) == ""
    assert "overlay 400 KiB and 10 KiB a sync" in overhead_sentence(
        crossover(overheads={"overlay": Overhead(400 * KIB, 10 * KIB)})
    )


def test_files_of_a_crossover_map_are_self_contained(tmp_path: Path) -> None:
    made = crossover(points=points(Overhead(), Overhead()), machine={"kernel": "<6.1>"})
    written = {path.name: path for path in write_crossover(made, tmp_path)}
    assert {"crossover.json", "crossover-cells.csv", "crossover.png", "crossover.html"} <= written.keys()
    stored = json.loads(written["crossover.json"].read_text())
    assert len(stored["cells"]) == len(made.cells) == 2 * 3 * 4
    assert stored["rule"] == rule(made)
    page = written["crossover.html"].read_text()
    assert page.count("<svg") == 1
    assert "&lt;6.1&gt;" in page
    assert not re.search(r"(?:src|href)=[\"']?https?:", page)
    lines = list(csv.DictReader(written["crossover-points.csv"].open()))
    assert float(lines[0]["measured_ratio"]) == pytest.approx(made.points[0].ratio)
    assert ">64K blocks, 4K writes<" in written["crossover.svg"].read_text()


@needs_root
@needs_thin
def test_measured_points_copy_what_the_model_says(tmp_path: Path) -> None:
    sweep = replace(SMALL, block_sizes=(64 * KIB,))
    made = make_crossover(sweep, measuring=True, work_dir=tmp_path)
    assert made.failures == []
    assert len(made.points) == 4
    for point in made.points:
        assert point.file_copy_bytes == point.cell.work.file_size
        assert point.copy_bytes is not None
        # More than the model by the blocks of the file system's own data, which it does not have.
        assert 0 <= point.copy_bytes - point.cell.copy_bytes <= 16 * 64 * KIB
    assert made.overheads.keys() == {"overlay", "thin 64K"}
    assert list(tmp_path.iterdir()) == []


def test_command_prints_the_rule_and_json_alone(tmp_path: Path) -> None:
    arguments = ["crossover", "--no-measure", "--largest", "1M", "--block-sizes", "64K"]
    done = subprocess.run(
        [*MAIN, *arguments, "--json", "--out", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["points"] == []
    assert "crossover.html" in done.stderr
    done = subprocess.run([*MAIN, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Random writes of 4K")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--write-sizes", "3K"], "3K cannot be in the map: take powers of two from 4K on"),
        (["--block-sizes", ""], "nothing to map"),
        (["--largest", "lots"], "is not a size"),
    ],
)
def test_sweep_that_cannot_be_is_wrong_usage(arguments: list[str], complaint: str) -> None:
    done = subprocess.run(
        [*MAIN, "crossover", "--no-measure", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert complaint in line
