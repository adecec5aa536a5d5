"""Power cuts of the kernel engine, at each flush and between: all that its disk can hold is recovered."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.log_states import (
    STATES_A_WORKLOAD,
    WrongStateError,
    explore,
    memory_directory,
    record,
    replay,
)
from tests.kernel.log_writes import DiskLog, Flag
from tests.kernel.user_mode import missing
from tests.thin_tools import needs_thin_tools

pytestmark = [
    pytest.mark.skipif(missing() != "", reason=f"needs {missing()}"),
    needs_thin_tools,
    pytest.mark.timeout(600),
]


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as made:
        yield made


@pytest.fixture(scope="module", params=[1, 2])
def log(request: pytest.FixtureRequest) -> Iterator[DiskLog]:
    with memory_directory() as made:
        yield record(made, request.param)


def test_every_cut_leaves_pool_and_catalog_in_agreement(log: DiskLog, directory: Path) -> None:
    flushes = sum(bool(entry.flags & (Flag.FLUSH | Flag.FUA)) for entry in log.entries)
    assert flushes > 100
    states = explore(directory, log, seed=1)
    assert states >= STATES_A_WORKLOAD
    print(f"{states} states of {len(log.entries)} entries, {flushes} of them flushes")


def test_disk_that_ignores_flushes_is_found_out_and_shown_again(
    log: DiskLog, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WrongStateError) as wrong:
        explore(directory, replace(log, flushes=False), seed=1)
    what, _, again = str(wrong.value).rpartition(": replay ")
    kept, *words = again.split()
    replay(kept, *words)
    Path(kept).unlink()
    assert capsys.readouterr().out.strip() == what
