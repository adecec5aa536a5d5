"""200 random sequences of operations on pools that go from engine to engine and back."""

import subprocess
import sys
from pathlib import Path

import pytest

from blocksnap.device_mapper import Control
from blocksnap.mount import loop_devices
from tests.kernel.devices import leftovers
from tests.thin_tools import needs_thin_tools

# Files cost more than devices, which need no loop device for each hop: few of the pools are made of them.
GROUPS = [("files", 10)] * 2 + [("devices", 15)] * 12
SEEDS = [range(sum(n for _, n in GROUPS[:i]), sum(n for _, n in GROUPS[: i + 1])) for i in range(len(GROUPS))]


def test_there_are_200_sequences() -> None:
    assert sum(len(seeds) for seeds in SEEDS) == 200


@needs_thin_tools
@pytest.mark.parametrize(
    ("kind", "seeds"),
    [(kind, seeds) for (kind, _), seeds in zip(GROUPS, SEEDS, strict=True)],
    ids=[f"{kind} {seeds[0]}-{seeds[-1]}" for (kind, _), seeds in zip(GROUPS, SEEDS, strict=True)],
)
def test_pools_go_from_engine_to_engine_unharmed(
    control: Control, tmp_path: Path, kind: str, seeds: range
) -> None:
    command = [sys.executable, "-m", "tests.kernel.round_trip", kind, *map(str, seeds)]
    done = subprocess.run(
        ["env", f"TMPDIR={tmp_path}", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert leftovers(control) == []
    assert loop_devices() == []
