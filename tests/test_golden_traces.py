"""The golden tables of the carried traces, made by the slow model: the C model says the same, to the byte."""

import json
from typing import Any

import pytest

from blocksnap.amplification.model import CowModel, SnapshotEvery
from tests.golden_traces import BLOCK_SIZES, GOLDEN, SECOND, TRACES, slow_table
from tests.trace_files import CARRIED, read

GOLDEN_TABLES: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text())
QUICK = ["sqlite-wal.blktrace.xz", "tpcc-small.trace.zst"]


def snapshot_every(options: dict[str, Any]) -> SnapshotEvery:
    nanoseconds = options.get("snapshot_ns")
    return SnapshotEvery(
        writes=options.get("snapshot_writes"),
        bytes=options.get("snapshot_bytes"),
        seconds=nanoseconds / SECOND if nanoseconds else None,
    )


@pytest.mark.parametrize("name", TRACES)
def test_c_model_reproduces_the_golden_table(name: str) -> None:
    golden = GOLDEN_TABLES[name]
    requests = read(CARRIED / name)
    assert len(requests) == golden["requests"]
    ends = (requests["offset"] + requests["length"])[requests["length"] > 0]
    with CowModel(
        BLOCK_SIZES,
        fresh=golden["options"].get("fresh", False),
        snapshot_every=snapshot_every(golden["options"]),
        commit_seconds=0,
        device_size=int(ends.max()),
    ) as model:
        model.feed(requests)
        for result, table in zip(model.results(), golden["tables"], strict=True):
            row = result.as_dict()
            assert {key: row[key] for key in table if key != "epochs"} == {
                key: value for key, value in table.items() if key != "epochs"
            }
            assert [list(epoch) for epoch in model.epochs(result.block_size).tolist()] == table["epochs"]


@pytest.mark.parametrize("name", QUICK)
def test_slow_model_still_makes_the_golden_table(name: str) -> None:
    requests = read(CARRIED / name)
    tables = [slow_table(requests, size, TRACES[name]) for size in BLOCK_SIZES]
    assert tables == GOLDEN_TABLES[name]["tables"]
