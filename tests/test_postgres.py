"""PostgreSQL as a workload: the real server and client, and what is left of them: nothing."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blocksnap import mount
from blocksnap.amplification.child_process import WorkloadError
from blocksnap.amplification.measure import compare
from blocksnap.amplification.postgres import CLUSTER
from blocksnap.amplification.postgres_session import copy_script, pgbench_latencies, reason_in
from blocksnap.amplification.targets import targets_for
from blocksnap.amplification.testbed import clear_below
from blocksnap.amplification.workload import Workload
from blocksnap.amplification.workloads import BUILT_IN, parse_workload
from blocksnap.errors import ArgumentError, NotSupportedError

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/loop-control", os.W_OK), reason="needs root and loop devices"
)
needs_postgres = pytest.mark.skipif(
    BUILT_IN["pgbench"].missing() is not None, reason=str(BUILT_IN["pgbench"].missing())
)


def processes_of(directory: Path) -> list[str]:
    """Return the command lines that still have to do with a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            place, line = os.readlink(path / "cwd"), (path / "cmdline").read_bytes()
        except OSError:
            continue
        if place.startswith(str(directory)) or os.fsencode(directory) in line:
            found.append(line.decode())
    return [line for line in found if "pytest" not in line]


@pytest.fixture(scope="module", name="template")
def staged_workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    if (lacks := BUILT_IN["pgbench"].missing()) is not None:
        pytest.skip(lacks)
    stage = tmp_path_factory.mktemp("stage")
    return parse_workload("pgbench:scale=1,transactions=25,clients=2,small_files=1").stage(stage)


@pytest.fixture(name="root")
def container(template: Workload, tmp_path: Path) -> Iterator[Path]:
    """A container's directory, which no other user can walk to, with a cluster in it."""
    root = tmp_path / "container"
    root.mkdir()
    (tmp_path).chmod(0o700)
    template.prepare(root, 0)
    yield root
    assert processes_of(tmp_path) == []


def test_transactions_are_all_done_and_each_has_its_latency(template: Workload, root: Path) -> None:
    outcome = template.run(root)
    assert outcome.operations == 50
    assert outcome.samples is not None
    assert min(outcome.samples.seconds) > 0
    assert outcome.application_bytes is not None
    assert outcome.application_bytes > 50 * 8192  # a page of the write-ahead log a commit
    assert (root / CLUSTER / "PG_VERSION").exists()
    assert not (root / CLUSTER / "postmaster.pid").exists()


