"""udevd for tests, which run without it and with it. The fixture is imported by the modules that use it."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from blocksnap.udev import udev_runs

__all__ = ["running_udevd", "udevd", "with_udevd"]

UDEVD = Path("/lib/systemd/systemd-udevd")
RULES = Path("/lib/udev/rules.d/95-dm-notify.rules")


@contextmanager
def running_udevd() -> Iterator[None]:
    """Let udevd run, where it does not run already."""
    if not (UDEVD.exists() and RULES.exists()):
        pytest.skip("needs udevd and the rules of device-mapper (apt-get install udev dmsetup)")
    if udev_runs():
        yield
        return
    subprocess.run([UDEVD, "--daemon"], check=True)
    try:
        yield
    finally:
        subprocess.run(["udevadm", "control", "--exit"], check=True)
        Path("/run/udev/control").unlink(missing_ok=True)


@pytest.fixture(scope="module", params=[False, True], ids=["without udevd", "with udevd"])
def udevd(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether udevd runs: it is started, or the test skipped, to make that so."""
    wanted: bool = request.param
    if not wanted and udev_runs():
        pytest.skip("udevd runs on this machine")
    with running_udevd() if wanted else nullcontext():
        yield wanted


with_udevd = pytest.mark.parametrize("udevd", [True], indirect=True, scope="module")
