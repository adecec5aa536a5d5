"""The C tests catch every bug that is seeded into the code that writes pools."""

import shutil
from pathlib import Path

import pytest

from tests.seeded_bugs import BUGS, SUITES, Bug, build, catch, run

needs_compiler = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("gcc") is None, reason="needs cmake and gcc"
)


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("seeded-bugs"))


def test_there_are_at_least_30_seeded_bugs() -> None:
    assert len({bug.name for bug in BUGS}) >= 30


@needs_compiler
@pytest.mark.parametrize("suite", SUITES, ids="-".join)
def test_suite_passes_without_a_bug(suites: Path, suite: tuple[str, ...]) -> None:
    assert run(suites, suite, 0) is None


@needs_compiler
@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_seeded_bug_is_caught(suites: Path, bug: Bug) -> None:
    found = catch(suites, bug)
    assert found is not None, f"no suite catches it: {bug.what}"


@needs_compiler
def test_missing_metadata_flush_shows_within_a_thousand_crash_states(suites: Path) -> None:
    flush = next(bug for bug in BUGS if bug.name == "METADATA_NOT_FLUSHED")
    assert run(suites, ("test_crash", "1000"), flush.number) is not None
