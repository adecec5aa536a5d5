"""fio's job files as a workload: run by the real fio, on the real files that it laid out."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blocksnap.amplification.child_process import WorkloadError
from blocksnap.amplification.fio import job_text
from blocksnap.amplification.workload import Workload
from blocksnap.amplification.workloads import parse_workload
from blocksnap.errors import ArgumentError

JOB = """
[global]
size=1m
directory=/nonexistent
rw=randwrite
bs=4k
[first]
[second]
filename=data
io_size=64k
numjobs=2
"""

needs_fio = pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")


def job_file(directory: Path, text: str = JOB) -> Path:
    path = directory / "job.fio"
    path.write_text(text)
    return path


def staged(directory: Path, text: str = JOB) -> Workload:
    stage = directory / "stage"
    stage.mkdir()
    return parse_workload(f"fio:job={job_file(directory, text)},small_files=1").stage(stage)


@needs_fio
def test_files_of_the_job_are_laid_out_in_the_image_with_contents(tmp_path: Path) -> None:
    workload = staged(tmp_path)
    (tmp_path / "root").mkdir()
    workload.prepare(tmp_path / "root", 0)
    files = {path.name: path.stat() for path in (tmp_path / "root").iterdir()}
    assert files.keys() == {"first.0.0", "data"}
    assert all(info.st_size == 1 << 20 == info.st_blocks * 512 for info in files.values())


@needs_fio
def test_job_runs_below_the_root_and_counts_what_fio_counted(tmp_path: Path) -> None:
    workload = staged(tmp_path)
    (tmp_path / "root").mkdir()
    workload.prepare(tmp_path / "root", 0)
    before = (tmp_path / "root" / "first.0.0").read_bytes()
    outcome = workload.run(tmp_path / "root")
    assert (tmp_path / "root" / "first.0.0").read_bytes() != before
    assert outcome.application_bytes == (1 << 20) + 2 * (64 << 10)
    assert outcome.operations == 256 + 2 * 16
    assert outcome.samples is not None
    assert outcome.samples.first is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.fio", "root", "stage"]


@needs_fio
def test_reads_are_operations_and_no_written_bytes(tmp_path: Path) -> None:
    workload = staged(tmp_path, "[reader]\nsize=1m\nrw=read\nbs=64k\n")
    assert workload.base.tree is not None
    outcome = workload.run(workload.base.tree)
    assert (outcome.application_bytes, outcome.operations) == (0, 16)


@needs_fio
def test_job_that_fails_is_one_line_with_the_reason_of_fio(tmp_path: Path) -> None:
    workload = staged(tmp_path, "[job]\nsize=1m\nrw=write\n")
    job_file(tmp_path, "[job]\nsize=1m\nrw=write\nioengine=external:/nonexistent.so\n")
    assert workload.base.tree is not None
    with pytest.raises(WorkloadError, match=r"^workload fio: fio on job.fio failed: .*nonexistent") as failed:
        workload.run(workload.base.tree)
    assert "\n" not in str(failed.value)


@needs_fio
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a]\nrwx=3\n", r"job.fio: fio refuses it: Bad option <rwx=3>"),
        ("hello\n", "Bad option <hello>"),
        ("[a]\nfilename=/dev/sdb\n", r"line 2: filename=/dev/sdb lies outside of the container"),
        ("[a]\nfilename=a:../b\n", r"line 2: filename=a:../b lies outside"),
        ("[a]\ninclude missing.fio\n", r"No such file"),
        ("[a]\ninclude job.fio\n", r"nested too deep"),
    ],
)
def test_bad_job_file_is_refused_before_anything_runs(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ArgumentError, match=complaint) as refusal:
        parse_workload(f"fio:job={job_file(tmp_path, text)}")
    assert "\n" not in str(refusal.value)


@needs_fio
def test_job_file_must_be_named_and_be_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="fio:job=PATH"):
        parse_workload("fio")
    with pytest.raises(ArgumentError, match=r"gone\.fio: No such file"):
        parse_workload(f"fio:job={tmp_path}/gone.fio")


def test_place_is_the_only_thing_that_changes_in_a_job_file(tmp_path: Path) -> None:
    (tmp_path / "sizes.fio").write_text("size=4m\n")
    job = job_file(tmp_path, "[global]\ndirectory = /mnt\ninclude sizes.fio\n; a note\n[a]\ntime_based\n")
    assert job_text(job, Path("/a:b"), {}).splitlines() == [
        "[global]",
        "directory=/a\\:b",
        "[global]",
        "size=4m",
        "; a note",
        "[a]",
        "time_based",
    ]
    assert job_text(job, Path("/r"), {"create_only": "1"}).count("create_only=1\n") == 3


def test_missing_fio_is_one_line_that_says_how_to_get_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from blocksnap.cli import main; main()"]
    done = subprocess.run(
        [*command, "compare", "--workload", f"fio:job={job_file(tmp_path)}"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "blocksnap: workload fio cannot run here: fio is not installed: apt install fio\n"


@needs_fio
def test_description_names_the_version_and_the_job(tmp_path: Path) -> None:
    described = parse_workload(f"fio:job={job_file(tmp_path)}").describe()
    assert json.dumps(described["versions"]).startswith('{"fio": "3.')
    assert described["parameters"] == {"job": str(tmp_path / "job.fio")}
