"""fio job files as they are, but for where their files lie: below the root of the container.

fio lays the files of a job out before it starts; that is done once, in the image (with `overwrite`, so that
they have contents), and the job then works on files that it shares with the image. What fio counted is what
the application wrote, whatever I/O engine wrote it. `directory` is replaced; other names must be relative.
"""

import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from .child_process import WorkloadError, run_program
from .latency import Samples
from .workload import Check, Counted, Outcome, Workload

__all__ = ["FioWorkload", "job_text"]

_MIB = 1 << 20
_INCLUDES_DEEP = 8
_SECTION = re.compile(r"\s*\[(.*)\]\s*$")
_OPTION = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*?)\s*$")
_INCLUDE = re.compile(r"\s*include\s+(.+?)\s*$")
_PLACES = ("filename", "filename_format", "opendir")


class _JobError(Exception):
    """A job file that cannot be used, in words."""


@dataclass(frozen=True, slots=True)
class FioWorkload(Workload):
    """A job file, run by the fio that is installed."""

    ROOM: ClassVar[int] = 1024 * _MIB
    COUNTED: ClassVar[Counted] = Counted(
        "what fio reports as written (io_bytes), whatever I/O engine wrote it",
        "every write of the jobs",
        "laying out the files, which is done in the image; fio's own logs",
    )

    def missing(self) -> str | None:
        return None if shutil.which("fio") else "fio is not installed: apt install fio"

    def problem(self) -> str | None:
        if not self.parameters["job"]:
            return "name a job file: fio:job=PATH"
        try:
            text = job_text(self._job, Path("/"), {})
        except (OSError, UnicodeDecodeError, _JobError) as error:
            return f"{self._job}: {getattr(error, 'strerror', None) or error}"
        with tempfile.TemporaryDirectory(prefix="blocksnap-fio-") as directory:
            copy = Path(directory) / self._job.name
            copy.write_text(text)
            command = ["fio", "--parse-only", str(copy)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        return None if done.returncode == 0 else f"{self._job}: fio refuses it: {_complaint(done.stderr)}"

    def versions(self) -> dict[str, str]:
        said = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout
        return {"fio": said.strip().removeprefix("fio-")}

    @property
    def _job(self) -> Path:
        return Path(str(self.parameters["job"])).absolute()

    def stage(self, directory: Path, *, check: Check = lambda: None) -> Self:
        tree = directory / "tree"
        tree.mkdir()
        self._run(tree, check, {"create_only": "1", "overwrite": "1"})
        return replace(self, base=replace(self.base, tree=tree))

    def run(self, root: Path, *, epoch: int = 0, check: Check = lambda: None) -> Outcome:  # noqa: ARG002
        return _outcome(self._run(root, check, {}))

    def _run(self, root: Path, check: Check, more: Mapping[str, str]) -> dict[str, Any]:
        """Run the job with its files in root and return fio's report."""
        with tempfile.TemporaryDirectory(prefix="blocksnap-fio-") as name:
            copy, report = Path(name) / self._job.name, Path(name) / "report"
            copy.write_text(job_text(self._job, root, more))
            command = ["fio", "--output-format=json+", f"--output={report}", f"--aux-path={name}", str(copy)]
            done = run_program(command, check, isolated=True, cwd=str(self._job.parent))
            printed = report.read_text(errors="replace") if report.exists() else ""
        if done.returncode != 0:
            reason = _complaint(done.stderr) or _complaint(printed) or f"status {done.returncode}"
            raise WorkloadError(f"workload {self.name}: fio on {self._job.name} failed: {reason}")
        report_text = printed[printed.find("{") :]
        parsed: dict[str, Any] = json.loads(report_text)
        return parsed


def job_text(job: Path, root: Path, more: Mapping[str, str]) -> str:
    """Return a job file with its files in root and with more options in every section.

    Raises OSError when it cannot be read and _JobError for a name that leads out of root.
    """
    place = str(root).replace("\\", "\\\\").replace(":", "\\:")
    options = [f"{name}={value}" for name, value in more.items()]
    lines = ["[global]", f"directory={place}"]
    for line in _lines(job, _INCLUDES_DEEP):
        if _SECTION.match(line):
            lines += options
        lines.append(line)
    return "\n".join([*lines, *options]) + "\n"


def _lines(job: Path, deep: int) -> Iterator[str]:
    for number, line in enumerate(job.read_text().splitlines(), 1):
        if (include := _INCLUDE.match(line)) is not None:
            if deep == 0:
                raise _JobError(f"line {number}: includes are nested too deep")
            yield from _lines(job.parent / include[1], deep - 1)
            continue
        option = _OPTION.match(line)
        if option is not None and option[1] in _PLACES and _leads_out(option[2]):
            raise _JobError(f"line {number}: {option[1]}={option[2]} lies outside of the container")
        if option is None or option[1] != "directory":
            yield line


def _leads_out(names: str) -> bool:
    return any(name.startswith("/") or ".." in Path(name).parts for name in names.split(":"))


def _complaint(text: str) -> str:
    """Return the line in which fio says why: the first that is no consequence of another."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith(("{", '"', "Did you mean"))]
    return causes[0].removeprefix("fio: ") if causes else ""


def _outcome(report: Mapping[str, Any]) -> Outcome:
    """Add up the jobs; each gives its bytes, and how many of its requests took how long."""
    jobs: Sequence[Mapping[str, Any]] = report["jobs"]
    waits: Counter[float] = Counter()
    for job in jobs:
        for way in ("read", "write"):
            for nanoseconds, count in job[way]["clat_ns"].get("bins", {}).items():
                waits[int(nanoseconds) / 1e9] += count
    samples = Samples(tuple(waits), tuple(waits.values())) if waits else None
    return Outcome(
        seconds=max((job["job_runtime"] for job in jobs), default=0) / 1e3,
        application_bytes=sum(job["write"]["io_bytes"] for job in jobs),
        samples=samples,
    )
