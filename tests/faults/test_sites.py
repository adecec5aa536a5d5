"""Every call that a device can fail, fails in the tests; what does not has a reason."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from blocksnap.pool import Pool
from tests.faults.operations import OPERATIONS
from tests.faults.sites import NOT_INJECTED, count_calls, count_requests, injected, run_preloaded, sites

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


REPAIR_WITH_A_FAILED_READ = """
import ctypes, errno, os, sys
from blocksnap import pool_repair

path = sys.argv[1]
calls = ctypes.CDLL(None)
calls.fail_io_name.restype = ctypes.c_char_p
calls.fail_io_arm(os.fsencode(path), -1, errno.EIO, False)
os.unlink(pool_repair.repair(path).metadata)
calls.fail_io_disarm()
names = [calls.fail_io_name(number) for number in range(calls.fail_io_count())]
superblock, tree = [number for number, name in enumerate(names) if name == b"pread metadata"][:2]
calls.fail_io_arm(os.fsencode(path), tree, errno.EIO, False)
pool_repair.repair(path, swap=True)
"""


@needs_compiler
def test_metadata_that_a_repair_could_not_read_stay_in_place(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with Pool.create(path, size="1M", block_size="4K") as pool:
        pool.create_device("base", "64K").write(0, b"content")
    before = (path / "metadata").read_bytes()
    done = run_preloaded(tmp_path, "-c", REPAIR_WITH_A_FAILED_READ, str(path))
    told = done.stderr.splitlines()[-1]
    assert told.startswith("blocksnap.errors.DeviceIOError: "), done.stderr
    assert f"{path}/metadata stays in its place, because 1 of its reads failed" in told
    assert (path / "metadata").read_bytes() == before
    assert (path / "metadata.repaired").exists()
    with Pool.open(path) as pool:
        assert pool.device("base").read(0, 7) == b"content"
