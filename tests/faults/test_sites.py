"""Every call that a device can fail, fails in the tests; what does not has a reason."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.operations import OPERATIONS
from tests.faults.sites import NOT_INJECTED, count_calls, count_requests, injected, sites

needs_compiler = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("cmake", "ninja", "gcc", "addr2line")),
    reason="needs cmake, ninja, gcc and addr2line",
)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counter[str]]:
    return count_calls(tmp_path_factory.mktemp("calls"))


@needs_compiler
def test_each_system_call_on_the_files_of_a_pool_fails_and_is_survived(
    calls: dict[str, Counter[str]],
) -> None:
    assert calls.keys() == OPERATIONS.keys()
    assert all(counted.total() > 0 for counted in calls.values())
    print(f"{sum(counted.total() for counted in calls.values())} faults, all survived")


@needs_compiler
def test_each_call_of_the_io_layer_is_injected_or_has_a_reason(
    calls: dict[str, Counter[str]], tmp_path: Path
) -> None:
    requests = count_requests(tmp_path)
    missed = [str(site) for site in sites() if not injected(site, requests, calls) and site.reason is None]
    assert missed == []


def test_each_reason_is_that_of_a_call() -> None:
    used = {name for site in sites() for name in (site.file, f"{site.file} {site.call}")}
    assert NOT_INJECTED.keys() <= used
