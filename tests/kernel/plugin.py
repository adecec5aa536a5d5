"""Runs kernel tests in a guest (user_mode.py), one boot for all of a session, and reports each as its own.

Kernel tests are those below tests/kernel/guest and those marked `kernel`. With --kernel=host they run on this
machine's own device-mapper instead. A second pytest runs in the guest, with `reporter` as its voice.
"""

import json
import os
import queue
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.leftovers import clear
from tests.kernel.user_mode import Guest, missing

GUEST_TESTS = Path(__file__).resolve().parent / "guest"
SECONDS_A_TEST = 120  # another number: pytest.mark.timeout
_GRACE = 30
_BOOTS = 3
SUFFIX = "-blocksnap-test"

__all__ = [
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_runtest_protocol",
    "pytest_runtest_teardown",
    "pytest_runtestloop",
    "pytest_sessionfinish",
]


class _Died(Exception):
    """The guest ended, or said nothing for too long, in the middle of a test."""


class GuestSession:
    """The kernel tests of a session, in their order, and the guest that runs them."""

    def __init__(self, items: list[pytest.Item]) -> None:
        self._items = items
        self._lack = missing()
        self._guest: Guest | None = None
        self._boots = 0

    def start(self) -> None:
        """Boot, unless something lacks: the tests run in there while the session is busy with others."""
        if not self._lack:
            self._boot(self._items[0])

    def reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """Yield the reports of one test; the guest is booted if there is none any more."""
        if self._lack:
            yield _report(item, "skipped", f"needs {self._lack}, or --kernel=host")
            return
        try:
            yield from self._run(item)
        except _Died as death:
            yield _report(item, "failed", str(death))

    def _run(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        guest = self._guest or self._boot(item)
        patience = _seconds_of(item) + _GRACE
        while True:
            try:
                line = guest.reports.get(timeout=patience)
            except queue.Empty:
                raise self._death(f"no answer for {patience} s") from None
            if line is None:
                raise self._death("the guest ended in this test")
            data = json.loads(line)
            if data.get("nodeid") != item.nodeid:
                raise self._death(f"{data.get('nodeid')} answered instead of {item.nodeid}")
            if data["$report_type"] == "finished":
                if item is self._items[-1]:
                    self.close()
                return
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
            assert isinstance(report, pytest.TestReport)
            if isinstance(report.longrepr, list):  # a skip's tuple, as JSON has it
                report.longrepr = tuple(report.longrepr)
            yield report

    def _boot(self, first: pytest.Item) -> Guest:
        if self._boots == _BOOTS:
            raise _Died(f"not run: the guest died {_BOOTS} times")
        self._boots += 1
        items = self._items[self._items.index(first) :]
        wanted = [item.nodeid for item in items]
        files = list(dict.fromkeys(str(item.path) for item in items))
        command = [sys.executable, "-m", "pytest", "--kernel=host", "-p", "tests.kernel.reporter"]
        command += ["-p", "no:cacheprovider", "--basetemp=/dev/shm/pytest", f"--timeout={SECONDS_A_TEST}"]
        command.append(f"--rootdir={first.config.rootpath}")
        self._guest = Guest(
            [*command, *files],
            environment={
                "BLOCKSNAP_KERNEL_TESTS": "/run/host/tests",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            files={"tests": json.dumps(wanted)},
        )
        return self._guest

    def _death(self, what: str) -> _Died:
        assert self._guest is not None
        guest, self._guest = self._guest, None
        if guest.running:
            guest.kill()
        message = f"{what}\n--- its console\n{guest.console()}\n--- its output\n{guest.output()[-4000:]}"
        guest.close()
        return _Died(message)

    def close(self) -> None:
        guest, self._guest = self._guest, None
        if guest is not None:
            guest.close()


def _seconds_of(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else SECONDS_A_TEST


def _report(item: pytest.Item, outcome: Any, text: str) -> pytest.TestReport:
    path, line, _ = item.location
    longrepr: Any = (path, line or 0, f"Skipped: {text}") if outcome == "skipped" else text
    return pytest.TestReport(item.nodeid, item.location, {}, outcome, longrepr, "call")


def _is_kernel_test(item: pytest.Item) -> bool:
    return GUEST_TESTS in item.path.parents or item.get_closest_marker("kernel") is not None


_session = pytest.StashKey[GuestSession]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("blocksnap").addoption(
        "--kernel",
        choices=("guest", "host"),
        default="guest",
        help="where kernel tests run: in a user-mode kernel (the default) or on this machine's device-mapper",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernel: needs a kernel with device-mapper, see tests/kernel")
    if config.getoption("--kernel") == "host":
        os.environ["BLOCKSNAP_DEVICE_SUFFIX"] = SUFFIX


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put kernel tests last: meanwhile they run in the guest."""
    if config.getoption("--kernel") == "guest":
        items.sort(key=_is_kernel_test)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    if session.config.getoption("--kernel") == "host" or session.config.option.collectonly:
        return
    if items := [item for item in session.items if _is_kernel_test(item)]:
        session.stash[_session] = GuestSession(items)
        session.stash[_session].start()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if item.config.getoption("--kernel") == "host" or not _is_kernel_test(item):
        return None
    stash = item.session.stash
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in stash[_session].reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # The test before may have left its module set up for this one, which was run elsewhere.
    item.session._setupstate.teardown_exact(nextitem)
    return True


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Clear by force what a kernel test and its fixtures leave, and have that test fail, no later one."""
    try:
        yield
    finally:
        if _is_kernel_test(item) and (left := clear(_base_of(item))):
            raise AssertionError(f"left behind, and cleared: {'; '.join(left)}")


def _base_of(item: pytest.Item) -> Path:
    factory: pytest.TempPathFactory = item.config._tmp_path_factory  # type: ignore[attr-defined]
    return factory.getbasetemp()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _session in session.stash:
        session.stash[_session].close()
