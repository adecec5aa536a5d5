"""The engine beside its peers, in one run on one backing: ratios and the figures behind them.

    cmake -S csrc -B build/bench -DBLOCKSNAP_BENCH=ON -DCMAKE_BUILD_TYPE=Release
    cmake --build build/bench
    python bench/side_by_side.py [--directory /dev/shm] [--json]

Each line carries the bar that the project holds itself to. What is inside and outside: bench/README.md.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

ENGINE = Path(__file__).parent.parent / "build" / "bench" / "bench_engine"
COPY_BLOCKS = 8192
ROUNDS = 3

# name of the engine's figure -> (least ratio to the peer) or (greatest value)
BARS = {
    "4K random write, mapped, against pwrite on the same file": "ratio >= 0.8",
    "4K random read, 128 snapshots deep, against one": "ratio >= 0.95",
    "first 4K write to shared 64K blocks, against qcow2 at depth 1": "ratio >= 2",
    "snapshot of a fully written device, 10 GiB": "< 1000 us",
    "peak memory at open": "< 200 MiB",
    "peak memory after 200,000 random reads": "< 200 MiB",
}


def run(*command: str | Path) -> str:
    """Return what a command prints; its failure is ours."""
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def qcow2_first_writes(directory: Path, depth: int) -> float:
    """Return first 4K writes a second to 64K clusters over a full backing file, best of some rounds."""
    base, overlay = directory / "base.qcow2", directory / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=65536", base, "512M")
    run("qemu-img", "bench", "-f", "qcow2", "-w", "-c", str(COPY_BLOCKS), "-s", "65536", "-S", "65536", base)
    best = 0.0
    for _ in range(ROUNDS):
        overlay.unlink(missing_ok=True)
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            base,
            "-o",
            "cluster_size=65536",
            overlay,
        )
        command = ["qemu-img", "bench", "-f", "qcow2", "-w", "-c", str(COPY_BLOCKS), "-d", str(depth)]
        text = run(*command, "-s", "4096", "-S", "65536", "-o", "8192", overlay)
        found = re.search(r"completed in ([0-9.]+) seconds", text)
        if found is None:
            raise SystemExit(f"qemu-img bench said: {text}")
        best = max(best, COPY_BLOCKS / float(found.group(1)))
    base.unlink()
    overlay.unlink()
    return best


def measure(directory: Path) -> list[dict[str, Any]]:
    """Run the engine's benchmarks, then qemu on the same directory."""
    figures: list[dict[str, Any]] = [json.loads(line) for line in run(ENGINE, directory).splitlines()]
    for figure in figures:
        if figure["name"] == "first 4K write to shared 64K blocks":
            copies = figure["ours"]
    for depth in (1, 8):
        peer = qcow2_first_writes(directory, depth)
        name = f"first 4K write to shared 64K blocks, against qcow2 at depth {depth}"
        figures.append({"name": name, "ours": copies, "peer": peer, "unit": "1/s", "ratio": copies / peer})
    return figures


def table_of(figures: list[dict[str, Any]]) -> Table:
    """Return the figures as a table with their bars."""
    table = Table("what", "ours", "peer", "unit", "ratio", "bar")
    for figure in figures:
        peer = f"{figure['peer']:,.0f}" if "peer" in figure else ""
        ratio = f"{figure['ratio']:.2f}" if "ratio" in figure else ""
        table.add_row(
            figure["name"],
            f"{figure['ours']:,.1f}",
            peer,
            figure["unit"],
            ratio,
            BARS.get(figure["name"], ""),
        )
    return table


def main(
    directory: Annotated[
        Path, typer.Option(help="where the files go: 12 GiB, tmpfs shows the engine best")
    ] = Path("/dev/shm"),
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure and print."""
    if not ENGINE.exists():
        raise SystemExit(f"{ENGINE} is not built: see the top of {__file__}")
    with tempfile.TemporaryDirectory(dir=directory, prefix="blocksnap-bench-") as work:
        figures = measure(Path(work))
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        Console().print(table_of(figures))


if __name__ == "__main__":
    typer.run(main)
