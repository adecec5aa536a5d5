"""Fixtures of the tests that run under a kernel with device-mapper."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.device_mapper import Control
from blocksnap.mount import loop_devices
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


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where a pool may lie; afterwards neither the kernel nor a loop device has anything of it."""
    yield tmp_path / "pool"
    with Control.open() as control:
        assert sweep(control) == []
    assert [loop.backing_path for loop in loop_devices() if str(tmp_path) in loop.backing_path] == []
