"""Power cuts during operations on a pool: pool and catalog always agree, what was acknowledged is there.

    python -m tests.crash.test_catalog_states [STATES [SEED]]
    python -m tests.crash.test_catalog_states replay RECORDING POSITION CUT SEED

Two threads write: a workload does not run twice alike. So the recording of one with a wrong state is kept,
and the second command looks at that state again.
"""

import json
import pickle
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blocksnap import metadata
from blocksnap.errors import BlocksnapError
from blocksnap.pool import Pool
from tests.crash.catalog_workload import BLOCK, BLOCKS, BUSY
from tests.crash.recording import Cut, Kind, Recording, build_recorder, record

STEPS = 40
STATES_A_WORKLOAD = 250

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


@dataclass(slots=True)
class Expectation:
    """What may be there: the devices before or after the operation under way, and the busy device's value."""

    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    flushed: int = 0
    written: int = 0
    started: bool = False


def expectation(recording: Recording, position: int) -> Expectation:
    """Read the marks up to a position."""
    found = Expectation()
    for change in recording.changes[:position]:
        if change.file != "marks" or change.kind is not Kind.WRITE:
            continue
        mark = json.loads(change.content)
        match mark["what"]:
            case "begin":
                found.after = mark["devices"]
            case "end":
                found.before = found.after = mark["devices"]
                found.started = True
            case "write":
                found.before = found.after = mark["devices"]
            case "busy":
                found.written = mark["value"]
            case "flushed":
                found.flushed = mark["value"]
    return found


def sectors_are_right(content: bytes, values: list[list[int]]) -> bool:
    sectors = np.frombuffer(content, np.uint8).reshape(BLOCKS, -1, 512)
    uniform = (sectors == sectors[:, :, :1]).all()
    allowed = [np.isin(block[:, 0], possible).all() for block, possible in zip(sectors, values, strict=True)]
    return bool(uniform and all(allowed))


def is_as(pool: Pool, devices: dict[str, Any]) -> bool:
    """Return whether the pool holds exactly these devices with these sizes, labels and contents."""
    present = {device.name: device for device in pool.devices() if device.name != BUSY}
    if present.keys() != devices.keys():
        return False
    for name, expected in devices.items():
        device = present[name]
        if (device.size, dict(device.labels)) != (expected["size"], expected["labels"]):
            return False
        if not sectors_are_right(device.read(0, BLOCKS * BLOCK), expected["values"]):
            return False
    return True


def judge(directory: Path, files: dict[str, bytes], expected: Expectation) -> str:
    """Return what is wrong with a state; nothing if it is right."""
    for name, content in files.items():
        (directory / name).write_bytes(content)
    with Pool.open(directory) as pool:
        if {info.id for info in pool._engine.devices()} != {device.id for device in pool.devices()}:
            return "pool and catalog name different devices"
        if expected.started and not (is_as(pool, expected.before) or is_as(pool, expected.after)):
            return f"devices are {[device.name for device in pool.devices()]}, not as before or after"
        busy = np.frombuffer(pool.device(BUSY).read(0, BLOCK), "<u4")
        if busy.min() < expected.flushed or busy.max() > expected.written:
            return f"busy has {busy.min()}..{busy.max()}, possible {expected.flushed}..{expected.written}"
    findings = metadata.check(directory / "metadata").findings
    return "; ".join(map(str, findings))


@contextmanager
def memory_directory() -> Iterator[Path]:
    """Give a directory where syncs cost nothing, if there is one."""
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="blocksnap-catalog-states-", dir=shared) as directory:
        yield Path(directory)


def record_workload(directory: Path, recorder: Path, seed: int) -> Recording:
    path = directory / "pool"
    with Pool.create(path, size="400K", block_size=BLOCK, metadata_size="512K") as pool:
        pool.create_device(BUSY, BLOCK)
    program = ["-m", "tests.crash.catalog_workload", str(path), str(seed), str(STEPS)]
    return record(recorder, path, directory / "log", program)


def explore(states: int, seed: int) -> int:
    """Judge states of one workload; return how many were different cuts."""
    rng = random.Random(seed)
    with memory_directory() as directory:
        recording = record_workload(directory, build_recorder(directory), seed)
        assert not [change for change in recording.changes if change.kind is Kind.NAME]
        positions = len(recording.changes)
        for number in range(states):
            position = rng.randint(1, positions)
            cut, state_seed = Cut(number % 3), rng.randrange(1 << 32)
            wrong = judge_state(directory, recording, position, cut, state_seed)
            if wrong:
                kept = keep(recording)
                raise AssertionError(f"{wrong}: replay {kept} {position} {cut.name} {state_seed}")
    return positions


def judge_state(directory: Path, recording: Recording, position: int, cut: Cut, state_seed: int) -> str:
    """Return what is wrong with a state, be it that the pool cannot be opened."""
    with tempfile.TemporaryDirectory(dir=directory) as state:
        try:
            files = recording.state(position, cut, state_seed)
            return judge(Path(state), files, expectation(recording, position))
        except BlocksnapError as error:
            return str(error)


def keep(recording: Recording) -> str:
    with tempfile.NamedTemporaryFile(prefix="blocksnap-recording-", delete=False) as file:
        pickle.dump(recording, file)
    return file.name


def replay(kept: str, position: str, cut: str, state_seed: str) -> None:
    recording = pickle.loads(Path(kept).read_bytes())
    with memory_directory() as directory:
        print(
            judge_state(directory, recording, int(position), Cut[cut], int(state_seed)) or "nothing is wrong"
        )


@needs_compiler
@pytest.mark.parametrize("seed", range(1, 5))
def test_every_cut_leaves_pool_and_catalog_in_agreement(seed: int) -> None:
    assert explore(STATES_A_WORKLOAD, seed) > 100


def main(states: int = 1000, seed: int = 1) -> None:
    done = 0
    while done < states:
        explore(STATES_A_WORKLOAD, seed)
        done += STATES_A_WORKLOAD
        seed += 1
    print(f"{done} crash states of pool and catalog, all recovered")


if __name__ == "__main__":
    if sys.argv[1:2] == ["replay"]:
        replay(*sys.argv[2:])
    else:
        main(*map(int, sys.argv[1:]))
