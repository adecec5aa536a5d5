"""Fixtures of the tests that run under a kernel with device-mapper."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.device_mapper import Control
from tests.kernel.devices import Disks, sweep


@pytest.fixture
def control(disks: Disks) -> Iterator[Control]:  # noqa: ARG001 - it detaches after the sweep
    """The kernel's device-mapper; afterwards nothing that the test made is left."""
    with Control.open() as opened:
        sweep(opened)
        yield opened
        sweep(opened)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    made = Disks(tmp_path)
    yield made
    made.detach()