def test_server_does_not_run_as_root_and_owns_its_cluster(root: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    assert (root / CLUSTER).stat().st_uid not in (0, root.stat().st_uid)
    assert (root / CLUSTER).stat().st_mode & 0o777 == 0o700


def test_next_epoch_goes_on_with_other_transactions(template: Workload, root: Path) -> None:
    first, second = (template.run(root, epoch=epoch) for epoch in (0, 1))
    assert first.operations == second.operations == 50


def test_rows_are_loaded_by_copy_in_batches(template: Workload, root: Path) -> None:
    load = parse_workload("postgres-load:rows=2500,batch=1000")
    outcome = replace(load, base=template.base).run(root)
    assert outcome.operations == 3
    assert (outcome.application_bytes or 0) > 2500 * 200


def test_cluster_of_another_version_is_one_line_with_the_reason_of_the_server(
    template: Workload, root: Path
) -> None:
    (root / CLUSTER / "PG_VERSION").write_text("9.4\n")
    with pytest.raises(WorkloadError) as failure:
        template.run(root)
    line = str(failure.value)
    assert line.startswith("workload pgbench: PostgreSQL did not start: database files are incompatible")
    assert "9.4" in line
    assert "\n" not in line


def test_cluster_that_is_not_there_is_said(template: Workload, tmp_path: Path) -> None:
    (tmp_path / CLUSTER).mkdir(parents=True)
    tmp_path.chmod(0o755)
    with pytest.raises(WorkloadError, match=rf"PostgreSQL did not start: .*{tmp_path}/{CLUSTER}"):
        template.run(tmp_path)


def test_client_that_fails_is_one_line_and_the_server_is_gone(template: Workload, root: Path) -> None:
    broken = template.with_parameter("clients", 500)
    with pytest.raises(WorkloadError, match=r"pgbench failed: .*too many clients") as failure:
        broken.run(root)
    assert "\n" not in str(failure.value)


@needs_root
def test_full_file_system_is_one_line_and_the_server_is_gone(template: Workload, tmp_path: Path) -> None:
    root = tmp_path / "full"
    root.mkdir()
    room = template.base.tree_bytes + (1 << 20)
    mount.mount("tmpfs", root, "tmpfs", options=f"size={room},mode=755")
    try:
        template.prepare(root, 0)
        with pytest.raises(WorkloadError, match="No space left on device") as failure:
            template.with_parameter("transactions", 20_000).run(root)
        assert "\n" not in str(failure.value)
        assert processes_of(tmp_path) == []
    finally:
        mount.unmount(root)


@needs_root
def test_every_driver_runs_the_same_transactions(template: Workload, tmp_path: Path) -> None:
    unstaged = replace(template, base=replace(template.base, tree=None))
    found = compare(unstaged, targets_for(["overlay", "volume"], []), snapshots=1, work_dir=tmp_path)
    assert [row.error for row in found.results] == [None, None]
    assert [row.operations for row in found.results] == [100, 100]
    overlay, volume = found.results
    assert (overlay.copy_bytes or 0) > 2 * (16 << 20)  # a segment of the write-ahead log in each epoch
    assert volume.application_bytes == pytest.approx(overlay.application_bytes, rel=0.1)
    assert list(tmp_path.iterdir()) == []


@needs_root
@needs_postgres
def test_interrupt_ends_the_server_and_unmounts(tmp_path: Path) -> None:
    arguments = ["--workload", "pgbench:scale=1,transactions=10M,small_files=5", "--drivers", "overlay"]
    command = [sys.executable, "-c", "from blocksnap.cli import main; main()", "compare", *arguments]
    process = subprocess.Popen(
        [*command, "--work-dir", str(tmp_path)], stderr=subprocess.PIPE, start_new_session=True
    )
    while not list(tmp_path.glob(f"*/overlay/driver/overlay/*/merged/{CLUSTER}/postmaster.pid")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (130, b"")
    assert processes_of(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    assert [entry.target for entry in mount.mount_table() if str(tmp_path) in entry.target] == []


@pytest.fixture(name="public_dir")
def directory_for_everybody() -> Iterator[str]:
    """A directory that every user reaches, as those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="bs-test-") as name:
        os.chmod(name, 0o755)
        yield name


@needs_root
@needs_postgres
def test_server_ends_with_a_comparison_that_is_killed(public_dir: str, tmp_path: Path) -> None:
    arguments = ["--workload", "pgbench:scale=1,transactions=10M,small_files=5", "--drivers", "volume"]
    command = [sys.executable, "-c", "from blocksnap.cli import main; main()", "compare", *arguments]
    environment = {**os.environ, "TMPDIR": public_dir}
    process = subprocess.Popen([*command, "--work-dir", str(tmp_path)], env=environment)
    while not list(tmp_path.glob(f"*/volume/mounted/{CLUSTER}/postmaster.pid")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = processes_of(tmp_path)
    clear_below(tmp_path)
    assert left == []


class StopNowError(Exception):
    pass


def test_check_that_raises_ends_the_server_and_all_its_processes(template: Workload, root: Path) -> None:
    def check() -> None:
        if (root / CLUSTER / "postmaster.pid").exists():
            raise StopNowError

    shared = set(os.listdir("/dev/shm"))
    with pytest.raises(StopNowError):
        template.with_parameter("transactions", 1_000_000).run(root, check=check)
    assert processes_of(root) == []
    assert set(os.listdir("/dev/shm")) <= shared


@needs_postgres
def test_too_long_a_directory_for_the_socket_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    (tmp_path / "stage").mkdir()
    with pytest.raises(ArgumentError, match="too long for a socket: set TMPDIR"):
        parse_workload("pgbench").stage(tmp_path / "stage")


def test_version_that_is_not_installed_is_named() -> None:
    with pytest.raises(NotSupportedError, match=r"PostgreSQL (7 )?is not installed"):
        parse_workload("pgbench:version=7")


def test_latencies_are_in_the_order_in_which_transactions_began(tmp_path: Path) -> None:
    (tmp_path / "latency.1").write_text("0 1 3000 0 100 5000\n1 1 4500 0 100 5500\n0 2 10 0 101 20\n")
    assert pgbench_latencies(str(tmp_path / "latency")) == [0.0045, 0.003, 1e-05]


def test_reason_is_the_last_cause_not_its_consequences() -> None:
    log = (
        "LOG:  starting\nPANIC:  could not write to file 'x': No space left on device\n"
        "DETAIL:  more\nFATAL:  the database system is in recovery mode\n"
    )
    assert reason_in(log) == "could not write to file 'x': No space left on device (more)"
    assert reason_in("LOG:  all is well\n") is None


def test_copy_script_is_the_same_each_time_and_has_every_row() -> None:
    script = copy_script("t", 5, 2, 1)
    assert script == copy_script("t", 5, 2, 1)
    assert script.count(b"COPY t FROM STDIN;") == 3
    assert script.count(b"\t") == 10


@needs_postgres
def test_description_names_the_version(template: Workload) -> None:
    versions = template.describe()["versions"]
    assert isinstance(versions, dict)
    assert versions["postgresql"][0].isdigit()
    assert shutil.which("postgres") or Path("/usr/lib/postgresql").exists()
