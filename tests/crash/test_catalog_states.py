"""Power cuts during operations on a pool: pool and catalog always agree, what was acknowledged is there.

    python -m tests.crash.test_catalog_states [STATES [SEED]]
    python -m tests.crash.test_catalog_states replay RECORDING POSITION CUT SEED

Two threads write: a workload does not run twice alike. So the recording of one with a wrong state is kept,
and the second command looks at that state again.
"""

import pickle
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap.pool import Pool
from tests.crash.catalog_workload import BLOCK, BUSY
from tests.crash.pool_states import expectation, judge
from tests.crash.recording import Cut, Kind, Recording, build_recorder, record

STEPS = 40
STATES_A_WORKLOAD = 250

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


def marks_before(recording: Recording, position: int) -> Iterator[bytes]:
    for change in recording.changes[:position]:
        if change.file == "marks" and change.kind is Kind.WRITE:
            yield change.content


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
    """Return what is wrong with a state, nothing if it is right."""
    with tempfile.TemporaryDirectory(dir=directory) as state:
        for name, content in recording.state(position, cut, state_seed).items():
            Path(state, name).write_bytes(content)
        return judge(Path(state), expectation(marks_before(recording, position)), BLOCK)


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
