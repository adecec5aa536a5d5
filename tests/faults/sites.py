"""Where faults are injected into pools, and how many: python -m tests.faults.sites

Three lists: the calls of the io layer in the engine (tests/c/test_faults.c lets each request fail), the
system calls of a process on the files of a pool (operations.py lets each fail), and the failing calls of
tests/c/test_failing_*.c. What none of them reaches in csrc/ has a reason.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NOT_INJECTED", "Site", "count_calls", "count_requests", "injected", "sites"]

ROOT = Path(__file__).resolve().parents[2]
_REQUEST = re.compile(r"\b(io_(?:readv?|writev?|flush|punch))\(")
_SYSTEM_CALL = re.compile(
    r"(?<![\w.>])(p?(?:read|write)(?:v2?|64)?|fsync|fdatasync|syncfs|sync_file_range|fallocate|ftruncate|lseek"
    r"|copy_file_range|sendfile|splice|posix_fadvise|ioctl|io_uring\w+)\("
)

_PROGRAMS = ("test_failing_calls", "test_failing_system_calls")
"""What counts by the library that it calls in, not by place: files, memory, loop devices, mounts, ..."""

_BY_PROGRAM = "each fails in tests/c/test_failing_system_calls.c"
NOT_INJECTED = {
    "dm_guard.c": _BY_PROGRAM,
    "dm_ioctl.c": _BY_PROGRAM,
    "fuse_export.c": "requests of the kernel's FUSE: tests/c/test_fuse_export.c, tests/test_kill.py end it",
    "loop.c": _BY_PROGRAM,
    "mount.c": _BY_PROGRAM,
    "text_output.c": "text for a reader that may be gone: tests/c/test_thin_dump.c",
    "thin_commit.c write": "an event counter in memory",
    "io_file.c lseek": "the size of an open file, which asks no disk",
    "io_file.c ioctl": "the sector size, 4096 without an answer",
    "io_file.c posix_fadvise": "a hint",
}
"""Why neither list has a file's system calls, or one call in it."""


@dataclass(frozen=True, slots=True)
class Site:
    """A line of csrc/ that makes a request of the io layer, or a system call."""

    file: str
    line: int
    call: str

    @property
    def is_request(self) -> bool:
        return self.call.startswith("io_")

    @property
    def reason(self) -> str | None:
        return NOT_INJECTED.get(f"{self.file} {self.call}", NOT_INJECTED.get(self.file))

    def __str__(self) -> str:
        return f"csrc/{self.file}:{self.line} {self.call}"


def sites() -> Iterator[Site]:
    """Yield every such line, by file."""
    for path in sorted((ROOT / "csrc").glob("*.c")):
        in_comment = False
        for number, text in enumerate(path.read_text().splitlines(), 1):
            in_comment = (in_comment or text.lstrip().startswith("/*")) and "*/" not in text
            if in_comment or text.lstrip().startswith(("/*", "*", "//", "static ")):
                continue
            for pattern in (_REQUEST, _SYSTEM_CALL):
                for found in pattern.finditer(re.sub(r'"[^"]*"', '""', text)):
                    yield Site(path.name, number, found[1])


def _run(directory: Path, program: str) -> str:
    """Build a C test in a directory and return what it prints."""
    configure = [
        "cmake",
        "-S",
        str(ROOT / "csrc"),
        "-B",
        str(directory),
        "-G",
        "Ninja",
        "-DBLOCKSNAP_TESTS=ON",
    ]
    options = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_C_FLAGS=-O1 -g"]
    for command in ([*configure, *options], ["cmake", "--build", str(directory), "--target", program]):
        subprocess.run(command, check=True, capture_output=True)
    return subprocess.run([directory / program], check=True, capture_output=True, text=True).stdout


def count_requests(directory: Path) -> dict[tuple[str, int], int]:
    """Build and run test_faults in a directory; return the faults by file and line."""
    told = _run(directory, "test_faults")
    found: Counter[tuple[str, int]] = Counter()
    for place in told.split(" faults at ")[1:]:
        before = told.partition(" faults at " + place)[0].rsplit(None, 1)[-1]
        frames = re.findall(r" at (\w+\.[ch]):(\d+)", " at " + place.partition(" at ")[2])
        file, line = next(frame for frame in frames if frame[0] != "io.h")
        found[file, int(line)] += int(before)
    return dict(found)


def run_preloaded(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python with fail_io.c, built in a directory."""
    library = directory / "fail_io.so"
    source = Path(__file__).with_name("fail_io.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "LD_PRELOAD": str(library)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def count_calls(directory: Path) -> dict[str, Counter[str]]:
    """Run the operations; return, for each, the faults by "CALL FILE"."""
    done = run_preloaded(directory, "-m", "tests.faults.operations")
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: Counter(calls) for name, calls in json.loads(done.stdout).items()}


def injected(site: Site, requests: dict[tuple[str, int], int], calls: dict[str, Counter[str]]) -> int:
    """Return how many faults a site got."""
    if site.is_request:
        direct = requests.get((site.file, site.line), 0)
        return direct or (
            _reads_of_walks(calls) if site.file.startswith(("metadata_reader", "thin_repair")) else 0
        )
    if site.reason is not None:
        return 0
    return sum(
        count
        for counted in calls.values()
        for call, count in counted.items()
        if call.split()[0] == site.call and call.split()[1] in ("metadata", "data", "metadata.repaired.new")
    )


def _reads_of_walks(calls: dict[str, Counter[str]]) -> int:
    """Return the faults of the read-only walks, whose io layer is a file, by its system calls."""
    return sum(calls[name]["pread metadata"] for name in ("check", "walks", "repair"))


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        requests, calls = count_requests(Path(directory)), count_calls(Path(directory))
        others = [line for program in _PROGRAMS for line in _run(Path(directory), program).splitlines()]
    print("calls of csrc/")
    for site in sites():
        count = injected(site, requests, calls)
        direct = not site.is_request or (site.file, site.line) in requests
        together = "" if direct else " of all walks together"
        print(f"  {site!s:42} {f'{count} faults{together}' if count else f'- {site.reason}'}")
    print("system calls of a process on the files of a pool")
    for name, counted in calls.items():
        print(f"  {name}: {counted.total()} faults")
        for call, count in sorted(counted.items()):
            print(f"    {call:42} {count}")
    print("failing calls of libraries and of the kernel in the C tests", *others, sep="\n  ")
    total = (
        sum(requests.values()),
        sum(counted.total() for counted in calls.values()),
        sum(map(int, re.findall(r"(\d+) failures", "\n".join(others)))),
    )
    print(
        f"{sum(total)} faults, all survived: {total[0]} requests of the engine,"
        f" {total[1]} system calls on a pool's files, {total[2]} failing calls"
    )


if __name__ == "__main__":
    main()
