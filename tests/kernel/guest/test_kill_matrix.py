"""A process that runs a pool in the kernel, killed before and after each ioctl and catalog write."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from blocksnap.device_mapper import Control
from tests.kernel.devices import leftovers
from tests.kernel.kill_matrix import OPERATIONS
from tests.kernel.udevd import udevd, with_udevd

__all__ = ["udevd"]

SHIM = Path(__file__).resolve().parent.parent / "kill_points.c"
CATALOG = {"catalog write", "catalog sync"}
# Calls without which the operation did not happen as it does: the counting would miss others, too.
CALLS = {
    "create": CATALOG | {"message"},
    "snapshot": CATALOG | {"suspend", "message"},
    "delete": CATALOG | {"remove", "message"},
    "grow": CATALOG | {"create", "load", "suspend", "status", "info", "remove", "message", "ioctl 0x1268"},
    "shrink": CATALOG | {"load", "suspend", "message", "ioctl 0x1277"},
    "shrink among others": CATALOG | {"load", "suspend", "message", "ioctl 0x1277"},
    "transaction": CATALOG | {"suspend", "message"},
    "failing transaction": CATALOG | {"message"},
    "extend": {"load", "suspend", "status", "ioctl 0x4c07"},
    "close": {"status", "remove", "ioctl 0x4c01"},
    "recovery": CATALOG | {"create", "load", "suspend", "status", "message", "ioctl 0x4c0a"},
}


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "kill_points.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, SHIM], check=True)
    return library


def calls_survived(shim: Path, folder: Path, *arguments: str) -> list[str]:
    """Kill an operation at each of its calls; return the calls."""
    command = [sys.executable, "-m", "tests.kernel.kill_matrix", *arguments]
    done = subprocess.run(
        ["env", f"LD_PRELOAD={shim}", f"TMPDIR={folder}", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    calls: list[str] = json.loads(done.stdout)
    print(f"{' '.join(arguments)}: {len(calls)} kills at {dict(Counter(calls))}")
    return calls


@pytest.mark.timeout(900)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kill_at_any_call_leaves_all_or_nothing_of_an_operation(
    control: Control, shim: Path, tmp_path: Path, operation: str, when: str
) -> None:
    calls = calls_survived(shim, tmp_path, operation, when)
    assert set(calls) >= CALLS[operation], calls
    assert leftovers(control) == []


@with_udevd
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_any_call_leaves_no_cookie_where_udevd_runs(
    control: Control, shim: Path, tmp_path: Path, udevd: bool, when: str
) -> None:
    assert udevd
    calls = calls_survived(shim, tmp_path, "grow", when, "ioctls")
    assert set(calls) == CALLS["grow"] - CATALOG, calls
    assert leftovers(control) == []
