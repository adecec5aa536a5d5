"""Workloads run for real, in a directory: what they write is what they say they wrote."""

import os
import sqlite3
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from blocksnap.amplification import operations
from blocksnap.amplification.child_process import WorkloadError
from blocksnap.amplification.workload import OperationWorkload, Outcome, Workload
from blocksnap.amplification.workloads import BUILT_IN, from_command, parse_workload
from blocksnap.errors import ArgumentError

SMALL = "database_bytes=512K,small_files=20"
SMALL_FILE = "large_file_bytes=512K,small_files=20"


def prepared(root: Path, text: str) -> Workload:
    stage = root.parent / f"stage-{root.name}"
    stage.mkdir()
    workload = parse_workload(text).stage(stage)
    for layer in range(workload.base.LAYERS):
        workload.prepare(root, layer)
    return workload


def run(root: Path, text: str) -> Outcome:
    return prepared(root, text).run(root)


def rows(root: Path) -> list[tuple[int, bytes]]:
    with sqlite3.connect(root / operations.DATABASE) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return database.execute("SELECT * FROM record").fetchall()


def test_database_of_the_base_image_has_the_size_asked_for(tmp_path: Path) -> None:
    prepared(tmp_path, "sqlite:database_bytes=4M,small_files=1")
    size = (tmp_path / operations.DATABASE).stat().st_size
    assert size == pytest.approx(4 << 20, rel=0.02)


def test_small_files_of_the_base_image_are_all_there(tmp_path: Path) -> None:
    prepared(tmp_path, "touch-small:database_bytes=64K,small_files=250,small_file_bytes=100")
    files = [path for path in (tmp_path / operations.SMALL_FILES).rglob("*") if path.is_file()]
    assert len(files) == 250
    assert {path.stat().st_size for path in files} == {100}


def test_sqlite_commits_in_both_journal_modes_and_leaves_a_sound_database(tmp_path: Path) -> None:
    outcome = run(tmp_path, f"sqlite:{SMALL},transactions=10")
    assert outcome.operations == 20
    assert outcome.application_bytes is not None
    assert outcome.application_bytes > 20 * 4096
    with sqlite3.connect(tmp_path / operations.DATABASE) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert rows(tmp_path)


