"""Makes tests/traces/golden.json, what the model says of the carried traces, with the slow model:

python -m tests.golden_traces
"""

import json
from pathlib import Path
from typing import Any

from blocksnap.traces import Requests
from tests.slow_model import SlowModel, requests_of
from tests.trace_files import CARRIED, read

__all__ = ["BLOCK_SIZES", "GOLDEN", "TRACES", "slow_table"]

GOLDEN = CARRIED / "golden.json"

SECOND = 10**9

TRACES: dict[str, dict[str, Any]] = {
    "sqlite-wal.blktrace.xz": {"snapshot_writes": 100, "fresh": True},
    "sqlite-delete.blktrace.xz": {"snapshot_ns": SECOND // 2, "fresh": True},
    "layers.blktrace.xz": {"snapshot_writes": 2000},
    "pgbench.blktrace.xz": {"snapshot_ns": SECOND},
    "cloudPhysicsIO.vscsi.xz": {"snapshot_bytes": 256 << 20},
    "tpcc-small.trace.zst": {"snapshot_writes": 250},
}
"""The carried traces and when a snapshot is taken."""

BLOCK_SIZES = [4096 << step for step in range(11)]


def slow_table(requests: Requests, block_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return counts and epochs at one block size; metadata are committed at flushes and snapshots."""
    model = SlowModel(block_size, device_bytes=_device_bytes(requests), **options)
    model.feed(requests_of(requests))
    return {**model.result(), "epochs": [list(epoch) for epoch in model.epochs()]}


def _device_bytes(requests: Requests) -> int:
    placed = requests[requests["length"] > 0]
    return int((placed["offset"] + placed["length"]).max())


def main() -> None:
    golden = {}
    for name, options in TRACES.items():
        requests = read(CARRIED / name)
        tables = [slow_table(requests, size, options) for size in BLOCK_SIZES]
        golden[name] = {"requests": len(requests), "options": options, "tables": tables}
    Path(GOLDEN).write_text(_compact(golden))


def _compact(golden: dict[str, Any]) -> str:
    """Return JSON with a line a block size."""
    parts = []
    for name, trace in golden.items():
        lines = ",\n  ".join(json.dumps(table, separators=(",", ":")) for table in trace["tables"])
        head = json.dumps({"requests": trace["requests"], "options": trace["options"]})[:-1]
        parts.append(f'"{name}": {head}, "tables": [\n  {lines}]}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
