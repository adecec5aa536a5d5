"""Our metadata walks beside thin-provisioning-tools on the same images: wall time, CPU time and memory.

    python -m bench.bench_metadata_tools [--mappings 10000000] [--runs 3] [--directory /dev/shm] [--json]

Compared are check with thin_check, dump with thin_dump, delta (first against last device) with
thin_delta, usage with thin_ls, repair with thin_repair; text goes to /dev/null. Each figure is the best
of the runs, taken in turns. Caveats: thin_check 0.9.0 checks less (no data counts, no sharing),
thin_repair 0.9.0 shares no nodes between devices; ours runs in a Python process, of which time and memory
before the call are left out; peaks of the tools are sampled; the images are in the page cache, so it is a
measure of CPU. Only the ratios mean anything on another machine.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from blocksnap import metadata, metadata_repair
from tests.thin_image import build
from tests.thin_xml import history

LAYOUTS: dict[str, tuple[int, int]] = {
    # snapshots, longest run of blocks
    "8 snapshots": (8, 32),
    "64 snapshots": (64, 32),
    "8 snapshots, fragmented": (8, 1),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """seconds of wall and CPU time, MiB of memory at the peak."""

    wall: float
    cpu: float
    peak: float


@dataclass(frozen=True, slots=True)
class Comparison:
    layout: str
    walk: str
    ours: Cost
    theirs: Cost

    @property
    def ratio(self) -> float:
        """How many times as long the tool takes."""
        return self.theirs.wall / max(self.ours.wall, 1e-9)


@dataclass(frozen=True, slots=True)
class Walk:
    """One of ours and the command that does the same."""

    name: str
    ours: Callable[[Path, int, int], object]
    theirs: list[str]


WALKS = [
    Walk("check", lambda path, _last, null: metadata.check(path, null), ["thin_check", "-q"]),
    Walk("dump", lambda path, _last, null: metadata.dump(path, null), ["thin_dump"]),
    Walk(
        "delta",
        lambda path, last, null: metadata.write_delta(path, 1, last, null),
        ["thin_delta", "--thin1", "1", "--thin2", "{last}"],
    ),
    Walk(
        "usage",
        lambda path, _last, _null: metadata.usage(path),
        ["thin_ls", "--no-headers", "-o", "DEV,MAPPED_BLOCKS,EXCLUSIVE_BLOCKS"],
    ),
    Walk(
        "repair",
        lambda path, _last, _null: metadata_repair.repair(path, _empty_output(path)),
        ["thin_repair", "-o", "{output}", "-i"],
    ),
]


def _empty_output(path: Path) -> Path:
    """Return a file for repaired metadata, with room for nodes that are not shared any more."""
    output = path.with_suffix(".repaired")
    with output.open("wb") as file:
        file.truncate(4 * path.stat().st_size)
    return output


def _memory(process: int | str, field: str) -> float:
    """Return a figure of /proc in MiB; 0 for a process that has ended."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return 0.0


def report_ours(name: str, path: str, last: int) -> None:
    """Print the cost of one walk in this process as JSON."""
    walk = next(walk for walk in WALKS if walk.name == name)
    null = os.open(os.devnull, os.O_WRONLY)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, cpu, wall = _memory("self", "VmRSS"), time.process_time(), time.perf_counter()
    walk.ours(Path(path), last, null)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps([wall, cpu, _memory("self", "VmHWM") - before]))


def _in_fresh_python(call: str) -> str:
    """Evaluate a call of this module in a process whose memory is its own."""
    code = f"from bench import bench_metadata_tools as bench; bench.{call}"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def cost_of_ours(walk: Walk, path: Path, last: int) -> Cost:
    """Run one of our walks."""
    return Cost(*json.loads(_in_fresh_python(f"report_ours({walk.name!r}, {str(path)!r}, {last})")))


def cost_of_theirs(walk: Walk, path: Path, last: int) -> Cost:
    """Run a tool and take what the kernel counted for it."""
    command = [part.format(last=last, output=_empty_output(path)) for part in walk.theirs]
    peak, wall = 0.0, time.perf_counter()
    process = subprocess.Popen([*command, path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        # The kernel's own peak of a child would include its parent's before exec.
        peak = max(peak, _memory(process.pid, "VmHWM"))
        time.sleep(0.002)
    wall = time.perf_counter() - wall
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{command[0]} failed with status {process.returncode}")
    return Cost(wall, used.ru_utime + used.ru_stime, peak)


def best(costs: list[Cost]) -> Cost:
    """Return the least of each figure."""
    return Cost(min(c.wall for c in costs), min(c.cpu for c in costs), min(c.peak for c in costs))


def compare(layout: str, path: Path, last: int, runs: int) -> Iterator[Comparison]:
    """Yield the comparison of every walk that has its tool here."""
    for walk in WALKS:
        if shutil.which(walk.theirs[0]) is None:
            sys.stderr.write(f"{walk.name}: skipped, needs {walk.theirs[0]} of thin-provisioning-tools\n")
            continue
        ours, theirs = [], []
        for _ in range(runs):
            ours.append(cost_of_ours(walk, path, last))
            theirs.append(cost_of_theirs(walk, path, last))
        yield Comparison(layout, walk.name, best(ours), best(theirs))


def make_image(layout: str, mappings: int, path: str) -> None:
    """Write the metadata of a layout; print the id of its last device."""
    snapshots, longest_run = LAYOUTS[layout]
    pool = history(7, snapshots=snapshots, mappings=mappings // (snapshots + 1), longest_run=longest_run)
    build(pool).save(Path(path))
    print(pool.devices[-1].id)


def show(one: Comparison) -> None:
    print(
        f"{one.layout:24} {one.walk:6}"
        f" {one.ours.wall:7.3f} {one.ours.cpu:7.3f} {one.ours.peak:6.1f}"
        f" {one.theirs.wall:8.3f} {one.theirs.cpu:7.3f} {one.theirs.peak:6.1f} {one.ratio:8.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mappings", type=int, default=10_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", default="/dev/shm")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = []
    if not options.json:
        print(f"{'':31} {'ours: s, cpu s, MiB':>22} {'thin tools: s, cpu s, MiB':>25} {'ratio':>7}")
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for layout in LAYOUTS:
            path = Path(directory) / "metadata"
            last = int(_in_fresh_python(f"make_image({layout!r}, {options.mappings}, {str(path)!r})"))
            for one in compare(layout, path, last, options.runs):
                found.append(one)
                if not options.json:
                    show(one)
    if options.json:
        print(json.dumps([{**asdict(one), "ratio": one.ratio} for one in found], indent=2))


if __name__ == "__main__":
    main()
