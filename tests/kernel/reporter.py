"""The voice of the pytest that runs in the guest: every report as a line on a serial line of its own."""

import json
import os
from pathlib import Path

import pytest

_line = os.open("/dev/ttyS1", os.O_WRONLY | os.O_NOCTTY)


def _tell(data: object) -> None:
    text = json.dumps(data, default=str).encode() + b"\n"
    while text:
        text = text[os.write(_line, text) :]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that the session outside wants, in its order."""
    wanted = json.loads(Path(os.environ["BLOCKSNAP_KERNEL_TESTS"]).read_text())
    found = {item.nodeid: item for item in items}
    keep = [found[nodeid] for nodeid in wanted if nodeid in found]
    config.hook.pytest_deselected(items=[item for item in items if item not in keep])
    items[:] = keep


class _Reporter:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _tell(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        _tell({"$report_type": "finished", "nodeid": nodeid})


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Reporter(config))