def test_rollback_journal_writes_more_than_the_write_ahead_log(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    rollback = run(tmp_path / "a", f"sqlite-rollback:{SMALL},transactions=10").application_bytes
    ahead = run(tmp_path / "b", f"sqlite-wal:{SMALL},transactions=10").application_bytes
    assert rollback is not None
    assert ahead is not None
    assert rollback > ahead


def test_two_runs_of_sqlite_write_the_same_rows(tmp_path: Path) -> None:
    results = []
    for name in ("first", "second"):
        root = tmp_path / name
        root.mkdir()
        outcome = run(root, f"sqlite:{SMALL},transactions=10,rows=3")
        results.append((outcome.application_bytes, rows(root)))
    assert results[0] == results[1]


def test_append_grows_the_log_by_what_it_reports(tmp_path: Path) -> None:
    workload = prepared(tmp_path, f"append:{SMALL_FILE},records=30,record_bytes=100")
    outcome = workload.run(tmp_path)
    assert outcome.operations == 30
    assert outcome.application_bytes == workload.changed_bytes == 3000
    assert (tmp_path / operations.LARGE_FILE).stat().st_size == (512 << 10) + 3000


def test_patch_changes_one_piece_a_stride_and_nothing_between(tmp_path: Path) -> None:
    workload = prepared(tmp_path, f"patch:{SMALL_FILE},stride=64K,write_bytes=4K")
    before = (tmp_path / operations.LARGE_FILE).read_bytes()
    outcome = workload.run(tmp_path)
    after = (tmp_path / operations.LARGE_FILE).read_bytes()
    changed = [
        begin
        for begin in range(0, len(before), 4096)
        if before[begin : begin + 4096] != after[begin : begin + 4096]
    ]
    assert changed == list(range(0, 512 << 10, 64 << 10))
    assert outcome.application_bytes == workload.changed_bytes == 8 * 4096
    assert len(after) == len(before)


def test_touch_small_appends_to_every_small_file(tmp_path: Path) -> None:
    workload = prepared(tmp_path, f"touch-small:{SMALL},small_file_bytes=50,append_bytes=7")
    outcome = workload.run(tmp_path)
    files = [path for path in (tmp_path / operations.SMALL_FILES).rglob("*") if path.is_file()]
    assert {path.stat().st_size for path in files} == {57}
    assert outcome.operations == 20
    assert outcome.application_bytes == workload.changed_bytes == 140


def test_touch_byte_writes_and_changes_one_byte(tmp_path: Path) -> None:
    workload = prepared(tmp_path, f"touch-byte:{SMALL_FILE},offset=1000")
    before = (tmp_path / operations.LARGE_FILE).read_bytes()
    outcome = workload.run(tmp_path)
    after = (tmp_path / operations.LARGE_FILE).read_bytes()
    assert [i for i in range(len(before)) if before[i] != after[i]] == [1000]
    assert outcome.application_bytes == 1
    assert outcome.operations == 1


FEW = {
    "touch-byte": "offset=0",
    "append": "records=5",
    "scatter": "writes=5",
    "bulk-load": "rows=20,batch=10",
    "untar": "files=10",
    "package": "files=10,packages=2",
}
OPERATIONS = [name for name, workload in BUILT_IN.items() if isinstance(workload, OperationWorkload)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_built_in_operations_run_twice_in_a_row_with_small_sizes(tmp_path: Path, name: str) -> None:
    if (lacks := BUILT_IN[name].missing()) is not None:
        pytest.skip(lacks)
    root = tmp_path / "root"
    root.mkdir()
    sizes = SMALL_FILE if BUILT_IN[name].base.large_file_bytes else SMALL
    more = FEW.get(name, "transactions=2" if "transactions" in BUILT_IN[name].parameters else "seed=1")
    workload = prepared(root, f"{name}:{sizes},{more}")
    for epoch in (0, 1):
        outcome = workload.run(root, epoch=epoch)
        assert outcome.samples is not None
        assert outcome.seconds >= sum(outcome.samples.seconds) * 0.99
        assert outcome.application_bytes


def test_epochs_of_sqlite_change_other_rows(tmp_path: Path) -> None:
    workload = prepared(tmp_path, f"sqlite-wal:{SMALL},transactions=10")
    states = [rows(tmp_path)]
    for epoch in (0, 1):
        workload.run(tmp_path, epoch=epoch)
        states.append(rows(tmp_path))
    changed = [{old[0] for old, new in zip(*pair, strict=True) if old != new} for pair in pairwise(states)]
    assert len(changed[0]) == len(changed[1]) == 10
    assert changed[0] != changed[1]


def test_scatter_changes_as_many_places_as_it_says(tmp_path: Path) -> None:
    workload = prepared(tmp_path, f"scatter:{SMALL_FILE},writes=20,write_bytes=4K")
    before = (tmp_path / operations.LARGE_FILE).read_bytes()
    outcome = workload.run(tmp_path)
    after = (tmp_path / operations.LARGE_FILE).read_bytes()
    pieces = range(0, len(before), 4096)
    changed = {begin for begin in pieces if before[begin : begin + 4096] != after[begin : begin + 4096]}
    offsets = operations.scattered_offsets(len(before), 20, 4096, workload.number("seed"))
    assert changed == set(offsets)
    assert outcome.application_bytes == workload.changed_bytes == 20 * 4096
    with pytest.raises(ArgumentError, match="room for 128 writes"):
        parse_workload(f"scatter:{SMALL_FILE},writes=129,write_bytes=4K")


def test_bulk_load_brings_its_rows_and_an_index(tmp_path: Path) -> None:
    run(tmp_path, f"bulk-load:{SMALL},rows=1000,batch=300")
    with sqlite3.connect(tmp_path / operations.DATABASE) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("SELECT count(*) FROM loaded_0").fetchone() == (1000,)


def test_untar_writes_the_files_of_the_tar_and_nothing_else(tmp_path: Path) -> None:
    outcome = run(tmp_path, f"untar:{SMALL},files=50")
    unpacked = [path for path in (tmp_path / "unpacked-0").rglob("*") if path.is_file()]
    assert len(unpacked) == outcome.operations == 50
    assert outcome.application_bytes == sum(path.stat().st_size for path in unpacked)


@pytest.mark.skipif(BUILT_IN["package"].missing() is not None, reason="needs dpkg and root")
def test_package_upgrades_what_is_in_the_image_and_counts_no_pipes(tmp_path: Path) -> None:
    workload = prepared(tmp_path, "package:files=60,packages=3,small_files=5")
    place = tmp_path / "usr/lib/blocksnap-workload"
    old = {path: path.read_bytes() for path in place.rglob("*.py")}
    outcome = workload.run(tmp_path)
    assert {path: path.read_bytes().removesuffix(b"# the newer version\n") for path in old} == old
    status = (tmp_path / "var/lib/dpkg/status").read_text()
    assert status.count("Status: install ok installed") == status.count("Version: 2") == 3
    contents = sum(path.stat().st_size for path in old)
    assert outcome.operations == 3
    assert contents < (outcome.application_bytes or 0) < contents + (256 << 10)  # dpkg's database


def test_material_of_two_stagings_is_the_same(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        parse_workload("untar:files=30").stage(tmp_path / name)
    first, second = ((tmp_path / name / "files.tar").read_bytes() for name in ("first", "second"))
    assert first == second


def test_command_gets_the_root_and_its_write_bytes_are_counted(tmp_path: Path) -> None:
    outcome = from_command(("sh", "-c", "head -c 5000 /dev/zero | tail -c 3000 > {root}/file")).run(tmp_path)
    assert (tmp_path / "file").stat().st_size == 3000
    assert outcome.application_bytes == 5000 + 3000  # the pipe between the two is inside, as the method says
    assert outcome.samples is None


def test_what_a_command_prints_is_not_counted_as_written(tmp_path: Path) -> None:
    outcome = from_command(("sh", "-c", "echo hello; echo there >&2")).run(tmp_path)
    assert outcome.application_bytes == 0


def test_failing_command_is_reported_with_its_status_and_last_words(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"ended with status 3: no such table"):
        from_command(("sh", "-c", "echo no such table >&2; exit 3")).run(tmp_path)


def test_killed_command_is_reported_with_its_signal(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"ended with signal 9"):
        from_command(("sh", "-c", "kill -9 $$")).run(tmp_path)


def test_command_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"no-such-program"):
        from_command(("no-such-program",)).run(tmp_path)


def test_failing_operation_is_reported_with_its_cause(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"workload touch-byte: FileNotFoundError.*large-file"):
        parse_workload("touch-byte").run(tmp_path)


def test_process_that_a_command_leaves_running_is_ended(tmp_path: Path) -> None:
    from_command(("sh", "-c", "sleep 1000 & echo $! > {root}/pid")).run(tmp_path)
    pid = int((tmp_path / "pid").read_text())
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return
    assert state == "Z"


class StopNowError(Exception):
    pass


def test_check_that_raises_ends_the_process_of_the_workload(tmp_path: Path) -> None:
    def check() -> None:
        if (tmp_path / "pid").exists():
            raise StopNowError

    command = from_command((sys.executable, "-c", _SLEEP, "{root}/pid"))
    with pytest.raises(StopNowError):
        command.run(tmp_path, check=check)
    pid = int((tmp_path / "pid").read_text())
    assert not _is_running(pid)


_SLEEP = """
import os, sys, time
open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(1000)
"""


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_parameters_are_read_from_the_name() -> None:
    workload = parse_workload("patch:stride=16K,large_file_bytes=1M")
    assert workload.parameters["stride"] == 16 << 10
    assert workload.base.large_file_bytes == 1 << 20
    assert BUILT_IN["patch"].parameters["stride"] == 64 << 10


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nosuch", "no workload"),
        ("patch:pace=3", "no parameter"),
        ("patch:stride=fast", "is not a size"),
        ("patch:stride=0", "at least 1"),
        ("patch:large_file_bytes=1", "at least 64K"),
        ("touch-byte:offset=1G", "behind the end"),
        ("sqlite:journal=memory", "journal is"),
    ],
)
def test_workload_that_cannot_be_is_refused_with_the_reason(text: str, complaint: str) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        parse_workload(text)


def test_operations_run_without_the_package() -> None:
    source = Path(operations.__file__).read_text()
    assert "from ." not in source
    assert "blocksnap" not in {
        line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))
    }
    assert os.access(operations.__file__, os.R_OK)
